"""PET as PyTorch users write it, and with the feature cache that an engineer adds by hand."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pbc.bench import Arrays, EpochTimes, Setting, network, order
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.meter import Meter
from pbc.runtime.parameters import initial_parameters

_TIMED_BATCHES = 5

Features = tuple[Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """How the network runs: `frozen` (None without a prefix) and `body`, and what this is called.

    notes: what a reader should know about the choice.
    """

    name: str
    frozen: Call | None
    body: Call
    notes: tuple[str, ...] = ()


class Pet:
    """PET in PyTorch: the frozen part every time, eager or compiled, whichever is faster here.

    Eval mode, channels_last, `torch.no_grad` on the frozen prefix.
    """

    bfloat16: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        bundle = setting.runtime.bundle
        self._setting = setting
        classes = len(setting.samples.classes)
        self._parts = network.parts(bundle.path, bundle.digest, setting.weights, classes)
        if self.bfloat16 and self._parts.frozen is None:
            raise PbcError(_nothing_frozen(setting))
        initial = initial_parameters(bundle, classes, setting.options.seed)
        self._theta = {
            name: torch.from_numpy(value).requires_grad_() for name, value in initial.items()
        }
        self._optimizer = network.optimizer(
            setting.options.optimizer, list(self._theta.values()), setting.learning_rate
        )
        self._meter = Meter()
        self._epoch = 0
        self._variant: Variant

    def prepare(self, state: Arrays | None) -> None:
        if state is not None:
            self._epoch = int(state["epoch"][0])
            with torch.no_grad():
                for name, value in self._theta.items():
                    value.copy_(torch.from_numpy(state[f"theta/{name}"]))
            network.load_optimizer_arrays(self._optimizer, dict(state))
        setting = self._setting
        size = min(setting.batch, len(setting.samples))
        self._variant = _fastest(self._parts, size, self.bfloat16, setting.torch_compile)

    def run_epoch(self) -> EpochTimes:
        setting, meter = self._setting, self._meter
        before = dict(meter.seconds)
        total = 0.0
        meter.restart()
        for indices in order.batches(
            len(setting.samples), setting.batch, setting.options.seed, self._epoch
        ):
            meter.lap("bookkeeping")
            features = self._features(indices)
            labels = torch.from_numpy(setting.samples.labels[indices])
            logits = _logits(self._parts, self._variant.body, features, self._theta)
            loss = cross_entropy(logits, labels)
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
            **{f"theta/{name}": value for name, value in self.parameters().items()},
            **network.optimizer_arrays(self._optimizer),
        }

    def facts(self) -> dict[str, Any]:
        return {"variant": self._variant.name, "notes": list(self._variant.notes)}

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


class PetCache(Pet):
    """PET with an exact feature cache in memory, filled in the first epoch.

    It is not bounded: the rival that keeps everything is the strongest one.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if self._parts.frozen is None:
            raise PbcError(_nothing_frozen(setting))
        self._cache: tuple[_Rows, ...] | None = None

    def prepare(self, state: Arrays | None) -> None:
        super().prepare(state)
        if self._epoch > 0:  # what the first epoch filled; it was paid for then
            setting = self._setting
            for indices in order.batches(
                len(setting.samples), setting.batch, setting.options.seed, 0
            ):
                self._fill(indices)

    def facts(self) -> dict[str, Any]:
        cached = sum(rows.bytes for rows in self._cache or ())
        return {**super().facts(), "cache_bytes": cached}

    def _features(self, indices: np.ndarray) -> Features:
        if self._epoch == 0:
            return self._fill(indices)
        assert self._cache is not None
        chosen = torch.from_numpy(indices)
        features = tuple(rows.gather(chosen) for rows in self._cache)
        self._meter.lap("cache")
        return features

    def _fill(self, indices: np.ndarray) -> Features:
        features = super()._features(indices)
        if self._cache is None:
            self._cache = tuple(_Rows(len(self._setting.samples), value) for value in features)
        for rows, value in zip(self._cache, features, strict=True):
            rows.put(torch.from_numpy(indices), value)
        self._meter.lap("cache")
        return features


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
def _fastest(parts: network.Parts, size: int, bfloat16: bool, may_compile: bool) -> Variant:
    """Choose once per process between eager and compiled, outside of any measured time.

    Compiled code is for mini-batches of `size`; an epoch's short last one runs eagerly, since
    compiling for it takes longer than it will ever save.
    """
    frozen = None if parts.frozen is None else _without_gradient(parts.frozen, bfloat16)
    eager = Variant("eager", frozen, parts.body)
    if not may_compile:
        return replace(eager, notes=("torch.compile was not tried",))
    images = _noise(parts, size)
    compiled = _compiled(parts, eager, size, bfloat16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _pass(parts, compiled, images)
    except Exception as error:  # a missing C++ compiler, an operator that it cannot do: torch's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        note = f"torch.compile is not possible here ({type(error).__name__}: {reason})"
        return replace(eager, notes=(note,))
    milliseconds = {eager.name: math.inf, compiled.name: math.inf}
    for _ in range(_TIMED_BATCHES):
        for variant in (eager, compiled):  # in turn: what else runs here slows both alike
            start = perf_counter()
            _pass(parts, variant, images)
            spent = 1000 * (perf_counter() - start)
            milliseconds[variant.name] = min(milliseconds[variant.name], spent)
    best = min((eager, compiled), key=lambda variant: milliseconds[variant.name])
    times = ", ".join(f"{name} {spent:.1f} ms" for name, spent in milliseconds.items())
    what = "forward and backward" if parts.frozen is None else "the frozen prefix"
    return replace(best, notes=(f"{what} of a batch of {size}: {times}; the faster one ran",))


def _compiled(parts: network.Parts, eager: Variant, size: int, bfloat16: bool) -> Variant:
    """Compile the frozen prefix, or the whole network where there is none."""

    def for_size(compiled: Call, other: Call) -> Call:
        # Images come first among the inputs of both.
        return lambda images, *rest: (compiled if len(images) == size else other)(images, *rest)

    if parts.frozen is None or eager.frozen is None:
        body = for_size(torch.compile(parts.body, dynamic=False), parts.body)
        return Variant("torch.compile", None, body)
    frozen = torch.compile(parts.frozen, dynamic=False)
    chosen = for_size(_without_gradient(frozen, bfloat16), eager.frozen)
    return Variant("torch.compile", chosen, parts.body)


def _without_gradient(call: Call, bfloat16: bool) -> Call:
    def run(images: Tensor) -> Features:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return tuple(value.float() for value in call(images))

    return run


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
    _logits(parts, variant.body, (images,), theta).sum().backward()


def _logits(
    parts: network.Parts, body: Call, features: Features, theta: Mapping[str, Tensor]
) -> Tensor:
    """Call a body with its inputs in its own order."""
    values = iter(features)
    (logits,) = body(
        *(theta[name] if of_theta else next(values) for name, of_theta in parts.inputs)
    )
    result: Tensor = logits
    return result
