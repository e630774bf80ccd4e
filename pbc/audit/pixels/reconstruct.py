"""Reconstructions of photos from a bundle's gradients, beside a control that has to succeed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from pbc.audit import attack
from pbc.audit.audit import chosen_photos, head_names
from pbc.audit.options import DEFENCES, AuditOptions
from pbc.audit.pixel_tables import CONTROLS, Reconstruction
from pbc.audit.pixels import likeness, networks
from pbc.audit.pixels.attacks import ATTACKS, Gradient, Shared
from pbc.bundle import Bundle
from pbc.data import ImageFolder, InputSpec
from pbc.fleet.protection import Protection
from pbc.runtime.parameters import initial_parameters, labelled_for
from pbc.runtime.runtime import Runtime


@dataclass(frozen=True)
class PixelOptions:
    """Options of the reconstructions.

    batches: photos behind one gradient. steps: iterations of an attack; the controls have as many.
    weights: what the bundle was compiled from, if it moved.
    """

    batches: tuple[int, ...] = (1,)
    steps: int = 1000
    weights: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """A bundle, and photos that its devices would train on.

    images: f32[n, c, h, w] as the network takes them. labels: int64[n]. theta: before the update.
    bias: the name of the head's, if it has one.
    """

    bundle: Bundle
    images: np.ndarray
    labels: np.ndarray
    classes: int
    theta: dict[str, np.ndarray]
    bias: str | None

    @classmethod
    def open(cls, bundle: Path, photos: Path, options: AuditOptions, count: int) -> Target:
        """Read as many photos, at random of those that an audit with these options chooses."""
        runtime = Runtime.open(bundle)
        samples = labelled_for(runtime.bundle, ImageFolder.open(photos, runtime.spec))
        random = np.random.default_rng(options.seed)
        chosen = random.permutation(chosen_photos(samples, options))[:count]
        _, bias = head_names(runtime.bundle.manifest)
        classes = len(samples.classes)
        theta = initial_parameters(runtime.bundle, classes, options.seed)
        images, labels = samples.images(chosen), samples.labels[chosen]
        return cls(runtime.bundle, images, labels, classes, theta, bias)


def rebuilt(
    bundle: Path,
    photos: Path,
    audit: AuditOptions,
    options: PixelOptions,
    tell: Callable[[str], None],
) -> tuple[Reconstruction, ...]:
    """Rebuild photos of an audit, undefended, or under the defence that was asked for."""
    asked = audit.defences(audit.photos)
    defences = asked[:1] if asked == DEFENCES else asked
    target = Target.open(bundle, photos, audit, max(options.batches))
    return reconstruct(target, defences, options, tell)


def reconstruct(
    target: Target,
    defences: Sequence[Protection],
    options: PixelOptions,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Reconstruction, ...]:
    """Attack gradients of the target's first photos under each defence, and of the controls.

    A control has as many photos: what shows one may show none of eight.
    """
    manifest, images, labels = target.bundle.manifest, target.images, target.labels
    spec = InputSpec.from_json(manifest["input"])
    low, high = (_colours(spec, value) for value in (0.0, 1.0))
    pictures = ((torch.from_numpy(images) - low) / (high - low)).clamp(0, 1)
    small = interpolate(pictures, networks.CONTROL_PIXELS, mode="area")
    black, white = torch.zeros_like(low), torch.ones_like(high)
    controls = {
        name: made(small.shape[1], target.classes, options.seed)
        for name, made in networks.CONTROLS.items()
    }
    network = networks.of_bundle(target.bundle, options.weights, target.theta, target.bias)
    name = f"{manifest['model']}, {manifest['strategy']}"
    jobs: list[tuple[_Victim, Protection, str]] = []
    for size in dict.fromkeys(min(size, len(images)) for size in options.batches):
        few, known = small[:size], labels[:size]
        for method, control in CONTROLS.items():
            victim = _Victim(control, controls[control], few, few, known, black, white)
            jobs.append((victim, Protection(), method))
        inputs = torch.from_numpy(images[:size])
        victim = _Victim(name, network, inputs, pictures[:size], known, low, high)
        jobs += [(victim, defence, method) for defence in defences for method in ATTACKS]
    return tuple(
        _attacked(victim, defence, target.classes, method, options, tell)
        for victim, defence, method in jobs
    )


@dataclass(frozen=True)
class _Victim:
    """A network and the photos behind its gradient, as it takes them and as pictures in 0…1."""

    name: str
    gradient: Gradient
    inputs: Tensor
    pictures: Tensor
    labels: np.ndarray
    low: Tensor
    high: Tensor


def _attacked(
    victim: _Victim,
    defence: Protection,
    classes: int,
    name: str,
    options: PixelOptions,
    tell: Callable[[str], None],
) -> Reconstruction:
    photos = len(victim.inputs)
    tell(f"{victim.name}, {photos} photo{'s'[: photos != 1]}, defence {defence}: {name}")
    shares = one_hot(torch.from_numpy(victim.labels), classes).float()
    plain = victim.gradient(victim.inputs, shares).detach()
    random = np.random.default_rng(options.seed)
    vector, _ = defence(plain.numpy(), np.zeros(len(plain), np.float32), random)
    sent = vector != 0 if defence.top_k is not None else np.ones(len(vector), bool)
    shared = Shared(
        victim.gradient,
        torch.from_numpy(vector),
        torch.from_numpy(sent),
        _labels(vector, victim, classes),
        classes,
        (victim.inputs.shape[1], victim.inputs.shape[2], victim.inputs.shape[3]),
        victim.low,
        victim.high,
    )
    found = ATTACKS[name](shared, options.steps, torch.Generator().manual_seed(options.seed))
    seen = ((found.images - victim.low) / (victim.high - victim.low)).clamp(0, 1)
    seen = likeness.matched(victim.pictures, seen)
    pairs = list(zip(victim.pictures, seen, strict=True))
    return Reconstruction(
        victim.name,
        name,
        str(defence),
        photos,
        float(np.mean([likeness.psnr(photo, image) for photo, image in pairs])),
        float(np.mean([likeness.ssim(photo, image) for photo, image in pairs])),
        float(np.mean([likeness.psnr(photo, likeness.flat(photo)) for photo in victim.pictures])),
        found.distance,
        tuple((_png(photo), _png(image)) for photo, image in pairs),
    )


def _labels(vector: np.ndarray, victim: _Victim, classes: int) -> tuple[int, ...]:
    """Return the labels that the gradient names; a head without a bias is given away them."""
    where = victim.gradient.bias
    if where is None:
        return tuple(victim.labels.tolist())
    even = np.full(classes, 1 / classes)
    counts = attack.labels_named(-vector[where].astype(np.float64), even, len(victim.labels))
    return tuple(np.repeat(np.arange(classes), counts).tolist())[: len(victim.labels)]


def _colours(spec: InputSpec, value: float) -> Tensor:
    pairs = zip(spec.mean, spec.std, strict=True)
    return torch.tensor([(value - mean) / std for mean, std in pairs])[:, None, None]


def _png(picture: Tensor) -> bytes:
    pixels = (255 * picture).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()
