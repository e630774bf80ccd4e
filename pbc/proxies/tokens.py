"""Merged tokens: a proxy of a transformer that goes on with fewer of them.

After the attention of a block the tokens that are most alike, by their keys, become one, their mean
weighted by how many each stands for; attention counts that many by the logarithm of it (Bolya et
al., Token Merging, ICLR 2023). No parameter has a token's axis, so θ keeps its shapes, and whatever
trains inside the blocks runs on fewer tokens forward and backward.

Every choice is written as a comparison and carried out by a product with zeros and ones: engines
run a scatter that adds one value after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from pbc.bundle.graph_name import BODY, PREFIX, GraphName
from pbc.ir.dims import Axis, Dims, Variable, atoms
from pbc.ir.graph import PARAMETER, op_name, output_node, placeholders, shape_of
from pbc.ir.levels import LevelGraphs
from pbc.ir.rewrite import ancestors, copy_graph, cut_at
from pbc.ir.slice_graph import refresh_shapes

aten = torch.ops.aten

# The key of a node's meta under which it says what was merged of it, as _Fewer.
_MERGES = "pbc_merges"
_END = 2**63 - 1
# bfloat16 counts no further; more tokens of either half are left alone.
_MOST = 256
# What an attention's result passes on its way to the sum with what went around the block.
_ON_THE_WAY = (
    "transpose", "permute", "reshape", "view", "flatten", "contiguous", "clone", "linear",
    "dropout", "mul", "layer_norm",
)  # fmt: skip
# What is computed for each position by itself, whatever axes it names are not the tokens'.
_PER_POSITION = (
    "add", "sub", "mul", "div", "linear", "layer_norm", "gelu", "relu", "silu", "sigmoid", "tanh",
    "dropout", "transpose", "permute", "unsqueeze", "unbind", "getitem", "chunk", "split",
    "split_with_sizes", "contiguous", "clone", "pow", "sqrt", "rsqrt", "exp", "neg", "_to_copy",
    "to", "detach", "mean", "sum", "hardswish", "elu", "leaky_relu", "softplus", "select", "slice",
    "rms_norm", "mish", "squeeze",
)  # fmt: skip
# Where operators that take parts along an axis have that axis among their arguments.
_ALONG = {"select": 1, "slice": 1, "unbind": 1, "chunk": 2, "split": 2, "split_with_sizes": 2}
_RESHAPES = ("aten.reshape.default", "aten.view.default")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a network: in which graph they can be merged, and after which nodes.

    count: of tokens. leading: how many in front are no image's, such as a class token; they are
    never merged. sums: the node after each attention, in order, where it joins what went around it.
    keys: the keys that each attention read. written: the nodes of attentions that are written out,
    from the product of queries and keys on. axis: the tokens' axis, as dimensions know it.
    """

    role: GraphName
    count: int
    leading: int
    sums: tuple[str, ...]
    keys: tuple[str, ...]
    written: frozenset[str]
    axis: tuple[Variable, ...]

    def schedule(self, rate: float) -> tuple[int, ...]:
        """Return how many tokens to merge after each attention: a share at first, none at last."""
        left, merges = self.count, []
        for number in range(len(self.sums)):
            wanted = round(rate * self.count * (1 - number / len(self.sums)))
            # One of the half that is merged stays: an engine need not know empty tensors.
            merges.append(max(min(wanted, (left - self.leading + 1) // 2 - 1), 0))
            left -= merges[-1]
        return tuple(merges)


def tokens_of(level: LevelGraphs, dims: Dims) -> Tokens | None:
    """Return the tokens of level 0; None where no attention runs over tokens as it is known here.

    dims: of level 0. They are merged in the one of its graphs that has most attentions.
    """
    found = [
        tokens
        for role, graph in ((PREFIX, level.prefix), (BODY, level.body))
        if graph is not None and (tokens := _tokens_in(role, graph, level, dims)) is not None
    ]
    return max(found, key=lambda tokens: len(tokens.sums), default=None)


def merged(level: LevelGraphs, tokens: Tokens, dims: Dims, *, shapes: bool = True) -> LevelGraphs:
    """Return a level whose tokens are merged as its `merges` say; others as they are.

    dims: of level 0. Nodes keep their names. Where a graph needs all tokens again, such as for what
    it returns, every token gets the value of what it was merged into. Raises ValueError where a
    node cannot be found again. shapes: as `slice_graph` has it.
    """
    if not any(level.merges):
        return level
    graph = level.prefix if tokens.role == PREFIX else level.body
    assert graph is not None
    graph = _Merging(copy_graph(graph), tokens, dims).run(level.merges)
    if shapes:
        refresh_shapes(graph)
    return replace(level, prefix=graph) if tokens.role == PREFIX else replace(level, body=graph)


def cut_unmerged(graph: GraphModule, names: Sequence[str]) -> GraphModule:
    """Return a copy that returns the named nodes with all their tokens, under these names."""
    by_name = {node.name: node for node in graph.graph.nodes}
    if not any(_MERGES in by_name[name].meta for name in names):
        return cut_at(graph, names)
    whole = copy_graph(graph)
    by_name = {node.name: node for node in whole.graph.nodes}
    ends = []
    for name in names:
        node = by_name[name]
        if _MERGES in node.meta:
            build = _Builder(whole, output_node(whole), f"{name}_whole")
            node = _unmerged(build, node, node.meta[_MERGES], by_name)
        ends.append(node)
    output_node(whole).args = (tuple(ends),)
    whole.recompile()
    refresh_shapes(whole)
    return cut_at(whole, [node.name for node in ends], names)


# ---- finding -------------------------------------------------------------------------------------


def _tokens_in(
    role: GraphName, graph: GraphModule, level: LevelGraphs, dims: Dims
) -> Tokens | None:
    written: set[str] = set()
    sums, keys, axis = [], [], None
    for node in graph.graph.nodes:
        attention = _attention(node)
        joined = None if attention is None else _joined(node)
        known = dims.axes.get(joined.name, []) if joined is not None else []
        if joined is None or len(known) != 3 or dims.batch not in atoms(known[0]):
            continue
        assert attention is not None
        along = tuple(atoms(known[1]))
        key_axes = dims.axes[attention.key.name]
        if len(key_axes) != 4 or tuple(atoms(key_axes[2])) != along:
            continue
        axis = axis or along
        if along == axis:
            sums.append(joined.name)
            keys.append(attention.key.name)
            written.update(one.name for one in attention.written)
    if axis is None:
        return None
    leading = _leading(level, axis, dims)
    count = shape_of(next(node for node in graph.graph.nodes if node.name == sums[0]))[1]
    if leading is None or (count - leading + 1) // 2 > _MOST:
        return None
    return Tokens(role, count, leading, tuple(sums), tuple(keys), frozenset(written), axis)


class _Attention(NamedTuple):
    """What an attention compares with; written: its nodes, where it is not one operator."""

    key: Node
    written: tuple[Node, ...] = ()


def _attention(node: Node) -> _Attention | None:
    """The attention that a node is the result of, without a mask; None where it is not of one."""
    name = op_name(node)
    if name == "aten.scaled_dot_product_attention.default":
        key = node.args[1]
        assert isinstance(key, Node)
        return _Attention(key) if _plain(node) else None
    if name != "aten.matmul.default" or len(shape_of(node)) != 4:
        return None
    softmax, _ = node.args
    if not isinstance(softmax, Node) or not _over_last(softmax, "aten.softmax.int"):
        return None
    written, scores = [node, softmax], softmax.args[0]
    # Scaled, or not.
    while isinstance(scores, Node) and op_name(scores) in ("aten.mul.Tensor", "aten.div.Tensor"):
        if any(isinstance(other, Node) for other in scores.args[1:]):
            return None
        written.append(scores)
        scores = scores.args[0]
    if not isinstance(scores, Node) or op_name(scores) != "aten.matmul.default":
        return None
    written.append(scores)
    turned = scores.args[1]
    assert isinstance(turned, Node)
    if op_name(turned) != "aten.transpose.int" or {int(a) % 4 for a in turned.args[1:]} != {2, 3}:  # type: ignore[arg-type]
        return None
    if any(len(one.users) > 1 for one in written[1:]):
        return None
    key = turned.args[0]
    assert isinstance(key, Node)
    return _Attention(key, tuple(written))


def _over_last(node: Node, name: str) -> bool:
    return op_name(node) == name and node.args[1] in (-1, len(shape_of(node)) - 1)


def _plain(attention: Node) -> bool:
    """Whether it has no mask, no dropout and the same tokens for queries and keys."""
    query, key = attention.args[:2]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    options = [*attention.args[3:], *(v for k, v in attention.kwargs.items() if k != "scale")]
    return not any(options) and shape_of(query)[2:3] == shape_of(key)[2:3]


def _joined(attention: Node) -> Node | None:
    """The sum of an attention's result, on its way, with what went around it."""
    node, before = attention, ancestors([attention])
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name == "aten.add.Tensor":
            others = [value for value in user.all_input_nodes if value is not node]
            if others and others[0] in before and shape_of(others[0]) == shape_of(user):
                return user
            return None
        if name.split(".")[1] not in _ON_THE_WAY:
            return None
        node = user
    return None


def _leading(level: LevelGraphs, axis: tuple[Variable, ...], dims: Dims) -> int | None:
    """How many tokens before the first of the image; None where others come after those."""
    for graph in level.frozen:
        images = [node for node in placeholders(graph) if PARAMETER not in node.meta]
        for node in graph.graph.nodes:
            if op_name(node) != "aten.cat.default":
                continue
            known = dims.axes.get(node.name, [])
            parts = node.args[0]
            if len(known) != 3 or tuple(atoms(known[1])) != axis or not isinstance(parts, list):
                continue
            of_image = [bool(_by_value(part) & set(images)) for part in parts]
            if not any(of_image):
                return None
            first = of_image.index(True)
            if not all(of_image[first:]):
                return None
            return sum(shape_of(part)[1] for part in parts[:first])
    return 0


def _by_value(node: Node) -> set[Node]:
    """All that a node's values are computed from, and not only its shape."""
    found, pending = set(), [node]
    while pending:
        one = pending.pop()
        if one in found or op_name(one) == "aten.sym_size.int":
            continue
        found.add(one)
        pending.extend(one.all_input_nodes)
    return found


# ---- rewriting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merge:
    """One merge: tokens are leading, then those in turn of two halves.

    kept: the node [b, first - gone, first] of zeros and ones that picks what stays of the first
    half. into: [b, second, first], what of it goes into which of the second.
    """

    kept: str
    into: str
    leading: int
    first: int
    second: int


@dataclass(frozen=True)
class _Fewer:
    """What was merged of a value's tokens, and which of its axes they and the batch are.

    batch: None where the batch shares its axis, as with heads that are folded into it.
    """

    merges: tuple[_Merge, ...]
    batch: int | None
    tokens: int
    rank: int


class _Builder:
    """Adds operators to a graph in front of a node, under names of their own."""

    def __init__(self, graph: GraphModule, before: Node, title: str) -> None:
        self._graph = graph.graph
        self._before = before
        self._title = title
        self._count = 0

    def __call__(self, op: Any, *args: Any) -> Node:
        self._count += 1
        with self._graph.inserting_before(self._before):
            return self._graph.create_node(
                "call_function", op, args, name=f"{self._title}_{self._count}"
            )

    def part(self, node: Node, start: int, end: int = _END, step: int = 1, axis: int = 1) -> Node:
        return self(aten.slice.Tensor, node, axis, start, end, step)

    def chosen(self, condition: Node, like: Node) -> Node:
        """One where a condition holds, else zero, in the type of another value."""
        return self(aten.where.ScalarOther, condition, self(aten.ones_like.default, like), 0.0)

    def numbered(self, row: Node) -> Node:
        """1, 2, 3, … along the last axis of [b, n]."""
        return self(aten.cumsum.default, self(aten.ones_like.default, row), -1)


@dataclass
class _State:
    """What was merged so far: the sizes of tokens [b, tokens, 1], and a mask for attention."""

    merges: tuple[_Merge, ...] = ()
    sizes: Node | None = None
    count: int = 0
    mask: Node | None = field(default=None)


class _Merging:
    """Rewrites one graph from its inputs to its outputs."""

    def __init__(self, graph: GraphModule, tokens: Tokens, dims: Dims) -> None:
        self.graph = graph
        self.tokens = tokens
        # Of level 0; the nodes that are added get axes too.
        self.axes = dict(dims.axes)
        self.batch = dims.batch
        self.by_name = {node.name: node for node in graph.graph.nodes}
        # Of every node that has fewer tokens now: since which merge.
        self.states: dict[Node, _State] = {}
        self._whole: dict[Node, Node] = {}

    def run(self, merges: Sequence[int]) -> GraphModule:
        plan = dict(zip(self.tokens.sums, zip(self.tokens.keys, merges, strict=True), strict=True))
        state = _State(count=self.tokens.count)
        for node in list(self.graph.graph.nodes):
            if node.op == "call_function":
                self.follow(node)
            elif node.op == "output":
                self.bring_back(node)
            key, gone = plan.get(node.name, ("", 0))
            if gone and self.states.get(node, _State()).merges == state.merges:
                state = self.merge(node, self.by_name[key], gone, state)
        self.graph.graph.lint()
        self.graph.recompile()
        return self.graph

    # ---- one node -------------------------------------------------------------------------------

    def follow(self, node: Node) -> None:
        """Let an operator run on fewer tokens where that is the same for each, else on all."""
        known = [self.states[value] for value in node.all_input_nodes if value in self.states]
        if not known:
            return
        state = known[0]
        if any(other.merges != state.merges for other in known) or not self.adapts(node, state):
            self.bring_back(node)
            return
        if self.has_tokens(node):
            self.states[node] = state
            node.meta[_MERGES] = self.fewer(node, state)
        elif isinstance(node.meta.get("val"), (tuple, list)) or node.name in self.tokens.written:
            self.states[node] = state

    def adapts(self, node: Node, state: _State) -> bool:
        """Rewrite an operator for fewer tokens; False where it cannot be."""
        name = op_name(node)
        kind = name.split(".")[1]
        if any(self.counts_tokens(v) for v in node.all_input_nodes if v not in self.states):
            return False
        if name == "aten.sym_size.int":
            return bool(node.args[1] == 0)
        if name == "aten.scaled_dot_product_attention.default":
            return self.attend(node, state)
        if node.name in self.tokens.written:
            return self.weigh(node, state)
        if name in _RESHAPES:
            return self.reshape(node, state)
        if kind in _ALONG and self.along_tokens(node, _ALONG[kind]):
            return kind in ("select", "slice") and self.of_leading(node)
        if kind not in _PER_POSITION or self.normalises_tokens(node, kind):
            return False
        return isinstance(node.meta.get("val"), (tuple, list)) or self.has_tokens(node)

    def attend(self, node: Node, state: _State) -> bool:
        key = node.args[1]
        if not isinstance(key, Node) or key.name not in self.tokens.keys:
            return False
        node.args = (*node.args[:3], self.mask(state), *node.args[4:])
        return True

    def weigh(self, node: Node, state: _State) -> bool:
        """The same where queries and keys, softmax and values are operators of their own."""
        if op_name(node) == "aten.softmax.int":
            build = _Builder(self.graph, node, f"{node.name}_counted")
            node.args = (build(aten.add.Tensor, node.args[0], self.mask(state)), *node.args[1:])
        return True

    def reshape(self, node: Node, state: _State) -> bool:
        axes, sizes = self.axes.get(node.name), node.args[1]
        if axes is None or not isinstance(sizes, (list, tuple)) or not self.has_tokens(node):
            return False
        fewer = [
            self.size(entry, state, node) if self.is_tokens(axis) or self.folds(axis) else entry
            for axis, entry in zip(axes, sizes, strict=True)
        ]
        if None in fewer:
            return False
        node.args = (node.args[0], fewer)
        return True

    def size(self, entry: Any, state: _State, before: Node) -> Any:
        """The size of an axis of fewer tokens, or of fewer for each sample; None if not known."""
        if entry == -1:
            return entry
        if isinstance(entry, int):
            return state.count
        if not isinstance(entry, Node) or entry.target is not operator.mul:
            return None
        factors = [state.count if f == self.tokens.count else f for f in entry.args]
        return _Builder(self.graph, before, f"{before.name}_size")(operator.mul, *factors)

    def along_tokens(self, node: Node, position: int) -> bool:
        """Whether an operator takes parts along the tokens; position: of the axis in its args."""
        axes = self.axes[node.all_input_nodes[0].name]
        along = node.args[position] if len(node.args) > position else 0
        return self.is_tokens(axes[int(along)])  # type: ignore[arg-type]

    def of_leading(self, node: Node) -> bool:
        """Whether a select or slice takes no other than leading tokens."""
        if op_name(node) == "aten.select.int":
            return 0 <= int(node.args[2]) < self.tokens.leading  # type: ignore[arg-type]
        if len(node.args) != 4:
            return False
        start, end = node.args[2:]
        if not isinstance(start, int) or not isinstance(end, int):
            return False
        return 0 <= start < end <= self.tokens.leading

    def normalises_tokens(self, node: Node, kind: str) -> bool:
        """Whether a norm is over the tokens, too."""
        if kind not in ("layer_norm", "rms_norm"):
            return False
        count = len(node.args[1])  # type: ignore[arg-type]
        return any(self.is_tokens(axis) for axis in self.axes.get(node.name, [])[-count:])

    def is_tokens(self, axis: Axis) -> bool:
        return tuple(atoms(axis)) == self.tokens.axis

    def folds(self, axis: Axis) -> bool:
        """Whether an axis is all tokens of all samples."""
        folded = {*self.tokens.axis, self.batch}
        return len(atoms(axis)) == len(folded) and set(atoms(axis)) == folded

    def has_tokens(self, node: Node) -> bool:
        """Whether one axis of a node's result counts tokens, and no other has a part in them."""
        axes = self.axes.get(node.name)
        if axes is None:
            return False
        touched = [axis for axis in axes if set(self.tokens.axis) & set(atoms(axis))]
        return len(touched) == 1 and (self.is_tokens(touched[0]) or self.folds(touched[0]))

    def counts_tokens(self, node: Node) -> bool:
        """Whether any axis has to do with tokens, as both of a layer's that mixes them."""
        axes = self.axes.get(node.name) or []
        return any(set(self.tokens.axis) & set(atoms(axis)) for axis in axes)

    def fewer(self, node: Node, state: _State) -> _Fewer:
        axes = self.axes[node.name]
        alone = [at for at, axis in enumerate(axes) if atoms(axis) == [self.batch]]
        (tokens,) = (at for at, axis in enumerate(axes) if set(self.tokens.axis) & set(atoms(axis)))
        return _Fewer(state.merges, alone[0] if alone else None, tokens, len(axes))

    def bring_back(self, node: Node) -> None:
        """Let a node read all tokens again."""
        node.args = torch.fx.map_arg(node.args, lambda value: self.whole(value, node))
        node.kwargs = torch.fx.map_arg(node.kwargs, lambda value: self.whole(value, node))

    def whole(self, value: Node, before: Node) -> Node:
        if value not in self.states or not self.has_tokens(value):
            return value
        if value not in self._whole:
            build = _Builder(self.graph, before, f"{value.name}_all")
            fewer = self.fewer(value, self.states[value])
            self._whole[value] = _unmerged(build, value, fewer, self.by_name)
        return self._whole[value]

    # ---- merging --------------------------------------------------------------------------------

    def merge(self, node: Node, key: Node, gone: int, state: _State) -> _State:
        """Merge tokens of the sum after an attention; whatever reads it goes on with fewer."""
        users = list(node.users)
        build = _Builder(self.graph, node.next, f"{node.name}_merged")
        leading = self.tokens.leading
        first = (state.count - leading + 1) // 2
        second = state.count - leading - first

        def halves(value: Node) -> tuple[Node, Node]:
            return build.part(value, leading, _END, 2), build.part(value, leading + 1, _END, 2)

        kept, into = self.choice(build, *halves(_likeness(build, key)), first, gone)
        one, other = halves(node)
        if state.sizes is None:
            ones = build(aten.ones_like.default, build(aten.slice.Tensor, node, 2, 0, 1))
            state = replace(state, sizes=ones)
        assert state.sizes is not None
        weight, more = halves(state.sizes)
        total = build(aten.add.Tensor, more, build(aten.matmul.default, into, weight))
        sums = build(
            aten.add.Tensor,
            build(aten.mul.Tensor, other, more),
            build(aten.matmul.default, into, build(aten.mul.Tensor, one, weight)),
        )
        mean = build(aten.div.Tensor, sums, total)
        parts = [
            [build(aten.matmul.default, kept, v), m] for v, m in ((weight, total), (one, mean))
        ]
        if leading:
            for part, value in zip(parts, (state.sizes, node), strict=True):
                part.insert(0, build.part(value, 0, leading))
        sizes, result = (build(aten.cat.default, part, 1) for part in parts)
        merges = (*state.merges, _Merge(kept.name, into.name, leading, first, second))
        state = _State(merges, sizes, state.count - gone)
        self.by_name |= {kept.name: kept, into.name: into}
        result.meta[_MERGES] = _Fewer(merges, batch=0, tokens=1, rank=3)
        # For dimensions the merged tokens are those that they were.
        self.axes[result.name] = self.axes[node.name]
        self.states[result] = state
        for user in users:
            user.replace_input_with(node, result)
        return state

    def choice(
        self, build: _Builder, one: Node, other: Node, first: int, gone: int
    ) -> tuple[Node, Node]:
        """Return what stays of the first half, and what goes where; see _Merge."""
        scores = build(aten.matmul.default, one, build(aten.transpose.int, other, 1, 2))
        best = build(aten.amax.default, scores, [-1])
        column, row = build(aten.unsqueeze.default, best, 2), build(aten.unsqueeze.default, best, 1)
        number = build.numbered(best)
        across, down = (build(aten.unsqueeze.default, number, axis) for axis in (1, 2))
        # The rank of each by its best score; of equals the first comes first.
        ahead = build(
            aten.logical_or.default,
            build(aten.gt.Tensor, row, column),
            build(
                aten.logical_and.default,
                build(aten.eq.Tensor, row, column),
                build(aten.lt.Tensor, across, down),
            ),
        )
        rank = build(aten.sum.dim_IntList, build.chosen(ahead, row), [-1])
        stays = build.part(number, gone)  # the ranks from `gone` on, counted from 1
        wanted = build(aten.sub.Scalar, build(aten.unsqueeze.default, stays, 2), 1.0)
        places = build(aten.unsqueeze.default, rank, 1)
        kept = build.chosen(build(aten.eq.Tensor, places, wanted), row)
        near = build(aten.argmax.default, scores, -1, True)
        nearest = build(aten._to_copy.default, near)
        nearest.kwargs = {"dtype": torch.float32}
        columns = build.numbered(build(aten.select.int, scores, 1, 0))
        target = build(aten.sub.Scalar, build(aten.unsqueeze.default, columns, 1), 1.0)
        goes = build(
            aten.logical_and.default,
            build(aten.eq.Tensor, nearest, target),
            build(aten.lt.Scalar, build(aten.unsqueeze.default, rank, 2), float(gone)),
        )
        into = build(aten.transpose.int, build.chosen(goes, column), 1, 2)
        return kept, into

    def mask(self, state: _State) -> Node:
        """[b, 1, 1, tokens]: the logarithm of how many tokens each stands for."""
        if state.mask is None:
            assert state.sizes is not None
            build = _Builder(self.graph, state.sizes.next, f"{state.sizes.name}_mask")
            row = build(aten.transpose.int, build(aten.log.default, state.sizes), 1, 2)
            state.mask = build(aten.unsqueeze.default, row, 1)
        return state.mask


def _likeness(build: _Builder, key: Node) -> Node:
    """[b, tokens, head size]: keys averaged over the heads, of length one."""
    mean = build(aten.mean.dim, key, [1])
    squares = build(aten.sum.dim_IntList, build(aten.mul.Tensor, mean, mean), [-1], True)
    length = build(aten.rsqrt.default, build(aten.add.Scalar, squares, 1e-12))
    return build(aten.mul.Tensor, mean, length)


def _unmerged(build: _Builder, node: Node, fewer: _Fewer, by_name: dict[str, Node]) -> Node:
    """All tokens again, each with the value of what it was merged into; axes stay in their order.

    Raises ValueError where the batch shares its axis with something else.
    """
    if fewer.batch is None:
        raise ValueError(f"{node.name} has no axis of its own for the batch beside its tokens")
    others = [at for at in range(fewer.rank) if at not in (fewer.batch, fewer.tokens)]
    # Tokens last but one, whatever is in front of them: products with matrices are over the last.
    order = [fewer.batch, *others[:-1], fewer.tokens, *others[-1:]]
    moved = order != sorted(order)
    if moved:
        node = build(aten.permute.default, node, order)
    if not others:
        node = build(aten.unsqueeze.default, node, 2)
    axis = max(fewer.rank, 3) - 2
    for merge in reversed(fewer.merges):
        kept, into = (
            build(aten.transpose.int, by_name[name], 1, 2) for name in (merge.kept, merge.into)
        )
        for _ in range(axis - 1):
            kept, into = (build(aten.unsqueeze.default, one, 1) for one in (kept, into))
        middle = build.part(node, merge.leading, -merge.second, axis=axis)
        other = build.part(node, -merge.second, axis=axis)
        one = build(
            aten.add.Tensor,
            build(aten.matmul.default, kept, middle),
            build(aten.matmul.default, into, other),
        )
        # In turn, one of the first half and one of the second; the first may have one more.
        first = build.part(one, 0, merge.second, axis=axis)
        pairs = build(aten.stack.default, [first, other], axis + 1)
        parts = [build(aten.flatten.using_ints, pairs, axis, axis + 1)]
        if merge.first > merge.second:
            parts.append(build.part(one, merge.second, axis=axis))
        if merge.leading:
            parts.insert(0, build.part(node, 0, merge.leading, axis=axis))
        node = build(aten.cat.default, parts, axis)
    if not others:
        node = build(aten.select.int, node, 2, 0)
    if moved:
        node = build(aten.permute.default, node, [order.index(at) for at in range(fewer.rank)])
    return node
