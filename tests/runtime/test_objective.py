"""What may be asked of the loss and the optimizer."""

from __future__ import annotations

from typing import Any

import pytest

from pbc.bench.tuning import RATES
from pbc.bundle.optimizers import OPTIMIZERS
from pbc.errors import UsageError
from pbc.runtime.objective import Objective, default_rate
from pbc.runtime.options import TrainOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adm"}, "no optimizer named 'adm'; did you mean 'adam'"),
        ({"learning_rate": 0.0}, "the learning rate is 0.0; it must be above 0 and at most 1e"),
        ({"learning_rate": float("inf")}, "the learning rate is inf; it must be above 0"),
        ({"momentum": -0.1}, "the momentum is -0.1; it must be at least 0 and below 1"),
        ({"momentum": float("nan")}, "the momentum is nan; it must be at least 0 and below 1"),
        ({"weight_decay": float("nan")}, "the weight decay is nan; it must be at least 0 and at"),
        ({"label_smoothing": -0.1}, "the label smoothing is -0.1; it must be at least 0 and"),
    ],
)
def test_what_no_optimizer_can_do_is_refused(values: dict[str, Any], message: str) -> None:
    for kind in (Objective, TrainOptions):
        with pytest.raises(UsageError, match=message):
            kind(**values)


def test_options_without_a_rate_take_the_optimizers_own() -> None:
    for optimizer, rate in ((name, default_rate(name)) for name in OPTIMIZERS):
        assert TrainOptions(optimizer=optimizer).objective == Objective(optimizer, rate)
    options = TrainOptions(
        learning_rate=0.5, momentum=0.25, weight_decay=0.125, label_smoothing=0.0625
    )
    assert options.objective == Objective("sgd", 0.5, 0.25, 0.125, 0.0625)


def test_the_bench_tunes_every_optimizer_around_its_own_rate() -> None:
    assert RATES.keys() == OPTIMIZERS.keys()
    assert all(rates[1] == default_rate(name) for name, rates in RATES.items())


def test_what_decides_a_result_is_of_its_identity() -> None:
    deciding = TrainOptions().deciding()
    assert {"momentum", "weight_decay", "label_smoothing"} <= deciding.keys()
    for name in ("momentum", "weight_decay", "label_smoothing"):
        half: dict[str, Any] = {name: 0.5}
        changed = TrainOptions(**half).deciding()
        assert {key for key in deciding if deciding[key] != changed[key]} == {name}


def test_momentum_is_for_sgd_alone() -> None:
    with pytest.raises(UsageError, match=r"the momentum is 0\.5, but adam takes none; only sgd"):
        TrainOptions(optimizer="adam", momentum=0.5)
