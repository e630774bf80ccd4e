"""A level as its device runs it, in order to judge it: the prefix is its engine's business.

Judging needs thousands of images, and an engine computes a prefix several times faster than torch
does, which simulates the rounding of int8. What follows the prefix is small, and torch computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pbc.bundle.graph_name import BODY
from pbc.ir.graph import parameter_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import cut_at
from pbc.lower.backend import backend
from pbc.proxies.fidelity import boundary_nodes, dtype_of, in_precision, precision_of

Features = Sequence[Tensor]
Run = Callable[[Tensor], tuple[Features, Features]]


def up_to(program: Program, level: LevelGraphs, last: Sequence[str]) -> Run:
    """Return what makes of images what the prefix sends and the values of some nodes of the body.

    Both are float32, at the initial trainable parameters; without a prefix the images are sent.
    last: the names of the nodes; the body is not run where there are none.
    """
    prefix = None
    if level.prefix is not None:
        prefix = backend(program.request.engine).lowering().prefix(program, level)
    body = _body(program, level, last) if last else None

    def run(images: Tensor) -> tuple[Features, Features]:
        with torch.no_grad():
            sent = [images] if prefix is None else prefix(images)
            return sent, () if body is None else body(sent)

    return run


def up_to_interface(program: Program, level: LevelGraphs) -> Callable[[Tensor], list[Tensor]]:
    """Return what makes of images the tensors of the interface, as `UpToInterface` does."""
    run = up_to(program, level, boundary_nodes(program.levels[0].body))

    def tensors(images: Tensor) -> list[Tensor]:
        sent, read = run(images)
        return [*(() if level.prefix is None else sent), *read]

    return tensors


def _body(
    program: Program, level: LevelGraphs, last: Sequence[str]
) -> Callable[[Features], Features]:
    dtype = dtype_of(precision_of(program.levels[0], BODY, level.precision))
    graph = in_precision(cut_at(level.body, list(last)), dtype)
    theta = [program.parameters[name].detach().to(dtype) for name in parameter_names(graph)]

    def run(sent: Features) -> Features:
        return [value.float() for value in graph(*(tensor.to(dtype) for tensor in sent), *theta)]

    return run
