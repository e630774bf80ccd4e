"""Make what `pbc demo` ships: a sheet of digits, and a bundle of a network that knows six of them.

pip install '.[compile,onnx]' scikit-learn, then python examples/digits/make.py: a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # UCI's handwritten digits, CC BY 4.0
from train import SHAPE, trained

import pbc
from pbc.demo import digits
from pbc.demo.digits import COLUMNS, COUNTS, SIDE

HERE = Path(__file__).parent


def write_sheet() -> None:
    """Write all digits, class by class, as one picture."""
    loaded = load_digits()
    order = np.argsort(loaded.target, kind="stable")
    tiles = np.minimum(loaded.images[order] * 16, 255).astype(np.uint8)
    columns = COLUMNS
    whole = np.zeros((-len(tiles) % columns + len(tiles), SIDE, SIDE), np.uint8)
    whole[: len(tiles)] = tiles
    rows = whole.reshape(-1, columns, SIDE, SIDE).swapaxes(1, 2)
    picture = Image.fromarray(rows.reshape(-1, columns * SIDE))
    picture.save(digits.SHEET, optimize=True)
    assert tuple(np.bincount(loaded.target)) == COUNTS


def main() -> None:
    """Write both files into pbc/demo/."""
    write_sheet()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "digits.safetensors"
        save_file(trained().state_dict(), weights)
        options = pbc.CompileOptions(
            target="generic-x86-64",
            engine="onnxruntime",
            weights=str(weights),
            shape=SHAPE,
            levels=0,
        )
        pbc.compile(f"{HERE / 'net.py'}:factory", digits.BUNDLE, options)
    digits.BUNDLE.with_name(f".{digits.BUNDLE.name}.origin.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
