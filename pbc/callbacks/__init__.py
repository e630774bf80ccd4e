"""Watchers of a run: whatever is called with its events; these bring them to other tools.

A callback is any callable of one event; its plugin is one that is made with the folder of the
result and the options of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pbc import plugins
from pbc.errors import PbcError
from pbc.runtime.events import EpochReport, Event
from pbc.runtime.options import TrainOptions
from pbc.util.extras import missing

GROUP = "pbc.callbacks"
Callback = Callable[[Event], None]


class CallbackPlugin(Protocol):
    """A class that is made for a run, and called with each of its events."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        """Begin to watch: `out` is the folder of the result, `options` are the run's."""

    def __call__(self, event: Event) -> None:
        """Take an event; see pbc.runtime.events."""


def together(chosen: Iterable[Callback | str], out: Path, options: TrainOptions) -> Callback:
    """Return one callback for several; a plugin goes by its name, and is made for this run.

    Raises PbcError for a plugin that is not installed, whose package is not, or that cannot begin.
    """
    callbacks = [
        _made(callback, out, options) if isinstance(callback, str) else callback
        for callback in chosen
    ]

    def call(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    return call


def _made(name: str, out: Path, options: TrainOptions) -> Callback:
    try:
        made: Callback = plugins.load(GROUP, name)(out, options.to_json())
    except ModuleNotFoundError as error:
        if (needs := missing(error)) is None:
            raise
        raise PbcError(f"the callback {name!r} needs {needs}") from error
    except PbcError:
        raise
    except Exception as error:  # a tool's own settings: what it says of them is what helps
        raise PbcError(f"the callback {name!r} cannot begin: {error}") from error
    return made


def scalars(report: EpochReport) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch by name: loss, seconds, visits of each level and the rest."""
    for name, value in report.to_json().items():
        if isinstance(value, int | float) and name != "epoch":
            yield name, value
    for level, visits in enumerate(report.levels):
        yield f"level_{level}", visits
