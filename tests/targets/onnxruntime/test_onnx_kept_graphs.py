"""Graphs that are kept between loads: what onnxruntime cannot read back is kept in another form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import settled
from torch import Tensor, nn

from pbc import bundle, compiler
from pbc.bundle.ladder import INT8
from pbc.frontend.torchvision_shim import import_torchvision
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies.trial import rounded
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.testing import make_program, run_passes, with_request


class ShuffleNet(nn.Module):
    """The start of ShuffleNet V2: depthwise convolutions of 58 and 116 channels."""

    def __init__(self) -> None:
        super().__init__()
        unit = import_torchvision().models.shufflenetv2.InvertedResidual
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.units = nn.Sequential(
            unit(24, 116, 2), unit(116, 116, 1), unit(116, 232, 2), unit(232, 232, 1)
        )
        self.fc = nn.Linear(232, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.units(torch.relu(self.stem(x))).mean((2, 3)))
        return logits


def test_an_int8_level_is_made_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "cache"))
    passes = (MarkTrainable(), SplitPrefix())
    program = make_program(settled(ShuffleNet()), shape=(3, 64, 64), passes=passes)
    program = with_request(program, engine="onnxruntime")
    original, example = program.levels[0], program.network.example
    level = rounded(replace(original, precision=INT8), example)
    program = run_passes(replace(program, levels=(original, level)), Lower())
    written = bundle.write(tmp_path / "m.pbc", *compiler.package(program))

    def load() -> tuple[np.ndarray, dict[str, int]]:
        features = OnnxRuntimeEngine().load(written).prefix(1, example.numpy())
        graphs = (tmp_path / "cache").rglob("*.onnx")
        return next(iter(features.values())), {str(g): g.stat().st_mtime_ns for g in graphs}

    first, kept = load()
    again, unchanged = load()
    assert kept
    assert kept == unchanged
    assert np.array_equal(first, again)
