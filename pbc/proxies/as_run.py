"""A level as its device runs it, in order to judge it: the prefix is its engine's business.

Judging needs thousands of images, and an engine computes a prefix several times faster than torch
does, which simulates the rounding of int8. What follows the prefix is small, and torch computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pbc.bundle.graph_name import BODY
from pbc.ir.calibration import Calibration
from pbc.ir.graph import get_tensor, parameter_names, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.lower.backend import backend
from pbc.proxies.fidelity import (
    boundary_nodes,
    cut_whole,
    dtype_of,
    in_precision,
    precision_of,
)

Features = Sequence[Tensor]
Run = Callable[[np.ndarray], tuple[Features, Features]]


def up_to(program: Program, level: LevelGraphs, data: Calibration, last: Sequence[str]) -> Run:
    """Return what makes of images, by their indices, what the prefix sends and the body computes.

    Both are float32, at the initial trainable parameters; without a prefix the images are sent.
    last: the names of the body's nodes; it is not run where there are none.
    """
    send = _sender(program, level, data)
    body = _body(program, level, last) if last else None

    def run(indices: np.ndarray) -> tuple[Features, Features]:
        with torch.no_grad():
            sent = send(indices)
            return sent, () if body is None else body(sent)

    return run


def up_to_interface(
    program: Program, level: LevelGraphs, data: Calibration
) -> Callable[[np.ndarray], list[Tensor]]:
    """Return what makes of images the tensors of the interface, as `UpToInterface` does."""
    run = up_to(program, level, data, boundary_nodes(program.levels[0].body))

    def tensors(indices: np.ndarray) -> list[Tensor]:
        sent, read = run(indices)
        return [*(() if level.prefix is None else sent), *read]

    return tensors


def _sender(
    program: Program, level: LevelGraphs, data: Calibration
) -> Callable[[np.ndarray], Features]:
    """What the prefix sends; several passes ask for the same, so it is kept with the images."""
    graph = level.prefix
    if graph is None:
        return lambda indices: [data.batch(indices)]
    made: list[Callable[[Tensor], Features]] = []

    def compute(indices: np.ndarray) -> Features:
        if not made:  # perhaps all is kept
            made.append(backend(program.request.engine).lowering().prefix(program, level))
        return made[0](data.batch(indices))

    code = (graph.code, level.precision, program.request.engine)
    tensors = [get_tensor(graph, name) for name in tensor_names(graph)]
    return lambda indices: data.kept((*code, indices.tobytes()), tensors, lambda: compute(indices))


def _body(
    program: Program, level: LevelGraphs, last: Sequence[str]
) -> Callable[[Features], Features]:
    dtype = dtype_of(precision_of(program.levels[0], BODY, level.precision))
    graph = in_precision(cut_whole(program, level, last), dtype)
    theta = [program.parameters[name].detach().to(dtype) for name in parameter_names(graph)]

    def run(sent: Features) -> Features:
        return [value.float() for value in graph(*(tensor.to(dtype) for tensor in sent), *theta)]

    return run
