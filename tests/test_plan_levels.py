from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, ResidualNet, analysed

from pbc import registry
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.program import Program
from pbc.testing import assert_equivalent, assert_gradients, assert_unchanged, gradients, run_passes

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


def test_the_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs on this machine are latencies, here those of one that takes 10 ms for nothing."""

    class Fixed:
        def latency_ms(self, program: Program, candidates: Sequence[Any]) -> list[float]:
            widths = [c["prefix/0"].get_parameter("conv1.weight").shape[0] for c in candidates]
            return [10.0 + width for width in widths]

    monkeypatch.setattr(registry, "load", lambda group, name: Fixed)
    before = analysed(ConvNet)
    before = replace(before, target=replace(before.target, local=True))
    after = PlanLevels(levels=2, min_cost=0.7, rounding=1)(before)
    assert after.ladder.cost_model == "latency"
    widths = [sizes["conv1.weight:0"] for sizes in after.sizes[1:]]
    assert widths == pytest.approx([12, 8], abs=1)  # (10 + 12) / 26 = 0.85, (10 + 8) / 26 = 0.7


@pytest.mark.parametrize(("strategy", "levels"), [("norm", 4), ("linear-probe", 0)])
def test_without_anything_to_shrink_level_0_is_the_only_one(strategy: str, levels: int) -> None:
    before = analysed(ConvNet, strategy)
    after = assert_unchanged(PlanLevels(levels=levels), before)
    assert after.text() == before.text()
    assert after.sizes == ({},)
    assert [level.status for level in after.ladder.levels] == ["original"]
    assert after.notes == before.notes
