"""Learn the policy model, which says how cheap a proxy a sample tolerates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pbc.calibration import Calibration
from pbc.capture import capture
from pbc.data import pooled_view
from pbc.interface import sample_fidelity
from pbc.ladder import ALIGNED
from pbc.program import POLICY, Program
from pbc.progress import report

VIEW = (3, 32, 32)
SAMPLES = 2000
EPOCHS = 30
BATCH = 64
REPORT_FLOOR = 0.9


@dataclass(frozen=True)
class LearnPolicy:
    """Add the graph `policy`, which predicts a sample's fidelity at each proxy level.

    It reads a 32x32 view and puts out one fidelity per level; on the device a sample's difficulty
    is the largest level whose predicted fidelity reaches the user's floor (PieBridge, SenSys 2024,
    equation 1, learned off-line). The other graphs stay as they are. Predictions are shifted per
    level so that they are right on average on held-out images. A network that predicts no better
    than each level's mean is replaced by those means, and `program.policy_report` says so.

    Does nothing when no level is aligned.
    """

    stage: ClassVar[str] = "route"

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        levels = [level.level for level in program.ladder.levels if level.status == ALIGNED]
        if calibration is None or not levels:
            return program.copy()
        program = program.copy()
        chosen = calibration.align
        if len(chosen) > SAMPLES:
            chosen = chosen[np.linspace(0, len(chosen) - 1, SAMPLES).astype(int)]
        report("learn-policy", 0.0, "measuring the fidelity of single samples")
        fidelity = torch.from_numpy(sample_fidelity(program, levels, calibration, chosen))
        held_out = calibration.held_out
        truth = torch.from_numpy(sample_fidelity(program, levels, calibration, held_out))
        network = train(views(calibration, chosen), fidelity, program.seed)
        summary = settle(network, views(calibration, held_out), truth)
        program.graphs[POLICY] = policy_graph(network)
        return replace(program, policy_report=summary)


class PolicyNetwork(nn.Module):
    """Three strided convolutions and a linear layer: 0.7 million multiply-accumulates."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.fidelity = nn.Linear(64, levels)

    def forward(self, view: Tensor) -> Tensor:
        fidelity: Tensor = self.fidelity(self.features(view))
        return fidelity


def views(calibration: Calibration, indices: np.ndarray) -> Tensor:
    """float32 [samples, 3, 32, 32]: what the policy will see on the device."""
    rows = [
        pooled_view(calibration.samples.images(indices[start : start + BATCH]), *VIEW[1:])
        for start in range(0, len(indices), BATCH)
    ]
    return torch.from_numpy(np.concatenate(rows))


def train(inputs: Tensor, fidelity: Tensor, seed: int) -> PolicyNetwork:
    """Regress per-level fidelity; flips are the only augmentation (a crop changes the answer)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = PolicyNetwork(fidelity.shape[1])
    with torch.no_grad():
        network.fidelity.weight.zero_()
        network.fidelity.bias.copy_(fidelity.mean(0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH):
            batch = inputs[chosen]
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(3)
            loss = nn.functional.smooth_l1_loss(network(batch), fidelity[chosen], beta=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        report("learn-policy", (epoch + 1) / EPOCHS, f"epoch {epoch + 1}")
    return network.eval()


@torch.no_grad()
def settle(network: PolicyNetwork, inputs: Tensor, truth: Tensor) -> dict[str, Any]:
    """Remove the mean error on held-out samples, or fall back to the means; report which.

    Returns figures on held-out calibration data: mean absolute errors, and at a floor of 0.9 the
    shares of samples whose level is right, at most one off, or too cheap (a violation).
    """
    network.fidelity.bias.add_(truth.mean(0) - network(inputs).mean(0))
    constant = (truth - truth.mean(0)).abs().mean()
    error = (truth - network(inputs)).abs().mean()
    shipped = "network"
    if error >= constant:
        shipped = "means"
        network.fidelity.weight.zero_()
        network.fidelity.bias.copy_(truth.mean(0))
    predicted = difficulty(network(inputs), REPORT_FLOOR)
    actual = difficulty(truth, REPORT_FLOOR)
    return {
        "shipped": shipped,
        "held_out_samples": len(truth),
        "mean_absolute_error": float(error),
        "mean_absolute_error_of_means": float(constant),
        "floor": REPORT_FLOOR,
        "right": float((predicted == actual).float().mean()),
        "off_by_one_at_most": float(((predicted - actual).abs() <= 1).float().mean()),
        "violations": float((predicted > actual).float().mean()),
    }


def difficulty(fidelity: Tensor, floor: float) -> Tensor:
    """[samples]: the largest level (counting from 1; 0 is the original) that keeps the floor."""
    numbers = torch.arange(1, fidelity.shape[1] + 1)
    return (numbers * (fidelity >= floor)).max(1).values


def policy_graph(network: PolicyNetwork) -> GraphModule:
    graph = capture(network, VIEW)
    view = next(node for node in graph.graph.nodes if node.op == "placeholder")
    view.name = view.target = "view"
    graph.recompile()
    return graph
