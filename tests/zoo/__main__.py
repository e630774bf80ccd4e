"""The zoo: networks × strategies × engines beside plain torch (docs/zoo.md).

`python tests/zoo` runs every cell that the file of results does not have yet, then prints a table.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
from pathlib import Path

from catalogue import networks
from cell import Cell
from processes import results
from records import Record, append, read
from table import table

ENGINES = ("pytorch", "onnxruntime", "tvm")
STRATEGIES = ("linear-probe", "last-k:1", "norm", "bias", "adapters:2", "full")
# Parameters of the largest network that trains as a whole.
_SMALL = 12_000_000


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    known = {record.key: record for record in read(arguments.results)}
    cells = [
        cell
        for cell in _cells(arguments)
        if (record := known.get(Record.key_of(cell))) is None or record.outcome in arguments.again
    ]
    for count, (cell, result, seconds) in enumerate(
        results(cells, arguments.jobs, arguments.limit), 1
    ):
        record = Record.of(cell, result, seconds)
        append(arguments.results, record)
        sys.stderr.write(f"{count}/{len(cells)} {record.line}\n")
    sys.stdout.write(table(read(arguments.results)))
    return 0


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """What the arguments choose, network by network."""
    chosen = [n for n in networks() if re.search(arguments.only, n.name)]
    if arguments.sample is not None:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    chosen.sort(key=lambda network: network.parameters)  # most results first
    return [
        Cell(network, strategy, engine, arguments.levels)
        for network in chosen
        for strategy in arguments.strategies
        for engine in arguments.engines
        if strategy != "full" or network.parameters <= _SMALL
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    listed = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument(
        "--engines", type=listed, default=ENGINES, help=", of " + ", ".join(ENGINES)
    )
    parser.add_argument("--strategies", type=listed, default=STRATEGIES)
    parser.add_argument("--only", default="", help="a pattern that the names of networks hold")
    parser.add_argument("--sample", type=int, help="so many networks, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, default=1, help="proxies to make, as in pbc compile")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a cell")
    parser.add_argument(
        "--again", type=listed, default=(), help="outcomes to try again: wrong,traceback,…"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("build/zoo.jsonl"), help="a file of JSON lines"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
