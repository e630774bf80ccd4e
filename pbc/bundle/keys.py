"""Keys that sign bundles and that verify them: PEM files, as other programs read them too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbc.bundle.signature import Signature, identity, message
from pbc.errors import PbcError
from pbc.util.atomic import replace_bytes
from pbc.util.extras import install
from pbc.util.files import read_bytes

PUBLIC_SUFFIX = ".pub"
PRIVATE_SUFFIX = ".key"
_MOST_BYTES = 1 << 14
_MISSING = f"signatures need cryptography, which is not installed: {install('trust')}"


@dataclass(frozen=True)
class PublicKey:
    """A key that verifies; name: of its file. raw: 32 bytes."""

    name: str
    raw: bytes

    @property
    def identity(self) -> str:
        """Return by what signatures name the key."""
        return identity(self.raw)

    def verifies(self, signature: Signature, digest: str) -> bool:
        """Return whether a signature of a bundle's digest is this key's."""
        ed25519, _ = _library()
        from cryptography.exceptions import InvalidSignature

        try:
            key = ed25519.Ed25519PublicKey.from_public_bytes(self.raw)
            key.verify(signature.raw, message(digest, signature.serial))
        except InvalidSignature:
            return False
        return True


def generate(path: Path) -> PublicKey:
    """Make a pair of keys: PATH.key, which signs and is the owner's alone, and PATH.pub."""
    ed25519, serialization = _library()
    private_path = path.with_name(path.name + PRIVATE_SUFFIX)
    public_path = path.with_name(path.name + PUBLIC_SUFFIX)
    for existing in (private_path, public_path):
        if existing.exists():
            raise PbcError(f"{existing} is there already; a key is never overwritten")
    private = ed25519.Ed25519PrivateKey.generate()
    secret = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    replace_bytes(private_path, secret, mode=0o600)
    replace_bytes(public_path, public, mode=0o644)
    return read_public(public_path)


def read_public(path: Path) -> PublicKey:
    """Read a public key; raises PbcError where it is none."""
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, TypeError) as error:
        raise PbcError(f"{path} is no public key in PEM; `pbc keygen` makes one") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise PbcError(f"{path} is a key of another kind; expected Ed25519")
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return PublicKey(path.name.removesuffix(PUBLIC_SUFFIX), raw)


def public_pem(key: PublicKey) -> bytes:
    """Return a public key as its file; `read_public` reads it."""
    ed25519, serialization = _library()
    pem: bytes = ed25519.Ed25519PublicKey.from_public_bytes(key.raw).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def sign(path: Path, digest: str, serial: int) -> Signature:
    """Sign the digest of a bundle with the private key in a file."""
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise PbcError(f"{path} is no private key in PEM; `pbc keygen` makes one") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise PbcError(f"{path} is a key of another kind; expected Ed25519")
    public = key.public_key().public_bytes(
        serialization.Encoding.Raw, serialization.PublicFormat.Raw
    )
    return Signature(identity(public), serial, key.sign(message(digest, serial)))


def read_keys(places: str) -> Mapping[str, PublicKey]:
    """Read public keys, by their identities; raises PbcError where one is missing, or none is.

    places: files, or folders of *.pub files, with colons between them.
    """
    found: dict[str, PublicKey] = {}
    for place in filter(None, places.split(os.pathsep)):
        path = Path(place)
        if path.is_dir():
            files = sorted(path.glob(f"*{PUBLIC_SUFFIX}"))
            if not files:
                raise PbcError(f"the folder of keys {path} holds no *{PUBLIC_SUFFIX} file")
        else:
            files = [path]
        for file in files:
            key = read_public(file)
            found[key.identity] = key
    if not found:
        raise PbcError("no key is named; give files of public keys, or folders of them")
    return found


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise PbcError(f"cannot read the key {path}: {error.strerror or error}") from error


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise PbcError(_MISSING) from error
    return ed25519, serialization
