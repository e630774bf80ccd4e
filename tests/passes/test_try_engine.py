from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import ConvNet
from torch import Tensor, nn

from pbc import compiler
from pbc.compiler import CompileOptions
from pbc.errors import PbcError
from pbc.ir.program import Program
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.passes.try_engine import TryEngine
from pbc.testing import assert_unchanged, make_program, with_request
from pbc.util.progress import reporting_to

ENGINES = ("pytorch", "onnxruntime", "tvm")


class Net(nn.Module):
    """An operator between a convolution and a classifier."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.operator = operator
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.operator(self.stem(x)).mean((2, 3)))
        return logits


def inverses(x: Tensor) -> Tensor:
    squares = x.flatten(2) @ x.flatten(2).transpose(1, 2)
    inverse: Tensor = torch.linalg.inv(squares + torch.eye(8))[..., None]
    return inverse


def split(module: nn.Module, strategy: str, engine: str) -> Program:
    program = make_program(module, strategy, passes=[MarkTrainable(), SplitPrefix()])
    return with_request(program, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["linear-probe", "full"])
def test_what_the_engine_lacks_is_named(engine: str, strategy: str) -> None:
    program = split(Net(inverses), strategy, engine)
    with pytest.raises(PbcError, match=r"operator aten\.linalg_inv.*is not supported by the"):
        TryEngine()(program)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["linear-probe", "full"])
def test_what_it_has_stays_as_it_is(engine: str, strategy: str) -> None:
    assert_unchanged(TryEngine(), split(ConvNet(), strategy, engine))


def test_it_does_nothing_where_no_levels_are_made() -> None:
    program = split(Net(inverses), "full", "pytorch")
    assert TryEngine(levels=0)(program) is program


def test_it_comes_before_anything_takes_long(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(3, 4)\n"
        "    def forward(self, x):\n"
        "        y = x.mean((2, 3))\n"
        "        return self.fc(y) + torch.linalg.det(y[:, :, None] * y[:, None] + 1)[:, None]\n"
        "def make(num_classes=4):\n"
        "    return Net()\n"
    )
    seen: list[str] = []
    options = CompileOptions(
        weights="random", shape=(3, 8, 8), classes=3, levels=2, engine="pytorch"
    )
    with (
        pytest.raises(PbcError, match=r"linalg_det.*net\.py\", line 8"),
        reporting_to(lambda name, *_: seen.append(name)),
    ):
        compiler.compile(f"{tmp_path / 'net.py'}:make", tmp_path / "m.pbc", options)
    assert set(seen) == {"mark-trainable", "split-prefix", "try-engine"}
