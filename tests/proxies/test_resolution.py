from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ChannelsLastNet, ConvNet, Kind, ResidualNet
from torch import nn
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY
from pbc.ir.dim_rules import dims_of
from pbc.ir.graph import graph_outputs, parameter_names
from pbc.ir.levels import LevelPlan
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies.fidelity import UpToInterface
from pbc.proxies.resolution import macs, reduced, reduced_role
from pbc.proxies.trial import trial
from pbc.testing import assert_gradients, eager_gradients, gradients, graph_of, make_program


@cache
def frozen(kind: Kind, strategy: str = "linear-probe", pixels: int = 32) -> GraphModule:
    passes = (MarkTrainable(), SplitPrefix())
    program = make_program(kind().eval(), strategy, (3, pixels, pixels), passes=passes)
    return graph_of(program, "prefix/0")


@settings(max_examples=15, deadline=None)
@given(size=st.sampled_from([8, 16, 24, 31]), batch=st.integers(1, 5))
def test_outputs_keep_their_names_and_shapes(size: int, batch: int) -> None:
    graph = frozen(ConvNet)
    smaller = reduced(graph, (size, size))
    assert graph_outputs(smaller) == graph_outputs(graph)
    images = torch.randn(batch, 3, 32, 32)
    assert [t.shape for t in smaller(images)] == [t.shape for t in graph(images)]


def test_the_same_resolution_changes_nothing() -> None:
    graph = frozen(ConvNet)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(reduced(graph, (32, 32))(images), graph(images))


def test_it_is_the_network_on_smaller_images() -> None:
    graph = frozen(ConvNet)
    images = torch.randn(3, 3, 32, 32)
    small = nn.functional.interpolate(images, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(reduced(graph, (16, 16))(images), graph(small))


def test_a_feature_map_comes_back_to_its_size() -> None:
    graph = frozen(ResidualNet, "last-k:1")
    smaller = reduced(graph, (16, 16))
    images = torch.randn(2, 3, 32, 32)
    (before,), (after,) = graph(images), smaller(images)
    assert before.shape == after.shape == (2, 16, 16, 16)
    assert graph_outputs(smaller) == graph_outputs(graph)


def test_a_map_with_channels_behind_comes_back_to_its_size() -> None:
    graph = frozen(ChannelsLastNet, "last-k:1")
    images = torch.randn(2, 3, 32, 32)
    (before,), (after,) = graph(images), reduced(graph, (16, 24))(images)
    assert before.shape == after.shape == (2, 8, 8, 16)
    small = nn.functional.interpolate(images, (16, 24), mode="bilinear", align_corners=False)
    (sent,) = graph(small)
    whole = nn.functional.interpolate(
        sent.permute(0, 3, 1, 2), (8, 8), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(after, whole.permute(0, 2, 3, 1))


def test_a_network_for_one_resolution_is_left_alone() -> None:
    graph = frozen(AttentionNet, pixels=16)
    with pytest.raises(RuntimeError):
        reduced(graph, (8, 8))


def test_macs_fall_with_the_pixels() -> None:
    graph = frozen(ConvNet)
    assert macs(graph) == 32 * 32 * 16 * 27 + 16 * 16 * 24 * 16 * 9
    assert macs(reduced(graph, (16, 16))) == pytest.approx(macs(graph) / 4)
    assert macs(graph, (16, 16)) == macs(reduced(graph, (16, 16)))


@pytest.mark.parametrize(
    ("kind", "strategy"), [(ResidualNet, "bias"), (ConvNet, "norm"), (ChannelsLastNet, "norm")]
)
def test_a_body_that_computes_more_runs_on_fewer_positions(kind: Kind, strategy: str) -> None:
    passes = (MarkTrainable(), SplitPrefix(), IndependentDims())
    program = make_program(kind().eval(), strategy, (3, 32, 32), passes=passes)
    original = program.levels[0]
    assert reduced_role(original) == BODY
    plan = LevelPlan({}, 1.0, 0.0, resolution=(16, 24))
    level = trial(program, plan, dims_of(program))
    assert parameter_names(level.body) == parameter_names(original.body)
    program = replace(program, levels=(original, level))

    images = torch.randn(4, 3, 32, 32)
    if original.prefix is None:
        small = nn.functional.interpolate(images, (16, 24), mode="bilinear", align_corners=False)
        expected = original.logits(small, program.parameters)
        torch.testing.assert_close(level.logits(images, program.parameters), expected)
    else:
        assert level.prefix is not None
        torch.testing.assert_close(level.prefix(images), original.prefix(images))
    assert macs(level.body) < 0.5 * macs(original.body)

    # What trainable layers read is compared at level 0's height and width.
    whole, fewer = (UpToInterface(program, one) for one in program.levels)
    assert [t.shape for t in fewer(images)] == [t.shape for t in whole(images)]
    assert gradients(program, 1).keys() == gradients(program, 0).keys()


def test_the_gradients_at_a_lower_resolution_are_those_of_the_module_there() -> None:
    module = ResidualNet().eval()
    passes = (MarkTrainable(), SplitPrefix(), IndependentDims())
    program = make_program(module, "bias", (3, 32, 32), passes=passes)
    level = trial(program, LevelPlan({}, 1.0, 0.0, resolution=(16, 16)), dims_of(program))
    program = replace(program, levels=(program.levels[0], level))
    got = gradients(program, 1)

    example = program.network.example
    small = nn.functional.interpolate(example, (16, 16), mode="bilinear", align_corners=False)
    there = replace(program, network=replace(program.network, example=small))
    assert_gradients(got, eager_gradients(module, there))
