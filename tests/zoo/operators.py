"""Networks of one operator each, for `python tests/zoo --operators`: what libraries' seldom have.

A network is a stem, the operator between layers of its own, two residual blocks and a head, made by
`operators.py:NAME` as a user's file makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as users have it

CHANNELS = 16
SIZE_PIXELS = 32

Maps = Callable[[Any, Tensor], Tensor]
Layers = Mapping[str, Callable[[], nn.Module]]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(CHANNELS, 2 * CHANNELS, 1)
        self.norm = nn.BatchNorm2d(2 * CHANNELS)
        self.narrow = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        sums: Tensor = x + self.narrow(F.relu(self.norm(self.wide(x))))
        return sums


class Net(nn.Module):
    """maps: [batch, 16, 16, 16] to maps of 16 channels, with the layers as attributes."""

    def __init__(self, maps: Maps, layers: Layers) -> None:
        super().__init__()
        self.maps = maps
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        for name, make in layers.items():
            self.add_module(name, make())
        self.first, self.second = Residual(), Residual()
        self.fc = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(self, F.relu(self.stem(x)))
        logits: Tensor = self.fc(self.second(self.first(x)).mean((2, 3)))
        return logits


class Weight(nn.Module):
    """A parameter of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(0.3 * torch.randn(*shape))


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, size: int = 1, **options: Any) -> Any:
    """A convolution to make, its maps as large as before unless told otherwise."""
    options.setdefault("padding", size // 2)
    return lambda: nn.Conv2d(inputs, outputs, size, **options)


def attended(net: Any, x: Tensor) -> Tensor:
    queries, keys, values = (part.flatten(2) for part in net.a(x).chunk(3, 1))
    weights = torch.softmax(queries.transpose(1, 2) @ keys / 4, -1)
    result: Tensor = (weights @ values.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    return result


def tokens(net: Any, x: Tensor) -> Tensor:
    sequence = x.flatten(2).transpose(1, 2)
    attention, _ = net.a(sequence, sequence, sequence, need_weights=False)
    result: Tensor = attention.transpose(1, 2).reshape(x.shape)
    return result


def gated_parts(net: Any, x: Tensor) -> Tensor:
    one, gate, more = net.a(x).chunk(3, 1)
    result: Tensor = one * torch.sigmoid(gate) + more
    return result


def mixed_kernels(net: Any, x: Tensor) -> Tensor:
    shares = torch.softmax(net.a(x.mean((2, 3))), 1)
    first = shares[:, 0, None, None, None] * net.b(x)
    result: Tensor = first + shares[:, 1, None, None, None] * net.c(x)
    return result


def rows(net: Any, x: Tensor) -> Tensor:
    states: Tensor = net.a(x.mean(3).transpose(1, 2))[0]
    return states.transpose(1, 2)[..., None].expand(-1, -1, -1, 4)


def involution(net: Any, x: Tensor) -> Tensor:
    windows = F.unfold(x, 3, padding=1).unflatten(1, (CHANNELS, 9))
    result: Tensor = (windows * net.a(x).flatten(2)[:, None]).sum(2).unflatten(2, x.shape[2:])
    return result


def frequencies(net: Any, x: Tensor) -> Tensor:
    filtered = torch.fft.rfft2(net.a(x), norm="ortho") * torch.view_as_complex(net.w.value)
    result: Tensor = torch.fft.irfft2(filtered, s=x.shape[-2:], norm="ortho")
    return result


def masked(net: Any, x: Tensor) -> Tensor:
    weights = torch.softmax(net.a(x).flatten(2).transpose(1, 2) @ x.flatten(2), -1)
    sums: Tensor = torch.tril(weights) @ x.flatten(2).transpose(1, 2)
    return sums.transpose(1, 2).reshape(x.shape)


def warped(net: Any, x: Tensor) -> Tensor:
    turn = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.05]]).expand(x.shape[0], 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(net.a(x), grid, align_corners=False)


def transformed(net: Any, x: Tensor) -> Tensor:
    """A spatial transformer (Jaderberg et al., NeurIPS 2015)."""
    turn = net.b(F.relu(net.a(x)).mean((2, 3))) + torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    grid = F.affine_grid(turn.unflatten(1, (2, 3)), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def halo(net: Any, x: Tensor) -> Tensor:
    """Each block attends to itself and a border (Vaswani et al., CVPR 2021)."""
    padded = F.pad(net.a(x), [1, 1, 1, 1])
    windows = padded.unfold(2, 6, 4).unfold(3, 6, 4).flatten(4)
    inner = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    weights = torch.softmax(torch.einsum("bchwq,bchwk->bhwqk", inner, windows) / 4, -1)
    result: Tensor = torch.einsum("bhwqk,bchwk->bchwq", weights, windows).flatten(2)
    return result[..., None]


def overwritten(net: Any, x: Tensor) -> Tensor:
    """Parts of a tensor are overwritten, as where channels move in time."""
    moved = net.a(x).clone()
    moved[:, :4, :, 1:] = x[:, :4, :, :-1]
    moved[:, [4, 5]] = x[:, [7, 6]] * 0.5
    return torch.as_tensor(moved)


def assigned(net: Any, x: Tensor) -> Tensor:
    """Soft assignment by distance (Arandjelović et al., CVPR 2016)."""
    points = net.a(x).flatten(2).transpose(1, 2)
    centres = net.w.value
    weights = torch.softmax(-torch.cdist(points, centres.expand(x.shape[0], -1, -1)), -1)
    result: Tensor = (weights @ centres).transpose(1, 2).unflatten(2, x.shape[2:])
    return result


def rooted(net: Any, x: Tensor) -> Tensor:
    """The square root of a covariance, by Newton and Schulz (Li et al., CVPR 2018)."""
    maps = net.a(x).flatten(2)
    maps = maps - maps.mean(2, keepdim=True)
    y = torch.bmm(maps, maps.transpose(1, 2)) / 256 + 0.1 * torch.eye(CHANNELS)
    trace = y.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y, z = y / trace, torch.eye(CHANNELS).expand_as(y)
    for _ in range(3):
        half = 0.5 * (3 * torch.eye(CHANNELS) - z @ y)
        y, z = y @ half, half @ z
    return (y * trace.sqrt())[..., None]


def plain(function: Callable[[Tensor], Tensor], **layer: Any) -> tuple[Maps, Layers]:
    """The function of what a convolution makes."""
    return lambda net, x: function(net.a(x)), {"a": conv(**layer)}


def layer(make: Callable[[], nn.Module]) -> tuple[Maps, Layers]:
    return lambda net, x: net.b(net.a(x)), {"a": conv(), "b": make}


OPERATORS: dict[str, tuple[Maps, Layers]] = {
    "attention": (attended, {"a": conv(outputs=48)}),
    "average_pool_to_the_ceiling": plain(
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
    ),
    "adaptive_average_of_three": plain(lambda x: F.adaptive_avg_pool2d(x, 3)),
    "adaptive_maximum": plain(lambda x: F.adaptive_max_pool2d(x, 4)),
    "bilinear": (
        lambda net, x: net.a(F.interpolate(x, scale_factor=2, mode="bilinear")),
        {"a": conv(size=3, stride=2)},
    ),
    "celu_selu_elu": plain(lambda x: F.celu(F.selu(F.elu(x)))),
    "chunk": (gated_parts, {"a": conv(outputs=48)}),
    "clamp_of_two_types": plain(lambda x: x.clamp(-0.5, 1).abs().add(1e-3).sqrt().log()),
    "circular": (
        lambda net, x: net.a(x),
        {"a": conv(size=3, padding=1, padding_mode="circular")},
    ),
    "conv3d": (
        lambda net, x: net.a(x.unflatten(1, (4, 4))).flatten(1, 2),
        {"a": lambda: nn.Conv3d(4, 4, 3, padding=1)},
    ),
    "cumsum": plain(lambda x: x.cumsum(2) * 0.1),
    "dilated": plain(lambda x: x, size=3, dilation=2, padding=2),
    "dynamic_kernels": (
        mixed_kernels,
        {"a": lambda: nn.Linear(CHANNELS, 2), "b": conv(size=3), "c": conv(size=3)},
    ),
    "efficient_channel_attention": (
        lambda net, x: x * torch.sigmoid(net.a(x.mean((2, 3))[:, None])).transpose(1, 2)[..., None],
        {"a": lambda: nn.Conv1d(1, 1, 3, padding=1)},
    ),
    "einsum": (
        lambda net, x: torch.einsum("bchw,oc->bohw", x, net.w.value),
        {"w": lambda: Weight(CHANNELS, CHANNELS)},
    ),
    "filter_of_frequencies": (frequencies, {"a": conv(), "w": lambda: Weight(CHANNELS, 16, 9, 2)}),
    "gated": plain(lambda x: F.glu(x, 1), outputs=32),
    "generalised_mean": plain(lambda x: F.avg_pool2d(x.clamp(min=1e-3).pow(3.0), 2).pow(1 / 3)),
    "group_norm": layer(lambda: nn.GroupNorm(4, CHANNELS)),
    "grouped": plain(lambda x: x, size=3, groups=4),
    "gru": (rows, {"a": lambda: nn.GRU(CHANNELS, CHANNELS, batch_first=True)}),
    "instance_norm": layer(lambda: nn.InstanceNorm2d(CHANNELS, affine=True)),
    "kernels_by_position": (involution, {"a": conv(outputs=9)}),
    "length_one": plain(lambda x: F.normalize(x, dim=1)),
    "local_response_norm": layer(lambda: nn.LocalResponseNorm(3)),
    "log_sigmoid": plain(F.logsigmoid),
    "lp_pool": plain(lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2)),
    "lstm": (rows, {"a": lambda: nn.LSTM(CHANNELS, CHANNELS, batch_first=True)}),
    "masked_attention": (masked, {"a": conv()}),
    "maxima_and_means": (
        lambda net, x: x * net.a(torch.cat([x.amax(1, True), x.mean(1, True), x.amin(1, True)], 1)),
        {"a": conv(3, 1, 7)},
    ),
    "maximum_pool": plain(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "mish": plain(F.mish),
    "multi_head_attention": (
        tokens,
        {"a": lambda: nn.MultiheadAttention(CHANNELS, 2, batch_first=True)},
    ),
    "nearest": (
        lambda net, x: net.a(F.interpolate(x, scale_factor=2, mode="nearest")),
        {"a": conv(size=3, stride=2)},
    ),
    "permuted_channels": plain(lambda x: x.index_select(1, torch.arange(CHANNELS).flip(0))),
    "pixel_shuffle": (
        lambda net, x: net.b(F.pixel_shuffle(net.a(x), 2)),
        {"a": conv(outputs=64), "b": conv(size=3, stride=2)},
    ),
    "prelu": layer(lambda: nn.PReLU(CHANNELS)),
    "reflected": (
        lambda net, x: net.a(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        {"a": conv(size=3, padding=0)},
    ),
    "replicated": (
        lambda net, x: net.a(F.pad(x, (1, 1, 1, 1), mode="replicate")),
        {"a": conv(size=3, padding=0)},
    ),
    "rms_norm": (
        lambda net, x: net.b(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        {"a": conv(), "b": lambda: nn.RMSNorm(CHANNELS)},
    ),
    "rolled": plain(lambda x: torch.roll(x, (1, 2), (2, 3)), size=3),
    "same_padding": plain(lambda x: x, size=4, padding="same"),
    "softmin": plain(lambda x: F.softmin(x, 1) * CHANNELS),
    "softsign_and_tanhshrink": plain(lambda x: F.softsign(F.tanhshrink(x))),
    "spectral_norm": (
        lambda net, x: net.a(x),
        {"a": lambda: nn.utils.parametrizations.spectral_norm(conv(size=3)())},
    ),
    "split": plain(
        lambda x: torch.cat([part.relu() for part in x.split([4, 8, 4], 1)], 1),
    ),
    "squeeze_and_excite": (
        lambda net, x: x * torch.sigmoid(net.b(F.relu(net.a(x.mean((2, 3), keepdim=True))))),
        {"a": conv(outputs=4), "b": conv(4)},
    ),
    "top_values": plain(
        lambda x: x * torch.sigmoid(x.flatten(1).topk(4, 1).values.mean(1))[:, None, None, None]
    ),
    "transposed": (
        lambda net, x: net.b(F.relu(net.a(x))),
        {
            "a": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, 2, 1, output_padding=1),
            "b": conv(size=3, stride=2),
        },
    ),
    "two_resolutions": (
        lambda net, x: net.a(x) + F.interpolate(net.b(F.avg_pool2d(x, 2)), scale_factor=2),
        {"a": conv(size=3), "b": conv(size=3)},
    ),
    "variance": plain(lambda x: x * (x.var(1, keepdim=True) + 1e-3).rsqrt()),
    "grid_sample": (warped, {"a": conv()}),
    "weight_norm": (
        lambda net, x: net.a(x),
        {"a": lambda: nn.utils.parametrizations.weight_norm(conv(size=3)())},
    ),
    "bilinear_layer": (
        lambda net, x: net.a(*2 * [x.permute(0, 2, 3, 1)]).permute(0, 3, 1, 2),
        {"a": lambda: nn.Bilinear(CHANNELS, CHANNELS, CHANNELS)},
    ),
    "bilinear_pooling": plain(
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x).div(256).abs().add(0.01).sqrt()[..., None]
    ),
    "bicubic": plain(lambda x: F.interpolate(x, scale_factor=0.75, mode="bicubic")),
    "bicubic_antialiased": plain(
        lambda x: F.interpolate(x, (9, 9), mode="bicubic", antialias=True)
    ),
    "centred_crop_and_borders": plain(
        lambda x: F.pad(F.pad(x, (2, -3, -1, 2)), (1, 1, 0, 0), value=0.5)
    ),
    "clusters": (assigned, {"a": conv(), "w": lambda: Weight(1, 8, CHANNELS)}),
    "copied_to_places": plain(
        lambda x: x.index_copy(1, torch.tensor([1, 5]), x[:, :2] * 2).index_fill(
            1, torch.tensor([3]), 0.5
        )
    ),
    "cosine_similarity": plain(lambda x: x * F.cosine_similarity(x, x.flip(1), dim=1)[:, None]),
    "cumulative_product": plain(lambda x: x.sigmoid().add(0.5).cumprod(1)),
    "diagonal": plain(lambda x: x.diagonal(dim1=2, dim2=3)[..., None]),
    "differences": plain(lambda x: x.diff(dim=3).diff(dim=2)),
    "distances": plain(lambda x: x * F.pairwise_distance(x, x.roll(1, 1))[:, None].tanh()),
    "gathered": plain(
        lambda x: x.flatten(2).gather(2, x.flatten(2).argsort(2)[:, :, ::16])[..., None]
    ),
    "grid_sample_of_cubics": (
        lambda net, x: F.grid_sample(
            net.a(x),
            0.9 * torch.tanh(net.b(x)).permute(0, 2, 3, 1),
            mode="bicubic",
            padding_mode="reflection",
            align_corners=True,
        ),
        {"a": conv(), "b": conv(outputs=2)},
    ),
    "halo_attention": (halo, {"a": conv()}),
    "kronecker_product": (
        lambda net, x: torch.kron(net.a(x), net.w.value),
        {"a": conv(), "w": lambda: Weight(1, 1, 2, 2)},
    ),
    "log_sum_exp": plain(lambda x: x * torch.sigmoid(x.logsumexp((2, 3), keepdim=True))),
    "masked_values": plain(
        lambda x: (
            x.masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf).softmax(3)
            + x.masked_fill(x > 1, 0.5)
        )
    ),
    "maximum_pool_in_3d": (
        lambda net, x: (
            F.max_pool3d(net.a(x.unflatten(1, (4, 4))), 2, 1)
            .flatten(1, 2)
            .repeat(1, 4, 1, 1)[:, :16]
        ),
        {"a": lambda: nn.Conv3d(4, 4, 3, padding=1)},
    ),
    "maximum_unpool": plain(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2])
    ),
    "median": plain(lambda x: x - x.median(1, keepdim=True).values),
    "outer_product": plain(
        lambda x: torch.einsum("bh,bw->bhw", x.mean((1, 3)), x.mean((1, 2)))[:, None] * x
    ),
    "positions": (
        lambda net, x: net.a(x) + net.b(torch.arange(256)).t().reshape(1, CHANNELS, 16, 16),
        {"a": conv(), "b": lambda: nn.Embedding(256, CHANNELS)},
    ),
    "recurrent": (rows, {"a": lambda: nn.RNN(CHANNELS, CHANNELS, batch_first=True)}),
    "repeated": plain(lambda x: x.repeat_interleave(2, 3)[..., 1:-1].rot90(1, (2, 3))),
    "scattered": plain(
        lambda x: x.scatter(1, x.argmin(1, keepdim=True), 0.5).index_add(
            1, torch.tensor([0, 0, 3]), x[:, :3]
        )
    ),
    "second_order": (rooted, {"a": conv()}),
    "shifted_channels": (overwritten, {"a": conv()}),
    "sorted": plain(lambda x: x.sort(1).values),
    "spatial_transformer": (
        transformed,
        {"a": conv(size=3), "b": lambda: nn.Linear(CHANNELS, 6)},
    ),
    "standard_deviation": plain(lambda x: x * x.std((2, 3), keepdim=True)),
    "sums_of_windows": plain(
        lambda x: F.fold(F.unfold(x, 4, stride=2) * 0.1, (16, 16), 4, stride=2)
    ),
    "taken_along": plain(
        lambda x: x.take_along_dim(x.argsort(1, descending=True)[:, ::2], 1).repeat(1, 2, 1, 1)
    ),
    "tensordot": (
        lambda net, x: torch.tensordot(x, net.w.value, ([1], [0])).movedim(-1, 1),
        {"w": lambda: Weight(CHANNELS, CHANNELS)},
    ),
    "transformer_layer": (
        lambda net, x: (
            net.a(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        ),
        {"a": lambda: nn.TransformerEncoderLayer(CHANNELS, 2, 32, batch_first=True)},
    ),
    "trilinear": plain(
        lambda x: F.interpolate(
            x.unflatten(1, (4, 4)), scale_factor=(1, 0.5, 0.5), mode="trilinear"
        ).flatten(1, 2)
    ),
    "where": (
        lambda net, x: torch.where(net.a(x) > 0, x, net.b(x)),
        {"a": conv(), "b": conv()},
    ),
    "windows": (
        lambda net, x: net.a(F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:])),
        {"a": conv(9 * CHANNELS)},
    ),
}


def __getattr__(name: str) -> Callable[[], nn.Module]:
    if name not in OPERATORS:
        raise AttributeError(name)
    return lambda: Net(*OPERATORS[name])
