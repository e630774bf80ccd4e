"""Contribution analysis: what fine-tuning one layer, or the last biases, brings."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbc.errors import PbcError, UsageError
from pbc.frontend import models
from pbc.frontend.origin import without_folder
from pbc.scheme.contributions import ACCURACY, FISHER, Contributions
from pbc.scheme.fisher import fisher
from pbc.scheme.layers import Layer
from pbc.scheme.sparse import SelectedChannels
from pbc.scheme.subject import Learning, Subject
from pbc.util.progress import report

Part = str | int
"""A layer's name, or the number of last layers whose biases train."""
Gains = Mapping[str, float]
"""Points of accuracy by share of a weight; of biases, under the empty text."""


@dataclass(frozen=True)
class AnalysisOptions:
    """What is analysed, and how; what it shares with compiling means the same there.

    photos: how many to train on at most. last: how many layers from the last one backwards; None
    for all. jobs: processes, each of one thread where there are several. fast: a Fisher score in
    place of fine-tuning.
    """

    weights: str = models.DEFAULT
    shape: tuple[int, int, int] | None = None
    resize: str | None = None
    photos: int | None = None
    last: int | None = None
    learning: Learning = field(default_factory=Learning)
    jobs: int = 1
    fast: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        learning = self.learning
        numbers = (
            ("photos", self.photos),
            ("last", self.last),
            ("epochs", learning.epochs),
            ("batch", learning.batch),
            ("jobs", self.jobs),
        )
        for name, number in numbers:
            if number is not None and number < 1:
                raise UsageError(f"--{name} is {number}; expected 1 or more")
        if not learning.learning_rate > 0:
            raise UsageError(f"--lr is {learning.learning_rate}; expected more than 0")


def analyse(
    model: str, data: Path | str, output: Path, options: AnalysisOptions = AnalysisOptions()
) -> Contributions:
    """Measure the contributions of a model's layers on photos, and keep them in a file.

    Lin et al., On-Device Training Under 256KB Memory, NeurIPS 2022, section 3.2: the accuracy that
    one layer's weight, of which a share trains, brings over the head alone, and that of the last
    k layers' biases. The head learns first, alone; every candidate then goes on from it for as many
    epochs as the head does alone, for comparison. What is frozen before a candidate is computed
    once: it never changes.

    The file is written after each layer; the same call goes on from it. Raises PbcError where it is
    of other settings.
    """
    subject, settings = _opened(model, data, options)
    measure = FISHER if options.fast else ACCURACY
    found = _resumed(output, Contributions(measure, settings, None, {}, {}))
    start, baseline = _head(subject, options.learning)
    if options.fast:
        layers, biases = fisher(subject, start, _last(subject, options))
        found = replace(found, layers=layers, biases=biases)
        found.save(output)
        return found
    found = replace(found, baseline=baseline)
    parts = _parts(_last(subject, options))
    missing = [p for p in parts if p not in (found.biases if isinstance(p, int) else found.layers)]
    task = _Task(model, str(data), options, {name: value.numpy() for name, value in start.items()})
    for part, gains in _gains(missing, subject, start, baseline, task):
        if isinstance(part, int):
            found = replace(found, biases=dict(sorted({**found.biases, part: gains[""]}.items())))
        else:
            by_share = {share: gains[str(share)] for share in _layer(subject, part).fractions}
            order = [layer.name for layer in subject.layers]
            known = {**found.layers, part: by_share}
            found = replace(found, layers={n: known[n] for n in order if n in known})
        found.save(output)
        done = len(parts) - len(missing)
        done += sum(p in found.biases or p in found.layers for p in missing)
        report("analyze", done / len(parts), f"{part if isinstance(part, str) else f'b{part}'}")
    return found


def _opened(
    model: str, data: Path | str, options: AnalysisOptions
) -> tuple[Subject, dict[str, str | None]]:
    """The subject, and in words what the results depend on."""
    seed = options.learning.seed
    source = models.load(model, options.weights, options.shape, seed, options.resize)
    torch.manual_seed(seed)
    subject = Subject.open(source, data, options.photos)
    learning = options.learning
    settings: dict[str, str | None] = {
        "model": without_folder(source.name),
        "weights": source.weights_sha256 or source.weights,
        "input": str(source.input.to_json()),
        "photos": subject.train.digest(),
        "held_out": subject.held_out.digest(),
        "epochs": str(learning.epochs),
        "learning_rate": f"{learning.learning_rate:g}",
        "batch": str(learning.batch),
        "seed": str(learning.seed),
    }
    return subject, settings


def _resumed(path: Path, new: Contributions) -> Contributions:
    """What a file holds already; raises PbcError where that is of something else."""
    if not path.exists():
        return new
    found = Contributions.open(path)
    for name, value in {**new.settings, "measure": new.measure}.items():
        other = found.measure if name == "measure" else found.settings.get(name)
        if other != value:
            raise PbcError(
                f"{path} is of other {name.replace('_', ' ')} ({other}, now {value}); remove it, "
                "or choose another -o"
            )
    return found


def _last(subject: Subject, options: AnalysisOptions) -> Sequence[Layer]:
    return subject.layers[-options.last :] if options.last else subject.layers


def _layer(subject: Subject, name: str) -> Layer:
    return next(layer for layer in subject.layers if layer.name == name)


def _parts(layers: Sequence[Layer]) -> list[Part]:
    """What is measured, the last layers first; of biases, each time of twice as many layers."""
    counts = [1 << power for power in range(len(layers).bit_length()) if 1 << power < len(layers)]
    return [*counts, len(layers), *(layer.name for layer in reversed(layers))]


def _head(subject: Subject, learning: Learning) -> tuple[dict[str, Tensor], float]:
    """The head as it learns alone, and its accuracy in per cent when it goes on so."""
    candidate = subject.candidate(())
    start = candidate.learnt({}, learning, {})
    return start, candidate.accuracy(candidate.learnt(start, learning, {}))


def gains_of(
    part: Part, subject: Subject, start: Mapping[str, Tensor], baseline: float, learning: Learning
) -> Gains:
    """Return by how many points a part that trains too is better than the head alone."""
    if isinstance(part, int):
        biases = [layer.bias for layer in subject.layers[-part:] if layer.bias is not None]
        candidate = subject.candidate(biases)
        return {"": candidate.accuracy(candidate.learnt(start, learning, {})) - baseline}
    layer = _layer(subject, part)
    name = f"{part}.weight"
    candidate = subject.candidate((name,))
    found = {}
    for share in layer.fractions:
        masks = {}
        if layer.axis is not None and share < 1:
            # Elsewhere the weight stays: so learns θ of this share, which nothing else moves.
            index = SelectedChannels(layer.module.weight, layer.axis, layer.count(share)).index
            size = [1] * layer.module.weight.dim()
            size[layer.axis] = layer.channels
            masks = {name: torch.zeros(layer.channels).index_fill(0, index, 1.0).reshape(size)}
        found[str(share)] = candidate.accuracy(candidate.learnt(start, learning, masks)) - baseline
    return found


# ---- several processes -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a process needs to measure parts. start: the head that all begin with."""

    model: str
    data: str
    options: AnalysisOptions
    start: Mapping[str, np.ndarray]


def _gains(
    parts: Sequence[Part],
    subject: Subject,
    start: Mapping[str, Tensor],
    baseline: float,
    task: _Task,
) -> Iterator[tuple[Part, Gains]]:
    learning = task.options.learning
    if task.options.jobs == 1 or len(parts) < 2:
        for part in parts:
            yield part, gains_of(part, subject, start, baseline, learning)
        return
    # A fork would inherit torch's threads, which do not run there.
    context = multiprocessing.get_context("spawn")
    jobs = min(task.options.jobs, len(parts))
    with ProcessPoolExecutor(jobs, context, _begin, (task,)) as pool:
        running = {pool.submit(_measure, part, baseline): part for part in parts}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_measure_here: Callable[[Part, float], Gains]


def _begin(task: _Task) -> None:
    """Read the network and the photos, once in a process."""
    global _measure_here
    torch.set_num_threads(1)
    subject, _ = _opened(task.model, task.data, task.options)
    start = {name: torch.from_numpy(value) for name, value in task.start.items()}

    def measure(part: Part, baseline: float) -> Gains:
        return gains_of(part, subject, start, baseline, task.options.learning)

    _measure_here = measure


def _measure(part: Part, baseline: float) -> Gains:
    return _measure_here(part, baseline)
