"""Contributions for people: rows of a table, and a page with a chart of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pbc.bench.report.charts import Part, Series, legend, lines
from pbc.bench.report.page import page, section, table
from pbc.scheme.contributions import ACCURACY, Contributions
from pbc.scheme.scheme import FRACTIONS

_COLOURS = ("l4", "l3", "l2", "l1")
_NAMES, _RIGHT, _BAR, _GAP, _WIDTH = 240, 60, 5, 8, 720

MEANINGS: Mapping[str, str] = {
    ACCURACY: "points of accuracy on held-out photos over the head alone",
    "fisher": "Fisher score (mean of squared gradients, summed over what trains): it ranks, and is "
    "no accuracy",
}


def rows(found: Contributions) -> list[list[str]]:
    """Return what each layer brings, by share, in the order in which they run."""
    head = ["layer", *map(str, FRACTIONS)]
    body = [
        [name, *(_number(shares[share]) if share in shares else "" for share in FRACTIONS)]
        for name, shares in found.layers.items()
    ]
    return [head, *body]


def bias_rows(found: Contributions) -> list[list[str]]:
    """Return what the biases of the last k layers bring."""
    return [["k", "biases of the last k"], *([str(k), _number(v)] for k, v in found.biases.items())]


def html(found: Contributions) -> str:
    """Return a self-contained page: which layers matter."""
    title = f"pbc analyze: {found.settings.get('model')}"
    meaning = MEANINGS[found.measure]
    alone = "" if found.baseline is None else f" ({found.baseline:.1f} %)"
    facts = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in found.settings.items()
    )
    biases = [(float(count), value) for count, value in found.biases.items()]
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1><p>{escape(meaning)}{alone}</p></header>",
            section("Weights, by the share that trains", _bars(found), table(rows(found))),
            section(
                "Biases of the last layers",
                lines(
                    [Series("biases", "l1", biases)], "last layers", found.measure, "{:g}".format
                ),
            ),
            section("What was analysed", f"<dl>{facts}</dl>"),
        ],
    )


def _bars(found: Contributions) -> str:
    """A group of bars per layer, one for each share, as in the paper's figure 4."""
    values = [value for shares in found.layers.values() for value in shares.values()]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (_WIDTH - _NAMES - _RIGHT) / ((high - low) or 1.0)
    zero = _NAMES - low * scale
    marks, y = [], 4.0
    for name, shares in found.layers.items():
        middle = y + len(shares) * _BAR / 2 + 4
        marks.append(f'<text x="0" y="{middle:.1f}">{escape(name)}</text>')
        for share, value in shares.items():
            left, width = zero + min(value, 0) * scale, max(abs(value) * scale, 0.5)
            colour = _COLOURS[FRACTIONS.index(share)]
            marks.append(
                f'<rect class="bar {colour}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{_BAR - 1}"><title>{escape(f"{name}, {share}: {_number(value)}")}</title>'
                "</rect>"
            )
            y += _BAR
        y += max(_GAP, 16 - len(shares) * _BAR)
    marks.append(f'<line class="grid" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{y:.0f}"/>')
    parts = [Part(str(share), colour) for share, colour in zip(FRACTIONS, _COLOURS, strict=True)]
    return legend(parts) + (
        f'<svg viewBox="0 0 {_WIDTH} {y:.0f}" role="img" aria-label="which layers matter">'
        + "".join(marks)
        + "</svg>"
    )


def _number(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 or not value else f"{value:.1e}"


def summary(found: Contributions, most: int = 3) -> Sequence[str]:
    """Return the layers that bring most, in words."""
    ranked = sorted(found.layers.items(), key=lambda item: max(item[1].values()), reverse=True)
    named = ", ".join(f"{name} ({_number(max(s.values()))})" for name, s in ranked[:most])
    return [f"most: {named}", f"in {MEANINGS[found.measure]}"]
