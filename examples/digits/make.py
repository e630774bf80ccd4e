"""Make what `pbc demo` ships: a sheet of digits, and a bundle of a network that knows six of them.

pip install '.[compile,onnx]' scikit-learn, then python examples/digits/make.py: a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # UCI's handwritten digits, CC BY 4.0
from torch.nn import functional

import pbc
from pbc.demo import digits
from pbc.demo.digits import COLUMNS, COUNTS, KNOWN, SIDE
from pbc.frontend.models import IMAGENET_MEAN, IMAGENET_STD

HERE = Path(__file__).parent
EPOCHS = 30
SHAPE = (1, 16, 16)
MEAN, STD = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3


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


def trained() -> torch.nn.Module:
    """Return the network, trained on the digits that the demo does not teach."""
    from net import factory

    torch.manual_seed(0)
    found = [(tile, label) for label in range(KNOWN) for tile in digits.of(label)]
    tiles = [tile.resize(SHAPE[1:], Image.Resampling.BILINEAR) for tile, _ in found]
    # As pbc prepares images of one channel for a network that is nobody's zoo's.
    inputs = (torch.from_numpy(np.stack(tiles)).float()[:, None] / 255 - MEAN) / STD
    labels = torch.tensor([label for _, label in found])
    network = factory(KNOWN).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(64):
            shift = [int(n) for n in torch.randint(-1, 2, (2,))]
            loss = functional.cross_entropy(
                network(inputs[chosen].roll(shift, (2, 3))), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


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
