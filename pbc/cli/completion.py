"""Completion in a shell of what is installed: targets, strategies, engines, optimizers, models."""

from __future__ import annotations

from collections.abc import Callable

import click

from pbc import plugins
from pbc.bundle.optimizers import OPTIMIZERS
from pbc.data.spec import RESIZES

Complete = Callable[[click.Context, click.Parameter, str], list[str]]

_MODELS = (
    "convnext_tiny", "efficientnet_b0", "mobilenet_v3_large", "mobilenet_v3_small", "resnet18",
    "resnet50", "vit_b_16",
)  # fmt: skip
_ZOOS = ("torchvision:", "timm:", "hf-hub:")


def plugins_of(group: str) -> Complete:
    """Complete the names of a group's plugins."""
    return lambda ctx, param, incomplete: _starting(plugins.entries(group), incomplete)


def optimizers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of optimizers."""
    return _starting(OPTIMIZERS, incomplete)


def resizes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the ways to bring a photo to its size."""
    return _starting(RESIZES, incomplete)


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the usual models, and behind `timm:` and `torchvision:` all of theirs."""
    zoo, colon, name = incomplete.partition(":")
    if not colon:
        return _starting((*_MODELS, *_ZOOS), incomplete)
    try:
        known = _zoo(zoo)
    except ImportError:  # not installed
        return []
    # A shell takes what stands behind the colon for a word of its own.
    return _starting(known, name)


def _zoo(name: str) -> list[str]:
    from pbc.frontend.torchvision_shim import import_torchvision

    torchvision = import_torchvision()
    if name == "torchvision":
        return list(torchvision.models.list_models(module=torchvision.models))
    if name == "timm":
        import timm

        return list(timm.list_models())
    return []


def _starting(names: object, incomplete: str) -> list[str]:
    assert hasattr(names, "__iter__")
    return sorted(name for name in names if name.startswith(incomplete))
