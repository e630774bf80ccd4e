"""Measure what a sample costs at each level on this device, before training, on its own samples.

Measuring may take no more than a small share of the run it serves. The first chunk at level 0 is
timed in any case and its features are kept, so that it is work that counts. Within the share the
other levels are timed, those that promise most first; what is left keeps the ratio to level 0 that
the bundle's ladder gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import numpy as np

from pbc.bundle.ladder import Ladder
from pbc.runtime.costs import Costs, LevelCost
from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.features.source import Made

# Of the time that the run would take at level 0.
_SHARE = 0.05
_REPEATS = 2
# Batches per prefix call: what is assumed, and what is tried beside it. A larger call needs memory
# in proportion; a smaller one leaves a CPU's vector units waiting: in bfloat16, MobileNetV3 needs
# 0.9 ms per image in calls of 16, and 0.6 in calls of 32.
_USUAL_AHEAD = 4
_OTHER_AHEAD = (2, 8)
# The first call of a shape takes N times as long as the next: engines specialise their code.
_COLD = 4
# Values of features that are gathered to time it: 64 MiB.
_MOST_GATHERED = 1 << 24


@dataclass(frozen=True)
class CostProfiler:
    """Measurements of one run.

    images: number to f32[number, 3, H, W], views as the run's epochs show them. labels: int64[n].
    levels: those the run may use. batch: samples per mini-batch. chunk: samples per prefix call,
    None to choose; at most `most`. computed: how often the run would make a sample's features.
    epochs: how often it would learn from a sample. prefix, bodies: whether there is a prefix, one
    body per level. width: values in a sample's features. kept: takes the features of the first
    chunk, see Features.
    """

    executable: Executable
    images: Callable[[int], np.ndarray]
    labels: np.ndarray
    ladder: Ladder
    levels: Sequence[int]
    batch: int
    chunk: int | None
    most: int
    computed: int
    epochs: int
    prefix: bool
    bodies: bool
    width: int
    kept: Made = field(default_factory=dict)

    def measure(self) -> Costs:
        """Time level 0 and the cheapest other, and what else the share allows.

        The executable's parameters change.
        """
        count = len(self.labels)
        wanted = min(self.chunk or _USUAL_AHEAD * self.batch, self.most)
        usual = evened(wanted, count) if self.prefix else self.batch
        begin = perf_counter()
        images = self.images(max(usual, self.batch))
        decode_ms = (perf_counter() - begin) * 1e3 / len(images)
        first, loading_seconds, spent_seconds = self._first(images, usual)
        known = {0: first}
        run_ms = count * (
            self.computed * (decode_ms + first.prefix_ms) + self.epochs * first.body_ms
        )
        end = perf_counter() + run_ms * 1e-3 * _SHARE - spent_seconds
        for level in sorted(set(self.levels) - {0}, key=self._ratio):
            calls_ms = first.prefix_ms * self._ratio(level) * usual * (_REPEATS + 1)
            bodies_ms = first.body_ms * self.batch * (_REPEATS + 1) if self.bodies else 0.0
            if perf_counter() + loading_seconds + (calls_ms + bodies_ms) * 1e-3 > end:
                break
            # Level 0 again, in turn: what else the device does strikes both alike.
            known |= self._timed([0, level] if len(known) == 1 else [level], images, usual, first)
        first = known[0]
        best = min(known, key=lambda level: known[level].prefix_ms)
        # Level 0 too: it is what `best` has to beat, in calls of the size that suits it.
        both = sorted({0, best})
        for chunk in self._other_chunks(usual, count):
            calls_ms = sum(known[level].prefix_ms for level in both) * (_REPEATS + _COLD)
            if perf_counter() + (decode_ms + calls_ms) * 1e-3 * chunk > end:
                break
            images = images if chunk <= len(images) else self.images(chunk)
            for level, prefix_ms in self._prefix(both, images[:chunk])[1].items():
                if prefix_ms < known[level].prefix_ms:
                    known[level] = replace(known[level], prefix_ms=prefix_ms, chunk=chunk)
        return Costs(
            tuple(self._known_or_scaled(level, known) for level in range(len(self.ladder))),
            decode_ms,
            self._gather_ms(),
            0.0,
        )

    def _first(self, images: np.ndarray, usual: int) -> tuple[LevelCost, float, float]:
        """Time level 0 on the first chunk, whose features are kept for the run.

        Returns its cost, what loading a level takes, and what was spent on measuring alone, both in
        seconds.
        """
        loading = spent = prefix_ms = 0.0
        if self.prefix:
            loading = _seconds(lambda: self.executable.prefix(0, images[:1]))
        begin = perf_counter()
        features = self.executable.prefix(0, images[:usual])
        if self.prefix:
            prefix_ms = (perf_counter() - begin) * 1e3 / usual
            self.kept[0, np.arange(usual).tobytes()] = features
        begin = perf_counter()
        if usual < self.batch:  # a mini-batch is more than a chunk
            features = self.executable.prefix(0, images)
        forward_ms, backward_ms = self._body_ms(0, features, repeats=1)
        spent = perf_counter() - begin + prefix_ms * 1e-3
        return LevelCost(prefix_ms, usual, forward_ms, backward_ms, True), loading, spent

    def _timed(
        self, levels: list[int], images: np.ndarray, chunk: int, shared: LevelCost | None
    ) -> dict[int, LevelCost]:
        """Time levels; `shared` has the body's times where all levels share one."""
        features, calls_ms = self._prefix(levels, images[:chunk])
        timed = {}
        for level in levels:
            if shared is None or self.bodies:
                made = features[level]
                if chunk < self.batch:
                    made = self.executable.prefix(level, images)
                forward_ms, backward_ms = self._body_ms(level, made)
                timed[level] = LevelCost(calls_ms[level], chunk, forward_ms, backward_ms, True)
                shared = timed[level]
            else:
                timed[level] = replace(shared, prefix_ms=calls_ms[level])
        return timed

    def _prefix(
        self, levels: list[int], images: np.ndarray
    ) -> tuple[dict[int, Arrays], dict[int, float]]:
        """Return every level's features, and its milliseconds per image.

        The levels run in turn, so that what else the device does strikes them alike.
        """
        # The first call loads, and warms up for this shape.
        features: dict[int, Arrays] = {
            level: self.executable.prefix(level, images) for level in levels
        }
        if not self.prefix:
            return features, dict.fromkeys(levels, 0.0)
        rounds = [
            [_seconds(partial(self.executable.prefix, level, images)) for level in levels]
            for _ in range(_REPEATS)
        ]
        least = [min(times) * 1e3 / len(images) for times in zip(*rounds, strict=True)]
        return features, dict(zip(levels, least, strict=True))

    def _body_ms(
        self, level: int, features: Arrays, repeats: int = _REPEATS
    ) -> tuple[float, float]:
        labels = self.labels[: self.batch]
        inputs = {name: value[: self.batch] for name, value in features.items()}
        forward, backward = [], []
        for _ in range(1 + repeats):
            forward.append(_seconds(lambda: self.executable.forward(level, inputs, labels)))
            backward.append(_seconds(self.executable.update))
        scale = 1e3 / len(labels)
        return min(forward) * scale, min(backward) * scale

    def _gather_ms(self) -> float:
        count = min(2 * self.batch, max(1, _MOST_GATHERED // self.width))
        rows = np.ones((count, self.width), np.float32)
        order = np.arange(len(rows))[::-1]
        rows.take(order, axis=0)
        return _seconds(partial(rows.take, order, axis=0)) * 1e3 / len(rows)

    def _other_chunks(self, usual: int, count: int) -> list[int]:
        if self.chunk is not None or not self.prefix:
            return []
        chunks = (ahead * self.batch for ahead in _OTHER_AHEAD)
        return [chunk for chunk in chunks if chunk != usual and chunk <= min(count, self.most)]

    def _ratio(self, level: int) -> float:
        return self.ladder.levels[level].cost / self.ladder.levels[0].cost

    def _known_or_scaled(self, level: int, known: dict[int, LevelCost]) -> LevelCost:
        if level in known:
            return known[level]
        first, ratio = known[0], self._ratio(level)
        body = ratio if self.bodies else 1.0
        return LevelCost(
            first.prefix_ms * ratio,
            first.chunk,
            first.forward_ms * body,
            first.backward_ms * body,
            measured=False,
        )


def evened(chunk: int, count: int) -> int:
    """Return the size of as few calls as `chunk` needs for `count` samples, all alike.

    A short call is filled up to the size of the others: 40 samples are two calls of 20, not of 32.
    """
    return -(-count // -(-count // chunk))


def _seconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin
