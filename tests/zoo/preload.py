"""What every network's process needs, imported and exercised once in the server that forks them."""

from __future__ import annotations

import cell  # noqa: F401
import torch
from catalogue import build
from torch import nn

from pbc.frontend import capture
from pbc.lower.backend import backend

ENGINES = ("pytorch", "onnxruntime", "tvm")

torch.set_num_threads(1)  # the networks beside it want the other cores; and threads do not fork
for engine in ENGINES:
    backend(engine).lowering()
build("timm:test_vit", 64)
# torch.export imports and builds much of itself when it first runs.
capture.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), (3, 4, 4))
