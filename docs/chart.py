"""Draw what a bench found as bars, for pages: `python docs/chart.py results.json chart.svg`.

results.json: what `pbc bench … -o results.json` wrote. The picture follows the reader's choice of
light or dark.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pbc.bench.report.verdict import WORDS

WIDTH, ROW, LEFT, RIGHT, TOP = 720, 44, 268, 170, 44
OURS = "pbc"
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #24292f }
.small { font-size: 13px; fill: #57606a }
.bar { fill: #8c959f } .ours { fill: #2f6fde }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .bar { fill: #6e7681 } .ours { fill: #5b9bff }
}
"""


def chart(results: Mapping[str, Any]) -> str:
    """Return an SVG: how long each of the rivals took beside pbc, and how accurate it became."""
    rivals = {name: results["rivals"][name] for name in (*WORDS, OURS) if name in results["rivals"]}
    ours = _seconds(rivals[OURS])
    longest = max(_seconds(rival) for rival in rivals.values())
    marks = []
    for row, (name, rival) in enumerate(rivals.items()):
        middle = TOP + row * ROW + ROW / 2
        length = max(2.0, (WIDTH - LEFT - RIGHT) * _seconds(rival) / longest)
        kind = "bar ours" if name == OURS else "bar"
        marks += [
            f'<text x="{LEFT - 12}" y="{middle + 5}" text-anchor="end">'
            f"{escape(WORDS.get(name, name))}</text>",
            f'<rect class="{kind}" x="{LEFT}" y="{middle - 13}" width="{length:.1f}" height="26" '
            'rx="4"/>',
            f'<text x="{LEFT + length + 10:.1f}" y="{middle + 5}">{_told(rival, ours)}</text>',
        ]
    height = TOP + ROW * len(rivals) + 12
    title = _title(results)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<text class="small" x="12" y="24">{escape(title)}</text>{"".join(marks)}</svg>\n'
    )


def _seconds(rival: Mapping[str, Any]) -> float:
    return float(rival["seconds"]["mean"])


def _told(rival: Mapping[str, Any], ours: float) -> str:
    times = f"{_seconds(rival) / ours:.2g}× as long" if _seconds(rival) != ours else "1"
    # A few epochs say nothing about an accuracy.
    return times if rival["extrapolated"] else f"{times}, {rival['accuracy']['mean']:.1%} right"


def _title(results: Mapping[str, Any]) -> str:
    data, epochs = results["data"], results["protocol"]["epochs"]
    return (
        f"{results['bundle']['model']}: time to learn {data['classes']} classes from "
        f"{data['train_samples']:,} photos ({epochs} epochs), in turn on one machine"
    )


if __name__ == "__main__":
    _, source, target = sys.argv
    Path(target).write_text(chart(json.loads(Path(source).read_text())))
