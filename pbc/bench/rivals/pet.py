"""PET as PyTorch users write it, and with the feature cache that an engineer adds by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pbc.bench.rival import Arrays, EpochTimes, RivalSetting
from pbc.bench.rivals import order
from pbc.bench.rivals.variants import choose
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.frontend import original as network
from pbc.frontend.original import Features
from pbc.runtime.closed_form import ClassStatistics, Head
from pbc.runtime.closed_head import next_head
from pbc.runtime.head_inputs import HeadInputs
from pbc.runtime.meter import Meter
from pbc.runtime.parameters import initial_parameters

_FILL_SIZES = (32, 64)


class Pet:
    """PET in PyTorch: the frozen part every time, eager or compiled, whichever is faster here.

    Eval mode, channels_last, `torch.no_grad` on the frozen prefix. The constructor chooses the
    variant: what is done there counts in no rival's seconds and joules.
    """

    bfloat16: ClassVar[bool] = False
    needs_prefix: ClassVar[bool] = False

    def __init__(self, setting: RivalSetting) -> None:
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
        choice = choose(self._parts, self._sizes(), self.bfloat16, setting.torch_compile)
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
        total, seen = 0.0, 0
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
            seen += len(indices)
            self._mark(seen, sum(before.values()))
        self._epoch += 1
        spent = {stage: seconds - before[stage] for stage, seconds in meter.seconds.items()}
        count = len(setting.samples)
        return EpochTimes(sum(spent.values()), spent, (count,), total / count)

    def _mark(self, seen: int, before_seconds: float) -> None:
        """Let the match evaluate, after `seen` samples of an epoch; that time counts nowhere."""
        share = seen / len(self._setting.samples)
        if self._setting.marks.due(share):
            self._meter.lap("bookkeeping")
            self._setting.marks.take(share, self._meter.total_seconds() - before_seconds)
            self._meter.restart()

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

    def __init__(self, setting: RivalSetting) -> None:
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


class PetCacheClosed(Pet):
    """PET whose head is made in closed form as pbc's is: one pass, in calls of the fastest size.

    What an engineer gets who knows that a linear probe needs no epochs: nothing need be cached.
    """

    needs_prefix: ClassVar[bool] = True

    def __init__(self, setting: RivalSetting) -> None:
        super().__init__(setting)
        bundle = setting.runtime.bundle
        executable = setting.runtime.engine.load(bundle, threads=setting.options.threads)
        inputs = HeadInputs.find(bundle, executable, self.parameters())
        if inputs is None or not inputs.direct or set(self._theta) != set(bundle.manifest["head"]):
            raise PbcError(
                f"with {bundle.manifest['strategy']} there is no closed form: more trains than a "
                "linear head on the features"
            )
        self._inputs = inputs
        self._classes = len(setting.samples.classes)
        self._sums = ClassStatistics(self._classes, inputs.width, setting.options.seed)

    def _sizes(self) -> tuple[int, ...]:
        most = len(self._setting.samples)
        return tuple(sorted({*super()._sizes(), *(min(size, most) for size in _FILL_SIZES)}))

    def run_epoch(self) -> EpochTimes:
        setting, meter = self._setting, self._meter
        count, seen, head = len(setting.samples), 0, 0
        meter.restart()
        for indices in order.batches(count, self._variant.size, setting.options.seed, 0):
            meter.lap("bookkeeping")
            (features,) = self._features(indices)
            rows = features.float().reshape(len(indices), -1).numpy()
            self._sums.add(rows, setting.samples.labels[indices])
            meter.lap("forward")
            seen += len(indices)
            if seen >= next_head(head, self._classes):
                head = seen
                self._take(self._sums.glance())
            self._mark(seen, 0.0)
        found = self._sums.solve()
        self._take(found)
        return EpochTimes(meter.total_seconds(), dict(meter.seconds), (count,), found.loss, True)

    def _take(self, head: Head) -> None:
        with torch.no_grad():
            for name, value in self._inputs.theta(head).items():
                self._theta[name].copy_(torch.from_numpy(value))
        self._meter.lap("backward")


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


def _nothing_frozen(setting: RivalSetting) -> str:
    strategy = setting.runtime.bundle.manifest["strategy"]
    return f"with {strategy} nothing is frozen before the first trainable layer"
