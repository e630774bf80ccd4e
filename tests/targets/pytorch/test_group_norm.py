"""A group norm as the first layer that trains: torch's own gradient of it may end the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pbc.runtime.engines.pytorch.group_norm import mend_group_norm
from pbc.testing import make_program


def gradients(x: Tensor, groups: int, of_features: bool) -> tuple[Tensor, ...]:
    scale, shift = (torch.linspace(-1, 1, x.shape[1]).requires_grad_() for _ in range(2))
    x = x.detach().requires_grad_(of_features)
    found = functional.group_norm(x, groups, scale, shift)
    return torch.autograd.grad(
        found.pow(3).sum(), (scale, shift, x) if of_features else (scale, shift)
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("of_features", [False, True])
@pytest.mark.parametrize("shape", [(4, 512, 2, 2), (2, 64, 8, 8), (3, 16, 7, 5), (2, 64, 4, 4, 4)])
def test_gradients_do_not_depend_on_the_layout(
    shape: tuple[int, ...], groups: int, of_features: bool
) -> None:
    mend_group_norm()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    expected = gradients(x, groups, of_features)
    found = gradients(x.to(memory_format=last), groups, of_features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_mended_without_a_word() -> None:
    given = "from pbc.runtime.engines.pytorch.group_norm import mend_group_norm; mend_group_norm()"
    ran = subprocess.run([sys.executable, "-c", given], capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""


class NormFirst(nn.Module):
    """What trains first is a group norm, of features in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 512, 8, 8)
        self.block = nn.Sequential(nn.GroupNorm(1, 512), nn.Conv2d(512, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        x = x + self.block(x)[:, :1]
        logits: Tensor = self.fc(x.mean((2, 3))[:, :8])
        return logits


def test_a_model_that_torch_cannot_train_by_itself_is_captured() -> None:
    program = make_program(NormFirst(), "norm", (3, 16, 16))
    assert "block.0.weight" in program.trainable
