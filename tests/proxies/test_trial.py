from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import ChannelsLastNet, Kind, ResidualNet, split
from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.ir.dim_rules import dims_of
from pbc.ir.levels import LevelPlan
from pbc.ir.program import Program
from pbc.proxies.trial import reason_against, reason_of_failure, trial


def narrow(program: Program, resolution: tuple[int, int] | None = None) -> LevelPlan:
    sizes = {d.name: d.size // 2 for d in dims_of(program).independent()}
    return LevelPlan(sizes, 0.5, 0.0, resolution=resolution)


@pytest.mark.parametrize("kind", [ResidualNet, ChannelsLastNet])
def test_narrow_and_smaller_levels_send_what_the_original_sends(kind: Kind) -> None:
    program = split(kind, "last-k:1")
    plan = narrow(program, (8, 8))
    assert plan.sizes
    assert reason_against(program, plan, dims_of(program), engine=True) == ""
    level = trial(program, plan, dims_of(program))
    images = torch.randn(3, 3, 16, 16)
    for name, value in program.levels[0].features(images).items():
        assert level.features(images)[name].shape == value.shape


class OneSize(nn.Module):
    """Its first linear layer counts on the number of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.mix = nn.Linear(8 * 16, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.mix(self.stem(x).flatten(1))))
        return logits


def test_the_reason_against_a_form_is_one_line() -> None:
    program = split(OneSize)
    plan = LevelPlan({}, 0.5, 0.0, resolution=(8, 8))
    reason = reason_against(program, plan, dims_of(program), engine=False)
    assert reason == "a layer is built for the resolution of whole images"


class Unknown(Exception):
    """An engine's own kind of refusal."""


def failing(error: BaseException) -> Callable[[], None]:
    def attempt() -> None:
        raise error

    return attempt


def test_what_is_foreseen_becomes_a_reason() -> None:
    assert reason_of_failure(lambda: None) == ""
    assert reason_of_failure(failing(PbcError("no such operator"))) == "no such operator"
    assert reason_of_failure(lambda: torch.ones(2) @ torch.ones(3)).startswith("inconsistent")
    assert reason_of_failure(failing(Unknown("too new\nat line 7")), Unknown) == "too new"


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        AssertionError("a fault of ours"),
        KeyError("a fault of ours"),
        RecursionError("a fault of ours"),
        torch.OutOfMemoryError("CUDA out of memory"),
        Unknown("of another engine"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_else_happens_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        reason_of_failure(failing(error))


def test_lack_of_memory_is_no_reason_against_a_form() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        reason_of_failure(lambda: torch.empty(10**15))
