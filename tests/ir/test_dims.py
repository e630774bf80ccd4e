"""Dimension variables: the algebra, and the analysis of real architectures against an oracle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch_pruning
import zoo
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, MaskedNet, ResidualNet
from networks import analysed as tiny_analysed
from torch import nn

from pbc.ir.dim_rules import analyse
from pbc.ir.dims import Axis, Dims, Variable, atoms, fix, join, size, split
from pbc.ir.levels import LevelGraphs, LevelPlan
from pbc.ir.program import Program
from pbc.ir.slice_graph import slice_graph
from pbc.proxies.trial import proxy
from pbc.testing import graph_of

LARGE = (3, 224, 224)

# ---- the algebra ---------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4)


def axis_of(factors: Iterable[int]) -> Axis:
    return [Variable(factor) for factor in factors if factor > 1]


@given(factors=sizes, data=st.data())
def test_splitting_keeps_the_size_and_the_reason(factors: list[int], data: st.DataObject) -> None:
    axis = axis_of(factors)
    if data.draw(st.booleans()):
        fix(axis, "a reason")
    reasons = {variable.fixed for variable in atoms(axis)}
    for variable in list(axis):
        divisors = [d for d in range(2, variable.size) if variable.size % d == 0]
        if divisors:
            parts = split(variable, data.draw(st.sampled_from(divisors)))
            assert math.prod(part.size for part in parts) == variable.size
    assert size(axis) == math.prod(factors)
    assert {variable.fixed for variable in atoms(axis)} == reasons


@given(whole=sizes, data=st.data())
def test_joined_axes_have_equal_atoms(whole: list[int], data: st.DataObject) -> None:
    """Two ways to write one extent as a product."""
    extent = math.prod(whole)
    other: list[int] = []
    rest = extent
    while rest > 1:
        factor = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        other.append(factor)
        rest //= factor
    left, right = axis_of(whole), axis_of(other)
    if data.draw(st.booleans()):
        fix(right[:1], "a reason")
    join(left, right)
    assert size(left) == size(right) == extent
    meets = all(variable.fixed != "a reason" for variable in atoms(left))
    if any("neither divides" in (variable.fixed or "") for variable in atoms(left)):
        return  # 2·3 against 3·2: nothing may shrink
    assert atoms(left) == atoms(right)
    assert meets == all(variable.fixed != "a reason" for variable in atoms(right))


@given(extent=st.sampled_from([12, 24, 36]), count=st.integers(2, 5))
def test_joining_is_transitive(extent: int, count: int) -> None:
    axes = [[Variable(extent)] for _ in range(count)]
    for one, other in pairwise(axes):
        join(one, other)
    split(atoms(axes[0])[0], 3)
    fix(atoms(axes[-1])[:1], "a reason")
    for axis in axes:
        assert [variable.size for variable in atoms(axis)] == [3, extent // 3]
        assert [variable.fixed for variable in atoms(axis)] == ["a reason", None]


def test_sizes_that_do_not_nest_are_fixed() -> None:
    left, right = axis_of([2, 3]), axis_of([3, 2])
    join(left, right)
    for variable in (*atoms(left), *atoms(right)):
        assert variable.fixed == ("sizes 2 and 3 meet in one axis and neither divides the other")


# ---- the oracle ----------------------------------------------------------------------------

Place = tuple[str, int]


def layers(module: nn.Module) -> dict[nn.Module, str]:
    return {m: n for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def groups_of_the_oracle(module: nn.Module, shape: zoo.Shape) -> set[frozenset[Place]]:
    """Which axes of which layers Torch-Pruning prunes together."""
    names = layers(module)
    for parameter in module.parameters():
        parameter.requires_grad_(True)  # frozen parameters would silently have no groups
    graph = torch_pruning.DependencyGraph().build_dependency(module, torch.randn(1, *shape))
    inputs = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
    found = set()
    for group in graph.get_all_groups():
        places = set()
        for dependency, _ in group:
            layer = dependency.target.module
            if layer in names:
                depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
                reads = dependency.handler in inputs and not depthwise
                places.add((names[layer], int(reads)))
        found.add(frozenset(places))
    return found


def groups_of_ours(dims: Dims, module: nn.Module) -> set[frozenset[Place]]:
    """The same from dimension variables; the factors of one axis count as one."""
    leader: dict[Place, Place] = {}

    def find(place: Place) -> Place:
        while leader.setdefault(place, place) != place:
            place = leader[place]
        return place

    first: dict[Variable, Place] = {}
    for name in layers(module).values():
        for position, axis in enumerate(dims.tensors[f"{name}.weight"][:2]):
            for variable in atoms(axis):
                leader[find((name, position))] = find(first.setdefault(variable, (name, position)))
    found: dict[Place, set[Place]] = {}
    for place in leader:
        found.setdefault(find(place), set()).add(place)
    return {frozenset(places) for places in found.values()}


@pytest.mark.parametrize(
    ("model", "shape", "count", "first"),
    [
        ("resnet50", LARGE, 38, "conv1"),
        ("mobilenet_v3_large", LARGE, 31, "features.0.0"),
        ("timm:deit_tiny_patch16_224", (3, 32, 32), 26, "patch_embed.proj"),
    ],
)
def test_groups_are_those_of_torch_pruning(
    model: str, shape: zoo.Shape, count: int, first: str
) -> None:
    module, program = zoo.captured(model, shape)
    # Nothing trains, so that the classifier takes part.
    dims = analyse(LevelGraphs(graph_of(program, "model")))
    assert not dims.unknown
    theirs = groups_of_the_oracle(module, (3, 64, 64) if shape == LARGE else shape)
    ours = groups_of_ours(dims, module)
    assert len(theirs) == count
    # Ours names the image's channels too, which nothing can prune.
    assert ours - theirs == {frozenset({(first, 1)})}
    assert theirs <= ours


# ---- known figures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "text", "independent", "dimensions", "percent"),
    [
        ("resnet50", "linear-probe", 36, 37, 99.9),
        ("resnet50", "last-k:3", 29, 37, 80.0),
        ("resnet50", "norm", 0, 37, 0.0),
        ("mobilenet_v3_large", "linear-probe", 29, 30, 99.0),
        # The last three parts of `features`: two blocks and the convolution after them.
        ("mobilenet_v3_large", "last-k:2", None, None, 80.0),
        ("vit_b_16", "linear-probe", 36, 49, 99.0),
        ("vit_b_16", "norm", 36, 49, 99.0),
        ("vit_b_16", "last-k:3", 27, 37, 74.5),
        ("vit_b_16", "adapters:12", 36, 49, 98.0),
    ],
)
def test_prunable_share_of_multiply_accumulates(
    model: str, text: str, independent: int | None, dimensions: int | None, percent: float
) -> None:
    program = zoo.analysed(text, model, LARGE)
    assert program.dims is not None
    assert 100 * program.dims.prunable_share() == pytest.approx(percent, abs=1)
    if independent is not None:
        assert len(program.dims.independent()) == independent
        assert len(program.dims.dimensions) == dimensions
    assert not program.dims.unknown
    diagnosis = [note for note in program.notes if "leaves nothing to prune" in note]
    assert len(diagnosis) == (percent == 0)


@pytest.mark.parametrize(
    ("model", "billions"), [("resnet50", 4.09), ("mobilenet_v3_large", 0.217), ("vit_b_16", 17.56)]
)
def test_multiply_accumulates_are_those_of_the_papers(model: str, billions: float) -> None:
    dims = zoo.analysed("linear-probe", model, LARGE).dims
    assert dims is not None
    assert dims.macs() / 1e9 == pytest.approx(billions, rel=0.01)


# ---- slicing -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", zoo.SMALL)
def test_slicing_everything_is_exact(model: str) -> None:
    program = zoo.analysed("linear-probe", model, zoo.SMALL[model])
    assert program.dims is not None
    graph = graph_of(program, "prefix/0")
    everything = {d.name: list(range(d.size)) for d in program.dims.independent()}
    with torch.no_grad():
        image = program.network.example[:1]
        (expected,) = graph(image)
        for keep in ({}, everything):
            (got,) = slice_graph(graph, program.dims, keep)(image)
            assert torch.equal(got, expected)


def check_random_plan(program: Program, data: st.DataObject, batches: Iterable[int]) -> None:
    """Slice by a plan of any widths and any indices; what leaves keeps its shape."""
    assert program.dims is not None
    keep = {}
    for dimension in program.dims.independent():
        count = data.draw(st.integers(1, dimension.size), label=dimension.name)
        order = torch.randperm(dimension.size, generator=torch.Generator().manual_seed(count))
        keep[dimension.name] = sorted(order[:count].tolist())
    counts = {name: len(index) for name, index in keep.items()}
    original, plan = program.levels[0], LevelPlan(counts, 1.0, 0.0)
    sliced = proxy(original, plan, program.dims, keep)
    replace(program, levels=(sliced,)).check()
    with torch.no_grad():
        for batch in batches:
            images = program.network.example[:1].expand(batch, -1, -1, -1)
            expected = [tensor.shape for tensor in original.features(images).values()]
            assert [tensor.shape for tensor in sliced.features(images).values()] == expected
            logits = sliced.logits(images, program.parameters)
            assert logits.shape == (batch, program.network.reference.shape[1])
    stored = {
        name: tensor.numel()
        for graph in sliced.frozen
        for name, tensor in (*graph.named_parameters(), *graph.named_buffers())
    }
    assert 4 * sum(stored.values()) == program.dims.bytes(counts)
    # Costs are known without slicing: analysing the proxy afresh finds the same.
    assert analyse(sliced).macs() == pytest.approx(program.dims.macs(counts))


@pytest.mark.parametrize("model", zoo.SMALL)
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking a failure would take longer than reading it
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_plans_of_real_architectures_run(model: str, data: st.DataObject) -> None:
    check_random_plan(zoo.analysed("linear-probe", model, zoo.SMALL[model]), data, [1, 3])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ConvNet, "linear-probe"),
        (ResidualNet, "last-k:1"),
        (ResidualNet, "adapters:3"),
        (AttentionNet, "linear-probe"),
        (MaskedNet, "linear-probe"),
    ],
)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_plans_of_small_networks_run(kind: Kind, text: str, data: st.DataObject) -> None:
    check_random_plan(tiny_analysed(kind, text), data, [1, 5])
