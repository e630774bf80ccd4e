from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import ConvNet, captured, pruned, settled, split, trained
from torch import Tensor, nn

from pbc.ir.program import Policy
from pbc.ir.rewrite import copy_graph
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    gradients,
    graph_of,
    make_program,
    run_passes,
)

PASSES = (MarkTrainable(), SplitPrefix())


def test_a_convolution_swallows_its_norm() -> None:
    before = split(ConvNet)
    after = assert_unchanged(FoldBatchNorm(), before)
    assert_text(
        before,
        """
        graph prefix/0 takes
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
        returns %mean as feature_0
        """,
        "prefix/0",
    )
    assert_text(
        after,
        """
        graph prefix/0 takes
          %x: [b, 3, 16, 16]
        does
          %conv2d: [b, 16, 16, 16] = conv2d(%x, @conv1.weight_folded, @conv1.weight_folded_bias, \
[1, 1], [1, 1])
          %relu: [b, 16, 16, 16] = relu(%conv2d)
          %conv2d_1: [b, 24, 8, 8] = conv2d(%relu, @conv2.weight_folded, \
@conv2.weight_folded_bias, [2, 2], [1, 1])
          %relu_1: [b, 24, 8, 8] = relu(%conv2d_1)
          %mean: [b, 24] = mean.dim(%relu_1, [2, 3])
        returns %mean as feature_0
        """,
        "prefix/0",
    )
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))
    # What was folded is gone, so that it is not shipped.
    names = [name for name, _ in graph_of(after, "prefix/0").named_parameters()]
    assert not [name for name in names if "bn" in name]


class Norms(nn.Module):
    """A folded pair before, one in the body, and three that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.shared = nn.Conv2d(3, 8, 3, padding=1)
        self.shared_norm = nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1, groups=8)
        self.bare_norm = nn.BatchNorm2d(8, affine=False)
        self.trained = nn.Conv2d(8, 8, 1)
        self.trained_norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 12)
        self.hidden_norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = x + self.shared_norm(x)  # its convolution is read elsewhere too
        x = self.bare_norm(self.bare(x))
        x = torch.relu(self.trained_norm(self.trained(x)))
        logits: Tensor = self.fc(self.hidden_norm(self.hidden(x.mean((2, 3)))))
        return logits


def test_what_is_trained_or_read_elsewhere_stays() -> None:
    names = ["trained.weight", "trained.bias", "fc.weight", "fc.bias"]
    before = trained(make_program(settled(Norms())), names)
    after = assert_unchanged(FoldBatchNorm(), before)
    assert before.text().count("= batch_norm(") == 5
    assert after.text().count("= batch_norm(") == 3
    lines = {line.strip() for line in after.text().splitlines()}
    assert any(line.startswith("%batch_norm: ") and "@first.weight" in line for line in lines)
    assert any(line.startswith("%batch_norm_1: ") and "= batch_norm(" in line for line in lines)
    assert any("= conv2d(" in line and "@bare.weight_folded" in line for line in lines)
    assert any(line.startswith("%batch_norm_3: ") and "= batch_norm(" in line for line in lines)
    assert any("= linear(" in line and "@hidden.weight_folded" in line for line in lines)
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))


@pytest.mark.parametrize("names", [["shared_norm.weight"], ["hidden.bias"], ["hidden_norm.bias"]])
def test_a_norm_with_anything_trained_in_it_stays(names: list[str]) -> None:
    before = trained(make_program(settled(Norms())), [*names, "fc.weight", "fc.bias"])
    after = assert_unchanged(FoldBatchNorm(), before)
    assert any(f"θ[{names[0]}]" in line for line in after.text().splitlines())
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))


def test_every_level_is_folded() -> None:
    before = pruned(ConvNet)
    after = assert_unchanged(FoldBatchNorm(), before)
    assert "batch_norm(" not in after.text()
    for level in range(len(before.levels)):
        assert_equivalent(before, after, level)


def test_the_policy_is_left_alone() -> None:
    program = pruned(ConvNet)
    before = replace(program, policy=Policy(copy_graph(graph_of(program, "prefix/0")), {}, ()))
    after = FoldBatchNorm()(before)
    assert "batch_norm(" in after.text()
    assert graph_of(after, "policy").code == graph_of(before, "policy").code


def test_trained_norms_are_no_reason_to_do_anything() -> None:
    before = run_passes(captured(ConvNet, "norm").program, *PASSES)
    assert_same(before, assert_unchanged(FoldBatchNorm(), before))
