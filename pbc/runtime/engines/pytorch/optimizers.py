"""The arithmetic of torch.optim to the bit, without its classes.

Those import torch's compiler at the first step: one second and 76 MB that a device does not have to
spare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pbc.bundle.optimizers import BETA_MEAN, BETA_SQUARE, EPSILON, bias_corrections
from pbc.bundle.optimizers import OPTIMIZERS as FACTS
from pbc.runtime.objective import Objective

Gradients = tuple[Tensor | None, ...]


class Optimizer(Protocol):
    """Parameters and what is kept for them from step to step."""

    def step(self, gradients: Gradients) -> None:
        """Move every parameter that has a gradient, in place."""

    def state(self) -> dict[str, Tensor]:
        """Return what is kept, by the names of pbc.bundle.optimizers; not copied."""


class Sgd:
    """torch.optim.SGD."""

    def __init__(self, parameters: dict[str, Tensor], objective: Objective) -> None:
        self._parameters = parameters
        self._objective = objective
        self._momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: Gradients) -> None:
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                if self._objective.weight_decay:
                    gradient = gradient.add(parameter, alpha=self._objective.weight_decay)
                momentum = self._momentum[name].mul_(self._objective.momentum).add_(gradient)
                parameter.add_(momentum, alpha=-self._objective.learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {f"momentum/{name}": value for name, value in self._momentum.items()}


class Adam:
    """torch.optim.Adam, or AdamW, with the default betas and epsilon."""

    def __init__(self, parameters: dict[str, Tensor], objective: Objective) -> None:
        self._parameters = parameters
        self._objective = objective
        self._decoupled = FACTS[objective.optimizer].decoupled_decay
        self._step = torch.zeros((), dtype=torch.int64)
        self._mean = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self._square = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: Gradients) -> None:
        rate, decay = self._objective.learning_rate, self._objective.weight_decay
        self._step += 1
        mean_correction, square_correction = bias_corrections(int(self._step))
        step_size = rate / mean_correction
        scale = square_correction**0.5
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                if decay and self._decoupled:
                    parameter.mul_(1 - rate * decay)
                elif decay:
                    gradient = gradient.add(parameter, alpha=decay)
                mean = self._mean[name].lerp_(gradient, 1 - BETA_MEAN)
                square = self._square[name].mul_(BETA_SQUARE)
                square.addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
                denominator = (square.sqrt() / scale).add_(EPSILON)
                parameter.addcdiv_(mean, denominator, value=-step_size)

    def state(self) -> dict[str, Tensor]:
        return {
            "step": self._step,
            **{f"exp_avg/{name}": value for name, value in self._mean.items()},
            **{f"exp_avg_sq/{name}": value for name, value in self._square.items()},
        }


OPTIMIZERS: dict[str, Callable[[dict[str, Tensor], Objective], Optimizer]] = {
    "sgd": Sgd,
    "adam": Adam,
    "adamw": Adam,
}
