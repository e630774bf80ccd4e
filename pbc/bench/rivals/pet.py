"""PET as PyTorch users write it, and with the feature cache that an engineer adds by hand."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pbc.bench import Arrays, EpochTimes, Setting
from pbc.bench.rivals import order
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.frontend import original as network
from pbc.frontend.original import Call, Features
from pbc.runtime.meter import Meter
from pbc.runtime.parameters import initial_parameters

_TIMED_CALLS = 5
_FILL_SIZES = (32, 64)


@dataclass(frozen=True)
class Variant:
    """How the network runs: `frozen` (None without a prefix) and `body`, and what this is called.

    size: samples per call that it is for.
    """

    name: str
    size: int
    frozen: Call | None
    body: Call

    @property
    def label(self) -> str:
        """Return what tells it apart."""
        return f"{self.name} in calls of {self.size}"


@dataclass(frozen=True)
class Choice:
    """The variants that run here, the fastest per sample first, and what a reader should know."""

    variants: tuple[Variant, ...]
    notes: tuple[str, ...]


class Pet:
    """PET in PyTorch: the frozen part every time, eager or compiled, whichever is faster here.

    Eval mode, channels_last, `torch.no_grad` on the frozen prefix. The constructor chooses the
    variant: what is done there counts in nobody's seconds and joules.
    """

    bfloat16: ClassVar[bool] = False
    needs_prefix: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        bundle = setting.runtime.bundle
        self._setting = setting
        classes = len(setting.samples.classes)
        self._parts = network.parts(bundle.path, bundle.digest, setting.weights, classes)
        if self.needs_prefix and self._parts.frozen is None:
            raise PbcError(_nothing_frozen(setting))
        initial = initial_parameters(bundle, classes, setting.options.seed)
        self._theta = {
            name: torch.from_numpy(value).requires_grad_() for name, value in initial.items()
        }
        self._optimizer = network.optimizer(setting.objective, list(self._theta.values()))
        self._meter = Meter()
        self._epoch = 0
        choice = _choice(self._parts, self._sizes(), self.bfloat16, setting.torch_compile)
        self._variants, self._notes = choice.variants, list(choice.notes)
        self._variant = self._variants[0]

    def _sizes(self) -> tuple[int, ...]:
        """Return how many samples a call of the frozen prefix may take."""
        return (min(self._setting.batch, len(self._setting.samples)),)

    def prepare(self, state: Arrays | None) -> None:
        if state is None:
            return
        self._epoch = int(state["epoch"][0])
        with torch.no_grad():
            for name, value in self._theta.items():
                value.copy_(torch.from_numpy(state[f"theta/{name}"]))
        network.load_optimizer_arrays(self._optimizer, dict(state))
        # Another timing could choose another variant, whose last bits differ.
        began_with = state["variant"].tobytes().decode()
        known = {variant.label: variant for variant in self._variants}
        self._variant = known.get(began_with, self._variant)
        self._notes = (
            [] if began_with in known else [f"it began with {began_with}, which fails now"]
        )

    def run_epoch(self) -> EpochTimes:
        setting, meter = self._setting, self._meter
        before = dict(meter.seconds)
        total = 0.0
        meter.restart()
        self._before_epoch()
        for indices in order.batches(
            len(setting.samples), setting.batch, setting.options.seed, self._epoch
        ):
            meter.lap("bookkeeping")
            features = self._features(indices)
            logits = network.logits(self._parts, self._variant.body, features, self._theta)
            loss = network.loss(setting.objective, logits, setting.samples.labels[indices])
            total += float(loss.detach()) * len(indices)
            meter.lap("forward")
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            meter.lap("backward")
        self._epoch += 1
        spent = {stage: seconds - before[stage] for stage, seconds in meter.seconds.items()}
        count = len(setting.samples)
        return EpochTimes(sum(spent.values()), spent, (count,), total / count)

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in self._theta.items()}

    def evaluate(self, samples: Samples) -> float:
        raise NotImplementedError("θ is evaluated in common")

    def state(self) -> dict[str, np.ndarray]:
        return {
            "epoch": np.array([self._epoch]),
            "variant": np.frombuffer(self._variant.label.encode(), np.uint8),
            **{f"theta/{name}": value for name, value in self.parameters().items()},
            **network.optimizer_arrays(self._optimizer),
        }

    def facts(self) -> dict[str, Any]:
        return {"variant": self._variant.label, "notes": self._notes}

    def _before_epoch(self) -> None:
        """Do what an epoch needs first; it is measured."""

    def _features(self, indices: np.ndarray) -> Features:
        """Run the frozen prefix; without one the features are the images."""
        images = torch.from_numpy(self._setting.samples.images(indices))
        self._meter.lap("decode")
        if self._variant.frozen is None:
            return (images,)
        features: Features = self._variant.frozen(images)
        self._meter.lap("prefix")
        return features


class PetBfloat16(Pet):
    """PET with the frozen prefix under bfloat16 autocast: what precision alone gives."""

    bfloat16: ClassVar[bool] = True
    needs_prefix: ClassVar[bool] = True


class PetCache(Pet):
    """PET with an exact feature cache in memory, filled before the first epoch, in its time.

    It is not bounded, and the prefix runs in calls of the size that suits it best: the rival that
    keeps everything is the strongest one.
    """

    needs_prefix: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._cache: tuple[_Rows, ...] | None = None

    def _sizes(self) -> tuple[int, ...]:
        most = len(self._setting.samples)
        return tuple(sorted({*super()._sizes(), *(min(size, most) for size in _FILL_SIZES)}))

    def prepare(self, state: Arrays | None) -> None:
        super().prepare(state)
        if self._epoch > 0:  # it was paid for in the first epoch
            self._fill()

    def facts(self) -> dict[str, Any]:
        cached = sum(rows.bytes for rows in self._cache or ())
        return {**super().facts(), "cache_bytes": cached}

    def _before_epoch(self) -> None:
        if self._cache is None:
            self._fill()

    def _features(self, indices: np.ndarray) -> Features:
        assert self._cache is not None
        chosen = torch.from_numpy(indices)
        features = tuple(rows.gather(chosen) for rows in self._cache)
        self._meter.lap("cache")
        return features

    def _fill(self) -> None:
        count, size = len(self._setting.samples), self._variant.size
        for start in range(0, count, size):
            indices = np.arange(start, min(start + size, count))
            features = super()._features(indices)
            if self._cache is None:
                self._cache = tuple(_Rows(count, value) for value in features)
            for rows, value in zip(self._cache, features, strict=True):
                rows.put(torch.from_numpy(indices), value)
            self._meter.lap("cache")


class _Rows:
    """One feature of all samples; maps lie as [n, H, W, C], the order in which they are used."""

    def __init__(self, count: int, example: Tensor) -> None:
        self._map = example.dim() == 4
        shape = _nhwc(example).shape[1:] if self._map else example.shape[1:]
        self._values = torch.empty((count, *shape))

    @property
    def bytes(self) -> int:
        """Return the size in memory."""
        return self._values.nbytes

    def put(self, indices: Tensor, value: Tensor) -> None:
        self._values[indices] = (_nhwc(value) if self._map else value).float()

    def gather(self, indices: Tensor) -> Tensor:
        rows = self._values.index_select(0, indices)
        return rows.permute(0, 3, 1, 2) if self._map else rows


def _nhwc(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1)


def _nothing_frozen(setting: Setting) -> str:
    strategy = setting.runtime.bundle.manifest["strategy"]
    return f"with {strategy} nothing is frozen before the first trainable layer"


# ---- which variant is the fastest ----------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _choice(
    parts: network.Parts, sizes: tuple[int, ...], bfloat16: bool, may_compile: bool
) -> Choice:
    """Choose once per process among eager and compiled, at each size, outside of measured time.

    Compiled code is for calls of one size; what is left at the end runs eagerly, since compiling
    for it takes longer than it will ever save.
    """
    frozen = None if parts.frozen is None else network.without_gradient(parts.frozen, bfloat16)
    variants = [Variant("eager", size, frozen, parts.body) for size in sizes]
    notes = [] if may_compile else ["torch.compile was not tried"]
    for eager in tuple(variants) if may_compile else ():
        compiled = _compiled(parts, eager, bfloat16)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _pass(parts, compiled, _noise(parts, compiled.size))
        except Exception as error:  # no C++ compiler, an operator that it cannot do: torch's own
            notes.append(network.not_compiled(error))
            break
        variants.append(compiled)
    if len(variants) == 1:
        return Choice(tuple(variants), tuple(notes))
    milliseconds = _milliseconds(parts, variants)
    what = "forward and backward" if parts.frozen is None else "the frozen prefix"
    times = ", ".join(
        f"{variant.label}: {milliseconds[variant.label]:.3g} ms" for variant in variants
    )
    ranked = sorted(variants, key=lambda variant: milliseconds[variant.label])
    notes.append(f"{what} per sample: {times}; the fastest ran")
    return Choice(tuple(ranked), tuple(notes))


def _milliseconds(parts: network.Parts, variants: Sequence[Variant]) -> dict[str, float]:
    """Return the best time per sample of each variant, by label."""
    images = {variant.size: _noise(parts, variant.size) for variant in variants}
    best = {variant.label: math.inf for variant in variants}
    for _ in range(_TIMED_CALLS):
        for variant in variants:  # in turn: what else runs here slows all alike
            start = perf_counter()
            _pass(parts, variant, images[variant.size])
            spent = 1000 * (perf_counter() - start) / variant.size
            best[variant.label] = min(best[variant.label], spent)
    return best


def _compiled(parts: network.Parts, eager: Variant, bfloat16: bool) -> Variant:
    """Compile the frozen prefix, or the whole network where there is none."""

    def for_size(compiled: Call, other: Call) -> Call:
        # Images come first among the inputs of both.
        return lambda images, *rest: (compiled if len(images) == eager.size else other)(
            images, *rest
        )

    if parts.frozen is None or eager.frozen is None:
        body = for_size(torch.compile(parts.body, dynamic=False), parts.body)
        return Variant("torch.compile", eager.size, None, body)
    frozen = torch.compile(parts.frozen, dynamic=False)
    chosen = for_size(network.without_gradient(frozen, bfloat16), eager.frozen)
    return Variant("torch.compile", eager.size, chosen, parts.body)


def _noise(parts: network.Parts, size: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(size, *parts.shape, generator=random)
    return images.contiguous(memory_format=torch.channels_last)


def _pass(parts: network.Parts, variant: Variant, images: Tensor) -> None:
    """Run what differs between variants: the prefix, or forward and backward of the network."""
    if variant.frozen is not None:
        variant.frozen(images)
        return
    theta = {name: value.clone().requires_grad_() for name, value in parts.theta.items()}
    network.logits(parts, variant.body, (images,), theta).sum().backward()
