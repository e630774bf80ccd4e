"""Lines of the user's own files, which is where an error is mended."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

import pbc

_OURS = tuple(f"{Path(module.__file__ or '').parent}/" for module in (torch, pbc))


def where_raised(error: BaseException) -> str:
    """` (File "net.py", line 12)`: the innermost line outside torch and pbc, or nothing."""
    frames = [(frame.f_code.co_filename, line) for frame, line in _traced(error)]
    return _last(frames)


def where_called() -> str:
    """` (File "net.py", line 12)`: the line outside torch and pbc that runs now, or nothing."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]
    return _last(reversed(frames))


def _traced(error: BaseException) -> Iterable[tuple[FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


def _last(frames: Iterable[tuple[str, int]]) -> str:
    found = ""
    for file, line in frames:
        if not file.startswith((*_OURS, "<")) and Path(file).is_file():
            found = f' (File "{file}", line {line})'
    return found
