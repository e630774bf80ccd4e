from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.frontend import head, models
from pbc.frontend.trace import trace
from pbc.ir.program import Head

SPEC = InputSpec((3, 8, 8), models.IMAGENET_MEAN, models.IMAGENET_STD)


Scores = Callable[[Any, Tensor], object]


class Net(nn.Module):
    """Eight pooled features and whatever head a test gives."""

    def __init__(self, scores: Scores, **layers: nn.Module) -> None:
        super().__init__()
        self.scores = scores
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.stem = nn.Conv2d(3, 8, 3)

    def maps(self, x: Tensor) -> Tensor:
        return functional.relu(self.stem(x))

    def forward(self, x: Tensor) -> object:
        return self.scores(self, self.maps(x))


def pool(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def found(net: nn.Module) -> head.Found | head.Missing:
    return head.find(trace(net, torch.randn(2, 3, 8, 8)))


def linear(**options: bool) -> nn.Linear:
    return nn.Linear(8, 4, **options)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 4, 1)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "made early": (lambda: Net(lambda n, x: n.a(pool(x)), a=linear()), ["a.weight", "a.bias"]),
    "no bias": (lambda: Net(lambda n, x: n.a(pool(x)), a=linear(bias=False)), ["a.weight"]),
    "in a sequence": (
        lambda: Net(lambda n, x: n.a(pool(x)), a=nn.Sequential(nn.Dropout(), linear())),
        ["a.1.weight", "a.1.bias"],
    ),
    "two, averaged": (
        lambda: Net(lambda n, x: (n.a(pool(x)) + n.b(pool(x))) / 2, a=linear(), b=linear()),
        ["a.weight", "a.bias", "b.weight", "b.bias"],
    ),
    "two, stacked": (
        lambda: Net(
            lambda n, x: torch.stack([n.a(pool(x)), n.b(x.amax((2, 3)))]).mean(0),
            a=linear(),
            b=linear(),
        ),
        ["a.weight", "a.bias", "b.weight", "b.bias"],
    ),
    "a convolution after pooling": (
        lambda: Net(lambda n, x: n.a(x.mean((2, 3), True)).flatten(1), a=nn.Conv2d(8, 4, 1)),
        ["a.weight", "a.bias"],
    ),
    "a convolution before pooling": (
        lambda: Net(lambda n, x: pool(functional.relu(n.a(x))), a=nn.Conv2d(8, 4, 1)),
        ["a.weight", "a.bias"],
    ),
    "tokens, then pooled": (
        lambda: Net(lambda n, x: n.a(x.flatten(2).transpose(1, 2)).mean(1), a=linear()),
        ["a.weight", "a.bias"],
    ),
    "cosine": (
        lambda: Net(
            lambda n, x: (
                16 * functional.linear(functional.normalize(pool(x)), functional.normalize(n.w))
            ),
        ),
        ["w"],
    ),
    "einsum": (lambda: Net(lambda n, x: torch.einsum("bchw,kc->bk", x, n.w)), ["w"]),
    "einsum of the weight first": (
        lambda: Net(lambda n, x: torch.einsum("kc,bc->bk", n.w, pool(x))),
        ["w"],
    ),
    "a product from the left": (lambda: Net(lambda n, x: (n.w @ pool(x).T).T), ["w"]),
    "prototypes": (
        lambda: Net(lambda n, x: -(pool(x)[:, None] - n.w).square().sum(2).sqrt()),
        ["w"],
    ),
    "cosine similarity": (
        lambda: Net(lambda n, x: 8 * functional.cosine_similarity(pool(x)[:, None], n.w, 2)),
        ["w"],
    ),
    "a scale for each image": (
        lambda: Net(
            lambda n, x: (lambda y: y * x.amax((1, 2, 3))[:, None].expand_as(y))(n.a(pool(x))),
            a=linear(),
        ),
        ["a.weight", "a.bias"],
    ),
    "distances": (lambda: Net(lambda n, x: -torch.cdist(pool(x), n.w)), ["w"]),
    "an unused bias": (
        lambda: Net(lambda n, x: functional.linear(pool(x), n.a.weight), a=linear()),
        ["a.weight"],
    ),
    "weight_norm": (
        lambda: Net(lambda n, x: n.a(pool(x)), a=nn.utils.parametrizations.weight_norm(linear())),
        ["a.parametrizations.weight.original1", "a.parametrizations.weight.original0", "a.bias"],
    ),
    "a bias of its own": (
        lambda: Net(lambda n, x: n.a(pool(x)) + n.b.bias, a=linear(bias=False), b=linear()),
        ["a.weight", "b.bias"],
    ),
    "bounded by a tanh": (
        lambda: Net(lambda n, x: 30 * torch.tanh(n.a(pool(x)) / 30), a=linear()),
        ["a.weight", "a.bias"],
    ),
    "the mean of two heads' probabilities": (
        lambda: Net(
            lambda n, x: torch.log((n.a(pool(x)).softmax(1) + n.b(pool(x)).softmax(1)) / 2),
            a=linear(),
            b=linear(),
        ),
        ["a.weight", "a.bias", "b.weight", "b.bias"],
    ),
    "all but the largest masked": (
        lambda: Net(
            lambda n, x: (lambda y: y.masked_fill(y < y.amax(1, True), -9.0))(n.a(pool(x))),
            a=linear(),
        ),
        ["a.weight", "a.bias"],
    ),
    "scaled": (
        lambda: Net(lambda n, x: n.a(pool(x)) * 3 / torch.tensor(2.0), a=linear()),
        ["a.weight", "a.bias"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_head_is_found_resized_and_runs(case: str) -> None:
    build, names = CASES[case]
    net = build()
    if names == ["w"]:
        net.w = nn.Parameter(torch.randn(4, 8))
    got = found(net)
    assert isinstance(got, head.Found)
    assert (sorted(got.head.parameters), got.classes) == (sorted(names), 4)
    assert set(got.head.parameters.values()) == {8}
    head.resize(net, got.head, 7)
    with torch.no_grad():
        assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def experts(net: Any, maps: Tensor) -> Tensor:
    shares = net.gate(pool(maps)).softmax(1)[:, None]
    mixed: Tensor = shares @ torch.stack([net.a(pool(maps)), net.b(pool(maps))], 1)
    return mixed[:, 0]


def queried(net: Any, maps: Tensor) -> Tensor:
    """A query for each class, as in ML-Decoder (Ridnik et al., WACV 2023)."""
    positions = maps.flatten(2).transpose(1, 2)
    weights = (net.a.weight @ positions.transpose(1, 2)).softmax(2)
    scores: Tensor = ((weights @ positions) * net.b.weight).sum(2) + net.b.bias
    return scores


BY_GRADIENTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "the largest positions": (
        lambda: Net(lambda n, x: n.a(x).flatten(2).topk(3, 2).values.mean(2), a=nn.Conv2d(8, 4, 1)),
        ["a.weight", "a.bias"],
    ),
    "several centres for a class": (
        lambda: Net(lambda n, x: torch.einsum("bd,nkd->bnk", pool(x), n.w).amax(2)),
        ["w"],
    ),
    "a mixture of experts": (
        lambda: Net(experts, a=linear(), b=linear(), gate=nn.Linear(8, 2)),
        ["a.weight", "a.bias", "b.weight", "b.bias"],
    ),
    "a query for each class": (
        lambda: Net(queried, a=nn.Embedding(4, 8), b=linear()),
        ["a.weight", "b.weight", "b.bias"],
    ),
    "a product of two": (
        lambda: Net(lambda n, x: n.a(pool(x), x.amax((2, 3))), a=nn.Bilinear(8, 8, 4)),
        ["a.weight", "a.bias"],
    ),
}


@pytest.mark.parametrize("case", BY_GRADIENTS)
def test_a_head_that_no_rule_knows_is_what_moves_one_score_alone(case: str) -> None:
    build, names = BY_GRADIENTS[case]
    net = build()
    if names == ["w"]:
        net.w = nn.Parameter(torch.randn(4, 3, 8))
    source = models.given(net, "net", SPEC)
    assert sorted(source.head.parameters) == sorted(names)
    assert not source.notes
    head.resize(net, source.head, 7)
    with torch.no_grad():
        assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def test_what_torch_cannot_differentiate_has_no_head_by_gradients() -> None:
    """A reason that was known before stays the reason."""

    def scores(net: Any, maps: Tensor) -> Tensor:
        made: Tensor = torch.special.zeta(net.a(maps).sigmoid() + 1.5, 2.0)
        return made.flatten(2).topk(3, 2).values[..., 0]

    source = models.given(Net(scores, a=conv()), "net", SPEC)
    assert list(source.head.parameters) == ["head.weight", "head.bias"]
    assert "`topk`" in source.notes[0]


def test_scores_with_axes_of_one_entry_are_flattened() -> None:
    net = Net(lambda n, x: n.a(x.mean((2, 3), True)), a=nn.Conv2d(8, 4, 1))
    source = models.given(net, "net", SPEC)
    assert list(source.head.parameters) == ["a.weight", "a.bias"]
    with torch.no_grad():
        assert source.module(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_a_buffer_is_no_head_and_may_be_added_to_scores() -> None:
    net = Net(lambda n, x: n.a(pool(x)) + n.prior, a=linear())
    net.register_buffer("prior", torch.ones(4))
    assert list(models.given(net, "net", SPEC).head.parameters) == ["a.weight", "a.bias"]
    fixed = Net(lambda n, x: functional.linear(pool(x), n.w))
    fixed.register_buffer("w", torch.randn(4, 8))
    source = models.given(fixed, "net", SPEC)
    assert source.head == Head({"head.weight": 4, "head.bias": 4})
    assert "a weight that does not train" in source.notes[0]


def test_probabilities_are_said() -> None:
    for layer, words in ((nn.LogSoftmax(1), "no difference"), (nn.Softmax(1), "probabilities")):
        net = Net(lambda n, x: n.b(n.a(pool(x))), a=linear(), b=layer)
        got = found(net)
        assert isinstance(got, head.Found)
        assert words in got.notes[0]
    shares = Net(lambda n, x: (lambda y: y * y.softmax(2))(n.a(x).flatten(2)).sum(2), a=conv())
    got = found(shares)  # of positions, not of classes
    assert isinstance(got, head.Found)
    assert not got.notes


class ResidualMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.down(functional.gelu(self.up(x)))
        return total


MISSING: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "a residual MLP": (
        lambda: Net(lambda n, x: n.a(pool(x)), a=ResidualMlp()),
        "outputs come from a convolution over neighbouring positions in stem",
        8,
    ),
    "a residual MLP on a projection": (
        lambda: Net(lambda n, x: n.a(n.b(pool(x))), a=ResidualMlp(), b=nn.Linear(8, 8)),
        "outputs are a residual sum",
        8,
    ),
    "a norm": (
        lambda: Net(lambda n, x: n.a(pool(x)), a=nn.LayerNorm(8)),
        "outputs come from `native_layer_norm` in a",
        8,
    ),
    "activated features of a product": (
        lambda: Net(lambda n, x: functional.silu(n.a(pool(x))), a=linear()),
        "outputs come from `silu`",
        4,
    ),
    "activated features": (
        lambda: Net(lambda n, x: torch.relu(n.a(pool(x))), a=linear()),
        "outputs come from relu: features, not scores",
        4,
    ),
    "tokens": (lambda: Net(lambda n, x: x.flatten(2).transpose(1, 2)), r"puts out \[2, 36, 8\]", 8),
    "maps": (lambda: Net(lambda n, x: x), r"puts out \[2, 8, 6, 6\] for two images", 8),
    "last_hidden_state": (lambda: Net(lambda n, x: {"last_hidden_state": x}), "puts out", 8),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_backbone_gets_a_head_on_its_pooled_features(case: str) -> None:
    build, reason, width = MISSING[case]
    source = models.given(build(), "net", SPEC)
    assert source.head == Head({"head.weight": width, "head.bias": width})
    (note,) = source.notes
    assert re.search(rf"no classifier \(.*{reason}.*\): a linear head, head, was added", note)
    with torch.no_grad():
        assert source.module(torch.randn(2, 3, 8, 8)).shape == (2, head.OPEN_CLASSES)


def test_an_added_head_takes_a_free_name_and_is_captured() -> None:
    net = Net(lambda n, x: n.head(pool(x)), head=nn.LayerNorm(8))
    source = models.given(net, "net", SPEC)
    assert list(source.head.parameters) == ["added_head.weight", "added_head.bias"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Net(lambda n, x: n.a(n.a(pool(x))), a=nn.Linear(8, 8)),
            r"head's a\.bias is also read by `addmm` in a",
        ),
        (
            lambda: Net(lambda n, x: (pool(x), x)),
            r"no classifier .* \(it returns a tuple\), and puts out nothing to put one on",
        ),
        (
            lambda: Net(lambda n, x: {"low": x, "high": x.relu()}),
            r"it returns a dict with low, high\)",
        ),
        (
            lambda: Net(lambda n, x: (n.a(pool(x)), n.b(pool(x))), a=linear(), b=linear()),
            r"^Net returns class scores 2 times \(0, 1\); return those to train on",
        ),
    ],
)
def test_what_cannot_be_a_classifier_is_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(PbcError, match=message):
        models.given(build(), "net", SPEC)


def test_a_batch_norm_over_the_scores_is_of_the_head_and_its_statistics_count_classes() -> None:
    net = Net(lambda n, x: n.norm(n.a(pool(x))), a=linear(), norm=nn.BatchNorm1d(4)).eval()
    known = found(net)
    assert isinstance(known, head.Found)
    assert list(known.head.parameters) == ["norm.weight", "norm.bias", "a.weight", "a.bias"]


def test_a_head_shared_with_another_layer_is_refused() -> None:
    net = Net(
        lambda n, x: functional.linear(functional.linear(pool(x), n.a.weight).relu(), n.b.weight),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
    )
    net.get_submodule("b").weight = net.get_parameter("a.weight")
    with pytest.raises(PbcError, match=r"head's a\.weight is also read by `mm`"):
        models.given(net, "net", SPEC)


def test_a_tied_pair_of_heads_is_one() -> None:
    net = Net(lambda n, x: n.a(pool(x)) + n.b(pool(x)), a=linear(), b=linear())
    net.get_submodule("b").weight = net.get_parameter("a.weight")
    source = models.given(net, "net", SPEC)
    assert list(source.head.parameters) == ["a.weight", "a.bias", "b.bias"]
    head.resize(net, source.head, 6)
    assert net.get_parameter("b.weight") is net.get_parameter("a.weight")


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "mapping": (lambda y, x: {"logits": y, "hidden": x}, ""),
    "object": (lambda y, x: Output(y), ""),
    "tuple of one": (lambda y, x: (y,), ""),
    "with nothing else": (lambda y, x: {"out": y, "loss": None}, ""),
    "with features": (lambda y, x: (pool(x), y), "1 has the class scores; not used: 0"),
    "in structures": (lambda y, x: {"predictions": {"classes": [y]}, "loss": None}, ""),
    "with slots": (lambda y, x: Slots(y), ""),
    "by name": (lambda y, x: Named(x, y), "'y' has the class scores; not used: 'x'"),
}


@dataclasses.dataclass(slots=True)
class Slots:
    scores: Tensor


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_with_class_scores(case: str) -> None:
    wrap, note = STRUCTURES[case]
    net = Net(lambda n, x: wrap(n.a(pool(x)), x), a=linear())
    source = models.given(net, "net", SPEC)
    assert list(source.head.parameters) == ["a.weight", "a.bias"]
    assert note in "".join(source.notes)
    assert bool(note) == bool(source.notes)
    with torch.no_grad():
        assert source.module(torch.randn(2, 3, 8, 8)).shape == (2, 4)
