from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from pbc.cli import COMMANDS, main


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="pbc")


@pytest.mark.parametrize("command", ["targets", "passes", "strategies"])
def test_a_listing_has_a_table_and_json_that_agree(command: str) -> None:
    table, data = run(command), run(command, "--json")
    assert (table.exit_code, data.exit_code) == (0, 0)
    rows = json.loads(data.stdout)
    assert rows
    lines = table.stdout.splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        assert row["name"] in line
        assert row["description"], row["name"]
        assert row["description"] in line
        assert f"{row['distribution']} {row['version']}" in line


def test_targets_mark_the_engines_that_are_not_installed() -> None:
    (line,) = [line for line in run("targets").stdout.splitlines() if "jetson-tx2" in line]
    assert "pytorch" in line
    assert "(pytorch)" not in line
    assert "8.0 GiB" in line


def test_a_plugin_of_another_distribution_is_listed(install_plugin: Callable[..., None]) -> None:
    source = 'class Shrink:\n    """Make [b]everything[/b] smaller."""\n'
    install_plugin("acme", "[pbc.passes]\nshrink = acme_plugin:Shrink\n", source)
    (line,) = [line for line in run("passes").stdout.splitlines() if line.startswith("shrink")]
    assert line.split() == ["shrink", "Make", "[b]everything[/b]", "smaller.", "acme", "1.2.3"]


def test_help_lists_every_command_with_what_it_does() -> None:
    result = run("--help")
    assert result.exit_code == 0
    commands = result.stdout.partition("Commands:")[2]
    for name in COMMANDS:
        assert any(
            line.split()[0] == name and len(line.split()) > 2
            for line in commands.splitlines()
            if line.strip()
        ), f"{name} has no help"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"Usage: pbc {command}")
