"""What is mutated and killed: small bundles of each engine, photos, and a process that is warm."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded: a fork would lose its threads
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import tiny_onnx

from pbc import bundle
from pbc.bundle import Bundle
from pbc.cli import main

ENGINES = ("pytorch", "onnxruntime", "tvm")
Contents = tuple[tiny.Json, dict[str, bytes]]

_NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

def factory():
    torch.manual_seed(0)
    return Net()
"""


def environment(folder: Path) -> None:
    """Keep what engines derive in a folder, and run code that nobody signed."""
    os.environ.update(PBC_CACHE=str(folder / "cache"), PBC_UNSIGNED="1")


def bundles(engine: str, folder: Path) -> list[Contents]:
    """Return manifest and files of small bundles for an engine, of different strategies."""
    if engine == "pytorch":
        return [tiny.contents(kind) for kind in ("probe", "maps", "bodies", "whole")]
    if engine == "onnxruntime":
        return [tiny_onnx.contents(kind) for kind in ("probe", "maps", "whole")]
    return [_compiled(folder, engine, strategy) for strategy in ("linear-probe", "full")]


def compile_words(net: Path, engine: str, strategy: str, output: Path) -> list[object]:
    """Return the words that compile the network for an engine, with nothing measured."""
    return ["compile", f"{net}:factory", "--engine", engine, "--target", "generic-x86-64",
            "--strategy", strategy, "--weights", "random", "--input", "3x16x16",
            "--levels", "0", "--batch", "4", "-o", output]  # fmt: skip


def network(folder: Path) -> Path:
    """Write a program with a network of one convolution."""
    path = folder / "fuzz_net.py"
    path.write_text(_NET)
    return path


def _compiled(folder: Path, engine: str, strategy: str) -> Contents:
    path = folder / f"{engine}-{strategy}.pbc"
    words = compile_words(network(folder), engine, strategy, path)
    code = "from pbc.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True)
    made = Bundle.open(path)
    files = {name: made.read(name) for name in made.manifest["files"]}
    own = {"schema", "files", "digest"}
    return {k: v for k, v in made.manifest.items() if k not in own}, files


def warm(commands: Sequence[Sequence[object]]) -> None:
    """Run commands here, so that what is forked has loaded all that they load."""
    for words in commands:
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            try:
                main.main(args=[str(word) for word in words], prog_name="pbc")
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(heard.getvalue()) from ended
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError(f"{len(threads) - 1} threads would be lost in a fork")


def write(path: Path, contents: Contents) -> Bundle:
    """Write a bundle as it is, unchanged."""
    return bundle.write(path, *contents)
