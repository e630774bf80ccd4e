"""The ONNX Runtime engine: inference, and training by the step graphs that the compiler derived.

All it needs on the device is onnxruntime and numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from pbc.bundle import Bundle
from pbc.bundle.graph_name import BODY, FORWARD, SAVED, GraphName
from pbc.bundle.optimizers import NEW, state_names
from pbc.runtime.engines import NodeTimes, Shapes
from pbc.runtime.engines.alignment import aligned, aligned_copy
from pbc.runtime.engines.derived import DerivedExecutable
from pbc.runtime.engines.onnxruntime.loader import GraphLoader, version
from pbc.runtime.engines.onnxruntime.node_times import needed

# The least of them counts.
_PROFILED_RUNS = 5


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
        self._selected: Collection[str] | None = None

    def foresee(self, inputs: Shapes) -> None:
        self._loader.bounds(str(BODY.at(0))).check(inputs)

    def _run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._loader.graph(name).run(values)

    def _require(self, name: str) -> None:
        self._loader.require(name)

    def select(self, names: Collection[str] | None) -> None:
        if names == self._selected:
            return
        self._selected = names
        self._pending = None
        graphs = [GraphName.parse(name) for name in self._bundle.manifest["graphs"]]
        for level in range(len(self._bundle.manifest["levels"])):
            updates = [str(name) for name in graphs if name.optimizer and name.level == level]
            read: set[str] = set()
            for update in updates:
                read.update(self._loader.select(update, self._moved(update, names)))
            forward = str(FORWARD.at(level))
            answers = [
                output
                for output in self._loader.outputs(forward)
                if not output.startswith(SAVED) or output in read
            ]
            self._loader.select(forward, None if names is None else answers)

    def node_times(self) -> NodeTimes:
        assert self._pending is not None, "node_times() follows forward()"
        level, values = self._pending
        name = self._update_name(level)
        given = {**values, **self._scalars(), **self._theta, **self._moments}
        node_ms, operators = self._loader.profiled(name, given, _PROFILED_RUNS)
        owners = {NEW + state: parameter for state, parameter in self._state_names()}
        owners |= {NEW + parameter: parameter for parameter in self._theta}
        outputs = {output: owners[output] for output in self._loader.outputs(name)}
        return NodeTimes(node_ms, needed(operators, outputs))

    def _state_names(self) -> list[tuple[str, str]]:
        return state_names(self._objective.optimizer, self._theta)

    def _moved(self, update: str, names: Collection[str] | None) -> list[str] | None:
        """Return which of an update's outputs are of these parameters."""
        if names is None:
            return None
        optimizer = GraphName.parse(update).optimizer or ""
        state = [name for name, _ in state_names(optimizer, names)]
        wanted = {NEW + name for name in (*names, *state)}
        return [output for output in self._loader.outputs(update) if output in wanted]

    def _feature(self, value: np.ndarray) -> Any:
        return aligned(value)

    def _kept(self, value: np.ndarray) -> Any:
        # The OrtValue holds on to its memory.
        return OrtValue.ortvalue_from_numpy(aligned_copy(value, np.float32))
