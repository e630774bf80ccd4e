"""PruneTrain: full training that removes the channels which it drives to zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbc.bench.rival import Arrays, EpochTimes, RivalSetting
from pbc.bench.rivals.channel_groups import Channels, Removal
from pbc.bench.rivals.full import Full
from pbc.frontend import original as network

RATIO = 0.25
"""The penalty's share of the loss at the first mini-batch (the paper: 0.2 to 0.25)."""
THRESHOLD = 1e-4
EPOCHS_BETWEEN = 2


class PruneTrain(Full):
    """Full training with group lasso, smaller every few epochs (Lym et al., SC 2019), in PyTorch.

    The penalty is the sum of the norms of all layers' output channels and input channels, without
    depthwise layers, the first layer's inputs and the head's outputs (equation 2 of the paper); its
    factor follows from the first mini-batch. Channels whose largest weight is below 1e-4 in every
    layer that they pass through are removed, and their momentum with them (section 4.2, «channel
    union»), every second epoch (the paper: every tenth of 90).
    """

    def __init__(self, setting: RivalSetting) -> None:
        super().__init__(setting)
        shape = setting.runtime.bundle.manifest["input"]["shape"]
        head = frozenset(setting.runtime.bundle.manifest["head"])
        self._channels = Channels(self._module, head, torch.zeros(1, *shape))
        self._before = self._channels.count()
        self._factor: float | None = None
        self._removals: list[Removal] = []

    def prepare(self, state: Arrays | None) -> None:
        if state is None:
            return
        self._factor = float(state["factor"][0])
        for number in range(int(state["removals"][0])):
            start = f"removal/{number}/"
            removal = {
                name.removeprefix(start): torch.from_numpy(value.copy())
                for name, value in state.items()
                if name.startswith(start)
            }
            self._channels.remove(removal)
            self._removals.append(removal)
        self._adopt_parameters()
        super().prepare(state)

    def run_epoch(self) -> EpochTimes:
        times = super().run_epoch()
        if self._epoch % EPOCHS_BETWEEN:
            return times
        self._meter.restart()
        before = self._meter.seconds.get("bookkeeping", 0.0)
        self._reconfigure()
        self._meter.lap("bookkeeping")
        spent = self._meter.seconds["bookkeeping"] - before
        stages = {**times.stage_seconds}
        stages["bookkeeping"] = stages.get("bookkeeping", 0.0) + spent
        return EpochTimes(times.seconds + spent, stages, times.levels, times.loss)

    def state(self) -> dict[str, np.ndarray]:
        removed = {
            f"removal/{number}/{name}": channels.numpy().copy()
            for number, removal in enumerate(self._removals)
            for name, channels in removal.items()
        }
        factor = np.array([self._factor if self._factor is not None else np.nan])
        return {
            **super().state(),
            **removed,
            "removals": np.array([len(self._removals)]),
            "factor": factor,
        }

    def facts(self) -> dict[str, Any]:
        gone = self._before - self._channels.count()
        return {
            "variant": "eager",
            "notes": [f"{gone} of {self._before} channels were removed"],
        }

    def _objective(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        loss, norms = super()._objective(logits, labels), self._channels.norms()
        if self._factor is None or not np.isfinite(self._factor):
            self._factor = RATIO / (1 - RATIO) * float(loss.detach()) / float(norms.detach())
        return loss + self._factor * norms

    def _reconfigure(self) -> None:
        """Remove what has gone to zero, from the network and from the optimizer's state."""
        removal = self._channels.below(THRESHOLD)
        if not removal:
            return
        named = list(self._module.named_parameters())
        states = {name: self._optimizer.state.get(value, {}) for name, value in named}
        keys = {key for state in states.values() for key in state}
        smaller: dict[str, dict[str, Any]] = {name: dict(state) for name, state in states.items()}
        for key in keys:
            known = {name: states[name][key] for name, _ in named if key in states[name]}
            if all(_is_like(known[name], value) for name, value in named if name in known):
                whole = {name: known.get(name, torch.zeros_like(value)) for name, value in named}
                for name, value in self._channels.removed_from(whole, removal).items():
                    if name in known:
                        smaller[name][key] = value
        self._channels.remove(removal)
        self._removals.append(removal)
        self._adopt_parameters()
        for name, parameter in self._module.named_parameters():
            if smaller[name]:
                self._optimizer.state[parameter] = smaller[name]

    def _adopt_parameters(self) -> None:
        """Go on with the parameters that the network has now."""
        self._module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parameters = list(self._module.parameters())
        self._optimizer = network.optimizer(self._setting.objective, self._parameters)


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
