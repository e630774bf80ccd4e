"""Names of what systems and programs leave between photos: never photos nor classes."""

from __future__ import annotations

SYSTEM = "left by a system or program"
HIDDEN = "hidden"  # `..` in a zip file too

_NAMES = frozenset(
    (
        "#recycle",  # Synology
        "#snapshot",
        "@eadir",
        "@tmp",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "$recycle.bin",  # Windows
        "recycler",
        "recycled",
        "system volume information",
        "desktop.ini",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "picasa.ini",
        "__macosx",  # macOS
        ".ds_store",
        "icon\r",
        "ipod photo cache",
        "lost.dir",  # Android
        "lost+found",  # Linux
        "__pycache__",
    )
)
# Lightroom's previews, Capture One's and iPhoto's.
_SUFFIXES = (".lrdata", ".lrcat", ".cop", ".cot", ".photolibrary", ".aplibrary")
_STARTS = ("._", "synofile_thumb", "synophoto_thumb")


def reason(name: str) -> str | None:
    """Return why a file or folder of this name is ignored; None if it is not."""
    lowered = name.lower()
    recovered = lowered.startswith("found.") and lowered[6:].isdigit()  # by a check of a FAT disk
    if lowered in _NAMES or lowered.endswith(_SUFFIXES) or lowered.startswith(_STARTS) or recovered:
        return SYSTEM
    return HIDDEN if name.startswith(".") else None
