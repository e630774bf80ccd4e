"""What the tests of deploys share: a bundle with a self-test, and wheels that need no index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_onnx
import wheelhouse

from pbc import bundle
from pbc.bundle import Bundle
from pbc.runtime import self_test
from pbc.runtime.engines.onnxruntime import OnnxRuntimeEngine

RUNTIME = ("pip", "click", "numpy", "onnxruntime", "pillow", "rich", "safetensors")
RATE = 0.5


def wheels(folder: Path) -> Path:
    return wheelhouse.fill(folder, RUNTIME)


def write(path: Path, number: int = 0, **changes: Any) -> Bundle:
    """Write a bundle whose self-test has what the engine finds here; each number is another one."""
    manifest, files = tiny_onnx.contents("probe", class_count=3)
    manifest["requires"] = {"python": ">=3.10", "onnxruntime": ">=1.20"}
    manifest["provenance"] = {"number": number}
    plain = bundle.write(path, manifest, files)
    executable = OnnxRuntimeEngine().load(plain)
    levels = {}
    for level in (0, 2):
        before, after = self_test.losses(executable, plain, level, RATE)
        levels[str(level)] = {
            "learning_rate": RATE,
            "before": before.tolist(),
            "after": after.tolist(),
            "tolerance": 0.02,
        }
    fidelity = executable.policy(self_test.views(manifest["policy"]["view"]))
    manifest["self_test"] = {
        "levels": levels,
        "policy": {"fidelity": np.asarray(fidelity).tolist(), "tolerance": 1e-3},
    }
    return bundle.write(path, {**manifest, **changes}, files)
