from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from networks import ConvNet, pruned

from pbc import plugins
from pbc.bundle.ladder import ALIGNED, INT8, LATENCY
from pbc.ir.levels import LevelGraphs
from pbc.ir.pipeline import PlanAgain
from pbc.ir.program import Program
from pbc.passes.choose_levels import ChooseLevels
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_unchanged,
    gradients,
    rungs,
)

FREE, RUINOUS = (0.0, 0.0, 0.0, 0.1), (20.0, 40.0, 50.0, 60.0)


class Measured:
    """An engine that takes so many milliseconds for each level, whatever was planned."""

    def __init__(self, *times_ms: float) -> None:
        self.times_ms = list(times_ms)

    def lowering(self) -> Measured:
        return self

    def latency_ms(self, program: Program, levels: Sequence[LevelGraphs]) -> list[float]:
        return self.times_ms[: len(levels)]


def judged(*levels: tuple[float, Sequence[float]]) -> Program:
    """A program with a level for each cost and loss at shares of a quarter to all."""
    program = pruned(ConvNet, levels=3)
    proxies = tuple(
        replace(level, status=ALIGNED, fidelity=0.9, cost=cost, accuracy_loss=lost[-1])
        for level, (cost, lost) in zip(program.levels[1:], levels, strict=True)
    )
    rows = tuple(
        (number, share / 4, lost[share - 1])
        for number, (_, lost) in enumerate(levels, 1)
        for share in (4, 3, 2, 1)
    )
    return replace(program, levels=(program.levels[0], *proxies), mixes={"sgd": rows, "closed": ()})


def test_levels_that_no_run_would_use_go_and_the_others_close_up() -> None:
    before = judged((0.9, RUINOUS), (0.6, FREE), (0.3, RUINOUS))
    after = assert_unchanged(ChooseLevels(), before)
    assert [level.cost for level in rungs(after).levels] == [1.0, 0.6]
    assert after.levels[1].keep == before.levels[2].keep
    assert after.mixes["sgd"] == ((1, 1.0, 0.1), (1, 0.75, 0.0), (1, 0.5, 0.0), (1, 0.25, 0.0))
    assert [note.partition(":")[0] for note in after.notes[-2:]] == [
        "no level with fewer channels",
        "no level with fewer channels",
    ]
    assert "(cost 0.30, 60.0 points lost)" in after.notes[-1]
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))


def test_where_none_is_worth_it_level_0_stays_alone_and_that_is_said() -> None:
    after = ChooseLevels()(judged((0.9, RUINOUS), (0.6, RUINOUS), (0.3, RUINOUS)))
    assert len(after.levels) == 1
    assert after.mixes == {"sgd": (), "closed": ()}
    assert "--align-time" in after.notes[-1]


def test_even_steps_and_unjudged_levels_stay() -> None:
    before = judged((0.9, RUINOUS), (0.6, FREE), (0.3, RUINOUS))
    assert len(ChooseLevels(ladder="even")(before).levels) == 4
    assert len(ChooseLevels()(replace(before, mixes={})).levels) == 4


def test_on_this_machine_they_are_measured_as_they_will_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins, "load", lambda group, name: Measured(10.0, 12.2, 4.0, 9.0))
    before = replace(judged((0.6, FREE), (0.5, FREE), (0.4, FREE)), cost_model=LATENCY)
    after = ChooseLevels()(before)
    assert [level.cost for level in rungs(after).levels] == pytest.approx([1.0, 0.4])
    assert "(cost 1.22, 0.1 points lost)" in after.notes[-2]


def test_a_precision_that_is_no_faster_after_all_is_planned_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins, "load", lambda group, name: Measured(10.0, 12.2, 4.0, 3.0))
    before = replace(judged((0.6, FREE), (0.5, FREE), (0.4, FREE)), cost_model=LATENCY)
    alone, *narrower = before.levels[1:]
    rounded = replace(alone, keep={}, precision=INT8)
    narrow = [replace(level, precision=INT8) for level in narrower]
    with pytest.raises(PlanAgain, match=r"int8 takes 1\.22 of level 0's time") as found:
        ChooseLevels()(replace(before, levels=(before.levels[0], rounded, *narrow)))
    assert found.value.precision == INT8
    # Nothing was planned by the wrong cost where no other level is in it, or where it is known.
    ChooseLevels()(replace(before, levels=(before.levels[0], rounded, *narrower)))
    ChooseLevels(slow_precisions=(INT8,))(
        replace(before, levels=(before.levels[0], rounded, *narrow))
    )
