"""A sample of the zoo ends as in plain torch, and its table tells what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cell
import numpy as np
import pytest
import torch
from catalogue import Network, build, networks, of_operators
from cell import Cell, Result, run
from eager import Trained
from operators import OPERATORS, SIZE_PIXELS
from processes import results
from records import Record, append, read
from table import table

SQUEEZENET = Network("torchvision:squeezenet1_1", 64, 1_235_496)
"""A convolution for a head."""
RESNET = Network("timm:test_resnet", 64, 469_688)
EFFICIENTNET = Network("timm:test_efficientnet", 64, 356_196)
VIT = Network("timm:test_vit", 64, 371_240)
CONVNEXT = Network("timm:test_convnext", 64, 272_128)
STARNET = Network("timm:starnet_s050", 64, 542_728)


@pytest.mark.parametrize(
    ("network", "strategy", "engine", "levels"),
    [
        (SQUEEZENET, "last-k:1", "pytorch", 1),
        (RESNET, "full", "pytorch", 0),
        (EFFICIENTNET, "bias", "pytorch", 0),
        (VIT, "adapters:2", "pytorch", 1),
        (CONVNEXT, "norm", "pytorch", 1),
        (STARNET, "last-k:1", "pytorch", 1),
        (SQUEEZENET, "linear-probe", "onnxruntime", 0),
        (EFFICIENTNET, "linear-probe", "onnxruntime", 0),
        (VIT, "linear-probe", "tvm", 0),
    ],
    ids=lambda value: value.name if isinstance(value, Network) else str(value),
)
def test_a_network_trains_as_in_torch(
    network: Network, strategy: str, engine: str, levels: int
) -> None:
    assert run(Cell(network, strategy, engine, levels)) == Result("right")


def test_networks_of_operators_are_made_by_their_names() -> None:
    made = {network.name: build(network.name, network.size_pixels) for network in of_operators()}
    assert len(made) == len(OPERATORS)
    for name, module in made.items():
        scores = module.eval()(torch.randn(2, 3, SIZE_PIXELS, SIZE_PIXELS))
        assert scores.shape == (2, 10), name
        assert scores.isfinite().all(), name


def test_a_request_that_cannot_be_met_is_refused_with_its_reason() -> None:
    result = run(Cell(SQUEEZENET, "last-k:99", "pytorch", 0))
    assert result.outcome == "refused"
    assert "99" in result.reason


def test_steps_that_are_off_are_told() -> None:
    theta = {"weight": np.array([0.5, 0.5]), "bias": np.array([0.0])}
    after = {"weight": np.array([0.6, 0.3]), "bias": np.array([1e-9])}
    expected = Trained(np.array([[1.0, -2.0]]), after)

    def told(logits: np.ndarray = expected.logits, **parameters: np.ndarray) -> str:
        return cell.difference(theta, Trained(logits, {**after, **parameters}), expected)

    assert told() == ""
    assert "scores" in told(expected.logits + 1e-3)
    assert "scores" in told(expected.logits * np.nan)
    assert "weight" in told(weight=theta["weight"])
    assert "weight" in told(weight=after["weight"] + 3e-4)
    assert "other parameters: scale" in told(scale=np.ones(1))
    # What moves by rounding alone may move otherwise.
    assert told(bias=np.array([-1e-9])) == ""


def test_float32_excuses_what_it_loses_itself() -> None:
    theta = {"w": np.array([0.0])}
    exact, of_torch, of_engine = (
        Trained(np.array([[1.0]]), {"w": np.array([value])}) for value in (1.0, 1.01, 0.98)
    )
    assert cell.difference(theta, of_engine, exact, of_torch) == ""
    assert "w moves" in cell.difference(theta, of_engine, exact, exact)


def test_a_cell_that_takes_too_long_ends_at_its_limit() -> None:
    ((_, result, _),) = results([Cell(SQUEEZENET, "linear-probe", "pytorch", 0)], 1, 0.01)
    assert result.outcome == "limit"
    assert "time" in result.reason


def test_results_are_read_back_and_the_last_of_a_cell_holds(tmp_path: Path) -> None:
    file = tmp_path / "build" / "zoo.jsonl"
    assert read(file) == []
    first = Cell(SQUEEZENET, "linear-probe", "tvm", 1)
    wrong = Record.of(first, Result("wrong", "the scores are off by 2.0e-03"), 3.0)
    other = Record.of(replace(first, engine="pytorch"), Result("right"), 2.0)
    right = Record.of(first, Result("right"), 4.0)
    for record in (wrong, other, right):
        append(file, record)
    assert read(file) == [right, other]


def test_the_table_counts_outcomes_and_groups_reasons() -> None:
    base = Cell(SQUEEZENET, "linear-probe", "tvm", 1)
    records = [
        Record.of(replace(base, network=network), Result(outcome, reason), 1.0)
        for network, outcome, reason in (
            (SQUEEZENET, "right", ""),
            (RESNET, "refused", "timm:test_resnet puts out [2, 7] for two images"),
            (VIT, "refused", "timm:test_vit puts out [2, 9] for two images"),
        )
    ]
    lines = table(records).splitlines()
    assert "| tvm | linear-probe | 3 | 1 | 2 | 0 | 0 | 0 | 33% |" in lines
    (reason,) = [line for line in lines if line.startswith("| refused")]
    assert reason.startswith("| refused | 2 | NETWORK puts out … for two images |")


def test_the_catalogue_has_as_many_networks_as_it_claims() -> None:
    listed = networks()
    assert len({network.name for network in listed}) == len(listed) >= 120
