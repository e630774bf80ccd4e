from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, analysed, captured, pruned

from pbc.ir.graph import get_tensor, graph_text, tensor_names
from pbc.ir.levels import LevelPlan
from pbc.ir.program import Program
from pbc.passes.prune_dims import PruneDims
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    gradients,
    graph_of,
)


def sized(program: Program, *sizes: dict[str, int]) -> Program:
    return replace(program, plans=tuple(LevelPlan(named, 0.5, 0.0) for named in sizes))


def test_a_proxy_is_a_slice() -> None:
    before = sized(analysed(ConvNet), {"conv1.weight:0": 8})
    after = assert_unchanged(PruneDims(), before)
    assert_text(
        after,
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
        graph prefix/1 takes
          %x: [b, 3, 16, 16]
        does
          %conv2d: [b, 8, 16, 16] = conv2d(%x, @conv1.weight, None, [1, 1], [1, 1])
          %batch_norm: [b, 8, 16, 16] = batch_norm(%conv2d, @bn1.weight, @bn1.bias, \
@bn1.running_mean, @bn1.running_var, False, 0.1, 1e-05, False)
          %relu: [b, 8, 16, 16] = relu(%batch_norm)
          %conv2d_1: [b, 24, 8, 8] = conv2d(%relu, @conv2.weight, @conv2.bias, [2, 2], [1, 1])
          %batch_norm_1: [b, 24, 8, 8] = batch_norm(%conv2d_1, @bn2.weight, @bn2.bias, \
@bn2.running_mean, @bn2.running_var, False, 0.1, 1e-05, False)
          %relu_1: [b, 24, 8, 8] = relu(%batch_norm_1)
          %mean: [b, 24] = mean.dim(%relu_1, [2, 3])
        returns %mean as feature_0
        """,
        "prefix/1",
    )
    assert_equivalent(before, after)
    (stay,) = after.levels[1].keep.values()
    proxy, original = graph_of(after, "prefix/1"), graph_of(after, "prefix/0")
    assert len(stay) == 8
    for name in tensor_names(original):
        expected = get_tensor(original, name)
        if name.startswith(("conv1", "bn1")):
            expected = expected[stay]
        elif name == "conv2.weight":
            expected = expected[:, stay]
        assert torch.equal(get_tensor(proxy, name), expected), name
    # What no plan touches is shared, not copied.
    assert get_tensor(proxy, "bn2.weight") is get_tensor(original, "bn2.weight")


def test_attention_keeps_its_scale_when_its_heads_shrink() -> None:
    """Half of each head, and one head of two: reshapes follow, softmax stays as sharp as it was."""
    sizes = {"qkv.weight:0.2": 8, "up.weight:0": 16}
    after = assert_unchanged(PruneDims(), sized(analysed(AttentionNet), sizes))
    text = graph_text("prefix/1", graph_of(after, "prefix/1"))
    for line in (
        "%linear: [b, 4, 48] = linear(%layer_norm, @qkv.weight, @qkv.bias)",
        "%reshape_1: [b, 4, 3, 2, 8] = reshape(%linear, [%sym_size, 4, 3, 2, 8])",
        "= scaled_dot_product_attention(%getitem, %getitem_1, %getitem_2, scale=0.25)",
        "%reshape_2: [b, 4, 16] = reshape(%transpose_1, [%sym_size, 4, 16])",
        "%linear_2: [b, 4, 16] = linear(%layer_norm_1, @up.weight, @up.bias)",
    ):
        assert line in text
    stay = after.levels[1].keep["qkv.weight:0.2"]
    rows = [part * 32 + head * 16 + i for part in range(3) for head in range(2) for i in stay]
    whole = captured(AttentionNet).module.get_parameter("qkv.weight")
    assert torch.equal(get_tensor(graph_of(after, "prefix/1"), "qkv.weight"), whole[rows])
    heads = PruneDims()(sized(analysed(AttentionNet), {"qkv.weight:0.1": 1}))
    assert "reshape(%linear, [%sym_size, 4, 3, 1, 16])" in heads.text()
    with torch.no_grad():
        assert heads.levels[1].features(heads.network.example)["feature_0"].shape == (2, 32)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(ConvNet, "linear-probe"), (ResidualNet, "adapters:2"), (AttentionNet, "linear-probe")],
)
def test_every_level_runs_on_any_batch_with_the_shapes_of_level_0(
    kind: Kind, strategy: str
) -> None:
    program = pruned(kind, strategy)
    assert len(program.levels) == 3
    with torch.no_grad():
        for batch in (1, 5):
            images = torch.randn(batch, 3, 16, 16)
            sent = [
                {name: value.shape for name, value in level.features(images).items()}
                for level in program.levels
            ]
            for level in range(len(program.levels)):
                assert sent[level] == sent[0]
                assert program.logits(level, images).shape == (batch, 10)


def test_gradients_of_level_0_stay_and_every_level_has_them_all() -> None:
    before, after = analysed(ResidualNet, "adapters:2"), pruned(ResidualNet, "adapters:2")
    assert_gradients(gradients(after), gradients(before))
    for level in (1, 2):
        found = gradients(after, level)
        assert found.keys() == before.parameters.keys()
        assert {n: g.shape for n, g in found.items()} == {
            n: p.shape for n, p in before.parameters.items()
        }


@pytest.mark.parametrize("kind", [ConvNet, ResidualNet, AttentionNet])
def test_each_level_keeps_a_part_of_what_the_level_above_kept(kind: Kind) -> None:
    program = pruned(kind, "linear-probe", 3)
    for above, below in itertools.pairwise(level.keep for level in program.levels[1:]):
        for name, stay in above.items():
            assert set(below[name]) <= set(stay)
            assert below[name] == sorted(below[name])


def test_bodies_without_frozen_layers_are_the_same_at_every_level() -> None:
    program = pruned(ConvNet)
    assert graph_of(program, "body/1").code == graph_of(program, "body/0").code
    assert program.levels[2].prefix is not None


def test_nothing_to_prune() -> None:
    before = sized(analysed(ConvNet, "norm"))
    assert_same(before, assert_unchanged(PruneDims(), before))
