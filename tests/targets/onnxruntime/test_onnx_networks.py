from __future__ import annotations

import pytest
import zoo
from onnx_checks import assert_logits

from pbc.passes.fold_batch_norm import FoldBatchNorm


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("resnet50", (3, 64, 64)),
        ("mobilenet_v3_large", (3, 64, 64)),
        ("timm:deit_tiny_patch16_224", (3, 96, 96)),
    ],
)
def test_real_networks_convert(model: str, shape: zoo.Shape) -> None:
    program = FoldBatchNorm()(zoo.split(zoo.captured(model, shape).program))
    assert_logits(program, 0, 1e-5)
