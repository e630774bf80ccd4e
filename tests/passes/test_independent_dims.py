from __future__ import annotations

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured, split
from torch import Tensor, nn

from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import assert_same, assert_unchanged, make_program, run_passes

Row = tuple[str, int, str, str | None]


@pytest.mark.parametrize(
    ("kind", "strategy", "expected"),
    [
        (
            ConvNet,
            "linear-probe",
            [
                ("conv1.weight:0", 16, "channels", None),
                ("conv2.weight:0", 24, "channels", "fc.weight is trained"),
            ],
        ),
        (
            ResidualNet,
            "last-k:1",
            [
                # The stream is what the trained block reads, so it is fixed everywhere.
                ("stem.weight:0", 16, "channels", "blocks.2.down.weight is trained"),
                ("blocks.0.down.weight:0", 32, "channels", None),
                ("blocks.1.down.weight:0", 32, "channels", None),
            ],
        ),
        (
            ResidualNet,
            "adapters:1",
            [
                ("stem.weight:0", 16, "channels", "blocks.2.adapter.down.weight is trained"),
                ("blocks.0.down.weight:0", 32, "channels", None),
                ("blocks.1.down.weight:0", 32, "channels", None),
                ("blocks.2.down.weight:0", 32, "channels", None),
            ],
        ),
        (
            AttentionNet,
            "linear-probe",
            [
                ("patch.weight:0", 32, "channels", "head.weight is trained"),
                ("qkv.weight:0.0", 3, "channels", "it is taken apart index by index"),
                ("qkv.weight:0.1", 2, "heads", None),
                ("qkv.weight:0.2", 16, "head size", None),
                ("up.weight:0", 64, "channels", None),
            ],
        ),
        (
            ConvNet,
            "norm",
            [
                ("conv1.weight:0", 16, "channels", "bn1.weight is trained"),
                ("conv2.weight:0", 24, "channels", "bn2.weight is trained"),
            ],
        ),
        (
            ConvNet,
            "full",
            [
                # Nothing is frozen but running statistics.
                ("bn1.running_mean:0", 16, "channels", "conv1.weight is trained"),
                ("bn2.running_mean:0", 24, "channels", "conv2.weight is trained"),
            ],
        ),
    ],
)
def test_dimensions_and_reasons(kind: Kind, strategy: str, expected: list[Row]) -> None:
    before = split(kind, strategy)
    after = assert_unchanged(IndependentDims(), before)
    assert_same(before, after)  # it looks, and touches nothing
    assert after.dims is not None
    assert [(d.name, d.size, d.kind, d.reason) for d in after.dims.dimensions] == expected
    assert not after.dims.unknown


@pytest.mark.parametrize("strategy", ["norm", "bias", "full"])
def test_a_strategy_that_leaves_nothing_to_prune_is_told_so_in_one_line(strategy: str) -> None:
    program = run_passes(split(ConvNet, strategy), IndependentDims())
    (note,) = program.notes
    assert note.startswith(f"strategy {strategy} leaves nothing to prune in ConvNet: ")
    assert "all levels keep all channels" in note
    assert "\n" not in note


def test_a_strategy_that_leaves_something_has_no_note() -> None:
    assert run_passes(split(ConvNet), IndependentDims()).notes == ()


class Rolled(nn.Module):
    """`roll` has no rule: what it mixes must stay whole, the hidden layer need not."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 16, 3)
        self.fixed = nn.Conv2d(16, 12, 3)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.fixed(torch.relu(self.free(x))), 1, 1)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_an_operator_without_a_rule_is_named_and_fixes_what_it_touches() -> None:
    program = make_program(Rolled())
    program = run_passes(program, MarkTrainable(), SplitPrefix(), IndependentDims())
    assert program.dims is not None
    reasons = {d.name: d.reason for d in program.dims.dimensions}
    assert reasons["free.weight:0"] is None
    assert reasons["fixed.weight:0"] == "aten.roll.default has no dimension rule"
    (note,) = program.notes
    assert note.startswith("operator aten.roll.default (at roll) has no dimension rule")


def test_what_is_found_does_not_depend_on_the_run() -> None:
    first, second = (IndependentDims()(split(AttentionNet)).dims for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.dimensions == second.dimensions
    assert first.macs() == second.macs()
    assert captured(AttentionNet).program.dims is None
