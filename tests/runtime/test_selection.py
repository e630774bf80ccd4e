"""Runs in which a selector chooses the tensors that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import safetensors.numpy
import tiny
from networks import ConvNet

from pbc.bundle import Bundle
from pbc.data import ImageFolder
from pbc.errors import PbcError, UsageError
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.events import Event, Note, StepReport
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime
from pbc.runtime.selection import Probe, Selection
from pbc.runtime.selectors import Candidates
from pbc.runtime.selectors.elastic import Elastic


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return networks.compiled(tmp_path_factory.mktemp("compiled"), ConvNet, "norm", "onnxruntime")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photos(tmp_path_factory.mktemp("photos") / "photos", 10)


class Half:
    """Takes the important half whatever it costs, so that a test knows no times."""

    def choose(self, candidates: Candidates, budget_ms: float) -> tuple[str, ...]:
        order = np.argsort(-candidates.importance)
        return tuple(candidates.names[at] for at in sorted(order[: len(order) // 2]))


def probe(source: Bundle, seed: int) -> Probe:
    shape = source.manifest["features"]
    random = np.random.default_rng(seed)
    features = {
        name: random.standard_normal((6, *sizes)).astype(np.float32)
        for name, sizes in shape.items()
    }
    return Probe(0, features, np.arange(6) % 4)


def test_importance_is_the_fall_of_the_loss_and_a_probe_moves_nothing(source: Bundle) -> None:
    executable = OnnxRuntimeEngine().load(source, threads=1)
    objective, probes = Objective("sgd", 0.01), [probe(source, seed) for seed in range(2)]
    initial = initial_parameters(source, 4, 0)
    executable.start(initial, objective)
    executable.forward(0, probes[0].features, probes[0].labels)
    executable.update()
    before = {**executable.parameters(), **executable.optimizer_state()}
    selection = Selection(executable, Half(), objective, list(source.manifest["head"]), rho=1.0)
    found = selection._importance(probes[0], executable.parameters())
    moved = executable.parameters()
    for name, value in found.items():
        executable.start(moved, objective)
        executable.forward(0, probes[0].features, probes[0].labels)
        gradient = executable.gradients()[name]
        assert value == pytest.approx(
            -float((gradient * (moved[name] - before[name])).sum()), rel=1e-3, abs=1e-6
        )
    theta = {name: before[name] for name in initial}
    state = {name: value for name, value in before.items() if name not in initial}
    executable.start(theta, objective)
    executable.load_optimizer_state(state)
    selection.choose(0, probes)
    after = {**executable.parameters(), **executable.optimizer_state()}
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert selection.names is not None
    assert len(selection.names) == len(initial) // 2
    assert selection._times is not None
    times = selection._times.candidates({})
    assert sorted(times.names) == sorted(initial)
    assert (np.diff(times.passing_ms) >= 0).all()
    assert set(times.names[:2]) == set(source.manifest["head"])  # nearest to the loss
    with pytest.raises(PbcError, match=r"rho is 0.01, .* is the lowest possible|rho is 0.01, but"):
        Selection(executable, Elastic(), objective, list(source.manifest["head"]), 0.01).choose(
            0, probes
        )


def fit(source: Bundle, photos: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train; return the lines of the metrics, those of epochs."""
    out.mkdir(exist_ok=True)
    costs = tiny.costs(out / "given.json", len(source.manifest["levels"]))
    report = settings.pop("report", lambda event: None)
    given = {"learning_rate": 0.02, "batch": 4, "threads": 1, "costs": costs, "skip": False}
    runtime = Runtime.open(source.path)
    samples = ImageFolder.open(photos, runtime.spec)
    options = TrainOptions(selector="elastic", rho=1.0, **{**given, **settings})
    runtime.fit(samples, options, out, resume=True, report=report)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "epoch" in line]


def test_a_share_that_is_too_small_leaves_the_run_that_it_was_to_overwrite(
    source: Bundle, photos: Path, tmp_path: Path
) -> None:
    fit(source, photos, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "trainable.safetensors").read_bytes()
    runtime = Runtime.open(source.path)
    samples = ImageFolder.open(photos, runtime.spec)
    options = TrainOptions(selector="elastic", rho=1e-5, batch=4, threads=1, routing=False)
    with pytest.raises(PbcError, match=r"rho is 1e-05, "):
        runtime.fit(samples, options, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "trainable.safetensors").read_bytes() == before
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_run_trains_what_was_selected_also_when_it_is_resumed(
    source: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Elastic, "choose", Half.choose)
    notes: list[str] = []

    def interrupted(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, StepReport) and (event.epoch, event.step) == (2, 2):
            raise KeyboardInterrupt

    settings = {"epochs": 3, "select_every": 10, "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        fit(source, photos, tmp_path / "run", report=interrupted, **settings)
    (told,) = [note for note in notes if "a training iteration takes" in note]
    assert told.startswith(f"from epoch 1 on, 3 of {len(source.manifest['parameters'])} tensors")
    lines = fit(source, photos, tmp_path / "run", **settings)
    selected = lines[0]["selected"]
    assert [line["selected"] for line in lines] == [selected] * 3
    trained = safetensors.numpy.load_file(tmp_path / "run" / "trainable.safetensors")
    initial = initial_parameters(source, len(trained["fc.bias"]), 0)
    moved = {name for name, value in trained.items() if not np.array_equal(value, initial[name])}
    assert moved == set(selected)


def test_what_cannot_be_selected(source: Bundle) -> None:
    with pytest.raises(UsageError, match=r"rho is 1.5; it must be in 0…1"):
        TrainOptions(selector="elastic", rho=1.5)
