"""Commands account for every file of a data set in few lines, and go on past broken photos."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest
import tiny
from PIL import Image

from pbc.cli import main
from pbc.data import ImageFolder, Inventory
from pbc.data.formats import HEIC
from pbc.errors import PbcError
from pbc.ir.calibration import Calibration
from pbc.util.progress import telling

Run = Callable[..., click.testing.Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a pbc command in a folder with a bundle, photos, and costs that need no measuring."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "b.pbc")
    tiny.costs(tmp_path / "costs.json")
    tiny.photos(tmp_path / "photos", 4)

    def call(*args: str, fails: int = 0) -> click.testing.Result:
        words = (*args, "--costs", "costs.json", "--epochs", "1") if args[0] == "train" else args
        result = click.testing.CliRunner().invoke(main, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == fails, result.output
        return result

    return call


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)


def heic(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))


def clutter(photos: Path) -> None:
    """Leave files of each kind between 12 photos."""
    for number in range(3):
        heic(photos / "red" / f"IMG_{number}.HEIC")
    (photos / "red" / "000.png").write_bytes(b"broken")
    (photos / "red" / "notes.txt").write_text("about")
    (photos / "blue" / "@eaDir").mkdir()
    (photos / "Thumbs.db").write_bytes(b"")
    Image.new("LA", (9, 9)).save(photos / "blue" / "drawing.png")
    Image.new("I;16", (9, 9)).save(photos / "blue" / "deep.png")


LINES = [
    "skipped 1 broken images of 17: red/000.png (cannot identify an image in it)",
    f"skipped 3 .heic files: {HEIC.hint}",
    "ignored 3 files: 2 left by a system or program (@eaDir, Thumbs.db), 1 no photo (.txt)",
    "1 photos of more than 8 bits, mapped to 8; 1 photos transparent, laid on white",
]


@pytest.mark.usefixtures("no_heif")
def test_everything_is_said_in_few_lines(run: Run) -> None:
    clutter(Path("photos"))
    assert ImageFolder.open("photos", tiny.SPEC).inventory.lines() == LINES
    trained = run("train", "b.pbc", "photos", "-o", "mine")
    assert trained.stderr.splitlines()[:4] == LINES
    evaluated = run("eval", "mine", "photos", "--json")
    assert evaluated.stderr.splitlines() == LINES
    inventory = json.loads(evaluated.stdout)["inventory"]
    assert inventory["read"] == 13
    assert inventory["broken"] == [["red/000.png", "cannot identify an image in it"]]
    assert [name for name, _ in inventory["unsupported"]] == [
        f"red/IMG_{number}.HEIC" for number in range(3)
    ]
    assert len(inventory["ignored"]) == 3
    assert sum(inventory["remarks"].values()) == 2


def test_nothing_is_said_of_plain_photos(run: Run) -> None:
    assert ImageFolder.open("photos", tiny.SPEC).inventory == Inventory(read=12)
    assert Inventory(read=12).lines() == []


@pytest.mark.usefixtures("no_heif")
def test_strict_stops_at_anything_skipped(run: Run) -> None:
    heic(Path("photos/red/a.heic"))
    stopped = run("train", "b.pbc", "photos", "-o", "mine", "--strict", fails=1).stderr
    assert f"red/a.heic of photos cannot be read: {HEIC.hint}" in stopped
    Path("photos/red/a.heic").unlink()
    Path("photos/red/Thumbs.db").write_bytes(b"")
    run("train", "b.pbc", "photos", "-o", "mine", "--strict")
    Path("photos/red/gone.jpg").symlink_to("nowhere")
    assert (
        "red/gone.jpg of photos is broken: No such file or directory\n"
        in run("eval", "mine", "photos", "--strict", fails=1).stderr
    )


@pytest.mark.usefixtures("no_heif")
def test_a_class_of_nothing_but_unread_photos_says_why(run: Run) -> None:
    shutil.rmtree("photos/red")
    Path("photos/red").mkdir()
    heic(Path("photos/red/a.heic"))
    message = "class folder 'red' of photos has no readable image: pip install"
    assert message in run("train", "b.pbc", "photos", "-o", "mine", fails=1).stderr


def test_the_held_out_part_is_the_default_of_val(run: Run) -> None:
    tiny.photos(Path("data/train"), 4)
    tiny.photos(Path("data/val"), 2)
    trained = run("train", "b.pbc", "data", "-o", "mine")
    assert trained.stderr.splitlines()[:2] == [
        "data has the parts train/, val/: train/ is read",
        "data has the parts train/, val/: val/ is read",
    ]
    assert "on 6 samples" in trained.stdout
    assert "on 6 samples" in run("eval", "mine", "data").stdout
    given = run("train", "b.pbc", "data", "-o", "b", "--val", "photos")
    assert "on 12 samples" in given.stdout
    assert "val/ is read" not in given.stderr


def test_a_held_out_part_with_an_unknown_class_is_refused_before_training(run: Run) -> None:
    tiny.photos(Path("data/train"), 4)
    tiny.photos(Path("data/val"), 2)
    Path("data/val/red").rename("data/val/white")
    stopped = run("train", "b.pbc", "data", "-o", "mine", fails=1).stderr
    assert "the model knows no class 'white'" in stopped


def test_prediction_goes_on_past_broken_photos(run: Run) -> None:
    run("train", "b.pbc", "photos", "-o", "mine")
    Path("broken.jpg").write_text("no image")
    good = ["photos/red/000.png", "photos/blue/001.png"]
    photos = [good[0], "broken.jpg", "gone.png", good[1]]
    result = run("predict", "mine", *photos, "--json", fails=1)
    assert [row["image"] for row in json.loads(result.stdout)] == good
    assert result.stderr.splitlines() == [
        "error: broken.jpg is not an image that can be decoded: cannot identify an image in it",
        "error: cannot read gone.png: No such file or directory",
    ]
    table = run("predict", "mine", *photos, fails=1).stdout
    assert all(name in table for name in good)
    assert run("predict", "mine", "broken.jpg", fails=1).stdout == ""


def test_calibration_photos_are_accounted_for(run: Run) -> None:
    tiny.photos(Path("photos"), 10)
    Path("photos/red/x.jpg").write_bytes(b"?")
    told: list[str] = []
    with telling(told.append):
        Calibration.open("photos", tiny.SPEC, seed=0)
    assert told == [
        "calibration: skipped 1 broken images of 31: red/x.jpg (cannot identify an image in it)"
    ]


def test_unread_photos_are_named_where_none_is_left(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    with pytest.raises(PbcError, match=r"none of the 2 images of .*: the file is empty"):
        ImageFolder.open(tmp_path, tiny.SPEC)
