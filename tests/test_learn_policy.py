from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import ConvNet, calibration, pruned

from pbc.interface import sample_fidelity
from pbc.ladder import ALIGNED
from pbc.passes import learn_policy
from pbc.passes.learn_policy import LearnPolicy, difficulty, views
from pbc.program import POLICY, Program, placeholders, shape_of
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    gradients,
    run_passes,
)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Proxies that are declared aligned: learning a policy asks for no more."""
    program = pruned(ConvNet)
    levels = [program.ladder.levels[0]]
    levels += [replace(lv, status=ALIGNED, fidelity=0.9) for lv in program.ladder.levels[1:]]
    return replace(
        program,
        ladder=replace(program.ladder, levels=tuple(levels)),
        calibration=calibration(tmp_path_factory.mktemp("photos"), program.input, 80),
    )


@pytest.fixture(scope="module")
def learned(aligned: Program) -> Program:
    return assert_unchanged(LearnPolicy(), aligned)


def test_a_policy_joins_the_graphs(aligned: Program, learned: Program) -> None:
    assert learned.graphs.keys() == {*aligned.graphs, POLICY}
    assert_text(
        learned,
        """
        graph policy takes
          %view: [b, 3, 32, 32]
        does
          %sym_size = sym_size.int(%view, 0)
          %conv2d: [b, 16, 16, 16] = conv2d(%view, @features.0.weight, @features.0.bias, [2, 2], \
[1, 1])
          %relu: [b, 16, 16, 16] = relu(%conv2d)
          %conv2d_1: [b, 32, 8, 8] = conv2d(%relu, @features.2.weight, @features.2.bias, [2, 2], \
[1, 1])
          %relu_1: [b, 32, 8, 8] = relu(%conv2d_1)
          %conv2d_2: [b, 64, 4, 4] = conv2d(%relu_1, @features.4.weight, @features.4.bias, \
[2, 2], [1, 1])
          %relu_2: [b, 64, 4, 4] = relu(%conv2d_2)
          %adaptive_avg_pool2d: [b, 64, 1, 1] = adaptive_avg_pool2d(%relu_2, [1, 1])
          %reshape: [b, 64] = reshape(%adaptive_avg_pool2d, [%sym_size, 64])
          %linear: [b, 2] = linear(%reshape, @fidelity.weight, @fidelity.bias)
        returns %linear
        """,
        POLICY,
    )
    assert_same(aligned, replace(learned, graphs={n: learned.graphs[n] for n in aligned.graphs}))
    assert_equivalent(aligned, learned)
    assert_gradients(gradients(learned), gradients(aligned))


def test_it_is_right_on_average_on_held_out_images(learned: Program) -> None:
    data = learned.calibration
    assert data is not None
    truth = sample_fidelity(learned, [1, 2], data, data.held_out)
    with torch.no_grad():
        (predicted,) = learned.graphs[POLICY](views(data, data.held_out))
    assert predicted.mean(0).numpy() == pytest.approx(truth.mean(0), abs=1e-3)
    report = learned.policy_report
    assert report is not None
    assert report["held_out_samples"] == len(data.held_out)
    # Whatever is shipped is no worse than each level's mean.
    error = np.abs(predicted.numpy() - truth).mean()
    assert error <= report["mean_absolute_error_of_means"] + 1e-6
    for share in ("right", "off_by_one_at_most", "violations"):
        assert 0 <= report[share] <= 1
    assert report["right"] <= report["off_by_one_at_most"]


def test_the_same_seed_gives_the_same_policy(
    aligned: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_policy, "EPOCHS", 2)
    first, second = (LearnPolicy()(aligned) for _ in range(2))
    assert_same(first, second)


def test_where_nothing_can_be_predicted_the_means_are_shipped(
    aligned: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fidelities that have nothing to do with the image."""
    random = np.random.default_rng(0)

    def noise(program: object, levels: list[int], data: object, indices: np.ndarray) -> np.ndarray:
        return random.uniform(0.4, 1, (len(indices), len(levels))).astype(np.float32)

    monkeypatch.setattr(learn_policy, "sample_fidelity", noise)
    monkeypatch.setattr(learn_policy, "EPOCHS", 3)
    program = run_passes(aligned, LearnPolicy())
    assert program.policy_report is not None
    if program.policy_report["shipped"] == "means":
        view = torch.randn(4, *shape_of(placeholders(program.graphs[POLICY])[0])[1:])
        (predicted,) = program.graphs[POLICY](view)
        assert torch.allclose(predicted, predicted[:1].expand(4, -1))
    assert program.policy_report["mean_absolute_error_of_means"] == pytest.approx(0.15, abs=0.03)


def test_difficulty_is_the_largest_level_that_keeps_the_floor() -> None:
    fidelity = torch.tensor([[0.5, 0.4], [0.95, 0.2], [0.2, 0.95], [0.9, 0.9]])
    assert difficulty(fidelity, 0.9).tolist() == [0, 1, 2, 2]


def test_unaligned_levels_get_no_policy(aligned: Program) -> None:
    unaligned = replace(pruned(ConvNet), calibration=aligned.calibration)
    assert_same(unaligned, assert_unchanged(LearnPolicy(), unaligned))
    without_data = replace(aligned, calibration=None)
    assert_same(without_data, LearnPolicy()(without_data))
