"""Draw accuracy over size, for pages: `python docs/frontier.py sizes.json frontier.svg`.

sizes.json: by network, rows of `label`, `kind`, `bytes` and `accuracy`; the first is the original.
The picture follows the reader's choice of light or dark.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

PANEL, HEIGHT, LEFT, TOP, BOTTOM = 360, 340, 56, 64, 48
TIMES = (1, 2, 4, 8, 16)
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px; fill: #57606a } .grid { stroke: #d0d7de }
.cluster { fill: #2f6fde } .prune { fill: #8c959f } .both { fill: #1a7f37 } .train { fill: #bf5700 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d }
  .cluster { fill: #5b9bff } .prune { fill: #6e7681 } .both { fill: #3fb950 }
  .train { fill: #f0883e }
}
"""
KINDS = {
    "cluster": "cluster-weights",
    "prune": "prune-weights",
    "both": "both",
    "train": "centroids, trained",
}


def frontier(networks: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return an SVG with a panel per network: accuracy in per cent over how much smaller it is."""
    marks = []
    for number, (network, rows) in enumerate(networks.items()):
        marks.append(f'<g transform="translate({number * PANEL} 0)">{_panel(network, rows)}</g>')
    shown = {row["kind"] for rows in networks.values() for row in rows}
    for number, kind in enumerate(kind for kind in KINDS if kind in shown):
        x = LEFT + number * 150
        marks.append(
            f'<circle class="{kind}" cx="{x}" cy="20" r="5"/>'
            f'<text x="{x + 10}" y="24">{KINDS[kind]}</text>'
        )
    width = PANEL * len(networks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'aria-label="Accuracy over how many times smaller a bundle is than in float32">'
        f"<style>{STYLE}</style>{''.join(marks)}</svg>\n"
    )


def _panel(network: str, rows: Sequence[Mapping[str, Any]]) -> str:
    whole = rows[0]
    most = math.ceil(100 * max(row["accuracy"] for row in rows) / 10) * 10
    least = math.floor(100 * min(row["accuracy"] for row in rows) / 10) * 10

    def x(times: float) -> float:
        return LEFT + (PANEL - LEFT - 16) * math.log2(times) / math.log2(TIMES[-1])

    def y(percent: float) -> float:
        return float(TOP + (HEIGHT - TOP - BOTTOM) * (most - percent) / (most - least))

    marks = [f'<text x="{LEFT}" y="{TOP - 12}">{escape(network)}, {_size(whole["bytes"])}</text>']
    for percent in range(least, most + 1, 10):
        marks += [
            f'<path class="grid" d="M{LEFT} {y(percent):.1f}H{PANEL - 16}"/>',
            f'<text class="small" x="{LEFT - 8}" y="{y(percent) + 4:.1f}" text-anchor="end">'
            f"{percent} %</text>",
        ]
    for times in TIMES:
        marks.append(
            f'<text class="small" x="{x(times):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{times}×</text>'
        )
    marks.append(
        f'<text class="small" x="{(LEFT + PANEL) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "times smaller than in float32</text>"
    )
    for row in rows:
        at = x(whole["bytes"] / row["bytes"]), y(100 * row["accuracy"])
        marks.append(
            f'<circle class="{row["kind"]}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4"/>'
            f'<text class="small" x="{at[0] + 6:.1f}" y="{at[1] - 5:.1f}">'
            f"{escape(row['label'])}</text>"
        )
    return "".join(marks)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    _, source, target = sys.argv
    Path(target).write_text(frontier(json.loads(Path(source).read_text())))
