"""What leaves a device: compressed with what stays kept, clipped, noised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pbc.errors import UsageError
from pbc.fleet.protection import Protection, gaussian_noise
from pbc.fleet.vector import flatten, unflatten


def random() -> np.random.Generator:
    return np.random.default_rng(0)


UPDATE = np.array([3, -4, 0.5, 0.25], np.float32)
ZERO = np.zeros(4, np.float32)


def test_nothing_is_changed_without_a_protection() -> None:
    sent, left = Protection()(UPDATE, ZERO, random())
    assert np.array_equal(sent, UPDATE)
    assert not left.any()


def test_what_is_not_sent_stays_until_it_is_large() -> None:
    protection = Protection(top_k=0.25)
    total, left = ZERO, ZERO
    for _ in range(40):
        sent, left = protection(UPDATE, left, random())
        assert np.count_nonzero(sent) == 1
        total = total + sent
    np.testing.assert_allclose(total + left, 40 * UPDATE, rtol=1e-5)
    assert total.all()


def test_the_norm_is_bounded() -> None:
    sent, _ = Protection(clip=1)(UPDATE, ZERO, random())
    assert np.linalg.norm(sent) == pytest.approx(1)
    np.testing.assert_allclose(
        sent / np.linalg.norm(sent), UPDATE / np.linalg.norm(UPDATE), rtol=1e-6
    )
    small, _ = Protection(clip=100)(UPDATE, ZERO, random())
    assert np.array_equal(small, UPDATE)


def test_noise_is_by_the_clip() -> None:
    zeros = np.zeros(10_000, np.float32)
    sent, _ = Protection(clip=2, noise=0.5)(zeros, zeros, random())
    assert np.std(sent) == pytest.approx(1, rel=0.05)


def test_noise_falls_on_what_is_sent() -> None:
    sent, _ = Protection(top_k=0.5, noise=0.1)(UPDATE, ZERO, random())
    assert np.count_nonzero(sent) == 2
    assert not np.array_equal(sent[:2], UPDATE[:2])


def test_half_precision_rounds() -> None:
    sent, _ = Protection(float16=True)(
        np.array([1 / 3], np.float32), np.zeros(1, np.float32), random()
    )
    assert sent[0] == np.float32(np.float16(1 / 3))


def test_the_noise_of_a_private_release() -> None:
    """Balle and Wang's condition holds with equality, and the classical bound is above it."""
    for epsilon, delta in ((0.5, 1e-3), (1, 1e-5), (8, 1e-3)):
        noise = gaussian_noise(epsilon, delta)
        near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        spent = math.erfc(-near / 2**0.5) / 2 - math.exp(epsilon) * math.erfc(-far / 2**0.5) / 2
        assert spent == pytest.approx(delta, rel=1e-3)
        if epsilon <= 1:
            assert noise < math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"clip": math.inf}, {"noise": math.nan}])
def test_values_that_cannot_be_meant(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Protection(**wrong)  # type: ignore[arg-type]


def test_parameters_as_a_vector_and_back() -> None:
    theta = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    vector = flatten(theta, theta)
    assert vector.tolist() == [1, 1, 0, 1, 2, 3, 4, 5]
    assert flatten(theta, {"b": theta["b"], "w": theta["w"]}).tolist() == vector.tolist()
    back = unflatten(vector, theta)
    assert all(np.array_equal(back[name], theta[name]) for name in theta)
    assert flatten({"b": theta["b"]}, theta).tolist() == [1, 1] + [0] * 6
