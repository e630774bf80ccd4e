"""Training on a stream: samples that come once, are learnt from once, and are never stored.

Nothing can be cached and nobody is visited twice, so what is left to save is the prefix: blocks of
samples are routed to proxies and their features computed ahead of the steps, as in an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image

from pbc.bundle import Bundle
from pbc.bundle.ladder import Ladder
from pbc.data import InputSpec, Inventory, Samples
from pbc.errors import PbcError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.events import EpochReport, Progress, Report, silent
from pbc.runtime.meter import Meter, peak_memory_bytes
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.personal import write_model
from pbc.runtime.parameters import initial_parameters, labelled_for
from pbc.runtime.routing.preparation import Preparation, Prepared
from pbc.util.interrupt import Interrupt

Stream = Iterable[tuple[np.ndarray, int | str]]

# Of frames that are not of the network's size; files of photos follow the bundle's own rule.
_RESIZING = Image.Resampling.BILINEAR
# Mini-batches per block: enough to fill a prefix call of every level, few enough to hold.
_BATCHES = 16


@dataclass
class _Seen:
    """Sums over the blocks so far."""

    samples: int
    steps: int
    skipped: int
    loss: float
    visits: np.ndarray


@dataclass(frozen=True)
class StreamTraining:
    """One pass over a stream, from its first block to a personal model.

    A kill loses it: what was seen cannot be seen again. Ctrl-C ends the stream early.
    """

    bundle: Bundle
    engine: Engine
    classes: Sequence[str]
    options: TrainOptions
    output: Output
    report: Report
    interrupt: Interrupt

    def __call__(self, stream: Stream) -> EpochReport:
        """Train on (image, label) pairs, and write the personal model.

        image: uint8[H, W, 3], or floats in 0…1, of any size. label: a class name or its index in
        `classes`. Raises PbcError for an image or label that is neither, and for an empty stream.
        """
        spec = InputSpec.from_json(self.bundle.manifest["input"])
        # What a second visit would need is off.
        options = replace(self.options, epochs=1, cache="off", augment=0, time_budget=None)
        batch = options.batch or int(self.bundle.manifest["batch"])
        objective = options.objective
        keep_freed_memory()
        executable = self.engine.load(self.bundle, threads=options.threads)
        metrics = Metrics(self.output.metrics, None)
        metrics.rewind(0)
        meter, pairs = Meter(), iter(stream)
        run: Prepared | None = None
        classes: tuple[str, ...] = ()
        ladder = Ladder.from_json(
            self.bundle.manifest["levels"], self.bundle.manifest.get("cost_model", "macs")
        )
        seen = _Seen(0, 0, 0, 0.0, np.zeros(len(ladder), dtype=np.int64))
        for block in self._blocks(pairs, spec, batch * _BATCHES):
            meter.lap("decode")
            preparation = Preparation(
                bundle=self.bundle,
                engine=self.engine,
                executable=executable,
                ladder=ladder,
                samples=block,
                options=options,
                batch=batch,
                meter=meter,
                output=self.output,
                report=self.report if run is None else silent,
                progress=lambda stage, done, total: None,
            )
            if run is None:
                theta = initial_parameters(self.bundle, len(block.classes), options.seed)
                executable.start(theta, objective)
                run = preparation(None)
                executable.start(theta, objective)
                classes = block.classes
            else:
                state = run.scheduler.state()
                run = preparation(preparation.routed_anew(run.decisions))
                run.scheduler.carry(state)
            self._learn(run, executable, block, meter, seen)
            self.report(Progress("streaming", seen.samples, seen.samples))
            if self.interrupt.requested:
                break
        if run is None:
            raise PbcError("the stream is empty; it must yield at least one (image, label)")
        trained = executable.parameters()
        if not all(np.isfinite(value).all() for value in trained.values()):
            raise PbcError(_diverged("a parameter is not finite", seen))
        result = self._result(seen, meter)
        metrics.append(result.to_json())
        resolved = {"batch": batch, "learning_rate": objective.learning_rate}
        final = {"final": True, "epochs": 1}
        write_model(
            self.output,
            self.bundle,
            trained,
            {
                "classes": list(classes),
                "samples": seen.samples,
                "batch": batch,
                "options": {**options.to_json(), **resolved},
                "fidelity_floor": run.floor,
                "metrics": final,
            },
        )
        metrics.append(final)
        return result

    def _blocks(
        self, pairs: Iterator[tuple[np.ndarray, int | str]], spec: InputSpec, size: int
    ) -> Iterator[Samples]:
        """Yield the stream as sets of `size` samples, labelled as the bundle numbers them."""
        number = {name: index for index, name in enumerate(self.classes)}
        first = 0
        while block := list(islice(pairs, size)):
            names = tuple(f"sample {first + at}" for at in range(len(block)))
            images = np.stack(
                [_image(image, spec, name) for (image, _), name in zip(block, names, strict=True)]
            )
            labels = [
                _label(label, number, name) for (_, label), name in zip(block, names, strict=True)
            ]
            yield labelled_for(
                self.bundle,
                Samples(
                    spec,
                    names,
                    np.array(labels, dtype=np.int64),
                    tuple(self.classes),
                    tuple(hashlib.sha256(image.tobytes()).digest() for image in images),
                    Inventory(read=len(names)),
                    images,
                    lambda name: b"",  # all are decoded
                ),
            )
            first += len(block)

    def _learn(
        self, run: Prepared, executable: Executable, block: Samples, meter: Meter, seen: _Seen
    ) -> None:
        """Take a step on each mini-batch of a block."""
        batches = run.scheduler.plan(0)
        for batch, features in zip(batches, run.fetch(batches, 0, 0), strict=True):
            losses, _ = executable.forward(batch.level, features, block.labels[batch.samples])
            meter.lap("forward")
            if not math.isfinite(float(losses.mean())):
                raise PbcError(_diverged(f"the loss is {losses.mean()}", seen))
            if run.scheduler.observe(batch, losses):
                executable.update()
            else:
                seen.skipped += 1
            meter.lap("backward")
            seen.steps += 1
            seen.samples += len(losses)
            seen.loss += float(losses.sum())
            seen.visits += np.bincount(run.levels(batch), minlength=len(seen.visits))
        meter.lap("bookkeeping")

    def _result(self, seen: _Seen, meter: Meter) -> EpochReport:
        return EpochReport(
            epoch=1,
            loss=seen.loss / seen.samples,
            levels=tuple(seen.visits.tolist()),
            steps=seen.steps,
            skipped=seen.skipped,
            samples_per_second=seen.samples / meter.total_seconds(),
            seconds=meter.total_seconds(),
            stage_seconds=dict(meter.seconds),
            peak_memory_bytes=peak_memory_bytes(),
        )


def _diverged(what: str, seen: _Seen) -> str:
    return f"{what} after {seen.samples} samples of the stream: lower the learning rate"


def _image(image: np.ndarray, spec: InputSpec, name: str) -> np.ndarray:
    """Return uint8 of the network's size."""
    values = np.asarray(image)
    if values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
        raise PbcError(f"{name} has shape {list(values.shape)}; expected [height, width, 3]")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise PbcError(
                f"{name} has floats in {values.min():.3g}…{values.max():.3g}; expected 0…1"
            )
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise PbcError(f"{name} is of {values.dtype}; expected uint8 or floats in 0…1")
    _, height, width = spec.shape
    if values.shape[:2] == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), _RESIZING))


def _label(label: int | str, number: dict[str, int], name: str) -> int:
    """Return the index of a label in the classes."""
    if isinstance(label, str) and label in number:
        return number[label]
    if isinstance(label, int | np.integer) and 0 <= label < len(number):
        return int(label)
    raise PbcError(f"{name} has label {label!r}; expected one of {len(number)} classes")
