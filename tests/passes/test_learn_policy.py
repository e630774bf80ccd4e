from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvNet, calibration, pruned

from pbc.bundle.graph_name import POLICY
from pbc.bundle.ladder import ALIGNED, ORIGINAL, Level
from pbc.ir.calibration import Calibration
from pbc.ir.graph import op_name, placeholders, shape_of
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Policy, Program
from pbc.passes import learn_policy
from pbc.passes.learn_policy import (
    LearnPolicy,
    PolicyNetwork,
    beats_constants,
    conformal_margins,
    constant_fidelity,
    cost_share,
    difficulty,
    judge,
    views,
)
from pbc.proxies.sample_fidelity import affordable, sample_fidelity
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    gradients,
    graph_of,
    run_passes,
    with_request,
)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Proxies that are declared aligned: learning a policy asks for no more."""
    program = pruned(ConvNet)
    original, *proxies = program.levels
    return replace(
        program,
        levels=(original, *(replace(lv, status=ALIGNED, fidelity=0.9) for lv in proxies)),
        calibration=calibration(tmp_path_factory.mktemp("photos"), program.network.input, 80),
    )


def policy_of(program: Program) -> Policy:
    assert program.policy is not None
    return program.policy


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
          %mean: [b, 1, 32, 32] = mean.dim(%view, [1], True)
          %roll: [b, 1, 32, 32] = roll(%mean, [1], [2])
          %sub: [b, 1, 32, 32] = sub.Tensor(%mean, %roll)
          %abs_1: [b, 1, 32, 32] = abs(%sub)
          %roll_1: [b, 1, 32, 32] = roll(%mean, [1], [3])
          %sub_1: [b, 1, 32, 32] = sub.Tensor(%mean, %roll_1)
          %abs_2: [b, 1, 32, 32] = abs(%sub_1)
          %cat: [b, 5, 32, 32] = cat([%view, %abs_1, %abs_2], 1)
          %conv2d: [b, 16, 16, 16] = conv2d(%cat, @features.0.weight, @features.0.bias, [2, 2], \
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
        returns %linear as fidelity
        """,
        "policy",
    )
    assert_same(aligned, replace(learned, policy=None))
    assert_equivalent(aligned, learned)
    assert_gradients(gradients(learned), gradients(aligned))


def test_the_engine_has_every_operator(learned: Program) -> None:
    nodes = graph_of(learned, "policy").graph.nodes
    assert {op_name(node) for node in nodes if node.op == "call_function"} <= OPS


def test_what_is_shipped_is_reported(learned: Program) -> None:
    data, report = learned.calibration, policy_of(learned).report
    assert data is not None
    truth = sample_fidelity(learned, learned.levels[1:], data, data.held_out)
    with torch.no_grad():
        (predicted,) = graph_of(learned, "policy")(views(data, data.held_out))
    assert report["held_out_samples"] == len(data.held_out)
    assert report["cost_share"] > 0
    for kind in ("network", "means"):
        for row in report[kind]["floors"]:
            assert 0 <= row["violations"] <= 1
            assert 0 <= row["right"] <= row["off_by_one_at_most"] <= 1
            assert 0 < row["mean_cost"] <= 1
    if report["shipped"] == "means":
        assert policy_of(learned).margins == (0, 0)
        assert np.allclose(predicted, truth.mean(0), atol=1e-5)
    else:
        assert len(policy_of(learned).margins) == 2


def test_the_same_seed_gives_the_same_policy(
    aligned: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_policy, "EPOCHS", 2)
    first, second = (LearnPolicy()(aligned) for _ in range(2))
    assert_same(first, second)
    assert policy_of(first).report == policy_of(second).report


Fidelity = Callable[[Program, Sequence[LevelGraphs], Calibration, np.ndarray], np.ndarray]


def random_fidelity(
    program: Program, levels: Sequence[LevelGraphs], data: Calibration, indices: np.ndarray
) -> np.ndarray:
    """Fidelities that have nothing to do with the image."""
    random = np.random.default_rng(len(indices))
    return random.uniform(0.85, 1, (len(indices), len(levels))).astype(np.float32)


def visible_fidelity(
    program: Program, levels: Sequence[LevelGraphs], data: Calibration, indices: np.ndarray
) -> np.ndarray:
    """Fidelities that follow from how red the photo is."""
    redness = views(data, indices).mean((2, 3)) @ torch.tensor([1.0, -0.5, -0.5])
    good = 1 - 0.2 * (redness.numpy() < 0)[:, None]
    return (good - 0.01 * np.arange(1, len(levels) + 1)).astype(np.float32)


@pytest.fixture
def with_fidelity(
    aligned: Program, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Fidelity], Program]:
    """Learn a policy where samples have these fidelities and levels 0.92 on average."""

    def learn(fidelity: Fidelity) -> Program:
        monkeypatch.setattr(learn_policy, "sample_fidelity", fidelity)
        original, *proxies = aligned.levels
        levels = (original, *(replace(level, fidelity=0.92) for level in proxies))
        return run_passes(replace(aligned, levels=levels), LearnPolicy())

    return learn


def test_where_nothing_can_be_predicted_the_means_are_shipped(
    with_fidelity: Callable[[Fidelity], Program],
) -> None:
    program = with_fidelity(random_fidelity)
    assert policy_of(program).report["shipped"] == "means"
    assert policy_of(program).margins == (0, 0)
    assert max(policy_of(program).report["network"]["explained_variance"]) < 0.2
    view = torch.randn(4, *shape_of(placeholders(graph_of(program, "policy"))[0])[1:])
    (predicted,) = graph_of(program, "policy")(view)
    assert torch.allclose(predicted, predicted[:1].expand(4, -1))


def test_a_network_that_beats_the_constants_is_shipped(
    with_fidelity: Callable[[Fidelity], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_policy, "EPOCHS", 60)
    monkeypatch.setattr(learn_policy, "MOST_EXPENSIVE", math.inf)
    program = with_fidelity(visible_fidelity)
    report, data = policy_of(program).report, program.calibration
    assert data is not None
    assert report["shipped"] == "network"
    assert min(report["network"]["explained_variance"]) > 0.5
    row = report["network"]["floors"][0]
    assert row["gain"] > 0.01
    assert row["violations"] <= 0.2
    with torch.no_grad():
        (predicted,) = graph_of(program, "policy")(views(data, data.held_out))
    truth = visible_fidelity(program, program.levels[1:], data, data.held_out)
    floors, means = np.array(report["mixes"]).T
    assert list(floors) == sorted(floors)
    # What a floor gives on average: more than the floor itself, the more the higher it is.
    assert means[-1] > means[0]
    assert (np.diff(means) >= -0.02).all()
    trusted = torch.from_numpy(predicted.numpy() - np.array(policy_of(program).margins))[1::2]
    level = difficulty(trusted, float(floors[-1]), program.levels).numpy()
    got = np.where(level == 0, 1.0, truth[1::2][np.arange(len(level)), level - 1])
    assert means[-1] == pytest.approx(got.mean() - got.std() / math.sqrt(len(got)), abs=1e-6)
    assert np.mean(truth >= predicted.numpy() - policy_of(program).margins) >= 0.85


def test_a_network_that_costs_too_much_is_not_shipped(
    with_fidelity: Callable[[Fidelity], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny network under test is cheaper than its policy."""
    monkeypatch.setattr(learn_policy, "EPOCHS", 60)
    program = with_fidelity(visible_fidelity)
    assert policy_of(program).report["shipped"] == "means"
    assert policy_of(program).report["cost_share"] > 0.03
    assert "the policy network takes" in program.notes[-1]


def test_time_counts_where_this_machine_is_the_target(aligned: Program) -> None:
    data, network = aligned.calibration, PolicyNetwork(2).eval()
    assert data is not None
    macs = cost_share(aligned, data, network)
    here = with_request(aligned, target=replace(aligned.request.target, local=True))
    assert cost_share(here, data, network) >= macs


def test_few_held_out_images_mean_means(tmp_path: Path, aligned: Program) -> None:
    few = replace(aligned, calibration=calibration(tmp_path, aligned.network.input, 8))
    program = run_passes(few, LearnPolicy())
    assert policy_of(program).report["shipped"] == "means"
    assert policy_of(program).report["network"] is None


@settings(max_examples=50, deadline=None)
@given(st.integers(9, 200), st.integers(0, 1000))
def test_margins_cover_at_the_confidence(samples: int, seed: int) -> None:
    """Of the very samples that gave the margins, a little more than the share asked for is kept."""
    truth, predicted = torch.rand(2, samples, 3, generator=torch.Generator().manual_seed(seed))
    kept = (truth >= predicted - conformal_margins(predicted, truth, 0.9) - 1e-6).float().mean(0)
    assert (kept >= 0.9).all()
    assert (kept <= 0.9 + 2 / samples + 1e-6).all()


def test_too_few_samples_for_a_confidence() -> None:
    with pytest.raises(ValueError, match=r"8 samples are too few for a confidence of 0\.9"):
        conformal_margins(torch.zeros(8, 1), torch.zeros(8, 1), 0.9)


def ladder(*levels: tuple[float, float]) -> list[Level]:
    """Aligned levels of these costs and fidelities below an original."""
    rows = [Level(0, 1.0, None, 1e6, 1.0, ORIGINAL)]
    rows += [
        Level(number + 1, cost, None, cost * 1e6, fidelity, ALIGNED)
        for number, (cost, fidelity) in enumerate(levels)
    ]
    return rows


def test_difficulty_is_the_cheapest_level_that_keeps_the_floor() -> None:
    fidelity = torch.tensor([[0.5, 0.4], [0.95, 0.2], [0.2, 0.95], [0.9, 0.9]])
    assert difficulty(fidelity, 0.9, ladder((0.8, 0.95), (0.5, 0.92))).tolist() == [0, 1, 2, 2]
    # Level 2 costs more than level 1, and is not faithful enough on average.
    assert difficulty(fidelity, 0.9, ladder((0.5, 0.95), (0.8, 0.92))).tolist() == [0, 1, 2, 1]
    assert difficulty(fidelity, 0.9, ladder((0.8, 0.95), (0.5, 0.7))).tolist() == [0, 1, 0, 1]


def test_the_best_constants_at_a_cost() -> None:
    """Half of the samples at level 0 and half at level 2 is better than all at level 1."""
    fidelity = torch.tensor([[1.0, 0.6, 0.9], [1.0, 0.6, 0.7]])
    costs = torch.tensor([1.0, 0.75, 0.5])
    assert constant_fidelity(fidelity, costs, 0.75).tolist() == pytest.approx([0.95, 0.85])
    assert constant_fidelity(fidelity, costs, 1.0).tolist() == pytest.approx([1, 1])
    assert constant_fidelity(fidelity, costs, 0.5).tolist() == pytest.approx([0.9, 0.7])


def test_routing_by_the_truth_beats_constants_and_never_violates() -> None:
    truth = torch.tensor([[0.99, 0.95], [0.97, 0.80], [0.80, 0.70], [0.99, 0.96]]).repeat(20, 1)
    rungs = ladder((0.8, 0.92), (0.5, 0.91))
    verdict = judge(truth, truth, rungs)
    assert beats_constants(verdict)
    for row in verdict["floors"]:
        assert row["right"] == 1
        assert row["violations"] == 0
    # Told that all are alike, it sends all to the cheapest level: the constants' own choice.
    constant = judge(truth.mean(0).expand_as(truth) * 0 + 0.93, truth, rungs)
    assert not beats_constants(constant)
    assert constant["floors"][0]["violations"] == 0.5
    assert constant["floors"][0]["mean_cost"] == 0.5


def test_measuring_is_bounded_by_what_the_levels_cost() -> None:
    indices = np.arange(10_000)
    assert len(affordable(1e6, indices, 4000)) == 4000
    assert len(affordable(3e9, indices, 4000)) == 4e12 // 3e9
    assert len(affordable(3e12, indices, 4000)) == 500
    assert affordable(1e6, indices[:30], 4000).tolist() == list(range(30))


def test_unaligned_levels_get_no_policy(aligned: Program) -> None:
    unaligned = replace(pruned(ConvNet), calibration=aligned.calibration)
    assert_same(unaligned, assert_unchanged(LearnPolicy(), unaligned))
    without_data = replace(aligned, calibration=None)
    assert_same(without_data, LearnPolicy()(without_data))
