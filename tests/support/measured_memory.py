"""What a training takes on ONNX Runtime beside what the manifest expects, in MB (10⁶ bytes).

    python tests/support/measured_memory.py BUNDLE… [--optimizer adam]

Each is measured in a process of its own: its peak while it trains, less what it had when it had
loaded the step's graphs. Run it twice: the first time, graphs are optimised in that process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import click

STEPS = 12
"""By then the pool of no network grows any more."""


def measured_bytes(bundle: Path, optimizer: str) -> int:
    """Return what the training of a bundle takes, in a new process."""
    command = [sys.executable, __file__, "--here", "--optimizer", optimizer, str(bundle)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(ran.stdout)


def _here(path: Path, optimizer: str) -> int:
    """Train in this process, with photos that are all alike."""
    import numpy as np

    from pbc.bundle import Bundle
    from pbc.profile.memory import forget_peak, peak_above
    from pbc.runtime.allocator import keep_freed_memory
    from pbc.runtime.engines.alignment import aligned
    from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
    from pbc.runtime.objective import Objective

    keep_freed_memory()  # as a training does
    bundle = Bundle.open(path)
    batch, classes = bundle.manifest["batch"], _classes(bundle.manifest, optimizer)
    features = {
        name: aligned(np.ones((batch, *sizes), np.float32))
        for name, sizes in bundle.manifest["features"].items()
    }
    theta = {
        name: np.full([classes if size is None else size for size in sizes], 0.01, np.float32)
        for name, sizes in bundle.manifest["parameters"].items()
    }
    executable = OnnxRuntimeEngine().load(bundle, threads=1)
    for name in ("forward/0", f"update/0/{optimizer}"):
        executable._loader.graph(name)
    before = forget_peak()
    assert before is not None
    executable.start(theta, Objective(optimizer=optimizer))
    for _ in range(STEPS):
        executable.forward(0, features, np.zeros(batch, np.int64))
        executable.update()
    held: int = sum(value.nbytes for value in features.values())
    return held + peak_above(before)


def _classes(manifest: dict[str, Any], optimizer: str) -> int:
    """Return for how many classes the manifest tells what is expected."""
    shapes = manifest["parameters"].values()
    fixed: int = sum(prod(shape) for shape in shapes if None not in shape)
    of_class: int = sum(prod(shape[1:]) for shape in shapes if None in shape)
    values: int = manifest["memory"][optimizer]["parameters_bytes"] // 4
    return (values - fixed) // max(of_class, 1)


def main() -> None:
    """Print a row for each bundle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--here", action="store_true")
    given = parser.parse_args()
    if given.here:
        click.echo(_here(given.bundles[0], given.optimizer))
        return
    from pbc.bundle import Bundle

    click.echo(f"{'bundle':32}  expected  measured  error")
    for path in given.bundles:
        expected = Bundle.open(path).manifest["memory"][given.optimizer]["peak_bytes"]
        measured = measured_bytes(path, given.optimizer)
        error = expected / measured - 1
        click.echo(f"{path.name:32}  {expected / 1e6:8.1f}  {measured / 1e6:8.1f}  {error:+.0%}")


if __name__ == "__main__":
    main()
