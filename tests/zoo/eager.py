"""The eager side: the user's own module with random weights, trained by plain torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

MOMENTUM = 0.9
STEPS = 2
# The share of the loss that the first step takes away, to first order.
_DROP = 0.2
# Of a constant tensor, such as the zeros that switch a residual branch off until it is trained.
_NOISE = 0.1


@dataclass(frozen=True)
class Trained:
    """Scores f64[B, classes] and parameters after the steps."""

    logits: np.ndarray
    parameters: Mapping[str, np.ndarray]


def randomise(module: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Give every part of a fresh network a say in its scores, in place.

    A library initialises gates, layer scales and biases to constants that hide what is behind them,
    and statistics of batch norms that let the values of a deep network vanish.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.add_(torch.randn(parameter.shape), alpha=_NOISE / fan_in**0.5)
        norms = [
            m for m in module.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the statistics of what follows alone
            norm.reset_running_stats()
        if norms:
            module(torch.randn(8, *shape))
    return module.eval()


def save(module: nn.Module, path: Path) -> None:
    """Write the weights, tensors under several names once for each."""
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    safetensors.torch.save_file(state, path)


def differing(module: nn.Module, theta: Mapping[str, np.ndarray]) -> list[str]:
    """Names in θ that have another value than in the module, and its shape; new ones may."""
    state = module.state_dict()
    return [
        name
        for name, value in theta.items()
        if name in state
        and state[name].shape == value.shape
        and not np.array_equal(state[name].numpy(), value)
    ]


def train(
    module: nn.Module,
    theta: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    learning_rate: float,
    dtype: torch.dtype,
) -> Trained:
    """Two steps of SGD on the cross-entropy, in evaluation mode: statistics stay frozen.

    theta: what trains, by name; adapters among it are inserted, a head of other size is replaced.
    """
    module, leaves = _with(module, theta, dtype)
    inputs = torch.from_numpy(images).to(dtype)
    optimizer = torch.optim.SGD(leaves.values(), learning_rate, MOMENTUM)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(module, inputs, labels).backward()
        optimizer.step()
    with torch.no_grad():
        logits = _scores(module, inputs)
    parameters = {name: leaf.detach().double().numpy() for name, leaf in leaves.items()}
    return Trained(logits.double().numpy(), parameters)


def learning_rate(
    module: nn.Module, theta: Mapping[str, np.ndarray], images: np.ndarray, labels: np.ndarray
) -> float:
    """A step that takes a fifth of the loss away, to two digits: visible, and no divergence."""
    module, leaves = _with(module, theta, torch.float32)
    loss = _loss(module, torch.from_numpy(images), labels)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    square = sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return float(f"{_DROP * float(loss.detach()) / square:.2g}")


def _loss(module: nn.Module, inputs: Tensor, labels: np.ndarray) -> Tensor:
    return nn.functional.cross_entropy(_scores(module, inputs), torch.from_numpy(labels))


def _scores(module: nn.Module, inputs: Tensor) -> Tensor:
    """Scores of the parameters as they are: what layers keep in eval mode goes at each eval()."""
    module.eval()
    scores: Tensor = module(inputs)
    return scores


def _with(
    module: nn.Module, theta: Mapping[str, np.ndarray], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the module that has θ, which alone trains; and its parameters of θ by name."""
    module = copy.deepcopy(module).to(dtype)
    module.requires_grad_(False)
    _insert_adapters(module, theta)
    for name, value in theta.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        getattr(parent, leaf)  # a name that the module does not have is a fault of the bundle
        setattr(parent, leaf, nn.Parameter(torch.from_numpy(value.copy()).to(dtype)))
    return module, {name: module.get_parameter(name) for name in theta}


def _insert_adapters(module: nn.Module, theta: Mapping[str, np.ndarray]) -> None:
    """After each block of which θ has an adapter: x + up(relu(down(x))), over the channels."""
    ends = ".adapter.down.weight"
    for block in [name.removesuffix(ends) for name in theta if name.endswith(ends)]:
        adapter = _Adapter()
        for part in ("down", "up"):
            width, channels, *kernel = theta[f"{block}.adapter.{part}.weight"].shape
            layer = nn.Conv2d(channels, width, 1) if kernel else nn.Linear(channels, width)
            adapter.add_module(part, layer)
        owner = module.get_submodule(block)
        owner.add_module("adapter", adapter)
        if type(owner).forward is not nn.Sequential.forward:  # which runs its children as it is
            owner.register_forward_hook(lambda block, inputs, x: block.adapter(x))


class _Adapter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        down, up = self.get_submodule("down"), self.get_submodule("up")
        narrow: Tensor = up(torch.relu(down(x)))
        return x + narrow
