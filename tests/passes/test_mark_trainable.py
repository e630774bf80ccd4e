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
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc(torch.relu(self.fc(x.mean((2, 3))))))
        return logits


def test_a_weight_that_is_read_twice_is_one_parameter() -> None:
    module = Tied()
    marked = assert_unchanged(MarkTrainable(), make_program(module, "full"))
    assert_text(
        marked,
        """
        graph model takes
          %x: [b, 3, 16, 16]
          %theta_fc_weight: [3, 3] = θ[fc.weight]
          %theta_fc_bias: [3] = θ[fc.bias]
          %theta_head_weight: [4, 3] = θ[head.weight]
          %theta_head_bias: [4] = θ[head.bias]
        does
          %mean: [b, 3] = mean.dim(%x, [2, 3])
          %linear: [b, 3] = linear(%mean, %theta_fc_weight, %theta_fc_bias)
          %relu: [b, 3] = relu(%linear)
          %linear_1: [b, 3] = linear(%relu, %theta_fc_weight, %theta_fc_bias)
          %linear_2: [b, 4] = linear(%linear_1, %theta_head_weight, %theta_head_bias)
        returns %linear_2
        """,
    )
    assert_gradients(gradients(marked), eager_gradients(module, marked))


def test_nothing_to_mark() -> None:
    program = retarget(captured(ConvNet).program, "none", [])
    assert_same(program, assert_unchanged(MarkTrainable(), program))


def test_names_that_differ_in_punctuation_alone_are_two_inputs() -> None:
    module = nn.Sequential()
    module.add_module("a-b", nn.Linear(3, 3))
    module.add_module("a_b", nn.Linear(3, 3))
    network = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), module, nn.ReLU(), nn.Linear(3, 4)
    )
    program = make_program(network, "full")
    marked = assert_unchanged(MarkTrainable(), program)
    assert {"2.a-b.weight", "2.a_b.weight"} <= marked.parameters.keys()
    assert_equivalent(program, marked)
