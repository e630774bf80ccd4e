"""Classes that differ from those that a bundle was compiled with: training sizes the head."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny

from pbc import compiler
from pbc.compiler import CompileOptions
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.frontend import start
from pbc.runtime.events import Event, Note
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime

COLOURS = ["red", "green", "blue"]


MODEL = f"{Path(__file__).parents[2]}/examples/custom_model.py:factory"


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch", "tvm"])
def test_a_bundle_for_two_classes_learns_three(tmp_path: Path, engine: str) -> None:
    expected = tiny.photos(tmp_path / "two", 8, classes=["green", "red"])
    photos = tiny.photos(tmp_path / "three", 8)
    options = CompileOptions(
        engine=engine, weights="random", data=expected, levels=0, shape=(3, 32, 32), batch=4
    )
    made = compiler.compile(MODEL, tmp_path / "m.pbc", options)
    assert made.manifest["classes"] == ["green", "red"]
    runtime = Runtime.open(made.path)
    for names, told in ((COLOURS, True), (["green", "red"], False)):
        samples = ImageFolder.open(photos, runtime.spec)
        events: list[Event] = []
        if not told:
            samples = ImageFolder.open(expected, runtime.spec)
        out = tmp_path / str(len(names))
        trained = TrainOptions(epochs=20, learning_rate=0.05, skip=False)
        runtime.fit(samples, trained, out, report=events.append)
        notes = [event.text for event in events if isinstance(event, Note)]
        assert any("the head is sized for the 3 classes" in note for note in notes) == told
        personal = Personal.open(out)
        assert sorted(personal.classes) == sorted(names)
        assert personal.evaluate(samples).accuracy > 0.7


def test_a_head_that_cannot_be_left_open_is_for_its_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PbcError("the number of classes is written into `view`")

    monkeypatch.setattr(start, "open_classes", refuse)
    options = CompileOptions(
        weights="random", classes=2, levels=0, shape=(3, 32, 32), engine="onnxruntime"
    )
    made = compiler.compile(MODEL, tmp_path / "m.pbc", options)
    assert made.manifest["class_count"] == 2
    assert "the bundle is for 2 classes alone" in made.manifest["notes"][-1]
    runtime = Runtime.open(made.path)
    samples = ImageFolder.open(tiny.photos(tmp_path / "p", 2), runtime.spec)
    with pytest.raises(PbcError, match="could be compiled for 2 alone"):
        runtime.fit(samples, TrainOptions(epochs=1), tmp_path / "out")
    with pytest.raises(PbcError, match="written into"):
        compiler.compile(MODEL, tmp_path / "n.pbc", dataclasses.replace(options, classes=None))
