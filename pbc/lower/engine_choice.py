"""The engine that a bundle is compiled for: as asked, as the target prefers, as installed here."""

from __future__ import annotations

from pbc import plugins
from pbc.errors import PbcError, UsageError, suggest
from pbc.lower.backend import GROUP, backend
from pbc.lower.lowering import Tunes
from pbc.target import Target
from pbc.util.extras import EXTRAS

DEFAULT_ENGINE = "pytorch"


def choose_engine(target: Target, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the engine to lower to, and a note when it is not the one that the target prefers.

    Raises UsageError for an engine that was asked for and that the target or pbc does not have, and
    PbcError for one whose packages are not installed here.
    """
    available = plugins.entries(GROUP)
    if asked is not None:
        if asked in target.refused:
            raise UsageError(
                f"engine {asked!r} does not run on {target.name}: {target.refused[asked]}"
            )
        if asked not in available and asked not in target.engines:
            raise UsageError(suggest("engine", asked, {*available, *target.engines}))
        if asked not in target.engines:
            raise UsageError(
                f"engine {asked!r} does not run on {target.name}, which allows "
                f"{', '.join(target.engines)}"
            )
        if asked not in available:
            raise UsageError(
                f"engine {asked!r} is not installed (available: {', '.join(available)})"
            )
        if (needs := _needs(available[asked])) is not None:
            raise PbcError(f"compiling for engine {asked!r} {needs}")
        return asked, ()
    for engine in dict.fromkeys((target.engine, *target.engines, DEFAULT_ENGINE)):
        if engine not in available or engine in target.refused:
            continue
        if _needs(available[engine]) is not None:
            continue
        if engine == target.engine:
            return engine, ()
        needs = _needs(available[target.engine]) if target.engine in available else None
        wanted = f"{target.name} prefers engine {target.engine}, which"
        return engine, (f"{wanted} {needs or 'is not installed'}: using {engine}",)
    found = {name: _needs(available[name]) for name in target.engines if name in available}
    missing = ", ".join(f"{name} {found.get(name, 'is not installed')}" for name in target.engines)
    raise PbcError(f"no engine of {target.name} can be compiled for here: {missing}")


def require_tuning(target: Target, engine: str) -> None:
    """Raise UsageError where an engine's code for a target cannot be tuned here."""
    lowering = backend(engine).lowering() if backend(engine).tunes else None
    if not isinstance(lowering, Tunes):
        able = ", ".join(name for name in plugins.entries(GROUP) if backend(name).tunes)
        raise UsageError(
            f"--tune does nothing for engine {engine!r}, whose code is not made here; engines with "
            f"code to tune: {able or 'none is installed'}"
        )
    reason = lowering.untunable(target)
    if reason is not None:
        raise UsageError(reason)


def _needs(entry: plugins.Plugin) -> str | None:
    """Return what is missing here to lower to this engine, in words; None where nothing is."""
    missing = entry.load().missing()
    if not missing:
        return None
    extras = sorted({EXTRAS[package] for package in missing if package in EXTRAS})
    how = f": pip install 'pbc[{','.join(extras)}]'" if extras else ""
    return f"needs {', '.join(missing)}{how}"
