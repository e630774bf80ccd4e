"""Depthwise convolutions: each map on its own, all its pixels in one row of vectors.

A map is copied with its border into a scratch, one scratch for each phase of the stride, in which a
step down is always the same number of values, the `pitch`. There, what a weight is multiplied with
lies for all results next to each other, from end to end of the map: a vector takes no notice of
where a row ends. It computes a few values between the rows, which nobody stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.ir.prim import FloatImm, IntImm
from tvm.sym import Analyzer

from pbc.targets.tvm.cpu.loops import (
    Processor,
    Sink,
    allocate,
    ceiling,
    local,
    loop,
    number,
    parallel,
    sequence,
    static_size,
    vector,
)
from pbc.targets.tvm.cpu.pads import Padding
from pbc.targets.tvm.cpu.simple import chunks
from pbc.targets.tvm.cpu.stages import Stage, is_product, loads, substitute, variables

# Values of a scratch: what half of a first cache holds.
SCRATCH = 4096
# Maps per task: they share a scratch whose border is cleared once.
MAPS = 16
# More weights than these would make a long program of a rare layer.
MOST_TAPS = 81


@dataclass(frozen=True)
class Steps:
    """The index of a read, as it follows an axis of the result and one of the kernel."""

    size: int
    kernel: int
    stride: int
    dilation: int

    def tap(self, at: int) -> tuple[int, int]:
        """The phase that a weight reads, and how many steps further."""
        return at * self.dilation % self.stride, at * self.dilation // self.stride

    @property
    def phases(self) -> int:
        return min(self.stride, 1 + max(self.tap(at)[0] for at in range(self.kernel)))

    def reach(self, size: int) -> int:
        """The length of a phase that holds what N results read."""
        return size + max(self.tap(at)[1] for at in range(self.kernel))


@dataclass(frozen=True)
class Maps:
    """A depthwise convolution: what is read, the weight, and the steps down and across."""

    stage: Stage
    source: Any
    weight: Any
    down: Steps
    across: Steps


def read_maps(stage: Stage) -> Maps | None:
    """Read a stage as a depthwise convolution; None where it is none."""
    if not is_product(stage) or len(stage.axes) != 4:
        return None
    if any(str(load.source.dtype) != "float32" for load in loads(stage.value)):
        return None
    first, second = stage.value.a, stage.value.b
    channel, *pixel = (axis.var for axis in stage.axes[1:])
    kernel = [axis for axis in stage.reduced if axis.length != 1]
    single = {a.var: number(0) for a in (*stage.axes, *stage.reduced) if a.length == 1}
    if len(kernel) != 2:
        return None
    for source, weight in ((first, second), (second, first)):
        used = variables(list(weight.indices))
        if used & {stage.axes[0].var, *pixel} or not {a.var for a in kernel} <= used:
            continue
        if len(source.indices) != 4:
            continue
        analyzer = Analyzer()
        image, own, row, column = (
            analyzer.simplify(substitute(index, single)) for index in source.indices
        )
        batch = single.get(stage.axes[0].var, stage.axes[0].var)
        if not _equal(image, batch) or not _equal(own, single.get(channel, channel)):
            continue
        down = _steps(row, stage.axes[2], kernel[0])
        wide = _steps(column, stage.axes[3], kernel[1])
        if down is not None and wide is not None and down.kernel * wide.kernel <= MOST_TAPS:
            return Maps(stage, source, weight, down, wide)
    return None


def _equal(one: Any, other: Any) -> bool:
    return bool(Analyzer().can_prove_equal(one, other))


def _steps(index: Any, axis: Any, kernel: Any) -> Steps | None:
    if axis.length is None or kernel.length is None:
        return None
    analyzer = Analyzer()

    def at(place: int, tap: int) -> int | None:
        found = analyzer.simplify(
            substitute(index, {axis.var: number(place), kernel.var: number(tap)})
        )
        return int(found.value) if isinstance(found, IntImm) else None

    start, stride, dilation = at(0, 0), at(1, 0), at(0, 1)
    if start != 0 or not stride or not dilation or stride < 0 or dilation < 0:
        return None
    if not _equal(index, axis.var * stride + kernel.var * dilation):
        return None
    return Steps(axis.length, kernel.length, stride, dilation)


def depthwise(
    stage: Stage, sink: Sink, processor: Processor, padding: Padding | None = None
) -> Any:
    """Maps in rows of vectors; a padding that only they read is part of their copy."""
    maps = read_maps(stage)
    if maps is None:
        return None
    if padding is not None:
        border = padding.border
        if not maps.source.source.same_as(padding.stage.buffer):
            return None
        if not isinstance(border, FloatImm) or border.value != 0 or any(padding.bounds[:2]):
            return None
    return _Writer(sink, processor, maps, padding).write()


@dataclass(frozen=True)
class _Writer:
    sink: Sink
    processor: Processor
    maps: Maps
    padding: Padding | None

    @property
    def pitch(self) -> int:
        return self.maps.across.reach(self.maps.across.size)

    @property
    def planes(self) -> int:
        return self.maps.down.phases * self.maps.across.phases

    @property
    def rows(self) -> int:
        """Rows of results that one scratch is for."""
        size = self.maps.down.size
        fitting = SCRATCH // (self.planes * self.pitch) - self.maps.down.reach(0)
        return -(-size // -(-size // max(fitting, 1)))

    def write(self) -> Any:
        stage = self.maps.stage
        blocks = ceiling(self.maps.down.size, self.rows)
        images, channels = stage.axes[0].extent, stage.axes[1].length
        together = 1
        if channels is not None:
            most = max(1, min(MAPS, channels * blocks // self.processor.tasks))
            together = next(n for n in range(most, 0, -1) if channels % n == 0)
            channels //= together
        return parallel(
            [images, stage.axes[1].extent if channels is None else channels, blocks],
            lambda at: self.task(at[0], at[1] * together, together, at[2] * self.rows),
            static_size(stage.axes) * static_size(stage.reduced),
        )

    def task(self, image: Any, first: Any, together: int, top: Any) -> Any:
        lanes = self.processor.lanes
        length = (self.rows - 1) * self.pitch + self.maps.across.size
        needed = -(-length // lanes)
        parts = -(-needed // (8 if self.processor.registers == 32 else 6))
        vectors = -(-needed // parts)
        furthest = self.maps.down.reach(0) * self.pitch + self.maps.across.reach(0)
        plane = max(
            self.maps.down.reach(self.rows) * self.pitch, parts * vectors * lanes + furthest
        )
        plane = -(-plane // lanes) * lanes
        scratch = local([self.planes * plane], "scratch")
        results = local([parts * vectors * lanes], "results")
        zero = tirx.const(0, "float32")

        def one(channel: Any) -> Any:
            return sequence(
                [
                    *self.fill(scratch, plane, image, channel, top),
                    loop(
                        parts,
                        lambda part: self.multiply(
                            scratch, plane, results, channel, part * vectors * lanes, vectors
                        ),
                        name="part",
                    ),
                    self.store(results, image, channel, top),
                ]
            )

        return sequence(
            [
                allocate(scratch),
                allocate(results),
                loop(
                    self.planes * plane // lanes,
                    lambda at: vector(
                        lanes, lambda lane: tirx.BufferStore(scratch, zero, [at * lanes + lane])
                    ),
                ),
                loop(together, lambda own: one(first + own), name="own"),
            ]
        )

    def fill(self, scratch: Any, plane: int, image: Any, channel: Any, top: Any) -> list[Any]:
        """Copy a map, each phase by itself; what is border is left as it is."""
        down, across = self.maps.down, self.maps.across
        stage = self.maps.stage if self.padding is None else self.padding.stage
        low, high = self.bounds(2)
        left, right = self.bounds(3)
        statements = []

        def put(place: int, row: Any, column: Any, down_phase: int, across_phase: int) -> Any:
            y, x = (top + row) * down.stride + down_phase, column * across.stride + across_phase
            if self.padding is None:
                value = self.maps.source.source[image, channel, y, x]
            else:
                inside = replace(stage, value=self.padding.inside)
                value = inside.at([image, channel, y, x])
            return tirx.BufferStore(scratch, value, [row * self.pitch + column + place])

        for down_phase in range(down.phases):
            for across_phase in range(across.phases):
                place = (down_phase * across.phases + across_phase) * plane
                start = max(0, -(-(left - across_phase) // across.stride))
                end = min(self.pitch, -(-(right - across_phase) // across.stride))

                def copy(
                    row: Any, place: int = place, start: int = start, end: int = end,
                    phases: tuple[int, int] = (down_phase, across_phase),
                ) -> Any:  # fmt: skip
                    def one(at: Any) -> Any:
                        return put(place, row, at + start, *phases)

                    if across.stride > 1:
                        copied = loop(end - start, one)
                    else:
                        copied = chunks(end - start, self.processor, one)
                    y = (top + row) * down.stride + phases[0]
                    return tirx.IfThenElse(tirx.all(y >= low, y < high), copied, None)

                if end > start:
                    statements.append(loop(down.reach(self.rows), copy, name="row"))
        return statements

    def bounds(self, axis: int) -> tuple[int, int]:
        """The part of an axis along which there is something to read."""
        if self.padding is None:
            return 0, int(self.maps.source.source.shape[axis].value)
        length = self.padding.stage.axes[axis].length
        return self.padding.bounds[axis] or (0, length or 0)

    def multiply(
        self, scratch: Any, plane: int, results: Any, channel: Any, start: Any, vectors: int
    ) -> Any:
        """All weights times some vectors of the map."""
        lanes = self.processor.lanes
        down, across = self.maps.down, self.maps.across
        sums = [local([lanes], "sums") for _ in range(vectors)]

        def each(body: Callable[[Any, Any], Any]) -> Any:
            return sequence(
                vector(lanes, lambda lane, at=at: tirx.BufferStore(*body(at, lane)))  # type: ignore[misc]
                for at in range(vectors)
            )

        def tap(row: int, column: int) -> Any:
            (down_phase, below), (across_phase, beside) = down.tap(row), across.tap(column)
            place = (down_phase * across.phases + across_phase) * plane
            place += below * self.pitch + beside
            weight = self.weight(channel, row, column)
            return each(
                lambda at, lane: (
                    sums[at],
                    sums[at][lane] + weight * scratch[start + place + at * lanes + lane],
                    [lane],
                )
            )

        zero = tirx.const(0, "float32")
        return sequence(
            [
                *(allocate(one) for one in sums),
                each(lambda at, lane: (sums[at], zero, [lane])),
                *(
                    tap(row, column)
                    for row in range(down.kernel)
                    for column in range(across.kernel)
                ),
                each(lambda at, lane: (results, sums[at][lane], [start + at * lanes + lane])),
            ]
        )

    def weight(self, channel: Any, row: int, column: int) -> Any:
        stage = self.maps.stage
        kernel = [axis for axis in stage.reduced if axis.length != 1]
        places = {axis.var: number(0) for axis in stage.reduced}
        places.update({stage.axes[1].var: channel})
        places.update({kernel[0].var: number(row), kernel[1].var: number(column)})
        return substitute(self.maps.weight, places)

    def store(self, results: Any, image: Any, channel: Any, top: Any) -> Any:
        size = self.maps.down.size

        def line(row: Any) -> Any:
            stored = chunks(
                self.maps.across.size,
                self.processor,
                lambda at: self.sink.store(
                    [image, channel, top + row, at], results[row * self.pitch + at]
                ),
            )
            if size % self.rows == 0:
                return stored
            return tirx.IfThenElse(top + row < size, stored, None)

        return loop(self.rows, line, name="row")
