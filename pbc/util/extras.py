"""Extras of this distribution, by the packages that they bring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
    return f"{package}, which is not installed: {install(extras[package])}"


def install(*extras: str) -> str:
    """Return the command that adds extras to this installation, from where it came."""
    return f"pip install '{_origin()}[{','.join(extras)}]'"


def _origin() -> str:
    """Return the folder or wheel that pip installed pbc from (PEP 610), else its name."""
    try:
        noted = metadata.distribution("pbc").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        noted = None
    if noted is None:
        return "pbc"
    address = urlsplit(json.loads(noted)["url"])
    path = Path(unquote(address.path))
    if address.scheme != "file" or not path.exists():
        return "pbc"
    return "." if path == Path.cwd() else str(path)
