"""Read a bundle: what the compiler ships to a device, one `.pbc` file (a stored zip) or a folder.

Every file is named in manifest.json with its sha256 and size, and the manifest carries its own
digest, which names the bundle. What is read is bounded before it is read, and compared with its
declared shape. Nothing is unpickled: weights are safetensors, graphs are JSON or ONNX. Libraries of
native engines are code (docs/trust.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from pbc.bundle import packing, signature
from pbc.bundle.graph_name import BODY, PREFIX, GraphName
from pbc.bundle.ladder import MACS, Ladder
from pbc.bundle.requires import checked
from pbc.bundle.shape import MOST_FILES, check_manifest
from pbc.errors import PbcError, reason_of
from pbc.util import strict_json
from pbc.util.files import opened
from pbc.util.shapes import ShapeError
from pbc.util.terminal import CONTROL

SCHEMA = 3
OLDEST_SCHEMA = 2
"""Of bundles without packed files: whoever reads no newer schema still reads those."""
MANIFEST = "manifest.json"
_DATA_SUFFIXES = (".json", ".onnx")
# The directory of a zip has 46 bytes and a name for each entry.
_MOST_DIRECTORY_BYTES = (MOST_FILES + 2) * (46 + 1024)
# A flipped bit in a zip's own headers surfaces as almost any of these, depending on the field.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    IndexError,
    OverflowError,
)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the manifest is verified, files are verified when they are read."""

    path: Path
    manifest: dict[str, Any]
    is_signed: bool = False

    @classmethod
    def open(cls, path: Path | str, *, complete: bool = True) -> Bundle:
        """Read and verify the manifest; check that the entries are exactly those it names.

        complete: whether all entries must be there; without, only who signed it may be asked.
        """
        path = Path(path)
        if not path.exists():
            raise PbcError(f"no bundle at {path}; `pbc compile … -o {path}` makes one")
        names = _entry_names(path)
        if MANIFEST not in names:
            raise PbcError(f"{path} is not a bundle: it has no {MANIFEST}")
        with _archive(path) as archive:
            data = _read_entry(path, MANIFEST, None, archive)
        manifest = _parse_manifest(path, data)
        named = set(manifest["files"])
        for name in sorted(named - names) if complete else ():
            raise PbcError(f"{path} is incomplete: {name} is missing; copy or compile it again")
        for name in sorted(names - named - {MANIFEST, signature.ENTRY}):
            raise PbcError(f"{path} holds {name}, which its manifest does not name; remove it")
        if signature.ENTRY in named:
            raise PbcError(f"{path}: its {MANIFEST} names {signature.ENTRY}, which signs it")
        return cls(path, manifest, signature.ENTRY in names)

    @property
    def digest(self) -> str:
        """Return the sha256 (hex) of the manifest, which covers every file and names the bundle."""
        return str(self.manifest["digest"])

    @property
    def entries(self) -> list[str]:
        """Return the names of all that belongs to the bundle, manifest and signature among it."""
        signed = [signature.ENTRY] if self.is_signed else []
        return [MANIFEST, *signed, *self.manifest["files"]]

    @property
    def has_code(self) -> bool:
        """Return whether it holds libraries, which an engine runs as they are."""
        graphs = self.manifest["graphs"].values()
        return "calls" in self.manifest or not all(
            PurePosixPath(file).suffix in _DATA_SUFFIXES for file in graphs
        )

    def signature_bytes(self) -> bytes | None:
        """Return the file of signatures as it is; None where there is none."""
        if not self.is_signed:
            return None
        with _archive(self.path) as archive:
            return _read_entry(self.path, signature.ENTRY, None, archive, signature.MOST_BYTES)

    @property
    def ladder(self) -> Ladder:
        """Return the levels; raises PbcError when what the manifest has is no ladder."""
        return Ladder.from_json(self.manifest["levels"], self.manifest.get("cost_model", MACS))

    @property
    def has_prefix(self) -> bool:
        """Return whether anything is frozen before the first trainable layer."""
        return self.has_graph(PREFIX.at(0))

    @property
    def shares_body(self) -> bool:
        """Return whether all levels have one body, so that features of any level may be mixed."""
        names = map(GraphName.parse, self.manifest["graphs"])
        bodies = {self.sha256(self.graph_file(name)) for name in names if name.role == BODY}
        return len(bodies) == 1

    def has_graph(self, name: GraphName | str) -> bool:
        """Return whether there is a graph of this name."""
        return str(name) in self.manifest["graphs"]

    def graph_file(self, name: GraphName | str) -> str:
        """Return the file of a graph; raises PbcError where there is none of this name."""
        file = self.manifest["graphs"].get(str(name))
        if file is None:
            raise PbcError(f"{self.path} has no graph {name}")
        return str(file)

    def weight_files(self, name: GraphName | str) -> list[str] | None:
        """Return the files of weights that a graph reads; None where the bundle does not say."""
        files = self.manifest.get("weights", {}).get(str(name))
        return None if files is None else list(files)

    def read(self, name: str) -> bytes:
        """Return the verified bytes of one file, unpacked where the bundle has it packed."""
        with _archive(self.path) as archive:
            return self._read(name, archive)

    def read_entry(self, name: str) -> bytes:
        """Return the verified bytes of one file as the bundle has it, packed or not."""
        with _archive(self.path) as archive:
            return self._entry(name, archive)

    def _read(self, name: str, archive: zipfile.ZipFile | None) -> bytes:
        data = self._entry(name, archive)
        facts = self._packed.get(name)
        if facts is not None:
            try:
                data = packing.unpacked(data, facts["size_bytes"])
            except ValueError as error:
                raise PbcError(
                    f"{self.path} is damaged: cannot unpack {name} ({error}); compile it again"
                ) from error
            self._verify(name, data, facts)
        return data

    def _entry(self, name: str, archive: zipfile.ZipFile | None) -> bytes:
        facts = self._facts(name)
        data = _read_entry(self.path, name, facts["size_bytes"], archive)
        self._verify(name, data, facts)
        return data

    def _verify(self, name: str, data: bytes, facts: Mapping[str, Any]) -> None:
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise PbcError(
                f"{self.path} is damaged: the sha256 of {name} is not "
                f"{facts['sha256'][:12]}…; copy or compile it again"
            )

    def json(self, name: str) -> Any:
        """Return the verified content of one JSON file."""
        try:
            return strict_json.loads(self.read(name))
        except ValueError as error:
            raise PbcError(f"{self.path}: {name} is not JSON: {error}") from error

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the verified content of one safetensors file, in the dtypes it was stored in."""
        try:
            return safetensors.numpy.load(self.read(name))
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise PbcError(f"{self.path}: {name} is not a safetensors file: {error}") from error

    def sha256(self, name: str) -> str:
        """Return the manifest's sha256 (hex) of what `read` returns for one file."""
        return str(self._packed.get(name, self._facts(name))["sha256"])

    def size_bytes(self, name: str) -> int:
        """Return the length of what `read` returns for one file."""
        return int(self._packed.get(name, self._facts(name))["size_bytes"])

    def verify(self) -> None:
        """Read every file and compare it with the manifest."""
        with _archive(self.path) as archive:
            for name in self.manifest["files"]:
                self._read(name, archive)

    @property
    def _packed(self) -> dict[str, Any]:
        """Return what the packed files are once they are unpacked, by name."""
        return dict(self.manifest.get("packed", {}))

    def _facts(self, name: str) -> dict[str, Any]:
        facts: dict[str, Any] | None = self.manifest["files"].get(name)
        if facts is None:
            raise PbcError(f"{self.path} has no file {name}")
        return facts


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) over the canonical JSON of the manifest without its `digest`."""
    bare = {key: value for key, value in manifest.items() if key != "digest"}
    canonical = json.dumps(
        bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse_manifest(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = strict_json.loads(data)
    except ValueError as error:
        raise PbcError(f"{path} is damaged: its {MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise PbcError(f"{path} is not a bundle: its {MANIFEST} has no schema number")
    # The schema comes first: a newer one may compute its digest in another way.
    if manifest["schema"] > SCHEMA:
        raise PbcError(
            f"{path} was written by a newer pbc (schema {manifest['schema']}; "
            f"this one reads {SCHEMA}): upgrade pbc"
        )
    if manifest["schema"] < OLDEST_SCHEMA:
        raise PbcError(
            f"{path} was written by an older pbc (schema {manifest['schema']}; "
            f"this one reads {OLDEST_SCHEMA} to {SCHEMA}): compile it again"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise PbcError(
            f"{path} is damaged: {MANIFEST} does not match its digest; copy or compile it again"
        )
    try:
        check_manifest(manifest)
        checked(manifest["requires"])
    except (ShapeError, PbcError) as error:
        raise PbcError(f"{path}: its {MANIFEST} is not valid: {error}") from error
    _check_names(path, [MANIFEST, signature.ENTRY, *manifest["files"]])
    return manifest


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse names that are not safe, and those that no folder holds beside each other.

    A board, or another system, may not tell capital letters from small ones.
    """
    folded: dict[str, str] = {}
    for name in names:
        check_name(path, name)
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise PbcError(f"{path}: {other!r} and {name!r} are one file on some systems")
    for name in names:
        for folder in PurePosixPath(name.casefold()).parents:
            if str(folder) in folded:
                raise PbcError(
                    f"{path}: {folded[str(folder)]!r} is a file, and a folder of {name!r}"
                )


def check_name(path: Path, name: str) -> None:
    """Refuse what could leave the bundle's folder: absolute names, `..`, drives, backslashes."""
    parts = PurePosixPath(name).parts
    safe = parts and name == "/".join(parts) and not name.startswith("/") and ".." not in parts
    if not safe or set(name) & set("\\:") or CONTROL.search(name):
        raise PbcError(f"{path}: unsafe file name {name!r}; names are relative, without '..'")


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile | None]:
    """Open a bundle once for all entries that are read; None for a bundle that is a folder."""
    if path.is_dir():
        yield None
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path))
            _refuse_many(path, zipfile._EndRecData(file))  # type: ignore[attr-defined]
            archive = stack.enter_context(zipfile.ZipFile(file))
        except (*_ZIP_ERRORS, OSError) as error:
            raise PbcError(
                f"{path} is not a bundle (a zip file) or is truncated: {reason_of(error)}; "
                "copy or compile it again"
            ) from error
        yield archive


def _refuse_many(path: Path, end: list[Any] | None) -> None:
    """Refuse a zip of more entries than a bundle has, before its directory is read.

    end: the record at the end of the file, as zipfile reads it: its sixth field is the length of
    the directory, with which the number of entries need not agree.
    """
    if end is not None and end[5] > _MOST_DIRECTORY_BYTES:
        raise PbcError(f"{path} holds too many entries; a bundle has at most {MOST_FILES}")


def _entry_names(path: Path) -> set[str]:
    with _archive(path) as archive:
        if archive is None:
            return _names_below(path)
        infos = archive.infolist()
    if len(infos) > MOST_FILES + 2:
        raise PbcError(f"{path} holds {len(infos)} entries; a bundle has at most {MOST_FILES}")
    names: set[str] = set()
    for info in infos:
        check_name(path, info.filename)
        if info.filename in names:
            raise PbcError(f"{path} holds {info.filename} twice; compile it again")
        names.add(info.filename)
    return names


def _names_below(root: Path) -> set[str]:
    """Return the files of a bundle that is a folder: regular ones, no link is followed."""
    names: set[str] = set()
    folders = [""]
    try:
        while folders:
            folder = folders.pop()
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    check_name(root, name)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif entry.is_file(follow_symlinks=False):
                        names.add(name)
                    else:
                        kind = "a link" if entry.is_symlink() else "no regular file"
                        raise PbcError(f"{root} holds {name}, which is {kind}; remove it")
            if len(names) + len(folders) > 2 * MOST_FILES:
                raise PbcError(f"{root} holds too many files; a bundle has at most {MOST_FILES}")
    except OSError as error:
        raise PbcError(f"cannot read the bundle {root}: {error.strerror or error}") from error
    return names


def _read_entry(
    path: Path,
    name: str,
    size_bytes: int | None,
    archive: zipfile.ZipFile | None,
    most_bytes: int = strict_json.MOST_BYTES,
) -> bytes:
    try:
        if archive is None:
            with opened(path / name, follow=False) as file:
                _compare_size(path, name, os.fstat(file.fileno()).st_size, size_bytes, most_bytes)
                data = file.read()
        else:
            info = archive.getinfo(name)
            _compare_size(path, name, info.file_size, size_bytes, most_bytes)
            # Stored only: the size is then bounded by the file's, whatever a header claims.
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("the entry is compressed; a bundle stores it as is")
            data = archive.read(info)
    except (*_ZIP_ERRORS, KeyError, OSError) as error:
        raise PbcError(
            f"{path} is damaged: cannot read {name} ({error}); copy or compile it again"
        ) from error
    _compare_size(path, name, len(data), size_bytes, most_bytes)
    return data


def _compare_size(
    path: Path, name: str, found: int, size_bytes: int | None, most_bytes: int
) -> None:
    """Refuse an entry of another size, before and after it is read.

    size_bytes: None for what the manifest does not name, which has a bound.
    """
    if size_bytes is None and found > most_bytes:
        raise PbcError(f"{path}: its {name} has {found} bytes; at most {most_bytes} are read")
    if size_bytes is not None and found != size_bytes:
        raise PbcError(
            f"{path} is damaged: {name} has {found} bytes instead of {size_bytes}; "
            "copy or compile it again"
        )
