"""Mixes: a random share of the photos at a level that would cost too much for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pbc.data import ImageFolder
from pbc.runtime.costs import Costs, LevelCost
from pbc.runtime.events import EpochReport, Event, Note
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing.audit import Finding
from pbc.runtime.routing.audited_head import points_lost, vectors
from pbc.runtime.routing.mixes import drawn, largest_share
from pbc.runtime.routing.routes import Routes
from pbc.runtime.runtime import Runtime
from pbc.runtime.schedulers import Mix, SchedulerInput
from pbc.runtime.schedulers.cost_model import CostModel

LOSSES = [(0.25, 0.1), (0.5, 0.3), (0.75, 0.8), (1.0, 2.0)]


@pytest.mark.parametrize(
    ("bound", "share", "lost"),
    [(2.0, 1.0, 2.0), (5.0, 1.0, 2.0), (0.8, 0.75, 0.8), (0.55, 0.625, 0.55), (0.05, 0.125, 0.05)],
)
def test_the_largest_share_within_the_bound(bound: float, share: float, lost: float) -> None:
    assert np.allclose(largest_share(LOSSES, bound), (share, lost))


@given(st.floats(0, 3))
def test_what_a_share_loses_is_within_the_bound(bound: float) -> None:
    share, lost = largest_share(LOSSES, bound)
    assert 0 <= share <= 1
    assert lost <= bound + 1e-9


def test_nothing_known_is_no_share() -> None:
    assert largest_share([], 1.0) == (0.0, 0.0)


def test_a_smaller_share_is_a_part_of_a_larger_one() -> None:
    small, large = (drawn(100, 3, 2, share, 7) for share in (0.3, 0.6))
    assert small[:, 2].sum() == 30
    assert large[:, 2].sum() == 60
    assert (large[:, 2] >= small[:, 2]).all()
    assert small[:, 0].all()
    assert not small[:, 1].any()
    assert (drawn(100, 3, 2, 0.3, 8) != small).any()


def test_the_scheduler_takes_a_mix_where_it_is_cheaper() -> None:
    costs = Costs(tuple(LevelCost(ms, 8, 0.1, 0.1, True) for ms in (1.0, 0.8, 0.4)), 0, 0, 0)
    allowed = np.zeros((40, 3), bool)
    allowed[:, :2] = True
    fields: dict[str, Any] = {
        "levels": np.zeros(40, np.int64), "allowed": allowed, "batch": 4, "seed": 0, "alpha": None,
        "grouped": False, "costs": costs, "skips_samples": False,
    }  # fmt: skip

    def scheduler(share: float, **changes: Any) -> CostModel:
        mix = Mix(drawn(40, 3, 2, share, 0), 2, share, 0.5)
        return CostModel(SchedulerInput(**{**fields, "mixes": (mix,), **changes}))

    large = scheduler(0.5)  # 0.7 of level 0's prefix, where all at level 1 are 0.8
    assert np.bincount(large.levels, minlength=3).tolist() == [20, 0, 20]
    assert large.mix is not None
    assert any("level 2 serves 50% of the photos, drawn at random" in note for note in large.notes)
    small = scheduler(0.25)  # 0.85
    assert set(small.levels.tolist()) == {1}
    assert small.mix is None
    assert not small.notes


# ---- on the device ---------------------------------------------------------------------------

MIXES = {"sgd": [[2, *row] for row in LOSSES], "closed": [[2, 1.0, 0.4]]}


def fit(root: Path, **changes: Any) -> tuple[tuple[int, ...], list[str], dict[str, Any]]:
    """Train on 120 photos; return the first epoch's levels, all notes and model.json."""
    if not (root / "m.pbc").exists():
        tiny.write(root / "m.pbc", policy=False, mixes=MIXES)
        tiny.photos(root / "photos", 40)
    runtime = Runtime.open(root / "m.pbc")
    samples = ImageFolder.open(root / "photos", runtime.spec)
    events: list[Event] = []
    options = TrainOptions(**{"epochs": 2, "costs": tiny.costs(root / "costs.json"), **changes})
    runtime.fit(samples, options, root / "out", overwrite=True, report=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    first = next(event for event in events if isinstance(event, EpochReport))
    return first.levels, notes, json.loads((root / "out" / "model.json").read_text())


def test_a_run_mixes_by_what_its_kind_of_head_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Finding, "worse_than", lambda *_: 1.0)
    levels, notes, model = fit(tmp_path)
    assert levels == (48, 0, 72)  # 0.6 lose half a point
    assert any("level 2 serves 60% of the photos" in note for note in notes)
    (found,) = model["metrics"]["audit"]
    assert found["level"] == 2
    assert found["points_lost"] is not None
    assert fit(tmp_path, max_accuracy_loss=0.1)[0] == (90, 0, 30)
    assert fit(tmp_path, head="closed")[0] == (0, 0, 120)
    assert fit(tmp_path, routing=False)[0] == (120, 0, 0)
    assert fit(tmp_path, max_level=1)[0] == (120, 0, 0)
    assert fit(tmp_path, fidelity_floor=0.99)[0] == (120, 0, 0)


def test_what_the_audit_finds_makes_the_share_smaller(tmp_path: Path) -> None:
    manifest = {"mixes": {"sgd": MIXES["sgd"]}}
    tiny.write(tmp_path / "m.pbc", policy=False)
    ladder = Runtime.open(tmp_path / "m.pbc").bundle.ladder  # level 2 has 0.93
    routes = Routes(manifest, ladder, TrainOptions())

    def share(**found: Any) -> float:
        fields = {"level": 2, "samples": 64, "fidelity": 0.93, "error": 0.0, "floor": 0.0}
        mixes = routes.mixes(100, (Finding(**{**fields, **found}),))
        return mixes[0].share if mixes else 0.0

    assert share() == pytest.approx(0.6)
    assert share(fidelity=0.96) == pytest.approx(0.6)  # better than expected buys nothing
    assert share(fidelity=0.86) == pytest.approx(0.4375)  # twice as far off: twice the loss
    assert share(fidelity=0.86, error=0.1) == pytest.approx(0.6)
    assert share(points_lost=4.0) == pytest.approx(0.4375)
    assert share(points_lost=4.0, points_error=2.0) == pytest.approx(0.6)
    assert share(points_lost=80.0) == 0.0


def test_points_lost_on_audited_samples() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(96) % 4
    original = np.eye(4)[labels] @ random.normal(size=(4, 12)) + random.normal(size=(96, 12)) * 0.4
    same = points_lost(original, original, labels)
    assert same == (0.0, 0.0)
    ruined = points_lost(random.normal(size=original.shape), original, labels)
    assert ruined is not None
    assert ruined[0] > 30
    assert 0 < ruined[1] < 10
    assert points_lost(original, original, np.arange(96)) is None  # no class has a second sample


def test_maps_and_tokens_are_read_at_their_means() -> None:
    features = {
        "map": np.arange(24.0).reshape(1, 2, 3, 4),
        "tokens": np.arange(6.0).reshape(1, 3, 2),
        "flat": np.ones((1, 3)),
    }
    assert vectors(features).tolist() == [[5.5, 17.5, 2, 3, 1, 1, 1]]
