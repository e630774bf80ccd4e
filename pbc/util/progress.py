"""Progress of long work: passes report, whoever called the compiler decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Receiver = Callable[[str, float, str], None]


def _silent(stage: str, fraction: float, text: str) -> None:
    pass


_current: ContextVar[Receiver] = ContextVar("pbc_progress", default=_silent)


def report(stage: str, fraction: float, text: str = "") -> None:
    """Say how far (0 to 1) the stage of this name is, with a short text such as a loss."""
    _current.get()(stage, fraction, text)


@contextmanager
def reporting_to(receiver: Receiver) -> Iterator[None]:
    """Send what is reported inside the block to `receiver`."""
    token = _current.set(receiver)
    try:
        yield
    finally:
        _current.reset(token)
