"""Recipes: the options of a compilation as a TOML file, to keep and to share.

    model = "resnet50"
    target = "raspberry-pi-5"
    min-cost = 0.4

A key is an option's long name; what is on the command line goes before what is in the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pbc.errors import PbcError, UsageError, suggest
from pbc.util.atomic import replace_bytes
from pbc.util.files import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PATH = click.Path(path_type=Path)
# What a recipe is not about: where it comes from and goes to, and what is printed.
_MOST_BYTES = 1 << 20
_APART = ("recipe", "save_recipe", "dry_run", "as_json")


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--recipe` and `--save-recipe`; it takes neither as an argument."""
    read = click.option(
        "--recipe",
        type=_PATH,
        metavar="FILE.toml",
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Take options from a file; those given here go before.",
    )
    save = click.option(
        "--save-recipe",
        type=_PATH,
        metavar="FILE.toml",
        help="Write the options to a file that --recipe takes.",
    )
    return read(save(command))


def save_recipe(path: Path, context: click.Context) -> None:
    """Write what was given, on the command line or by a recipe, as a recipe."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    lines = [
        f"{_key(parameter)} = {_toml(context.params[parameter.name])}\n"
        for parameter in context.command.params
        if parameter.name in context.params
        and parameter.name not in _APART
        and context.get_parameter_source(parameter.name) in given
    ]
    replace_bytes(path, "".join(lines).encode(), mode=0o644)


def _read(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        found = tomllib.loads(read_bytes(path, _MOST_BYTES).decode())
    except OSError as error:
        raise PbcError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise PbcError(f"{path} is no TOML: {error}") from error
    known = {_key(p): p for p in context.command.params if p.name not in _APART}
    defaults = {}
    for name, value in found.items():
        if name not in known:
            raise UsageError(f"{path}: {suggest('option', name, known)}")
        if isinstance(value, dict) or (isinstance(value, list) and not known[name].multiple):
            raise UsageError(f"{path}: {name} is {value!r}; expected one value")
        defaults[known[name].name] = value
    context.default_map = {**(context.default_map or {}), **defaults}


def _key(parameter: click.Parameter) -> str:
    """Return the long name of an option without its dashes; an argument's own name."""
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False)  # TOML's basic strings are JSON's
