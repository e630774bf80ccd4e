from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import settled
from torch import Tensor, nn

from pbc.errors import PbcError, UsageError
from pbc.frontend import strategy
from pbc.ir.program import Program
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies.codebooks import codebook
from pbc.testing import eager_gradients, gradients, make_program, run_passes, with_request
from pbc.training_graph.decompositions.sums import index_add

VALUES = "large.parametrizations.weight.original"
BITS = 3


class Net(nn.Module):
    """Two convolutions, of which the second is large enough to share values."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, width, 3, 2)
        self.large = nn.Conv2d(width, width, 3, 2)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.large(torch.relu(self.small(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def program() -> Program:
    passes = (MarkTrainable(), SplitPrefix())
    return make_program(settled(Net()), f"centroids:{BITS}", passes=passes)


def clustered() -> tuple[nn.Module, Tensor]:
    """The network with the weights that its codebooks stand for, and the elements' indices."""
    module = settled(Net())
    weight = module.get_parameter("large.weight")
    values, indices = codebook(weight, BITS)
    weight.data = values[indices.long()]
    return module, indices.flatten()


def test_the_values_of_large_layers_train(program: Program) -> None:
    assert program.trainable == {VALUES, "fc.weight", "fc.bias"}
    assert program.parameters[VALUES].shape == (2**BITS,)
    with torch.no_grad():
        expected = clustered()[0](program.network.example)
    torch.testing.assert_close(program.network.reference, expected)


def test_a_value_s_gradient_is_the_mean_of_its_members_(program: Program) -> None:
    module, indices = clustered()
    trainable = frozenset({"large.weight"})
    dense = eager_gradients(module, replace(program, trainable=trainable))["large.weight"]
    sums = torch.zeros(2**BITS).index_add_(0, indices, dense.flatten())
    means = sums / indices.bincount(minlength=2**BITS)
    most = 1e-5 * float(means.abs().max())
    torch.testing.assert_close(gradients(program)[VALUES], means, rtol=1e-4, atol=most)


def test_the_derived_step_does_so_too(program: Program) -> None:
    before = with_request(program, engine="onnxruntime")
    after = run_passes(before, DeriveTrainStep(), Lower())
    for check in ("train_step", "lowered_train_step"):
        assert max(after.checks[check]["0"].values()) < 1e-4, check


def test_an_index_add_is_a_scatter() -> None:
    x, source = torch.zeros(4, 2), torch.arange(10.0).reshape(5, 2)
    index = torch.tensor([0, 3, 0, 1, 3], dtype=torch.int32)
    added = index_add(x, 0, index, source, alpha=2)
    assert torch.equal(added, x.index_add(0, index, source, alpha=2))


def test_what_cannot_share_values_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"strategy 'centroids:9' needs 1 to 8 bits, such as centroids:4"
    ):
        strategy.parse("centroids:9")
    with pytest.raises(PbcError, match="has no convolution or linear layer that is large enough"):
        make_program(Net(8), "centroids:4")
