"""pbc itself as a wheel, from whatever it runs from: a checkout, an editable install, a wheel.

The same modules give the same bytes, so that a board that has them is not sent them again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pbc
from pbc.errors import PbcError

_WHEEL = "Wheel-Version: 1.0\nGenerator: pbc\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@cache
def own_wheel() -> tuple[str, bytes]:
    """Return the wheel's file name and its bytes, the same while a process runs."""
    try:
        about = metadata.distribution("pbc")
    except metadata.PackageNotFoundError as error:
        raise PbcError(
            "pbc is not installed as a distribution, only importable: pip install it"
        ) from error
    version = pbc.__version__
    info = f"pbc-{version}.dist-info"
    files = dict(_modules(Path(pbc.__file__).parent))
    files[f"{info}/METADATA"] = _text(about, "METADATA", "PKG-INFO")
    files[f"{info}/entry_points.txt"] = _text(about, "entry_points.txt")
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    record = f"{info}/RECORD"
    files[record] = _record(files, record)
    return f"pbc-{version}-py3-none-any.whl", _zip(files)


def _modules(package: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file of the package; in a checkout pbc.passes and pbc.targets are links."""
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix not in (".pyc", ".pyo"):
                yield f"pbc/{path.relative_to(package).as_posix()}", path.read_bytes()


def _text(about: metadata.Distribution, *names: str) -> bytes:
    for name in names:
        text = about.read_text(name)
        if text is not None:
            return text.encode()
    raise PbcError(f"the installation of pbc has no {names[0]}: pip install it again")


def _record(files: Mapping[str, bytes], own: str) -> bytes:
    rows = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in sorted(files.items())]
    return "".join([*rows, f"{own},,\n"]).encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()
