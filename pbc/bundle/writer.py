"""Write a bundle in one step, so that its bytes depend on its content alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pbc.bundle.packing import packed
from pbc.bundle.reader import (
    MANIFEST,
    OLDEST_SCHEMA,
    SCHEMA,
    Bundle,
    check_name,
    manifest_digest,
)
from pbc.errors import PbcError
from pbc.util.atomic import cannot_write, replacing, sync_folder

_CHUNK_BYTES = 1 << 20


def write(
    path: Path | str,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
    *,
    as_folder: bool = False,
) -> Bundle:
    """Write a bundle at `path` in one step and return it opened.

    `files`, `packed`, `schema` and `digest` of the manifest are filled in here. Tensors of few
    values or many zeros are packed, where that pays (pbc.bundle.packing). The bytes of the result
    depend on the arguments alone (entries are sorted, timestamps fixed). If anything fails, what
    was at `path` stays.
    """
    path = Path(path)
    for name in files:
        check_name(path, name)
    full = dict(manifest)
    files, full["packed"] = _packed(files)
    if not full["packed"]:
        del full["packed"]
    full["schema"] = SCHEMA if "packed" in full else OLDEST_SCHEMA
    full["files"] = {name: _measure(source) for name, source in sorted(files.items())}
    full["digest"] = manifest_digest(full)
    text = (json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    entries: dict[str, bytes | Path] = {MANIFEST: text, **dict(sorted(files.items()))}
    if as_folder:
        _write_folder(path, entries)
    else:
        _write_zip(path, entries)
    return Bundle.open(path)


def _packed(
    files: Mapping[str, bytes | Path],
) -> tuple[dict[str, bytes | Path], dict[str, dict[str, Any]]]:
    """Return the files as they are stored, and the facts of those that were packed for that."""
    stored, facts = dict(files), {}
    for name, source in files.items():
        if isinstance(source, bytes) and name.endswith(".safetensors"):
            small = _packed_tensors(source)
            if small is not None:
                stored[name], facts[name] = small, _measure(source)
    return stored, facts


def _packed_tensors(file: bytes) -> bytes | None:
    try:
        return packed(file)
    except (ValueError, KeyError):
        return None  # no file of tensors, whatever its name


def _chunks(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _measure(source: bytes | Path) -> dict[str, Any]:
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in _chunks(source):
        digest.update(chunk)
        size_bytes += len(chunk)
    return {"sha256": digest.hexdigest(), "size_bytes": size_bytes}


def _write_zip(path: Path, entries: Mapping[str, bytes | Path]) -> None:
    if path.is_dir():
        raise PbcError(f"cannot write the bundle {path}: it is a folder; give a file name")
    with replacing(path, mode=0o644) as file, zipfile.ZipFile(file, "w") as archive:
        for name, source in entries.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as entry:
                for chunk in _chunks(source):
                    entry.write(chunk)


def _write_folder(path: Path, entries: Mapping[str, bytes | Path]) -> None:
    if path.exists() and not (path / MANIFEST).is_file():
        raise PbcError(f"cannot write the bundle {path}: something that is no bundle is there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PbcError(cannot_write(path, error)) from error
    new, old = temporary / "new", temporary / "old"
    try:
        for name, source in entries.items():
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for chunk in _chunks(source):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        # A folder cannot be exchanged in one call; between the two renames neither is there,
        # but both are complete.
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise PbcError(cannot_write(path, error)) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
