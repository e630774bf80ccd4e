"""JSON from elsewhere: bounded in size and depth, and no value that JSON itself does not have.

Python's reader takes `NaN`, lone surrogates and what acts on a terminal, keeps the last of two
equal keys, and answers to deep nesting with an error of its own. All JSON is read through here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from pbc.util.files import read_bytes
from pbc.util.terminal import CONTROL

MOST_BYTES = 16 << 20
MOST_DEPTH = 64
_MOST_VALUES = 2_000_000
_LARGEST = 1 << 256  # states of random generators have 128 bits


def loads(data: bytes | str) -> Any:
    """Return the value; raises ValueError, which says what is wrong in a few words."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes; at most {MOST_BYTES} are read")
    text = data if isinstance(data, str) else data.decode()
    # Each value but the last has a comma or a bracket after it.
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
        _check(value, 1)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH}") from None
    return value


def load(path: Path) -> Any:
    """Read a file; raises OSError, and ValueError as `loads` does."""
    return loads(read_bytes(path, MOST_BYTES))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is too large")
    elif isinstance(value, int):
        if abs(value) >= _LARGEST:
            raise ValueError("a whole number is too large")
    elif isinstance(value, dict | list):
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                _check_text(key)
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, depth + 1)


def _check_text(text: str) -> None:
    if text.isascii() and text.isprintable():
        return
    if found := CONTROL.search(text):
        raise ValueError(f"a text holds the control character U+{ord(found[0]):04X}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a character (a lone surrogate)") from None
