"""Bundles for an arm64 board, on an arm64 Python that qemu runs: the same numbers as here.

`make test-device` fetches what these need and runs them; `make test` leaves them out.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import arm64
import light
import numpy as np
import pytest
import rounds
import safetensors.numpy
import stages
import tiny
from distribution import build, copy_sources

from pbc import compiler
from pbc.bundle import Bundle
from pbc.data import ImageFolder, read_image
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

pytestmark = pytest.mark.emulated

TARGET = "raspberry-pi-4b"
HEAVY = light.HEAVY | {"tvm", "apache-tvm", "torch-pruning"}
PHOTOS = {"train": 4, "test": 2}  # of each of ten classes
STEPS = 20
EPOCHS = 4
TOLERANCE = 1e-3
"""Of float32 sums in other orders; 1e-6 is usual. What is off by more is not rounding."""


@dataclass(frozen=True)
class Network:
    """What is compiled, and how it is trained."""

    model: str
    options: Mapping[str, Any]
    training: Mapping[str, Any]


def networks(examples: Path) -> dict[str, Network]:
    """Return a pretrained network with a new head, and a small one whose last block trains."""
    return {
        "new-head": Network(
            "mobilenet_v3_large",
            {
                "weights": str(examples / "weights" / "mobilenet_v3_large.safetensors"),
                "strategy": "linear-probe",
                "shape": (3, 96, 96),
                "levels": 0,
            },
            {"learning_rate": 0.05},
        ),
        "last-block": Network(
            f"{examples / 'custom_model.py'}:factory",
            {
                "weights": "random",
                "strategy": "last-k:1",
                "shape": (3, 64, 64),
                "levels": 2,
                "align_steps": 2,
            },
            {"optimizer": "adamw", "learning_rate": 0.002, "fidelity_floor": 0.0},
        ),
    }


@dataclass(frozen=True)
class Shipped:
    """A board, the bundle that is there, and the bundle of the same program that runs here."""

    board: arm64.Board
    pbc: Path
    bundle: Bundle
    reference: Bundle
    training: Mapping[str, Any]
    photos: Path
    work: Path

    def stages(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what the engine computes on the board, and facts about the process that did."""
        out = self.work / "stages.npz"
        done = self.run(stages.__file__, self.bundle.path, out)
        return dict(np.load(out)), json.loads(done)

    def run(self, *arguments: object) -> str:
        """Run the board's Python; return what it printed."""
        return self.board.run(*arguments, pbc=self.pbc, cwd=self.work).stdout

    def command(self, *arguments: object) -> str:
        """Run the board's pbc; return what it printed."""
        return self.run(*arm64.PBC, *arguments)

    def settings(self) -> dict[str, Any]:
        """Return the options of a training that takes the same decisions everywhere."""
        costs = tiny.costs(self.work / "costs.json", len(self.bundle.manifest["levels"]))
        pinned = {"epochs": EPOCHS, "head": "sgd", "skip": False, "costs": costs, "threads": 1}
        return {**pinned, **self.training}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the sources' own wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    built = build("build_wheel", copy_sources(root, folder / "sources"), folder / "built")
    with zipfile.ZipFile(built) as opened:
        opened.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def photos(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the photos that come with the sources."""
    folder = tmp_path_factory.mktemp("photos")
    for part, count in PHOTOS.items():
        for of_class in (examples / "photos" / part).iterdir():
            (folder / part / of_class.name).mkdir(parents=True)
            for photo in sorted(of_class.iterdir())[:count]:
                (folder / part / of_class.name / photo.name).symlink_to(photo)
    return folder


@pytest.fixture(scope="module")
def calibration(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for photo in sorted((examples / "calibration").iterdir())[::10]:
        (folder / photo.name).symlink_to(photo)
    return folder


Compile = Callable[[str, str, tuple[str, ...]], Bundle]


@pytest.fixture(scope="module")
def compiled(
    examples: Path, photos: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Compile:
    """Compile one of the networks for an engine, with these axes of the ladder; once."""
    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def compile_for(name: str, engine: str, axes: tuple[str, ...]) -> Bundle:
        network = networks(examples)[name]
        data: dict[str, Any] = {"data": photos / "train", "calibration": calibration, "axes": axes}
        data["ladder"] = "even"  # a few steps make no level that a run would use
        options = compiler.CompileOptions(target=TARGET, engine=engine, **data, **network.options)
        path = folder / f"{name}-{engine}-{len(axes)}.pbc"
        return compiler.compile(network.model, path, options)

    return compile_for


CASES = [
    # Each network's tests stay together, since they share what is compiled.
    pytest.param((name, engine), marks=pytest.mark.xdist_group(name), id=f"{engine}-{name}")
    for name in ("new-head", "last-block")
    for engine in arm64.EXTRAS
]


@pytest.fixture(scope="module", params=CASES)
def shipped(
    request: pytest.FixtureRequest,
    examples: Path,
    compiled: Compile,
    wheel: Path,
    photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shipped:
    name, engine = request.param
    try:
        board = arm64.board(engine, fetch=False)
    except arm64.Missing as missing:
        pytest.skip(str(missing))
    network = networks(examples)[name]
    # Only ONNX Runtime rounds to eight bits. A network without proxies has no axes.
    rounds = engine == "onnxruntime" and network.options["levels"]
    axes = compiler.CompileOptions().axes if rounds else ("resolution", "width")
    bundle = compiled(name, engine, axes)
    # TVM's artifacts are machine code of the board. ONNX Runtime has the same program here.
    reference = compiled(name, "onnxruntime", axes)
    work = tmp_path_factory.mktemp(engine)
    return Shipped(board, wheel, bundle, reference, network.training, photos, work)


@pytest.fixture(scope="module")
def trained(shipped: Shipped) -> tuple[Path, Path]:
    """The folders of two personal models, trained by the board's command and in this process."""
    there, here = shipped.work / "there", shipped.work / "here"
    settings = shipped.settings()
    names = {"learning_rate": "lr", "skip": "no-skip", "fidelity_floor": "fidelity-floor"}
    words: list[object] = []
    for name, value in settings.items():
        words += [f"--{names.get(name, name)}", *([] if value is False else [value])]
    train, test = shipped.photos / "train", shipped.photos / "test"
    shipped.command("train", shipped.bundle.path, train, "--val", test, "-o", there, *words)
    runtime = Runtime.open(shipped.reference.path)
    samples, val = (ImageFolder.open(part, runtime.spec) for part in (train, test))
    runtime.fit(samples, TrainOptions(**settings), here, val=val)
    return there, here


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the sum of all differences as a share of the sum of what was expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).sum() / max(np.abs(expected).sum(), 1e-12))


def metrics(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_computes_the_same(shipped: Shipped) -> None:
    found, facts = shipped.stages()
    assert facts["machine"] == "aarch64"
    assert not HEAVY & {*facts["installed"], *facts["imported"]}
    expected = stages.results(shipped.reference.path)
    assert found.keys() == expected.keys()
    errors = {name: difference(found[name], value) for name, value in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    moved = [value for name, value in expected.items() if ": movement of " in name]
    assert all(np.abs(value).max() > 0 for value in moved)


def test_the_bundle_passes_its_self_test(shipped: Shipped) -> None:
    outcome = json.loads(shipped.run("-m", "pbc.runtime.self_test", shipped.bundle.path))
    assert outcome["passed"] is True
    assert "level 0" in outcome["errors"]


def test_rounds_of_a_fleet_send_the_same(shipped: Shipped) -> None:
    photos, out = shipped.photos / "train", shipped.work / "rounds.npz"
    shipped.run(rounds.__file__, shipped.bundle.path, photos, shipped.work / "device", out)
    found = dict(np.load(out))
    expected = rounds.results(shipped.reference.path, photos, shipped.work / "device-here")
    for name, value in expected.items():
        assert np.abs(value).max() > 0
        assert difference(found[name], value) < 10 * TOLERANCE, name


def test_a_training_of_20_steps_ends_the_same(shipped: Shipped, trained: tuple[Path, Path]) -> None:
    there, here = (metrics(model) for model in trained)
    assert sum(line.get("steps", 0) for line in there) == STEPS
    for line, expected in zip(there, here, strict=True):
        assert line.get("levels") == expected.get("levels")
        for name in ("loss", "val_loss"):
            assert line.get(name) == pytest.approx(expected.get(name), abs=TOLERANCE)
    losses = [line["loss"] for line in there if "loss" in line]
    assert losses[-1] < losses[0]
    start = initial_parameters(shipped.bundle, len(shipped.bundle.manifest["classes"]), seed=0)
    found, expected = (
        safetensors.numpy.load_file(model / "trainable.safetensors") for model in trained
    )
    for name, value in expected.items():
        movement = value - start[name]
        assert np.abs(movement).max() > 0
        assert difference(found[name] - start[name], movement) < 10 * TOLERANCE, name


def test_the_personal_model_judges_photos_the_same(
    shipped: Shipped, trained: tuple[Path, Path]
) -> None:
    there, here = trained
    personal = Personal.open(here)
    test = shipped.photos / "test"
    cheapest = len(shipped.bundle.manifest["levels"]) - 1
    told = json.loads(shipped.command("eval", there, test, "--level", cheapest, "--json"))
    expected = personal.evaluate(ImageFolder.open(test, personal.spec), level=cheapest)
    assert told["count"] == expected.count == 10 * PHOTOS["test"]
    assert told["loss"] == pytest.approx(expected.loss, abs=TOLERANCE)
    photo = sorted(test.rglob("*.jpg"))[0]
    (row,) = json.loads(shipped.command("predict", there, photo, "--top", 10, "--json"))
    shares = {found["class"]: found["probability"] for found in row["classes"]}
    predicted = dict(personal.predict(read_image(photo, personal.spec), top=10))
    assert shares == pytest.approx(predicted, abs=TOLERANCE)
