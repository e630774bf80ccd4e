"""Reconstruct photos from a gradient: images are sought whose gradient is the one that was shared.

- `dlg`: photos and labels at once, squared distance (Zhu et al., Deep Leakage from Gradients,
  2019).
- `idlg`: labels first, from the head's bias (Zhao et al., iDLG, 2020); then as DLG.
- `cosine`: labels first; direction of the gradient, and total variation of the image, by the signs
  of Adam's steps (Geiping et al., Inverting Gradients, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot


class Gradient(Protocol):
    """The mean loss' gradient as a function of the photos, to differentiate once more."""

    @property
    def bias(self) -> slice | None:
        """Return where the head's bias is, if it has one."""

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        """Return f32[d] of images f32[n, c, h, w] and label shares f32[n, classes]."""


# Geiping et al.: 0.1 where black and white are 4.5 apart.
_RATE = 0.02
# A tenth of the step after each of these shares of the iterations, as they do.
_DECAYS = (3 / 8, 5 / 8, 7 / 8)
_VARIATION = 1e-4
_HISTORY = 100


@dataclass(frozen=True)
class Shared:
    """What an attacker has: the gradient f32[d], its labels as far as it names them, and the model.

    low, high: f32[c, 1, 1], what black and white are to the network. sent: bool[d], which values
    of the gradient were sent at all.
    """

    gradient: Gradient
    vector: Tensor
    sent: Tensor
    labels: Sequence[int]
    classes: int
    shape: tuple[int, int, int]
    low: Tensor
    high: Tensor

    def start(self, random: torch.Generator) -> Tensor:
        """Return noise about grey."""
        noise = torch.randn((len(self.labels), *self.shape), generator=random)
        return (self.low + self.high) / 2 + (self.high - self.low) / 4 * noise

    def difference(self, images: Tensor, shares: Tensor) -> Tensor:
        return torch.where(self.sent, self.gradient(images, shares) - self.vector, 0.0)


@dataclass(frozen=True)
class Found:
    """Images f32[n, c, h, w] as the network takes them, and how far their gradient is."""

    images: Tensor
    distance: float


def dlg(shared: Shared, steps: int, random: torch.Generator) -> Found:
    """Seek images and labels by L-BFGS."""
    scores = torch.randn((len(shared.labels), shared.classes), generator=random)
    return _by_lbfgs(shared, shared.start(random), scores.requires_grad_(), steps)


def idlg(shared: Shared, steps: int, random: torch.Generator) -> Found:
    """Seek images of the labels that the gradient names, by L-BFGS."""
    return _by_lbfgs(shared, shared.start(random), None, steps)


def cosine(shared: Shared, steps: int, random: torch.Generator) -> Found:
    """Seek smooth images of the labels whose gradient has the same direction."""
    shares, span = _known(shared), shared.high - shared.low
    pictures = ((shared.start(random) - shared.low) / span).clamp(0, 1).requires_grad_()
    target = shared.vector / shared.vector.norm().clamp_min(1e-30)
    optimizer = torch.optim.Adam([pictures], lr=_RATE)
    decay = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [int(share * steps) for share in _DECAYS], 0.1
    )
    best = Found(shared.low + span * pictures.detach(), float("inf"))
    for _ in range(steps):
        optimizer.zero_grad()
        vector = shared.gradient(shared.low + span * pictures, shares)
        vector = torch.where(shared.sent, vector, 0.0)
        apart = 1 - vector @ target / vector.norm().clamp_min(1e-30)
        (apart + _VARIATION * _variation(pictures)).backward()
        if float(apart.detach()) < best.distance:
            best = Found(shared.low + span * pictures.detach(), float(apart.detach()))
        assert pictures.grad is not None, "the gradient depends on the pictures"
        pictures.grad.sign_()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            pictures.clamp_(0, 1)
    return best


ATTACKS: Mapping[str, Callable[[Shared, int, torch.Generator], Found]] = {
    "DLG": dlg,
    "iDLG": idlg,
    "cosine + TV": cosine,
}


def _by_lbfgs(shared: Shared, images: Tensor, scores: Tensor | None, steps: int) -> Found:
    images.requires_grad_()
    sought = [images] if scores is None else [images, scores]
    optimizer = torch.optim.LBFGS(
        sought, max_iter=steps, history_size=_HISTORY, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    # Squared distances of gradients are far below what the line search takes for nothing.
    scale = 1 / float((shared.vector**2).sum().clamp_min(1e-30))
    best = Found(images.detach().clone(), float("inf"))

    def closure() -> Tensor:
        nonlocal best
        optimizer.zero_grad()
        shares = _known(shared) if scores is None else log_softmax(scores, 1).exp()
        distance: Tensor = scale * (shared.difference(images, shares) ** 2).sum()
        distance.backward()
        if float(distance.detach()) < best.distance:
            best = Found(images.detach().clone(), float(distance.detach()))
        return distance

    optimizer.step(closure)
    return best


def _known(shared: Shared) -> Tensor:
    return one_hot(torch.tensor(list(shared.labels)), shared.classes).float()


def _variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours."""
    down, right = images.diff(dim=2), images.diff(dim=3)
    return down.abs().mean() + right.abs().mean()
