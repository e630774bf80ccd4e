"""Put a signature into a bundle that is there already, in one step."""

from __future__ import annotations

import shutil
import zipfile

from pbc.bundle import signature
from pbc.bundle.reader import Bundle
from pbc.bundle.signature import Signature
from pbc.bundle.trust import signatures_of
from pbc.util.atomic import replace_bytes, replacing


def add_signature(bundle: Bundle, made: Signature) -> None:
    """Add a signature, in the place of an earlier one of the same key."""
    kept = [other for other in signatures_of(bundle) if other.key != made.key]
    data = signature.dump([*kept, made])
    if bundle.path.is_dir():
        replace_bytes(bundle.path / signature.ENTRY, data, mode=0o644)
        return
    with (
        replacing(bundle.path, mode=0o644) as file,
        zipfile.ZipFile(bundle.path) as old,
        zipfile.ZipFile(file, "w") as new,
    ):
        for entry in old.infolist():
            if entry.filename != signature.ENTRY:
                with old.open(entry) as source, new.open(_info(entry.filename), "w",
                                                         force_zip64=True) as to:  # fmt: skip
                    shutil.copyfileobj(source, to, 1 << 20)
        with new.open(_info(signature.ENTRY), "w", force_zip64=True) as to:
            to.write(data)


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    return info
