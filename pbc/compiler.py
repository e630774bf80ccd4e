"""The compiler: model in, bundle out. What the command line can do, a script can."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbc import plugins
from pbc.bundle import Bundle, write
from pbc.bundle.ladder import Ladder
from pbc.data import class_names
from pbc.errors import PbcError, UsageError, suggest
from pbc.frontend import models, strategy
from pbc.frontend.capture import capture
from pbc.ir import pipeline
from pbc.ir.calibration import Calibration
from pbc.ir.program import MODEL, Head, Program, Provenance
from pbc.ir.work import clear
from pbc.lower import manifest, self_test_numbers
from pbc.lower.cost_profile import CostProfile
from pbc.lower.lowering import Lowering, Tunes, missing_packages
from pbc.proxies import parallel
from pbc.target import Target, load_target
from pbc.util.extras import EXTRAS

DEFAULT_ENGINE = "pytorch"
UP_TO_PLAN = pipeline.STAGES.index("plan")


@dataclass(frozen=True)
class Options:
    """Everything that `pbc compile` takes besides the model.

    classes: how many; `data` (class folders or a zip of them) names them. With neither the head is
    left open. shape: channels, height, width; None is the model's own. levels counts proxies.
    axes: what a level may give up; see pbc.passes.plan_levels. importance: the criterion that says
    which channels of it stay; see pbc.proxies.importance. cost: a profile of the device, to plan
    even steps by. tune: minutes to search faster code for, where the engine's lowering can; 0 takes
    what earlier calls for this output found.
    passes, without: names of passes to add and to leave out. folder: write the bundle as a folder.
    command: for the provenance.
    """

    target: str = "host"
    weights: str = models.DEFAULT
    strategy: str = "linear-probe"
    classes: int | None = None
    data: Path | None = None
    levels: int = 4
    min_cost: float = 0.3
    axes: tuple[str, ...] = ("precision", "resolution", "width")
    importance: str = "magnitude"
    cost: Path | None = None
    engine: str | None = None
    calibration: Path | None = None
    shape: tuple[int, int, int] | None = None
    batch: int = 8
    seed: int = 0
    align_steps: int | None = None
    align_time: float | None = None
    tune: float | None = None
    passes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    dump_ir: Path | None = None
    folder: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.levels < 0:
            raise UsageError(f"--levels is {self.levels}; expected 0 (no proxies) or more")
        if not 0 < self.min_cost < 1:
            raise UsageError(f"--min-cost is {self.min_cost}; expected between 0 and 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; expected 0 or more")
        if self.batch < 1:
            raise UsageError(f"--batch is {self.batch}; expected 1 or more")
        if self.tune is not None and self.tune < 0:
            raise UsageError(f"--tune is {self.tune}; expected minutes, or 0")
        if self.classes is not None and self.classes < 2:
            raise UsageError(f"--classes is {self.classes}; expected 2 or more")


@dataclass(frozen=True)
class Plan:
    """What a compilation would do: its passes, levels with expected costs, and file sizes."""

    passes: tuple[str, ...]
    ladder: Ladder
    file_bytes: Mapping[str, int]
    notes: tuple[str, ...]
    engine: str
    requires: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "passes": list(self.passes),
            "engine": self.engine,
            "requires": dict(self.requires),
            "cost_model": self.ladder.cost_model,
            "levels": self.ladder.to_json(),
            "file_bytes": dict(self.file_bytes),
            "notes": list(self.notes),
        }


def compile(model: str, output: Path | str, options: Options = Options()) -> Bundle:
    """Compile a model (see pbc.frontend.models.load for its names) into a bundle at `output`.

    Under torchrun every process calls this, aligns together with the others, and gets the bundle
    that the first one writes. Long work is kept beside the output while it runs, so that the same
    call after an interruption continues; when the bundle is written it goes, all but what tuning
    measured. Raises PbcError for what the user can fix; nothing is written then.
    """
    with parallel.group():
        return _compile(model, Path(output), options)


def _compile(model: str, output: Path, options: Options) -> Bundle:
    if not output.parent.is_dir():
        raise PbcError(f"the folder {output.parent} of {output} does not exist")
    if output.is_dir() != options.folder and output.exists():
        kind = "a folder" if output.is_dir() else "a file"
        raise PbcError(f"{output} is {kind}; a bundle of the other kind cannot replace it")
    if not os.access(output.parent, os.W_OK):
        raise PbcError(f"the folder {output.parent.resolve()} of {output} is not writable")
    program = begin(model, options)
    if options.calibration is not None:
        data = Calibration.open(options.calibration, program.input, options.seed)
        program = replace(program, calibration=data)
    work = output.with_name(f".{output.name}.work")
    program = replace(program, work=work)
    program = _passes(options).run(program, options.dump_ir)
    notes = (*program.notes, *_without_calibration(options, program.ladder))
    program = replace(program, notes=notes)
    if parallel.rank() == 0:
        write(output, *package(program), as_folder=options.folder)
        clear(work)
    parallel.wait()
    return Bundle.open(output)


def plan(model: str, options: Options = Options()) -> Plan:
    """What `compile` would do, without aligning, measuring the result or writing anything."""
    passes = _passes(options)
    program = begin(model, options)
    planning = [p for p in passes.passes if pipeline.STAGES.index(p[1].stage) <= UP_TO_PLAN]
    program = pipeline.PassPipeline(tuple(planning)).run(program)
    assert program.dims is not None
    expected = {
        f"level {level}": program.dims.bytes(sizes) for level, sizes in enumerate(program.sizes)
    }
    theta = len(manifest.trainable_file(program))
    return Plan(
        passes=tuple(name for name, _ in passes.passes),
        ladder=program.ladder,
        file_bytes={**expected, "trainable": theta},
        notes=(*program.notes, *_without_calibration(options, program.ladder)),
        engine=program.engine,
        requires=_requires(program),
    )


def _passes(options: Options) -> pipeline.PassPipeline:
    return pipeline.build(vars(options), options.passes, options.without)


def begin(model: str | models.Source, options: Options) -> Program:
    """Load the model, apply the strategy and capture it: the program that passes start from.

    model: its name, or a module with its facts; what a strategy inserts stays in that module.
    """
    if options.cost is not None:
        CostProfile.open(options.cost)  # what cannot be read is refused before anything takes long
    target = load_target(options.target)
    engine, notes = choose_engine(target, options.engine)
    plugins.load("pbc.lowerings", engine)().check(target)
    if options.tune is not None:
        require_tuning(target, engine)
    chosen = strategy.parse(options.strategy)
    names, count = _classes(options)
    if isinstance(model, models.Source):
        source = model
    else:
        source = models.load(model, options.weights, options.shape, options.seed)
    if source.weights == models.RANDOM:
        notes += ("random weights: costs are real, fidelity and accuracy mean nothing",)
    module = source.module
    torch.manual_seed(options.seed)
    if count is not None:
        _resize_classifier(module, source.classifier, count)
    example = torch.randn(2, *source.input.shape)
    with torch.no_grad():
        try:
            chosen.insert(module, example)
            reference = module.eval()(example)
        except PbcError:
            raise
        except Exception as error:  # whatever a model raises, it is the model that failed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PbcError(
                f"{source.name} does not run on inputs of shape {list(source.input.shape)}: "
                f"{reason}"
            ) from error
    if not isinstance(reference, torch.Tensor):
        raise PbcError(
            f"{source.name} returns a {type(reference).__name__}; pbc trains models that return "
            "one tensor of logits"
        )
    if not torch.isfinite(reference).all():
        raise PbcError(
            f"{source.name} puts out values that are not finite: its weights ({source.weights}) "
            "are damaged"
        )
    trainable = chosen.trainable(module, source.classifier)
    classifier = module.get_submodule(source.classifier)
    assert isinstance(classifier, nn.Linear)
    if reference.shape != (2, classifier.out_features):
        raise PbcError(
            f"{source.name} puts out {list(reference.shape)} for two images, but its last linear "
            f"layer {source.classifier} has {classifier.out_features} outputs; "
            "pbc trains classifiers"
        )
    has_bias = classifier.bias is not None
    return Program(
        graphs={MODEL: capture(module, source.input.shape)},
        strategy=options.strategy,
        trainable=trainable,
        target=target,
        engine=engine,
        input=source.input,
        head=Head(
            f"{source.classifier}.weight",
            f"{source.classifier}.bias" if has_bias else None,
            classifier.in_features,
        ),
        example=example,
        reference=reference,
        provenance=Provenance(source.name, source.weights, source.weights_sha256, options.command),
        batch=options.batch,
        seed=options.seed,
        class_names=names,
        class_count=count,
        notes=notes,
    )


def _without_calibration(options: Options, ladder: Ladder) -> tuple[str, ...]:
    if options.calibration is not None or len(ladder) == 1:
        return ()
    return ("no --calibration: proxies stay unaligned, and nothing is routed to them",)


def choose_engine(target: Target, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The engine to lower to, and a note when it is not the one that the target prefers.

    Raises UsageError for an engine that was asked for and that the target or pbc does not have, and
    PbcError for one whose packages are not installed here.
    """
    available = plugins.entries("pbc.lowerings")
    if asked is not None:
        if asked in target.refused:
            raise UsageError(
                f"engine {asked!r} does not run on {target.name}: {target.refused[asked]}"
            )
        if asked not in available and asked not in target.engines:
            raise UsageError(suggest("engine", asked, {*available, *target.engines}))
        if asked not in target.engines:
            raise UsageError(
                f"engine {asked!r} does not run on {target.name}, which allows "
                f"{', '.join(target.engines)}"
            )
        if asked not in available:
            raise UsageError(
                f"engine {asked!r} is not installed (available: {', '.join(available)})"
            )
        if (needs := _needs(available[asked])) is not None:
            raise PbcError(f"compiling for engine {asked!r} {needs}")
        return asked, ()
    for engine in dict.fromkeys((target.engine, *target.engines, DEFAULT_ENGINE)):
        if engine not in available or engine in target.refused:
            continue
        if _needs(available[engine]) is not None:
            continue
        if engine == target.engine:
            return engine, ()
        needs = _needs(available[target.engine]) if target.engine in available else None
        wanted = f"{target.name} prefers engine {target.engine}, which"
        return engine, (f"{wanted} {needs or 'is not installed'}: using {engine}",)
    found = {name: _needs(available[name]) for name in target.engines if name in available}
    missing = ", ".join(f"{name} {found.get(name, 'is not installed')}" for name in target.engines)
    raise PbcError(f"no engine of {target.name} can be compiled for here: {missing}")


def require_tuning(target: Target, engine: str) -> None:
    """Raise UsageError where an engine's code for a target cannot be tuned here."""
    lowering = plugins.load("pbc.lowerings", engine)()
    if not isinstance(lowering, Tunes):
        entries = plugins.entries("pbc.lowerings")
        able = ", ".join(name for name in entries if issubclass(entries[name].load(), Tunes))
        raise UsageError(
            f"--tune does nothing for engine {engine!r}, whose code is not made here; engines with "
            f"code to tune: {able or 'none is installed'}"
        )
    reason = lowering.untunable(target)
    if reason is not None:
        raise UsageError(reason)


def _needs(entry: plugins.Entry) -> str | None:
    """What is missing here to lower to this engine, in words; None where nothing is."""
    missing = missing_packages(entry.load())
    if not missing:
        return None
    extras = sorted({EXTRAS[package] for package in missing if package in EXTRAS})
    how = f": pip install 'pbc[{','.join(extras)}]'" if extras else ""
    return f"needs {', '.join(missing)}{how}"


def _classes(options: Options) -> tuple[tuple[str, ...] | None, int | None]:
    if options.data is None:
        return None, options.classes
    names = tuple(class_names(options.data))
    if len(names) < 2:
        raise PbcError(f"{options.data} has one class folder, {names[0]!r}; two are the least")
    if options.classes is not None and options.classes != len(names):
        raise UsageError(
            f"--classes is {options.classes}, but {options.data} has {len(names)} class folders"
        )
    return names, len(names)


def _resize_classifier(module: nn.Module, name: str, count: int) -> None:
    old = module.get_submodule(name)
    assert isinstance(old, nn.Linear)
    owner, _, leaf = name.rpartition(".")
    new = nn.Linear(old.in_features, count, bias=old.bias is not None)
    setattr(module.get_submodule(owner), leaf, new)


def package(program: Program) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the files of a lowered program."""
    lowering = plugins.load("pbc.lowerings", program.engine)()
    assert program.dims is not None
    files = {
        **program.artifacts,
        manifest.TRAINABLE: manifest.trainable_file(program),
        manifest.DIMS: json.dumps(manifest.dims_table(program.dims), indent=1).encode(),
    }
    graph_files = {name: lowering.graph_file(name) for name in program.graphs}
    made = manifest.manifest(program, _requires(program), graph_files, lowering.contents(program))
    return {**made, "self_test": self_test_numbers.numbers(program, made)}, files


def _requires(program: Program) -> dict[str, str]:
    """What the board must have: its target says so, and the lowering to its engine."""
    lowering: Lowering = plugins.load("pbc.lowerings", program.engine)()
    return program.target.requirements(program.engine, lowering.requires())
