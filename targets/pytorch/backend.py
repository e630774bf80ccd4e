"""The PyTorch backend's facts: it interprets graphs, and differentiates on the device."""

from __future__ import annotations

from pbc.bundle.ladder import BFLOAT16
from pbc.lower.backend import Backend

BACKEND = Backend(
    lowering_class="pbc.targets.pytorch.lowering:PyTorchLowering",
    packages=("torch",),
    requires={"torch": ">=2.9,<2.14"},
    precisions=(BFLOAT16,),
)
