"""Channels that group lasso drives to zero leave the network, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import bench_net
import numpy as np
import pytest
import torch
from networks import settled
from torch import Tensor, nn

from pbc.bench.rival import RivalSetting
from pbc.bench.rivals.channel_groups import Channels
from pbc.bench.rivals.prunetrain import RATIO, THRESHOLD, PruneTrain
from pbc.data import ImageFolder
from pbc.frontend import original
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import labelled_for
from pbc.runtime.runtime import Runtime


class Net(nn.Module):
    """A stem whose outputs a residual sum shares, a depthwise layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 20, 1)
        self.each = nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.up = nn.Conv2d(20, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.up(torch.relu(self.each(self.down(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


HEAD = frozenset({"fc.weight", "fc.bias"})
EXAMPLE = torch.zeros(1, 3, 16, 16)


def channels() -> Channels:
    return Channels(settled(Net()), HEAD, EXAMPLE)


def zero(module: nn.Module, hidden: list[int], stream: list[int]) -> None:
    """Take weights of some channels to zero, in every layer that they pass through."""
    with torch.no_grad():
        weight = {name: p for name, p in module.named_parameters() if name.endswith(".weight")}
        weight["down.weight"][hidden] = 0
        weight["up.weight"][:, hidden] = 0
        for name in ("stem", "up"):
            weight[f"{name}.weight"][stream] = 0
        for name in ("down", "fc"):
            weight[f"{name}.weight"][:, stream] = 0


def test_a_channel_is_dead_in_all_layers_of_its_group_or_not_at_all() -> None:
    own = channels()
    zero(own.module, hidden=[3, 7], stream=[0, 5])
    with torch.no_grad():
        own.module.get_parameter("stem.weight")[5] = 1  # one member lives
    # By whichever of a group's layers the group is called.
    assert sorted(channels.tolist() for channels in own.below(1e-4).values()) == [[0], [3, 7]]


def test_the_smaller_network_equals_the_zeroed_one_and_keeps_its_momentum() -> None:
    own = channels()
    zero(own.module, hidden=[3, 7], stream=[0, 5])
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own.module(images)
    removal = own.below(1e-4)
    values = {n: torch.randn_like(p) for n, p in own.module.named_parameters()}
    smaller = own.removed_from(values, removal)
    before = own.count()
    own.remove(removal)
    assert before - own.count() == 2 * 2 + 2  # stem, up; down
    with torch.no_grad():
        torch.testing.assert_close(own.module(images), expected)
    hidden = [i for i in range(20) if i not in (3, 7)]
    stream = [i for i in range(12) if i not in (0, 5)]
    assert torch.equal(smaller["up.weight"], values["up.weight"][stream][:, hidden])
    assert torch.equal(smaller["each.weight"], values["each.weight"][hidden])
    assert torch.equal(smaller["norm.bias"], values["norm.bias"][stream])
    for name, parameter in own.module.named_parameters():
        assert smaller[name].shape == parameter.shape


def test_the_penalty_counts_inputs_and_outputs_of_dense_layers() -> None:
    own = channels()
    weight = {name: p.detach() for name, p in own.module.named_parameters()}
    expected = weight["stem.weight"].flatten(1).norm(dim=1).sum()
    for name in ("down", "up"):
        for axis in (0, 1):
            expected += weight[f"{name}.weight"].transpose(0, axis).flatten(1).norm(dim=1).sum()
    expected += weight["fc.weight"].norm(dim=0).sum()
    torch.testing.assert_close(own.norms().detach(), expected)


def test_what_is_not_needed_goes_to_zero_and_does_not_hover_about_it() -> None:
    own, rate, factor = channels(), 0.1, 1.4e-3  # as a small network of 20 classes has them
    with torch.no_grad():
        for parameter in own.module.parameters():
            parameter.mul_(0.02)
    optimizer = torch.optim.SGD(own.module.parameters(), rate, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        (factor * own.norms()).backward()
        optimizer.step()
    # A step of a plain norm's length, as long at zero as anywhere, would leave all where it is.
    assert rate * factor / (1 - 0.9) > 10 * THRESHOLD
    assert sorted(len(found) for found in own.below(THRESHOLD).values()) == [11, 19]


def test_all_channels_never_go() -> None:
    own = channels()
    zero(own.module, hidden=list(range(20)), stream=[])
    assert [len(found) for found in own.below(1e-4).values()] == [19]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prunetrain")
    bench_net.photos(root / "photos")
    bench_net.compiled(root / "net")
    return root


def rival(folder: Path, name: str) -> PruneTrain:
    runtime = Runtime.open(folder / "net" / "linear-probe-0.pbc")
    samples = ImageFolder.open(folder / "photos" / "train", runtime.spec)
    options = TrainOptions(epochs=4, batch=bench_net.BATCH, learning_rate=0.02, seed=1)
    setting = RivalSetting(
        runtime, labelled_for(runtime.bundle, samples), options, folder / name, torch_compile=False
    )
    return PruneTrain(setting)


def kill(one: PruneTrain) -> None:
    """Let a quarter of the hidden channels be as group lasso leaves them in the end."""
    with torch.no_grad():
        module = one._module
        module.get_parameter("stem.0.weight")[:4] = 0
        module.get_parameter("stem.3.weight")[:, :4] = 0


def test_training_goes_on_with_the_smaller_network_also_after_an_interruption(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rival(folder, "one")
    one.prepare(None)
    assert one._channels.count() == 16 + 32
    first = one.run_epoch()
    assert first.seconds == pytest.approx(sum(first.stage_seconds.values()))
    loss = original.loss(one._setting.objective, torch.zeros(1, 3), np.zeros(1, np.int64))
    assert one._factor is not None
    share = one._factor * float(one._channels.norms().detach())
    assert 0.1 < share / (share + float(loss)) < 2 * RATIO
    kill(one)
    reconfigure = one._reconfigure

    def killed_first() -> None:
        kill(one)
        reconfigure()

    monkeypatch.setattr(one, "_reconfigure", killed_first)
    second = one.run_epoch()
    assert second.seconds == pytest.approx(sum(second.stage_seconds.values()))
    assert one._channels.count() == 12 + 32
    assert one.facts()["notes"] == ["4 of 48 channels were removed"]
    momentum = one._optimizer.state_dict()["state"]
    assert len(momentum) == len(one._parameters)
    state = {name: value.copy() for name, value in one.state().items()}
    expected = one.run_epoch().loss
    other = rival(folder, "other")
    other.prepare(state)
    assert other._channels.count() == 12 + 32
    assert other.run_epoch().loss == expected
    assert 0 <= other.evaluate(one._setting.samples) <= 1
