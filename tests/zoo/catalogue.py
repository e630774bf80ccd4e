"""The catalogue: which networks the zoo tries, at which size, and how a user would build them.

`python tests/zoo/catalogue.py > tests/zoo/networks.txt` lists them anew after an update of timm or
torchvision (half an hour): of every family the smallest variant, at the smallest input it accepts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import operators
import torch
from torch import Tensor, nn

from pbc.frontend.torchvision_shim import import_torchvision

LIST = Path(__file__).with_name("networks.txt")
SIZES = (64, 96, 128, 224)
"""Inputs that are tried, in pixels of height and width; then the network's own."""

_LARGEST = 60_000_000
# Words of a name in front of the architecture's, or in its place.
_NOT_FAMILY = {"tf", "tv", "legacy", "nf", "gc", "rw", "tiny", "bat", "cs3"}


@dataclass(frozen=True)
class Network:
    """A network of a library with the side of its square input, in pixels.

    name: as `pbc compile` takes it, `timm:NAME` or `torchvision:NAME`.
    """

    name: str
    size_pixels: int
    parameters: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.size_pixels, self.size_pixels


def networks() -> list[Network]:
    """Read the catalogue, in the order of its file."""
    rows = (line.split() for line in LIST.read_text().splitlines() if not line.startswith("#"))
    return [Network(name, int(size), int(parameters)) for name, size, parameters in rows]


def of_operators() -> list[Network]:
    """Return the networks of one operator each, by the file and function that make them."""
    file = operators.__file__
    return [
        Network(f"{file}:{name}", operators.SIZE_PIXELS, _count(getattr(operators, name)()))
        for name in operators.OPERATORS
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(name: str, size_pixels: int) -> nn.Module:
    """Make the eager module as its library's documentation says, with 1000 classes."""
    library, _, model = name.partition(":")
    if library == operators.__file__:
        return _module(getattr(operators, model)())
    torchvision = import_torchvision()  # timm imports it, which fails beside a CPU build of torch
    if library == "torchvision":
        options: dict[str, Any] = {}
        if model.startswith("vit_"):
            options = {"image_size": size_pixels}
        elif model.startswith("maxvit"):
            options = {"input_size": (size_pixels, size_pixels)}
        made: nn.Module = torchvision.models.get_model(model, weights=None, **options)
        return made
    import timm

    own = timm.get_pretrained_cfg(model)
    if own is not None and tuple(own.input_size)[1:] == (size_pixels, size_pixels):
        return _module(timm.create_model(model))
    try:
        return _module(timm.create_model(model, img_size=size_pixels))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return _module(timm.create_model(model))


def _module(made: Any) -> nn.Module:
    assert isinstance(made, nn.Module)
    return made


# ---- listing anew --------------------------------------------------------------------------


def main() -> None:
    """Print the smallest network of every family, with its smallest input and its parameters."""
    families: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
    for name, module, own_pixels in _classifiers():
        count = _count(module)
        if count <= _LARGEST:
            families.setdefault(_family(name, module), []).append((count, name, own_pixels))
    for variants in families.values():
        for count, name, own_pixels in sorted(variants)[:2]:  # one may refuse every size
            size = _smallest_input(name, own_pixels)
            if size is not None:
                sys.stdout.write(f"{name} {size} {count}\n")
                break


def _classifiers() -> Iterator[tuple[str, nn.Module, int]]:
    """Each network with a classifier: its name, itself without memory, its own input in pixels."""
    models = import_torchvision().models
    import timm

    for name in [
        *(f"timm:{model}" for model in timm.list_models() if not model.startswith("test_")),
        *(f"torchvision:{model}" for model in models.list_models(module=models)),
    ]:
        library, _, model = name.partition(":")
        config = timm.get_pretrained_cfg(model) if library == "timm" else None
        own_pixels = 224 if config is None else config.input_size[-1]
        try:
            with torch.device("meta"):
                module = build(name, own_pixels)
        except Exception:  # whatever does not build without memory, and its variants do
            continue
        if getattr(module, "num_classes", 1000):
            yield name, module, own_pixels


def _family(name: str, module: nn.Module) -> tuple[str, str]:
    """The class of a network and the word of its name that is no size."""
    words = [word for word in name.partition(":")[2].split("_") if word not in _NOT_FAMILY]
    letters = re.match("[a-z]*", words[0])
    assert letters is not None
    return f"{type(module).__module__}.{type(module).__name__}", letters[0]


def _smallest_input(name: str, own_pixels: int) -> int | None:
    """The smallest side in pixels at which a network gives finite scores; None where none does."""
    for size in dict.fromkeys((*(size for size in SIZES if size < own_pixels), own_pixels)):
        try:
            module = build(name, size).eval()
            with torch.no_grad():
                scores = module(torch.randn(2, 3, size, size))
        except Exception:  # how a library refuses a size is its own affair
            continue
        if isinstance(scores, Tensor) and scores.shape == (2, 1000) and scores.isfinite().all():
            return size
    return None


if __name__ == "__main__":
    main()
