"""Criteria of importance: ours beside Torch-Pruning's, and theirs by our dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch
import torch_pruning
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured, settled
from torch import Tensor, nn

from pbc.errors import UsageError
from pbc.ir.dim_rules import dims_of
from pbc.ir.levels import LevelPlan
from pbc.ir.program import Program
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.proxies.distillation import unaugmented
from pbc.proxies.importance import CRITERIA, GRADIENTS, scores
from pbc.testing import graph_of, make_program, run_passes


class DepthwiseNet(nn.Module):
    """Widen, channel by channel, in groups, flatten: the ways in which an axis has parts."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 6, 3, stride=8)
        self.hidden = nn.Linear(6 * 4, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.widen(x)))
        x = self.narrow(torch.relu(self.depthwise(x)))
        logits: Tensor = self.fc(torch.relu(self.hidden(x.flatten(1))))
        return logits


def analysed(module: nn.Module) -> Program:
    return run_passes(make_program(module), MarkTrainable(), SplitPrefix(), IndependentDims())


def found(program: Program, criterion: str) -> dict[str, Tensor]:
    return scores(program, dims_of(program), criterion)


def of_torch_pruning(
    module: nn.Module, layer: str, judge: Callable[..., Tensor], shape: tuple[int, ...]
) -> Tensor:
    """The scores of a layer's outputs by Torch-Pruning alone, from the eager module."""
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(module, torch.randn(1, *shape))
    target = module.get_submodule(layer)
    convolution = isinstance(target, nn.Conv2d)
    prune = (torch_pruning.prune_linear_out_channels, torch_pruning.prune_conv_out_channels)
    assert isinstance(target.weight, Tensor)
    count = target.weight.shape[0]
    return judge(graph.get_pruning_group(target, prune[convolution], list(range(count))))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (ConvNet, ["conv1"]),
        (ResidualNet, ["blocks.0.down", "blocks.2.down"]),
        (AttentionNet, ["up"]),
        (DepthwiseNet, ["widen", "narrow"]),
    ],
)
@pytest.mark.parametrize("criterion", ["group-norm", "fpgm"])
def test_on_our_dimensions_a_criterion_says_what_it_says_on_its_own(
    kind: Kind, layers: list[str], criterion: str
) -> None:
    module = settled(kind())
    program = analysed(module)
    ours = found(program, criterion)
    judge = CRITERIA[criterion]
    assert judge is not None
    for layer in layers:
        theirs = of_torch_pruning(
            module, layer, judge(normalizer=None), program.network.input.shape
        )
        torch.testing.assert_close(ours[f"{layer}.weight:0"], theirs.detach())


def test_magnitude_ranks_as_torch_pruning_does_where_weights_are_alike() -> None:
    """And where a layer is scaled, its own channels stay in their order, by ours alone."""
    module = settled(ResidualNet())
    down, up = (module.get_submodule(f"blocks.0.{name}").weight for name in ("down", "up"))
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    with torch.no_grad():
        down *= (up.square().sum() / down.square().sum()).sqrt()
    name = "blocks.0.down.weight:0"
    ours, theirs = (found(analysed(module), c)[name].argsort() for c in ("magnitude", "group-norm"))
    assert ours.tolist() == theirs.tolist()
    with torch.no_grad():
        down *= 10
    scaled, decided = (
        found(analysed(module), c)[name].argsort() for c in ("magnitude", "group-norm")
    )
    assert scaled.tolist() == ours.tolist()
    assert decided.tolist() != ours.tolist()
    assert decided.tolist() == down.square().sum((1, 2, 3)).argsort().tolist()


@pytest.fixture
def calibrated(tmp_path: Path) -> Program:
    program = networks.analysed(ConvNet)
    data = networks.calibration(tmp_path / "photos", program.network.input, 20)
    return replace(program, calibration=data)


def energy_gradients(program: Program, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of the eager module: what `taylor` differentiates, by both convolutions' weights."""
    module = captured(ConvNet).module
    assert isinstance(module, ConvNet)
    weights = [module.conv1.weight, module.conv2.weight]
    sent: list[Tensor] = []
    handle = module.fc.register_forward_pre_hook(lambda _, inputs: sent.extend(inputs))
    for weight in weights:
        weight.requires_grad_(True)
    try:
        energy = module(images).square().mean() + sent[0].square().mean()
        first, second = torch.autograd.grad(energy, weights)
    finally:
        handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return first, second


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_gradients_are_those_of_the_energy(calibrated: Program, criterion: str) -> None:
    assert calibrated.calibration is not None
    module = captured(ConvNet).module
    assert isinstance(module, ConvNet)
    (images,) = unaugmented(calibrated.calibration, 1)
    first, second = module.conv1.weight, module.conv2.weight
    if criterion == "taylor":
        by_hand = [
            w * g
            for w, g in zip((first, second), energy_gradients(calibrated, images), strict=True)
        ]
        terms = [term.abs() for term in by_hand]
    else:
        each = [energy_gradients(calibrated, image) for image in images.split(1)]
        squares = [torch.stack(gs).square().mean(0) for gs in zip(*each, strict=True)]
        terms = [w.square() * h for w, h in zip((first, second), squares, strict=True)]
    conv1 = terms[0].sum((1, 2, 3)) + terms[1].sum((0, 2, 3))
    (name,) = (d.name for d in dims_of(calibrated).independent())
    score = found(calibrated, criterion)[name]
    if criterion == "hessian":  # which reads batch norms too
        assert torch.corrcoef(torch.stack([score, conv1.detach()]))[0, 1] > 0.5
    else:
        torch.testing.assert_close(score, conv1.detach() / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_criterion_makes_proxies(calibrated: Program, criterion: str) -> None:
    plans = tuple(LevelPlan({"conv1.weight:0": size}, 0.5, 0.0) for size in (8, 4))
    before = replace(calibrated, plans=plans)
    after = PruneDims(importance=criterion)(before)
    score = found(before, criterion)["conv1.weight:0"]
    assert len(set(score.tolist())) > 8
    for level, size in ((1, 8), (2, 4)):
        kept = sorted(score.topk(size).indices.tolist())
        assert after.levels[level].keep == {"conv1.weight:0": kept}
        assert after.logits(level, after.network.example).shape == after.network.reference.shape
    assert all(weight.grad is None for weight in graph_of(before, "prefix/0").parameters())


def test_a_dimension_that_a_criterion_does_not_read_is_ranked_by_magnitude() -> None:
    program = analysed(settled(DepthwiseNet()))
    ours, scale = found(program, "magnitude"), found(program, "bn-scale")
    module = DepthwiseNet()
    assert ours.keys() == scale.keys()
    assert torch.equal(ours["narrow.weight:0"], scale["narrow.weight:0"])
    weights = dict(settled(module).named_parameters())
    torch.testing.assert_close(scale["widen.weight:0"], weights["norm.weight"].detach().abs())


@pytest.mark.parametrize(
    ("criterion", "kind", "words"),
    [
        ("tailor", ConvNet, "no importance criterion named 'tailor'; did you mean 'taylor'"),
        ("taylor", ConvNet, "taylor wants gradients on images, and there are none; add --calib"),
        ("bn-scale", ResidualNet, r"bn-scale says nothing of this network: none of its 3 prunable"),
    ],
)
def test_what_cannot_rank_is_refused(criterion: str, kind: Kind, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        found(networks.analysed(kind), criterion)
    if criterion not in CRITERIA:
        with pytest.raises(UsageError, match=words):
            PruneDims(importance=criterion)
