"""Train the small network of `pbc demo` on the digits that the demo does not teach."""

from __future__ import annotations

import numpy as np
import torch
from net import factory
from PIL import Image
from torch.nn import functional

from pbc.demo import digits
from pbc.demo.digits import KNOWN
from pbc.frontend.models import IMAGENET_MEAN, IMAGENET_STD

EPOCHS = 30
SHAPE = (1, 16, 16)
MEAN, STD = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3


def trained() -> torch.nn.Module:
    """Return the network, trained on the digits that the demo does not teach."""
    torch.manual_seed(0)
    found = [(tile, label) for label in range(KNOWN) for tile in digits.of(label)]
    tiles = [tile.resize(SHAPE[1:], Image.Resampling.BILINEAR) for tile, _ in found]
    # As pbc prepares images of one channel for a network that is nobody's zoo's.
    inputs = (torch.from_numpy(np.stack(tiles)).float()[:, None] / 255 - MEAN) / STD
    labels = torch.tensor([label for _, label in found])
    network = factory(KNOWN).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(64):
            shift = [int(n) for n in torch.randint(-1, 2, (2,))]
            loss = functional.cross_entropy(
                network(inputs[chosen].roll(shift, (2, 3))), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()
