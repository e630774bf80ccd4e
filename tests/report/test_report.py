"""`pbc report`: the page tells what validation.json tells, with pictures, in one file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click.testing
import pytest
import tiny

from pbc.cli import main

Run = Callable[..., click.testing.Result]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learnt nothing: it confuses what it sees."""
    root = tmp_path_factory.mktemp("report")
    tiny.photos(root / "photos", 10)
    tiny.photos(root / "test", 4, seed=1)
    tiny.write(root / "m.pbc", policy=False)
    tiny.costs(root / "costs.json")
    result = click.testing.CliRunner().invoke(
        main,
        ["train", *(str(root / name) for name in ("m.pbc", "photos")), "-o", str(root / "mine"),
         "--epochs", "2", "--lr", "1e-9", "--head", "sgd", "--costs", str(root / "costs.json")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def run(assets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets / "mine", "mine")

    def call(*args: str, fails: int = 0) -> click.testing.Result:
        words = [str(assets / word[1:]) if word.startswith("@") else word for word in args]
        result = click.testing.CliRunner().invoke(main, words)
        assert result.exit_code == fails, result.output
        return result

    return call


class Page(HTMLParser):
    """All that a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe"}
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_accuracy_against_time_for_every_level(run: Run) -> None:
    run("report", "mine", "@test")
    text = "".join(Page(Path("mine.html").read_text()).words)
    assert "Accuracy against inference time" in text
    assert all(name in text for name in ("level 0 (deployed)", "level 1", "level 2"))
    levels = json.loads(run("report", "mine", "@test", "--json").stdout)["levels"]
    assert [level["level"] for level in levels] == [0, 1, 2]


def test_the_page_shows_which_tensors_trained(run: Run) -> None:
    metrics = Path("mine/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["selected"], lines[1]["selected"] = ["head.bias"], ["head.bias"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("report", "mine")
    page = Path("mine.html").read_text()
    row = page.partition("Which tensors trained, by epoch")[2].partition("</table>")[0]
    assert row.count("--share:100%") == 2
    assert "head.bias" in row
    assert "head.weight" not in row


def test_the_page_of_what_was_held_out(run: Run) -> None:
    validation: dict[str, Any] = json.loads(Path("mine/validation.json").read_text())
    assert validation["wrong"]
    assert "wrote mine.html" in run("report", "mine").stdout
    page = Page(Path("mine.html").read_text())
    text = "".join(page.words)
    right = sum(row["right"] for row in validation["classes"])
    assert f"right about {right} of 6 photos that were held out" in text
    assert len(page.links) == len(validation["wrong"])
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    for wrong in validation["wrong"]:
        assert f"{wrong['class']}, taken for {wrong['answer']}" in text
    for heading in ("What is taken for what", "Per class", "Loss per epoch", "Routing: photos"):
        assert heading in text


def test_the_matrix_counts_every_photo(run: Run) -> None:
    run("report", "mine", "@test", "-o", "r.html")
    text = Path("r.html").read_text()
    cells = re.findall(r'<td class="(?:hit|miss)"[^>]*>(\d*)</td>', text)
    assert len(cells) == 9
    assert sum(int(cell or 0) for cell in cells) == 12
    assert "photos of " in text


def test_photos_that_are_gone_are_said_to_be(run: Run, assets: Path) -> None:
    (assets / "photos").rename(assets / "moved")
    try:
        run("report", "mine")
    finally:
        (assets / "moved").rename(assets / "photos")
    assert "not there any more" in Path("mine.html").read_text()


def test_photos_in_a_zip_have_pictures_too(run: Run, assets: Path) -> None:
    packed = shutil.make_archive("test", "zip", assets / "test")
    run("report", "mine", packed)
    page = Page(Path("mine.html").read_text())
    assert page.links
    assert "not there any more" not in "".join(page.words)


def test_a_run_without_held_out_photos_and_metrics(run: Run) -> None:
    run("forget", "mine")
    run("report", "mine")
    assert "How good it is is not known" in Path("mine.html").read_text()
    told = json.loads(run("report", "mine", "--json").stdout)
    assert told["validation"] is None
    assert "holds no personal model" in run("report", "@photos", fails=1).stderr


def test_a_damaged_validation_is_one_line(run: Run) -> None:
    Path("mine/validation.json").write_text('{"accuracy": 1}')
    assert "validation.json is damaged: " in run("report", "mine", fails=1).stderr
    assert not Path("mine.html").exists()


def test_inspect_of_a_personal_model(run: Run) -> None:
    told = run("inspect", "mine").stdout
    assert "24 photos, 2 epochs" in told
    assert "3: blue, green, red" in told
    assert "learning_rate 1e-09" in told
    assert json.loads(run("inspect", "mine", "--json").stdout)["samples"] == 24


def test_predict_takes_folders_zips_and_patterns(run: Run, assets: Path) -> None:
    def names(*args: str) -> list[str]:
        told = json.loads(run("predict", "mine", *args, "--json").stdout)
        return [row["image"] for row in told]

    folder = assets / "test"
    assert len(names("@test")) == 12
    assert names("@test/red") == [str(folder / "red" / f"{at:03}.png") for at in range(4)]
    assert names("@test/*/000.png") == [
        str(folder / name / "000.png") for name in ("blue", "green", "red")
    ]
    assert len(names(shutil.make_archive("test", "zip", folder))) == 12
    assert "no photo matches" in run("predict", "mine", "@test/*.gif", fails=1).stderr
