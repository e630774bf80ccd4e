"""What is shown acts on no terminal, hides nothing, and is one line where it must be."""

from __future__ import annotations

import pytest

from pbc.util.terminal import escaped, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u200f", "a\\u202eb\\u200f"),
        ("\ufeff\u200b\u00ad", "\\ufeff\\u200b\\xad"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        (
            "\u0645\u200c\u06cc \u65e5\u672c \U0001f600",
            "\u0645\u200c\u06cc \u65e5\u672c \U0001f600",
        ),
    ],
)
def test_characters_that_act_or_hide_are_spelled_out(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_a_line_is_one_line() -> None:
    assert one_line(" a\n\nerror: b\tc\r\n") == "a error: b c\\r"
    assert one_line("x" * 500) == "x" * 500
    assert one_line("x" * 501) == "x" * 499 + "\u2026"
