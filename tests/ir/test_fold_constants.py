from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from pbc.frontend.capture import capture
from pbc.ir.fold_constants import LARGEST_BYTES, fold_constants
from pbc.ir.graph import graph_text, op_name, tensor_names
from pbc.testing import assert_text, graph_of, make_program

SHAPE = (3, 16, 16)


class Standardised(nn.Conv2d):
    """Weights of mean zero and variance one (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-5).sqrt()
        result: Tensor = self._conv_forward(x, weight, self.bias)
        return result


class BatchStandardised(nn.Conv2d):
    """The same, as timm computes it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        result: Tensor = self._conv_forward(x, weight, self.bias)
        return result


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return logits


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, 2, bias=False)


REPARAMETRISED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "weight norm, by hooks": lambda: weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "orthogonal, by Cayley": lambda: parametrizations.orthogonal(
        conv(), orthogonal_map="cayley", use_trivialization=False
    ),
    "standardised": lambda: Standardised(3, 8, 3, 2, bias=False),
    "standardised as a batch": lambda: BatchStandardised(3, 8, 3, 2, bias=False),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_frozen_weight_is_a_constant_however_it_is_made(kind: str) -> None:
    torch.manual_seed(0)
    net = Net(REPARAMETRISED[kind]()).eval()
    graph = graph_of(make_program(net), "model")
    operators = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert operators == [
        "aten.conv2d.default", "aten.relu.default", "aten.mean.dim", "aten.linear.default"
    ]  # fmt: skip
    assert [n for n in tensor_names(graph) if n.startswith("conv.")] == []
    assert sum(int(buffer.numel()) for buffer in graph.buffers()) == 3 * 8 * 9
    x = torch.randn(5, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], net(x))


def test_what_trains_does_not_fold() -> None:
    net = Net(Standardised(3, 8, 3, 2, bias=False))
    graph = graph_of(make_program(net, "full"), "model")
    assert "conv.weight" in tensor_names(graph)
    assert not [name for name in tensor_names(graph) if name.startswith("folded.")]


def test_the_text_before_and_after() -> None:
    assert_text(
        make_program(Net(Standardised(3, 8, 3, 2, bias=False))),
        """
        graph model takes
          %x: [b, 3, 16, 16]
        does
          %conv2d: [b, 8, 7, 7] = conv2d(%x, @folded.div, None, [2, 2])
          %relu: [b, 8, 7, 7] = relu(%conv2d)
          %mean_1: [b, 8] = mean.dim(%relu, [2, 3])
          %linear: [b, 4] = linear(%mean_1, @fc.weight, @fc.bias)
        returns %linear
        """,
    )


class Masked(nn.Module):
    """Two equal masks of an attention, and a table of positions that is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.table = nn.Parameter(torch.randn(7, 1))
        self.fc = nn.Linear(8, 4)

    def attended(self, x: Tensor) -> Tensor:
        at = torch.arange(16)
        away = (at[:, None] - at[None, :]).clamp(-3, 3) + 3
        bias = self.table[away.reshape(-1)].reshape(16, 16)
        scores = x @ x.transpose(1, 2) + bias
        return scores.masked_fill(at[:, None] < at[None, :], float("-inf")).softmax(-1) @ x

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.attended(self.attended(tokens)).mean(1))
        return logits


def test_tables_and_masks_are_made_once_and_equal_ones_shared() -> None:
    net = Masked().eval()
    graph = graph_of(make_program(net), "model")
    names = [name for name in tensor_names(graph) if name.startswith("folded.")]
    assert len(names) == 2
    operators = {op_name(node) for node in graph.graph.nodes}
    assert not operators & {"aten.arange.start_step", "aten.index.Tensor", "aten.lt.Tensor"}
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], net(x))


class Wide(nn.Module):
    """A bias that is computed, and then repeated for every pixel of a large picture."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64, 1, 1))
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.bias.exp().repeat(1, 256, 256) * 2
        logits: Tensor = self.fc((x.mean((1, 2, 3), keepdim=True) + wide).mean((2, 3)))
        return logits


def test_what_would_be_much_larger_is_computed_there() -> None:
    graph = graph_of(make_program(Wide()), "model")
    sizes = {name: tensor.nbytes for name, tensor in graph.named_buffers()}
    assert sizes == {"folded.exp": 64 * 4}
    assert LARGEST_BYTES < 64 * 256 * 256 * 4


class Seen(nn.Module):
    """A weight that is transposed and reshaped on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)) @ self.weight.reshape(8, 3).t())
        return logits


def test_it_does_nothing_to_views_of_a_weight() -> None:
    graph = capture(Seen(), SHAPE)
    before = graph_text("model", graph)
    after = fold_constants(graph, ["fc.weight", "fc.bias"])
    assert after is graph
    assert graph_text("model", after) == before
