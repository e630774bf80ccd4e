"""The results as text: tables for a terminal, and the artifact appendix's table as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pbc.bench.results import Results
from pbc.bench.standings import BASELINES, BUDGETS, FULL, REFERENCE, Reached, Spread, Standing
from pbc.util.sizes import memory_text

_OURS = ("pbc", "pbc-nocache", "piebridge")
_SECONDS_PER_HOUR = 3600


MEMORY = "training_memory_bytes"
"""The fact of a rival that says what its training takes, where that was measured."""


def percent(spread: Spread) -> str:
    """Write an accuracy: `71.4 ± 0.2 %`."""
    more = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    return f"{100 * spread.mean:.1f}{more} %"


def ratio(spread: Spread | None) -> str:
    """Write how many times as fast: `12.3 ± 0.4x`."""
    if spread is None:
        return "-"
    more = "" if spread.sd is None else f" ± {spread.sd:.2f}"
    return f"{spread.mean:.2f}{more}x"


def seconds(spread: Spread) -> str:
    """Write a time: `12.3 ± 0.4 s`."""
    digits = 1 if spread.mean >= 10 else 2
    more = "" if spread.sd is None else f" ± {spread.sd:.{digits}f}"
    return f"{spread.mean:.{digits}f}{more} s"


def reached(found: Reached | None) -> str:
    """Write when an accuracy was reached: `3.2 s (4.10x)`, with the seeds that never did."""
    if found is None:
        return "-"
    if found.seconds is None:
        return "never"
    part = "" if found.seeds == found.of_seeds else f", {found.seeds} of {found.of_seeds} seeds"
    times = "" if found.ratio is None else f"{ratio(found.ratio)}"
    return f"{seconds(found.seconds)} ({times}{part})" if times or part else seconds(found.seconds)


def moment(found: Reached | None, *, complete: bool = True) -> str:
    """Write when an accuracy was reached: `3.2 s`, with the seeds that did if not all did.

    complete: whether all epochs ran; else nobody knows what they would have reached.
    """
    if found is None or found.seconds is None:
        return "-" if found is None or not complete else "never"
    part = "" if found.seeds == found.of_seeds else f" ({found.seeds} of {found.of_seeds} seeds)"
    return f"{seconds(found.seconds)}{part}"


def memory(count: int | None) -> str:
    return memory_text(count) if count else "-"


def levels(epoch: Sequence[float]) -> str:
    """Write an epoch's visits: `L0 62 % L2 38 %`."""
    total = sum(epoch) or 1
    return " ".join(f"L{k} {visits / total:.0%}" for k, visits in enumerate(epoch) if visits)


def joules(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.mean:.0f} J"


def clock(results: Results) -> list[list[str]]:
    """Return the first table, when accuracies were reached: a header row, then a row per rival."""
    standings = results.standings
    if all(standing.to_reference is None for standing in standings):
        return [[]]
    baselines = [name for name in BASELINES if results.standing(name) is not None]
    return [
        [
            f"time to {REFERENCE}'s accuracy − 0.5",
            "time",
            *(f"{name} = 1" for name in baselines),
            "− 0",
            "its best",
        ],
        *(
            [
                standing.label,
                moment(standing.to_reference, complete=not standing.extrapolated),
                *(
                    ratio(standing.to_reference.faster.get(name) if standing.to_reference else None)
                    for name in baselines
                ),
                moment(standing.to_final, complete=not standing.extrapolated),
                moment(standing.to_best, complete=not standing.extrapolated),
            ]
            for standing in standings
        ),
    ]


def headline(results: Results) -> list[list[str]]:
    """Return the table of whole runs: a header row, then a row per rival, the fastest first."""
    energy = any(standing.joules is not None for standing in results.standings)
    measured = any(standing.facts.get(MEMORY) for standing in results.standings)
    baselines = [name for name in BASELINES if results.standing(name) is not None]
    rows = [
        [
            "rival",
            "final accuracy",
            "time of all epochs",
            *(f"{name} = 1" for name in baselines),
            "cache",
            *(["memory of training"] if measured else []),
            *(["energy"] if energy else []),
        ]
    ]
    rows += [
        [
            standing.label,
            percent(standing.accuracy),
            seconds(standing.seconds),
            *(ratio(standing.faster.get(name)) for name in baselines),
            memory(standing.facts.get("cache_bytes")),
            *([memory(standing.facts.get(MEMORY))] if measured else []),
            *([joules(standing.joules)] if energy else []),
        ]
        for standing in by_speed(results)
    ]
    return rows


def by_speed(results: Results) -> list[Standing]:
    """Return the standings, the fastest first."""
    return sorted(results.standings, key=lambda standing: standing.seconds.mean)


def stages(results: Results) -> list[list[str]]:
    """Return the share of time per stage: a header row, then a row per rival."""
    names = [
        stage
        for stage in dict.fromkeys(name for s in results.standings for name in s.stages)
        if any(s.stages.get(stage, 0) >= 0.0005 for s in results.standings)
    ]
    rows = [["share of time", *names]]
    rows += [
        [standing.label, *(f"{100 * standing.stages.get(name, 0):.1f} %" for name in names)]
        for standing in results.standings
    ]
    return rows


def routing(results: Results) -> list[list[str]]:
    """Return the visits per level and epoch of rivals that route: a header row, then a row each."""
    routed = [s for s in results.standings if len(s.levels[0]) > 1]
    epochs = max((len(s.levels) for s in routed), default=0)
    rows = [["visits per level", *(f"epoch {epoch + 1}" for epoch in range(epochs))]]
    for standing in routed:
        cells = [f"{sum(epoch):.0f}: {levels(epoch)}" for epoch in standing.levels]
        rows.append([standing.label, *cells, *[""] * (epochs - len(cells))])
    return rows


def budgets(results: Results) -> list[list[str]]:
    """Return the time to shares of full training's accuracy: a header row, then a row per rival."""
    rows = [["time to", *(f"{100 * share:.0f} % of full" for share in BUDGETS)]]
    rows += [
        [standing.label, *(reached(standing.budgets.get(share)) for share in BUDGETS)]
        for standing in results.standings
    ]
    return rows


def sweeps(results: Results) -> list[list[list[str]]]:
    """Return a table per study: a header row, then a row per value and rival."""
    return [
        [
            [study.title, "rival", "final accuracy", "time", f"speed, {REFERENCE} = 1"],
            *(
                [
                    point.value,
                    point.rival,
                    percent(point.accuracy),
                    seconds(point.seconds),
                    ratio(point.faster),
                ]
                for point in study.points
            ),
        ]
        for study in results.sweeps
    ]


def show(console: Console, results: Results, with_budgets: bool) -> None:
    """Print all tables and notes."""
    protocol, data = results.about["protocol"], results.about["data"]
    own = ", ".join(f"{name} {rate:g}" for name, rate in protocol["rates_of_their_own"].items())
    console.print(
        f"{data['train_samples']} photos of {data['classes']} classes, tested on "
        f"{data['test_samples']}; {protocol['epochs']} epochs in turn, "
        f"{protocol['seeds']} seed{'s' if protocol['seeds'] > 1 else ''}, "
        f"batch {protocol['batch']}, {protocol['optimizer']} at "
        f"{protocol['learning_rate']:g}{f' ({own})' if own else ''}, one process, "
        f"peak memory of the process {memory(results.peak_memory_bytes)}",
        soft_wrap=True,
    )
    tables = [clock(results), headline(results), stages(results), routing(results)]
    if with_budgets:
        tables.append(budgets(results))
    for rows in [*tables, *sweeps(results)]:
        if len(rows) > 1:
            console.print()
            console.print(aligned(rows))
    console.print()
    console.print(f"energy: {results.energy}")
    for note in results.notes:
        console.print(Text.assemble(("note: ", "yellow"), note), soft_wrap=True)


def aligned(rows: list[list[str]]) -> Table:
    """Return a table of plain cells, the first row its header; numbers are flush right."""
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    return table


def ours(results: Results) -> Standing | None:
    """Return the rival that a table with one column for pbc shows."""
    found = (results.standing(name) for name in _OURS)
    return next((standing for standing in found if standing is not None), None)


def artifact_csv(results: Results) -> str:
    """Return the table of PieBridge's artifact appendix: hours and accuracy in per cent.

    Columns Ours, PET, FTAll; a column whose rival did not run is empty. A third row tells the
    epochs where a rival ran fewer than planned, so that its time is extrapolated.
    """
    columns = {
        "Ours": ours(results),
        "PET": results.standing(REFERENCE),
        "FTAll": results.standing(FULL),
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *columns])
    writer.writerow(["Time", *(_cell(s, _hours) for s in columns.values())])
    writer.writerow(["Acc.", *(_cell(s, _accuracy) for s in columns.values())])
    if any(standing is not None and standing.extrapolated for standing in columns.values()):
        writer.writerow(["Epochs run", *(_cell(s, _epochs) for s in columns.values())])
    return text.getvalue()


def _cell(standing: Standing | None, write: Callable[[Standing], str]) -> str:
    return "" if standing is None else write(standing)


def _hours(standing: Standing) -> str:
    return f"{standing.seconds.mean / _SECONDS_PER_HOUR:.4g}"


def _accuracy(standing: Standing) -> str:
    return f"{100 * standing.accuracy.mean:.2f}"


def _epochs(standing: Standing) -> str:
    return f"{standing.epochs} of {standing.planned}"
