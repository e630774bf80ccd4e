"""Facts about the optimizers, for either side and every engine; no arithmetic is here.

Each is that of torch.optim: SGD with momentum, Adam (Kingma and Ba, ICLR 2015) and AdamW
(Loshchilov and Hutter, ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pbc.errors import UsageError, suggest

BETA_MEAN, BETA_SQUARE = 0.9, 0.999
"""Of the running means of a gradient and of its square, in Adam and AdamW."""
EPSILON = 1e-8

NEW = "new/"
"""In front of a parameter's or a state's name where an update graph returns it."""

_ADAPTIVE = ("learning_rate", "weight_decay", "epsilon", "mean_correction", "square_correction")


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer.

    learning_rate: where none is given. state: what is kept for each parameter, of its shape and
    zero at the start. scalars: the inputs f32 [] of its update graph. counts_steps: whether its
    state has a number of steps too. decoupled_decay: whether weight decay shrinks the parameters
    instead of being added to the gradients. takes_momentum: whether the momentum is the user's.
    """

    learning_rate: float
    state: tuple[str, ...]
    scalars: tuple[str, ...]
    counts_steps: bool = False
    decoupled_decay: bool = False
    takes_momentum: bool = False


OPTIMIZERS: Mapping[str, OptimizerFacts] = MappingProxyType(
    {
        "sgd": OptimizerFacts(
            0.01,
            ("momentum",),
            ("learning_rate", "momentum", "weight_decay"),
            takes_momentum=True,
        ),
        "adam": OptimizerFacts(0.001, ("exp_avg", "exp_avg_sq"), _ADAPTIVE, counts_steps=True),
        "adamw": OptimizerFacts(
            0.001,
            ("exp_avg", "exp_avg_sq"),
            _ADAPTIVE,
            counts_steps=True,
            decoupled_decay=True,
        ),
    }
)


def optimizer_facts(name: str) -> OptimizerFacts:
    """Return the facts of an optimizer; raises UsageError for one that there is not."""
    if name not in OPTIMIZERS:
        raise UsageError(suggest("optimizer", name, OPTIMIZERS))
    return OPTIMIZERS[name]


def state_names(optimizer: str, parameters: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, parameter) of all that is kept beside θ, such as `momentum/fc.bias`."""
    parameters = list(parameters)
    kinds = OPTIMIZERS[optimizer].state
    return [(f"{kind}/{parameter}", parameter) for kind in kinds for parameter in parameters]


def bias_corrections(steps: int) -> tuple[float, float]:
    """Return what Adam's mean and mean square are divided by after `steps` steps, in float64.

    In float32, `1 - 0.999**t` has lost four digits at the first steps.
    """
    return 1 - BETA_MEAN**steps, 1 - BETA_SQUARE**steps
