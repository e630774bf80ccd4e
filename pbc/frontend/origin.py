"""Where a bundle's model came from on the machine that compiled it: kept there, never shipped.

A bundle names the files that it was made from, and their digests. Their folders say who compiled
it, and of which photos, and are nobody else's affair.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pbc.util import strict_json
from pbc.util.atomic import replace_bytes

SEARCH_PATH = "PBC_WEIGHTS"
"""The environment variable with folders to look for weights in, separated as in PATH."""

_CHUNK_BYTES = 1 << 20
# Options whose values tell of private photos by their very name.
_HIDDEN = {"--data": "DATA", "--calibration": "IMAGES", "--dump-ir": "DIR"}
# A model's name may hold a slash that is none of a path.
_ZOOS = ("hf-hub:", "timm:", "torchvision:")


@dataclass(frozen=True)
class Origin:
    """Absolute paths of a bundle's model file and weights, "" for what is no file."""

    digest: str
    model: str = ""
    weights: str = ""

    @classmethod
    def of(cls, digest: str, model: object, weights: str) -> Origin:
        """Return the origin of a bundle compiled from a model's name and --weights, as given."""
        file, colon, factory = (
            str(model).rpartition(":") if isinstance(model, str) else ("", "", "")
        )
        named = f"{Path(file).resolve()}{colon}{factory}" if file.endswith(".py") else ""
        path = Path(weights)
        return cls(digest, named, str(path.resolve()) if path.is_file() else "")

    def save(self, bundle: Path) -> None:
        """Write beside the bundle, for this user alone; nothing where nothing was a file."""
        place = _place(bundle)
        if self.model or self.weights:
            replace_bytes(place, (json.dumps(asdict(self), indent=1) + "\n").encode())
        else:
            place.unlink(missing_ok=True)

    @classmethod
    def load(cls, bundle: Path, digest: str) -> Origin:
        """Read what was saved beside a bundle; empty where there is none, or of another bundle."""
        try:
            found = cls(**strict_json.load(_place(bundle)))
        except (OSError, ValueError, TypeError):
            return cls(digest)
        return found if found.digest == digest else cls(digest)


def _place(bundle: Path) -> Path:
    return bundle.with_name(f".{bundle.name}.origin.json")


def nameless(words: Sequence[str]) -> list[str]:
    """Return the words of a command without folders of this machine: files by their names."""
    told, before = [], ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if before in _HIDDEN:
            told.append(_HIDDEN[before])
        elif equals and option in _HIDDEN:
            told.append(f"{option}={_HIDDEN[option]}")
        else:
            told.append(f"{option}{equals}{without_folder(value)}")
        before = word
    return told


def without_folder(word: str) -> str:
    """Return a path's last part; words that are no path, as a zoo's names, stay."""
    if word.startswith(_ZOOS) or (os.sep not in word and not word.startswith("~")):
        return word
    name, at_equals, place = word.rpartition("=")  # NAME=PATH
    return f"{name}{at_equals}{Path(place).name}"


def weights_named(name: str, digest: str, places: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of this digest: places that are files, or folders to look in.

    In a folder the file of that name comes first, then its other .safetensors files.
    """
    for place in places:
        files = [place / name, *sorted(place.glob("*.safetensors"))] if place.is_dir() else [place]
        for file in dict.fromkeys(files):
            if file.is_file() and _sha256(file) == digest:
                yield file


def search_path() -> list[Path]:
    """Return the folders of the search path."""
    return [Path(part) for part in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if part]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
