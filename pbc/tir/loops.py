"""Write loop nests for a CPU: what each rule of the CPU schedule builds its code from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.prim import IntImm
from tvm.sym import Analyzer
from tvm.tirx.stmt import ForKind

from pbc.tir.stages import Axis, Stage, replace_loads, substitute, variables

# Below this many values, starting threads costs more than it saves.
WORTH_THREADS = 4096
# Tasks per loop over threads: enough for the boards' eight cores.
TASKS = 8


@dataclass(frozen=True)
class Processor:
    """What a schedule must know of a CPU: float lanes of a vector and number of registers."""

    lanes: int
    registers: int

    @classmethod
    def of(cls, target: tvm.target.Target) -> Processor:
        lanes = max(tvm.target.codegen.llvm_get_vector_width(target) // 32, 4)
        triple = str(target.attrs.get("mtriple", ""))
        arm = triple.startswith(("aarch64", "arm64"))
        return cls(lanes, 32 if arm or lanes == 16 else 16)


@dataclass(frozen=True)
class Sink:
    """Where the results of a stage go: its buffer, or the elementwise stage that alone reads it."""

    stage: Stage
    epilogue: Stage | None

    def store(self, indices: Sequence[Any], value: Any) -> Any:
        if self.epilogue is None:
            return tirx.BufferStore(self.stage.buffer, value, list(indices))
        done = replace_loads(self.epilogue.value, self.stage.buffer, lambda _: value)
        axes = (axis.var for axis in self.epilogue.axes)
        done = substitute(done, dict(zip(axes, indices, strict=True)))
        return tirx.BufferStore(self.epilogue.buffer, done, list(indices))


def number(value: Any) -> Any:
    """An index."""
    return IntImm("int64", value) if isinstance(value, int) else value


def loop(
    extent: Any, body: Callable[[Any], Any], kind: ForKind = ForKind.SERIAL, name: str = "i"
) -> Any:
    """A loop; one of extent 1 is its body."""
    extent = plain(extent)
    if isinstance(extent, int) and extent == 1:
        return body(number(0))
    var = tirx.Var(name, "int64")
    return tirx.For(var, number(0), number(extent), kind, body(var))


def nest(
    extents: Sequence[Any],
    body: Callable[[list[Any]], Any],
    kind: ForKind = ForKind.SERIAL,
    name: str = "i",
) -> Any:
    """Loops within loops."""
    if not extents:
        return body([])
    return loop(
        extents[0],
        lambda var: nest(extents[1:], lambda rest: body([var, *rest]), kind, name),
        kind,
        name,
    )


def parallel(extents: Sequence[Any], body: Callable[[list[Any]], Any], work: int) -> Any:
    """One loop over all extents, shared among threads where the work is worth it."""
    extents = [number(extent) for extent in extents]
    total = product(extents)
    kind = ForKind.PARALLEL if work >= WORTH_THREADS else ForKind.SERIAL
    if not extents:
        return body([])
    return loop(total, lambda task: body(unfold(task, extents)), kind, "task")


def sequence(statements: Iterable[Any]) -> Any:
    flat: list[Any] = []
    for statement in statements:
        flat.extend(statement.seq if isinstance(statement, tirx.SeqStmt) else [statement])
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def product(extents: Sequence[Any]) -> Any:
    """The number of points: an int where every extent is known."""
    return reduce(mul, (plain(extent) for extent in extents), 1)


def plain(extent: Any) -> Any:
    """An int where the extent is known at compile time."""
    return int(extent.value) if isinstance(extent, IntImm) else extent


def ceiling(count: Any, step: int) -> Any:
    """How many steps it takes."""
    if isinstance(count, int):
        return -(-count // step)
    return tirx.floordiv(count + (step - 1), number(step))


def unfold(index: Any, extents: Sequence[Any]) -> list[Any]:
    """The indices that one fused index stands for."""
    indices: list[Any] = []
    for position, extent in enumerate(reversed([number(extent) for extent in extents])):
        last = position == len(extents) - 1
        if isinstance(extent, IntImm) and int(extent.value) == 1 and not last:
            indices.append(number(0))
            continue
        indices.append(index if last else tirx.floormod(index, extent))
        index = tirx.floordiv(index, extent)
    return indices[::-1]


def static_size(axes: Sequence[Axis]) -> int:
    """The number of points, unknown extents counted as one."""
    return int(product([axis.length or 1 for axis in axes]))


def static_tail(axes: Sequence[Axis]) -> int:
    """How many of the last axes have extents known at compile time."""
    count = 0
    for axis in reversed(axes):
        if axis.length is None:
            break
        count += 1
    return count


def fused_stride(load: Any, axes: Sequence[Axis]) -> int | None:
    """How far a load moves per step of the fused axes; None where that is not constant."""
    step = tirx.Var("step", "int64")
    analyzer = Analyzer()
    total = product([axis.length for axis in axes])
    analyzer.bind(step, tvm.ir.Range(number(0), number(total)))
    for var in variables(list(load.indices)) - {axis.var for axis in axes}:
        analyzer.bind(var, tvm.ir.Range(number(0), number(1 << 20)))

    def offset(at: Any) -> Any:
        places = dict(zip((a.var for a in axes), unfold(at, [a.extent for a in axes]), strict=True))
        flat: Any = number(0)
        for index, extent in zip(load.indices, load.source.shape, strict=True):
            flat = flat * extent + substitute(index, places)
        return analyzer.simplify(flat)

    moved = analyzer.simplify(offset(step) - offset(number(0)))
    if isinstance(moved, IntImm):
        return 0
    if moved.same_as(step):
        return 1
    ratio = analyzer.simplify(offset(number(1)) - offset(number(0)))
    if isinstance(ratio, IntImm) and analyzer.can_prove_equal(moved, step * ratio):
        return int(ratio.value)
    return None


def local(shape: Sequence[Any], name: str, dtype: str = "float32", scope: str = "local") -> Any:
    """A buffer of one task."""
    return tirx.decl_buffer([number(n) for n in shape], dtype, name=name, scope=scope)


def allocate(buffer: Any) -> Any:
    return tirx.AllocBuffer(buffer)


def vector(lanes: int, body: Callable[[Any], Any]) -> Any:
    return loop(lanes, body, ForKind.VECTORIZED, "lane")


def unrolled(extents: Sequence[int], body: Callable[[list[Any]], Any]) -> Any:
    return nest(extents, body, ForKind.UNROLLED, "u")
