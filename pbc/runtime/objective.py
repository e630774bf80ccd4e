"""The loss that a step minimises and the optimizer that moves θ, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass

from pbc.bundle.optimizers import OPTIMIZERS, optimizer_facts
from pbc.errors import UsageError

# Far beyond use; what an optimizer makes of a larger one is no float32.
_LARGEST = 1e30


def default_rate(optimizer: str) -> float:
    """Return the learning rate of an optimizer; raises UsageError for one that there is not."""
    return optimizer_facts(optimizer).learning_rate


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and an optimizer, with torch's meaning of every word.

    momentum: of sgd; adam and adamw have their own (betas 0.9 and 0.999, epsilon 1e-8).
    weight_decay: adamw shrinks the parameters by it, the others add it to the gradients.
    label_smoothing: the share of a label that goes to all classes alike.
    """

    optimizer: str = "sgd"
    learning_rate: float = OPTIMIZERS["sgd"].learning_rate
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        optimizer_facts(self.optimizer)
        if not 0 < self.learning_rate <= _LARGEST:
            raise UsageError(
                f"the learning rate is {self.learning_rate}; "
                f"it must be above 0 and at most {_LARGEST:g}"
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(f"the momentum is {self.momentum}; it must be at least 0 and below 1")
        if not 0 <= self.weight_decay <= _LARGEST:
            raise UsageError(
                f"the weight decay is {self.weight_decay}; "
                f"it must be at least 0 and at most {_LARGEST:g}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(
                f"the label smoothing is {self.label_smoothing}; it must be at least 0 and below 1"
            )
