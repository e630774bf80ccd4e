from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn import functional

from pbc.bundle.graph_name import BODY
from pbc.ir.levels import LevelGraphs
from pbc.ir.runner import TorchRunner, tensor

aten = torch.ops.aten


def test_a_norm_of_what_lies_in_another_order_is_run() -> None:
    """A derived graph has no copies: who traced it had one, and other engines need none."""
    graph = Graph()
    x = graph.placeholder("x")
    turned = graph.call_function(aten.permute.default, (x, [0, 3, 1, 2]))
    norm = graph.call_function(
        aten.native_group_norm.default, (turned, None, None, 2, 4, 15, 2, 1e-5)
    )
    graph.output((graph.call_function(operator.getitem, (norm, 0)),))
    level = LevelGraphs(GraphModule(nn.Module(), graph))
    images = torch.randn(2, 3, 5, 4)
    (found,) = TorchRunner(level).run(BODY, {"x": images.numpy()}).values()
    expected = functional.group_norm(images.permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(tensor(found), expected)
