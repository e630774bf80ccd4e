"""Train one bundle in several ways, epoch by epoch in turn, and print what each took and reached.

    python examples/compare.py model.pbc photos/train photos/test

Whatever else the machine does then slows all of them alike, so the ratios can be trusted where
absolute seconds cannot. A run's time is all of its training (decoding, policy, filling a cache,
checkpoints); evaluation is outside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pbc.data import ImageFolder
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime

WAYS = {
    "PET: the frozen part every time": {"routing": False, "skip": False, "cache": "off"},
    "PET + exact feature cache": {"routing": False, "skip": False, "cache": "ram"},
    "routed, no cache": {"cache": "off"},
    "routed + cache (the default)": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fidelity-floor", type=float, default=TrainOptions().fidelity_floor)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    runtime = Runtime.open(given.bundle)
    photos = ImageFolder.open(given.train, runtime.spec)
    test = ImageFolder.open(given.test, runtime.spec)
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for number, (name, choices) in enumerate(WAYS.items()):
            options = TrainOptions(
                epochs=given.epochs,
                fidelity_floor=given.fidelity_floor,
                learning_rate=given.lr,
                seed=given.seed,
                **choices,
            )
            runs[name] = runtime.trainer(photos, options, Path(folder) / str(number))
            runs[name].prepare()
        reports = {name: [] for name in runs}
        for _ in range(given.epochs):
            for name, run in runs.items():
                reports[name].append(run.run_epoch())
        reached = {name: run.evaluate(test).accuracy for name, run in runs.items()}
    baseline = sum(report.seconds for report in reports[next(iter(WAYS))])
    table = Table("", "accuracy", "seconds", "faster", "visits per level", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, epochs in reports.items():
        seconds = sum(report.seconds for report in epochs)
        visits = [sum(level) for level in zip(*(report.levels for report in epochs), strict=True)]
        shares = " ".join(f"{visit / sum(visits):.0%}" for visit in visits)
        accuracy = f"{reached[name]:.1%}"
        table.add_row(name, accuracy, f"{seconds:.1f}", f"{baseline / seconds:.2f}x", shares)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # whoever reads a pipe wants whole lines
    console.print(f"{len(photos)} photos, {given.epochs} epochs in turn, one process:")
    console.print(table)


if __name__ == "__main__":
    main()
