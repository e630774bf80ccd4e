"""Progress of long work: passes report, whoever called the compiler decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Receiver = Callable[[str, float, str], None]
Tell = Callable[[str], None]


def _silent(stage: str, fraction: float, text: str) -> None:
    pass


def _untold(line: str) -> None:
    pass


_current: ContextVar[Receiver] = ContextVar("pbc_progress", default=_silent)

_teller: ContextVar[Tell] = ContextVar("pbc_tell", default=_untold)


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


def tell(line: str) -> None:
    """Say what the user has to know of their data, in a line."""
    _teller.get()(line)


@contextmanager
def telling(receiver: Tell) -> Iterator[None]:
    """Send the lines that are told inside the block to `receiver`."""
    token = _teller.set(receiver)
    try:
        yield
    finally:
        _teller.reset(token)
