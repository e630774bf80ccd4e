"""The arithmetic of `pbc bench` on given cells, and the tables made of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbc.bench.cells import Cell, EntryProgress, Work
from pbc.bench.notes import precision_notes
from pbc.bench.report import html as report
from pbc.bench.report import tables, verdict
from pbc.bench.results import Results
from pbc.bench.standings import (
    Spread,
    Standing,
    seconds_until,
    standings_of,
    total_joules,
    total_seconds,
)
from pbc.bench.sweep import Point, Study
from pbc.bundle.ladder import Ladder, Level
from pbc.errors import PbcError

Epoch = tuple[float, float]


def run(
    rival: str, seed: int, epochs: Sequence[Epoch], levels: tuple[int, ...] = (8,)
) -> list[Cell]:
    """Cells of (seconds, accuracy) each."""
    return [
        Cell(rival, seed, number, seconds, {"prefix": seconds}, levels, 1.0, accuracy)
        for number, (seconds, accuracy) in enumerate(epochs, 1)
    ]


def ranked() -> dict[str, Standing]:
    runs = {
        "full": [run("full", 0, [(100.0, 0.80)]), run("full", 1, [(120.0, 0.80)])],
        "pet": [
            run("pet", 0, [(10.0, 0.60), (10.0, 0.70), (10.0, 0.72)]),
            run("pet", 1, [(12.0, 0.60), (12.0, 0.68), (12.0, 0.70)]),
        ],
        "pet-cache": [
            run("pet-cache", 0, [(10.0, 0.60), (1.0, 0.70), (1.0, 0.72)]),
            run("pet-cache", 1, [(10.0, 0.60), (1.0, 0.68), (1.0, 0.70)]),
        ],
        "pbc": [
            run("pbc", 0, [(4.0, 0.60), (1.0, 0.70), (1.0, 0.716)], (2, 6)),
            run("pbc", 1, [(4.0, 0.60), (1.0, 0.65), (1.0, 0.66)], (4, 4)),
        ],
    }
    found = standings_of(3, runs, {"pbc": {"cache_bytes": 2**20, "notes": ["hello <b>"]}})
    return {standing.rival: standing for standing in found}


def results(*more: Study) -> Results:
    ladder: list[dict[str, Any]] = [
        {"level": 0, "cost": 1.0, "fidelity": 1.0, "status": "original"},
        {"level": 1, "cost": 0.5, "fidelity": 0.93, "status": "aligned"},
        {"level": 2, "cost": 0.3, "fidelity": None, "status": "unaligned"},
    ]
    about: dict[str, dict[str, Any]] = {
        "bundle": {"model": "net & co", "strategy": "linear-probe", "cost_model": "latency"},
        "data": {"train_samples": 8, "test_samples": 50, "classes": 3},
        "protocol": {"seeds": 2, "epochs": 3, "batch": 4, "optimizer": "sgd", "learning_rate": 0.1},
        "machine": {"processor": "a <fast> one"},
    }
    notes = ["mind the <gap>"]
    return Results(about, ladder, list(ranked().values()), more, [], notes, 2**30, "no meter")


def test_ratios_are_taken_seed_by_seed() -> None:
    pbc = ranked()["pbc"]
    assert pbc.seconds == Spread.of([6.0, 6.0])
    assert pbc.faster["pet"].values == (5.0, 6.0)
    assert pbc.faster["pet"].mean == 5.5
    assert pbc.faster["pet"].sd == pytest.approx(0.5**0.5)
    assert pbc.faster["pet-cache"].values == (2.0, 2.0)
    assert ranked()["pet"].faster["pet"].values == (1.0, 1.0)


def test_accuracy_is_that_of_the_last_epoch() -> None:
    cells = run("pet", 0, [(1.0, 0.9), (1.0, 0.5)])
    (standing,) = standings_of(2, {"pet": [cells]}, {})
    assert standing.accuracy == Spread(0.5, None, (0.5,))


def test_time_to_the_reference_allows_half_a_point() -> None:
    found = ranked()["pbc"].to_reference
    assert found is not None
    assert (found.seeds, found.of_seeds) == (1, 2)
    assert found.seconds is not None
    assert found.seconds.values == (6.0,)
    assert found.ratio is not None
    assert found.ratio.values == (5.0,)  # PET itself gets there after its third epoch
    cache = ranked()["pet-cache"].to_reference
    assert cache is not None
    assert cache.seconds is not None
    assert cache.seconds.values == (12.0, 12.0)


def marked(rival: str, marks: Sequence[Epoch], *epochs: Epoch, last: bool = False) -> list[Cell]:
    first, *others = run(rival, 0, epochs)
    cells = [replace(first, marks=tuple(marks)), *others]
    return [*cells[:-1], replace(cells[-1], last=last)]


def test_marks_inside_an_epoch_tell_when_an_accuracy_was_reached() -> None:
    cells = marked("pbc", [(1.0, 0.3), (3.0, 0.7)], (4.0, 0.6), (2.0, 0.8))
    assert seconds_until(cells, 0.3) == 1.0
    assert seconds_until(cells, 0.65) == 3.0
    assert seconds_until(cells, 0.75) == 6.0
    assert seconds_until(cells, 0.9) is None
    (standing,) = standings_of(2, {"pbc": [cells]}, {})
    assert standing.curve == ((1.0, 0.3), (3.0, 0.7), (4.0, 0.6), (6.0, 0.8))


def test_the_clock_counts_to_the_final_and_the_best_accuracy_of_pet() -> None:
    runs = {
        "pet": [marked("pet", [(5.0, 0.697)], (10.0, 0.72), (10.0, 0.70))],
        "pet-cache-closed": [marked("pet-cache-closed", [(2.0, 0.69)], (4.0, 0.71), last=True)],
        "pbc": [marked("pbc", [(1.0, 0.696)], (2.0, 0.73), last=True)],
    }
    found = {standing.rival: standing for standing in standings_of(2, runs, {})}
    pbc = found["pbc"]
    assert pbc.to_reference is not None
    assert pbc.to_final is not None
    assert pbc.to_best is not None
    assert pbc.to_reference.faster["pet"].mean == 5.0
    assert pbc.to_reference.faster["pet-cache-closed"].mean == 4.0
    assert [at.seconds and at.seconds.mean for at in (pbc.to_final, pbc.to_best)] == [2.0, 2.0]
    closed = found["pet-cache-closed"].to_best
    assert closed is not None
    assert (closed.seconds, closed.seeds) == (None, 0)


def test_a_final_accuracy_takes_all_epochs() -> None:
    runs = {
        "pet": [run("pet", 0, [(10.0, 0.5)])],
        "pbc": [run("pbc", 0, [(1.0, 0.6), (1.0, 0.8), (1.0, 0.8)])],
    }
    assert all(s.to_reference is None for s in standings_of(3, runs, {}))
    twin = {"pet-cache": [run("pet-cache", 0, [(5.0, 0.5), (1.0, 0.6), (1.0, 0.7)])]}
    found = {standing.rival: standing for standing in standings_of(3, {**runs, **twin}, {})}
    reached = found["pbc"].to_reference
    assert reached is not None
    assert reached.seconds == Spread.of([2.0])
    assert reached.faster["pet-cache"].mean == 3.5
    assert "pet" not in reached.faster  # it did not get there in the epochs it ran


def test_who_ended_early_is_not_extrapolated() -> None:
    (standing,) = standings_of(12, {"pbc": [marked("pbc", [], (4.0, 0.7), last=True)]}, {})
    assert standing.seconds.mean == 4.0
    assert standing.label == "pbc"


def test_few_epochs_are_extrapolated_and_it_is_said() -> None:
    full = ranked()["full"]
    assert full.extrapolated
    assert full.seconds.values == (300.0, 360.0)
    assert full.label == "full (1 of 3 epochs, time extrapolated)"
    assert not ranked()["pet"].extrapolated


def test_what_the_first_epoch_prepares_is_not_extrapolated() -> None:
    assert total_seconds(run("pet-cache", 0, [(10.0, 0.5), (1.0, 0.6)]), 12) == 21.0
    assert total_seconds(run("pet", 0, [(2.0, 0.5)] * 3), 3) == 6.0


def test_joules_are_extrapolated_as_seconds_are() -> None:
    metered = [
        replace(cell, energy_joules=joules)
        for cell, joules in zip(run("full", 0, [(1.0, 0.5)] * 3), (9.0, 2.0, 4.0), strict=True)
    ]
    assert total_joules(metered, 5) == 9 + 2 + 4 + 2 * 3
    assert total_joules(metered, 3) == 15
    assert total_joules(run("full", 0, [(1.0, 0.5)]), 5) is None
    (standing,) = standings_of(5, {"full": [metered]}, {})
    assert standing.joules == Spread.of([21.0])


def test_the_first_epoch_that_reaches_an_accuracy_counts() -> None:
    cells = run("pet", 0, [(1.0, 0.5), (2.0, 0.7), (4.0, 0.6), (8.0, 0.8)])
    assert seconds_until(cells, 0.5) == 1.0
    assert seconds_until(cells, 0.6) == 3.0
    assert seconds_until(cells, 0.8) == 15.0
    assert seconds_until(cells, 0.81) is None


def test_budgets_are_shares_of_full_training() -> None:
    budgets = ranked()["pet"].budgets
    assert list(budgets) == [0.85, 0.90, 0.95, 0.99]
    assert budgets[0.85].seconds == Spread.of([20.0, 24.0])  # 68 %
    assert budgets[0.90].seconds == Spread.of([30.0])  # 72 %, one seed of two
    assert budgets[0.90].seeds == 1
    assert budgets[0.99].seconds is None
    (alone,) = standings_of(1, {"pet": [run("pet", 0, [(1.0, 0.5)])]}, {})
    assert alone.budgets == {}


def test_levels_and_curves_are_means_over_seeds() -> None:
    pbc = ranked()["pbc"]
    assert pbc.levels == ((3.0, 5.0),) * 3
    assert pbc.curve[-1] == pytest.approx((6.0, 0.688))
    assert pbc.stages == {"prefix": 1.0}


def test_the_artifacts_table() -> None:
    rows = list(csv.reader(tables.artifact_csv(results()).splitlines()))
    assert rows[0] == ["", "Ours", "PET", "FTAll"]
    assert rows[1] == ["Time", "0.001667", "0.009167", "0.09167"]
    assert rows[2] == ["Acc.", "68.80", "71.00", "80.00"]
    assert rows[3] == ["Epochs run", "3 of 3", "3 of 3", "1 of 3"]


def test_the_headline_has_spreads_and_what_was_never_reached() -> None:
    rows = {row[0]: row for row in tables.headline(results())}
    pbc = rows["pbc"]
    assert pbc[1:5] == ["68.8 ± 4.0 %", "6.00 ± 0.00 s", "5.50 ± 0.71x", "2.00 ± 0.00x"]
    assert pbc[5] == "1.0 MiB"
    assert rows["pet"][5] == "-"


def test_the_first_table_is_the_clock() -> None:
    header, *rows = tables.clock(results())
    assert header == ["time to pet's accuracy − 0.5", "time", "pet = 1", "pet-cache = 1", "− 0",
                      "its best"]  # fmt: skip
    found = {row[0]: row[1:] for row in rows}
    assert found["pbc"] == ["6.00 s (1 of 2 seeds)", "5.00x", "2.00x", "never", "never"]
    assert found["pet"][0] == "33.0 ± 4.2 s"


def test_what_is_saved_is_said_in_words_and_the_fastest_is_first() -> None:
    accuracy, time = verdict.lines(results())
    assert accuracy.startswith("accuracy: pbc 68.8 ± 4.0 %; fine-tuning 71.0")
    assert time.startswith("time: pbc 6.00 ± 0.00 s; fine-tuning 33.0")
    assert "5.50 times as long; fine-tuning with a feature cache " in time
    assert "27 s less than fine-tuning and " in verdict.sentence(results())
    seconds = [standing.seconds.mean for standing in tables.by_speed(results())]
    assert seconds == sorted(seconds)
    page = report.html(results(), False)
    assert page.index('class="ours"') < page.index("fine-tuning (pet)")


def test_accuracies_are_those_of_complete_runs() -> None:
    found = ranked()
    few = replace(found["pet"], epochs=1)
    shown = replace(results(), standings=[few, found["pet-cache"], found["pbc"]])
    accuracy, time = verdict.lines(shown)
    assert "; fine-tuning with a feature cache 71.0" in accuracy
    assert "fine-tuning 7" not in accuracy
    assert "fine-tuning 33.0 ± 4.2 s (by 1 of 3 epochs), 5.50" in time
    assert "(fine-tuning with a feature cache: 71.0" in verdict.sentence(shown)


def test_the_report_shows_everything_and_escapes_it() -> None:
    point = Point("4", "pbc", Spread.of([0.5]), Spread.of([1.0]), Spread.of([2.0]))
    more = Point("8", "pet", Spread.of([0.6]), Spread.of([2.0]), None)
    page = report.html(results(Study("shots", "Photos per class", ("4", "8"), (point, more))), True)
    for text in (
        "net &amp; co", "mind the &lt;gap&gt;", "a &lt;fast&gt; one", "Photos per class",
        "99 % of full", "time extrapolated", "5.50 ± 0.71x", "no meter", "level 2",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") == 6  # accuracy, routing of pbc, ladder, stages, two of the sweep
    assert "<gap>" not in page
    assert page.count("<svg") == page.count("</svg>")


def test_without_a_reference_nothing_is_compared() -> None:
    (alone,) = standings_of(1, {"pbc": [run("pbc", 0, [(1.0, 0.5)])]}, {})
    assert alone.faster == {}
    assert alone.to_reference is None


def test_cells_and_state_come_back(tmp_path: Path) -> None:
    import numpy as np

    work = Work(tmp_path / "work")
    work.begin({"bundle": "a"}, resume=False, overwrite=False)
    cells = tuple(run("pet", 0, [(1.0, 0.5), (2.0, 0.6)]))
    work.save(EntryProgress(cells, {"theta/w": np.arange(3.0)}, {"notes": []}))
    found = work.load("pet", 0)
    assert found.cells == cells
    assert found.state is not None
    assert found.state["theta/w"].tolist() == [0.0, 1.0, 2.0]
    assert work.load("pet", 1) == EntryProgress()


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"options": {"a": 1, "b": 2}}, {"options": {"a": 1}}, "options: .*b 2, not None"),
        ({"options": {"a": 1}}, {"options": {"a": 1, "b": 2}}, "options: .*b None, not 2"),
        ({"a": {"x": 1}, "b": 1}, {"a": {"x": 1}}, "b 1, not None"),
        ({"a": 1}, {"b": 1}, "b None, not 1"),
    ],
)
def test_an_option_more_or_less_is_another_bench(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    Work(tmp_path).begin(then, resume=False, overwrite=False)
    with pytest.raises(PbcError, match=said):
        Work(tmp_path).begin(now, resume=True, overwrite=False)
    assert Work(tmp_path).begin(then, resume=True, overwrite=False)


def test_a_kill_while_overwriting_mixes_no_benches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(tmp_path)
    work.begin({"bundle": "a"}, resume=False, overwrite=False)
    work.save(EntryProgress(tuple(run("pet", 0, [(1.0, 0.5)])), {}, {}))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pbc.bench.cells.replace_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            work.begin({"bundle": "b"}, resume=False, overwrite=True)
    with pytest.raises(PbcError, match="another bundle"):
        work.begin({"bundle": "b"}, resume=True, overwrite=False)
    assert work.begin({"bundle": "a"}, resume=True, overwrite=False)
    assert work.load("pet", 0) == EntryProgress()


def test_states_of_an_unknown_bench_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    with pytest.raises(PbcError, match=r"holds states/ without the bench\.json"):
        Work(tmp_path).begin({"bundle": "a"}, resume=False, overwrite=True)


def test_levels_in_bfloat16_are_told() -> None:
    ladder = Ladder(
        (
            Level(0, 1.0, None, 1.0, 1.0, "original"),
            Level(1, 0.5, None, 0.5, 0.9, "aligned", precision="bfloat16"),
        )
    )
    assert precision_notes(ladder, list(ranked().values())) == [
        "pbc: level 1 computed in bfloat16; pet-bf16 is what that precision alone gives"
    ]
    assert precision_notes(Ladder(ladder.levels[:1]), list(ranked().values())) == []
