"""Which folders are the classes: below wrapping folders, and in the train part of a split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbc.data.archive import list_zip
from pbc.data.folder import list_folder
from pbc.data.listing import Listing, suffix
from pbc.errors import PbcError

_TRAIN = ("train", "training")
# In order: the first that is there is what a model is evaluated on.
_HELD_OUT = (
    "val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout", "test",
    "testing", "pred", "predict",
)  # fmt: skip
# Behind such a word, or beside it, as in `trainset`, `test_images` and `seg_train`.
_PART_WORD = re.compile(rf"({'|'.join((*_TRAIN, *_HELD_OUT))})(set|data|images|imgs|photos)?")
# Folders that hold photos of all classes, whose labels are elsewhere.
_HOLDERS = frozenset({"data", "image", "images", "img", "imgs", "jpegimages", "photos", "pictures"})
_NAMED_MOST = 5


@dataclass(frozen=True)
class Classes:
    """The photos of every class, sorted, by name in the listing.

    note: a line on how the folders were understood; empty where they are the classes themselves.
    outside: photos of the data that belong to no class.
    """

    members: dict[str, list[str]]
    note: str
    outside: tuple[str, ...]


@dataclass
class _Folder:
    """The photos and folders right in a folder; `others` tells whether other files are there."""

    photos: list[str] = field(default_factory=list)
    folders: dict[str, _Folder] = field(default_factory=dict)
    others: bool = False

    def everything(self) -> Iterator[str]:
        """Yield all photos below."""
        yield from self.photos
        for folder in self.folders.values():
            yield from folder.everything()

    @property
    def empty(self) -> bool:
        """Whether no photo is below."""
        return next(self.everything(), None) is None

    @property
    def of_classes(self) -> bool:
        """Whether photos are in folders of it and none is right in it."""
        return not self.photos and not self.empty


def listed(path: Path) -> Listing[Any]:
    """List the photos of a folder or a zip file; raises PbcError for anything else."""
    if path.is_dir():
        return list_folder(path)
    if path.is_file():
        return list_zip(path)
    raise PbcError(f"no data at {path}; give a folder or a zip file of images")


def classes(listing: Listing[Any], *, held_out: bool = False) -> Classes:
    """Find the class folders of labelled photos.

    Folders that hold nothing but one folder of class folders are looked through. Of a data set
    with a train part and others (val, validation, dev, eval, test and the like), the train part
    counts or, if `held_out`, the first of the others; one without parts counts whole either way.
    The parts may lie around the class folders or in each of them.
    Raises PbcError if that is not what the data looks like.
    """
    top, outside = _unwrapped(_tree(listing))
    top = _parts_outside(top)
    parts = _parts(top)
    notes = []
    if not parts:
        _refuse_other_labels(listing, top)
    if parts:
        part = _held_out_of(parts) if held_out else _first(parts, _TRAIN)
        if part is None:
            raise PbcError(
                f"{listing.root} has photos to train on and no class folders in another part; "
                f"expected them in {_HELD_OUT[0]}/"
            )
        shown = ", ".join(f"{other}/" for other in sorted(parts))
        notes.append(f"{listing.root} has the parts {shown}: {part}/ is read")
        top, inner = _unwrapped(parts[part])
        outside += inner
        _refuse_other_labels(listing, top)
    members = {label: sorted(top.folders[label].everything()) for label in sorted(top.folders)}
    _check(listing, members)
    notes += _doubts(top)
    return Classes(members, "; ".join(notes), (*outside, *sorted(top.photos)))


def labelled(path: Path | str) -> Classes:
    """Return the classes of a folder of class folders, or a zip of them, without decoding any."""
    return classes(listed(Path(path)))


def class_names(path: Path | str) -> list[str]:
    """Return the sorted class names of a folder of class folders, or a zip of them."""
    return list(labelled(path).members)


def has_held_out(path: Path | str) -> bool:
    """Return whether a data set has labelled photos apart from those to train on."""
    top, _ = _unwrapped(_tree(listed(Path(path))))
    return _held_out_of(_parts(_parts_outside(top))) is not None


def _unwrapped(folder: _Folder) -> tuple[_Folder, tuple[str, ...]]:
    """Look through folders around the only folder of class folders; and the photos beside it.

    A folder beside it with nothing in it could be a class that waits for photos: then it is none.
    """
    outside: tuple[str, ...] = ()
    while True:
        filled = [inner for inner in folder.folders.values() if not inner.empty]
        rest = [inner for inner in folder.folders.values() if inner.empty]
        if len(filled) != 1 or not filled[0].of_classes or not all(map(_has_others, rest)):
            return folder, outside
        outside += tuple(sorted(folder.photos))
        folder = filled[0]


def _has_others(folder: _Folder) -> bool:
    return folder.others or any(map(_has_others, folder.folders.values()))


def _parts_outside(top: _Folder) -> _Folder:
    """Turn class/part/photo into part/class/photo, where every class has a part to train on."""
    inner = [
        {name for name, folder in label.folders.items() if not folder.empty}
        for label in top.folders.values()
    ]
    if any(label.photos for label in top.folders.values()) or not inner:
        return top
    if not all(names and all(map(_part_word, names)) for names in inner):
        return top
    trains = all(any(_part_word(name) in _TRAIN for name in names) for names in inner)
    if not trains or len(set[str]().union(*inner)) < 2:
        return top
    turned = _Folder(top.photos, others=top.others)
    for name, label in top.folders.items():
        for part, folder in label.folders.items():
            turned.folders.setdefault(part, _Folder()).folders[name] = folder
    return turned


def _refuse_other_labels(listing: Listing[Any], top: _Folder) -> None:
    """Refuse photos whose folders are no classes: their labels are in files, which pbc reads not.

    So are those of detection, in images/train and images/val, and of a table beside images/.
    """
    filled = [name for name, folder in top.folders.items() if not folder.empty]
    flat = not any(top.folders[name].of_classes for name in filled)
    words = {_part_word(name) for name in filled}
    in_parts = len(filled) > 1 and None not in words and not words.isdisjoint(_TRAIN)
    in_one = len(filled) == 1 and filled[0].casefold() in _HOLDERS
    if flat and (in_parts or in_one):
        raise PbcError(
            f"{listing.root} has its photos in {_quoted(sorted(filled))}, and no class folders; "
            "expected one folder per class (labels are not read from files)"
        )


def _parts(folder: _Folder) -> dict[str, _Folder]:
    """Return the parts of a split data set that have photos, by name; none if it is not split."""
    filled = {name: inner for name, inner in folder.folders.items() if not inner.empty}
    # In other words too (`seg_train`, `test_set`) where every folder has one: else it is a class's.
    whole = all(map(_part_word, filled))
    parts = {
        name: inner
        for name, inner in filled.items()
        if whole or _part_word(name) == name.casefold()
    }
    train = _first(parts, _TRAIN)
    split = train is not None and parts[train].of_classes and len(parts) > 1
    return parts if split else {}


def _held_out_of(parts: dict[str, _Folder]) -> str | None:
    labelled = {name: folder for name, folder in parts.items() if folder.of_classes}
    return _first(labelled, _HELD_OUT)


def _first(parts: dict[str, _Folder], order: tuple[str, ...]) -> str | None:
    """Return the part that comes first in an order of names."""
    spelled = {_part_word(name): name for name in sorted(parts, reverse=True)}
    return next((spelled[word] for word in order if word in spelled), None)


def _part_word(name: str) -> str | None:
    """Return which part of a data set a folder's name says that it is; None for no part."""
    words = re.findall("[a-z]+", name.casefold())
    found = [match[1] for match in map(_PART_WORD.fullmatch, words) if match]
    return found[0] if len(found) == 1 else None


def _doubts(top: _Folder) -> Iterator[str]:
    """Yield what may be meant otherwise: classes that are spelled alike, or that hold classes."""
    alike: dict[str, list[str]] = {}
    for name in sorted(top.folders):
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield f"{_quoted(names)} are classes of their own: case or spaces tell them apart"
    inner = {
        frozenset(name for name, folder in label.folders.items() if not folder.empty)
        for label in top.folders.values()
    }
    if len(top.folders) > 1 and len(inner) == 1 and len(names := sorted(*inner)) > 1:
        yield (
            f"every class folder holds the folders {_quoted(names)}: if these are the classes, "
            f"give one of {_quoted(sorted(top.folders))} as the data"
        )


def _quoted(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_MOST} more" if len(names) > _NAMED_MOST else ""
    return ", ".join(map(repr, names[:_NAMED_MOST])) + more


def _check(listing: Listing[Any], members: dict[str, list[str]]) -> None:
    if not members:
        raise PbcError(
            f"{listing.root} has no class folders; expected one folder per class"
            + _ignored_zips(listing)
        )
    if not any(members.values()):
        raise PbcError(
            f"{listing.root} has no images in its {len(members)} class folders"
            + _ignored_zips(listing)
        )
    empty = [name for name, photos in members.items() if not photos]
    if empty:
        raise PbcError(
            f"class folder {empty[0]!r} of {listing.root} has no images"
            + (f" ({len(empty)} such folders)" if len(empty) > 1 else "")
            + "; add some or remove it"
        )


def _ignored_zips(listing: Listing[Any]) -> str:
    zips = sum(suffix(name) == ".zip" for name, _ in listing.ignored)
    return f"; it has {zips} zip files, unpack them" if zips else ""


def _tree(listing: Listing[Any]) -> _Folder:
    root = _Folder()

    def at(name: str) -> _Folder:
        folder = root
        for part in filter(None, name.split("/")):
            folder = folder.folders.setdefault(part, _Folder())
        return folder

    for name in sorted(listing.folders):
        at(name)
    for name in listing.others:
        at(name).others = True
    for name in listing.photos:
        at(name.rpartition("/")[0]).photos.append(name)
    return root
