"""Open a bundle to use it: once keys are configured, only what one of them has signed.

$PBC_KEYS names the public keys of a device's owner. Without any, whatever is well-formed is used,
but for code of a native engine, which runs as it is: that wants to be asked for, by `--unsigned` or
$PBC_UNSIGNED=1. What looks into a bundle without using it needs none of this (`pbc inspect`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pbc.bundle import signature as signatures
from pbc.bundle.keys import PublicKey, read_keys
from pbc.bundle.reader import Bundle
from pbc.errors import PbcError

KEYS_VARIABLE = "PBC_KEYS"
UNSIGNED_VARIABLE = "PBC_UNSIGNED"


@dataclass(frozen=True)
class Signer:
    """A configured key that signed a bundle, and under which serial."""

    key: PublicKey
    serial: int


def open_trusted(path: Path | str) -> Bundle:
    """Open a bundle that is going to be used; raises PbcError for one that must not be."""
    bundle = Bundle.open(path)
    require(bundle)
    return bundle


def require(bundle: Bundle, keys: Mapping[str, PublicKey] | None = None) -> Signer | None:
    """Refuse a bundle that no configured key signed; without keys, code that nobody asked for.

    keys: by default those that $PBC_KEYS names. Returns who signed, None without keys.
    """
    keys = configured() if keys is None else keys
    if keys is not None:
        return verified(bundle, keys)
    if bundle.has_code:
        refuse_unvouched(f"{bundle.path} holds code for this machine")
    return None


def refuse_unvouched(what: str) -> None:
    """Refuse to run code of a bundle that no key vouches for, unless that was asked for."""
    if os.environ.get(UNSIGNED_VARIABLE) != "1":
        raise PbcError(
            f"{what}, which nobody vouches for: sign the bundle and let {KEYS_VARIABLE} name the "
            "key (docs/trust.md), or say --unsigned"
        )


def configured() -> Mapping[str, PublicKey] | None:
    """Return the keys that $PBC_KEYS names, None where it is not set; raises PbcError for none."""
    places = os.environ.get(KEYS_VARIABLE)
    return None if places is None else read_keys(places)


def verified(bundle: Bundle, keys: Mapping[str, PublicKey]) -> Signer:
    """Return which of the keys signed a bundle, by its highest serial; raises PbcError if none."""
    found = signatures_of(bundle)
    if not found:
        raise PbcError(f"{bundle.path} is not signed; `pbc sign` signs it with one of your keys")
    known = [s for s in found if s.key in keys]
    if not known:
        names = ", ".join(sorted(key.name for key in keys.values()))
        raise PbcError(
            f"{bundle.path} is signed by {found[0].key[:16]!r}, none of your keys ({names})"
        )
    signers = [
        Signer(keys[s.key], s.serial) for s in known if keys[s.key].verifies(s, bundle.digest)
    ]
    if not signers:
        raise PbcError(
            f"{bundle.path} is wrongly signed: its signature is not that of the key "
            f"{keys[known[0].key].name!r} for this content"
        )
    return max(signers, key=lambda signer: signer.serial)


def signatures_of(bundle: Bundle) -> tuple[signatures.Signature, ...]:
    """Return the signatures that come with a bundle, as they are, unverified."""
    data = bundle.signature_bytes()
    if data is None:
        return ()
    try:
        return signatures.parse(data)
    except PbcError as error:
        raise PbcError(f"{bundle.path}: {error}") from error
