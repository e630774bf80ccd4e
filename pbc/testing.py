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
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pbc import compiler
from pbc.bundle.ladder import Ladder
from pbc.data import InputSpec
from pbc.frontend import models
from pbc.ir.graph import graph_text, parameter_names
from pbc.ir.levels import ladder
from pbc.ir.pipeline import Pass, PassPipeline
from pbc.ir.program import Program
from pbc.lower.engine_choice import DEFAULT_ENGINE

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
    """Capture a module as `pbc compile --engine pytorch` does and run some passes over it.

    The program shares the module's tensors; what the strategy inserts stays in the module.
    """
    spec = InputSpec(shape, models.IMAGENET_MEAN, models.IMAGENET_STD)
    source = models.given(module, type(module).__name__, spec)
    options = compiler.CompileOptions(
        target=target, engine=DEFAULT_ENGINE, strategy=strategy, shape=shape, seed=seed
    )
    return run_passes(compiler.start(source, options), *passes)


def retarget(program: Program, strategy: str, trainable: Iterable[str]) -> Program:
    """Return the same captured model with other parameters to train: capturing takes long.

    Stopped gradients and folded constants stay those of the strategy it was captured for.
    """
    if program.model is None:
        raise ValueError("only a program that was not split yet can change its strategy")
    program = with_request(program.copy(), strategy=strategy)
    return replace(program, trainable=frozenset(trainable))


def with_request(program: Program, **changes: Any) -> Program:
    """Return the program as if something else had been asked for, such as another engine."""
    return replace(program, request=replace(program.request, **changes))


def run_passes(program: Program, *passes: Pass) -> Program:
    """Run passes in the order given, with the pipeline's checks after each."""
    return PassPipeline(tuple((type(step).__name__, step) for step in passes)).run(program)


def graph_of(program: Program, name: str) -> GraphModule:
    """Return a graph by the name that it has in the program's text, such as `prefix/0`."""
    return {str(known): graph for known, graph in program.graphs.items()}[name]


def assert_text(program: Program, expected: str, graph: str | None = None) -> None:
    """Hold the program's text, or that of one of its graphs, against the expected one.

    Both may be indented and framed by blank lines.
    """
    got = program.text() if graph is None else graph_text(graph, graph_of(program, graph))
    wanted = textwrap.dedent(expected).strip()
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
        expected = before.logits(level, before.network.example)
        got = after.logits(level, before.network.example)
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
    """Check that a pass did nothing: the same text, tensors, levels and artifacts."""
    if before.text() != after.text():
        raise AssertionError("the program's text changed")
    one, other = _tensors(before), _tensors(after)
    changed = sorted(one.keys() ^ other.keys())
    changed += [
        name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])
    ]
    if changed:
        raise AssertionError(f"tensors changed: {changed}")
    if rungs(before) != rungs(after) or before.artifacts != after.artifacts:
        raise AssertionError("the levels or the artifacts changed")


def rungs(program: Program) -> Ladder:
    """Return the program's levels, made and planned, as a device would know them."""
    return ladder((*program.levels, *program.plans), program.cost_model)


def gradients(program: Program, level: int = 0) -> dict[str, Tensor]:
    """The gradients of everything that trains, for a fixed loss on the example images.

    The prefix runs without gradients, as on the device.
    """
    values = {n: p.detach().clone().requires_grad_(True) for n, p in program.parameters.items()}
    example = program.network.example
    if program.model is not None:
        logits = replace(program, parameters=values).logits(level, example)
    else:
        own = program.levels[level]
        with torch.no_grad():
            features = own.features(example)
        theta = [values[name] for name in parameter_names(own.body)]
        (logits,) = own.body(*features.values(), *theta)
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
    loss = _loss(module.eval()(program.network.example))
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
    skipped = {"network", "model", "levels", "policy", "parameters", "calibration", "dims"}
    shown = {f.name: getattr(program, f.name) for f in fields(program) if f.name not in skipped}
    return {name: repr(value) for name, value in shown.items()} | {
        "levels": repr([(level.rung(0), level.keep) for level in program.levels])
    }
