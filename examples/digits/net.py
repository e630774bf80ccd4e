"""A small network for 16x16 pixels in grey: what `pbc demo` starts from."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions, pooling, a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 32, 1), (32, 48, 2), (48, 64, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(nn.functional.adaptive_avg_pool2d(self.features(x), 2).flatten(1))
        return logits


def factory(num_classes: int = 6) -> nn.Module:
    """Return the network, untrained."""
    return Net(num_classes)
