"""Trials: a proxy is made and run before it is planned, so that what fails costs a level alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pbc.bundle.graph_name import BODY, PREFIX
from pbc.bundle.ladder import INT8
from pbc.errors import PbcError, reason_of
from pbc.ir.dims import Dims
from pbc.ir.graph import parameter_names
from pbc.ir.levels import IMAGES, Keep, LevelGraphs, LevelPlan
from pbc.ir.program import Program
from pbc.ir.slice_graph import slice_graph
from pbc.lower.backend import backend
from pbc.proxies.fidelity import UpToInterface, dtype_of, in_precision, precision_of
from pbc.proxies.quantization import quantized
from pbc.proxies.resolution import reduced, reduced_role
from pbc.proxies.tokens import merged, tokens_of

# Of the largest value: what a sample's features may change by with what shares its batch. Kernels
# differ from batch to batch by rounding; samples that are mixed up differ by their whole size.
INDEPENDENT_WITHIN = 1e-2

# What torch and its exporters raise at shapes and types that do not fit, besides what pbc refuses.
_FORESEEN = (PbcError, RuntimeError, ValueError, IndexError, TypeError)
# Of these, what no form of a level is at fault for.
_OTHERS = (torch.OutOfMemoryError, RecursionError)
_NO_MEMORY = "can't allocate memory"


class _Unfit(PbcError):
    """What a trial shows that its level must not be."""


def reason_of_failure(attempt: Callable[[], object], *refusals: type[Exception]) -> str:
    """Return in one line why what is tried cannot be; "" where it can.

    refusals: what an engine raises, too, where it cannot run a graph. Whatever is not foreseen
    passes: an interruption, lack of memory, a fault of pbc's own.
    """
    foreseen: tuple[type[Exception], ...] = (*_FORESEEN, *refusals)
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs a trace of what it raises
    try:
        attempt()
    except foreseen as error:
        if isinstance(error, _OTHERS) or _NO_MEMORY in str(error):
            raise
        return reason_of(error)
    finally:
        logging.disable(disabled)
    return ""


def proxy(
    original: LevelGraphs, plan: LevelPlan, dims: Dims, keep: Keep, *, shapes: bool = True
) -> LevelGraphs:
    """Return the level that keeps these indices, in float32 and with all tokens still.

    shapes: as `slice_graph` has it.
    """
    size = plan.resolution
    again = shapes or size is not None
    prefix = original.prefix
    if prefix is not None:
        prefix = slice_graph(prefix, dims, keep, shapes=again)
    body = slice_graph(original.body, dims, keep, shapes=again)
    if size is not None:
        if reduced_role(original) == BODY:
            body = reduced(body, size, prefix)
        elif prefix is not None:
            prefix = reduced(prefix, size)
    return LevelGraphs(
        body=body,
        prefix=prefix,
        keep=keep,
        cost=plan.cost,
        macs=plan.macs,
        precision=plan.precision,
        resolution=plan.resolution,
        merges=plan.merges,
    )


def rounded(level: LevelGraphs, images: Tensor) -> LevelGraphs:
    """Return an int8 level with its prefix in the ranges of these images; any other as it is."""
    if level.precision != INT8 or level.prefix is None:
        return level
    return replace(level, prefix=quantized(level.prefix, images))


def with_merges(
    level: LevelGraphs, original: LevelGraphs, dims: Dims, *, shapes: bool = True
) -> LevelGraphs:
    """Return a level with its tokens merged as it says; any other as it is.

    shapes: as `slice_graph` has it.
    """
    if not any(level.merges):
        return level
    tokens = tokens_of(original, dims)
    assert tokens is not None, "tokens are planned where there are some"
    return merged(level, tokens, dims, shapes=shapes)


def trial(program: Program, plan: LevelPlan, dims: Dims) -> LevelGraphs:
    """Return a level of a plan, to be run and forgotten."""
    level = proxy(program.levels[0], plan, dims, first_indices(plan), shapes=False)
    level = with_merges(level, program.levels[0], dims)
    return rounded(level, program.network.example)


def first_indices(plan: LevelPlan) -> Keep:
    """Return indices of a plan's sizes: which ones changes neither shapes nor time."""
    return {name: list(range(size)) for name, size in plan.sizes.items()}


def reason_against(program: Program, plan: LevelPlan, dims: Dims, *, engine: bool) -> str:
    """Return in one line why no level of this plan can be; "" where a trial runs as it should.

    It is made, differentiated as alignment will, and run in its precision: features have the shapes
    of level 0's, a sample's do not depend on what shares its batch, and they are finite where level
    0's are. engine: convert its graphs for the engine, too.
    """
    lowering = backend(program.request.engine).lowering()

    def attempt() -> None:
        level = proxy(program.levels[0], plan, dims, first_indices(plan))
        level = with_merges(level, program.levels[0], dims)
        if level.keep or level.resolution is not None or level.merges:
            _require_independent(program, level)
            _require_gradients(program, level)
        level = rounded(level, program.network.example)
        _require_interface(program, level)
        if engine:
            graphs = {role.at(0): graph for role, graph in level.fused().graphs.items()}
            lowering.try_graphs(program, graphs)

    return reason_of_failure(attempt, *lowering.refusals)


def three(images: Tensor) -> Tensor:
    """[3, …]: example images and, as a third, one more than any of them."""
    first = images[:2] if len(images) > 1 else torch.cat([images, -images])
    return torch.cat([first, first.mean(0, keepdim=True)])


def computed(
    program: Program, level: LevelGraphs, images: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return features by name and logits, float32, as torch computes them at the level."""
    features: Mapping[str, Tensor] = {IMAGES: images}
    original = program.levels[0]
    with torch.no_grad():
        if level.prefix is not None:
            dtype = dtype_of(precision_of(original, PREFIX, level.precision))
            graph = in_precision(level.prefix, dtype)
            sent = graph(images.to(dtype))
            features = {name: t.float() for name, t in zip(level.sent, sent, strict=True)}
        dtype = dtype_of(precision_of(original, BODY, level.precision))
        theta = [
            program.parameters[name].detach().to(dtype) for name in parameter_names(level.body)
        ]
        body = in_precision(level.body, dtype)
        (logits,) = body(*[features[name].to(dtype) for name in level.read], *theta)
    return dict(features), logits.float()


def _require_interface(program: Program, level: LevelGraphs) -> None:
    """Compare shapes with level 0's, and look for what is not finite."""
    images = three(program.network.example)
    known, answer = computed(program, program.levels[0], images)
    features, logits = computed(program, level, images)
    for name, expected in {**known, "logits": answer}.items():
        value = logits if name == "logits" else features[name]
        if value.shape != expected.shape:
            raise _Unfit(f"{name} is {list(value.shape)}, not {list(expected.shape)}")
        if not bool(value.isfinite().all()) and bool(expected.isfinite().all()):
            raise _Unfit(f"{name} is not finite")


def _require_independent(program: Program, level: LevelGraphs) -> None:
    """Compare the features of two samples alone and beside a third."""
    images = three(program.network.example)
    with torch.no_grad():
        together, alone = level.features(images), level.features(images[:2])
    for name, value in alone.items():
        if value.shape[0] != 2 or together[name].shape[0] != 3:
            raise _Unfit(f"{name} is {list(value.shape)} for two samples")
        difference = float((value - together[name][:2]).abs().max())
        if difference > INDEPENDENT_WITHIN * float(value.abs().max()):
            raise _Unfit(f"{name} of one sample depends on what shares its batch")


def _require_gradients(program: Program, level: LevelGraphs) -> None:
    """Differentiate the interface as alignment does."""
    if program.calibration is None:
        return
    interface = copy.deepcopy(UpToInterface(program, level))
    for weight in interface.parameters():
        weight.requires_grad_(True)
    sum(tensor.float().square().mean() for tensor in interface(program.network.example)).backward()
