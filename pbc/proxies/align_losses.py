"""Losses of alignment: in what respects a proxy is to be like level 0.

A loss is a sum of terms, by their names: `features+nst`. `features` is what the fidelity measures:
the tensors of the interface. The others look before and behind it: at the last feature map of the
prefix, and at the scores that the network's own classifier makes of what is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pbc.errors import PbcError, UsageError, suggest
from pbc.ir.dim_rules import analyse
from pbc.ir.dims import channel_axes
from pbc.ir.graph import output_nodes, shape_of
from pbc.ir.program import Program
from pbc.ir.rewrite import ancestors
from pbc.proxies.fidelity import Standard

FEATURES, LOGITS, MAP, NST = TERMS = ("features", "logits", "map", "nst")
TEMPERATURE = 4.0
NST_WEIGHT = 25.0


def terms_of(text: str) -> tuple[str, ...]:
    """Return the terms that `features+nst` names; raises UsageError for another name."""
    terms = tuple(text.split("+"))
    for term in terms:
        if term not in TERMS:
            raise UsageError(suggest("term of --align-loss", term, TERMS))
    return tuple(term for term in TERMS if term in terms)


@dataclass(frozen=True)
class FeatureMap:
    """The last value of the prefix that has positions: its node, and which axis counts channels."""

    node: str
    channels: int

    @staticmethod
    def of(program: Program) -> FeatureMap:
        """Find it in level 0, whose names every level has; raises PbcError where there is none."""
        original = program.levels[0]
        inside = set() if original.prefix is None else ancestors(output_nodes(original.prefix))
        known = analyse(original).axes
        nodes = [] if original.prefix is None else list(original.prefix.graph.nodes)
        for node in reversed(nodes):
            if node not in inside or node.op != "call_function" or node.name not in known:
                continue
            channels = channel_axes(known[node.name])
            if len(shape_of(node)) in (3, 4) and len(channels) == 1 and channels[0] > 0:
                return FeatureMap(node.name, channels[0])
        raise PbcError(
            "--align-loss map and nst need a feature map, and the frozen part of "
            f"{program.network.name} has none before its trainable part"
        )

    def pair(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a proxy's map and level 0's, [batch, channels, *positions], of equal positions."""
        teacher = target.float().movedim(self.channels, 1)
        student = output.float().movedim(self.channels, 1)
        if student.shape[2:] != teacher.shape[2:]:
            mode = "linear" if teacher.dim() == 3 else "bilinear"
            student = functional.interpolate(student, teacher.shape[2:], mode=mode)
        return student, teacher


@dataclass(frozen=True)
class AlignmentLoss:
    """The sum of some terms; its arguments are what `UpToInterface` makes of images.

    standard: of the interface's tensors. feature_map: the one that follows them, where a term looks
    at it; then, for the term `logits`, come scores.
    """

    standard: Sequence[Standard]
    terms: Sequence[str] = (FEATURES,)
    feature_map: FeatureMap | None = None

    @staticmethod
    def of(program: Program, standard: Sequence[Standard], terms: Sequence[str]) -> AlignmentLoss:
        """Return the loss of these terms; raises PbcError where there is no map to look at."""
        looks = MAP in terms or NST in terms
        return AlignmentLoss(standard, terms, FeatureMap.of(program) if looks else None)

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar."""
        count = len(self.standard)
        total = torch.zeros((), device=outputs[0].device)
        if FEATURES in self.terms:
            total = total + feature_loss(outputs[:count], targets[:count], self.standard)
        if self.feature_map is not None:
            student, teacher = self.feature_map.pair(outputs[count], targets[count])
            if MAP in self.terms:
                total = total + map_loss(student, teacher)
            if NST in self.terms:
                total = total + NST_WEIGHT * nst_loss(student, teacher)
        if LOGITS in self.terms:
            total = total + logit_loss(outputs[-1], targets[-1])
        return total


def feature_loss(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], standard: Sequence[Standard]
) -> Tensor:
    """Mean over interface tensors of squared error plus one minus cosine, both standardised."""
    total = torch.zeros((), device=outputs[0].device)
    for output, target, normal in zip(outputs, targets, standard, strict=True):
        z, goal = normal(output.float()).flatten(1), normal(target.float()).flatten(1)
        total = total + functional.mse_loss(z, goal) + 1 - torch.cosine_similarity(z, goal).mean()
    return total / len(outputs)


def logit_loss(output: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Kullback-Leibler divergence of softened scores, times the temperature squared.

    The factor keeps gradients as large at any temperature (Hinton et al., 2015, section 2).
    """
    student = functional.log_softmax(output.float() / temperature, dim=-1)
    teacher = functional.log_softmax(target.float() / temperature, dim=-1)
    divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return divergence * temperature**2


def map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps [batch, channels, *positions], in the teacher's deviations.

    Raises PbcError where channels went: there is nothing to compare with.
    """
    if student.shape[1] != teacher.shape[1]:
        raise PbcError(
            f"--align-loss map compares feature maps of the same channels, and a proxy keeps "
            f"{student.shape[1]} of {teacher.shape[1]}; use nst, or leave width out of --axes"
        )
    axes = [axis for axis in range(teacher.dim()) if axis != 1]
    variance = teacher.var(axes, keepdim=True)
    # A channel that hardly moves carries nothing; do not let its noise dominate.
    return ((student - teacher).square() / (variance + 1e-4 * variance.mean() + 1e-12)).mean()


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between channels' activation patterns, mean over samples.

    Of maps [batch, channels, *positions]. Neuron Selectivity Transfer (Huang and Wang, 2017,
    equation 8) with the kernel (x·y)², on patterns of unit length. The sums of the kernel over all
    pairs of channels are the squared norm of a difference of Gram matrices over positions, so
    neither side need have the other's channels.
    """
    return (_gram(student) - _gram(teacher)).square().sum((1, 2)).mean()


def _gram(maps: Tensor) -> Tensor:
    """[batch, positions, positions]: mean over channels of each pattern's outer product."""
    patterns = functional.normalize(maps.flatten(2), dim=2)
    return patterns.transpose(1, 2) @ patterns / patterns.shape[1]
