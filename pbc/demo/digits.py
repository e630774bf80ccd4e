"""The digits that ship with pbc, cut out of one picture.

They are the test part of «Optical recognition of handwritten digits» (E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, CC BY 4.0), as scikit-learn has them: 8x8 pixels, class by
class. examples/digits/make.py made the picture, and the bundle of a network that was trained on
the first six.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from PIL import Image

SHEET = Path(__file__).with_name("digits.png")
BUNDLE = Path(__file__).with_name("digits.pbc")
SIDE = 8
COLUMNS = 43
COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
"""How many there are of each digit."""

KNOWN = 6
"""The network knows the digits below this one."""

_FIRST = (0, *accumulate(COUNTS))


def of(digit: int) -> list[Image.Image]:
    """Return all pictures of a digit, in grey."""
    with Image.open(SHEET) as picture:
        return [_tile(picture, at) for at in range(_FIRST[digit], _FIRST[digit + 1])]


def _tile(picture: Image.Image, at: int) -> Image.Image:
    top, left = (SIDE * n for n in divmod(at, COLUMNS))
    return picture.crop((left, top, left + SIDE, top + SIDE))
