"""Sessions of onnxruntime: with which options and providers, how one is run, and how one fails."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import ExecutionOrder, GraphOptimizationLevel, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.runtime.engines.alignment import aligned
from pbc.runtime.engines.bounds import CheckedCalls
from pbc.runtime.engines.onnxruntime.bounds import Bounds
from pbc.runtime.engines.onnxruntime.declared import Shape
from pbc.util.processor import cores

CPU = "CPUExecutionProvider"
ERRORS = (
    failures.EPFail,
    failures.EngineError,
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
)
"""Exceptions of onnxruntime; the classes have no base of their own."""


class SessionGraph:
    """A session, called by names; `title` names its graph in what a user reads.

    bounds: of its graph, checked before calls of more photos than there were before.
    """

    def __init__(self, session: Any, title: str, bounds: Bounds) -> None:
        self._session = session
        self._title = title
        self._bounds = bounds
        self._calls = CheckedCalls()
        self._growing = [entry.name for entry in session.get_inputs() if bounds.grows(entry.name)]
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._outputs = [entry.name for entry in session.get_outputs()]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Feed what the graph reads, arrays or OrtValues; return its outputs as OrtValues.

        The binding is a new one each time: a used one would write into the outputs that it gave.
        """
        if unknown := [name for name in self._inputs if name not in values]:
            raise PbcError(
                f"{self._title} reads {unknown[0]!r}, which this pbc does not know: upgrade pbc"
            )
        self._require(values)
        binding = self._session.io_binding()
        held = []  # a bound array is read where it is
        for name in self._inputs:
            value = values[name]
            if isinstance(value, np.ndarray):
                held.append(aligned(value))
                binding.bind_cpu_input(name, held[-1])
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except failures.RuntimeException as error:
            if "allocat" not in str(error):
                raise
            raise PbcError(
                f"not enough memory for {self._title}: a smaller --batch needs less"
            ) from error
        # Each output keeps the binding alive: new parameters would hold on to all that their step
        # had saved, until the next step is over.
        binding.clear_binding_inputs()
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _require(self, values: Mapping[str, Any]) -> None:
        """Raise PbcError where the call would take too much."""

        def check() -> None:
            shapes = {name: _shape(values[name]) for name in self._inputs}
            self._bounds.check(shapes)
            self._bounds.check_call(shapes)

        rows = (_shape(values[name])[:1] for name in self._growing)
        self._calls.require(sum(map(sum, rows)), check)


def _shape(value: Any) -> Shape:
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())


def session_options(threads: int | None, optimised: bool = False) -> Any:
    """Return the options of every session, which runs on N threads, or one for each core.

    optimised: the graph was saved by a session that had optimised it.
    """
    options = SessionOptions()
    options.log_severity_level = 4  # errors are raised; it would say them a second time
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    # In an order in which a gradient is used up before the next one is made, as graphs are saved.
    # One that is optimised here has its fused operators at the end, so that in its own order all
    # that they read is made first: a step of convolutions took twice as much memory.
    if optimised:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ExecutionOrder.PRIORITY_BASED
    # A plan takes one block per graph and size of batch, which serves nothing else. Nor is a tensor
    # kept for a later one of its size: the pool has it for whoever is next.
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    # A session that waits would keep its cores busy, and slow whatever runs beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if _shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _shared_arena() -> bool:
    """Have one pool of memory for the activations of all sessions; False if it cannot be.

    They run one after the other: four networks in turn hold 146 MB so, and 322 MB in pools of
    their own. Shrinking the pool after each run made it hold more.
    """
    info = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    same_as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
    try:
        onnxruntime.create_and_register_allocator(info, same_as_requested)
    except (*ERRORS, RuntimeError):  # another user of onnxruntime in this process has one
        return False
    return True


def providers(bundle: Bundle) -> tuple[str, ...]:
    """Return the target's execution providers that this onnxruntime has, in its order."""
    tags = (bundle.manifest.get("target") or {}).get("tags") or {}
    wanted = [name.strip() for name in tags.get("onnxruntime_providers", "").split(",")]
    available = onnxruntime.get_available_providers()
    found = [name for name in wanted if name in available and name != CPU]
    return (*found, CPU)
