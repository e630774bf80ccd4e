"""What a compilation says of its levels in the end: who would run where, and for what gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from pbc.runtime.routing.outlook import Outlook, outlooks


def found(root: Path, **changes: Any) -> list[Outlook]:
    bundle = tiny.write(root / "m.pbc", **{"promised": True, **changes})
    return outlooks(bundle.manifest, bundle.ladder)


def test_levels_above_the_floor_serve_everyone(tmp_path: Path) -> None:
    half, one, two = found(tmp_path, accuracy_map=((0.9, 1.0), (0.95, 0.6), (1.0, 0.0)))
    assert [outlook.points for outlook in (half, one, two)] == [0.5, 1.0, 2.0]
    assert half.shares == {1: 1.0}  # 0.97 loses 0.36
    assert one.shares == two.shares == {2: 1.0}
    assert 1 < half.gain < one.gain < 1 / 0.6
    assert "within 1 points of accuracy: 100% at level 2; 1.6" in one.told()


def test_mixes_serve_a_share(tmp_path: Path) -> None:
    mixes = {"closed": [[2, 0.5, 0.5], [2, 1.0, 3.0]]}
    half, _, _ = found(tmp_path, accuracy_map=((0.9, 9.0), (1.0, 0.0)), mixes=mixes)
    assert half.shares == {0: 0.5, 2: 0.5}
    assert half.gain == pytest.approx(1 / (1 - 0.5 * 0.4 * 0.95), abs=0.01)


def test_a_ladder_that_no_run_uses_is_said(tmp_path: Path) -> None:
    rows = found(tmp_path, fidelities=(0.2,), accuracy_map=((0.2, 50.0), (1.0, 0.0)))
    assert all(row.shares == {0: 1.0} and row.gain == 1 for row in rows)
    assert rows[0].told() == "within 0.5 points of accuracy no level but the original runs"


def test_a_cache_gains_less_where_epochs_repeat(tmp_path: Path) -> None:
    rows = found(tmp_path, kind="bodies", accuracy_map=((0.9, 0.1), (1.0, 0.0)))
    assert all(row.gain >= row.cached_gain >= 1 for row in rows)
