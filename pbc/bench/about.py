"""Facts about the bundle and the machine of a bench, shown beside its figures."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import pbc
from pbc.runtime.runtime import Runtime
from pbc.util.processor import cpu_name


def about_bundle(runtime: Runtime, path: Path, classes: int) -> dict[str, Any]:
    """Return the facts about the bundle; `classes` sizes an open head."""
    manifest = runtime.bundle.manifest
    return {
        "name": path.name,
        "digest": runtime.bundle.digest,
        "model": manifest["model"],
        "strategy": manifest["strategy"],
        "engine": f"{manifest['engine']} ({runtime.engine.version()})",
        "input": "x".join(str(side) for side in manifest["input"]["shape"]),
        "cost_model": manifest.get("cost_model", "macs"),
        "trained_values": sum(
            math.prod(size or classes for size in shape)
            for shape in manifest["parameters"].values()
        ),
    }


def about_machine(threads: int | None) -> dict[str, Any]:
    """Return the facts about this machine and the process that measures."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads if threads is not None else os.environ.get("OMP_NUM_THREADS", "default"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pbc": pbc.__version__,
    }
