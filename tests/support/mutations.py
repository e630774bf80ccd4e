"""Mutations of bundles and personal models that know their structure: hashes are made anew after.

An attacker who edits a manifest, a graph or a header makes every digest right again; what flips
bits alone is met by the digests. Everything follows from one seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_mutations
from PIL import Image

from pbc.bundle import manifest_digest

Json = Any
Place = tuple[Any, ...]
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
FORMATS = ("png", "jpeg", "gif", "webp", "tiff", "bmp")
VALUES: tuple[Json, ...] = (
    None, True, False, 0, 1, -1, 2**24, 2**26, 2**30, 2**31, 2**63, 10**30, 10**400, 0.5, -1.5,
    1e300, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", ESCAPE, "\ud800", "\u202e",
    "\u200f", "e\u0301" * 200, "\x00", "\ufeff", "\n\nerror: two", "%s%n{0}", "[red]x[/red]",
    "a" * 100_000, [], {}, [None], [[]], {"": None}, {"ref": "x"}, [10**6, 10**6],
)  # fmt: skip


def places(value: Json, at: Place = ()) -> Iterator[Place]:
    """Every place in a value, but the whole."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    for key, item in items:
        yield from places(item, (*at, key))


def mutated(value: Json, chance: random.Random) -> Json:
    """Change one to three places: another value, none, twice, or what stands elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return chance.choice(VALUES)
        at = chance.choice(found)
        holder = value
        for key in at[:-1]:
            holder = holder[key]
        kind = chance.randrange(5)
        if kind == 0:
            del holder[at[-1]]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(at[-1], holder[at[-1]])
        elif kind == 2:
            other = value
            for key in chance.choice(found):
                if not isinstance(other, dict | list) or key not in (
                    other if isinstance(other, dict) else range(len(other))
                ):
                    break
                other = other[key]
            holder[at[-1]] = json.loads(json.dumps(other))
        elif kind == 3 and isinstance(holder[at[-1]], int | float):
            holder[at[-1]] = holder[at[-1]] * chance.choice((-1, 2, 1000, 10**9)) + 1
        else:
            holder[at[-1]] = chance.choice(VALUES)
    return value


def text(value: Json) -> bytes:
    """JSON as an attacker writes it: what Python's own writer would refuse too."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes, cut, or repeat."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 8)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    kind = chance.randrange(4)
    if kind == 0:
        del changed[chance.randrange(len(changed) + 1) :]
    elif kind == 1:
        changed += changed[: chance.randrange(len(changed) + 1)]
    return bytes(changed)


def safetensors(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file, its facts as JSON within JSON too."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = header.get("__metadata__", {}).get("facts")
    if facts is not None and chance.random() < 0.7:
        header["__metadata__"]["facts"] = text(mutated(json.loads(facts), chance)).decode(
            "utf-8", "replace"
        )
        new = json.dumps(header).encode()
    else:
        new = text(mutated(header, chance))
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


def file(name: str, data: bytes, chance: random.Random) -> bytes:
    """Change one file by its kind."""
    if chance.random() < 0.15:
        return flipped(data, chance)
    if name.endswith(".json"):
        return text(mutated(json.loads(data), chance))
    if name.endswith(".jsonl"):
        lines = data.splitlines()
        return b"\n".join([*lines[:-1], text(mutated(json.loads(lines[-1]), chance))])
    if name.endswith(".safetensors"):
        return safetensors(data, chance)
    if name.endswith(".onnx"):
        return onnx_mutations.mutated(data, chance)
    return flipped(data, chance)


def photo(format_: str, chance: random.Random) -> bytes:
    """Return a picture of a format with a few bytes changed, most of them in its header."""
    picture = Image.new(chance.choice(("RGB", "L")), (24, 20), 100)
    whole = io.BytesIO()
    picture.save(whole, format_)
    data = bytearray(whole.getvalue())
    for _ in range(chance.randrange(1, 5)):
        data[chance.randrange(min(len(data), 96))] = chance.choice((0, 1, 127, 255))
    return flipped(bytes(data), chance) if chance.random() < 0.3 else bytes(data)


def write_bundle(
    path: Path, manifest: Json, files: dict[str, bytes], chance: random.Random
) -> None:
    """Write a mutated bundle: of its manifest, of one of its files, or of the zip around them."""
    kind = chance.random()
    files = dict(files)
    if kind < 0.45:
        manifest = mutated(manifest, chance)
    elif kind < 0.9:
        # Libraries are code: who runs them trusts them.
        name = chance.choice(sorted(name for name in files if not name.endswith(".so")))
        files[name] = file(name, files[name], chance)
    data = _sealed(manifest, files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"manifest.json": data, **files}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    if kind >= 0.9:
        path.write_bytes(flipped(path.read_bytes(), chance))


def _sealed(manifest: Json, files: dict[str, bytes]) -> bytes:
    """Return a manifest with every hash made anew, where it still is one."""
    if not isinstance(manifest, dict):
        return text(manifest)
    facts = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        for name, data in files.items()
    }
    full = {"schema": 2, "files": facts, **manifest}
    digest: Callable[[Json], str] = manifest_digest
    try:
        full["digest"] = digest(full)
    except (ValueError, UnicodeError):
        full["digest"] = "0" * 64
    return text(full)
