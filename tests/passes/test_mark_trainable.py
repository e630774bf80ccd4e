from __future__ import annotations

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured
from torch import Tensor, nn

from pbc.passes.mark_trainable import MarkTrainable
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    eager_gradients,
    gradients,
    graph_of,
    make_program,
    retarget,
)


def test_the_classifier_becomes_an_input() -> None:
    program = captured(ConvNet).program
    assert_text(
        program,
        """
        graph model takes
          %x: [b, 3, 16, 16]
        does
          %conv2d: [b, 16, 16, 16] = conv2d(%x, @conv1.weight, None, [1, 1], [1, 1])
          %batch_norm: [b, 16, 16, 16] = batch_norm(%conv2d, @bn1.weight, @bn1.bias, \
@bn1.running_mean, @bn1.running_var, False, 0.1, 1e-05, False)
          %relu: [b, 16, 16, 16] = relu(%batch_norm)
          %conv2d_1: [b, 24, 8, 8] = conv2d(%relu, @conv2.weight, @conv2.bias, [2, 2], [1, 1])
          %batch_norm_1: [b, 24, 8, 8] = batch_norm(%conv2d_1, @bn2.weight, @bn2.bias, \
@bn2.running_mean, @bn2.running_var, False, 0.1, 1e-05, False)
          %relu_1: [b, 24, 8, 8] = relu(%batch_norm_1)
          %mean: [b, 24] = mean.dim(%relu_1, [2, 3])
          %linear: [b, 10] = linear(%mean, @fc.weight, @fc.bias)
        returns %linear
        """,
    )
    marked = assert_unchanged(MarkTrainable(), program)
    assert_text(
        marked,
        """
        graph model takes
          %x: [b, 3, 16, 16]
          %theta_fc_weight: [10, 24] = θ[fc.weight]
          %theta_fc_bias: [10] = θ[fc.bias]
        does
          %conv2d: [b, 16, 16, 16] = conv2d(%x, @conv1.weight, None, [1, 1], [1, 1])
          %batch_norm: [b, 16, 16, 16] = batch_norm(%conv2d, @bn1.weight, @bn1.bias, \
@bn1.running_mean, @bn1.running_var, False, 0.1, 1e-05, False)
          %relu: [b, 16, 16, 16] = relu(%batch_norm)
          %conv2d_1: [b, 24, 8, 8] = conv2d(%relu, @conv2.weight, @conv2.bias, [2, 2], [1, 1])
          %batch_norm_1: [b, 24, 8, 8] = batch_norm(%conv2d_1, @bn2.weight, @bn2.bias, \
@bn2.running_mean, @bn2.running_var, False, 0.1, 1e-05, False)
          %relu_1: [b, 24, 8, 8] = relu(%batch_norm_1)
          %mean: [b, 24] = mean.dim(%relu_1, [2, 3])
          %linear: [b, 10] = linear(%mean, %theta_fc_weight, %theta_fc_bias)
        returns %linear
        """,
    )
    assert list(marked.parameters) == ["fc.weight", "fc.bias"]
    # What trains is no frozen tensor any more.
    assert not [n for n, _ in graph_of(marked, "model").named_parameters() if n.startswith("fc")]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (ConvNet, "norm"),
        (ResidualNet, "last-k:1"),
        (ResidualNet, "adapters:2"),
        (AttentionNet, "full"),
    ],
)
def test_values_and_gradients_are_the_module_s(kind: Kind, strategy: str) -> None:
    module, program = captured(kind, strategy)
    marked = assert_unchanged(MarkTrainable(), program)
    assert marked.parameters.keys() == program.trainable
    assert_equivalent(program, marked)
    assert_gradients(gradients(marked), eager_gradients(module, program))


def test_parameters_are_copies() -> None:
    module, program = captured(ConvNet)
    marked = MarkTrainable()(program)
    marked.parameters["fc.bias"].add_(1)
    assert torch.equal(
        module.get_parameter("fc.bias"), graph_of(program, "model").get_parameter("fc.bias")
    )


class Tied(nn.Module):
    """One weight, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.fc(x.mean((2, 3)))))
        return logits


def test_a_weight_that_is_read_twice_is_one_parameter() -> None:
    module = Tied()
    marked = assert_unchanged(MarkTrainable(), make_program(module))
    assert_text(
        marked,
        """
        graph model takes
          %x: [b, 3, 16, 16]
          %theta_fc_weight: [3, 3] = θ[fc.weight]
          %theta_fc_bias: [3] = θ[fc.bias]
        does
          %mean: [b, 3] = mean.dim(%x, [2, 3])
          %linear: [b, 3] = linear(%mean, %theta_fc_weight, %theta_fc_bias)
          %relu: [b, 3] = relu(%linear)
          %linear_1: [b, 3] = linear(%relu, %theta_fc_weight, %theta_fc_bias)
        returns %linear_1
        """,
    )
    assert_gradients(gradients(marked), eager_gradients(module, marked))


def test_nothing_to_mark() -> None:
    program = retarget(captured(ConvNet).program, "none", [])
    assert_same(program, assert_unchanged(MarkTrainable(), program))
