"""Checks for tests of passes, pbc's own and those of others.

before = make_program(MyNet(), passes=[MarkTrainable(), SplitPrefix()])
after = assert_unchanged(MyPass(), before)
assert_text(after, '''
    graph body/0 takes
    …
''')
assert_equivalent(before, after)
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from pbc import compiler
from pbc.data import InputSpec
from pbc.frontend import models
from pbc.ir.pipeline import Pass, PassPipeline
from pbc.ir.program import MODEL, Program, body

TARGET = "generic-x86-64"
"""Not this machine, so that nothing is measured and a test gives the same result everywhere."""


def make_program(
    module: nn.Module,
    strategy: str = "linear-probe",
    shape: tuple[int, int, int] = (3, 16, 16),
    *,
    passes: Iterable[Pass] = (),
    target: str = TARGET,
    seed: int = 0,
) -> Program:
    """Capture a module as `pbc compile` does and run some passes over it.

    The program shares the module's tensors; what the strategy inserts stays in the module.
    """
    source = models.Source(
        name=type(module).__name__,
        module=module.eval(),
        input=InputSpec(shape, models.IMAGENET_MEAN, models.IMAGENET_STD),
        classifier=models.last_linear(module, type(module).__name__),
        weights="given",
        weights_sha256=None,
    )
    options = compiler.CompileOptions(target=target, strategy=strategy, shape=shape, seed=seed)
    return run_passes(compiler.start(source, options), *passes)


def retarget(program: Program, strategy: str, trainable: Iterable[str]) -> Program:
    """The same captured model with other parameters to train: capturing is what takes long.

    Stopped gradients and folded constants stay those of the strategy it was captured for.
    """
    if MODEL not in program.graphs:
        raise ValueError("only a program that was not split yet can change its strategy")
    return replace(program.copy(), strategy=strategy, trainable=frozenset(trainable))


def run_passes(program: Program, *passes: Pass) -> Program:
    """Run passes in the order given, with the pipeline's checks after each."""
    return PassPipeline(tuple((type(step).__name__, step) for step in passes)).run(program)


def assert_text(program: Program, expected: str, graph: str | None = None) -> None:
    """Hold the program's text, or that of one of its graphs, against the expected one.

    Both may be indented and framed by blank lines.
    """
    shown = program if graph is None else replace(program, graphs={graph: program.graphs[graph]})
    got, wanted = shown.text(), textwrap.dedent(expected).strip()
    if got != wanted:
        difference = difflib.unified_diff(
            wanted.splitlines(), got.splitlines(), "expected", "got", lineterm=""
        )
        raise AssertionError("the program's text differs:\n" + "\n".join(difference))


def assert_equivalent(
    before: Program, after: Program, level: int = 0, tolerance: float = 1e-5
) -> None:
    """Check that a level computes the same logits in both programs, relative to the largest."""
    with torch.no_grad():
        expected = before.logits(level, before.example)
        got = after.logits(level, before.example)
    _assert_close({"the logits": got}, {"the logits": expected}, tolerance)


def assert_unchanged(step: Pass, program: Program) -> Program:
    """Run a pass, check that it left its input as it was, and return what it made.

    Compares the graphs' text, every frozen tensor and trainable parameter bit for bit, and the
    program's other fields.
    """
    text, before, shallow = program.text(), _tensors(program), _other_fields(program)
    result = step(program)
    result.check()
    if program.text() != text:
        raise AssertionError(
            f"{type(step).__name__} changed the graphs of the program it was given"
        )
    after = _tensors(program)
    changed = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
    if changed or before.keys() != after.keys():
        raise AssertionError(f"{type(step).__name__} changed tensors that it was given: {changed}")
    different = [name for name, value in _other_fields(program).items() if value != shallow[name]]
    if different:
        raise AssertionError(f"{type(step).__name__} changed fields that it was given: {different}")
    return result


def assert_same(before: Program, after: Program) -> None:
    """Check that a pass did nothing: the same text, tensors and ladder."""
    if before.text() != after.text():
        raise AssertionError("the program's text changed")
    one, other = _tensors(before), _tensors(after)
    changed = sorted(one.keys() ^ other.keys())
    changed += [
        name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])
    ]
    if changed:
        raise AssertionError(f"tensors changed: {changed}")
    if before.ladder != after.ladder or before.artifacts != after.artifacts:
        raise AssertionError("the ladder or the artifacts changed")


def gradients(program: Program, level: int = 0) -> dict[str, Tensor]:
    """The gradients of everything that trains, for a fixed loss on the example images.

    The prefix runs without gradients, as on the device.
    """
    values = {n: p.detach().clone().requires_grad_(True) for n, p in program.parameters.items()}
    trained = replace(program, parameters=values)
    if MODEL in program.graphs:
        logits = trained.logits(level, program.example)
    else:
        with torch.no_grad():
            features = program.features(level, program.example)
        graph = program.graphs[body(level)]
        (logits,) = graph(*features, *trained.parameter_values(graph))
    grads = torch.autograd.grad(_loss(logits), list(values.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(values.items(), grads, strict=True)
    }


def eager_gradients(module: nn.Module, program: Program) -> dict[str, Tensor]:
    """The same gradients from the eager module that the program was captured from."""
    values = {n: p for n, p in module.named_parameters() if n in program.trainable}
    flags = {name: value.requires_grad for name, value in values.items()}
    for value in values.values():
        value.requires_grad_(True)
    loss = _loss(module.eval()(program.example))
    grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    for name, value in values.items():
        value.requires_grad_(flags[name])
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(values.items(), grads, strict=True)
    }


def assert_gradients(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-4
) -> None:
    """Check that two sets of gradients agree, each relative to its largest entry."""
    if got.keys() != expected.keys():
        raise AssertionError(f"other parameters train: {sorted(got.keys() ^ expected.keys())}")
    _assert_close(got, expected, tolerance)


def _assert_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    for name, value in expected.items():
        if got[name].shape != value.shape:
            raise AssertionError(
                f"{name} has shape {list(got[name].shape)}; expected {list(value.shape)}"
            )
        error = float((got[name] - value).abs().max())
        scale = max(float(value.abs().max()), 1e-6)
        if not error <= tolerance * scale:
            raise AssertionError(
                f"{name} differs by {error:.1e}, {error / scale:.1e} of its largest entry "
                f"(at most {tolerance:.0e})"
            )


def _loss(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits)) % logits.shape[1]
    return nn.functional.cross_entropy(logits, labels)


def _tensors(program: Program) -> dict[str, Tensor]:
    found = {f"θ[{name}]": value.detach().clone() for name, value in program.parameters.items()}
    for name, graph in program.graphs.items():
        for key, value in (*graph.named_parameters(), *graph.named_buffers()):
            found[f"{name}: {key}"] = value.detach().clone()
    return found


def _other_fields(program: Program) -> dict[str, str]:
    """The plain fields as text; tensors, graphs and calibration data are not among them."""
    skipped = {"graphs", "parameters", "example", "reference", "calibration", "dims", "artifacts"}
    return {
        f.name: repr(getattr(program, f.name)) for f in fields(program) if f.name not in skipped
    }
