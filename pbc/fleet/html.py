"""A fleet's rounds as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pbc.bench.report.charts import Series, legend, lines
from pbc.bench.report.page import page, section, table

_COLOURS = 9
_SHOWN = 8


def html(title: str, rounds: Sequence[Mapping[str, Any]], compared: Mapping[str, float]) -> str:
    """Return the page of a fleet's metrics; compared: accuracies of others, by name."""
    accuracy = [
        Series("the fleet", "c5", [(r["round"], 100 * r["accuracy"]) for r in rounds]),
        *(
            Series(name, f"c{index}", [(r["round"], 100 * value) for r in rounds])
            for index, (name, value) in enumerate(compared.items(), 1)
        ),
    ]
    clients = [
        Series(
            f"client {client + 1}",
            f"c{client % _COLOURS}",
            [(r["round"], 100 * r["client_accuracy"][client]) for r in rounds],
        )
        for client in range(min(len(rounds[0]["client_accuracy"]), _SHOWN))
    ]
    rows = [["round", "nodes", "loss", "accuracy", "down, kB", "up, kB", "seconds"]]
    rows += [
        [
            str(r["round"]),
            f"{r['answered']} of {r['asked']}",
            "-" if r["loss"] is None else f"{r['loss']:.4f}",
            f"{100 * r['accuracy']:.2f} %",
            f"{r['down_bytes'] / 1e3:.1f}",
            f"{r['up_bytes'] / 1e3:.1f}",
            f"{r['seconds']:.2f}",
        ]
        for r in rounds
    ]
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1></header>",
            section("Accuracy by round", legend(accuracy), _chart(accuracy)),
            section("By client, as its classes weigh it", legend(clients), _chart(clients)),
            section("Rounds: participation and bytes of a client", table(rows)),
        ],
    )


def _chart(series: Sequence[Series]) -> str:
    return lines(series, "round", "test accuracy, %", lambda x: f"{x:.0f}")
