"""Every command that README and tutorial show is run, with a tiny network and few photos."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import click
import pytest
import tiny
from click.testing import CliRunner

from pbc.cli import main

SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def factory(num_classes=10):
    return Net(num_classes)
"""
# What stands for the networks that a reader has.
MODELS = ("resnet50", "mobilenet_v3_large")
# Added to a command to make it small; of an option that is there twice, the last counts.
SMALLER = {
    "compile": "--weights random --input 3x16x16 --levels 1 --align-steps 1 --axes width "
    "--target generic-x86-64",
    "train": "--overwrite --epochs 1",
    "bench": "--rivals pet,pbc --seeds 1 --epochs 1 --lr 0.01 --no-torch-compile --overwrite",
    "audit": "--rounds 1",
}
# These need a board, a package of 300 MB or minutes: they are read as far as their options.
ELSEWHERE = ("deploy", "fleet", "profile", "--on", "--cost")


def commands(document: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a document's indented blocks."""
    text = document.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if re.match(r" {4}\s*(pbc|pip|eval|export) ", line):
            yield shlex.split(line, comments=True)


def read(words: list[str]) -> None:
    """Read a command's options as click does, without running it."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, name
        command = found
    command.make_context(command.name, [word for word in words if word != "…"])


@pytest.fixture(scope="module")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents name."""
    folder = tmp_path_factory.mktemp("reader")
    tiny.photos(folder / "photos" / "train", 8)
    tiny.photos(folder / "photos" / "test", 4, seed=1)
    tiny.photos(folder / "unlabelled", 8, seed=2)
    photo = next((folder / "photos" / "test").glob("*/*"))
    (folder / "photo.jpg").write_bytes(photo.read_bytes())
    (folder / "net.py").write_text(SOURCE)
    (folder / "examples").symlink_to(root / "examples")
    return folder


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
def test_every_command_of_a_document_does_what_it_says(
    document: str, root: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    ran = 0
    for program, *words in commands(root / document):
        if program != "pbc":
            continue
        shown = shlex.join(["pbc", *words])
        if any(word in ELSEWHERE for word in words):
            read(words)
            continue
        words = ["net.py:factory" if word in MODELS else word for word in words]
        words += SMALLER.get(words[0], "").split()
        result = CliRunner().invoke(main, words, prog_name="pbc", catch_exceptions=False)
        assert result.exit_code == 0, f"{shown}: {result.output}"
        ran += 1
    assert ran >= 8


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
def test_what_is_installed_is_an_extra(document: str, root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg")
    extras = set(config["options.extras_require"])
    named = re.findall(r"(?:pbc|\.)\[([a-z,-]+)\]", (root / document).read_text())
    assert named
    for group in named:
        assert set(group.split(",")) <= extras, group
