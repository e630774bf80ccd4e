from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_net
import deploying
import numpy as np
import pytest
import safetensors.numpy
import tiny_onnx

from pbc import bundle, compiler
from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.runtime import self_test


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, examples: Path) -> Bundle:
    """Of the ONNX Runtime engine, with an int8 proxy and a policy."""
    folder = tmp_path_factory.mktemp("proxied")
    source = folder / "net.py"
    source.write_text(bench_net.SOURCE)
    options = compiler.CompileOptions(
        target="raspberry-pi-5",
        engine="onnxruntime",
        weights="random",
        shape=(3, 32, 32),
        classes=5,
        levels=1,
        calibration=examples / "calibration",
        align_steps=2,
        ladder="even",
        batch=4,
    )
    return compiler.compile(f"{source}:factory", folder / "net.pbc", options)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the PyTorch engine, everything trains: the body has convolutions and batch norms."""
    folder = tmp_path_factory.mktemp("deep")
    source = folder / "net.py"
    source.write_text(bench_net.SOURCE)
    options = compiler.CompileOptions(
        engine="pytorch", weights="random", shape=(3, 16, 16), strategy="full", levels=0
    )
    return compiler.compile(f"{source}:factory", folder / "net.pbc", options)


def test_what_onnxruntime_finds_is_what_torch_found(proxied: Bundle) -> None:
    outcome = self_test.run(proxied)
    assert outcome.errors.keys() == {"level 0", "level 1", "policy"}
    assert not outcome.failed
    assert max(outcome.errors.values()) < 1e-3


def test_what_the_pytorch_engine_finds_is_what_torch_found(deep: Bundle) -> None:
    outcome = self_test.run(deep)
    assert outcome.errors.keys() == {"level 0"}
    assert outcome.errors["level 0"] < 1e-3


def test_a_step_moves_what_it_is_measured_by(proxied: Bundle, deep: Bundle) -> None:
    for made in (proxied, deep):
        for numbers in made.manifest["self_test"]["levels"].values():
            change = np.array(numbers["before"]) - np.array(numbers["after"])
            assert change.mean() > 0.05 * np.mean(numbers["before"])


PIXELS = [109, 113, 117, 121, 29, 33, 37, 41]


def test_the_images_are_what_they_were() -> None:
    """Pinned: the manifest of today is compared with the images of a later numpy."""
    spec = InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = np.round(self_test.images(spec) * 255).astype(np.int64)
    assert pixels[1, 2, 5].tolist() == PIXELS
    assert self_test.labels(3).tolist() == [0, 1, 2, 0]
    assert self_test.views([1, 1, 3], 2).ravel().tolist() == pytest.approx(
        [-1, -0.26, 0.48, -0.8, -0.06, 0.68]
    )


def damaged(path: Path, change: dict[str, float]) -> Bundle:
    """A bundle with sound hashes whose frozen weights are not those of the self-test."""
    sound = deploying.write(path)
    files = {name: sound.read(name) for name in sound.manifest["files"]}
    name = tiny_onnx.WEIGHTS.format(0)
    tensors = safetensors.numpy.load(files[name])
    for key, factor in change.items():
        tensors[key] = (tensors[key] * np.float32(factor)).astype(np.float32)
    files[name] = safetensors.numpy.save(tensors)
    manifest: dict[str, Any] = dict(sound.manifest)
    return bundle.write(path, manifest, files)


def test_wrong_weights_are_noticed(tmp_path: Path) -> None:
    outcome = self_test.run(damaged(tmp_path / "net.pbc", {"conv.weight": 1.2}))
    assert outcome.failed == ["level 0"]


def test_a_number_that_is_none_fails(tmp_path: Path) -> None:
    outcome = self_test.run(damaged(tmp_path / "net.pbc", {"conv.weight": float("nan")}))
    assert outcome.failed == ["level 0"]


def test_a_bundle_without_one_is_refused(tmp_path: Path) -> None:
    old = tiny_onnx.write(tmp_path / "old.pbc")
    with pytest.raises(PbcError, match=r"old.pbc has no self-test: compile it again"):
        self_test.run(old)


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pbc.runtime.self_test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_as_a_program(tmp_path: Path) -> None:
    result = run(deploying.write(tmp_path / "net.pbc").path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    result = run(damaged(tmp_path / "net.pbc", {"conv.bias": 9}).path)
    assert result.returncode == 1
    assert json.loads(result.stdout)["passed"] is False
    assert result.stderr.startswith("error: the bundle computes other numbers here than it must: ")
    assert "level 0 by " in result.stderr
    result = run(tmp_path / "none.pbc")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no bundle at ")
    assert len(result.stderr.splitlines()) == 1
