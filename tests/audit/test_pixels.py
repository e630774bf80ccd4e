"""`pbc audit --pixels`: photos rebuilt from gradients, beside a control that has to succeed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_net
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot

from pbc.audit.pixel_tables import CONTROL_DB, CONTROLS, LENET, Reconstruction, findings
from pbc.audit.pixels import attacks, likeness, networks
from pbc.audit.pixels.attacks import Shared
from pbc.cli import main


def photo(examples: Path, pixels: int) -> Tensor:
    """Return f32[1, 3, h, w] in 0…1 of the first photo of the examples."""
    first = sorted((examples / "photos" / "train").rglob("*.jpg"))[0]
    image = Image.open(first).convert("RGB").resize((pixels, pixels))
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("attack", "steps", "seed"), [("iDLG", 600, 2), ("cosine + TV", 250, 0)])
def test_the_control_shows_its_photo(examples: Path, attack: str, steps: int, seed: int) -> None:
    """Without which a low figure would say nothing of a network."""
    image, classes = photo(examples, networks.CONTROL_PIXELS), 10
    gradient = networks.CONTROLS[CONTROLS[attack]](3, classes, seed)
    vector = gradient(image, one_hot(torch.tensor([4]), classes).float()).detach()
    bias = vector[gradient.bias]
    assert int((-bias).argmax()) == 4
    black, white = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    all_sent = torch.ones(len(vector), dtype=torch.bool)
    shape = (3, networks.CONTROL_PIXELS, networks.CONTROL_PIXELS)
    shared = Shared(gradient, vector, all_sent, [4], classes, shape, black, white)
    found = attacks.ATTACKS[attack](shared, steps, torch.Generator().manual_seed(0))
    assert likeness.psnr(image[0], found.images[0].clamp(0, 1)) >= CONTROL_DB


def test_likeness(examples: Path) -> None:
    image = photo(examples, 32)[0]
    assert likeness.ssim(image, image) == pytest.approx(1)
    assert likeness.psnr(image, image) > 100
    assert likeness.psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)
    flat = likeness.flat(image)
    assert flat.shape == image.shape
    assert likeness.ssim(image, flat) < 0.5


def test_a_batch_has_no_order(examples: Path) -> None:
    photos = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.5, 0.9)])
    assert torch.equal(likeness.matched(photos, photos[[2, 0, 1]]), photos)


def row(network: str, psnr: float, flat: float = 12.0, photos: int = 1) -> Reconstruction:
    return Reconstruction(network, "iDLG", "none", photos, psnr, 0.5, flat, 0.1, ())


def test_a_failed_control_proves_nothing() -> None:
    (line,) = findings([row(LENET, 20.0), row("a net", 9.0)])
    assert line.endswith("this attack's low figures prove nothing here")
    (line,) = findings([row(LENET, 30.0), row("a net", 9.0), row("a net", 10.0)])
    assert "the control shows its photo (30.0 dB); here at best 10.0 dB, 2.0 dB below" in line


def test_a_control_speaks_for_batches_of_its_size() -> None:
    one, four = findings(
        [
            row(LENET, 30.0),
            row("a net", 9.0),
            row(LENET, 15.0, photos=4),
            row("a net", 8.0, photos=4),
        ]
    )
    assert one.startswith("iDLG, 1 photo: the control shows")
    assert four.startswith("iDLG, 4 photos: the control reaches 15.0 dB")


def test_hard_sigmoids_are_the_same_with_a_second_derivative() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    same = networks._Hardsigmoid()(x)
    assert torch.allclose(same, torch.nn.functional.hardsigmoid(x))


def test_the_command(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 4)
    bundle = bench_net.compiled(tmp_path / "net", strategy="last-k:1")
    args = ["audit", str(bundle.path), str(tmp_path / "photos"), "--batch", "1,2", "--rounds", "1"]
    args += ["--pixels", "--pixel-steps", "2", "--html", str(tmp_path / "a.html")]
    shown = CliRunner().invoke(main, args)
    assert shown.exit_code == 0, shown.output
    assert "last-k:1" in shown.output
    assert "cosine + TV, 1 photo: the control reaches" in shown.output
    assert "cosine + TV, 2 photos: the control reaches" in shown.output
    assert "which shows photos" in shown.output
    page = (tmp_path / "a.html").read_text()
    assert "safe" not in page.lower()
    # A pair for each attack and photo: of batches of one and two, and of controls of as many.
    assert page.count("data:image/png;base64,") == 2 * 3 * 2 * (1 + 2)
    assert (tmp_path / "a.html").stat().st_mode & 0o077 == 0
    found = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)["pixels"]
    assert [each["photos"] for each in found] == [1] * 6 + [2] * 6
    assert replace(row(LENET, 1.0), psnr=2.0).to_json()["psnr"] == 2
