"""Find plugins by their entry points, and import none of them until asked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pbc.errors import PbcError, UsageError, suggest
from pbc.util import source
from pbc.util.interrupt import held_interrupt


@dataclass(frozen=True)
class Group:
    """Entry point group: the word that messages use for a member, and what a member has to be.

    protocol: the dotted name of the class that says so, which may need a package that is not
    installed here. sentence: the same in words.
    """

    name: str
    word: str
    protocol: str
    sentence: str


GROUPS = {
    group.name: group
    for group in (
        Group(
            "pbc.passes",
            "pass",
            "pbc.ir.pipeline.Pass",
            "a frozen dataclass, callable from Program to Program",
        ),
        Group(
            "pbc.targets",
            "target",
            "pbc.target.Target",
            "a device as data, or a function that returns one",
        ),
        Group(
            "pbc.strategies",
            "strategy",
            "pbc.frontend.strategy.Strategy",
            "a class that says which parameters train, and inserts what trains besides",
        ),
        Group(
            "pbc.lowerings",
            "lowering",
            "pbc.lower.backend.Backend",
            "the facts of an engine that programs are lowered to, under its name",
        ),
        Group(
            "pbc.engines",
            "engine",
            "pbc.runtime.engines.Engine",
            "a class that loads bundles on the device, to run and to train",
        ),
        Group(
            "pbc.schedulers",
            "scheduler",
            "pbc.runtime.schedulers.Scheduler",
            "a class that forms the mini-batches of a run and routes them to levels",
        ),
        Group(
            "pbc.selectors",
            "selector",
            "pbc.runtime.selectors.Selector",
            "a class that chooses which tensors train, by importance and time",
        ),
        Group(
            "pbc.callbacks",
            "callback",
            "pbc.callbacks.CallbackPlugin",
            "a class that is made for a training run, and called with each of its events",
        ),
        Group(
            "pbc.rivals",
            "rival",
            "pbc.bench.rival.Rival",
            "a class that trains in its own way, for `pbc bench` to compare",
        ),
        Group(
            "pbc.tvm_schedules",
            "TVM schedule",
            "pbc.targets.tvm.build.Schedule",
            "a function of a TVM module that schedules it for the kinds of target in its `kinds`",
        ),
        Group(
            "pbc.device_libraries",
            "library for devices",
            "pbc.deploy.libraries.DeviceLibraries",
            "shared libraries that an engine needs on a board and no wheel brings, by its name",
        ),
    )
}
"""All groups, by name: the one place that says what each kind of plugin is."""


@dataclass(frozen=True)
class Plugin:
    """Installed plugin: its place, and the distribution that brought it."""

    name: str
    group: str
    value: str
    distribution: str
    version: str

    @property
    def module(self) -> str:
        """Return the dotted name of the module that holds the plugin."""
        return self.value.partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """Return the name of the plugin within its module."""
        return self.value.partition(":")[2].strip()

    def load(self) -> Any:
        """Import the module and return the object it holds.

        Raises PbcError where there is none, or one that lacks what the group's protocol asks for.
        """
        try:
            with held_interrupt():
                module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise  # what the plugin needs is missing, not the plugin itself
            raise PbcError(self._broken(str(error))) from error
        if not hasattr(module, self.attribute):
            raise PbcError(self._broken(f"the module holds no {self.attribute!r}"))
        loaded = getattr(module, self.attribute)
        if self.group in GROUPS and (lacking := _lacking(loaded, GROUPS[self.group].protocol)):
            group = GROUPS[self.group]
            raise PbcError(
                self._broken(
                    f"it has no {', '.join(lacking)}, which {group.protocol} declares: "
                    f"it has to be {group.sentence}"
                )
            )
        return loaded

    def summary(self) -> str:
        """Return the first line of the plugin's docstring, read without running its module."""
        return source.summary(self.module, self.attribute)

    def literals(self, *attributes: str) -> dict[str, Any] | None:
        """Return class attributes that the plugin's source spells out, read without running it.

        None where some are computed or may be inherited; those that are not there are left out.
        """
        return source.literals(self.module, self.attribute, attributes)

    def _broken(self, reason: str) -> str:
        origin = f"{self.distribution} {self.version}"
        return f"{kind(self.group)} {self.name!r} of {origin} points at {self.value}: {reason}"


def kind(group: str) -> str:
    """Return the word for a member of the group: 'pass' for 'pbc.passes'."""
    return GROUPS[group].word if group in GROUPS else group


def entries(group: str) -> dict[str, Plugin]:
    """Return the installed plugins of a group by name, in order of their names.

    Two distributions that claim one name are an error, not a matter of luck.
    """
    found: dict[str, Plugin] = {}
    for point in metadata.entry_points(group=group):
        origin, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
        plugin = Plugin(point.name, group, point.value, origin, version)
        other = found.setdefault(plugin.name, plugin)
        if other != plugin:
            raise PbcError(
                f"two distributions bring a {kind(group)} named {plugin.name!r}: "
                f"{other.distribution} {other.version} and {origin} {version}; uninstall one"
            )
    return dict(sorted(found.items()))


def find(group: str, name: str) -> Plugin:
    """Return the group's plugin of this name."""
    available = entries(group)
    if name not in available:
        raise UsageError(suggest(kind(group), name, available))
    return available[name]


def load(group: str, name: str) -> Any:
    """Return the object that the group's plugin of this name stands for."""
    return find(group, name).load()


def _lacking(loaded: Any, protocol: str) -> list[str]:
    """Return the names that a protocol of pbc's declares and a plugin does not have.

    The protocol is read, not imported, and another package's is not even looked for: finding it
    could import all of that package. Class attributes have to be there already, methods where the
    plugin is a class.
    """
    module, _, name = protocol.rpartition(".")
    if module.partition(".")[0] != "pbc":
        return []
    attributes, methods = source.protocol_members(module, name)
    lacking = [name for name in attributes if not hasattr(loaded, name)]
    if isinstance(loaded, type):
        # Every class is callable: what its instances have is in the classes that it is made of.
        own = {name for base in loaded.__mro__ if base is not object for name in vars(base)}
        lacking += [name for name in methods if name not in own]
    return lacking
