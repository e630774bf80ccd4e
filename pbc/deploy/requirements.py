"""Requirements of a bundle on its board, read from the distributions that bring them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pbc import plugins
from pbc.bundle.requires import FACTS, checked
from pbc.errors import PbcError
from pbc.util.extras import EXTRAS

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?P<rest>[^;]*)(?:;(?P<marker>.*))?")
_EXTRA = re.compile(r"""(?:\s+and\s+)?\bextra\s*==\s*['"]([^'"]+)['"]""")
_DEVICE = "device"


def device_requirements(manifest: Mapping[str, Any], *, trust: bool = False) -> list[str]:
    """Return what pip is to collect beside pbc: the core's dependencies, and the engine's.

    The engine's are those of the extra for devices that names a package of the manifest's
    `requires`; the versions that the manifest asks for count too. An engine that another
    distribution brings needs that one, which says itself what it needs. trust: with what verifies
    signatures.
    """
    entry = plugins.find("pbc.engines", manifest["engine"])
    core, extras = own_requirements()
    if trust:
        core += extras["trust"]
    if entry.distribution != "pbc":
        return [*core, f"{entry.distribution}=={entry.version}"]
    checked(manifest["requires"])
    wanted = {_normal(name): spec for name, spec in manifest["requires"].items()}
    _refuse_unknown(manifest["requires"], core, extras)
    for extra, requirements in sorted(extras.items()):
        names = {_normal(requirement_name(requirement)) for requirement in requirements}
        if extra.startswith(_DEVICE) and names & wanted.keys():
            exact = [f"{name}{wanted[name]}" for name in sorted(names & wanted.keys())]
            return [*core, *requirements, *exact]
    raise PbcError(
        f"no extra of pbc brings engine {manifest['engine']!r} to a device; "
        f"the bundle requires {', '.join(manifest['requires'])}"
    )


def _refuse_unknown(
    requires: Mapping[str, str], core: list[str], extras: Mapping[str, list[str]]
) -> None:
    """Refuse names that are neither facts of a board nor packages that pbc itself asks for."""
    packages = [requirement_name(line) for lines in (core, *extras.values()) for line in lines]
    known = {*map(_normal, packages), *map(_normal, EXTRAS), *FACTS}
    for name in requires:
        if _normal(name) not in known:
            raise PbcError(f"the bundle requires {name!r}, which this pbc does not know")


def own_requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the requirements of pbc itself, and those of each extra."""
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("pbc") or []:
        found = _parsed(line)
        marker = found["marker"] or ""
        extra = _EXTRA.search(marker)
        condition = _EXTRA.sub("", marker).strip()
        bare = f"{found['name']}{found['rest'].strip()}" + (f"; {condition}" if condition else "")
        if extra is None:
            core.append(line)
        else:
            extras.setdefault(extra[1], []).append(bare)
    return core, extras


def requirement_name(requirement: str) -> str:
    """Return the name of the distribution that a requirement asks for."""
    return _parsed(requirement)["name"]


def _parsed(requirement: str) -> re.Match[str]:
    found = _REQUIREMENT.match(requirement)
    assert found is not None
    return found


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
