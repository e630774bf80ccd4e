"""Android phones and tablets."""

from __future__ import annotations

from pbc.target import Target

android_arm64 = Target(
    name="android-arm64",
    description="64-bit Android",
    arch="aarch64",
    engine="tvm",
    engines=("tvm", "onnxruntime", "pytorch"),
    tags={
        "libc": "bionic",
        "torch": "no wheel on the package index: a build of your own",
    },
    requires={"python": ">=3.10", "libc": "bionic"},
)
