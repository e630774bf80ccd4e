"""Full training: every parameter of the network learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbc.bench.rival import Arrays, EpochTimes, RivalSetting
from pbc.bench.rivals import order
from pbc.data import Samples
from pbc.frontend import original as network
from pbc.runtime.meter import Meter
from pbc.runtime.parameters import initial_parameters

_EVALUATED_AT_ONCE = 64


class Full:
    """Full training in PyTorch: all parameters learn, batch norms and dropout in training mode."""

    def __init__(self, setting: RivalSetting) -> None:
        bundle, options = setting.runtime.bundle, setting.options
        self._setting = setting
        theta = initial_parameters(bundle, len(setting.samples.classes), options.seed)
        self._module = network.module(bundle, setting.weights, theta)
        self._parameters = list(self._module.parameters())
        for parameter in self._parameters:
            parameter.requires_grad_()
        self._optimizer = network.optimizer(setting.objective, self._parameters)
        self._meter = Meter()
        self._epoch = 0

    def prepare(self, state: Arrays | None) -> None:
        if state is None:
            return
        self._epoch = int(state["epoch"][0])
        tensors = self._module.state_dict()  # with the versions of its layers
        tensors.update(
            (name.removeprefix("module/"), torch.from_numpy(value))
            for name, value in state.items()
            if name.startswith("module/")
        )
        self._module.load_state_dict(tensors)
        network.load_optimizer_arrays(self._optimizer, dict(state))

    def run_epoch(self) -> EpochTimes:
        setting, meter = self._setting, self._meter
        before = dict(meter.seconds)
        total, count, seen = 0.0, 0, 0
        batches = order.batches(
            len(setting.samples), setting.batch, setting.options.seed, self._epoch
        )
        self._module.train()
        with torch.random.fork_rng(devices=[]):  # dropout: the same masks after an interruption
            torch.manual_seed(1000 * setting.options.seed + self._epoch)
            meter.restart()
            for indices in batches:
                if len(indices) == 1 and len(batches) > 1:
                    continue  # a batch norm has no variance over one sample
                meter.lap("bookkeeping")
                images = torch.from_numpy(setting.samples.images(indices))
                meter.lap("decode")
                logits: Tensor = self._module(images)
                labels = setting.samples.labels[indices]
                loss = self._objective(logits, labels)
                total += float(loss.detach()) * len(indices)
                count += len(indices)
                meter.lap("forward")
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                meter.lap("backward")
                seen += len(indices)
                if setting.marks.due(seen / len(setting.samples)):
                    spent_seconds = meter.total_seconds() - sum(before.values())
                    setting.marks.take(seen / len(setting.samples), spent_seconds)
                    self._module.train()
                    meter.restart()
        self._epoch += 1
        spent = {stage: seconds - before[stage] for stage, seconds in meter.seconds.items()}
        return EpochTimes(sum(spent.values()), spent, (count,), total / max(count, 1))

    def _objective(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        """Return the loss of a mini-batch."""
        return network.loss(self._setting.objective, logits, labels)

    def parameters(self) -> None:
        return None

    def evaluate(self, samples: Samples) -> float:
        self._module.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(samples), _EVALUATED_AT_ONCE):
                indices = np.arange(start, min(start + _EVALUATED_AT_ONCE, len(samples)))
                logits = self._module(torch.from_numpy(samples.images(indices)))
                right += int((logits.argmax(1).numpy() == samples.labels[indices]).sum())
        return right / len(samples)

    def state(self) -> dict[str, np.ndarray]:
        tensors = self._module.state_dict()
        return {
            "epoch": np.array([self._epoch]),
            **{f"module/{name}": value.numpy().copy() for name, value in tensors.items()},
            **network.optimizer_arrays(self._optimizer),
        }

    def facts(self) -> dict[str, Any]:
        return {"variant": "eager", "notes": []}
