"""Android phones and tablets: no engine has a wheel for their C library on the package index."""

from __future__ import annotations

from pbc.target import Target

_TERMUX = "as Termux packages it: the package index has no wheel for Android"


def phone(
    *,
    name: str,
    description: str,
    cpu: str | None = None,
    cores: int | None = None,
    tvm_tag: str | None = None,
) -> Target:
    """Return a 64-bit Android device; what is not known of it is left out."""
    known = {"cpu": cpu, "cores": None if cores is None else str(cores), "tvm": tvm_tag}
    return Target(
        name=name,
        description=description,
        family="Android",
        arch="aarch64",
        engine="tvm",
        engines=("tvm", "onnxruntime", "pytorch"),
        tags={
            "triple": "aarch64-linux-android",
            "libc": "bionic",
            **{fact: value for fact, value in known.items() if value is not None},
        },
        requires={"python": ">=3.10", "libc": "bionic", "numpy": "as Termux packages it"},
        needs={
            "tvm": {"tvm runtime": "built with Android's NDK: there is no wheel for Android"},
            "onnxruntime": {"onnxruntime build": _TERMUX},
            "pytorch": {"torch build": _TERMUX},
        },
    )


android_arm64 = phone(name="android-arm64", description="64-bit Android")
mate10 = phone(
    name="arm-mate10",
    description="Huawei Mate 10, Kirin 970",
    cpu="cortex-a73",
    cores=8,
    tvm_tag="arm/mate10",
)
pixel2 = phone(
    name="arm-pixel2",
    description="Google Pixel 2, Snapdragon 835",
    cpu="cortex-a73",
    cores=8,
    tvm_tag="arm/pixel2",
)
