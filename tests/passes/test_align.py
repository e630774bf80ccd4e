from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, calibration, pruned, settled

from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.passes.align import Align, relative_rate
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies import distillation, halving
from pbc.proxies.align_losses import feature_loss
from pbc.proxies.distillation import augment
from pbc.proxies.fidelity import Standard
from pbc.proxies.sample_fidelity import sample_fidelity
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_unchanged,
    gradients,
    make_program,
    run_passes,
    rungs,
    with_request,
)
from pbc.util.progress import reporting_to

CASES = [(ConvNet, "linear-probe"), (ResidualNet, "adapters:2"), (AttentionNet, "linear-probe")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


def trained_norms(folder: Path) -> Program:
    """A network whose batch norms know the photos' statistics, as those of a trained one do."""
    module = settled(ConvNet())
    spec = pruned(ConvNet).network.input
    data = calibration(folder, spec)
    for norm in (module.get_submodule("bn1"), module.get_submodule("bn2")):
        norm.momentum = None  # type: ignore[assignment]
    with torch.no_grad():
        module.train()(data.batch(data.align))
    plan = PlanLevels(levels=2, min_cost=0.2, rounding=4)
    passes = (MarkTrainable(), SplitPrefix(), IndependentDims(), plan, PruneDims())
    return replace(make_program(module, passes=passes), calibration=data)


def with_data(kind: Kind, strategy: str, folder: Path) -> Program:
    program = pruned(kind, strategy)
    return replace(program, calibration=calibration(folder, program.network.input))


def weights(program: Program, level: int) -> dict[str, torch.Tensor]:
    return {
        f"{role}: {name}": get_tensor(graph, name)
        for role, graph in program.levels[level].graphs.items()
        for name in tensor_names(graph)
    }


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_alignment_brings_proxies_nearer_and_leaves_level_0_alone(
    kind: Kind, strategy: str, photos: Path
) -> None:
    before = trained_norms(photos) if kind is ConvNet else with_data(kind, strategy, photos)
    data = before.calibration
    assert data is not None
    unaligned = sample_fidelity(before, before.levels[1:], data, data.held_out).mean(0)
    after = assert_unchanged(Align(align_steps=60), before)
    assert after.text() == before.text()
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))
    for name, tensor in weights(before, 0).items():
        assert torch.equal(weights(after, 0)[name], tensor), name
    levels = rungs(after).levels
    assert [level.status for level in levels] == ["original", "aligned", "aligned"]
    assert levels[0].fidelity == 1.0
    for level, start in zip(levels[1:], unaligned, strict=True):
        assert level.fidelity is not None
        assert start < level.fidelity <= 1.0
    measured = sample_fidelity(after, after.levels[1:], data, data.held_out).mean(0)
    assert [level.fidelity for level in levels[1:]] == pytest.approx(measured, abs=1e-5)


def test_steps_are_as_long_as_weights_are_large() -> None:
    weight = torch.randn(8, 4, 3, 3)
    assert relative_rate(1e-3, 7 * weight) == pytest.approx(7 * relative_rate(1e-3, weight))
    assert relative_rate(1e-3, torch.zeros(8, 4)) > 0
    assert relative_rate(1e-3, torch.full((8,), 40.0)) == 1e-3


def test_it_is_the_same_for_weights_of_another_size(photos: Path) -> None:
    """What a batch norm takes out again decides nothing, or steps would suit one network alone."""

    def aligned(factor: float) -> Program:
        program = trained_norms(photos)
        for level in program.levels:
            assert level.prefix is not None
            for name, power in (
                ("conv2.weight", 1),
                ("bn2.running_mean", 1),
                ("bn2.running_var", 2),
            ):
                tensor = get_tensor(level.prefix, name)
                replace_tensor(level.prefix, name, tensor * factor**power)
        return Align(align_steps=20)(program)

    found = [[level.fidelity for level in aligned(factor).levels] for factor in (1.0, 8.0)]
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_gradients_still_reach_everything_that_trains(photos: Path) -> None:
    after = Align(align_steps=2)(with_data(ResidualNet, "adapters:2", photos))
    for level in range(len(after.levels)):
        assert gradients(after, level).keys() == after.parameters.keys()
        assert all(not t.requires_grad for t in weights(after, level).values())


def test_the_same_seed_gives_the_same_bits(photos: Path) -> None:
    program = with_data(ConvNet, "linear-probe", photos)
    first, second = (Align(align_steps=3)(program) for _ in range(2))
    assert_same(first, second)
    other = Align(align_steps=3)(with_request(program, seed=1))
    assert not torch.equal(
        weights(first, 1)["prefix: conv2.weight"], weights(other, 1)["prefix: conv2.weight"]
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("reports", [3, 8, 14])
def test_an_interrupted_alignment_continues_to_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: int
) -> None:
    """Stopped in the first level, in the second, and near the end."""
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    program = with_data(ConvNet, "linear-probe", photos)
    whole = Align(align_steps=8)(program)
    program = with_request(program, work=tmp_path / "work")
    count = 0

    def stop(stage: str, fraction: float, text: str) -> None:
        nonlocal count
        count += stage == "align"
        if count == reports:
            raise Interrupted

    with pytest.raises(Interrupted), reporting_to(stop):
        Align(align_steps=8)(program)
    before = count
    count = -(10**6)
    with reporting_to(stop):
        resumed = Align(align_steps=8)(program)
    assert count + 10**6 < 20 - before + 4  # what was done is not done again
    assert_same(whole, resumed)


def test_ctrl_c_ends_after_the_step_and_loses_nothing(photos: Path, tmp_path: Path) -> None:
    program = with_data(ConvNet, "linear-probe", photos)
    whole = Align(align_steps=6)(program)
    program = with_request(program, work=tmp_path / "work")
    original = signal.getsignal(signal.SIGINT)

    def press(stage: str, fraction: float, text: str) -> None:
        if "level 1" in text and "step 3," in text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), reporting_to(press):
        Align(align_steps=6)(program)
    assert signal.getsignal(signal.SIGINT) is original
    steps = []
    with reporting_to(lambda stage, fraction, text: steps.append(text)):
        assert_same(whole, Align(align_steps=6)(program))
    assert "step 4," in steps[0]


def test_what_was_saved_for_another_alignment_is_not_used(photos: Path, tmp_path: Path) -> None:
    program = with_request(with_data(ConvNet, "linear-probe", photos), work=tmp_path / "work")
    Align(align_steps=2)(program)
    assert_same(
        Align(align_steps=3)(program), Align(align_steps=3)(with_request(program, work=None))
    )


def steps_of(program: Program, steps: int, *, stop: int = 10**6) -> tuple[Program, list[str]]:
    """Align, and return the levels of the steps; Interrupted after so many of them."""
    levels: list[str] = []

    def count(stage: str, fraction: float, text: str) -> None:
        if ", step " in text:
            levels.append(text.rpartition(", step ")[0])
            if len(levels) == stop:
                raise Interrupted

    with reporting_to(count):
        return Align(align_steps=steps)(program), levels


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge alignments that are short enough for a test: the first level is ruinous."""

    def losses(program: Program, levels: Sequence[LevelGraphs], *_: object) -> object:
        return [[(1.0, 90.0)], [(1.0, 0.1)]][: len(levels)]

    monkeypatch.setattr(halving, "losses_by_share", losses)
    monkeypatch.setattr(halving, "LEAST_STEPS", 4)
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("halved")
def test_a_level_that_no_run_would_use_is_given_up_after_a_quarter(photos: Path) -> None:
    before = with_data(ConvNet, "linear-probe", photos)
    after, levels = steps_of(before, 8)
    assert {level: levels.count(level) for level in levels} == {
        "level 1 of 2, first quarter": 2,
        "level 2 of 2, first quarter": 2,
        "level 1 of 1, the rest": 6,
    }
    (only,) = after.levels[1:]
    assert only.keep == before.levels[2].keep
    assert only.status == "aligned"
    assert "points lost after a quarter of its alignment" in after.notes[-1]
    even = Align(align_steps=8, ladder="even")(before)
    assert len(even.levels) == 3


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_an_interrupted_alignment_in_rounds_continues_to_the_same_bits(
    photos: Path, tmp_path: Path, stop: int
) -> None:
    program = with_data(ConvNet, "linear-probe", photos)
    whole, levels = steps_of(program, 8)
    program = with_request(program, work=tmp_path / "work")
    with pytest.raises(Interrupted):
        steps_of(program, 8, stop=stop)
    resumed, further = steps_of(program, 8)
    assert_same(whole, resumed)
    assert len(levels) - stop <= len(further) <= len(levels) - stop + 1


@pytest.mark.usefixtures("halved")
def test_what_goes_on_is_the_better_for_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round starts where the first one ended, and draws other images."""
    program = trained_norms(photos)
    monkeypatch.setattr(halving, "losses_by_share", lambda *_: None)
    quarter = Align(align_steps=15, ladder="even")(program)
    whole, _ = steps_of(program, 60)
    for level, start in zip(rungs(whole).levels[1:], rungs(quarter).levels[1:], strict=True):
        assert level.fidelity is not None
        assert start.fidelity is not None
        assert level.fidelity > start.fidelity


def test_a_time_budget_ends(photos: Path) -> None:
    program = with_data(ConvNet, "linear-probe", photos)
    steps = 0

    def count(stage: str, fraction: float, text: str) -> None:
        nonlocal steps
        steps += ", step " in text

    start = time.monotonic()
    with reporting_to(count):
        Align(align_time=0.3 / 60)(program)
    assert steps >= 2  # at least one for each level
    assert time.monotonic() - start < 30


def test_progress_reaches_the_end_of_every_level(photos: Path) -> None:
    seen: list[tuple[float, str]] = []

    def keep(stage: str, fraction: float, text: str) -> None:
        if stage == "align" and text:
            seen.append((fraction, text.partition(",")[0]))

    with reporting_to(keep):
        Align(align_steps=3)(with_data(ConvNet, "linear-probe", photos))
    for level in ("level 1 of 2", "level 2 of 2"):
        fractions = [fraction for fraction, text in seen if text == level]
        assert fractions == sorted(fractions)
        assert fractions[-1] == pytest.approx(1.0)


def test_the_loss_is_zero_where_nothing_differs() -> None:
    standard = Standard(torch.zeros(1, 4), torch.ones(1, 4))
    tensor = torch.randn(6, 4)
    assert float(feature_loss([tensor], [tensor], [standard])) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss([-tensor], [tensor], [standard])) > 2


def test_augmented_images_keep_their_shape_and_are_repeatable() -> None:
    images = torch.rand(4, 3, 16, 16)
    one, other = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == images.shape
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1


def test_without_calibration_data_nothing_is_aligned() -> None:
    program = pruned(ConvNet)
    assert_same(program, assert_unchanged(Align(align_steps=1), program))
    assert {level.status for level in rungs(program).levels[1:]} == {"unaligned"}


def test_without_proxies_there_is_nothing_to_align(photos: Path) -> None:
    program = with_data(ConvNet, "norm", photos)
    assert len(program.levels) == 1
    assert_same(program, run_passes(program, Align(align_steps=1)))
