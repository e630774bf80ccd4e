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

import torch
from torch import Tensor, nn

from pbc.frontend.torchvision_shim import import_torchvision

LIST = Path(__file__).with_name("networks.txt")
SIZES = (64, 96, 128, 224)
"""Inputs that are tried, in pixels of height and width; then the network's own."""

_LARGEST = 60_000_000
# Words of a name that tell variants of one architecture apart: sizes, resolutions, releases.
_VARIANT = re.compile(
    r"\d.*|[a-z]{1,2}\d+[a-z]*|x+[slt]|nano|pico|femto|atto|zepto|test|tiny|mini|micro|small|medium"
    r"|base|large|xlarge|huge|giant|gigantic|enormous|lite|light|[smlnbtghx]|patch\d+|in\d+k|ns|w\d+.*"
)


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


def build(name: str, size_pixels: int) -> nn.Module:
    """Make the eager module as its library's documentation says, with 1000 classes."""
    library, _, model = name.partition(":")
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


def _candidates() -> Iterator[tuple[str, str, int, int]]:
    """Each classification network: its name, family, parameters, and its own input in pixels."""
    models = import_torchvision().models
    import timm
    from timm.models import is_model_in_modules

    for model in timm.list_models():
        name = f"timm:{model}"
        config = timm.get_pretrained_cfg(model)
        try:
            with torch.device("meta"):
                module = _module(timm.create_model(model))
        except Exception:  # whatever does not build without memory is not tried with it
            continue
        if isinstance(module.get_classifier(), nn.Identity):  # type: ignore[operator]
            continue
        own = config.input_size[-1] if config is not None else 224
        yield name, _family(model, module), _count(module), own
    assert is_model_in_modules
    for model in models.list_models(module=models):
        with torch.device("meta"):
            module = models.get_model(model, weights=None)
        yield f"torchvision:{model}", "torchvision " + _family(model, module), _count(module), 224


def _family(model: str, module: nn.Module) -> str:
    """The class of a network and the words of its name that are no size."""
    words = [word for word in model.split("_") if not _VARIANT.fullmatch(word)]
    return " ".join([type(module).__module__, type(module).__name__, *words])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _smallest_input(name: str, own: int) -> int | None:
    """The smallest side in pixels at which a network gives finite scores; None where none does."""
    for size in dict.fromkeys((*(s for s in SIZES if s <= own), own)):
        try:
            with torch.no_grad():
                scores = build(name, size).eval()(torch.randn(2, 3, size, size))
        except Exception:  # how a library refuses a size is its own affair
            continue
        if isinstance(scores, Tensor) and scores.shape == (2, 1000) and scores.isfinite().all():
            return size
    return None
