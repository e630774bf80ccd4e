"""The zoo: networks × strategies × engines beside plain torch (docs/zoo.md).

`python tests/zoo` runs every cell that the file of results does not have yet, then prints a table.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from catalogue import Network, networks, of_operators
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
    os.environ["PBC_UNSIGNED"] = "1"  # code of bundles that were made here
    known = {record.key: record for record in read(arguments.results)}
    cells = [
        cell
        for cell in _cells(arguments)
        if (record := known.get(Record.key_of(cell))) is None or record.outcome in arguments.again
    ]
    end = time.monotonic() + 60 * arguments.minutes
    for count, (cell, result, seconds) in enumerate(
        results(cells, arguments.jobs, arguments.limit), 1
    ):
        record = Record.of(cell, result, seconds)
        append(arguments.results, record)
        sys.stderr.write(f"{count}/{len(cells)} {record.line}\n")
        if time.monotonic() > end:
            break
    sys.stdout.write(table(read(arguments.results)))
    return 0


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """What the arguments choose, network by network."""
    known = of_operators() if arguments.operators else networks()
    chosen = [n for n in known if re.search(arguments.only, n.name)]
    if arguments.sample is not None:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    if arguments.order == "random":
        random.Random(arguments.seed).shuffle(chosen)
    else:
        chosen.sort(key=lambda network: network.parameters)
    return [
        Cell(network, strategy, engine, arguments.levels)
        for network in chosen
        for engine in arguments.engines
        for strategy in _strategies(network, engine, arguments)
    ]


def _strategies(network: Network, engine: str, arguments: argparse.Namespace) -> list[str]:
    """Those that fit, or --each of them: the same ones whatever else is asked for."""
    fit = [s for s in arguments.strategies if s != "full" or network.parameters <= _SMALL]
    if arguments.each is None:
        return fit
    draw = random.Random(f"{arguments.seed} {network.name} {engine}")
    return draw.sample(fit, min(arguments.each, len(fit)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    listed = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument(
        "--engines", type=listed, default=ENGINES, help=", of " + ", ".join(ENGINES)
    )
    parser.add_argument("--strategies", type=listed, default=STRATEGIES)
    parser.add_argument("--only", default="", help="a pattern that the names of networks hold")
    parser.add_argument(
        "--operators",
        action="store_true",
        help="networks of one operator each, in place of libraries'",
    )
    parser.add_argument("--sample", type=int, help="so many networks, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--each", type=int, help="so many strategies of each network and engine, drawn by --seed"
    )
    parser.add_argument(
        "--order",
        choices=("size", "random"),
        default="size",
        help="small networks first, for the most results; or by --seed, so that whatever is "
        "there when the run stops is a sample",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after the cell that ends later"
    )
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
