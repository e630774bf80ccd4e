from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, ResidualNet, analysed

from pbc import registry
from pbc.errors import UsageError
from pbc.lowering import Candidate
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import INT8_COST, PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.program import Program, op_name
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_unchanged,
    gradients,
    make_program,
    run_passes,
)

KINDS = [ConvNet, ResidualNet, AttentionNet]


def costs(program: Program) -> list[float]:
    return [level.cost for level in program.ladder.levels]


@pytest.mark.parametrize("kind", KINDS)
def test_costs_fall_in_even_steps(kind: Kind) -> None:
    before = analysed(kind)
    after = assert_unchanged(PlanLevels(levels=3, min_cost=0.5, rounding=1), before)
    assert after.text() == before.text()
    # As near as whole channels (of 16) allow.
    assert costs(after) == pytest.approx([1, 1 - 0.5 / 3, 1 - 2 * 0.5 / 3, 0.5], abs=0.04)
    assert after.ladder.cost_model == "macs"
    assert [level.status for level in after.ladder.levels] == ["original"] + 3 * ["unaligned"]
    assert [level.fidelity for level in after.ladder.levels] == [1.0, None, None, None]
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    levels=st.integers(1, 6),
    min_cost=st.floats(0.05, 0.95),
    rounding=st.sampled_from([1, 4, 8, 16]),
)
def test_any_ladder_descends_and_names_only_independent_dimensions(
    kind: Kind, levels: int, min_cost: float, rounding: int
) -> None:
    program = PlanLevels(levels=levels, min_cost=min_cost, rounding=rounding)(analysed(kind))
    assert program.dims is not None
    free = {d.name: d for d in program.dims.independent()}
    assert len(program.sizes) == len(program.ladder) <= levels + 1
    assert program.sizes[0] == {}
    assert costs(program) == sorted(costs(program), reverse=True)
    for sizes, level in zip(program.sizes, program.ladder.levels, strict=True):
        assert level.macs == program.dims.macs(sizes)
        assert level.cost == pytest.approx(level.macs / program.dims.macs())
        for name, size in sizes.items():
            assert 0 < size < free[name].size
            assert size % rounding == 0 or free[name].kind != "channels"
    for above, below in zip(program.sizes, program.sizes[1:], strict=False):
        assert below != above
        for name, size in above.items():
            assert below[name] <= size
    if len(program.ladder) <= levels:
        assert any("dropped" in note for note in program.notes)


def test_what_planning_promises_pruning_delivers() -> None:
    program = run_passes(analysed(ConvNet), PlanLevels(levels=2, min_cost=0.4), PruneDims())
    for level, sizes in enumerate(program.sizes):
        assert {n: len(stay) for n, stay in program.plan[level].items()} == sizes


def test_a_cost_out_of_reach_is_said() -> None:
    program = PlanLevels(levels=2, min_cost=0.01, rounding=4)(analysed(ConvNet))
    assert any("0.01 is out of reach" in note for note in program.notes)
    assert costs(program)[-1] > 0.01


def measured_as(monkeypatch: pytest.MonkeyPatch, bfloat16: float) -> Program:
    """A program for a host that takes 10 ms for nothing, 1 ms per channel, less in bfloat16."""

    class Fixed:
        precisions = ("bfloat16",)

        def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
            return [
                (10.0 + c.graphs["prefix/0"].get_parameter("conv1.weight").shape[0])
                * (bfloat16 if c.precisions["prefix/0"] == "bfloat16" else 1.0)
                for c in candidates
            ]

    monkeypatch.setattr(registry, "load", lambda group, name: Fixed)
    before = analysed(ConvNet)
    return replace(before, target=replace(before.target, local=True))


def test_the_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured_as(monkeypatch, bfloat16=1.5)
    after = PlanLevels(levels=2, min_cost=0.7, rounding=1)(before)
    assert after.ladder.cost_model == "latency"
    widths = [sizes["conv1.weight:0"] for sizes in after.sizes[1:]]
    assert widths == pytest.approx([12, 8], abs=1)  # (10 + 12) / 26 = 0.85, (10 + 8) / 26 = 0.7
    assert {level.precision for level in after.ladder.levels} == {"float32"}


def test_a_faster_precision_is_given_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured_as(monkeypatch, bfloat16=0.8)
    after = PlanLevels(levels=2, min_cost=0.56, rounding=1)(before)
    assert [level.precision for level in after.ladder.levels] == ["float32", *2 * ["bfloat16"]]
    assert after.sizes[1] == {}
    assert costs(after) == pytest.approx([1, 0.8, 0.56], abs=0.01)
    assert after.sizes[2]["conv1.weight:0"] == pytest.approx(8, abs=1)  # (10 + 8) / 26 * 0.8
    alone = PlanLevels(levels=1, min_cost=0.1, rounding=1)(before)
    assert costs(alone) == pytest.approx([1, 0.8])
    assert alone.notes == before.notes  # nothing further was asked for
    without = PlanLevels(levels=2, min_cost=0.56, rounding=1, axes=("width",))(before)
    assert {level.precision for level in without.ladder.levels} == {"float32"}


def test_fewer_pixels_come_before_fewer_channels() -> None:
    source = make_program(ConvNet(), shape=(3, 64, 64))
    before = run_passes(source, MarkTrainable(), SplitPrefix(), IndependentDims())
    after = run_passes(before, PlanLevels(levels=3, min_cost=0.1, rounding=1), PruneDims())
    first, second, third = after.ladder.levels[1:]
    assert after.sizes[1] == {}
    assert first.resolution is not None
    assert first.cost > second.cost > third.cost
    assert len(after.sizes[3]) > 0
    images = after.example
    assert [f.shape for f in after.features(3, images)] == [
        f.shape for f in after.features(0, images)
    ]


class OffersInt8:
    """The lowering of an engine with integer kernels, which take half as long."""

    precisions = ("int8",)

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        times = []
        for candidate in candidates:
            graph = candidate.graphs["prefix/0"]
            in_int8 = any("quantize_per_tensor" in op_name(node) for node in graph.graph.nodes)
            assert in_int8 == (candidate.precisions["prefix/0"] == "int8")
            assert candidate.precisions["body/0"] == "float32"
            times.append(10.0 * (0.5 if in_int8 else 1.0))
        return times


@pytest.mark.parametrize("local", [False, True])
def test_int8_is_planned_where_the_engine_offers_it(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    before = analysed(ConvNet)
    before = replace(before, target=replace(before.target, local=local))
    monkeypatch.setattr(registry, "load", lambda group, name: OffersInt8)
    after = assert_unchanged(PlanLevels(levels=2, min_cost=0.1, rounding=1), before)
    assert after.ladder.levels[1].precision == "int8"
    assert after.sizes[1] == {}
    assert {level.precision for level in after.ladder.levels[1:]} == {"int8"}
    if local:
        assert costs(after)[1] == pytest.approx(0.5)
    else:
        assert costs(after)[1] == pytest.approx(INT8_COST, abs=0.01)  # the head's MACs are few
    assert any("assumed" in note for note in after.notes) == (not local)


def test_int8_is_not_planned_unmeasured_where_it_gains_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = analysed(AttentionNet)
    monkeypatch.setattr(registry, "load", lambda group, name: OffersInt8)
    after = PlanLevels(levels=2, min_cost=0.1, rounding=1)(before)
    assert {level.precision for level in after.ladder.levels} == {"float32"}


def test_int8_needs_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    before = analysed(ConvNet, "full")
    assert "prefix/0" not in before.graphs
    monkeypatch.setattr(registry, "load", lambda group, name: OffersInt8)
    after = PlanLevels(levels=2)(before)
    assert {level.precision for level in after.ladder.levels} == {"float32"}


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UsageError, match=r"widht.*did you mean 'width'"):
        PlanLevels(axes=("widht",))


@pytest.mark.parametrize(("strategy", "levels"), [("norm", 4), ("linear-probe", 0)])
def test_without_anything_to_shrink_level_0_is_the_only_one(strategy: str, levels: int) -> None:
    before = analysed(ConvNet, strategy)
    after = assert_unchanged(PlanLevels(levels=levels), before)
    assert after.text() == before.text()
    assert after.sizes == ({},)
    assert [level.status for level in after.ladder.levels] == ["original"]
    assert after.notes == before.notes
