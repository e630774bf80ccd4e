from __future__ import annotations

import sys
from collections.abc import Callable

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
    for group, word in plugins.GROUPS.items():
        assert word
        assert plugins.entries(group), group


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
