"""Extras of this distribution, by the packages that they bring."""

from __future__ import annotations

from collections.abc import Mapping

EXTRAS: Mapping[str, str] = {
    "torch": "compile",
    "torch_pruning": "compile",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "torchvision": "models",
    "timm": "models",
    "datasets": "datasets",
    "mlflow": "mlflow",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "tvm": "tvm",
    "tvm_ffi": "tvm",
    "ziglang": "tvm",
    "pillow_heif": "heic",
    "flwr": "fleet",
    "cryptography": "trust",
}
"""Extras of a machine that makes bundles and rebuilds rivals."""

DEVICE_EXTRAS: Mapping[str, str] = {
    **EXTRAS,
    "torch": "device-torch",
    "onnxruntime": "device",
    "tvm_ffi": "device-tvm",
}
"""Extras of a device that runs bundles: an engine is all that it needs."""


def missing(error: ModuleNotFoundError, extras: Mapping[str, str] = EXTRAS) -> str | None:
    """Return the words for the package that an import did not find, with how to install it.

    None for a package that no extra brings.
    """
    package = (error.name or "").partition(".")[0]
    if package not in extras:
        return None
    return f"{package}, which is not installed: pip install 'pbc[{extras[package]}]'"
