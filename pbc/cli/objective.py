"""The options that say what training minimises and how: the same wherever something trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pbc.bundle.optimizers import OPTIMIZERS
from pbc.cli import completion
from pbc.runtime.objective import Objective, default_rate
from pbc.runtime.options import TrainOptions

_DEFAULTS = TrainOptions()
_OPTIONS = (
    click.option(
        "--optimizer",
        shell_complete=completion.optimizers,
        default=_DEFAULTS.optimizer,
        show_default=True,
        help=f"{', '.join(list(OPTIMIZERS)[:-1])} or {list(OPTIMIZERS)[-1]}.",
    ),
    click.option(
        "--momentum", type=float, default=_DEFAULTS.momentum, show_default=True, help="Of sgd."
    ),
    click.option(
        "--weight-decay",
        type=float,
        default=_DEFAULTS.weight_decay,
        show_default=True,
        help="adamw: decoupled; sgd and adam: L2.",
    ),
    click.option(
        "--label-smoothing",
        type=float,
        default=_DEFAULTS.label_smoothing,
        show_default=True,
        help="Share of a label that goes to all classes alike.",
    ),
)


def objective_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, under the names of TrainOptions' fields."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_objective(settings: dict[str, Any]) -> Objective:
    """Take these options' values, and the learning rate, out of a command's settings."""
    optimizer, rate = settings.pop("optimizer"), settings.pop("learning_rate")
    others = {name: settings.pop(name) for name in ("momentum", "weight_decay", "label_smoothing")}
    return Objective(optimizer, default_rate(optimizer) if rate is None else rate, **others)
