"""Importance of the indices of a dimension: which of them a proxy keeps.

`magnitude` is ours and the default. The other criteria are Torch-Pruning's: each reads the layers
that share a dimension from its own dependency graph; here they read them from our dimensions,
which also cover what that graph does not see (fused qkv, parts of an axis, functional networks).
Scores are compared within one dimension only, so criteria that differ from another by a
normalisation of whole dimensions (LAMP, against magnitude) would choose the same indices, and have
no name here. Magnitude is the default because it needs no images and was the better one where it
was compared: after 80 steps of alignment 0.797, and 0.777 by activations times their gradients
(docs/alignment.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch_pruning import importance, ops
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.node import Node as Place
from torch_pruning.pruner.function import PrunerBox

from pbc.errors import UsageError, suggest
from pbc.ir.dims import Dimension, Dims, atoms
from pbc.ir.graph import get_tensor, op_name, parameter_names, tensor_names
from pbc.ir.program import Program
from pbc.proxies.distillation import unaugmented

MAGNITUDE = "magnitude"
TAYLOR, HESSIAN = GRADIENTS = ("taylor", "hessian")
CRITERIA: Mapping[str, Callable[..., Any] | None] = {
    MAGNITUDE: None,
    "group-norm": importance.GroupMagnitudeImportance,
    TAYLOR: importance.GroupTaylorImportance,
    HESSIAN: importance.GroupHessianImportance,
    "bn-scale": importance.BNScaleImportance,
    "fpgm": importance.FPGMImportance,
}
"""By name; None is ours. group-norm: squared norms (DepGraph, Fang et al., CVPR 2023). taylor:
|weight x gradient| (Molchanov et al., CVPR 2019). hessian: weight² x mean squared gradient (LeCun
et al., NIPS 1989, its diagonal by Fisher's matrix). bn-scale: scales of batch norms (Liu et al.,
ICCV 2017). fpgm: distance from the other filters (He et al., CVPR 2019)."""


def require(criterion: str) -> None:
    """Raise UsageError where there is no criterion of this name."""
    if criterion not in CRITERIA:
        raise UsageError(suggest("importance criterion", criterion, CRITERIA))


def scores(program: Program, dims: Dims, criterion: str = MAGNITUDE) -> dict[str, Tensor]:
    """Importance of every index of every independent dimension, float32 [size], by its name.

    A dimension that a criterion says nothing of (bn-scale, where no batch norm follows) is scored
    by magnitude. Gradients, for the criteria that want them, are those of the energy of what the
    trainable part receives: see `gradients`.

    Raises UsageError for an unknown criterion, for one that wants gradients where the program has
    no calibration images, and for one that says nothing of any dimension.
    """
    require(criterion)
    found = magnitude(program, dims)
    make = CRITERIA[criterion]
    if make is None or not found:
        return found
    weights = _weights(program)
    if criterion in GRADIENTS:
        if program.calibration is None:
            raise UsageError(
                f"--importance {criterion} wants gradients on images, and there are none; add "
                f"--calibration, or take --importance {MAGNITUDE}"
            )
        gradients(program, weights, squared=criterion == HESSIAN)
    layers = dict(_layers(program, weights))
    judge = make(normalizer=None)  # whole dimensions are never compared
    judged = False
    for dimension in dims.independent():
        group = _group(dimension, dims, layers)
        score = judge(group) if len(group) else None
        if score is not None and len(score):
            found[dimension.name] = score.detach().float()[: dimension.size]
            judged = True
    if not judged:
        raise UsageError(
            f"--importance {criterion} says nothing of this network: none of its "
            f"{len(found)} prunable dimensions has a layer that it reads; take --importance "
            f"{MAGNITUDE}"
        )
    return found


def magnitude(program: Program, dims: Dims) -> dict[str, Tensor]:
    """Importance of every index of every independent dimension, float32 [size].

    The squared norm of the weights that belong to an index, summed over the matrices and kernels
    that share the dimension, each tensor's norms first divided by their mean (DepGraph, Fang et
    al., CVPR 2023, «group-level importance»). Torch-Pruning's GroupMagnitudeImportance ranks
    alike where the tensors' norms are alike. It adds them as they are: a layer whose weights are
    ten times larger then decides alone for all that share its dimension, though a batch norm makes
    that scale mean nothing; and it leaves depthwise kernels out, which are counted here.
    """
    tensors = {
        name: get_tensor(graph, name)
        for graph in program.levels[0].frozen
        for name in tensor_names(graph)
    }
    found = {}
    for dimension in dims.independent():
        score = torch.zeros(dimension.size)
        for slot in dimension.slots:
            tensor = tensors[slot.tensor]
            if tensor.dim() < 2:
                continue
            parts = [variable.size for variable in atoms(dims.tensors[slot.tensor][slot.axis])]
            by_index = tensor.detach().float().square().movedim(slot.axis, 0)
            by_index = by_index.reshape(*parts, -1).movedim(slot.part, 0)
            norms = by_index.reshape(dimension.size, -1).sum(1)
            score += norms / norms.mean().clamp_min(1e-12)
        found[dimension.name] = score
    return found


def gradients(program: Program, weights: Mapping[str, nn.Parameter], *, squared: bool) -> None:
    """Set every weight's `grad` on calibration images; `squared`: mean squares, image by image.

    Of what, without labels: the mean square of each tensor that the trainable part receives, and
    of its logits at the initial parameters, summed. An index whose removal changes this energy most
    changes most of what is trained on, whatever classes there will be; alignment holds proxies to
    the same tensors.
    """
    assert program.calibration is not None
    (images,) = unaugmented(program.calibration, 1)
    level = program.levels[0]
    theta = [program.parameters[name] for name in parameter_names(level.body)]
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    chunks = images.split(1) if squared else (images,)
    for chunk in chunks:
        for weight in weights.values():
            weight.grad = None
        sent = (chunk,) if level.prefix is None else _call(level.prefix, weights, chunk)
        logits = _call(level.body, weights, *sent, *theta)
        energy = sum(value.square().mean() for value in (*sent, *logits))
        assert isinstance(energy, Tensor)
        energy.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad.square() if squared else weight.grad
    for name, weight in weights.items():
        weight.grad = sums[name] / len(chunks)


def _call(
    graph: GraphModule, weights: Mapping[str, nn.Parameter], *inputs: Tensor
) -> tuple[Tensor, ...]:
    own: dict[str, Tensor] = {name: weights[name] for name, _ in graph.named_parameters()}
    return tuple(functional_call(graph, own, inputs))


def _weights(program: Program) -> dict[str, nn.Parameter]:
    """The frozen parameters of level 0, as parameters of their own that can have gradients."""
    return {
        name: nn.Parameter(weight.detach())
        for graph in program.levels[0].frozen
        for name, weight in graph.named_parameters()
    }


# ---- layers, as Torch-Pruning reads them -----------------------------------------------------


def _layers(
    program: Program, weights: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Module]]:
    """The layers of level 0 by their weights' names; these weights are theirs."""
    for graph in program.levels[0].frozen:
        for node in graph.graph.nodes:
            weight = _argument(node, "weight")
            if weight is None or weight.op != "get_attr" or str(weight.target) not in weights:
                continue
            name = str(weight.target)
            layer = _layer(node, weights[name].shape)
            if layer is not None:
                layer.weight = weights[name]
                yield name, layer


def _argument(node: Node, name: str) -> Node | None:
    """The node that a call of an operator takes as this argument."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    for position, argument in enumerate(schema.arguments):
        if argument.name == name:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            return given if isinstance(given, Node) else None
    return None


def _layer(node: Node, shape: torch.Size) -> nn.Module | None:
    """A module like the one that the operator came from, without tensors; None for others."""
    match op_name(node):
        case "aten.conv2d.default":
            groups = int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]
            return nn.Conv2d(
                groups * shape[1],
                shape[0],
                (shape[2], shape[3]),
                groups=groups,
                bias=False,
                device="meta",
            )
        case "aten.linear.default":
            return nn.Linear(shape[1], shape[0], bias=False, device="meta")
        case "aten.batch_norm.default":
            return nn.BatchNorm2d(shape[0], device="meta")
        case "aten.layer_norm.default" if len(shape) == 1:
            return nn.LayerNorm(shape[0], device="meta")
    return None


def _group(dimension: Dimension, dims: Dims, layers: Mapping[str, nn.Module]) -> Group:
    """The layers that share a dimension, each with the dimension's index of its own indices."""
    group = Group()
    for slot in dimension.slots:
        layer = layers.get(slot.tensor)
        if layer is None or slot.axis > 1:
            continue
        parts = [variable.size for variable in atoms(dims.tensors[slot.tensor][slot.axis])]
        shape = [1] * len(parts)
        shape[slot.part] = dimension.size
        roots = torch.arange(dimension.size).reshape(shape).expand(parts).reshape(-1)
        pruner = PrunerBox[ops.module2type(layer)]
        handler = (pruner.prune_out_channels, pruner.prune_in_channels)[slot.axis]
        place = Place(layer, None)
        group.add_dep(Dependency(handler, handler, place, place), list(range(len(roots))))
        group[-1].root_idxs = roots.tolist()
    # Torch-Pruning makes its sums as long as the first entry's.
    group.items.sort(key=lambda item: len(item.idxs))
    return group
