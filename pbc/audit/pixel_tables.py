"""Reconstructions as rows of words; how they are made is in pbc.audit.pixels, which needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LENET, CONVNET = "LeNet, 32 px: the control", "ConvNet, 32 px: the control"
CONTROLS = {"DLG": LENET, "iDLG": LENET, "cosine + TV": CONVNET}
"""The network on which an attack is known to succeed, of the kind that it was published for."""

CONTROL_DB = 25.0
"""What an attack has to reach on its control, for its failures elsewhere to say anything."""


@dataclass(frozen=True)
class Reconstruction:
    """What one attack makes of one gradient, on average of its photos.

    psnr: in dB; flat_psnr: of the photo's own mean colour. distance: of the gradients, as the
    attack measures it. pictures: pairs of PNG files, photo and reconstruction.
    """

    network: str
    attack: str
    defence: str
    photos: int
    psnr: float
    ssim: float
    flat_psnr: float
    distance: float
    pictures: tuple[tuple[bytes, bytes], ...]

    def to_json(self) -> dict[str, Any]:
        names = ("network", "attack", "defence", "photos", "psnr", "ssim", "flat_psnr", "distance")
        return {name: getattr(self, name) for name in names}


HEADER = ("network", "photos", "defence", "attack", "PSNR", "flat colour", "SSIM", "distance")

READING = (
    "PSNR: of a reconstruction, in dB; flat colour: of the photo's own mean colour, which shows "
    "nothing of it. SSIM: 1 is the photo itself. distance: of the gradients, as the attack has it. "
    "Hard sigmoids have no second derivative in torch: here they are clamped lines, which are the "
    "same function."
)


def rows(found: Sequence[Reconstruction]) -> list[list[str]]:
    """Return the header and a line per reconstruction."""
    lines = [list(HEADER)]
    lines += [
        [
            row.network,
            str(row.photos),
            row.defence,
            row.attack,
            f"{row.psnr:.1f} dB",
            f"{row.flat_psnr:.1f} dB",
            f"{row.ssim:.2f}",
            f"{row.distance:.1e}",
        ]
        for row in found
    ]
    return lines


def findings(rows: Sequence[Reconstruction]) -> list[str]:
    """Say of each attack and size of batch whether it works at all, and what it makes of photos."""
    lines = []
    for name, photos in dict.fromkeys((row.attack, row.photos) for row in rows):
        mine = [row for row in rows if (row.attack, row.photos) == (name, photos)]
        control = next(row for row in mine if row.network == CONTROLS[name])
        what = f"{name}, {photos} photo{'s'[: photos != 1]}"
        if control.psnr < CONTROL_DB:
            lines.append(
                f"{what}: the control reaches {control.psnr:.1f} dB of {CONTROL_DB:g}, so this "
                "attack's low figures prove nothing here"
            )
            continue
        best = max(
            (row for row in mine if row is not control), key=lambda row: row.psnr - row.flat_psnr
        )
        over = best.psnr - best.flat_psnr
        compared = f"{abs(over):.1f} dB {'above' if over > 0 else 'below'} a flat colour"
        lines.append(
            f"{what}: the control shows its photo ({control.psnr:.1f} dB); here at best "
            f"{best.psnr:.1f} dB, {compared} (defence {best.defence})"
        )
    return lines
