"""Learn the policy model, which says how cheap a proxy a sample tolerates."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from pbc.bundle.ladder import ALIGNED, Level
from pbc.data import pooled_view
from pbc.frontend.capture import capture
from pbc.ir.calibration import Calibration
from pbc.ir.graph import name_outputs, placeholders
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Policy, Program
from pbc.ir.rewrite import rename_input
from pbc.proxies.sample_fidelity import affordable, sample_fidelity
from pbc.util.progress import report

VIEW = (32, 32)
SAMPLES = 4000
EPOCHS = 15
BATCH = 64
LEARNING_RATE = 2e-3
# The ordinal loss's thresholds and its softness, in standard deviations of a level's fidelity.
THRESHOLDS = torch.linspace(-1.5, 1.5, 7)
SOFTNESS = 0.5

FLOORS = (0.9, 0.95)
# Floors whose mean fidelity the device may choose among.
MIX_FLOORS = (0.5, 0.6, 0.7, 0.8, 0.85, *(round(0.9 + step / 200, 3) for step in range(20)))
CONFIDENCE = 0.9
# Fewer cannot hold the quantile in one half and judge it on the other.
LEAST_HELD_OUT = 20
MOST_EXPENSIVE = 0.03
# One-sided 95 %: what a network must be ahead of the constants by, in standard errors.
SIGNIFICANT = 1.645
TURNS = 3

Rung = LevelGraphs | Level
"""A level with its cost, status and fidelity, here or on a device."""


@dataclass(frozen=True)
class LearnPolicy:
    """Add the graph `policy`, which predicts a sample's fidelity at each proxy level.

    It reads a 32x32 view and puts out one fidelity per level; on the device a sample goes to the
    cheapest level whose predicted fidelity, less the level's margin, reaches the user's floor
    (PieBridge, SenSys 2024, equation 1, learned off-line). The other graphs stay as they are;
    `program.policy` has margins and a report beside the graph.

    Half of the held-out images give the margins, such that a sample's fidelity is at least
    prediction less margin with 90 % confidence (split conformal prediction, Papadopoulos et al.
    2002, finite-sample quantile). The other half judges: where the network does not beat the best
    constant levels at equal mean cost, or costs more than 3 % of level 0, it is replaced by each
    level's mean, with margins of zero, and the report's `shipped` says «means». Of a network that
    ships, the report's `mixes` say what fidelity each floor gives on average: that is what the map
    to accuracy lost speaks of, and on the device it decides which floor a bound on the loss means.

    Does nothing when no level is aligned.
    """

    stage: ClassVar[str] = "route"

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        program = program.copy()
        levels, proxies = program.levels, program.levels[1:]
        if calibration is None or all(level.status != ALIGNED for level in levels):
            return program
        held_out = calibration.held_out
        report("learn-policy", 0.0, "measuring the fidelity of held-out samples")
        truth = torch.from_numpy(sample_fidelity(program, proxies, calibration, held_out))
        means = truth.mean(0)
        torch.manual_seed(program.request.seed)
        network = PolicyNetwork(len(proxies), program.network.input.shape[0]).eval()
        network.predict_constantly(means)
        summary: dict[str, Any] = {
            "shipped": "means",
            "confidence": CONFIDENCE,
            "held_out_samples": len(held_out),
            "cost_share": None,
            "network": None,
            "means": judge(means.expand_as(truth), truth, levels),
        }
        margins = torch.zeros(len(proxies))
        notes = program.notes
        if len(held_out) >= LEAST_HELD_OUT:
            macs = sum(level.macs for level in levels)
            chosen = affordable(macs, calibration.align, SAMPLES)
            report("learn-policy", 0.1, "measuring the fidelity of single samples")
            fidelity = torch.from_numpy(sample_fidelity(program, proxies, calibration, chosen))
            learned = train(views(calibration, chosen), fidelity, program.request.seed)
            with torch.no_grad():
                predicted = learned(views(calibration, held_out))
            # Held-out images are in the order of their names: classes alternate between halves.
            learned_margins = conformal_margins(predicted[::2], truth[::2], CONFIDENCE)
            verdict = judge((predicted - learned_margins)[1::2], truth[1::2], levels)
            verdict |= accuracy(predicted[1::2], truth[1::2])
            share = cost_share(program, calibration, learned)
            summary |= {"network": verdict, "cost_share": share}
            if beats_constants(verdict) and share > MOST_EXPENSIVE:
                notes += (
                    f"the policy network takes {share:.1%} of level 0's cost, more than "
                    f"{MOST_EXPENSIVE:.0%}: each level's mean fidelity is shipped instead",
                )
            elif beats_constants(verdict):
                network, margins = learned, learned_margins
                trusted = (predicted - margins)[1::2]
                summary |= {"shipped": "network", "mixes": mixes(trusted, truth[1::2], levels)}
        policy = Policy(policy_graph(network), summary, tuple(margins.tolist()))
        return replace(program, notes=notes, policy=policy)


class PolicyNetwork(nn.Module):
    """A view and its gradients, three strided convolutions, a linear layer: 0.8 million MACs."""

    def __init__(self, levels: int, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.features = nn.Sequential(
            nn.Conv2d(channels + 2, 16, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.fidelity = nn.Linear(64, levels)
        nn.init.zeros_(self.fidelity.weight)
        nn.init.zeros_(self.fidelity.bias)

    def forward(self, view: Tensor) -> Tensor:
        grey = view.mean(1, keepdim=True)
        edges = [(grey - grey.roll(1, axis)).abs() for axis in (2, 3)]
        fidelity: Tensor = self.fidelity(self.features(torch.cat([view, *edges], 1)))
        return fidelity

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Make what was put out, in units of `scale` around `shift`, a fidelity."""
        self.fidelity.weight.mul_(scale[:, None])
        self.fidelity.bias.mul_(scale).add_(shift)

    def predict_constantly(self, values: Tensor) -> None:
        """Put out these values whatever the view."""
        self.rescale(torch.zeros_like(values), values)


def views(calibration: Calibration, indices: np.ndarray) -> Tensor:
    """float32 [samples, channels, 32, 32]: what the policy will see on the device."""
    rows = [
        pooled_view(calibration.samples.images(indices[start : start + BATCH]), *VIEW)
        for start in range(0, len(indices), BATCH)
    ]
    return torch.from_numpy(np.concatenate(rows))


def train(inputs: Tensor, fidelity: Tensor, seed: int) -> PolicyNetwork:
    """Regress per-level fidelity, standardised, and its order against a grid of thresholds.

    inputs: float32 [samples, channels, 32, 32]; fidelity: float32 [samples, levels]. Augmentation
    is flips and shifts by a pixel: a crop would change the answer.
    """
    torch.manual_seed(seed)
    network = PolicyNetwork(fidelity.shape[1], inputs.shape[1])
    mean, scale = fidelity.mean(0), fidelity.std(0).clamp_min(1e-6)
    goals = (fidelity - mean) / scale
    batches = math.ceil(len(inputs) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * batches
    )
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            loss = ordinal_loss(network(augment(inputs[chosen])), goals[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report("learn-policy", (epoch + 1) / EPOCHS, f"epoch {epoch + 1}")
    network.rescale(scale, mean)
    return network.eval()


def augment(batch: Tensor) -> Tensor:
    """Flip half of the views, and roll all of them by at most one pixel."""
    flip = torch.rand(len(batch)) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return batch.roll((down, right), (2, 3))


def ordinal_loss(predicted: Tensor, goals: Tensor) -> Tensor:
    """Half the squared error, plus cross entropy of [goal >= t] for every threshold t."""
    squared = nn.functional.mse_loss(predicted, goals)
    above = (goals[..., None] >= THRESHOLDS).float()
    logits = (predicted[..., None] - THRESHOLDS) / SOFTNESS
    return squared / 2 + nn.functional.binary_cross_entropy_with_logits(logits, above)


def conformal_margins(predicted: Tensor, truth: Tensor, confidence: float) -> Tensor:
    """[levels]: P(truth >= predicted - margin) >= confidence for one more sample like these.

    predicted, truth: [samples, levels]. The margin is the ceil((n + 1) confidence)-th smallest
    overestimate; raises ValueError where n is too small to have it.
    """
    rank = math.ceil((len(truth) + 1) * confidence)
    if rank > len(truth):
        raise ValueError(f"{len(truth)} samples are too few for a confidence of {confidence}")
    return (predicted - truth).sort(0).values[rank - 1]


def judge(predicted: Tensor, truth: Tensor, levels: Sequence[Rung]) -> dict[str, Any]:
    """Judge routing by these predictions, at each of FLOORS.

    predicted (less margins), truth: [samples, levels]. In a row: the shares of samples whose level
    is right, at most one off, or below the floor (a violation); mean cost and true fidelity; and
    by how much (with its standard error) this fidelity exceeds the best constant levels' at the
    same mean cost.
    """
    costs = torch.tensor([level.cost for level in levels])
    fidelity = torch.cat([torch.ones(len(truth), 1), truth], 1)
    rank = costs.argsort(descending=True).argsort()
    rows = []
    for floor in FLOORS:
        level, best = difficulty(predicted, floor, levels), difficulty(truth, floor, levels)
        got = fidelity.gather(1, level[:, None])[:, 0]
        off = (rank[level] - rank[best]).abs()
        gain = got - constant_fidelity(fidelity, costs, float(costs[level].mean()))
        rows.append(
            {
                "floor": floor,
                "right": float((off == 0).float().mean()),
                "off_by_one_at_most": float((off <= 1).float().mean()),
                "violations": float((got < floor).float().mean()),
                "mean_cost": float(costs[level].mean()),
                "mean_fidelity": float(got.mean()),
                "gain": float(gain.mean()),
                "gain_error": float(gain.std(correction=0)) / math.sqrt(len(gain)),
            }
        )
    return {"floors": rows}


def mixes(predicted: Tensor, truth: Tensor, levels: Sequence[Rung]) -> list[list[float]]:
    """[floor, mean true fidelity, less its standard error] of routing at each of MIX_FLOORS.

    predicted (less margins), truth: [samples, levels].
    """
    fidelity = torch.cat([torch.ones(len(truth), 1), truth], 1)
    rows = []
    for floor in MIX_FLOORS:
        got = fidelity.gather(1, difficulty(predicted, floor, levels)[:, None])[:, 0]
        rows.append([floor, float(got.mean() - got.std(correction=0) / math.sqrt(len(got)))])
    return rows


def difficulty(fidelity: Tensor, floor: float, levels: Sequence[Rung]) -> Tensor:
    """int64 [samples]: the cheapest level that keeps the floor, for the sample and on average.

    fidelity: [samples, levels] of the proxies; level 0, the original, always keeps it.
    """
    costs = torch.tensor([level.cost for level in levels])
    faithful = torch.tensor(
        [lv.status == ALIGNED and (lv.fidelity or 0.0) >= floor for lv in levels[1:]]
    )
    original = torch.ones(len(fidelity), 1, dtype=torch.bool)
    allowed = torch.cat([original, (fidelity >= floor) & faithful], 1)
    return torch.where(allowed, costs, torch.inf).argmin(1)


def constant_fidelity(fidelity: Tensor, costs: Tensor, mean_cost: float) -> Tensor:
    """[samples]: what the best mix of two levels, the same for all samples, gives at this cost.

    fidelity: [samples, 1 + levels], costs: [1 + levels], both with level 0 first.
    """
    mixes = []
    for cheap, expensive in itertools.product(range(len(costs)), repeat=2):
        span = float(costs[expensive] - costs[cheap])
        share = (mean_cost - float(costs[cheap])) / span if span > 0 else 0.0
        if costs[cheap] <= mean_cost + 1e-6 and -1e-6 <= share <= 1 + 1e-6:
            mixes.append(share * fidelity[:, expensive] + (1 - share) * fidelity[:, cheap])
    return max(mixes, key=lambda mix: float(mix.mean()))


def beats_constants(verdict: dict[str, Any]) -> bool:
    """Whether routing gains significantly at every floor where it uses a proxy, and uses one."""
    used = [row for row in verdict["floors"] if row["mean_cost"] < 1]
    return bool(used) and all(row["gain"] > SIGNIFICANT * row["gain_error"] for row in used)


def accuracy(predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Explained variance of each level's fidelity, and mean absolute error."""
    variance = truth.var(0, correction=0).clamp_min(1e-12)
    explained = 1 - (predicted - truth).square().mean(0) / variance
    return {
        "explained_variance": explained.tolist(),
        "mean_absolute_error": float((predicted - truth).abs().mean()),
    }


def cost_share(program: Program, calibration: Calibration, network: PolicyNetwork) -> float:
    """Return a policy's cost for one sample, relative to level 0: MACs, or time if that is more.

    Time counts where this machine is the target, for batches of 64, with the view.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, network.channels, *VIEW))
    share: float = counter.get_total_flops() / 2 / program.levels[0].macs
    if not program.request.target.local:
        return share
    images = calibration.batch(calibration.align[:BATCH])
    original = program.levels[0].fused()
    pixels = images.numpy()
    policy_s = _fastest_s(lambda: network(torch.from_numpy(pooled_view(pixels, *VIEW))))
    return max(share, policy_s / _fastest_s(lambda: original.logits(images, program.parameters)))


@torch.inference_mode()
def _fastest_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def policy_graph(network: PolicyNetwork) -> GraphModule:
    graph = capture(network, (network.channels, *VIEW))
    rename_input(graph, placeholders(graph)[0], "view")
    name_outputs(graph, ["fidelity"])
    return graph
