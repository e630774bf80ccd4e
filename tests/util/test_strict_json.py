"""JSON from elsewhere is JSON, and bounded, or it is refused with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pbc.util import strict_json


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number of JSON"),
        (b"[1e999]", "a number is too large"),
        (b"[" + b"9" * 5000 + b"]", "integer string conversion|too large"),
        (b"[1" + b"0" * 100 + b"]", "a whole number is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'["\\ud800"]', "half of a character"),
        (b'{"\\udfff": 1}', "half of a character"),
        (b'["\xed\xa0\x80"]', "can't decode"),
        (b'["\\u001b[2J"]', r"control character U\+001B"),
        (b'["\\u009b2J"]', r"control character U\+009B"),
        (b'["\\u202e"]', r"control character U\+202E"),
        (b'["\\u200f"]', r"control character U\+200F"),
        ('"\ufeff"'.encode(), r"control character U\+FEFF"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"[" * 100_000, "nested deeper than 64|more than"),
        (b"[" + b"0," * 2_000_001 + b"0]", "more than 2000000 values"),
        (b" " * (16 << 20) + b"1", "bytes; at most"),
        (b"\xff\xfe1", "can't decode"),
        (b"{", "Expecting"),
        (b"1 1", "Extra data"),
    ],
)
def test_a_refusal_for_each_way_to_be_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.loads(data)


def test_what_python_writes_is_read() -> None:
    value = {
        "é": ["\u0645\u200c\u06cc", "\U0001f600", "a\tb\nc", 1.5, -3, None, True, 2**128, {}],
        "": [],
    }
    assert strict_json.loads(json.dumps(value)) == value
    assert strict_json.loads(json.dumps(value, ensure_ascii=False).encode()) == value
    deep = json.loads("[" * 64 + "]" * 64)
    assert strict_json.loads(json.dumps(deep)) == deep


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("[1]")
    for name in ("pipe", "folder", "none"):
        with pytest.raises(OSError, match=r"regular|directory|No such"):
            strict_json.load(tmp_path / name)
    assert strict_json.load(tmp_path / "file") == [1]
