"""`pbc.load`: fit, score, predict, export and save, as somebody writes it in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tiny
import tiny_onnx
from PIL import Image

import pbc
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.events import EpochReport, Finished

FIT: dict[str, Any] = {"epochs": 2, "learning_rate": 0.1, "head": "sgd"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny.photos(root / "train", 8)
    tiny.photos(root / "test", 5, seed=1)
    tiny.write(root / "m.pbc")
    tiny.costs(root / "costs.json")
    return root


@pytest.fixture(scope="module")
def fitted(assets: Path) -> pbc.Model:
    model = pbc.load(assets / "m.pbc", progress=False)
    return model.fit(assets / "train", val=assets / "test", costs=assets / "costs.json", **FIT)


def test_pbc_shows_what_it_has() -> None:
    assert {"compile", "load", "Model", "CompileOptions", "__version__"} <= set(dir(pbc))


def test_fit_score_predict(fitted: pbc.Model, assets: Path) -> None:
    assert fitted.score(assets / "test") > 0.8
    assert fitted.classes == sorted(tiny.COLOURS)
    photo = assets / "test" / "red" / "000.png"
    by_path, by_image = fitted.predict(photo), fitted.predict(Image.open(photo))
    by_array = fitted.predict(np.asarray(Image.open(photo)))
    assert isinstance(by_path, pbc.model.Prediction)
    assert by_path.label == "red"
    assert by_path == by_image == by_array
    assert repr(by_path).startswith(f"red {by_path.probability:.1%}, ")
    folder = fitted.predict(assets / "test" / "blue")
    assert isinstance(folder, list)
    assert [found.label for found in folder] == ["blue"] * 5
    assert fitted.predict([photo, photo]) == [by_path, by_path]


def test_scores_of_numbered_labels_are_those_of_the_folder(fitted: pbc.Model, assets: Path) -> None:
    samples = ImageFolder.open(assets / "test", fitted.spec)
    images = samples.batch(np.arange(len(samples)))
    assert fitted.evaluate((images, samples.labels)) == fitted.evaluate(assets / "test")


def test_saved_models_are_loaded_the_same_way(
    fitted: pbc.Model, assets: Path, tmp_path: Path
) -> None:
    mine = fitted.save(tmp_path / "mine")
    again = pbc.load(mine, progress=False)
    assert again.evaluate(assets / "test") == fitted.evaluate(assets / "test")
    (tmp_path / "other").mkdir()
    with pytest.raises(PbcError, match="other exists already; give a folder that does not"):
        again.save(tmp_path / "other")


def test_a_short_repr_in_text_and_html(fitted: pbc.Model, assets: Path) -> None:
    assert fitted.validation is not None
    assert fitted.validation.evaluation == fitted.evaluate(assets / "test")
    assert "trained on 24 photos; validation " in repr(fitted)
    assert len(repr(fitted)) < 250
    assert "<td style='text-align:left'>trained on 24 photos</td>" in fitted._repr_html_()
    assert "state not trained" in repr(pbc.load(assets / "m.pbc"))


def test_export_of_what_was_fitted(assets: Path, tmp_path: Path) -> None:
    tiny_onnx.write(tmp_path / "m.pbc")
    model = pbc.load(tmp_path / "m.pbc", progress=False)
    model.fit(assets / "train", costs=assets / "costs.json", **FIT)
    assert model.export(tmp_path / "x.onnx").stat().st_size > 1000


def test_callbacks_see_the_run_and_plugins_go_by_name(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    model = pbc.load(assets / "m.pbc", progress=False)
    model.fit(
        assets / "train",
        out=tmp_path / "mine",
        costs=assets / "costs.json",
        callbacks=[seen.append, "tensorboard"],
        **FIT,
    )
    assert [event.epoch for event in seen if isinstance(event, EpochReport)] == [1, 2]
    assert isinstance(seen[-1], Finished)
    assert model.folder == tmp_path / "mine"
    assert list((tmp_path / "mine" / "tensorboard").glob("events.out.tfevents.*"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    with pytest.raises(
        PbcError, match=r"the callback 'mlflow' cannot begin: (?s:.*)nowhere://at-al"
    ):
        model.fit(assets / "train", callbacks=["mlflow"])
    with pytest.raises(PbcError, match="no callback named 'tensorbord'; did you mean 'tensorboa"):
        model.fit(assets / "train", callbacks=["tensorbord"])


def test_mlflow_and_wandb_hold_the_run(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    pbc.load(assets / "m.pbc", progress=False).fit(
        assets / "train", costs=assets / "costs.json", callbacks=["mlflow", "wandb"], **FIT
    )
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.params["epochs"] == "2"
    assert {"train.loss", "val.accuracy"} <= set(run.data.metrics)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_fifth_is_held_out_unless_told_otherwise(assets: Path) -> None:
    options = {"costs": assets / "costs.json", **FIT}
    model = pbc.load(assets / "m.pbc", progress=False).fit(assets / "train", **options)
    assert model.validation is not None
    assert model.validation.evaluation.count == 6  # of 8 photos of each class, 2
    images = np.zeros((10, 16, 16, 3), np.uint8)
    images[5:] = 255
    images += np.arange(10, dtype=np.uint8)[:, None, None, None]  # copies are not held out
    model.fit((images, ["a"] * 5 + ["b"] * 5), **options)
    assert model.validation.evaluation.count == 2
    assert model.fit(assets / "train", val=None, **options).validation is None


def test_progress_is_on_stderr_unless_it_is_off(
    assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"costs": assets / "costs.json", **FIT}
    pbc.load(assets / "m.pbc").fit(assets / "train", **options)
    told = capsys.readouterr()
    assert "epoch 2/2" in told.err
    assert told.out == ""
    pbc.load(assets / "m.pbc", progress=False).fit(assets / "train", **options)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_is_said_in_a_line(assets: Path, tmp_path: Path) -> None:
    model = pbc.load(assets / "m.pbc", progress=False)
    with pytest.raises(PbcError, match=r"not trained yet; call fit\(photos\) first"):
        model.predict(assets / "test" / "red" / "000.png")
    with pytest.raises(PbcError, match="fit has no option 'epoch'; one of epochs, "):
        model.fit(assets / "train", epoch=3)
    with pytest.raises(PbcError, match=r"gone\.pbc"):
        pbc.load(tmp_path / "gone.pbc")
