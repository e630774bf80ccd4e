from __future__ import annotations

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured, trained
from torch import Tensor, nn

from pbc.bundle.graph_name import BODY
from pbc.ir.graph import graph_text
from pbc.ir.program import Program
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_text,
    assert_unchanged,
    eager_gradients,
    gradients,
    make_program,
    run_passes,
)


def marked(kind: Kind, strategy: str) -> Program:
    return run_passes(captured(kind, strategy).program, MarkTrainable())


def test_the_cut_is_where_the_first_trainable_parameter_is_read() -> None:
    split = assert_unchanged(SplitPrefix(), marked(ResidualNet, "last-k:1"))
    assert_text(
        split,
        """
        graph body/0 takes
          %feature_0: [b, 16, 8, 8]
          %theta_blocks_2_down_weight: [32, 16, 1, 1] = θ[blocks.2.down.weight]
          %theta_blocks_2_down_bias: [32] = θ[blocks.2.down.bias]
          %theta_blocks_2_up_weight: [16, 32, 3, 3] = θ[blocks.2.up.weight]
          %theta_blocks_2_up_bias: [16] = θ[blocks.2.up.bias]
          %theta_fc_weight: [10, 16] = θ[fc.weight]
          %theta_fc_bias: [10] = θ[fc.bias]
        does
          %conv2d_5: [b, 32, 8, 8] = conv2d(%feature_0, %theta_blocks_2_down_weight, \
%theta_blocks_2_down_bias)
          %relu_2: [b, 32, 8, 8] = relu(%conv2d_5)
          %conv2d_6: [b, 16, 8, 8] = conv2d(%relu_2, %theta_blocks_2_up_weight, \
%theta_blocks_2_up_bias, [1, 1], [1, 1])
          %add_2: [b, 16, 8, 8] = add.Tensor(%feature_0, %conv2d_6)
          %mean: [b, 16] = mean.dim(%add_2, [2, 3])
          %linear: [b, 10] = linear(%mean, %theta_fc_weight, %theta_fc_bias)
        returns %linear as logits

        graph prefix/0 takes
          %x: [b, 3, 16, 16]
        does
          %conv2d: [b, 16, 8, 8] = conv2d(%x, @stem.weight, @stem.bias, [2, 2], [1, 1])
          %conv2d_1: [b, 32, 8, 8] = conv2d(%conv2d, @blocks.0.down.weight, @blocks.0.down.bias)
          %relu: [b, 32, 8, 8] = relu(%conv2d_1)
          %conv2d_2: [b, 16, 8, 8] = conv2d(%relu, @blocks.0.up.weight, @blocks.0.up.bias, \
[1, 1], [1, 1])
          %add: [b, 16, 8, 8] = add.Tensor(%conv2d, %conv2d_2)
          %conv2d_3: [b, 32, 8, 8] = conv2d(%add, @blocks.1.down.weight, @blocks.1.down.bias)
          %relu_1: [b, 32, 8, 8] = relu(%conv2d_3)
          %conv2d_4: [b, 16, 8, 8] = conv2d(%relu_1, @blocks.1.up.weight, @blocks.1.up.bias, \
[1, 1], [1, 1])
          %add_1: [b, 16, 8, 8] = add.Tensor(%add, %conv2d_4)
        returns %add_1 as feature_0
        """,
    )


@pytest.mark.parametrize("kind", [ConvNet, ResidualNet, AttentionNet])
@pytest.mark.parametrize("strategy", ["linear-probe", "bias"])
def test_values_and_gradients_stay(kind: Kind, strategy: str) -> None:
    before = marked(kind, strategy)
    split = assert_unchanged(SplitPrefix(), before)
    assert_equivalent(before, split)
    assert_gradients(gradients(split), eager_gradients(captured(kind, strategy).module, before))


class Skip(nn.Module):
    """The classifier reads two frozen tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3)
        self.two = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(x)
        logits: Tensor = self.fc(x.mean((2, 3))) * y.mean((1, 2, 3), keepdim=False)[:, None]
        return logits


def test_several_tensors_may_cross() -> None:
    split = run_passes(make_program(Skip()), MarkTrainable(), SplitPrefix())
    assert_text(
        split,
        """
        graph body/0 takes
          %feature_0: [b, 4]
          %feature_1: [b, 1]
          %theta_fc_weight: [5, 4] = θ[fc.weight]
          %theta_fc_bias: [5] = θ[fc.bias]
        does
          %linear: [b, 5] = linear(%feature_0, %theta_fc_weight, %theta_fc_bias)
          %mul: [b, 5] = mul.Tensor(%linear, %feature_1)
        returns %mul as logits
        """,
        "body/0",
    )


def test_a_batch_size_that_the_body_needs_is_read_off_its_own_input() -> None:
    """The image is not there: `sym_size` has to look at what crosses."""
    split = trained(captured(AttentionNet).program, ["proj.weight", "head.weight", "head.bias"])
    assert_text(
        split,
        """
        graph body/0 takes
          %feature_0: [b, 4, 32]
          %feature_1: [b, 4, 32]
          %theta_proj_weight: [32, 32] = θ[proj.weight]
          %theta_head_weight: [10, 32] = θ[head.weight]
          %theta_head_bias: [10] = θ[head.bias]
        does
          %linear_1: [b, 4, 32] = linear(%feature_1, %theta_proj_weight, @proj.bias)
          %add: [b, 4, 32] = add.Tensor(%feature_0, %linear_1)
          %layer_norm_1: [b, 4, 32] = layer_norm(%add, [32], @norm2.weight, @norm2.bias, 1e-05, \
False)
          %linear_2: [b, 4, 64] = linear(%layer_norm_1, @up.weight, @up.bias)
          %gelu: [b, 4, 64] = gelu(%linear_2)
          %linear_3: [b, 4, 32] = linear(%gelu, @down.weight, @down.bias)
          %add_1: [b, 4, 32] = add.Tensor(%add, %linear_3)
          %mean: [b, 32] = mean.dim(%add_1, [1])
          %linear_4: [b, 10] = linear(%mean, %theta_head_weight, %theta_head_bias)
        returns %linear_4 as logits
        """,
        "body/0",
    )
    split = trained(captured(AttentionNet).program, ["norm1.bias", "head.weight", "head.bias"])
    assert "sym_size.int(%feature_0, 0)" in split.text().partition("graph prefix/0")[0]
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = captured(AttentionNet).module(images)
            assert torch.allclose(split.logits(0, images), expected, atol=1e-5)


class Stacked(nn.Module):
    """A norm over the rows of all pictures, stacked as if each were a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        batch, rows, columns, width = x.shape
        x = self.norm(x.reshape(batch * rows, columns, width))
        logits: Tensor = self.fc(x.reshape(batch, rows * columns, width).mean(1))
        return logits


def test_a_feature_has_a_row_for_each_sample() -> None:
    """The cut moves to where it does: features are kept and regrouped by sample."""
    before = run_passes(make_program(Stacked().eval(), "norm"), MarkTrainable())
    split = assert_unchanged(SplitPrefix(), before)
    features = split.levels[0].features(torch.randn(3, 3, 16, 16))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "feature_0": (3, 4, 4, 8)
    }
    assert_equivalent(before, split)


def test_without_enough_before_what_trains_there_is_no_prefix() -> None:
    before = marked(ConvNet, "bias")  # the first convolution has no bias: one layer of three
    assert SplitPrefix()(before).levels[0].prefix is not None
    whole = assert_unchanged(SplitPrefix(least_share=0.5), before)
    assert list(whole.levels[0].graphs) == [BODY]
    assert whole.levels[0].features(whole.network.example) == {"x": whole.network.example}
    assert_equivalent(before, whole)


def test_when_everything_trains_the_model_is_the_body() -> None:
    before = marked(ConvNet, "full")
    split = assert_unchanged(SplitPrefix(), before)
    assert list(split.levels[0].graphs) == [BODY]
    assert before.model is not None
    assert_text(
        split,
        graph_text("body/0", before.model).replace("returns %linear", "returns %linear as logits"),
        "body/0",
    )
