"""Signatures of a bundle: Ed25519 over its digest, which names every byte of it, and a serial.

The file `signature.json` is the one entry of a bundle that its manifest does not name:

    {"format": 1, "signatures": [{"key": "3f…", "serial": 1764400000, "signature": "base64"}]}

What is signed begins with words of its own, so that a signature of pbc's is none of anything else.
Several keys may sign one bundle, which is how keys are changed (docs/trust.md).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbc.errors import PbcError
from pbc.util import strict_json
from pbc.util.shapes import check, integer, list_of, record, text

ENTRY = "signature.json"
MOST_BYTES = 1 << 16
MOST_SERIAL = 2**53
_DOMAIN = b"pbc bundle signature 1\0"
_FORMAT = 1
_MOST_SIGNATURES = 16
_RAW_BYTES = 64
_SHAPE = record(
    {
        "format": integer(_FORMAT, _FORMAT),
        "signatures": list_of(
            record({"key": text(64), "serial": integer(0, MOST_SERIAL), "signature": text(128)}),
            1,
            _MOST_SIGNATURES,
        ),
    }
)


@dataclass(frozen=True)
class Signature:
    """One key's signature; key: its identity. serial: grows from one bundle to the next."""

    key: str
    serial: int
    raw: bytes


def message(digest: str, serial: int) -> bytes:
    """Return what is signed for a bundle of a digest (hex) under a serial."""
    return _DOMAIN + serial.to_bytes(8, "big") + bytes.fromhex(digest)


def identity(public: bytes) -> str:
    """Return the identity of a public key of 32 bytes: the start of its sha256, hex."""
    return hashlib.sha256(public).hexdigest()[:16]


def parse(data: bytes) -> tuple[Signature, ...]:
    """Read the file; raises PbcError where it is none."""
    try:
        content: Any = strict_json.loads(data)
        check(content, _SHAPE)
        found = tuple(
            Signature(row["key"], row["serial"], base64.b64decode(row["signature"], validate=True))
            for row in content["signatures"]
        )
    except (ValueError, binascii.Error) as error:
        raise PbcError(f"its {ENTRY} is not valid: {error}") from error
    if any(len(signature.raw) != _RAW_BYTES for signature in found):
        raise PbcError(f"its {ENTRY} is not valid: a signature has {_RAW_BYTES} bytes")
    return found


def dump(signatures: Sequence[Signature]) -> bytes:
    """Write the file; `parse` reads it."""
    rows = [
        {"key": s.key, "serial": s.serial, "signature": base64.b64encode(s.raw).decode()}
        for s in sorted(signatures, key=lambda s: s.key)
    ]
    return (json.dumps({"format": _FORMAT, "signatures": rows}, indent=1) + "\n").encode()
