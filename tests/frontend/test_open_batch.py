"""A forward takes any number of images, or the line that does not is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.frontend.capture import capture

Maps = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """What a function makes of maps of 4 by 4, and a classifier."""

    def __init__(self, function: Maps, features: int) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.function(x).reshape(x.shape[0], -1))
        return logits


W = torch.arange(240.0).reshape(48, 5) / 240

OPEN: dict[str, tuple[Maps, int]] = {
    "kron": (lambda x: torch.kron(x, torch.arange(6.0).reshape(2, 3)), 6 * 48),
    "kron of more axes": (lambda x: x[:, 0].kron(torch.arange(4.0).reshape(1, 2, 1, 2)), 4 * 16),
    "take_along_dim": (lambda x: x.take_along_dim(x.argsort(1)[:, :2], 1), 32),
    "take_along_dim, broadcast": (
        lambda x: torch.take_along_dim(x, x.mean((0, 2, 3))[None, :, None, None].argsort(1), -3),
        48,
    ),
    "take_along_dim of all": (
        lambda x: x.mean((1, 2, 3))[:, None] + x[0].take_along_dim(torch.tensor([5, 0])),
        2,
    ),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x.flatten(1), W, W.t(), W]), 5),
    "chain_matmul": (lambda x: torch.chain_matmul(x.flatten(1), W, W.t()), 48),
}


@pytest.mark.parametrize("name", list(OPEN))
def test_a_function_that_reads_sizes_takes_any_number_of_images(name: str) -> None:
    net = Net(*OPEN[name]).eval()
    graph = capture(net, (3, 4, 4))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 4)
        torch.testing.assert_close(graph(x)[0], net(x), rtol=1e-4, atol=1e-4)


FIXED: dict[str, Maps] = {
    "a length": lambda x: torch.zeros(len(x), 4) + x.mean((1, 2, 3))[:, None],
    "a loop": lambda x: torch.stack([image.mean((1, 2)) for image in x]),
    "a number": lambda x: x.view(int(x.shape[0]), -1),
    "an operator": lambda x: torch.gradient(x, dim=2)[0],
}


@pytest.mark.parametrize("name", list(FIXED))
def test_the_line_that_fixes_the_number_of_images_is_named(name: str) -> None:
    line = FIXED[name].__code__.co_firstlineno
    message = (
        r"its forward is made for one number of images, where a network has to take any: len\(x\), "
        rf".* do not \(File \".*test_open_batch.py\", line {line}\)$"
    )
    with pytest.raises(PbcError, match=message):
        capture(Net(FIXED[name], 4), (3, 4, 4))
