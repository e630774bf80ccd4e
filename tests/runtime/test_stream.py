"""A stream is learnt from once: blocks, labels, frames of any kind, and a model at the end."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pbc.data import ImageFolder
from pbc.errors import PbcError, UsageError
from pbc.runtime.engines.pytorch.engine import PyTorchExecutable
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.runtime.schedulers import Batch
from pbc.runtime.schedulers.piebridge import PieBridge

CLASSES = sorted(tiny.COLOURS)


def frames(count: int, size: tuple[int, int] = (20, 24), seed: int = 0) -> Iterator[Any]:
    """Yield noisy frames of the three colours with their names."""
    random = np.random.default_rng(seed)
    for at in range(count):
        name = CLASSES[at % 3]
        colour = np.array(tiny.COLOURS[name]) * random.uniform(0.3, 1)
        pixels = np.clip(colour + random.normal(0, 0.08, (*size, 3)), 0, 1)
        yield (255 * pixels).astype(np.uint8), name


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    tiny.write(tmp_path / "m.pbc")
    return Runtime.open(tmp_path / "m.pbc")


@pytest.mark.parametrize("kind", ["probe", "maps", "bodies", "whole"])
@pytest.mark.parametrize("scheduler", ["cost-model", "piebridge"])
def test_a_stream_ends_in_a_personal_model(tmp_path: Path, kind: str, scheduler: str) -> None:
    tiny.write(tmp_path / "m.pbc", kind)
    runtime = Runtime.open(tmp_path / "m.pbc")
    options = TrainOptions(
        learning_rate=0.1, scheduler=scheduler, costs=tiny.costs(tmp_path / "costs.json")
    )
    report = runtime.fit_stream(frames(610), CLASSES, options, tmp_path / "out")
    assert sum(report.levels) == 610
    assert sum(report.levels[1:]) > 0
    assert report.stage_seconds["cache"] == 0
    tiny.photos(tmp_path / "test", 6, seed=1)
    test = ImageFolder.open(tmp_path / "test", runtime.spec)
    assert Personal.open(tmp_path / "out").evaluate(test).accuracy > 0.8
    assert not (tmp_path / "out" / "cache").exists()
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_every_sample_is_asked_for_once_and_only_a_block_ahead(
    runtime: Runtime, tmp_path: Path
) -> None:
    given = 0

    def counted() -> Iterator[Any]:
        nonlocal given
        for pair in frames(200):
            given += 1
            yield pair

    ahead: list[int] = []
    options = TrainOptions(costs=tiny.costs(tmp_path / "costs.json"))
    runtime.fit_stream(
        counted(), CLASSES, options, tmp_path / "out", report=lambda event: ahead.append(given)
    )
    assert ahead == [64, 128, 192, 200]  # 16 mini-batches of 4


def test_the_same_stream_gives_the_same_bits(runtime: Runtime, tmp_path: Path) -> None:
    options = TrainOptions(costs=tiny.costs(tmp_path / "costs.json"))
    for out in ("a", "b"):
        runtime.fit_stream(frames(90), CLASSES, options, tmp_path / out)
    a, b = ((tmp_path / out / "trainable.safetensors").read_bytes() for out in "ab")
    assert a == b


def test_costs_are_measured_on_the_first_block(runtime: Runtime, tmp_path: Path) -> None:
    report = runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out")
    assert report.stage_seconds["measure"] > 0
    assert (tmp_path / "out" / "costs.json").exists()


def test_the_moving_average_of_losses_goes_on_from_block_to_block(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: list[float] = []
    observe = PieBridge.observe

    def recorded(self: PieBridge, batch: Batch, losses: np.ndarray) -> bool:
        averages.append(float(self.state()["ema"][0]))
        return observe(self, batch, losses)

    monkeypatch.setattr(PieBridge, "observe", recorded)
    options = TrainOptions(scheduler="piebridge")
    runtime.fit_stream(frames(150), CLASSES, options, tmp_path / "out")
    assert len(averages) == 38  # steps, in three blocks
    assert [math.isnan(average) for average in averages] == [True] + [False] * 37


def test_parameters_that_are_not_finite_are_never_written(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PyTorchExecutable.update

    def overflow(self: PyTorchExecutable) -> None:
        update(self)
        theta = self.parameters()
        theta["head.bias"][1] = np.inf
        self.start(theta, Objective())

    monkeypatch.setattr(PyTorchExecutable, "update", overflow)
    options = TrainOptions(costs=tiny.costs(tmp_path / "costs.json"))
    message = "a parameter is not finite after 4 samples of the stream: lower the learning rate"
    with pytest.raises(PbcError, match=message):
        # One step: no loss after it can tell.
        runtime.fit_stream(frames(4), CLASSES, options, tmp_path / "out")
    assert not (tmp_path / "out" / "model.json").exists()


def test_frames_may_be_floats_and_labels_numbers(runtime: Runtime, tmp_path: Path) -> None:
    pairs = [
        (image.astype(np.float32) / 255, CLASSES.index(name))
        for image, name in frames(30, (16, 16))
    ]
    options = TrainOptions(costs=tiny.costs(tmp_path / "costs.json"))
    runtime.fit_stream(pairs, CLASSES, options, tmp_path / "floats")
    runtime.fit_stream(frames(30, (16, 16)), CLASSES, options, tmp_path / "bytes")
    a, b = ((tmp_path / out / "trainable.safetensors").read_bytes() for out in ("floats", "bytes"))
    assert a == b


GREY = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "the stream is empty"),
        ([(GREY, 3)], "sample 0 has label 3; expected one of 3 classes"),
        ([(GREY, "violet")], "sample 0 has label 'violet'; expected one of 3 classes"),
        ([(GREY, 0), (GREY[0, 0], 0)], r"sample 1 has shape \[3\]; expected \[height, width, 3\]"),
        ([(GREY.astype(np.int32), 0)], "sample 0 is of int32; expected uint8 or floats"),
        ([(GREY + 2.0, 0)], "sample 0 has floats in 2…2; expected 0…1"),
        ([(GREY + np.nan, 0)], "sample 0 has floats in nan…nan; expected 0…1"),
    ],
)
def test_what_is_no_stream_of_images(
    runtime: Runtime, tmp_path: Path, pairs: list[Any], message: str
) -> None:
    with pytest.raises(PbcError, match=message):
        runtime.fit_stream(pairs, CLASSES, TrainOptions(), tmp_path / "out")
    assert not (tmp_path / "out" / "model.json").exists()
    runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out")
    told = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(PbcError, match=message):
        runtime.fit_stream(pairs, CLASSES, TrainOptions(), tmp_path / "out", overwrite=True)
    assert Personal.open(tmp_path / "out").model["samples"] == 30
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == told


def test_ctrl_c_ends_the_stream_and_keeps_the_model(runtime: Runtime, tmp_path: Path) -> None:
    def endless() -> Iterator[Any]:
        for at, pair in enumerate(frames(100000)):
            if at == 100:
                os.kill(os.getpid(), signal.SIGINT)
            yield pair

    with pytest.raises(KeyboardInterrupt):
        runtime.fit_stream(endless(), CLASSES, TrainOptions(), tmp_path / "out")
    assert Personal.open(tmp_path / "out").model["samples"] == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", "5s"), ("patience", 2), ("selector", "elastic"), ("deploy_level", "auto")],
)
def test_what_a_stream_cannot_follow_is_refused(
    runtime: Runtime, tmp_path: Path, name: str, value: Any
) -> None:
    runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out")
    wish = TrainOptions(**{name: value})
    with pytest.raises(UsageError, match=f"{name} is {value!r}; a stream comes once"):
        runtime.fit_stream(frames(30), CLASSES, wish, tmp_path / "out", overwrite=True)
    assert Personal.open(tmp_path / "out").model["samples"] == 30


def test_a_run_is_not_overwritten_by_accident(runtime: Runtime, tmp_path: Path) -> None:
    runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out")
    with pytest.raises(PbcError, match="holds a run already"):
        runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out")
    runtime.fit_stream(frames(30), CLASSES, TrainOptions(), tmp_path / "out", overwrite=True)
