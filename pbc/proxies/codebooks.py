"""Codebooks: a weight's elements share few values (Deep Compression, Han et al., ICLR 2016).

Section 3 of the paper: one-dimensional k-means of each layer's weights, started evenly between the
least and the largest (section 3.2: that keeps large weights, which matter most, better than the
other starts), and then training of the values, each with the sum of its members' gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from pbc.ir.graph import get_tensor, put_tensor
from pbc.ir.rewrite import copy_graph, drop_unused

aten = torch.ops.aten

MOST_BITS = 8
_LEAST_INPUTS = 32
_LEAST_ELEMENTS = 2048
_MOST_ROUNDS = 100
_SUFFIXES = _VALUES, _KEPT, _INDICES = "_values", "_kept", "_indices"


def is_large(weight: Tensor) -> bool:
    """Whether a layer's weight has enough elements for sharing values to pay."""
    return weight.dtype == torch.float32 and weight.numel() >= _LEAST_ELEMENTS and weight.dim() > 1


def is_dense(weight: Tensor) -> bool:
    """Whether each output has many inputs; in depthwise layers every element counts."""
    return weight.numel() >= _LEAST_INPUTS * len(weight)


def bits_of(weight: Tensor, bits: int) -> int:
    """Return how many bits a weight gets where most get so many."""
    return bits if is_dense(weight) else MOST_BITS


def codebook(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the values, ascending, [at most 2**bits], and each element's index, int32 like it.

    Where pruning made zeros, zero is one of the values, and takes what is nearest to it.
    """
    flat = weight.detach().flatten().double()
    ordered = flat[flat != 0].sort().values
    pruned = len(ordered) < len(flat)
    values = kmeans(ordered, 2**bits - pruned)
    if pruned:
        values = torch.cat([values, values.new_zeros(1)]).unique()
    # In float32, as whoever trains them has them.
    values = values.float()
    indices = torch.bucketize(flat.float(), (values[1:] + values[:-1]) / 2)
    return values, indices.to(torch.int32).reshape(weight.shape)


def kmeans(ordered: Tensor, count: int) -> Tensor:
    """Return at most `count` centres, ascending, of values in ascending order.

    Lloyd's iteration with linear initialisation, to its fixed point: in one dimension a cluster is
    a stretch of the ordered values, and its mean a difference of two sums.
    """
    if not len(ordered):
        return ordered
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centres = torch.linspace(
        float(ordered[0]), float(ordered[-1]), count, dtype=ordered.dtype, device=ordered.device
    )
    for _ in range(_MOST_ROUNDS):
        inner = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        sizes = ends.diff()
        # A centre without members has nothing to stand for.
        means = (sums[ends[1:]] - sums[ends[:-1]])[sizes > 0] / sizes[sizes > 0]
        if torch.equal(means, centres):
            break
        centres = means
    return centres


def with_codebooks(graph: GraphModule, bits: Mapping[str, int]) -> GraphModule:
    """Return the graph with some weights computed from codebooks, which are parameters.

    bits: how many each of those weights gets.

    Before::

        %conv2d = conv2d(%x, @conv1.weight)

    After, where `kept` is zero for the value that stands for pruned elements, else one::

        %mul = mul(@conv1.weight_values, @conv1.weight_kept)
        %index_select = index_select(%mul, 0, @conv1.weight_indices)
        %view = view(%index_select, [16, 3, 3, 3])
        %conv2d = conv2d(%x, %view)
    """
    graph = copy_graph(graph)
    for name, width in bits.items():
        weight = get_tensor(graph, name)
        values, indices = codebook(weight, width)
        put_tensor(graph, f"{name}{_VALUES}", Parameter(values, requires_grad=False))
        put_tensor(graph, f"{name}{_KEPT}", (values != 0).float())
        put_tensor(graph, f"{name}{_INDICES}", indices.flatten())
        reads = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]
        with graph.graph.inserting_before(reads[0]):
            parts = [graph.graph.get_attr(f"{name}{suffix}") for suffix in _SUFFIXES]
            kept = graph.graph.call_function(aten.mul.Tensor, tuple(parts[:2]))
            chosen = graph.graph.call_function(aten.index_select.default, (kept, 0, parts[2]))
            shaped = graph.graph.call_function(aten.view.default, (chosen, list(weight.shape)))
        for read in reads:
            read.replace_all_uses_with(shaped)
            graph.graph.erase_node(read)
    drop_unused(graph)
    return graph


def from_codebooks(graph: GraphModule, names: Collection[str]) -> dict[str, Tensor]:
    """Return the weights that the codebooks of a graph stand for, flat."""
    return {
        name: (get_tensor(graph, f"{name}{_VALUES}") * get_tensor(graph, f"{name}{_KEPT}"))
        .detach()
        .index_select(0, get_tensor(graph, f"{name}{_INDICES}"))
        for name in names
    }
