"""pbc: a compiler and a runtime for personalising pretrained networks on the device."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbc.compiler import CompileOptions as CompileOptions
    from pbc.compiler import compile as compile
    from pbc.model import Model as Model
    from pbc.model import load as load

__version__ = "0.1.0"

# Loaded on first use: a device that only trains has no compiler.
_HOMES = {
    "CompileOptions": "pbc.compiler",
    "Model": "pbc.model",
    "compile": "pbc.compiler",
    "load": "pbc.model",
}
__all__ = ["CompileOptions", "Model", "__version__", "compile", "load"]
# onnxruntime makes a database in the home folder and reports to its maker, unless it is told not to
# before it is imported; what pbc starts inherits it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# numpy's OpenBLAS keeps its threads busy for 2^26 cycles after each product, on cores that the
# engine's next call needs: with sums for a head between calls, MobileNetV3 took 1.4 times as long.
# Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pbc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
