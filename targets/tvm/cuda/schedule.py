"""Give every function of a TVM module a schedule for a CUDA GPU.

A function without one is a loop nest of the host, which no GPU runs. TVM's own rules (dlight) do
it without tuning: tiles in shared memory for what is a matrix product or a convolution, threads
that share a reduction, one thread per output for the rest.

    before                                       after
    for i, j, k in grid(m, n, l):                for by in thread_binding("blockIdx.y"): ...
        C[i, j] += A[i, k] * B[k, j]                 for tx in thread_binding("threadIdx.x"): ...
    for i, j in grid(m, n):                              A_shared[...] = A[...]
        D[i, j] = relu(C[i, j] + b[j])                   C_local[...] += A_shared * B_shared
                                                         D[...] = relu(C_local[...] + b[...])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tvm
from tvm import tirx
from tvm.s_tir.dlight import gpu

from pbc.targets.tvm.cuda import cubin
from pbc.targets.tvm.schedule_attributes import (
    INSTEAD_OF,
    IS_SCHEDULED,
    REFUSAL,
    RULE,
    functions,
    is_scheduled,
)
from pbc.util.progress import report


@dataclass(frozen=True)
class ScheduleGpu:
    """Schedule each function by the first rule that knows it, and whose result TVM can build.

    The rule for matrix products raises on a 1×1 convolution fused with the multiplication that
    broadcasts it over an image, as in squeeze-and-excitation; such a function gets one thread
    per output, and says so. Functions that are scheduled already stay as they are.
    """

    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    rules: ClassVar[tuple[Any, ...]] = (
        gpu.Matmul(),
        gpu.GEMV(),
        gpu.Reduction(),
        gpu.GeneralReduction(),
        gpu.Transpose(),
        gpu.Fallback(),
    )

    def __call__(self, module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
        """Return the module with its functions scheduled; the input stays unchanged."""
        pending = [
            (module.get_global_var(name), function)
            for name, function in functions(module).items()
            if not is_scheduled(function)
        ]
        scheduled = {}
        for done, (variable, function) in enumerate(pending, 1):
            found = self._schedule(function, target)
            if found is not None:
                scheduled[variable] = found
            report("schedule-gpu", done / len(pending), variable.name_hint)
        result = module.clone()
        result.update(tvm.IRModule(scheduled))
        return result

    def _schedule(self, function: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
        raised = {}
        for rule in self.rules:
            name = type(rule).__name__
            try:
                with target:
                    schedule = rule.apply(function, target, False)
                if schedule is None:
                    continue
                found = schedule[0] if isinstance(schedule, list) else schedule
                result = found.mod["main"].with_attr(IS_SCHEDULED, True)
                _build(result, target)
            except Exception as error:  # a rule says by any kind of error what it cannot do
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raised[name] = reason[-1].strip()
                continue
            attributes = {RULE: name}
            if raised:
                attributes[INSTEAD_OF] = ", ".join(raised)
                attributes[REFUSAL] = "; ".join(f"{rule}: {why}" for rule, why in raised.items())
            return result.with_attrs(attributes)
        return None


schedule_gpu = ScheduleGpu()


def _build(function: tirx.PrimFunc, target: tvm.target.Target) -> None:
    """Build a scheduled function alone, which shows what its rule did not see.

    The rule for reductions over many axes keeps a whole row in registers, say, and fails here
    where the number of images, which is open, is in the row.
    """
    with cubin.source_kept():
        tirx.build(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
