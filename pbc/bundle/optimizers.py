"""Optimizers as both sides know them: what each keeps and reads, and its constants.

The rules are those of torch.optim. The compile side writes them as operators
(pbc.training_graph.optimizers), engines that differentiate by themselves have their own few lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BETA_MEAN, BETA_SQUARE = 0.9, 0.999
"""Shares of Adam's averages of the gradient, and of its square, that stay at each step."""
EPSILON = 1e-8
NEW = "new/"
"""Prefix of the names of parameters and state that an update returns."""


@dataclass(frozen=True)
class OptimizerFacts:
    """State and inputs of an optimizer.

    learning_rate: where none is given. state: what is kept per parameter, under which names, all
    zero at the start. scalars: the inputs f32 [] that its update reads.
    """

    learning_rate: float
    state: tuple[str, ...]
    scalars: tuple[str, ...]


_ADAM = OptimizerFacts(
    0.001,
    ("exp_avg", "exp_avg_sq"),
    ("learning_rate", "weight_decay", "epsilon", "mean_correction", "square_correction"),
)

OPTIMIZERS: Mapping[str, OptimizerFacts] = MappingProxyType(
    {
        "sgd": OptimizerFacts(0.01, ("momentum",), ("learning_rate", "momentum", "weight_decay")),
        "adam": _ADAM,
        "adamw": _ADAM,
    }
)
