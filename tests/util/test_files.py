"""Files that others may have put there are opened within bounds."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from pbc.util.files import read_bytes


def test_room_is_made_for_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ten bytes.")
    tracemalloc.start()
    assert read_bytes(tmp_path / "file", 1 << 34) == b"ten bytes."
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_file_of_holes_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(OSError, match="it has more than 1000 bytes"):
        read_bytes(tmp_path / "file", 1000)
