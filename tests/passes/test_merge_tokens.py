"""Tokens that are merged: against a plain writing of the method, and as levels on every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, analysed, split
from onnx_checks import assert_logits
from torch import Tensor, nn

from pbc.ir.dim_rules import dims_of
from pbc.ir.graph import shape_of
from pbc.ir.levels import LevelPlan
from pbc.ir.program import Program
from pbc.lower.backend import backend
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.merge_tokens import MergeTokens
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.proxies.fidelity import UpToInterface
from pbc.proxies.resolution import macs
from pbc.proxies.tokens import cut_unmerged, tokens_of
from pbc.testing import (
    assert_gradients,
    assert_unchanged,
    gradients,
    run_passes,
    with_request,
)


class Block(nn.Module):
    """Attention and an MLP, each beside what goes around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x


class TokenNet(nn.Module):
    """A class token and 16 of the image, three blocks; the class token is classified."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class TorchBlock(Block):
    """With the attention of torch's own modules: tokens first, then all of all images in a row."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).transpose(0, 1)
        weights = (self.qkv.weight, self.qkv.bias, None, None, False, 0.0)
        y, _ = nn.functional.multi_head_attention_forward(
            y, y, y, y.shape[2], self.heads, *weights, self.proj.weight, self.proj.bias,
            training=False, need_weights=False,
        )  # fmt: skip
        x = x + y.transpose(0, 1)
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x


class WrittenBlock(Block):
    """With an attention that is written out, as in many networks of one file."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x


class WrittenTokenNet(TokenNet):
    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth=depth)
        self.blocks = nn.Sequential(*[WrittenBlock(16, 2) for _ in range(depth)])


class OneWrittenBlock(WrittenTokenNet):
    def __init__(self) -> None:
        super().__init__(depth=1)


class TorchTokenNet(TokenNet):
    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth=depth)
        self.blocks = nn.Sequential(*[TorchBlock(16, 2) for _ in range(depth)])


class OneTorchBlock(TorchTokenNet):
    def __init__(self) -> None:
        super().__init__(depth=1)


class OneBlock(TokenNet):
    """The same with one block, which is compiled sooner."""

    def __init__(self) -> None:
        super().__init__(depth=1)


def plainly(net: TokenNet, x: Tensor, merges: Sequence[int]) -> Tensor:
    """The same network with tokens merged, one image and one token at a time."""
    rows = []
    for image in x:
        t = net.patch(image[None]).flatten(2).transpose(1, 2)
        t = (torch.cat([net.cls, t], 1) + net.position)[0]
        sizes = torch.ones(len(t))
        for block, gone in zip(net.blocks, merges, strict=True):
            assert isinstance(block, Block)
            qkv = block.qkv(block.norm1(t)).reshape(len(t), 3, block.heads, -1)
            q, k, v = qkv.permute(1, 2, 0, 3)
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + sizes.log()
            y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(t), -1)
            t = t + block.proj(y)
            t, sizes = merged_one_by_one(t, sizes, k.mean(0), gone)
            t = t + block.down(nn.functional.gelu(block.up(block.norm2(t))))
        rows.append(net.head(net.norm(t)[0]))
    return torch.stack(rows)


def merged_one_by_one(t: Tensor, sizes: Tensor, key: Tensor, gone: int) -> tuple[Tensor, Tensor]:
    key = key / key.norm(dim=-1, keepdim=True)
    first, second = range(1, len(t), 2), list(range(2, len(t), 2))
    likeness = {i: max((float(key[i] @ key[j]), j) for j in second) for i in first}
    order = sorted(first, key=lambda i: -likeness[i][0])
    sums, counts = t * sizes[:, None], sizes.clone()
    for i in order[:gone]:
        j = likeness[i][1]
        sums[j] = sums[j] + t[i] * sizes[i]
        counts[j] = counts[j] + sizes[i]
    stay = [0, *order[gone:], *second]
    return (sums / counts[:, None])[stay], counts[stay]


class Pooled(TokenNet):
    """Tokens are averaged, in one of the layouts that networks have them in."""

    def __init__(self, layout: str) -> None:
        super().__init__(depth=2)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.norm(self.blocks(x))
        if self.layout == "channels first":  # as for a pool in one dimension
            x = torch.amax(x.transpose(1, 2), -1)
        elif self.layout == "tokens first":  # as torch's own attention has them
            x = torch.amax(x.transpose(0, 1), 0)
        elif self.layout == "heads first":
            x = torch.amax(x.unflatten(2, (2, 8)).transpose(1, 2), 2).flatten(1)
        elif self.layout == "no channels":
            x = x[:, 0] * torch.amax(x.mean(2), 1, keepdim=True)
        else:
            x = x[:, 0] * torch.amax(x.mean(2, keepdim=True), 1)
        logits: Tensor = self.head(x)
        return logits


class Mixing(TokenNet):
    """The tokens are also mixed by a layer over them, or normed all together."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.mix = nn.Linear(17, 17)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.blocks(x)
        x = nn.functional.layer_norm(x, x.shape[1:])
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.head(x[:, 0])
        return logits


class NormedQueries(TokenNet):
    """Queries are normed, head by head: a layer that trains reads tokens behind the heads."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        for block in self.blocks:
            block.register_module("query_norm", nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = block.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(
                block.get_submodule("query_norm")(q), k, v
            )
            x = x + block.proj(y.transpose(1, 2).flatten(2))
        logits: Tensor = self.head(x[:, 0])
        return logits


def merged(kind: Kind, strategy: str, *merges: int) -> Program:
    """Level 1 merges tokens, as a plan that a pass made would have it."""
    program = analysed(kind, strategy)
    plan = LevelPlan({}, 0.8, 1.0, merges=merges)
    return run_passes(replace(program, plans=(plan,)), PruneDims(), MergeTokens())


@pytest.mark.parametrize("kind", [TokenNet, TorchTokenNet, WrittenTokenNet])
@pytest.mark.parametrize("merges", [(1, 0, 0), (5, 3, 0), (7, 4, 2)])
def test_it_is_the_method_as_published(kind: type[TokenNet], merges: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    program = merged(lambda: net, "linear-probe", *merges)
    images = program.network.example
    with torch.no_grad():
        features = program.levels[1].features(images)["feature_0"]
        found = net.head(features)
        assert torch.allclose(found, plainly(net, images, merges), atol=1e-5)
        assert not torch.allclose(found, net(images), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "strategy", "role"),
    [
        (TokenNet, "linear-probe", "prefix"),
        (TokenNet, "last-k:1", "prefix"),
        (TokenNet, "adapters:3", "body"),
        (TokenNet, "norm", "body"),
        (AttentionNet, "bias", "body"),
    ],
)
def test_tokens_are_merged_where_most_attentions_are(kind: Kind, strategy: str, role: str) -> None:
    program = split(kind, strategy)
    tokens = tokens_of(program.levels[0], dims_of(program))
    assert tokens is not None
    assert str(tokens.role) == role
    assert tokens.leading == (kind is TokenNet)
    schedule = tokens.schedule(1 / 8)
    assert schedule[0] == round(tokens.count / 8)
    assert list(schedule) == sorted(schedule, reverse=True)


def test_a_graph_returns_all_tokens_again() -> None:
    program = merged(TokenNet, "last-k:1", 5, 3)
    (level0, level1) = program.levels
    images = program.network.example
    assert level1.prefix is not None
    with torch.no_grad():
        (sent,), (original,) = level1.prefix(images), level0.features(images).values()
    assert sent.shape == original.shape
    distinct = [len(np.unique(np.round(one.numpy(), 5), axis=0)) for one in sent]
    assert distinct == [17 - 8] * len(images)
    assert level1.body is level0.body or str(level1.body.graph) == str(level0.body.graph)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        ("channels first", "tokens first"),
        ("channels first", "heads first"),
        ("no channels", "one channel"),
    ],
)
def test_all_tokens_are_there_again_in_any_layout(layout: str, other: str) -> None:
    def features(layout: str) -> Tensor:
        torch.manual_seed(0)
        net = Pooled(layout).eval()
        program = merged(lambda: net, "linear-probe", 5, 3)
        images = program.network.example
        with torch.no_grad():
            whole, found = (level.features(images)["feature_0"] for level in program.levels)
        assert not torch.allclose(found, whole, atol=1e-4)
        return found

    assert torch.allclose(features(layout), features(other), atol=1e-5)


def test_layers_over_tokens_read_all_of_them() -> None:
    program = merged(Mixing, "linear-probe", 5, 3)
    level0, level1 = program.levels
    images = program.network.example
    with torch.no_grad():
        sent, whole = level1.features(images)["feature_0"], level0.features(images)["feature_0"]
    assert sent.shape == whole.shape
    assert not torch.allclose(sent, whole, atol=1e-4)


def test_an_interface_behind_the_heads_has_all_tokens() -> None:
    program = merged(NormedQueries, "norm", 5, 0)
    images = program.network.example
    with torch.no_grad():
        wanted = UpToInterface(program, program.levels[0])(images)
        found = UpToInterface(program, program.levels[1])(images)
    assert [value.shape for value in found] == [value.shape for value in wanted]
    queries = [value for value in found if value.dim() == 4][-1]  # of the last block
    distinct = [len(np.unique(np.round(one[0].numpy(), 5), axis=0)) for one in queries]
    assert distinct == [17 - 5] * len(images)


def test_attention_in_any_writing_runs_on_fewer_tokens_throughout() -> None:
    by_hand, torch_s, written = (
        macs(merged(kind, "norm", 7, 4, 2).levels[1].body)
        for kind in (TokenNet, TorchTokenNet, WrittenTokenNet)
    )
    assert torch_s == pytest.approx(by_hand)
    # Of an operator for all of it torch counts no products of queries and keys, or with values.
    assert written == pytest.approx(by_hand + 2 * 16 * (17**2 + 10**2 + 6**2))


def test_what_trains_in_blocks_sees_fewer_tokens() -> None:
    program = merged(TokenNet, "adapters:3", 5, 3)
    nodes = program.levels[1].body.graph.nodes
    shapes = [shape_of(node) for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    assert {17, 12, 9} <= {shape[1] for shape in shapes if len(shape) == 3 and shape[2] == 16}
    interface = UpToInterface(program, program.levels[1])
    images = program.network.example
    with torch.no_grad():
        wanted = [value.shape for value in UpToInterface(program, program.levels[0])(images)]
        assert [value.shape for value in interface(images)] == wanted


def test_the_original_and_its_gradients_stay() -> None:
    program = analysed(TokenNet, "norm")
    plan = LevelPlan({}, 0.8, 1.0, merges=(5, 3, 0))
    before = run_passes(replace(program, plans=(plan,)), PruneDims())
    after = assert_unchanged(MergeTokens(), before)
    assert_gradients(
        gradients(replace(after, levels=after.levels[:1])),
        gradients(replace(before, levels=before.levels[:1])),
    )


def test_equal_tokens_lose_nothing() -> None:
    program = merged(TokenNet, "linear-probe", 6, 4, 0)
    level = program.levels[1]
    for tensor in ("position", "patch.weight"):  # all of the image's tokens are one
        for one in program.levels:
            assert one.prefix is not None
            dict(one.prefix.named_parameters())[tensor].data.mul_(0)
    images = program.network.example
    with torch.no_grad():
        wanted = program.levels[0].features(images)["feature_0"]
        assert torch.allclose(level.features(images)["feature_0"], wanted, atol=1e-5)


def test_a_network_without_tokens_stays() -> None:
    program = split(ConvNet, "linear-probe")
    assert tokens_of(program.levels[0], dims_of(program)) is None
    after = assert_unchanged(MergeTokens(), program)
    assert after.text() == program.text()
    node = next(n.name for n in program.levels[0].frozen[0].graph.nodes if n.op == "call_function")
    assert cut_unmerged(program.levels[0].frozen[0], [node])


def test_strategies_without_a_prefix_get_levels() -> None:
    program = analysed(TokenNet, "norm")
    elsewhere = replace(program.request.target, local=False)
    program = replace(program, request=replace(program.request, target=elsewhere))
    planned = run_passes(program, PlanLevels(levels=2, axes=("tokens",)))
    merges = [plan.merges for plan in planned.plans]
    assert all(any(plan) for plan in merges)
    assert [sum(plan) for plan in merges] == sorted(sum(plan) for plan in merges)
    assert all(0.4 < plan.cost < 1 for plan in planned.plans)
    assert not any("nothing to prune" in note for note in planned.notes)


@pytest.mark.parametrize("kind", [OneBlock, OneTorchBlock, OneWrittenBlock])
@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime", "tvm"])
def test_every_engine_takes_merged_graphs(engine: str, kind: Kind) -> None:
    program = with_request(merged(kind, "norm", 5), engine=engine)
    graphs = {role.at(1): graph for role, graph in program.levels[1].graphs.items()}
    backend(engine).lowering().try_graphs(program, graphs)


@pytest.mark.parametrize("kind", [OneBlock, OneTorchBlock, OneWrittenBlock])
def test_onnxruntime_computes_the_same(kind: Kind) -> None:
    assert_logits(merged(kind, "norm", 5), 1, 1e-5)


@pytest.mark.parametrize("kind", [OneBlock, OneTorchBlock, OneWrittenBlock])
def test_the_derived_step_is_torch_s(kind: Kind) -> None:
    program = with_request(merged(kind, "norm", 5), engine="onnxruntime")
    derived = run_passes(program, DeriveTrainStep())
    assert max(derived.checks["train_step"]["1"].values()) < 1e-4
