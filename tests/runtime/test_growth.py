"""Trainings in one process leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import tiny
import tiny_onnx

from pbc.data import ImageFolder
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime

TRAININGS = 20


@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime"])
def test_trainings_in_one_process_leave_nothing_behind(
    tmp_path: Path, request: pytest.FixtureRequest, engine: str
) -> None:
    source = tiny_onnx if engine == "onnxruntime" else tiny
    path = source.write(tmp_path / "b.pbc", "maps").path
    photos = tiny.photos(tmp_path / "photos", 2)
    costs = tiny.costs(tmp_path / "costs.json")
    options = TrainOptions(epochs=1, cache="disk", costs=costs, threads=1)

    def train() -> None:
        runtime = Runtime.open(path)
        samples = ImageFolder.open(photos, runtime.spec)
        runtime.fit(samples, options, tmp_path / "out", overwrite=True)
        del runtime
        gc.collect()  # tests make Python look for cycles far more rarely than it does

    gc.freeze()  # what torch has made is not looked through each time
    request.addfinalizer(gc.unfreeze)
    for _ in range(5):
        train()
    before = tiny_onnx.resident_bytes()
    for _ in range(TRAININGS):
        train()
    # 5 MB for a hundred.
    assert tiny_onnx.resident_bytes() - before < TRAININGS * 50_000
