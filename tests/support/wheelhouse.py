"""Wheels of what is installed here: what an index would give, without one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def fill(folder: Path, names: Sequence[str]) -> Path:
    """Write a wheel of each distribution, and of all that they require here."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, done = list(names), set[str]()
    while waiting:
        name = re.sub("[-_.]+", "-", waiting.pop()).lower()
        if name in done:
            continue
        done.add(name)
        distribution = metadata.distribution(name)
        _write(folder, distribution)
        waiting += [
            re.split(r"[^A-Za-z0-9._-]", line)[0]
            for line in distribution.requires or []
            if ";" not in line
        ]
    return folder


def part(folder: Path, name: str, members: Sequence[str], size: int | None = None) -> None:
    """Write a wheel of these files of a distribution alone; cut to a size, if one is given."""
    distribution = metadata.distribution(name)
    with zipfile.ZipFile(folder / _file_name(distribution), "w") as archive:
        for file in distribution.files or []:
            content = Path(str(file.locate()))
            if file.as_posix() in members:
                archive.writestr(file.as_posix(), content.read_bytes()[:size])
            elif file.parent.name.endswith(".dist-info") and file.name in ("METADATA", "WHEEL"):
                archive.write(content, file.as_posix())


def _file_name(distribution: metadata.Distribution) -> str:
    about = distribution.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (.*)$", about, re.MULTILINE)
    first = tags[0].split("-")
    platforms = ".".join(sorted({tag.split("-")[2] for tag in tags}))
    pythons = ".".join(sorted({tag.split("-")[0] for tag in tags}))
    name = re.sub("[-_.]+", "_", distribution.metadata["Name"])
    return f"{name}-{distribution.version}-{pythons}-{first[1]}-{platforms}.whl"


def _write(folder: Path, distribution: metadata.Distribution) -> None:
    path = folder / _file_name(distribution)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in distribution.files or []:
            place, inside = Path(str(file.locate())), file.parts[0] != ".."
            if inside and "__pycache__" not in file.parts and place.is_file():
                archive.write(place, file.as_posix())
