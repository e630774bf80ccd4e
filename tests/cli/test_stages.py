"""Lines about the stages of a compilation."""

from __future__ import annotations

import pytest

from pbc.cli import stages
from pbc.cli.stages import StageLines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stages, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("tenths", [True, False])
def test_every_stage_says_its_seconds_and_long_ones_each_tenth(
    clock: list[float], tenths: bool
) -> None:
    lines: list[str] = []
    show = StageLines(lines.append, tenths=tenths)
    show("plan-levels", 0.0, "")
    clock[0] = 1.5
    show("plan-levels", 1.0, "")
    show("align", 0.0, "")
    for step in range(1, 101):
        clock[0] += 1.0
        show("align", step / 100, f"step {step}")
    show("align", 1.0, "")
    told = [line.split() for line in lines]
    assert told[0] == ["plan-levels", "1.5", "s"]
    assert told[-1] == ["align", "100.0", "s"]
    between = [["align", f"{10 * n}", "%", "step", f"{10 * n}"] for n in range(1, 11)]
    assert told[1:-1] == (between if tenths else [])


def test_a_stage_that_is_soon_over_says_no_tenths(clock: list[float]) -> None:
    lines: list[str] = []
    show = StageLines(lines.append, tenths=True)
    for fraction in (0.0, 0.5, 1.0):
        show("quantize", fraction, "")
        clock[0] += 1.0
    assert [line.split() for line in lines] == [["quantize", "2.0", "s"]]
