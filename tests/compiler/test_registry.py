from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pbc import plugins
from pbc.errors import PbcError, UsageError
from pbc.target import Target, load_target

PASS = '''
"""A module of somebody else."""
import module_that_is_not_installed

class Shrink:
    """Make everything smaller.

    And more of this.
    """
'''


def test_entries_are_listed_by_name_without_importing_them() -> None:
    found = plugins.entries("pbc.passes")
    assert list(found) == sorted(found)
    assert found["fold-batch-norm"].value == "pbc.passes.fold_batch_norm:FoldBatchNorm"
    assert found["fold-batch-norm"].distribution == "pbc"


def test_every_group_has_a_word_and_a_member() -> None:
    for name, group in plugins.GROUPS.items():
        assert group.name == name
        assert group.word
        assert plugins.entries(name), name


def test_every_protocol_is_where_the_table_says() -> None:
    for group in plugins.GROUPS.values():
        module, _, attribute = group.protocol.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type), group


def test_the_documented_groups_are_those_of_the_table(root: Path) -> None:
    text = (root / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(pbc\.\w+)` \| .*$", text, re.MULTILINE)
    assert rows == list(plugins.GROUPS)
    for group in plugins.GROUPS.values():
        assert f"| `{group.name}` | {group.sentence} | `{group.protocol}` |\n" in text


LACKING = """
class Base:
    stage = "prune"

class Shrink(Base):
    pass

class Stageless:
    def __call__(self, program):
        return program

class Lazy:
    def prepare(self, state): ...
    def run_epoch(self): ...
    def evaluate(self, samples): ...

def function(**options):
    return Shrink()

class Whole(Base):
    def __call__(self, program):
        return program
"""


@pytest.mark.parametrize(
    ("group", "attribute", "lacking"),
    [
        ("pbc.passes", "Shrink", "__call__"),
        ("pbc.passes", "Stageless", "stage"),
        ("pbc.passes", "function", "stage"),
        ("pbc.rivals", "Lazy", "parameters, state, facts"),
        ("pbc.engines", "Shrink", "version, load"),
    ],
)
def test_a_plugin_that_lacks_what_its_protocol_asks_for_is_refused(
    install_plugin: Callable[..., None], group: str, attribute: str, lacking: str
) -> None:
    install_plugin("acme", f"[{group}]\nacme = acme_plugin:{attribute}\n", LACKING)
    asked = plugins.GROUPS[group]
    with pytest.raises(PbcError) as refused:
        plugins.load(group, "acme")
    assert str(refused.value) == (
        f"{asked.word} 'acme' of acme 1.2.3 points at acme_plugin:{attribute}: "
        f"it has no {lacking}, which {asked.protocol} declares: it has to be {asked.sentence}"
    )


def test_what_a_plugin_inherits_counts(install_plugin: Callable[..., None]) -> None:
    install_plugin("acme", "[pbc.passes]\nacme = acme_plugin:Whole\n", LACKING)
    assert plugins.load("pbc.passes", "acme").stage == "prune"


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_everything_in_the_tree_loads_and_says_what_it_is(group: str) -> None:
    for entry in plugins.entries(group).values():
        assert entry.load() is not None
        if group != "pbc.targets":  # a target is data and describes itself
            assert entry.summary(), f"{entry.value} has no docstring"


def test_a_plugin_of_another_distribution_is_found(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin("acme", "[pbc.passes]\nshrink = acme_plugin:Shrink\n", PASS)
    entry = plugins.entries("pbc.passes")["shrink"]
    assert (entry.distribution, entry.version) == ("acme", "1.2.3")
    assert "align" in plugins.entries("pbc.passes")
    assert entry.summary() == "Make everything smaller."
    assert "acme_plugin" not in sys.modules


def test_what_a_plugin_needs_and_is_missing_is_not_hidden(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin("acme", "[pbc.passes]\nshrink = acme_plugin:Shrink\n", PASS)
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_installed"):
        plugins.load("pbc.passes", "shrink")


def test_a_plugin_that_points_at_nothing_is_named(install_plugin: Callable[..., None]) -> None:
    points = "[pbc.engines]\ngone = acme_plugin:Gone\nlost = acme_lost:Lost\n"
    install_plugin("acme", points, "")
    with pytest.raises(PbcError, match=r"engine 'gone' of acme 1\.2\.3 .* holds no 'Gone'"):
        plugins.load("pbc.engines", "gone")
    with pytest.raises(PbcError, match=r"engine 'lost' of acme 1\.2\.3 .* No module named"):
        plugins.load("pbc.engines", "lost")
    assert plugins.entries("pbc.engines")["lost"].summary() == ""


def test_a_target_of_another_distribution_loads(install_plugin: Callable[..., None]) -> None:
    source = (
        "from pbc.target import Target\n"
        "board = Target('acme-one', 'a board', 'aarch64', 'pytorch', ('pytorch',))\n"
        "wrong = 42\n"
    )
    points = "[pbc.targets]\nacme-one = acme_plugin:board\nacme-two = acme_plugin:wrong\n"
    install_plugin("acme", points, source)
    assert load_target("acme-one") == Target(
        "acme-one", "a board", "aarch64", "pytorch", ("pytorch",)
    )
    with pytest.raises(PbcError, match=r"target 'acme-two' is a int, not a pbc\.target\.Target"):
        load_target("acme-two")


def test_two_distributions_with_one_name_are_refused(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin("acme", "[pbc.passes]\nalign = acme_plugin:Shrink\n", PASS)
    with pytest.raises(PbcError, match="two distributions bring a pass named 'align'"):
        plugins.entries("pbc.passes")


def test_an_unknown_name_is_a_usage_error_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="no pass named 'prun'; did you mean 'prune-dims'"):
        plugins.load("pbc.passes", "prun")
    with pytest.raises(UsageError, match="no target named 'jetson-tx3'; did you mean 'jetson-tx2'"):
        load_target("jetson-tx3")


def test_an_interrupt_waits_for_the_import_of_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_extension.py").write_text(
        "import signal\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('initialization failed')\n"
        "plugin = object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugin = plugins.Plugin("slow", "pbc.none", "slow_extension:plugin", "slow", "1")
    with pytest.raises(KeyboardInterrupt):
        plugin.load()
