from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, ResidualNet, analysed, calibration, settled
from torch import Tensor, nn
from torch.fx import GraphModule

from pbc import plugins
from pbc.bundle.graph_name import BODY, GraphName
from pbc.errors import PbcError, UsageError
from pbc.ir.graph import op_name
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.lower.cost_profile import CostProfile, rising
from pbc.passes import plan_levels
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies.fidelity import precision_of
from pbc.proxies.forms import INT8_COST
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_unchanged,
    gradients,
    make_program,
    run_passes,
    rungs,
    with_request,
)

KINDS = [ConvNet, ResidualNet, AttentionNet]


def costs(program: Program) -> list[float]:
    return [level.cost for level in rungs(program).levels]


@pytest.mark.parametrize("kind", KINDS)
def test_costs_fall_in_even_steps(kind: Kind) -> None:
    before = analysed(kind)
    after = assert_unchanged(PlanLevels(levels=3, min_cost=0.5, rounding=1), before)
    assert after.text() == before.text()
    # As near as whole channels (of 16) allow.
    assert costs(after) == pytest.approx([1, 1 - 0.5 / 3, 1 - 2 * 0.5 / 3, 0.5], abs=0.04)
    assert rungs(after).cost_model == "macs"
    assert [level.status for level in rungs(after).levels] == ["original"] + 3 * ["unaligned"]
    assert [level.fidelity for level in rungs(after).levels] == [1.0, None, None, None]
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
    assert len(program.plans) + 1 == len(rungs(program)) <= levels + 1
    planned = [{}, *(plan.sizes for plan in program.plans)]
    assert costs(program) == sorted(costs(program), reverse=True)
    for sizes, level in zip(planned, rungs(program).levels, strict=True):
        assert level.macs == program.dims.macs(sizes)
        assert level.cost == pytest.approx(level.macs / program.dims.macs())
        for name, size in sizes.items():
            assert 0 < size < free[name].size
            assert size % rounding == 0 or free[name].kind != "channels"
    for above, below in itertools.pairwise(planned):
        assert below != above
        for name, size in above.items():
            assert below[name] <= size
    if len(rungs(program)) <= levels:
        assert any("dropped" in note for note in program.notes)


def test_what_planning_promises_pruning_delivers() -> None:
    planned = run_passes(analysed(ConvNet), PlanLevels(levels=2, min_cost=0.4))
    made = run_passes(planned, PruneDims())
    assert made.plans == ()
    assert rungs(made) == rungs(planned)
    for plan, level in zip(planned.plans, made.levels[1:], strict=True):
        assert {name: len(stay) for name, stay in level.keep.items()} == plan.sizes


def test_a_cost_out_of_reach_is_said() -> None:
    program = PlanLevels(levels=2, min_cost=0.01, rounding=4)(analysed(ConvNet))
    assert any("0.01 is out of reach" in note for note in program.notes)
    assert costs(program)[-1] > 0.01


def prefix_of(level: LevelGraphs) -> GraphModule:
    assert level.prefix is not None
    return level.prefix


def measured_as(monkeypatch: pytest.MonkeyPatch, bfloat16: float) -> Program:
    """A program for a host that takes 10 ms for nothing, 1 ms per channel, less in bfloat16."""

    class Fixed:
        precisions = ("bfloat16",)
        refusals = ()

        def lowering(self) -> Fixed:
            return self

        def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:
            """Have an operator for each of them."""

        def latency_ms(self, program: Program, levels: Sequence[LevelGraphs]) -> list[float]:
            return [
                (10.0 + prefix_of(level).get_parameter("conv1.weight").shape[0])
                * (bfloat16 if level.precision == "bfloat16" else 1.0)
                for level in levels
            ]

    before = analysed(ConvNet)
    monkeypatch.setattr(plugins, "load", lambda group, name: Fixed())
    return with_request(before, target=replace(before.request.target, local=True))


def test_the_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured_as(monkeypatch, bfloat16=1.5)
    after = PlanLevels(levels=2, min_cost=0.7, rounding=1)(before)
    assert rungs(after).cost_model == "latency"
    widths = [plan.sizes["conv1.weight:0"] for plan in after.plans]
    assert widths == pytest.approx([12, 8], abs=1)  # (10 + 12) / 26 = 0.85, (10 + 8) / 26 = 0.7
    assert {level.precision for level in rungs(after).levels} == {"float32"}


def test_a_faster_precision_is_given_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured_as(monkeypatch, bfloat16=0.8)
    after = PlanLevels(levels=2, min_cost=0.56, rounding=1)(before)
    assert [level.precision for level in rungs(after).levels] == ["float32", *2 * ["bfloat16"]]
    assert after.plans[0].sizes == {}
    assert costs(after) == pytest.approx([1, 0.8, 0.56], abs=0.01)
    assert after.plans[1].sizes["conv1.weight:0"] == pytest.approx(8, abs=1)  # (10 + 8) / 26 * 0.8
    alone = PlanLevels(levels=1, min_cost=0.1, rounding=1)(before)
    assert costs(alone) == pytest.approx([1, 0.8])
    assert alone.notes == before.notes  # nothing further was asked for
    without = PlanLevels(levels=2, min_cost=0.56, rounding=1, axes=("width",))(before)
    assert {level.precision for level in rungs(without).levels} == {"float32"}


def test_a_precision_that_an_earlier_plan_was_wrong_about_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = measured_as(monkeypatch, bfloat16=0.8)
    plan = PlanLevels(levels=2, min_cost=0.7, rounding=1, slow_precisions=("bfloat16",))
    assert {level.precision for level in rungs(plan(before)).levels} == {"float32"}


def test_fewer_pixels_come_before_fewer_channels() -> None:
    source = make_program(ConvNet(), shape=(3, 64, 64))
    before = run_passes(source, MarkTrainable(), SplitPrefix(), IndependentDims())
    after = run_passes(before, PlanLevels(levels=3, min_cost=0.1, rounding=1), PruneDims())
    first, second, third = rungs(after).levels[1:]
    assert after.levels[1].keep == {}
    assert first.resolution is not None
    assert first.cost > second.cost > third.cost
    assert len(after.levels[3].keep) > 0
    images = after.network.example
    sent = [level.features(images)["feature_0"].shape for level in after.levels]
    assert sent[3] == sent[0]


# ---- by use --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judgeable(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A network that may be given fewer pixels, and photos to say what that loses."""
    source = make_program(settled(ConvNet()), shape=(3, 64, 64))
    program = run_passes(source, MarkTrainable(), SplitPrefix(), IndependentDims())
    data = calibration(tmp_path_factory.mktemp("photos"), program.network.input, 60)
    return replace(program, calibration=data)


def test_calibration_images_say_which_levels_a_run_would_use(
    judgeable: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PlanLevels(levels=4, min_cost=0.1, rounding=1)
    after = assert_unchanged(plan, judgeable)
    assert after.text() == judgeable.text()
    planned = [(one.resolution, one.cost) for one in after.plans]
    assert planned
    assert all(one.sizes == {} for one in after.plans)  # channels are not given up
    assert costs(after) == sorted(costs(after), reverse=True)
    # A form that loses nothing is used alone: the cheapest.
    monkeypatch.setattr(
        plan_levels, "losses_by_share", lambda program, trials, *_: [[(1.0, 0.0)]] * len(trials)
    )
    (alone,) = plan(judgeable).plans
    assert alone.resolution == (32, 32)
    # Where all lose everything there is no level, and that is said.
    monkeypatch.setattr(
        plan_levels, "losses_by_share", lambda program, trials, *_: [[(1.0, 90.0)]] * len(trials)
    )
    none = plan(judgeable)
    assert none.plans == ()
    assert sum("no run would use it" in note for note in none.notes) == 2  # 48x48, 32x32
    assert "90.0 points lost before alignment" in none.notes[-1]


def test_even_steps_are_planned_where_they_are_asked_for_or_images_are_too_few(
    judgeable: Program, tmp_path: Path
) -> None:
    even = PlanLevels(levels=3, min_cost=0.1, rounding=1, ladder="even")
    known = even(replace(judgeable, calibration=None))
    assert even(judgeable).plans == known.plans
    few = calibration(tmp_path, judgeable.network.input, 8)
    assert (
        PlanLevels(levels=3, min_cost=0.1, rounding=1)(replace(judgeable, calibration=few)).plans
        == known.plans
    )


def test_a_level_in_a_faster_precision_has_to_be_beaten(
    judgeable: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "load", lambda group, name: OffersInt8())
    monkeypatch.setattr(
        plan_levels, "losses_by_share", lambda program, trials, *_: [[(1.0, 9.0)]] * len(trials)
    )
    # A long alignment may do it, and is judged on the way; of a short one that is not expected.
    alone, promising = PlanLevels(levels=3)(judgeable).plans
    assert (promising.precision, promising.resolution) == ("int8", (32, 32))
    (only,) = PlanLevels(levels=3, align_steps=20)(judgeable).plans
    assert only == alone
    assert (only.precision, only.resolution) == ("int8", None)


def test_of_more_than_may_be_planned_the_surest_are(
    judgeable: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(program: Program, trials: Sequence[object], *_: object) -> object:
        return [[(1.0, 0.5 + 7.0 * number)] for number in range(len(trials))]

    monkeypatch.setattr(plan_levels, "losses_by_share", losses)
    several = PlanLevels(levels=4)(judgeable)
    assert [one.resolution for one in several.plans] == [(48, 48), (32, 32)]
    limited = PlanLevels(levels=1)(judgeable)
    assert [one.resolution for one in limited.plans] == [(48, 48)]
    assert not any("no run would use it" in note for note in limited.notes)


def test_an_unknown_ladder_is_refused() -> None:
    with pytest.raises(UsageError, match=r"evne.*did you mean 'even'"):
        PlanLevels(ladder="evne")


class OffersInt8:
    """The lowering of an engine with integer kernels, which take half as long."""

    precisions = ("int8",)
    refusals = ()

    def lowering(self) -> OffersInt8:
        return self

    def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:
        """Have an operator for each of them."""

    def latency_ms(self, program: Program, levels: Sequence[LevelGraphs]) -> list[float]:
        times = []
        for level in levels:
            nodes = prefix_of(level).graph.nodes
            in_int8 = any("quantize_per_tensor" in op_name(node) for node in nodes)
            assert in_int8 == (level.precision == "int8")
            assert precision_of(level, BODY, level.precision) == "float32"
            times.append(10.0 * (0.5 if in_int8 else 1.0))
        return times


@pytest.mark.parametrize("local", [False, True])
def test_int8_is_planned_where_the_engine_offers_it(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    before = analysed(ConvNet)
    before = with_request(before, target=replace(before.request.target, local=local))
    monkeypatch.setattr(plugins, "load", lambda group, name: OffersInt8())
    after = assert_unchanged(PlanLevels(levels=2, min_cost=0.1, rounding=1), before)
    assert rungs(after).levels[1].precision == "int8"
    assert after.plans[0].sizes == {}
    assert {level.precision for level in rungs(after).levels[1:]} == {"int8"}
    if local:
        assert costs(after)[1] == pytest.approx(0.5)
    else:
        assert costs(after)[1] == pytest.approx(INT8_COST, abs=0.01)  # the head's MACs are few
    assert any("assumed" in note for note in after.notes) == (not local)


def test_int8_is_not_planned_unmeasured_where_it_gains_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = analysed(AttentionNet)
    monkeypatch.setattr(plugins, "load", lambda group, name: OffersInt8())
    after = PlanLevels(levels=2, min_cost=0.1, rounding=1)(before)
    assert {level.precision for level in rungs(after).levels} == {"float32"}


def test_int8_needs_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    before = analysed(ConvNet, "full")
    assert before.levels[0].prefix is None
    monkeypatch.setattr(plugins, "load", lambda group, name: OffersInt8())
    after = PlanLevels(levels=2)(before)
    assert {level.precision for level in rungs(after).levels} == {"float32"}


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UsageError, match=r"widht.*did you mean 'width'"):
        PlanLevels(axes=("widht",))


@pytest.mark.parametrize(("strategy", "levels"), [("norm", 4), ("linear-probe", 0)])
def test_without_anything_to_shrink_level_0_is_the_only_one(strategy: str, levels: int) -> None:
    before = analysed(ConvNet, strategy)
    after = assert_unchanged(PlanLevels(levels=levels), before)
    assert after.text() == before.text()
    assert after.plans == ()
    assert [level.status for level in rungs(after).levels] == ["original"]
    assert after.notes == before.notes


# ---- a profile of the device ---------------------------------------------------------------


class WideNet(nn.Module):
    """Enough channels that a width is not much changed by rounding it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 512, 1)
        self.conv2 = nn.Conv2d(512, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def profiled(
    program: Program, path: Path, milliseconds: Callable[[float, str], float], **facts: Any
) -> Path:
    """What `pbc profile` would write on a device where so much work takes so long."""
    rows = rungs(program).to_json()
    times = [milliseconds(row["macs"] / rows[0]["macs"], row["precision"]) for row in rows]
    levels = [
        {"level": n, "prefix_ms": 0.7 * ms, "chunk": 8, "forward_ms": 0.2 * ms,
         "update_ms": 0.1 * ms}
        for n, ms in enumerate(times)
    ]  # fmt: skip
    bundle = {
        "model": program.network.name,
        "strategy": program.request.strategy,
        "target": program.request.target.name,
        "engine": program.request.engine,
        "input": list(program.network.input.shape),
        "levels": rows,
    }
    slow = [{**row, "prefix_ms": 9.0} for row in levels]
    costs = [
        {"threads": 1, "batch": program.request.batch, "levels": slow},  # not what training uses
        {"threads": 4, "batch": program.request.batch, "levels": levels},
    ]
    path.write_text(json.dumps({"schema": 1, "bundle": {**bundle, **facts}, "level_costs": costs}))
    return path


@functools.cache
def wide() -> Program:
    source = make_program(WideNet(), shape=(3, 8, 8))
    return run_passes(source, MarkTrainable(), SplitPrefix(), IndependentDims())


@pytest.mark.parametrize(
    "device",
    [
        lambda share, _: 3.0 + 9.0 * share**0.6,  # an overhead, and units that small work idles
        lambda share, _: 12.0 * share**1.4,  # small work fits into the cache
        lambda share, _: 12.0 * max(share, 0.27 + 0.5 * share),  # bound by memory below a point
    ],
)
def test_two_profiles_make_the_steps_even(
    tmp_path: Path, device: Callable[[float, str], float]
) -> None:
    before = wide()
    goal = 0.45
    planned = PlanLevels(levels=4, min_cost=goal, rounding=1)(before)

    def steps(program: Program) -> list[float]:
        rows = rungs(program).to_json()
        taken = [device(row["macs"] / rows[0]["macs"], "float32") for row in rows]
        return [float(step) for step in -np.diff(np.array(taken) / taken[0])]

    even = (1 - goal) / 4
    uneven = max(abs(step / even - 1) for step in steps(planned))
    for number in range(2):
        path = profiled(planned, tmp_path / f"{number}.json", device)
        planned = PlanLevels(levels=4, min_cost=goal, rounding=1, cost=path)(before)
        assert rungs(planned).cost_model == "profile"
    assert len(rungs(planned)) == 5
    assert uneven > 0.1  # or there would have been nothing to do
    assert steps(planned) == pytest.approx([even] * 4, rel=0.05)
    # What the manifest promises is what the device takes.
    predicted = [1 - sum(steps(planned)[:level]) for level in range(5)]
    assert costs(planned) == pytest.approx(predicted, abs=0.01)
    assert {level.latency_ms for level in rungs(planned).levels} == {None}  # nothing was measured


def test_each_precision_has_a_curve_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def device(share: float, precision: str) -> float:
        return {"float32": 10.0 * share, "int8": 2.0 + 4.0 * share}[precision]

    before = wide()
    monkeypatch.setattr(plugins, "load", lambda group, name: OffersInt8())
    plan = PlanLevels(levels=3, min_cost=0.3, rounding=1)
    first = plan(before)
    assert costs(first)[1] == pytest.approx(INT8_COST, abs=0.01)  # assumed; it is 0.6 there
    path = profiled(first, tmp_path / "p.json", device)
    second = replace(plan, cost=path)(before)
    assert [level.precision for level in rungs(second).levels] == ["float32", *3 * ["int8"]]
    assert costs(second) == pytest.approx([1, 0.6, 0.45, 0.3], abs=0.01)
    assert not any("assumed" in note for note in second.notes)
    unmeasured = profiled(
        PlanLevels(levels=3, axes=("width",))(before), tmp_path / "q.json", device
    )
    assert any("assumed" in note for note in replace(plan, cost=unmeasured)(before).notes)


def test_a_profile_goes_before_what_this_machine_measures(tmp_path: Path) -> None:
    before = wide()
    path = profiled(PlanLevels()(before), tmp_path / "p.json", lambda share, _: 1 + share)
    local = with_request(before, target=replace(before.request.target, local=True))
    after = PlanLevels(cost=path, axes=("width",))(local)
    assert rungs(after).cost_model == "profile"


def test_costs_beyond_the_profile_are_said_to_be_extrapolated(tmp_path: Path) -> None:
    before = wide()
    path = profiled(
        PlanLevels(levels=2, min_cost=0.8)(before), tmp_path / "p.json", lambda share, _: 1 + share
    )
    after = PlanLevels(levels=4, min_cost=0.6, cost=path)(before)
    assert any(
        note.startswith("costs of level 2, 3, 4 are extrapolated: the profile has none so cheap")
        for note in after.notes
    )
    assert costs(after) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6], abs=0.02)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model": "resnet50"}, "is of model resnet50, this compiles for"),
        ({"strategy": "norm"}, "is of strategy norm, this compiles for linear-probe"),
        ({"input": [3, 64, 64]}, "is of input 3x64x64, this compiles for 3x8x8"),
        ({"target": "jetson-tx2"}, "is of target jetson-tx2, this compiles for"),
        ({"engine": "tvm"}, "is of engine tvm, this compiles for"),
        ({"levels": []}, "is no profile of a ladder"),
    ],
)
def test_a_profile_of_something_else_is_refused(
    tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    before = wide()
    path = profiled(PlanLevels()(before), tmp_path / "p.json", lambda share, _: share, **facts)
    with pytest.raises(PbcError, match=words):
        PlanLevels(cost=path)(before)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    for content, words in (
        ("{", "cannot be read"),
        ("[]", "is no profile of a ladder"),
        ("{}", "is no profile of a ladder"),
    ):
        path = tmp_path / "p.json"
        path.write_text(content)
        with pytest.raises(PbcError, match=words):
            CostProfile.open(path)
    with pytest.raises(PbcError, match="cannot be read"):
        CostProfile.open(tmp_path / "nowhere.json")
    ladder = PlanLevels()(wide())
    content = json.loads(profiled(ladder, tmp_path / "p.json", lambda share, _: share).read_text())
    for run in content["level_costs"]:
        del run["levels"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(PbcError, match="has no level 0"):
        CostProfile.open(path)


@given(
    points=st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.01, 2)), min_size=1, max_size=8),
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
)
def test_a_curve_never_falls_where_the_work_grows(
    points: list[tuple[float, float]], shares: list[float]
) -> None:
    curve = rising(points)
    assert sorted(curve) == curve
    assert [time for _, time in curve] == sorted(time for _, time in curve)
    profile = CostProfile(Path(), {}, {"float32": curve})
    found = [profile.cost(share) for share in sorted(shares)]
    assert all(cost > 0 for cost in found)
    assert all(below <= above + 1e-9 for below, above in itertools.pairwise(found))
