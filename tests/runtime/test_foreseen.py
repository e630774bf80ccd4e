"""What a manifest says is large, and no file is: refused before any of it takes memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_onnx

from pbc import bundle
from pbc.bundle.shape import check_manifest
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.closed_form import MOST_WIDTH
from pbc.runtime.engines import bounds
from pbc.runtime.engines.bounds import (
    check_mini_batch,
    check_table,
    photos_at_once,
    training_bytes,
)
from pbc.runtime.head_inputs import HeadInputs
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import parameter_shapes, with_head
from pbc.runtime.runtime import Runtime
from pbc.util.memory import available_bytes
from pbc.util.shapes import ShapeError

CONTENTS = {"pytorch": tiny.contents, "onnxruntime": tiny_onnx.contents}
BIG: dict[str, dict[str, Any]] = {
    "weight": {"parameters": {"head.weight": [None, 1 << 24], "head.bias": [None]}},
    "bias": {"parameters": {"head.weight": [None, 8], "head.bias": [None, 1 << 24]}},
    "features": {"features": {"flat": [1 << 26]}},
}
# What torch imports to foresee shapes is 70 MB of it; the weight would be 200.
MOST_BYTES = 128 << 20


@pytest.mark.parametrize("change", BIG)
@pytest.mark.parametrize("engine", CONTENTS)
def test_a_training_of_shapes_that_no_graph_takes(engine: str, change: str, tmp_path: Path) -> None:
    manifest, files = CONTENTS[engine]("probe")
    bundle.write(tmp_path / "m.pbc", {**manifest, **BIG[change]}, files)
    runtime = Runtime.open(tmp_path / "m.pbc")
    samples = ImageFolder.open(tiny.photos(tmp_path / "photos", 1), runtime.spec)
    tracemalloc.start()
    try:
        with pytest.raises(PbcError, match=r"body[/-]0.* cannot (run|be)|MiB are granted"):
            runtime.fit(samples, TrainOptions(epochs=1), tmp_path / "mine")
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters": {"head.weight": [None, 8], "head.bias": [1 << 26]}}, "its classes, null"),
        ({"parameters": {"head.weight": [None, None], "head.bias": [None]}}, "its classes, null"),
        ({"parameters": {"head.weight": [None, 1 << 26], "head.bias": [None]}}, "at most 67108864"),
        ({"policy": {"view": [4, 1024, 1024], "report": {}}}, "at most 262144 are looked at"),
    ],
)
def test_sizes_that_no_manifest_may_have(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "m.pbc")
    with pytest.raises(ShapeError, match=said):
        check_manifest({**made.manifest, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"costs": "fast"},
        {"costs": {"machine": "m", "levels": []}},
        {"costs": {"machine": "m", "levels": [{"chunk": 0}]}},
        {"self_test": {"levels": {}, "policy": 5}},
        {"self_test": {"levels": {"0": {"before": ["x"], "after": [1]}}}},
    ],
)
def test_facts_of_another_form(change: dict[str, Any], tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "m.pbc")
    with pytest.raises(ShapeError):
        check_manifest({**made.manifest, **change})


def test_features_of_another_size_than_the_images_that_they_are(tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "m.pbc", "whole")
    check_manifest(made.manifest)
    with pytest.raises(ShapeError, match="without a prefix the features are the images"):
        check_manifest({**made.manifest, "features": {"x": [3, 1 << 20, 16]}})


def test_a_head_that_many_classes_make_too_large() -> None:
    manifest = {"parameters": {"w": [None, 1 << 20]}, "head": {"w": 1}}
    assert parameter_shapes(manifest, 64) == {"w": (64, 1 << 20)}
    with pytest.raises(PbcError, match="'w' would have 68157440 values for 65 classes"):
        parameter_shapes(manifest, 65)


def test_a_head_is_drawn_by_parts_as_in_one() -> None:
    shape = (3, 200_003)
    drawn = with_head({"parameters": {"w": [None, 200_003]}, "head": {"w": 4}}, {}, 3, seed=7)["w"]
    whole = np.random.Generator(np.random.PCG64(7)).uniform(-0.5, 0.5, shape).astype(np.float32)
    np.testing.assert_array_equal(drawn, whole)


def test_a_head_of_too_many_inputs_has_no_closed_form(tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "m.pbc")
    theta = {
        "head.weight": np.zeros((2, MOST_WIDTH + 1), np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
    # It is known by the shape alone: nothing is run.
    assert HeadInputs.find(made, None, theta) is None  # type: ignore[arg-type]


def test_images_and_features_count_however_large_a_mini_batch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"input": {"shape": [3, 4096, 4096]}, "features": {"flat": [1 << 24]}}
    assert photos_at_once(shapes) == 1
    assert photos_at_once({"input": {"shape": [3, 224, 224]}, "features": {"f": [1280]}}) > 400
    with pytest.raises(PbcError, match="images and features of 4096 photos would take 1048576 MiB"):
        check_mini_batch(shapes, 4096)
    with pytest.raises(PbcError, match="the features of 4194304 photos would take"):
        check_table(shapes, 1 << 22)
    manifest, files = tiny.contents(batch=1 << 20)
    change = {"input": {**manifest["input"], "shape": [3, 4096, 4096]}}
    bundle.write(tmp_path / "m.pbc", {**manifest, **change}, files)
    runtime = Runtime.open(tmp_path / "m.pbc")
    samples = ImageFolder.open(tiny.photos(tmp_path / "photos", 1), runtime.spec)
    monkeypatch.setattr(bounds, "available_bytes", lambda: 0)
    training_bytes.cache_clear()
    try:
        with pytest.raises(PbcError, match=r"of 3 photos would take 576 MiB.* a smaller --batch"):
            runtime.fit(samples, TrainOptions(), tmp_path / "mine")
    finally:
        training_bytes.cache_clear()


def test_memory_that_is_left_is_that_of_the_least_limit() -> None:
    free = available_bytes()
    assert free > 0
    code = "from pbc.util.memory import available_bytes as free; print(free())"
    limit = 1 << 30
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert 0 < int(told.stdout) < min(limit, free)
