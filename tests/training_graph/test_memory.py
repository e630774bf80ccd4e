"""The memory model: by hand, and beside what a process takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from measured_memory import measured_bytes
from networks import ConvNet, Kind, captured
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pbc import bundle, compiler
from pbc.ir.graph import NAME, output_node
from pbc.ir.levels import LevelGraphs
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import make_program, run_passes, with_request
from pbc.training_graph.memory import step_memory

PASSES = (MarkTrainable(), SplitPrefix(), FoldBatchNorm(), DeriveTrainStep())


def level(kind: Kind, strategy: str) -> LevelGraphs:
    program = with_request(captured(kind, strategy).program, engine="onnxruntime")
    return run_passes(program, *PASSES).levels[0]


def test_what_is_held_is_counted_in_bytes() -> None:
    found = step_memory(level(ConvNet, "linear-probe"), batch=6, classes=7)
    theta = 4 * (7 * 24 + 7)
    for name, moments in (("sgd", 1), ("adam", 2), ("adamw", 2)):
        memory = found[name]
        assert memory.parameters == memory.gradients == theta
        assert memory.state == moments * theta
        assert memory.features == 4 * 6 * 24
        assert memory.peak == sum(asdict(memory).values())


def test_what_a_forward_saves_is_that_of_the_batch() -> None:
    made = level(ConvNet, "full")
    of_one, of_nine = (step_memory(made, batch, classes=10)["sgd"] for batch in (1, 9))
    # A ReLU's values before a trained kernel, another's mask, what the head reads, its scores, and
    # which of them is the label's.
    sample = 4 * 16 * 16 * 16 + 24 * 8 * 8 + 4 * 24 + 4 * 10 + 10
    assert of_nine.saved - of_one.saved == 8 * sample
    assert of_nine.parameters == of_one.parameters


def graph(function: object, titles: list[str], *inputs: Tensor) -> GraphModule:
    made = make_fx(function, tracing_mode="fake")(*inputs)  # type: ignore[arg-type]
    output_node(made).meta[NAME] = titles
    return made


def test_a_tensor_is_there_from_its_operator_to_its_last_reader() -> None:
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        double = torch.cat([x, x])  # 8 KiB
        shown = torch.exp(double).view(-1)  # beside it
        mask = shown > 1  # 2 KiB
        return shown.sum(), mask  # and 4 bytes

    def update(mask: Tensor) -> tuple[Tensor]:
        return (mask.sum(dtype=torch.float32),)

    x, mask = torch.zeros(1024), torch.zeros(2048, dtype=torch.bool)
    forward_graph = graph(forward, ["loss", "saved/mask"], x)
    updates = {"sgd": graph(update, ["new/w"], mask)}
    made = LevelGraphs(body=forward_graph, forward=forward_graph, updates=updates)
    memory = step_memory(made, batch=1, classes=2)["sgd"]
    assert memory.features == 4 * 1024
    assert memory.saved == 2048
    # What the update returns broke one of the 8 KiB, so that the next forward took as much again.
    assert memory.peak == 4 * 1024 + 3 * 8 * 1024


class WideNet(nn.Module):
    """Large enough that what a process takes besides is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.Conv2d(64, 64, 3, padding=1),
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("strategy", ["full", "bias", "last-k:1"])
def test_it_is_what_a_process_takes(tmp_path: Path, strategy: str) -> None:
    program = make_program(WideNet(), strategy, (3, 32, 32))
    program = with_request(program, engine="onnxruntime", batch=64)
    program = run_passes(program, *PASSES, Lower())
    written = bundle.write(tmp_path / "wide.pbc", *compiler.package(program))
    for optimizer in ("sgd", "adam"):
        expected = written.manifest["memory"][optimizer]["peak_bytes"]
        measured = measured_bytes(written.path, optimizer)
        assert expected == pytest.approx(measured, rel=0.15)
