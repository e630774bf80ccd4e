"""The ONNX Runtime engine: inference, and training by the step graphs that the compiler derived.

All it needs on the device is onnxruntime and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from pbc.bundle import Bundle
from pbc.runtime.engines.alignment import aligned
from pbc.runtime.engines.derived import DerivedExecutable
from pbc.runtime.engines.onnxruntime.loader import GraphLoader, version


class OnnxRuntimeEngine:
    """Run bundles with ONNX Runtime."""

    name = "onnxruntime"

    def version(self) -> str:
        return version()

    def load(self, bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeExecutable:
        return OnnxRuntimeExecutable(bundle, threads)


class OnnxRuntimeExecutable(DerivedExecutable):
    """A bundle's graphs, each loaded when it is first run."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle)
        self._loader = GraphLoader(bundle, threads)

    def _run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._loader.graph(name).run(values)

    def _require(self, name: str) -> None:
        self._loader.require(name)

    def _feature(self, value: np.ndarray) -> Any:
        return aligned(value)

    def _kept(self, value: np.ndarray) -> Any:
        # The OrtValue holds on to its memory.
        return OrtValue.ortvalue_from_numpy(aligned(np.array(value, np.float32)))
