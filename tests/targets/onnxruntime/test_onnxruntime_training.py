"""Bundles compiled for ONNX Runtime train as those compiled for PyTorch do."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from killing import killed_until_done
from networks import ConvNet, Kind
from tiny_onnx import resident_bytes

from pbc.bundle import Bundle
from pbc.bundle.graph_name import SAVED
from pbc.data import ImageFolder, InputSpec, read_image
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine, OnnxRuntimeExecutable
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.events import Report
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.export import export
from pbc.runtime.output.personal import Personal
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

ENGINES: dict[str, Callable[[], Engine]] = {
    "onnxruntime": OnnxRuntimeEngine,
    "pytorch": PyTorchEngine,
}
CASES: tuple[tuple[Kind, str], ...] = (
    (ConvNet, "linear-probe"),
    (ConvNet, "norm"),
)
case = pytest.mark.parametrize(
    ("kind", "strategy"), CASES, ids=[f"{kind.__name__}-{strategy}" for kind, strategy in CASES]
)
Compile = Callable[[Kind, str, str], Bundle]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return partial(networks.compiled, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    return tiny.photos(root / "photos", 10)


def loaded(compiled: Compile, kind: Kind, strategy: str) -> tuple[Bundle, dict[str, Executable]]:
    sources = {engine: compiled(kind, strategy, engine) for engine in ENGINES}
    executables = {
        name: ENGINES[name]().load(source, threads=1) for name, source in sources.items()
    }
    return sources["onnxruntime"], executables


def images(source: Bundle, count: int) -> np.ndarray:
    shape = source.manifest["input"]["shape"]
    pixels = np.random.default_rng(count).integers(0, 256, (count, *shape[1:], shape[0]))
    return InputSpec.from_json(source.manifest["input"]).normalise(pixels.astype(np.uint8))


@case
@pytest.mark.parametrize(
    "objective",
    [
        Objective("sgd", 0.05, weight_decay=0.01, label_smoothing=0.1),
        Objective("adam", 0.01, weight_decay=0.01),
        Objective("adamw", 0.01, weight_decay=0.1),
    ],
    ids=lambda objective: objective.optimizer,
)
def test_every_step_at_every_level_is_that_of_pytorch(
    compiled: Compile, kind: Kind, strategy: str, objective: Objective
) -> None:
    source, executables = loaded(compiled, kind, strategy)
    ours, twin = executables.values()
    for executable in (ours, twin):
        executable.start(initial_parameters(source, 4, 0), objective)
    levels = len(source.manifest["levels"])
    for step in range(30):
        level, count = step % levels, (6, 6, 6, 5, 1)[step % 5]
        labels = np.arange(count) % 4
        batch = images(source, count)
        found, expected = (
            executable.forward(level, executable.prefix(level, batch), labels)
            for executable in (ours, twin)
        )
        for value, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-3)
        if step % 4 != 3:
            same_gradients(ours, twin)
            ours.update()
            twin.update()
    for get in ("parameters", "optimizer_state"):
        mine, other_ones = getattr(ours, get)(), getattr(twin, get)()
        assert list(mine) == list(other_ones)
        for name, value in mine.items():
            np.testing.assert_allclose(value, other_ones[name], rtol=1e-3, atol=1e-3)
    assert all(
        not np.array_equal(value, initial_parameters(source, 4, 0)[name])
        for name, value in ours.parameters().items()
    )


def same_gradients(ours: Executable, twin: Executable) -> None:
    """They agree, and asking for them moves nothing."""
    before = ours.parameters(), ours.optimizer_state()
    gradients, expected = ours.gradients(), twin.gradients()
    assert list(gradients) == list(expected) == list(ours.parameters())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-3)
    for kept, now in zip(before, (ours.parameters(), ours.optimizer_state()), strict=True):
        assert all(np.array_equal(kept[name], now[name]) for name in kept)


@case
def test_what_is_selected_moves_as_it_would_and_nothing_else_does(
    compiled: Compile, kind: Kind, strategy: str
) -> None:
    source, executables = loaded(compiled, kind, strategy)
    initial, labels = initial_parameters(source, 4, 0), np.arange(6) % 4
    chosen = list(initial)[::2]
    for name, executable in executables.items():
        features = executable.prefix(0, images(source, 6))

        def moved(
            executable: Executable = executable, features: Any = features
        ) -> dict[str, np.ndarray]:
            executable.start(initial, Objective("adam", 0.01))
            executable.forward(0, features, labels)
            executable.update()
            return {**executable.parameters(), **executable.optimizer_state()}

        whole = moved()
        executable.select(chosen)
        some = moved()
        executable.forward(0, features, labels)
        assert list(executable.gradients()) == chosen, name
        executable.select(None)
        again = moved()
        for key, value in some.items():
            parameter = key.partition("/")[2] or key
            if parameter in chosen or key == "step":
                assert np.array_equal(value, whole[key]), (name, key)
            else:
                assert np.array_equal(value, initial[key] if key in initial else 0 * value)
        assert all(np.array_equal(value, whole[key]) for key, value in again.items())


def test_what_is_not_selected_costs_nothing(compiled: Compile) -> None:
    source, executables = loaded(compiled, ConvNet, "norm")
    executable = executables["onnxruntime"]
    assert isinstance(executable, OnnxRuntimeExecutable)

    def size() -> tuple[int, int]:
        executable.start(initial_parameters(source, 4, 0), Objective("sgd", 0.01))
        executable.forward(0, executable.prefix(0, images(source, 6)), np.zeros(6, np.int64))
        assert executable._pending is not None
        saved = (v for name, v in executable._pending[1].items() if name.startswith(SAVED))
        kept = sum(value.numpy().nbytes for value in saved)
        nodes = onnx.load_from_string(executable._loader._model("update/0/sgd")).graph.node
        return kept, len(nodes)

    kept, nodes = size()
    executable.select(list(source.manifest["head"]))
    of_head = size()
    # Scores, their labels, and what the head reads.
    assert of_head[0] < kept / 4
    assert of_head[1] < nodes / 2
    with pytest.raises(PbcError, match="has no 'head' to train among what was selected"):
        guarded.load(ENGINES["pytorch"](), source).select(["head"])


def fit(source: Bundle, photos: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train to the end; return the lines of the metrics."""
    report = settings.pop("report", lambda event: None)
    out.mkdir(exist_ok=True)
    costs = tiny.costs(out / "given.json", len(source.manifest["levels"]))
    options = {"epochs": 3, "learning_rate": 0.02, "batch": 4, "threads": 1, "costs": costs}
    runtime = Runtime.open(source.path)
    samples = ImageFolder.open(photos, runtime.spec)
    runtime.fit(samples, TrainOptions(**{**options, **settings}), out, resume=True, report=report)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@case
def test_a_training_has_the_losses_of_pytorch(
    compiled: Compile, photos: Path, tmp_path: Path, kind: Kind, strategy: str
) -> None:
    ours, expected = (
        fit(compiled(kind, strategy, engine), photos, tmp_path / engine, epochs=6)[:6]
        for engine in ENGINES
    )
    assert ours[-1]["loss"] < ours[0]["loss"]
    np.testing.assert_allclose(
        [line["loss"] for line in ours], [line["loss"] for line in expected], rtol=1e-3
    )
    for key in ("skipped_updates", "skipped_samples"):
        assert [line[key] for line in ours] == [line[key] for line in expected]


@case
def test_a_killed_run_resumes_to_the_same_bits(
    compiled: Compile, photos: Path, tmp_path: Path, kind: Kind, strategy: str
) -> None:
    source = compiled(kind, strategy, "onnxruntime")
    settings = {"optimizer": "adamw", "weight_decay": 0.01, "checkpoint_seconds": 0.0}
    whole = fit(source, photos, tmp_path / "whole", **settings)

    def train(report: Report) -> list[dict[str, Any]]:
        return fit(source, photos, tmp_path / "killed", report=report, **settings)

    resumed = killed_until_done(train, 3, (2, 12))
    name = "trainable.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line.get("loss") for line in whole] == [line.get("loss") for line in resumed]


def test_memory_does_not_grow_while_training(compiled: Compile) -> None:
    source, executables = loaded(compiled, ConvNet, "norm")
    executable = executables["onnxruntime"]
    executable.start(initial_parameters(source, 4, 0), Objective("adam", 0.01))
    features = executable.prefix(0, images(source, 64))
    labels = np.zeros(64, np.int64)

    def steps(count: int) -> int:
        for step in range(count):
            executable.forward(0, features, labels)
            if step % 5:
                executable.update()
            executable.optimizer_state()
        return resident_bytes()

    before = steps(20)
    # What one step saves is about 3 MB: a leak would be 200.
    assert steps(70) - before < 16 * 2**20


@case
def test_an_exported_model_predicts_the_same(
    compiled: Compile, photos: Path, tmp_path: Path, kind: Kind, strategy: str
) -> None:
    fit(compiled(kind, strategy, "onnxruntime"), photos, tmp_path / "mine", epochs=1)
    personal = Personal.open(tmp_path / "mine", threads=1)
    for level in range(len(personal.bundle.manifest["levels"])):
        file = tmp_path / f"{level}.onnx"
        export(tmp_path / "mine", file, level=level)
        onnx.checker.check_model(onnx.load(file), full_check=True)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for photo in sorted(photos.rglob("*.png"))[::12]:
            image = read_image(photo, personal.spec)
            batch = np.ascontiguousarray(personal.spec.normalise(image[None]))
            (shares,) = session.run(["probabilities"], {session.get_inputs()[0].name: batch})
            found = dict(personal.predict(image, level=level))
            for name, share in zip(personal.classes, shares[0], strict=True):
                assert found[name] == pytest.approx(float(share), abs=1e-5)
