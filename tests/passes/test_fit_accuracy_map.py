from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, calibration, pruned
from torch import Tensor

from pbc.bundle.ladder import ALIGNED
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.passes import fit_accuracy_map
from pbc.passes.fit_accuracy_map import FitAccuracyMap, isotonic_map
from pbc.proxies.pseudo_tasks import (
    Tasks,
    blend,
    falling,
    head_inputs,
    k_means,
    nearest,
    points_lost,
    ridge,
    whitening,
)
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_unchanged,
    gradients,
    run_passes,
    rungs,
)

Open = Callable[[Kind, str], Program]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Proxies that are declared aligned, with calibration data: the map asks for no more."""
    folder = tmp_path_factory.mktemp("photos")

    def aligned(kind: Kind, strategy: str) -> Program:
        program = pruned(kind, strategy)
        proxies = (
            replace(level, status=ALIGNED, fidelity=1 - 0.1 * number)
            for number, level in enumerate(program.levels[1:], 1)
        )
        return replace(
            program,
            levels=(program.levels[0], *proxies),
            calibration=calibration(folder, program.network.input, 60),
        )

    return aligned


@pytest.mark.parametrize(("kind", "strategy"), [(ConvNet, "linear-probe"), (AttentionNet, "norm")])
def test_a_map_and_a_loss_for_every_level(opened: Open, kind: Kind, strategy: str) -> None:
    before = opened(kind, strategy)
    after = assert_unchanged(FitAccuracyMap(), before)
    assert after.text() == before.text()
    assert_equivalent(before, after)
    assert_gradients(gradients(after), gradients(before))
    fidelities, losses = zip(*after.accuracy_map, strict=True)
    expected = sorted(
        {1 - share * 0.1 * k for k in (1, 2) for share in (1, 0.75, 0.5, 0.25)} | {1.0}
    )
    assert fidelities == pytest.approx(sorted(set(np.round(expected, 12))))
    assert list(losses) == sorted(losses, reverse=True)
    assert after.accuracy_map[-1] == (1.0, 0.0)
    assert [level.accuracy_loss is None for level in rungs(after).levels] == [True, False, False]
    assert all((level.accuracy_loss or 0) >= 0 for level in rungs(after).levels)
    # Proxies of a random network, never aligned: what they send tells little.
    assert losses[0] > 5
    assert set(after.mixes) == {"sgd", "closed"}
    for mixes in after.mixes.values():
        assert [(level, share) for level, share, _ in mixes] == [
            (level, share) for level in (1, 2) for share in (1.0, 0.75, 0.5, 0.25)
        ]
        for level in (1, 2):
            lost = [loss for at, _, loss in mixes if at == level]
            assert lost == sorted(lost, reverse=True)
            assert lost[-1] >= 0


def test_the_same_seed_gives_the_same_map(opened: Open) -> None:
    program = opened(ConvNet, "linear-probe")
    first, second = (run_passes(program, FitAccuracyMap()) for _ in range(2))
    assert first.accuracy_map == second.accuracy_map
    assert rungs(first) == rungs(second)


def test_a_level_like_the_original_loses_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = opened(ConvNet, "linear-probe")
    read = head_inputs

    def original(program: Program, level: LevelGraphs, *rest: object) -> Tensor:
        return read(program, program.levels[0], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fit_accuracy_map, "head_inputs", original)
    after = run_passes(program, FitAccuracyMap())
    assert {lost for _, lost in after.accuracy_map} == {0.0}
    assert [level.accuracy_loss for level in rungs(after).levels] == [None, 0, 0]


def test_without_aligned_levels_it_does_nothing(opened: Open) -> None:
    aligned = opened(ConvNet, "linear-probe")
    for program in (
        replace(pruned(ConvNet), calibration=aligned.calibration),
        replace(aligned, calibration=None),
    ):
        after = assert_unchanged(FitAccuracyMap(), program)
        assert after.accuracy_map == ()
        assert rungs(after) == rungs(program)
        assert after.notes == program.notes


def test_too_few_images_are_noted(opened: Open, tmp_path: Path) -> None:
    program = opened(ConvNet, "linear-probe")
    program = replace(program, calibration=calibration(tmp_path, program.network.input, 20))
    after = run_passes(program, FitAccuracyMap())
    assert after.accuracy_map == ()
    assert after.notes[-1] == (
        "48 alignment images are too few to map fidelity to accuracy (at least 100)"
    )


# ---- what the head reads ---------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(ConvNet, "linear-probe"), (AttentionNet, "linear-probe"), (AttentionNet, "norm")],
)
def test_the_head_reads_what_makes_the_logits(
    opened: Open, kind: Kind, strategy: str, level: int
) -> None:
    program = opened(kind, strategy)
    data = program.calibration
    assert data is not None
    read = head_inputs(program, program.levels[level], data, data.held_out)
    weight, bias = (program.parameters[name] for name in program.network.head.parameters)
    assert read.shape == (len(data.held_out), weight.shape[1])
    with torch.no_grad():
        expected = program.logits(level, data.batch(data.held_out))
        assert torch.allclose(read @ weight.T + bias, expected, atol=1e-4)


@pytest.mark.parametrize("strategy", ["linear-probe", "norm"])
def test_a_level_is_read_in_its_precision(opened: Open, strategy: str) -> None:
    program = opened(AttentionNet, strategy)
    data = program.calibration
    assert data is not None
    level = program.levels[1]
    rounded = replace(level, precision="bfloat16")
    exact = head_inputs(program, level, data, data.held_out)
    low = head_inputs(program, rounded, data, data.held_out)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().max()) < 0.05 * float(exact.abs().max())
    # The program's own tensors keep their precision.
    assert torch.equal(head_inputs(program, level, data, data.held_out), exact)


# ---- the parts -------------------------------------------------------------------------------


def test_a_blend_holds_the_share_of_both() -> None:
    proxy, original = torch.ones(2000, 3), torch.zeros(2000, 3)
    assert blend(proxy, original, 1.0, 0).mean() == 1
    assert float(blend(proxy, original, 0.25, 0).mean()) == pytest.approx(0.25, abs=0.03)


def test_k_means_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = corners[truth] + torch.randn(300, 2, generator=generator)
    found = nearest(points, k_means(points, 3, seed=1))
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 3


def test_whitened_components_are_uncorrelated_and_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    features[:, 4] = 1.0  # a constant channel carries nothing
    white = whitening(features)(features)
    gram = white.T @ white
    assert white.shape == (200, 4)
    assert torch.allclose(gram, torch.eye(4), atol=1e-4)


def test_ridge_is_the_same_in_either_space() -> None:
    """With more samples than channels, and fewer once channels are repeated: the same function."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 10, generator=generator, dtype=torch.float64)
    targets = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    few = ridge(features, targets)(features)
    padded = torch.cat([features, torch.ones(30, 40, dtype=torch.float64)], 1)
    assert torch.allclose(ridge(padded, targets)(padded), few, atol=1e-8)


def test_accuracy_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(900, 16, generator=generator)
    noise = torch.randn(600, 16, generator=generator)
    tasks = Tasks.of(features[:600], features[600:], seed=0)
    assert tasks.classes == 40
    rates = [tasks.right(features[:600] + level * noise) for level in (0, 0.7, 3)]
    accuracies = [100 * float(rate.mean()) for rate in rates]
    assert accuracies[0] > 40
    assert accuracies == sorted(accuracies, reverse=True)
    lost, error = points_lost(rates[0], rates[2])
    assert lost == pytest.approx(accuracies[0] - accuracies[2])
    assert lost > 10
    assert 0 < error < 5
    assert points_lost(rates[0], rates[0]) == (0, 0)


# ---- isotonic regression ---------------------------------------------------------------------

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
weighted = st.lists(st.tuples(numbers, st.integers(1, 5)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(weighted)
def test_the_isotonic_fit_never_rises_and_is_the_nearest(rows: list[tuple[float, int]]) -> None:
    values, weights = [v for v, _ in rows], [w for _, w in rows]
    fit = falling(values, weights)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(fit))
    assert np.dot(fit, weights) == pytest.approx(np.dot(values, weights), abs=1e-6)
    assert falling(fit, weights) == pytest.approx(fit)
    # The minimax formula: fit[i] = min over a <= i of max over b >= i of the mean of a..b.
    for i in range(len(values)):
        minimax = min(
            max(
                float(np.average(values[a : b + 1], weights=weights[a : b + 1]))
                for b in range(i, len(values))
            )
            for a in range(i + 1)
        )
        assert fit[i] == pytest.approx(minimax, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1.001), st.floats(0, 50)), max_size=12))
def test_a_map_ascends_in_fidelity_and_ends_in_no_loss(points: list[tuple[float, float]]) -> None:
    fitted = isotonic_map(points)
    fidelities, losses = zip(*fitted, strict=True)
    assert list(fidelities) == sorted(set(fidelities))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    assert fitted[-1] == (1.0, 0.0)


def test_points_of_one_fidelity_become_one() -> None:
    assert isotonic_map([(0.8, 2.0), (0.9, 1.0), (0.8, 4.0), (1.0, 0.3)]) == (
        (0.8, 3.0),
        (0.9, 1.0),
        (1.0, 0.0),
    )
