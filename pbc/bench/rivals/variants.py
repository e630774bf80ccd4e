"""Eager or compiled: whichever runs PET's network faster on this machine."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from pbc.frontend import original as network
from pbc.frontend.original import Call

_TIMED_CALLS = 5


@dataclass(frozen=True)
class Variant:
    """A way to run the network: `frozen` (None without a prefix), then `body`.

    size: samples per call that it is for.
    """

    name: str
    size: int
    frozen: Call | None
    body: Call

    @property
    def label(self) -> str:
        """Return what tells it apart."""
        return f"{self.name} in calls of {self.size}"


@dataclass(frozen=True)
class Choice:
    """Variants that run here, the fastest per sample first, with notes for the reader."""

    variants: tuple[Variant, ...]
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def choose(
    parts: network.Parts, sizes: tuple[int, ...], bfloat16: bool, may_compile: bool
) -> Choice:
    """Choose once per process among eager and compiled, at each size, outside of measured time.

    Compiled code is for calls of one size; what is left at the end runs eagerly, since compiling
    for it takes longer than it will ever save.
    """
    frozen = None if parts.frozen is None else network.without_gradient(parts.frozen, bfloat16)
    variants = [Variant("eager", size, frozen, parts.body) for size in sizes]
    notes = [] if may_compile else ["torch.compile was not tried"]
    for eager in tuple(variants) if may_compile else ():
        compiled = _compiled(parts, eager, bfloat16)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _pass(parts, compiled, _noise(parts, compiled.size))
        except Exception as error:  # no C++ compiler, an operator that it cannot do: torch's own
            notes.append(network.not_compiled(error))
            break
        variants.append(compiled)
    if len(variants) == 1:
        return Choice(tuple(variants), tuple(notes))
    milliseconds = _milliseconds(parts, variants)
    what = "forward and backward" if parts.frozen is None else "the frozen prefix"
    times = ", ".join(
        f"{variant.label}: {milliseconds[variant.label]:.3g} ms" for variant in variants
    )
    ranked = sorted(variants, key=lambda variant: milliseconds[variant.label])
    notes.append(f"{what} per sample: {times}; the fastest ran")
    return Choice(tuple(ranked), tuple(notes))


def _milliseconds(parts: network.Parts, variants: Sequence[Variant]) -> dict[str, float]:
    """Return the best time per sample of each variant, by label."""
    images = {variant.size: _noise(parts, variant.size) for variant in variants}
    best = {variant.label: math.inf for variant in variants}
    for _ in range(_TIMED_CALLS):
        for variant in variants:  # in turn: what else runs here slows all alike
            start = perf_counter()
            _pass(parts, variant, images[variant.size])
            spent = 1000 * (perf_counter() - start) / variant.size
            best[variant.label] = min(best[variant.label], spent)
    return best


def _compiled(parts: network.Parts, eager: Variant, bfloat16: bool) -> Variant:
    """Compile the frozen prefix, or the whole network where there is none."""

    def for_size(compiled: Call, other: Call) -> Call:
        # Images come first among the inputs of both.
        return lambda images, *rest: (compiled if len(images) == eager.size else other)(
            images, *rest
        )

    if parts.frozen is None or eager.frozen is None:
        body = for_size(torch.compile(parts.body, dynamic=False), parts.body)
        return Variant("torch.compile", eager.size, None, body)
    frozen = torch.compile(parts.frozen, dynamic=False)
    chosen = for_size(network.without_gradient(frozen, bfloat16), eager.frozen)
    return Variant("torch.compile", eager.size, chosen, parts.body)


def _noise(parts: network.Parts, size: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(size, *parts.shape, generator=random)
    return images.contiguous(memory_format=torch.channels_last)


def _pass(parts: network.Parts, variant: Variant, images: Tensor) -> None:
    """Run what differs between variants: the prefix, or forward and backward of the network."""
    if variant.frozen is not None:
        variant.frozen(images)
        return
    theta = {name: value.clone().requires_grad_() for name, value in parts.theta.items()}
    network.logits(parts, variant.body, (images,), theta).sum().backward()
