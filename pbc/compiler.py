"""The compiler: model in, bundle out. What the command line can do, a script can."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pbc.bundle import Bundle, write
from pbc.bundle.ladder import Ladder
from pbc.data import labelled
from pbc.data.spec import RESIZES
from pbc.errors import PbcError, UsageError, suggest
from pbc.frontend import models, strategy
from pbc.frontend.origin import Origin
from pbc.frontend.start import begin, loaded
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir import pipeline
from pbc.ir.calibration import Calibration
from pbc.ir.dim_rules import dims_of
from pbc.ir.levels import ladder
from pbc.ir.program import Block, Program, Request
from pbc.ir.stages import STAGES
from pbc.ir.work import clear
from pbc.lower import manifest, self_test_numbers
from pbc.lower.backend import backend
from pbc.lower.cost_profile import CostProfile
from pbc.lower.engine_choice import choose_engine, require_tuning
from pbc.proxies import parallel
from pbc.proxies.use import USED
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.target import load_target
from pbc.util.artifacts import default_folder
from pbc.util.progress import tell

# torch's own compiler, which nothing here uses, makes a folder as soon as it is imported.
with suppress(OSError):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder() / "torchinductor"))

UP_TO_PLAN = STAGES.index("plan")


@dataclass(frozen=True)
class CompileOptions:
    """Everything that `pbc compile` takes besides the model.

    blocks: a glob over the names of the modules that the strategy counts; None takes what pbc finds
    (see pbc.frontend.blocks). contributions: what `pbc analyze` measured, for a strategy that
    chooses within a budget.
    classes: how many are expected; `data` (class folders or a zip of them) names them. Training
    takes those of its photos. shape: channels, height, width; None is the model's own. resize:
    "crop" or "squash"; None is the way of the zoo that the model is from. levels counts proxies.
    axes: what a level may give up; ladder: "used", levels that runs would use, or "even", in even
    steps of cost; see pbc.passes.plan_levels. importance: the criterion that says
    which channels of it stay; see pbc.proxies.importance. cost: a profile of the device, to plan
    even steps by. align_loss: what proxies are distilled by; see pbc.proxies.align_losses.
    tune: minutes to search faster code for, where the engine's lowering can; 0 takes what earlier
    calls for this output found.
    passes, without: names of passes to add and to leave out. folder: write the bundle as a folder.
    command: for the provenance.
    """

    target: str = "host"
    weights: str = models.DEFAULT
    strategy: str = "linear-probe"
    blocks: str | None = None
    contributions: Path | None = None
    classes: int | None = None
    data: Path | None = None
    levels: int = 4
    min_cost: float = 0.3
    axes: tuple[str, ...] = ("precision", "resolution", "tokens", "width")
    ladder: str = USED
    importance: str = "magnitude"
    cost: Path | None = None
    engine: str | None = None
    calibration: Path | None = None
    shape: tuple[int, int, int] | None = None
    resize: str | None = None
    batch: int = 8
    seed: int = 0
    align_steps: int | None = None
    align_time: float | None = None
    align_loss: str = "features"
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
        if self.resize is not None and self.resize not in RESIZES:
            raise UsageError(suggest("resize", self.resize, RESIZES))
        if self.classes is not None and self.classes < 2:
            raise UsageError(f"--classes is {self.classes}; expected 2 or more")


@dataclass(frozen=True)
class Forecast:
    """A compilation that was not run: its passes, levels with expected costs, and file sizes.

    memory: what training holds, as in the manifest; None for an engine that derives no step.
    """

    passes: tuple[str, ...]
    ladder: Ladder
    file_bytes: Mapping[str, int]
    notes: tuple[str, ...]
    engine: str
    requires: Mapping[str, str]
    blocks: tuple[Block, ...]
    memory: Mapping[str, Mapping[str, int]] | None

    def to_json(self) -> dict[str, Any]:
        return {
            "passes": list(self.passes),
            "engine": self.engine,
            "requires": dict(self.requires),
            "cost_model": self.ladder.cost_model,
            "levels": self.ladder.to_json(),
            "file_bytes": dict(self.file_bytes),
            "blocks": [vars(block) for block in self.blocks],
            "memory": self.memory,
            "notes": list(self.notes),
        }


def compile(model: str, output: Path | str, options: CompileOptions = CompileOptions()) -> Bundle:
    """Compile a model (see pbc.frontend.models.load for its names) into a bundle at `output`.

    Under torchrun every process calls this, aligns together with the others, and gets the bundle
    that the first one writes. Long work is kept beside the output while it runs, so that the same
    call after an interruption continues; when the bundle is written it goes, all but what tuning
    measured. Raises PbcError for what the user can fix; nothing is written then.
    """
    with parallel.group():
        output = Path(output)
        require_writable(output, options)
        work = output.with_name(f".{output.name}.work")
        program = lowered(start(model, options, work), options)
        if parallel.rank() == 0:
            bundle = write(output, *package(program), as_folder=options.folder)
            Origin.of(bundle.digest, model, options.weights).save(output)
            clear(work)
        parallel.wait()
        return Bundle.open(output)


def forecast(model: str, options: CompileOptions = CompileOptions()) -> Forecast:
    """Return what `compile` would do, without trying, aligning, measuring or writing.

    Costs are multiply-accumulates, or what a profile says: `compile` measures on this machine. What
    the engine cannot run is not found: `compile` refuses it, or makes no level of it.
    """
    passes = _passes(options, trials=False)
    program = start(model, options)
    elsewhere = replace(program.request.target, local=False)
    program = replace(program, request=replace(program.request, target=elsewhere))
    planning = [p for p in passes.passes if STAGES.index(p[1].stage) <= UP_TO_PLAN]
    program = pipeline.PassPipeline(tuple(planning)).run(program, compared=False)
    planned = ladder((*program.levels, *program.plans), program.cost_model)
    dims, sizes = dims_of(program), [{}, *(plan.sizes for plan in program.plans)]
    expected = {f"level {level}": dims.bytes(shrunk) for level, shrunk in enumerate(sizes)}
    theta = len(manifest.trainable_file(program))
    return Forecast(
        passes=tuple(name for name, _ in passes.passes),
        ladder=planned,
        file_bytes={**expected, "trainable": theta},
        notes=(*program.notes, *_without_calibration(options, len(planned))),
        engine=program.request.engine,
        requires=_requires(program),
        blocks=program.network.blocks,
        memory=_memory(program, passes),
    )


# ---- what compile does, in its order -------------------------------------------------------


def require_writable(output: Path, options: CompileOptions) -> None:
    """Raise PbcError where the bundle could not be written after all the work."""
    if not output.parent.is_dir():
        raise PbcError(f"the folder {output.parent} of {output} does not exist")
    if output.is_dir() != options.folder and output.exists():
        kind = "a folder" if output.is_dir() else "a file"
        raise PbcError(f"{output} is {kind}; a bundle of the other kind cannot replace it")
    if not os.access(output.parent, os.W_OK):
        raise PbcError(f"the folder {output.parent.resolve()} of {output} is not writable")


def start(model: str | models.Source, options: CompileOptions, work: Path | None = None) -> Program:
    """Check what was asked for, then load and capture the model.

    work: a folder for what lets an interrupted compilation continue.
    """
    request, notes = requested(options)
    request = replace(request, work=work)
    operators = backend(request.engine).lowering().operators() or OPS
    source = loaded(model, options.weights, options.shape, options.seed, options.resize)
    request, decisions = _decided(source, request, options, operators)
    program = begin(source, request, operators=operators)
    return replace(program, notes=(*notes, *decisions, *program.notes))


def requested(options: CompileOptions) -> tuple[Request, tuple[str, ...]]:
    """Return what the options ask for, and notes; whatever cannot be is refused here."""
    _passes(options)
    if options.cost is not None:
        CostProfile.open(options.cost)  # what cannot be read is refused before anything takes long
    target = load_target(options.target)
    engine, notes = choose_engine(target, options.engine)
    backend(engine).lowering().check(target)
    if options.tune is not None:
        require_tuning(target, engine)
    names, count = _classes(options)
    request = Request(
        target=target,
        engine=engine,
        strategy=options.strategy,
        blocks=options.blocks,
        batch=options.batch,
        seed=options.seed,
        class_names=names,
        class_count=count,
        command=options.command,
    )
    return request, notes


def lowered(program: Program, options: CompileOptions) -> Program:
    """Run all passes over a program, with its calibration data."""
    if options.calibration is not None:
        data = Calibration.open(options.calibration, program.network.input, options.seed)
        program = replace(program, calibration=data)
    try:
        program = _passes(options).run(program, options.dump_ir)
    except pipeline.PlanAgain as found:
        tell(f"{found}: planning again without")
        again = _passes(options, slow_precisions=(found.precision,))
        program = again.run(program, options.dump_ir)
    notes = (*program.notes, *_without_calibration(options, len(program.levels)))
    return replace(program, notes=notes)


def package(program: Program) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the files of a lowered program."""
    lowering = backend(program.request.engine).lowering()
    files = {
        **program.artifacts,
        manifest.TRAINABLE: manifest.trainable_file(program),
        manifest.DIMS: json.dumps(manifest.dims_table(dims_of(program)), indent=1).encode(),
    }
    graph_files = {str(name): lowering.graph_file(name) for name in program.graphs}
    made = manifest.manifest(program, _requires(program), graph_files, lowering.contents(program))
    return {**made, "self_test": self_test_numbers.numbers(program, made)}, files


# ---- what these need -----------------------------------------------------------------------


def _passes(
    options: CompileOptions, *, trials: bool = True, slow_precisions: tuple[str, ...] = ()
) -> pipeline.PassPipeline:
    given = {**vars(options), "trials": trials, "slow_precisions": slow_precisions}
    return pipeline.build(given, options.passes, options.without)


def _decided(
    source: models.Source, request: Request, options: CompileOptions, operators: Collection[str]
) -> tuple[Request, tuple[str, ...]]:
    """Return the request with a strategy that leaves nothing open, and notes why it is this one."""
    chosen = strategy.parse(request.strategy)
    if not isinstance(chosen, strategy.Undecided):
        if options.contributions is not None:
            raise UsageError(
                f"--contributions is for a strategy of a budget, such as sparse:8MiB; "
                f"{request.strategy!r} has none"
            )
        return request, ()
    early = tuple(p for p in _passes(options).passes if p[1].stage in ("mark", "fold"))

    def program(text: str) -> Program:
        begun = begin(copy.deepcopy(source), replace(request, strategy=text), operators=operators)
        return pipeline.PassPipeline(early).run(begun, compared=False)

    example = torch.zeros(2, *source.input.shape)
    network = TracedNetwork.of(source.module, source.head, example, request.blocks)
    decision = chosen.decided(network, program, options.contributions, request.seed)
    return replace(request, strategy=decision.strategy), (decision.note,)


def _memory(program: Program, passes: pipeline.PassPipeline) -> dict[str, dict[str, int]] | None:
    """Expected memory of training: only a step that was derived of the original knows it."""
    if not backend(program.request.engine).derives_steps:
        return None
    derive = tuple(p for p in passes.passes if p[1].stage in ("fold", "derive"))
    return manifest.training_memory(pipeline.PassPipeline(derive).run(program, compared=False))


def _classes(options: CompileOptions) -> tuple[tuple[str, ...] | None, int | None]:
    if options.data is None:
        return None, options.classes
    found = labelled(options.data)
    if found.note:
        tell(f"data: {found.note}")
    names = tuple(found.members)
    if len(names) < 2:
        raise PbcError(f"{options.data} has one class folder, {names[0]!r}; two are the least")
    if options.classes is not None and options.classes != len(names):
        raise UsageError(
            f"--classes is {options.classes}, but {options.data} has {len(names)} class folders"
        )
    return names, len(names)


def _without_calibration(options: CompileOptions, levels: int) -> tuple[str, ...]:
    if options.calibration is not None or levels == 1:
        return ()
    return ("no --calibration: proxies stay unaligned, and nothing is routed to them",)


def _requires(program: Program) -> dict[str, str]:
    """Requirements on the board: its target says so, and the backend to its engine."""
    engine = program.request.engine
    return program.request.target.requirements(engine, dict(backend(engine).requires))
