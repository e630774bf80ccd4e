"""A run's head in closed form: of all its samples, visited once; or the start of its epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np

from pbc.bundle import Bundle
from pbc.errors import UsageError
from pbc.runtime.closed_form import LEAST_JUDGES, MOST_WIDTH, ClassStatistics, Head
from pbc.runtime.engines import Arrays, Executable
from pbc.runtime.head_inputs import HeadInputs
from pbc.runtime.loop import Totals, train
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing.prepared import Prepared
from pbc.runtime.schedulers import Batch

TOO_FEW = (
    f"leave-one-out takes {LEAST_JUDGES} photos of classes with more than one; "
    "how strong and how sure it is are guesses"
)
# With fewer photos a class a covariance says too little: SGD is as good.
_LEAST_PER_CLASS = 4
# Heads for the time being come with so many more samples each time.
_GROWTH = 1.6
_FIRST = 64
# They are for whoever stops early: the next one comes no sooner than this, and than so many times
# what the last one took.
PAUSE_SECONDS = 1.0
_PAUSE_FACTOR = 10
# The spectral norm of a head that blocks before it train with. A closed form's is 10 to 40: steps
# of MobileNetV3's last block stray off from 12 and come to less from 8, and what trains learns
# little where the loss is small from the start: four epochs of deit_tiny's adapters come to 83.1,
# 84.3, 84.6, 85.1 % from 4, 2, 1, 0.5 (20 classes, two seeds), from a random head to 85.1.
_STEEPEST = 0.5


class ClosedHead:
    """The sums of a run's samples, and the head that they give.

    complete: whether nothing but the head trains, so that it replaces the epochs.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        executable: Executable,
        theta: Mapping[str, np.ndarray],
        options: TrainOptions,
        classes: int,
        *,
        samples: int | None,
        complete: bool,
        pause_seconds: float,
    ) -> None:
        """Take a head's inputs, the parameters it starts from, and those options that count.

        samples: how many there are, None for a stream.
        pause_seconds: the least time between two heads on the way; 0 for none, whatever they take.
        """
        self.complete = complete
        self._least_pause_seconds = self._pause_seconds = pause_seconds
        self._made_at = monotonic()
        self.head: Head | None = None
        # How the head of the first visit was found, from the second on: left out, a view would be
        # judged by a head that knows its photo's other views.
        self._found: Mapping[str, Any] | None = None
        self._samples = samples
        self._inputs = inputs
        self._executable = executable
        self._theta = dict(theta)
        self._objective = options.objective
        self._statistics = ClassStatistics(classes, inputs.width, options.seed)
        self._classes = classes
        self._next = next_head(0, classes)

    @classmethod
    def find(
        cls,
        bundle: Bundle,
        executable: Executable,
        theta: Mapping[str, np.ndarray],
        options: TrainOptions,
        samples: int | None,
    ) -> ClosedHead | None:
        """Return the head that the options ask for; None for SGD alone.

        theta: with a head of all classes. samples: how many there are, None for a stream. Raises
        UsageError where a closed form was asked for and there is none.
        """
        classes = len(theta[next(iter(bundle.manifest["head"]))])
        if options.head == "sgd":
            return None
        few = samples is not None and samples < _LEAST_PER_CLASS * classes
        if options.head == "auto" and few:
            return None
        inputs = HeadInputs.find(bundle, executable, theta)
        complete = set(bundle.manifest["parameters"]) == set(bundle.manifest["head"])
        if inputs is not None and (complete or samples is not None):
            pause = PAUSE_SECONDS if options.stop is None else 0.0  # which each may decide
            if samples is None:
                pause = math.inf  # nobody sees a model before the stream's end
            return cls(
                inputs,
                executable,
                theta,
                options,
                classes,
                samples=samples,
                complete=complete,
                pause_seconds=pause,
            )
        if options.head == "auto":
            return None
        reason = (
            f"this bundle's head is not linear with a bias, of at most {MOST_WIDTH} inputs"
            if inputs is None
            else f"with {bundle.manifest['strategy']} more trains than the head, and a stream "
            "comes once"
        )
        raise UsageError(f"no closed form: {reason} (--head auto or sgd)")

    def options(self, options: TrainOptions) -> TrainOptions:
        """Return the options of the run: one visit of every view needs no cache, and no patience.

        Patience is of epochs; the heads on the way are as many as time allows.
        """
        if not self.complete:
            return options
        epochs, cache = min(options.views, options.epochs), options.cache
        return replace(
            options,
            epochs=epochs,
            cache="disk" if cache == "disk" else "off",
            skip=False,
            patience=None,
        )

    def learn(
        self, batch: Batch, features: Arrays, labels: np.ndarray, meter: Meter
    ) -> tuple[float | None, bool]:
        """Add a mini-batch to the sums; where they replace the epochs, make heads on the way.

        Returns the loss of the last head. Whoever calls makes the last one.
        """
        self.add(batch.level, features, labels)
        meter.lap("forward")
        due = self.complete and self._statistics.count >= self._next
        if due and monotonic() - self._made_at >= self._pause_seconds:
            self.settle(last=False)
            meter.lap("backward")
        return None if self.head is None else self.head.loss, True

    def add(self, level: int, features: Arrays, labels: np.ndarray) -> None:
        """Take features of one level's body with int64[b] labels."""
        self._statistics.add(self._inputs(level, features), labels)
        if not self._inputs.direct:
            self._executable.start(self._theta, self._objective)

    def settle(self, *, last: bool) -> Head:
        """Make the head of what was added, and start the executable with it.

        last: whether it is to stay; one for the time being costs a fifth.
        """
        begun = monotonic()
        if self._found is not None:
            self.head = self._statistics.solve_like(self._found)
        else:
            self.head = self._statistics.solve() if last else self._statistics.glance()
            if self._statistics.count == self._samples and last:
                self._found = self.head.facts()
        if self._least_pause_seconds:
            took = monotonic() - begun
            self._pause_seconds = max(self._least_pause_seconds, _PAUSE_FACTOR * took)
        self.use(self._inputs.theta(self.head))
        return self.head

    def begin_epochs(self) -> None:
        """Start the executable with a head of what was added for steps to go on from."""
        self.head = _gentle(self._statistics.solve())
        self.use(self._inputs.theta(self.head))

    def finished(self) -> dict[str, np.ndarray]:
        """Return all parameters, with the head of everything that was added."""
        self.settle(last=True)
        return dict(self._theta)

    def use(self, theta: Mapping[str, np.ndarray]) -> None:
        """Start the executable with these parameters, as they are until the next head."""
        self._theta = dict(theta)
        self._executable.start(self._theta, self._objective)
        self._next = next_head(self._statistics.count, self._classes)
        self._made_at = monotonic()

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums, for a checkpoint; none before the first sample."""
        return self._statistics.state() if self._statistics.count else {}

    def load_state(self, state: Arrays, found: Mapping[str, Any] | None) -> None:
        """Continue from what `state` returned; found: facts of the head of the last whole visit."""
        if state:
            self._statistics.load_state(state)
        self._found = found


def _gentle(head: Head) -> Head:
    """Return a head that ranks classes alike, no steeper than steps from it bear."""
    factor = np.float32(_STEEPEST / max(_STEEPEST, float(np.linalg.norm(head.weight, 2))))
    return replace(head, weight=factor * head.weight, bias=factor * head.bias)


def next_head(count: int, classes: int) -> int:
    """Return at how many samples the next head for the time being is made, after `count`."""
    wanted = max(_FIRST, 2 * classes)
    while wanted <= count:
        wanted = int(wanted * _GROWTH)
    return wanted


def stratified(batches: Sequence[Batch], labels: np.ndarray) -> list[Batch]:
    """Spread every class evenly over mini-batches of one level, which keep their sizes.

    Whatever share of them has been visited, it has about that share of each class. Mini-batches of
    several levels are left alone.
    """
    if len({batch.level for batch in batches}) != 1:
        return list(batches)
    order = np.concatenate([batch.samples for batch in batches])
    place = np.empty(len(order))
    for label in np.unique(labels[order]):
        members = np.flatnonzero(labels[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    spread = order[np.argsort(place, kind="stable")]
    ends = np.cumsum([len(batch.samples) for batch in batches])[:-1]
    return [
        Batch(batch.level, samples)
        for batch, samples in zip(batches, np.split(spread, ends), strict=True)
    ]


def told(head: Head) -> str:
    """Return the line that says how a head was found."""
    found = f"head in closed form: shrinkage {head.shrinkage:g}"
    if head.accuracy is None:
        return f"{found}, not judged: {TOO_FEW}"
    return f"{found}, accuracy {head.accuracy:.1%} by leave-one-out on {head.judged} photos"


def start_epochs(
    closed: ClosedHead, run: Prepared, labels: np.ndarray, meter: Meter, totals: Totals
) -> Iterator[int]:
    """Start the epochs of a run with the head of all its samples; yield how many were visited."""
    batches, visited = run.scheduler.plan(0), 0
    for batch, _ in zip(batches, train(closed, run, labels, batches, meter, totals), strict=True):
        visited += len(batch.samples)
        yield visited
    closed.begin_epochs()
    meter.lap("backward")
