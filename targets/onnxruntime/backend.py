"""The ONNX Runtime backend's facts: it only knows inference, so steps are derived for it."""

from __future__ import annotations

from pbc.bundle.ladder import INT8
from pbc.lower.backend import Backend

BACKEND = Backend(
    lowering_class="pbc.targets.onnxruntime.lowering:OnnxRuntimeLowering",
    packages=("onnx", "onnxscript", "onnxruntime"),
    requires={"onnxruntime": ">=1.20"},
    precisions=(INT8,),
    derives_steps=True,
)
