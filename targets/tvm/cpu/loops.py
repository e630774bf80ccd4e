"""Write loop nests for a CPU: what each rule of the CPU schedule builds its code from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.prim import IntImm, Mul
from tvm.sym import Analyzer
from tvm.tirx.stmt import ForKind

from pbc.targets.tvm.cpu.stages import Axis, Stage, replace_loads, substitute, variables

# Below this many values, starting threads costs more than it saves.
WORTH_THREADS = 1 << 15
# Tasks per loop over threads: enough for the boards' eight cores.
TASKS = 8
# The largest value that an open extent is taken to have.
_MANY = 1 << 20


@dataclass(frozen=True)
class Processor:
    """The facts of a CPU that schedules read: float lanes of a vector and number of registers.

    tile: rows and vectors of a register tile, None to decide by the sizes. tasks: the least that a
    loop over threads is cut into.
    """

    lanes: int
    registers: int
    tile: tuple[int, int] | None = None
    tasks: int = TASKS

    @classmethod
    def of(cls, target: tvm.target.Target) -> Processor:
        lanes = max(tvm.target.codegen.llvm_get_vector_width(target) // 32, 4)
        triple = str(target.attrs.get("mtriple", ""))
        arm = triple.startswith(("aarch64", "arm64"))
        return cls(lanes, 32 if arm or lanes == 16 else 16)


@dataclass(frozen=True)
class Sink:
    """The place for a stage's results: its buffer, or the elementwise stage that alone reads it."""

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
    if all(isinstance(extent, IntImm) for extent in extents[1:]):
        return loop(total, lambda task: body(unfold(task, extents)), kind, "task")

    def parts(rest: Any, extents: Sequence[Any], done: list[Any]) -> Any:
        """The indices from the last on, each by a name."""
        if len(extents) == 1:
            return body([rest, *done])
        own = tirx.truncmod(rest, extents[-1])
        further = tirx.truncdiv(rest, extents[-1])
        return bound(
            "index",
            own,
            lambda index: bound(
                "rest", further, lambda rest: parts(rest, extents[:-1], [index, *done])
            ),
        )

    return loop(total, lambda task: parts(task, extents, []), kind, "task")


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


def ceiling(count: Any, step: Any) -> Any:
    """The number of steps."""
    if isinstance(count, int) and isinstance(step, int):
        return -(-count // step)
    if isinstance(step, int):
        return tirx.floordiv(count + (step - 1), number(step))
    # Neither is negative, so that truncation is the floor; TVM takes long to find that out.
    return tirx.truncdiv(number(count) + (step - 1), step)


def least(one: Any, other: Any) -> Any:
    """The smaller of two."""
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return tirx.min(number(one), number(other))


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


def least_size(axes: Sequence[Axis]) -> int:
    """The number of points where what is open is one: an axis may be N times an open one."""
    return int(product([axis.length or _factor(axis.extent) for axis in axes]))


def _factor(extent: Any) -> int:
    if not isinstance(extent, Mul):
        return 1
    numbers = [int(part.value) for part in (extent.a, extent.b) if isinstance(part, IntImm)]
    return numbers[0] if numbers else 1


def static_tail(axes: Sequence[Axis]) -> int:
    """The number of last axes whose extents are known at compile time."""
    count = 0
    for axis in reversed(axes):
        if axis.length is None:
            break
        count += 1
    return count


def fused_stride(load: Any, axes: Sequence[Axis]) -> int | None:
    """The distance that a load moves per step of the fused axes; None where that is not constant.

    The first of them may be open.
    """
    known = static_tail(axes) == len(axes)
    return _stride(load, axes, static_size(axes) if known else _MANY, number(0))


def even_run(load: Any, axes: Sequence[Axis]) -> int | None:
    """The longest pieces of the fused axes in which a load moves on evenly; None for short ones."""
    size = static_size(axes)
    if fused_stride(load, axes) is not None:
        return size
    for run in (size // parts for parts in range(2, size // 8 + 1) if size % parts == 0):
        start = tirx.Var("piece", "int64") * run
        if _stride(load, axes, run, start) is not None:
            return run
    return None


def _stride(load: Any, axes: Sequence[Axis], steps: int, start: Any) -> int | None:
    """The distance that a load moves per step of the fused axes, for N steps from `start`."""
    step = tirx.Var("step", "int64")
    analyzer = Analyzer()
    analyzer.bind(step, tvm.ir.Range(number(0), number(steps)))
    own = {axis.var for axis in axes} | {step}
    extents = [axis.extent for axis in axes]

    def offset(at: Any) -> Any:
        places = dict(zip((axis.var for axis in axes), unfold(start + at, extents), strict=True))
        flat: Any = number(0)
        for place, extent in zip(load.indices, load.source.shape, strict=True):
            flat = flat * extent + substitute(place, places)
        for var in variables(flat) - own - free:
            analyzer.bind(var, tvm.ir.Range(number(0), number(_MANY)))
            free.add(var)
        return analyzer.simplify(flat)

    free: set[Any] = set()
    moved = analyzer.simplify(offset(step) - offset(number(0)))
    if isinstance(moved, IntImm):
        return 0
    if moved.same_as(step):
        return 1
    ratio = analyzer.simplify(offset(number(1)) - offset(number(0)))
    if isinstance(ratio, IntImm) and analyzer.can_prove_equal(moved, step * ratio):
        return int(ratio.value)
    return None


def bound(name: str, value: Any, body: Callable[[Any], Any]) -> Any:
    """Statements that use a value by a name: TVM simplifies it once, not wherever it is used."""
    if isinstance(value, int | IntImm):
        return body(value)
    var = tirx.Var(name, "int64")
    return sequence([tirx.Bind(var, value), body(var)])


def local(shape: Sequence[Any], name: str, dtype: str = "float32") -> Any:
    """A buffer of one task.

    Of less than 1024 bytes it lies on the stack, where LLVM makes registers of it. A larger one is
    memory that LLVM stores to at every step, unless it can prove that nothing else reads there. The
    scope is not "local": TVM gives that the memory, however small.
    """
    return tirx.decl_buffer([number(n) for n in shape], dtype, name=name)


def across(buffer: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """The lanes of a buffer combined in pairs, so that few steps wait for others."""
    parts = [buffer[lane] for lane in range(lanes)]
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [combine(parts[at], parts[at + half]) for at in range(half)]
    return parts[0]


def allocate(buffer: Any) -> Any:
    return tirx.AllocBuffer(buffer)


def vector(lanes: int, body: Callable[[Any], Any]) -> Any:
    return loop(lanes, body, ForKind.VECTORIZED, "lane")
