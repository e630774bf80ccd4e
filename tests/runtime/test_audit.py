"""The audit: a proxy that is not as faithful here as the ladder says does not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from killing import Killed

from pbc.data import ImageFolder
from pbc.runtime.events import Event, Note, StepReport
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing.audit import Finding, audit, chosen, cosines
from pbc.runtime.runtime import Runtime
from pbc.util.shapes import ShapeError


@pytest.mark.parametrize("wrong", ["x", None, {}, {"level": 1}, {"level": "1", "kept": True}])
def test_a_finding_of_a_damaged_checkpoint(wrong: Any) -> None:
    found = Finding(1, 16, 0.97, 0.01, 0.95, 1.5, 0.5)
    assert Finding.from_json(found.to_json()) == found
    with pytest.raises(ShapeError):
        Finding.from_json(wrong)


def test_few_are_audited_and_very_few_are_not_worth_it() -> None:
    levels = np.repeat([0, 1, 2], [100, 49, 4000])
    assert len(chosen(levels, 1, 8, 0)) == 0
    some = chosen(levels, 2, 8, 0)
    assert len(some) == 40
    assert (levels[some] == 2).all()
    assert len(set(some.tolist())) == 40
    assert (some == chosen(levels, 2, 8, 0)).all()
    assert (some != chosen(levels, 2, 8, 1)).any()
    assert len(chosen(levels, 2, 32, 0)) == 64  # whole chunks
    assert len(chosen(np.ones(60, int), 1, 4, 0)) == 16
    assert len(chosen(np.ones(60, int), 1, 64, 0)) == 60


def test_cosines_are_centred_and_standardised_per_channel() -> None:
    random = np.random.default_rng(0)
    for shape in ((64, 6), (64, 6, 4, 4), (64, 5, 6)):
        original = random.normal(size=shape) * 10 + 100
        np.testing.assert_allclose(cosines(original, original), 1)
        opposite = 2 * original.mean(0, keepdims=True) - original
        assert cosines(opposite, original).mean() < -0.9
        unrelated = random.normal(size=shape) * 10 + 100
        assert abs(cosines(unrelated, original).mean()) < 0.2
    wide = random.normal(size=(64, 6)) * np.array([1, 1, 1, 1, 1, 1000])
    noisy = wide + random.normal(size=wide.shape) * np.array([3, 3, 3, 3, 3, 0])
    assert cosines(noisy, wide).mean() < 0.7  # the wide channel does not drown the others


@pytest.mark.parametrize(
    ("fidelity", "error", "kept"),
    [(0.95, 0.0, True), (0.94, 0.01, True), (0.94, 0.001, False), (0.5, 0.1, False)],
)
def test_a_level_goes_only_where_the_error_does_not_explain_it(
    fidelity: float, error: float, kept: bool
) -> None:
    finding = Finding(1, 16, fidelity, error, 0.95)
    assert finding.kept is kept
    assert Finding.from_json(finding.to_json()) == finding


def test_the_worst_tensor_counts() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 32, 6))
    noise = 0.5 * random.normal(size=b.shape)

    def compute(level: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        assert len(samples) <= 8
        return {"a": a[samples], "b": b[samples] + noise[samples] * level}

    found = audit(1, np.arange(32), np.arange(32), 0.9, compute, 8)
    assert found.fidelity == pytest.approx(cosines(b + noise, b).mean())
    assert 0 < found.error < 0.1


def fit(root: Path, out: str, photos: int = 40, **options: Any) -> tuple[list[str], dict[str, Any]]:
    runtime = Runtime.open(root / "m.pbc")
    if not (root / "photos").exists():
        tiny.photos(root / "photos", photos)
    samples = ImageFolder.open(root / "photos", runtime.spec)
    events: list[Event] = []
    settings = TrainOptions(
        3, 0.1, costs=tiny.costs(root / "costs.json"), checkpoint_seconds=0, **options
    )
    runtime.fit(samples, settings, root / out, report=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    return notes, json.loads((root / out / "model.json").read_text())


def lying(root: Path) -> None:
    """Write a ladder whose policy and table promise more than its noisy proxies keep."""
    tiny.write(root / "m.pbc", fidelities=(0.999, 0.999), promised=True)


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_a_level_that_promised_too_much_is_not_used(tmp_path: Path, cache: str) -> None:
    lying(tmp_path)
    notes, model = fit(tmp_path, "out", fidelity_floor=0.99, cache=cache)
    refused = [note for note in notes if "is not used: its fidelity on" in note]
    assert len(refused) == 2
    assert "below the floor of 0.990" in refused[0]
    audited = model["metrics"]["audit"]
    assert [found["level"] for found in audited] == [2, 1]
    assert not any(found["kept"] for found in audited)
    lines = [json.loads(s) for s in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["levels"] == [120, 0, 0]
    assert lines[0]["stage_seconds"]["audit"] > 0
    assert lines[-1]["audit"] == audited


def test_a_level_that_keeps_its_promise_stays(tmp_path: Path) -> None:
    lying(tmp_path)
    notes, model = fit(tmp_path, "out", fidelity_floor=0.3)
    assert not any("is not used" in note for note in notes)
    assert all(found["kept"] for found in model["metrics"]["audit"])


def test_few_samples_or_the_paper_s_scheduler_are_not_audited(tmp_path: Path) -> None:
    lying(tmp_path)
    _, model = fit(tmp_path, "paper", fidelity_floor=0.99, scheduler="piebridge")
    assert "audit" not in model["metrics"]
    few = tmp_path / "few"
    few.mkdir()
    lying(few)
    _, model = fit(few, "out", photos=10, fidelity_floor=0.99)
    assert "audit" not in model["metrics"]


def test_a_resumed_run_remembers_the_audit(tmp_path: Path) -> None:
    lying(tmp_path)
    fit(tmp_path, "whole", fidelity_floor=0.99, cache="off")
    runtime = Runtime.open(tmp_path / "m.pbc")
    samples = ImageFolder.open(tmp_path / "photos", runtime.spec)
    options = TrainOptions(
        3, 0.1, costs=tmp_path / "costs.json", fidelity_floor=0.99, cache="off",
        checkpoint_seconds=0,
    )  # fmt: skip
    trainer = runtime.trainer(samples, options, tmp_path / "killed")
    trainer.prepare()
    trainer.run_epoch()
    again = runtime.trainer(samples, options, tmp_path / "killed")
    again.prepare(resume=True)
    while not again.finished:
        assert again.run_epoch().stage_seconds["prefix"] > 0
    again.finish()
    whole, killed = (
        (tmp_path / out / "trainable.safetensors").read_bytes() for out in ("whole", "killed")
    )
    assert whole == killed


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
@pytest.mark.parametrize("kind", ["probe", "bodies"])
def test_runs_of_several_levels_killed_in_the_middle_of_chunks_end_at_the_same_bits(
    tmp_path: Path, kind: str, cache: str
) -> None:
    """With audited levels, rest, look-ahead and, where there is a cache, canonical chunks."""
    tiny.photos(tmp_path / "photos", 60)
    tiny.write(tmp_path / "m.pbc", kind)
    runtime = Runtime.open(tmp_path / "m.pbc")
    samples = ImageFolder.open(tmp_path / "photos", runtime.spec)
    options = TrainOptions(
        6, 0.1, costs=tiny.costs(tmp_path / "costs.json"), fidelity_floor=0.4, cache=cache,
        checkpoint_seconds=0.01, augment=2,
    )  # fmt: skip
    runtime.fit(samples, options, tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "model.json").read_text())
    assert model["metrics"]["audit"]
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert sum(visits > 0 for visits in json.loads(lines[0])["levels"]) > 1
    steps = 0

    def kill(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, StepReport)
        if steps in (37, 90, 93, 140):
            steps += 1
            raise Killed

    for _ in range(4):
        with pytest.raises(Killed):
            runtime.fit(samples, options, tmp_path / "killed", resume=True, report=kill)
    runtime.fit(samples, options, tmp_path / "killed", resume=True, report=kill)
    whole, killed = (
        (tmp_path / out / "trainable.safetensors").read_bytes() for out in ("whole", "killed")
    )
    assert whole == killed
