"""A network of one file, compiled in seconds: what the tests of `pbc bench` train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny

from pbc import compiler
from pbc.bundle import Bundle

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        )
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.stem(x).mean((2, 3))))


def factory(num_classes=10):
    return Net(num_classes)
"""
BATCH = 4


def photos(root: Path) -> Path:
    """Write train/ and test/ of three colours: 30 and 18 photos."""
    tiny.photos(root / "train", 10)
    tiny.photos(root / "test", 6, seed=1)
    return root


def compiled(folder: Path, strategy: str = "linear-probe", levels: int = 0) -> Bundle:
    """Compile the network with random weights; with `levels` also align, on a few photos."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "bench_example_net.py"
    source.write_text(SOURCE)
    calibration = tiny.photos(folder / "calibration", 20, seed=2) if levels else None
    options = compiler.CompileOptions(
        # Not this machine's own: nothing is measured, so a busy one plans the same ladder.
        target="generic-x86-64",
        engine="pytorch",
        weights="random",
        shape=(3, 16, 16),
        strategy=strategy,
        levels=levels,
        calibration=calibration,
        align_steps=2 if levels else None,
        batch=BATCH,
    )
    return compiler.compile(f"{source}:factory", folder / f"{strategy}-{levels}.pbc", options)


def stop_after(cells: int) -> Callable[[str], None]:
    """Return a receiver of lines that interrupts once N epochs (`cells`) were told."""
    told = 0

    def tell(line: str) -> None:
        nonlocal told
        told += line.startswith("seed ")
        if told == cells:
            raise KeyboardInterrupt

    return tell
