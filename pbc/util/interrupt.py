"""Ctrl-C and SIGTERM between two steps instead of inside one, where state is half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """The fact that Ctrl-C was pressed, or that the system asks the process to end."""

    requested = False


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does; in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Note the first Ctrl-C or SIGTERM instead of raising; the second raises KeyboardInterrupt."""
    interrupt = Interrupt()
    # Python lets only the main thread handle signals; elsewhere nothing changes.
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM arrive when the block is over.

    An extension module that meets one while it is imported may say of itself that it is broken.
    """
    with deferred_interrupt() as interrupt:
        yield
    if interrupt.requested:
        signal.raise_signal(signal.SIGINT)
