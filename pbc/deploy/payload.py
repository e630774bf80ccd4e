"""Payload of a deploy: the plan for the board, and the files it may ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pbc
from pbc.bundle import signature
from pbc.bundle.keys import PublicKey, public_pem
from pbc.bundle.reader import MANIFEST, Bundle
from pbc.bundle.trust import KEYS_VARIABLE, UNSIGNED_VARIABLE
from pbc.deploy import board
from pbc.deploy.libraries import Library
from pbc.deploy.own_wheel import own_wheel
from pbc.deploy.wheels import installed_bytes
from pbc.errors import PbcError

BUNDLE = "bundle.pbc"
KEYS = "keys"
PROBE = resources.files("pbc.deploy").joinpath("probe.sh").read_bytes()
SCRIPT = resources.files("pbc.deploy").joinpath("board.py").read_bytes()


@dataclass(frozen=True)
class Payload:
    """Plan as board.py reads it, with the source of the bytes of each sha256."""

    plan: Mapping[str, Any]
    sources: Mapping[str, Callable[[], bytes]]


def needs(bundle: Bundle, python: str | None = None) -> dict[str, Any]:
    """Return what board.refusals compares a board with; python: the one version that will do."""
    manifest = bundle.manifest
    if not isinstance(manifest.get("self_test"), dict):
        raise PbcError(
            f"{bundle.path} has no self-test, without which nothing is activated: "
            "compile it again with this pbc"
        )
    target = manifest.get("target", {})
    return {
        "arch": target.get("arch"),
        "memory_bytes": target.get("memory_bytes"),
        "requires": dict(manifest["requires"]),
        "python": python,
    }


def payload(
    bundle: Bundle,
    wheels: Sequence[Path],
    libraries: Sequence[Library],
    requirements: Sequence[str],
    python: str,
    ignore: Sequence[str] = (),
    *,
    keys: Mapping[str, PublicKey] | None = None,
    serial: int | None = None,
    allow_older: bool = False,
) -> Payload:
    """Put together what a board with this version of Python needs for the bundle.

    requirements: what pip is to install from the wheels; pbc itself has no part in that, so that a
    new version of it does not install them again. keys: which the board is to trust. serial: the
    bundle's, as it was signed.
    """
    sources: dict[str, Callable[[], bytes]] = {}

    def add(path: str, read: Callable[[], bytes], sha256: str, size: int) -> dict[str, Any]:
        sources[sha256] = read
        return {"path": path, "sha256": sha256, "size": size}

    def add_bytes(path: str, data: bytes) -> dict[str, Any]:
        return add(path, lambda: data, hashlib.sha256(data).hexdigest(), len(data))

    to_install = []
    for wheel in wheels:
        digest = board.sha256_of(wheel)
        to_install.append(add(wheel.name, wheel.read_bytes, digest, wheel.stat().st_size))
    name, own = own_wheel()
    slot = [add_bytes(name, own), add_bytes(f"{BUNDLE}/{MANIFEST}", _manifest_bytes(bundle))]
    for entry, facts in bundle.manifest["files"].items():
        read = partial(bundle.read_entry, entry)
        slot.append(add(f"{BUNDLE}/{entry}", read, facts["sha256"], facts["size_bytes"]))
    signatures = bundle.signature_bytes()
    if signatures is not None:
        slot.append(add_bytes(f"{BUNDLE}/{signature.ENTRY}", signatures))
    trusted = list((keys or {}).values())
    slot += [add_bytes(f"{KEYS}/{key.identity}.pub", public_pem(key)) for key in trusted]
    slot += [add_bytes(library.path, library.data) for library in libraries]
    plan = {
        "format": board.FORMAT,
        "slot": slot,
        "wheels": to_install,
        "own": name,
        "install": list(requirements),
        "variables": {
            **{lib.variable: lib.path for lib in libraries if lib.variable is not None},
            **({KEYS_VARIABLE: KEYS} if trusted else {}),
        },
        "settings": {UNSIGNED_VARIABLE: "1"} if bundle.has_code and not trusted else {},
        "allow_older": allow_older,
        "installed_bytes": installed_bytes(wheels),
        "needs": needs(bundle, python),
        "ignore": list(ignore),
        "about": {
            "bundle": bundle.digest,
            "model": bundle.manifest["model"],
            "strategy": bundle.manifest["strategy"],
            "engine": bundle.manifest["engine"],
            "target": bundle.manifest.get("target", {}).get("name"),
            "pbc": pbc.__version__,
            "serial": serial,
        },
    }
    return Payload(plan, sources)


def _manifest_bytes(bundle: Bundle) -> bytes:
    """Return the manifest as a file; its digest is over its content, not over these bytes."""
    text = json.dumps(bundle.manifest, indent=1, sort_keys=True, ensure_ascii=False)
    return f"{text}\n".encode()
