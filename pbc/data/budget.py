"""A bound on the bytes that all threads together hold of photos."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Bytes that threads share: who asks for more than is left waits until others give back."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._left = most_bytes
        self._given_back = threading.Condition()

    @contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Hold so many bytes inside the block; raises ValueError for more than there ever are."""
        if size_bytes > self.most_bytes:
            raise ValueError(f"{size_bytes} bytes of {self.most_bytes}")
        with self._given_back:
            self._given_back.wait_for(lambda: self._left >= size_bytes)
            self._left -= size_bytes
        try:
            yield
        finally:
            with self._given_back:
                self._left += size_bytes
                self._given_back.notify_all()
