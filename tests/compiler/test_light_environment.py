"""A device with ONNX Runtime and no training framework: everything that it is to do, done there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import light
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import tiny
from distribution import build, copy_sources

from pbc.data import ImageFolder, InputSpec, read_image
from pbc.runtime.output.personal import Personal

EPOCHS = 3
# A line that Python writes for every import, where it is told to.
_IMPORT = re.compile(r"import time: +\d+ \| +\d+ \| +([\w.]+)")
_LEFT_OUT = (
    "full, pet, pet-bf16, pet-cache, pet-cache-closed are left out: "
    "they need torch, which is not installed: pip install '{wheel}[compile]'"
)


@dataclass(frozen=True)
class Device:
    """A fresh environment with `pbc[device]`, and a folder to work in."""

    environment: Path
    work: Path
    wheel: Path

    def run(
        self, *args: object, fails: int = 0, tries: frozenset[str] = frozenset()
    ) -> tuple[str, str]:
        """Run the environment's own pbc, and return its stdout and stderr.

        Of what is heavy it is not even to try an import, but for `tries`.
        """
        result = subprocess.run(
            [self.environment / "bin" / "pbc", *(str(arg) for arg in args)],
            cwd=self.work,
            env={**clean_environment(), "PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = result.stderr.splitlines()
        tried = {found[1] for line in lines if (found := _IMPORT.fullmatch(line))}
        stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
        assert result.returncode == fails, stderr
        assert "pbc.cli" in tried
        if fails == 0:
            assert {name.partition(".")[0] for name in tried} & light.HEAVY == tries
        return result.stdout, stderr


def clean_environment() -> Mapping[str, str]:
    """Leave out what would let the checkout's modules in."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(environment: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip for another one, which needs none of its own."""
    python = environment / "bin" / "python"
    return subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *args],
        env=clean_environment(),
        cwd=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def device(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("device")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    # The smallest of the core's dependencies tells whether there is an index at all.
    probe = pip(environment, "download", "--no-deps", "--dest", str(folder), "mdurl")
    if probe.returncode != 0:
        pytest.skip("pip reaches no package index")
    (folder / "sources").mkdir()
    wheel = build("build_wheel", copy_sources(root, folder / "sources"), folder / "wheel")
    installed = pip(environment, "install", "--no-compile", f"{wheel}[device]")
    assert installed.returncode == 0, installed.stderr
    work = folder / "work"
    work.mkdir()
    return Device(environment, work, wheel)


@pytest.fixture(scope="module")
def bundle(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light.compiled(tmp_path_factory.mktemp("net"), examples)


@pytest.fixture(scope="module")
def trained(device: Device, bundle: Path, examples: Path) -> Path:
    """The folder of a personal model that the device trained."""
    out, _ = device.run(
        "train", bundle, examples / "photos" / "train", "-o", "mine",
        "--val", examples / "photos" / "test", "--head", "sgd", "--epochs", EPOCHS, "--lr", "0.1",
        "--optimizer", "adamw", "--weight-decay", "0.01", "--label-smoothing", "0.1",
    )  # fmt: skip
    assert "wrote mine" in out
    return device.work / "mine"


def test_what_is_installed(device: Device) -> None:
    listed = pip(device.environment, "list", "--format", "json")
    names = {row["name"].replace("-", "_").lower() for row in json.loads(listed.stdout)}
    assert {"pbc", "onnxruntime", "numpy", "safetensors"} <= names
    assert not names & light.HEAVY


@pytest.mark.parametrize("command", ["targets", "passes", "strategies"])
def test_what_there_is_can_be_listed(device: Device, command: str) -> None:
    assert len(json.loads(device.run(command, "--json")[0])) > 3


def test_what_is_missing_is_named_with_its_extra(
    device: Device, examples: Path, tmp_path: Path
) -> None:
    photos = examples / "photos" / "train"
    _, stderr = device.run("compile", "resnet50", fails=1)
    assert stderr == (
        f"error: this needs torch, which is not installed: pip install '{device.wheel}[compile]'"
    )
    of_torch = tiny.write(tmp_path / "torch.pbc").path
    _, stderr = device.run("train", of_torch, photos, "-o", "other", fails=1)
    assert stderr == (
        "error: this needs torch, which is not installed: "
        f"pip install '{device.wheel}[device-torch]'"
    )


def test_a_rival_that_is_asked_for_by_name_is_missed(
    device: Device, bundle: Path, examples: Path
) -> None:
    _, stderr = device.run("bench", bundle, examples, "--rivals", "pbc,pet", fails=1)
    assert stderr == (
        "error: rival pet needs torch, which is not installed: "
        f"pip install '{device.wheel}[compile]', or leave it out of --rivals"
    )


def test_inspect(device: Device, bundle: Path) -> None:
    manifest = json.loads(device.run("inspect", bundle, "--json")[0])
    assert manifest["engine"] == "onnxruntime"
    assert "torch" not in manifest["requires"]
    assert "linear-probe" in device.run("inspect", bundle)[0]


def test_training_learns(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]
    model = json.loads((trained / "model.json").read_text())
    asked = {"optimizer": "adamw", "weight_decay": 0.01, "label_smoothing": 0.1}
    assert asked.items() <= model["options"].items()


def test_a_run_goes_on(device: Device, bundle: Path, examples: Path) -> None:
    photos = examples / "photos" / "train"
    words = ("train", bundle, photos, "-o", "more", "--head", "sgd", "--lr", "0.1")
    device.run(*words, "--epochs", "1")
    device.run(*words, "--epochs", "2", "--resume")
    lines = [
        json.loads(line)
        for line in (device.work / "more" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines if "loss" in line] == [1, 2]


def test_eval_says_what_this_environment_does(
    device: Device, trained: Path, examples: Path
) -> None:
    test = examples / "photos" / "test"
    personal = Personal.open(trained)
    samples = ImageFolder.open(test, personal.spec)
    for level in (0, 1):
        told = json.loads(device.run("eval", trained, test, "--level", level, "--json")[0])
        expected = personal.evaluate(samples, level=level)
        assert told["count"] == expected.count == len(samples)
        assert told["loss"] == pytest.approx(expected.loss, rel=1e-3)
        assert told["accuracy"] == pytest.approx(expected.accuracy, abs=0.02)


def test_predict_and_export_agree(
    device: Device, bundle: Path, trained: Path, examples: Path
) -> None:
    photo = sorted((examples / "photos" / "test").rglob("*.jpg"))[0]
    (row,) = json.loads(device.run("predict", trained, photo, "--top", 10, "--json")[0])
    model = json.loads((trained / "model.json").read_text())
    predicted = {found["class"]: found["probability"] for found in row["classes"]}
    assert sorted(predicted) == sorted(model["classes"])
    device.run("export", trained, "-o", "mine.onnx")
    manifest = json.loads(device.run("inspect", bundle, "--json")[0])
    spec = InputSpec.from_json(manifest["input"])
    session = onnxruntime.InferenceSession(
        (device.work / "mine.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    image = spec.normalise(read_image(photo, spec)[None])
    (shares,) = session.run(["probabilities"], {session.get_inputs()[0].name: image})
    for name, share in zip(model["classes"], np.asarray(shares)[0].tolist(), strict=True):
        assert share == pytest.approx(predicted[name], abs=1e-4)
    device.run("export", trained, "-o", "mine.safetensors")
    tensors = safetensors.numpy.load_file(device.work / "mine.safetensors")
    for name, value in safetensors.numpy.load_file(trained / "trainable.safetensors").items():
        np.testing.assert_array_equal(tensors[name], value)


def test_bench_plays_without_the_rivals_of_torch(
    device: Device, bundle: Path, examples: Path
) -> None:
    out, stderr = device.run(
        "bench", bundle, examples / "photos", "--quick", "--epochs", "2",
        "-o", "r.json", "--html", "r.html", "--csv", "r.csv",
        tries=frozenset(("torch",)),  # to learn who can play
    )  # fmt: skip
    left_out = _LEFT_OUT.format(wheel=device.wheel)
    assert stderr.splitlines().count(left_out) == 1
    assert out.count(left_out) == 1
    results = json.loads((device.work / "r.json").read_text())
    assert set(results["rivals"]) == {"piebridge", "pbc-nocache", "pbc"}
    assert all(cell["loss"] > 0 for cell in results["cells"])
    assert results["notes"].count(left_out) == 1


def test_forget(device: Device, bundle: Path, trained: Path, examples: Path) -> None:
    device.run(
        "train", bundle, examples / "photos" / "train", "-o", "gone", "--epochs", "1",
        "--cache", "disk",
    )  # fmt: skip
    assert "removed gone/cache" in device.run("forget", "gone")[0]
    device.run("eval", "gone", examples / "photos" / "test")
    device.run("forget", "gone", "--all")
    assert not (device.work / "gone").exists()
