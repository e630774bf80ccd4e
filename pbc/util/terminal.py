"""Characters that act on a terminal, or hide there, instead of being shown."""

from __future__ import annotations

import re

LONGEST_LINE = 500
"""Characters of a line that says what is wrong."""

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # but for tabs and ends of lines
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of text
    "\u2028\u2029\u00ad\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # are not seen
    "\U000e0000-\U000e007f]"
)
"""Characters that act on a terminal, or that hide; joiners stay, which scripts are spelled with."""


def escaped(text: str) -> str:
    r"""Return a text with such characters, and lone surrogates, written as \xNN or \uNNNN."""
    shown = CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return shown.encode("utf-8", "backslashreplace").decode()


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return a text as one line that may be shown: escaped, without its line ends, and cut."""
    shown = re.sub(r"\s*[\n\t]\s*", " ", escaped(text).strip())
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
