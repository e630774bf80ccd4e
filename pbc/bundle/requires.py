"""Requirements of a bundle on its board: by name, the versions that will do (PEP 440).

Nothing else is understood: a URL, a marker, an option or an extra would reach pip, which installs
what it is told to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pbc.errors import PbcError

_LONGEST = 200
_VERSION = (
    r"(?:\d+!)?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?"
    r"(?:\+[a-z0-9]+(?:\.[a-z0-9]+)*)?"
)
_CLAUSE = rf"(?:(?:~=|==|!=|<=|>=|<|>) ?{_VERSION}|(?:==|!=) ?{_VERSION}\.\*)"
_SPECIFIERS = re.compile(rf"{_CLAUSE}(?:, ?{_CLAUSE})*")
_BARE = re.compile(_VERSION)
_C_LIBRARY = re.compile(rf"(?:glibc|musl|bionic)(?:{_CLAUSE}(?:, ?{_CLAUSE})*)?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")

C_LIBRARY = "libc"
FACTS = ("python", C_LIBRARY, "cuda", "jetpack")
"""Names of what a board is asked for; any other is a package."""


def is_versions(name: str, wanted: object) -> bool:
    """Return whether this names versions of what is required: `>=2.9,<3`.

    The C library's are after its own name (`glibc>=2.28`); a fact of a board may be one version.
    """
    if not isinstance(wanted, str) or len(wanted) > _LONGEST:
        return False
    if name == C_LIBRARY:
        return _C_LIBRARY.fullmatch(wanted) is not None
    if name in FACTS and _BARE.fullmatch(wanted):
        return True
    return _SPECIFIERS.fullmatch(wanted) is not None


def checked(requires: Mapping[str, Any]) -> None:
    """Refuse what is no list of names and versions; raises PbcError with the first that is not."""
    for name, wanted in requires.items():
        if len(name) > _LONGEST or not _NAME.fullmatch(name):
            raise PbcError(f"requires names {name!r}; a requirement has the name of one package")
        if not is_versions(name, wanted):
            like = "glibc>=2.28" if name == C_LIBRARY else ">=2.9,<3"
            raise PbcError(f"requires {name!r} as {wanted!r}; only versions are read, like {like}")


def told_apart(requires: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Tell the versions that can be compared from words for whoever owns the board."""
    versions = {name: wanted for name, wanted in requires.items() if is_versions(name, wanted)}
    words = {name: wanted for name, wanted in requires.items() if name not in versions}
    return versions, words
