"""Batch norms' statistics, measured afresh: those of a proxy that lost channels are another's."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from pbc.ir.calibration import Calibration
from pbc.ir.graph import op_name
from pbc.proxies.distillation import STATISTICS_BATCHES, unaugmented
from pbc.proxies.fidelity import UpToInterface

TRAINING, MOMENTUM = 5, 6  # positions among batch_norm's arguments


@torch.no_grad()
def recalibrate(proxy: UpToInterface, calibration: Calibration) -> None:
    """Measure the batch norms' statistics afresh, of the channels that are left."""
    norms = batch_norms(proxy)
    device = next(proxy.parameters()).device
    _use_batch_statistics(proxy, True)
    for number, images in enumerate(unaugmented(calibration, STATISTICS_BATCHES)):
        for graph, node in norms:
            _set_argument(graph, node, MOMENTUM, 1 / (number + 1))
        for graph in proxy.graphs:
            graph.recompile()
        proxy(images.to(device))
    _use_batch_statistics(proxy, False)


def batch_norms(proxy: UpToInterface) -> list[tuple[GraphModule, torch.fx.Node]]:
    return [
        (graph, node)
        for graph in proxy.graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and op_name(node) == "aten.batch_norm.default"
        and all(a.op == "get_attr" for a in node.args[1:5] if isinstance(a, torch.fx.Node))
    ]


def _set_argument(graph: GraphModule, node: torch.fx.Node, position: int, value: object) -> None:
    arguments = list(node.args)
    arguments[position] = value  # type: ignore[call-overload]
    node.args = tuple(arguments)


def _use_batch_statistics(proxy: UpToInterface, on: bool) -> None:
    """Switch batch norms between their batch's statistics (updating the running ones) and those."""
    for graph, node in batch_norms(proxy):
        _set_argument(graph, node, TRAINING, on)
    for graph in proxy.graphs:
        graph.recompile()
