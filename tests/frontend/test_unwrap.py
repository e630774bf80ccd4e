from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import ResidualNet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.frontend import models
from pbc.frontend.capture import capture
from pbc.frontend.unwrap import unwrapped

SPEC = InputSpec((3, 16, 16), models.IMAGENET_MEAN, models.IMAGENET_STD)


class Lightning(nn.Module):
    """A training loop's module: the network is `self.model`, there is no forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()


def inside(net: nn.Module) -> nn.Module:
    blocks = net.get_submodule("blocks")
    blocks.add_module("1", nn.DataParallel(blocks.get_submodule("1")))
    return net


def compiled(net: nn.Module) -> nn.Module:
    wrapper = torch.compile(net)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def in_place(net: nn.Module) -> nn.Module:
    net.compile()
    return net


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (torch.compile, "OptimizedModule"),
        (nn.DataParallel, "DataParallel"),
        (AveragedModel, "AveragedModel"),
        (Lightning, "Lightning"),
        (lambda net: nn.DataParallel(compiled(net)), "OptimizedModule"),
        (inside, "DataParallel"),
        (in_place, "torch.compile"),
    ],
)
def test_wrappers_are_taken_off_and_said(wrap: Callable[[nn.Module], nn.Module], kind: str) -> None:
    net, notes = unwrapped(wrap(ResidualNet()), "net")
    assert type(net) is ResidualNet
    assert [name for name, _ in net.named_parameters()] == [
        name for name, _ in ResidualNet().named_parameters()
    ]
    assert f"{kind} around net was taken off" in notes
    assert capture(net, (3, 16, 16)) is not None


@pytest.mark.parametrize("whole", [True, False])
def test_a_scripted_module_is_refused_by_name(whole: bool) -> None:
    traced = torch.jit.trace(ResidualNet().eval(), torch.zeros(2, 3, 16, 16))
    module = traced if whole else nn.Sequential(traced, nn.Linear(10, 4))
    where = "net" if whole else "net, its 0,"
    with pytest.raises(PbcError, match=f"{where} is a scripted or traced module"):
        unwrapped(module, "net")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_quantized_layer_is_refused_by_name() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    for module, where in ((dynamic, "net, its 0,"), (dynamic[0], "net")):
        with pytest.raises(PbcError, match=f"^{where} is a quantized Linear: .* in float32$"):
            unwrapped(module, "net")
    table = nn.Module()
    table.register_buffer("codes", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    with pytest.raises(PbcError, match="is a quantized Module"):
        unwrapped(table, "net")


def test_what_is_not_wrapped_stays() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.model = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.model(self.module(x).mean((2, 3)))
            return scores

    class Chosen(nn.Module):
        """Its forward is one of several, as that of a partial convolution of FasterNet."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)
            self.forward = self.forward_first

        def forward_first(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(x[:, :1]), x[:, 1:, 1:-1, 1:-1]], 1)

    for net in (Pair(), Chosen()):
        assert unwrapped(net, "net") == (net, ())


def test_lazy_layers_get_their_sizes() -> None:
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4)
    )
    source = models.given(net, "net", SPEC)
    assert source.head.parameters == {"3.weight": 8, "3.bias": 8}
    assert capture(source.module, (3, 16, 16)) is not None
