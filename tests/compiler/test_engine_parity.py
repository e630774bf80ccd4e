"""A whole training on the demo's network and photos ends alike on both engines, and resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from killing import killed_until_done

from pbc import compiler
from pbc.bundle import Bundle, write
from pbc.data import ImageFolder
from pbc.ir import pipeline
from pbc.ir.calibration import Calibration
from pbc.ir.pipeline import PassPipeline
from pbc.runtime.events import Report
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime
from pbc.testing import with_request

ENGINES = ("onnxruntime", "pytorch")
LEVELS = 2
TRAINING = {"epochs": 6, "optimizer": "sgd", "threads": 1, "skip": False}


@pytest.fixture(scope="module")
def bundles(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The demo's network with one proxy, for each engine, with the same weights."""
    root = tmp_path_factory.mktemp("parity")
    calibration = root / "calibration"
    calibration.mkdir()
    for photo in sorted((examples / "calibration").iterdir())[::10]:
        (calibration / photo.name).symlink_to(photo)
    # Costs by counting, on a target that is not this machine: the same plan for both.
    options = compiler.CompileOptions(
        target="generic-x86-64",
        engine=ENGINES[0],
        weights=str(examples / "weights" / "mobilenet_v3_large.safetensors"),
        strategy="last-k:1",
        data=examples / "photos" / "train",
        shape=(3, 64, 64),
        levels=LEVELS - 1,
        axes=("width",),
        align_steps=2,
        ladder="even",
    )
    program = compiler.start("mobilenet_v3_large", options)
    data = Calibration.open(calibration, program.network.input, options.seed)
    passes = pipeline.build(vars(options)).passes
    # What the engines share is made once: the proxy, and all before the training step.
    last = [step.stage for _, step in passes].index("derive")
    shared = PassPipeline(passes[:last]).run(replace(program, calibration=data))
    found = {}
    for engine in ENGINES:
        lowered = PassPipeline(passes[last:]).run(with_request(shared, engine=engine))
        found[engine] = write(root / f"{engine}.pbc", *compiler.package(lowered))
    return found


def fit(source: Bundle, examples: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train on the demo's photos; return the lines of the metrics, the last with the accuracy."""
    report = settings.pop("report", lambda event: None)
    out.mkdir(exist_ok=True)
    costs = tiny.costs(out / "given.json", LEVELS)
    runtime = Runtime.open(source.path)
    train, test = (
        ImageFolder.open(examples / "photos" / part, runtime.spec) for part in ("train", "test")
    )
    options = TrainOptions(**{**TRAINING, "costs": costs, **settings})
    runtime.fit(train, options, out, val=test, resume=True, report=report)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_whole_training_is_that_of_pytorch(
    bundles: dict[str, Bundle], examples: Path, tmp_path: Path, level: int
) -> None:
    # The given costs make the cheapest level the choice for every sample that may go there.
    pinned: dict[str, Any] = {"fidelity_floor": 0.0, "max_level": level}
    ours, expected = (
        fit(bundles[engine], examples, tmp_path / engine, **pinned) for engine in ENGINES
    )
    for line, other in zip(ours, expected, strict=True):
        assert line.get("levels") == other.get("levels")
    losses, others = (
        [line["loss"] for line in lines if "loss" in line] for lines in (ours, expected)
    )
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(losses, others, atol=1e-3)
    accuracies = [lines[-1]["val_accuracy"] for lines in (ours, expected)]
    # The proxy is barely aligned: better than guessing among ten classes is all that it gives.
    assert accuracies[0] > (0.5 if level == 0 else 0.15)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.003)


def test_a_killed_training_resumes_to_the_same_bits(
    bundles: dict[str, Bundle], examples: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"checkpoint_seconds": 0.0, "optimizer": "adamw", "epochs": 2}
    fit(bundles["onnxruntime"], examples, tmp_path / "whole", **settings)

    def train(report: Report) -> None:
        fit(bundles["onnxruntime"], examples, tmp_path / "killed", report=report, **settings)

    killed_until_done(train, 7, (10, 40))
    name = "trainable.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
