"""Networks that look at one channel, from their own file to a prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from pbc import compiler
from pbc.compiler import CompileOptions
from pbc.data import ImageFolder
from pbc.data.arrays import pixels
from pbc.data.samples import read_image
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 8, 3, 2)
        self.fc = torch.nn.Linear(8, 3)
    def forward(self, x):
        return self.fc(torch.relu(self.stem(x)).mean((2, 3)))
"""


@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime"])
def test_a_network_of_one_channel(tmp_path: Path, engine: str) -> None:
    (tmp_path / "net.py").write_text(NET)
    options = CompileOptions(
        target="generic-x86-64", engine=engine, weights="random", shape=(1, 16, 16), levels=0
    )
    compiler.compile(f"{tmp_path / 'net.py'}:Net", tmp_path / "m.pbc", options)
    runtime = Runtime.open(tmp_path / "m.pbc")
    photos = tiny.photos(tmp_path / "photos", 4)
    samples = ImageFolder.open(photos, runtime.spec)
    assert samples.decode(0).shape == (16, 16, 1)
    settings = TrainOptions(epochs=1, learning_rate=0.1, augment=2)
    runtime.fit(samples, settings, tmp_path / "out")
    personal = Personal.open(tmp_path / "out")
    photo = next(photos.rglob("*.png"))
    ((name, share), *_) = personal.predict(read_image(photo, personal.spec))
    assert name in samples.classes
    gray = np.asarray(Image.open(photo).convert("L").resize((16, 16), Image.Resampling.BILINEAR))
    assert personal.predict(gray[..., None])[0] == (name, share)


def test_frames_of_a_stream_may_have_no_axis_of_channels() -> None:
    spec = tiny.SPEC.from_json({**tiny.SPEC.to_json(), "shape": [1, 4, 6], "mean": [0], "std": [1]})
    frame = np.arange(48, dtype=np.uint8).reshape(6, 8)
    small = pixels(frame, spec, "frame 0")
    assert small.shape == (4, 6, 1)
    assert np.array_equal(pixels(frame[..., None], spec, "frame 0"), small)
