"""Closed-form heads beside what they stand for: plain discriminant analysis, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from pbc.errors import PbcError
from pbc.runtime import closed_form
from pbc.runtime.closed_form import SHRINKAGES, ClassStatistics, Head, solve_lower, solve_upper

Rows = tuple[np.ndarray, np.ndarray]


def gaussians(per_class: int = 60, classes: int = 4, width: int = 12, seed: int = 0) -> Rows:
    """Return correlated Gaussian classes far from the origin, shuffled."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width))
    means = random.normal(size=(classes, width)) * 1.5 + 20
    labels = random.permutation(np.repeat(np.arange(classes), per_class))
    rows = means[labels] + random.normal(size=(len(labels), width)) @ mixing
    return rows.astype(np.float32), labels


def statistics(
    rows: np.ndarray, labels: np.ndarray, classes: int, batch: int = 7
) -> ClassStatistics:
    sums = ClassStatistics(classes, rows.shape[1], seed=0)
    for start in range(0, len(rows), batch):
        sums.add(rows[start : start + batch], labels[start : start + batch])
    return sums


def scores(rows: np.ndarray, labels: np.ndarray, at: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return the discriminant scores of `at`, written down from the textbook."""
    rows = rows.astype(np.float64)
    classes = np.unique(labels)
    means = np.stack([rows[labels == number].mean(axis=0) for number in classes])
    deviations = rows - means[np.searchsorted(classes, labels)]
    covariance = deviations.T @ deviations / (len(rows) - len(classes))
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    between = at[:, None].astype(np.float64) - means
    distances = np.einsum("ncd,de,nce->nc", between, np.linalg.inv(shrunk), between)
    priors = np.array([(labels == number).mean() for number in classes])
    return np.asarray(np.log(priors) - distances / 2)


def logits(head: Head, at: np.ndarray) -> np.ndarray:
    return np.asarray(at.astype(np.float64) @ head.weight.T + head.bias)


def test_the_head_is_the_discriminant_of_the_textbook() -> None:
    rows, labels = gaussians()
    test, _ = gaussians(seed=0, per_class=70)
    head = statistics(rows, labels, 4).solve()
    expected = scores(rows, labels, test, head.shrinkage)
    found = logits(head, test)
    # A head is used through differences between classes, and up to a positive factor.
    expected -= expected.mean(axis=1, keepdims=True)
    found -= found.mean(axis=1, keepdims=True)
    factor = float((found * expected).sum() / (expected**2).sum())
    assert factor > 0
    np.testing.assert_allclose(found, factor * expected, atol=2e-2 * np.abs(found).max())


def test_leaving_one_out_is_what_it_says() -> None:
    rows, labels = gaussians(per_class=12)
    head = statistics(rows, labels, 4).solve()
    right = 0
    for out in range(len(rows)):
        kept = np.arange(len(rows)) != out
        found = scores(rows[kept], labels[kept], rows[out : out + 1], head.shrinkage)
        right += int(found.argmax() == labels[out])
    # The diagonal is not recomputed for every sample: a borderline one may differ.
    assert head.judged == len(rows)
    assert head.accuracy is not None
    assert head.accuracy * len(rows) == pytest.approx(right, abs=2)


def test_many_samples_need_less_shrinkage_than_few() -> None:
    few = statistics(*gaussians(per_class=5, width=40), classes=4).solve()
    many = statistics(*gaussians(per_class=400, width=40), classes=4).solve()
    assert few.shrinkage > many.shrinkage
    assert {few.shrinkage, many.shrinkage} <= set(SHRINKAGES)
    assert many.better_than(few)


@pytest.mark.parametrize("per_class", [1, 2, 5, 12])
def test_of_few_samples_products_give_the_head_of_the_scatter(
    per_class: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = gaussians(per_class=per_class, width=150)
    rows[:, :20] = 3  # never changes
    few = statistics(rows, labels, 5)  # one class without a sample
    assert "scatter" not in few.state()
    dual = few.solve()
    monkeypatch.setattr(closed_form, "_FEW", 0)
    many = statistics(rows, labels, 5)
    primal = many.solve()
    assert dual.shrinkage == primal.shrinkage
    assert dual.accuracy == primal.accuracy
    assert dual.judged == primal.judged
    if dual.judged:
        assert dual.loss == pytest.approx(primal.loss, rel=1e-9)
    np.testing.assert_allclose(dual.weight, primal.weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dual.bias, primal.bias, rtol=1e-5)


def test_samples_that_become_many_give_the_scatter_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = gaussians(per_class=180, width=600)
    grown = statistics(rows, labels, 4)
    assert "scatter" in grown.state()
    monkeypatch.setattr(closed_form, "_FEW", 0)
    whole = statistics(rows, labels, 4)
    np.testing.assert_allclose(grown.glance().weight, whole.glance().weight, rtol=1e-4, atol=1e-7)


def test_mini_batches_and_interruptions_leave_the_bits_alone() -> None:
    rows, labels = gaussians(per_class=200)
    whole = statistics(rows, labels, 4, batch=300)
    parts = ClassStatistics(4, rows.shape[1], seed=0)
    for start in range(0, len(rows), 7):
        parts.glance() if parts.count else None  # a look changes nothing
        resumed = ClassStatistics(4, rows.shape[1], seed=0)
        resumed.load_state({name: value.copy() for name, value in parts.state().items()})
        parts = resumed
        parts.add(rows[start : start + 7], labels[start : start + 7])
    assert parts.count == whole.count == len(rows)
    assert np.array_equal(parts.solve().weight, whole.solve().weight)
    assert np.array_equal(parts.solve().bias, whole.solve().bias)


def test_probabilities_are_no_surer_than_left_out_samples_allow() -> None:
    rows, labels = gaussians(per_class=6, width=60)
    head = statistics(rows, labels, 4).solve()
    assert head.loss is not None
    assert head.loss < np.log(4) + 0.05


@pytest.mark.parametrize(
    ("labels", "why"),
    [([0, 1, 2, 3], "one each"), ([0, 0, 2, 2], "a class without any"), ([1], "a single one")],
)
def test_few_samples_give_a_head_too(labels: list[int], why: str) -> None:
    rows = np.eye(len(labels), 5, dtype=np.float32)
    head = statistics(rows, np.array(labels), 4).solve()
    assert np.isfinite(head.weight).all(), why
    assert np.isfinite(head.bias).all(), why
    assert logits(head, rows).argmax(axis=1).tolist() == labels


@pytest.mark.parametrize("per_class", [1, 4])
def test_too_few_samples_judge_nothing_and_scale_nothing(per_class: int) -> None:
    rows, labels = gaussians(per_class=per_class, width=1000)
    sums = statistics(rows, labels, 4)
    for head in (sums.solve(), sums.glance(), sums.solve_like(sums.solve().facts())):
        assert (head.accuracy, head.loss, head.judged) == (None, None, 0)
        assert head.shrinkage == max(SHRINKAGES)
        assert head.sharpness == 1 / 250
    narrow = statistics(*gaussians(per_class=per_class, width=3), classes=4).solve()
    assert narrow.sharpness == 1


def test_classes_with_a_single_sample_do_not_judge() -> None:
    rows, labels = gaussians(per_class=15)
    judges = labels < 2
    single = [int(np.flatnonzero(labels == label)[0]) for label in (2, 3)]
    chosen = np.concatenate([np.flatnonzero(judges), single])
    head = statistics(rows[chosen], labels[chosen], 4).solve()
    assert head.judged == 30
    assert head.accuracy is not None
    assert head.accuracy < 1


def test_channels_that_never_change_do_no_harm() -> None:
    rows, labels = gaussians()
    rows = np.concatenate([rows, np.zeros_like(rows), np.full_like(rows, 3)], axis=1)
    head = statistics(rows, labels, 4).solve()
    plain = statistics(rows[:, :12], labels, 4).solve()
    assert head.accuracy == plain.accuracy


def test_what_is_not_finite_is_refused() -> None:
    rows, labels = gaussians()
    rows[3, 2] = np.nan
    with pytest.raises(PbcError, match="a feature is not finite"):
        statistics(rows, labels, 4).solve()


@pytest.mark.parametrize("width", [1, 64, 150])
def test_triangular_systems_are_solved(width: int) -> None:
    random = np.random.default_rng(0)
    factor = np.tril(random.normal(size=(width, width))) / width + np.eye(width)
    right = random.normal(size=(width, 3))
    np.testing.assert_allclose(factor @ solve_lower(factor, right), right, atol=1e-10)
    np.testing.assert_allclose(factor.T @ solve_upper(factor, right), right, atol=1e-10)
