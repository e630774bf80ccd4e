"""A network of one's own: `pbc compile examples/custom_model.py:factory --weights random`.

Plain PyTorch, nothing of pbc. The function named after the colon takes `num_classes` and returns
the module; the module's last linear layer is the classifier.
"""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: two 3×3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[b, inputs, h, w] to [b, outputs, h / stride, w / stride]."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Four residual blocks, average pooling, one linear layer: 0.2 million parameters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), Block(64, 96, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, 3, h, w] to logits [b, num_classes]."""
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))


def factory(num_classes: int = 10) -> nn.Module:
    """Build the network that `pbc compile` is to compile."""
    return SmallResNet(num_classes)
