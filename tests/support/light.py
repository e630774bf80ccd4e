"""A tiny bundle for ONNX Runtime: what a device without a training framework trains."""

from __future__ import annotations

from pathlib import Path

import bench_net

from pbc import compiler

HEAVY = frozenset(("onnx", "onnxscript", "sympy", "torch", "torch_pruning"))
"""What the compiler needs, and a device with ONNX Runtime does without."""


def compiled(folder: Path, examples: Path) -> Path:
    """Compile a network of two convolutions with one proxy, aligned on a few photos."""
    folder.mkdir(exist_ok=True)
    source = folder / "light_example_net.py"
    source.write_text(bench_net.SOURCE)
    options = compiler.CompileOptions(
        # Not this machine's own: nothing is measured, so a busy one plans the same ladder.
        target="generic-x86-64",
        engine="onnxruntime",
        weights="random",
        shape=(3, 32, 32),
        data=examples / "photos" / "train",
        levels=1,
        calibration=examples / "calibration",
        align_steps=2,
        ladder="even",  # two steps make no level that a run would use
        batch=8,
    )
    return compiler.compile(f"{source}:factory", folder / "light.pbc", options).path
