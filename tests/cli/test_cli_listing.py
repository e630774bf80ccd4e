from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from pbc.cli import COMMANDS, main


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="pbc")


@pytest.mark.parametrize("command", ["passes", "strategies"])
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


def test_targets_are_listed_by_family() -> None:
    rows = json.loads(run("targets", "--json").stdout)
    lines = [line.rstrip() for line in run("targets").stdout.splitlines()]
    assert len(lines) == len(rows) + len({row["family"] for row in rows}) + 2
    headings = [line for line in lines[1:-1] if not line.startswith("  ")]
    assert set(headings) == {row["family"] for row in rows}
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == [row["name"]]]
        assert row["description"] in line
    assert lines.index("NVIDIA Jetson") < next(
        number for number, line in enumerate(lines) if line.startswith("  jetson-")
    )


def test_targets_mark_the_engines_that_are_not_installed(
    install_plugin: Callable[..., None],
) -> None:
    source = (
        "from pbc.target import Target\n"
        'board = Target("acme-one", "Acme One", "aarch64", "acme", ("acme", "pytorch"))\n'
    )
    install_plugin("acme", "[pbc.targets]\nacme-one = acme_plugin:board\n", source)
    lines = run("targets").stdout.splitlines()
    (number,) = [number for number, line in enumerate(lines) if "acme-one" in line]
    assert "(acme), pytorch" in lines[number]
    assert lines[number - 1].strip() == "acme 1.2.3"
    assert "preferred, but not installed here" in run("targets", "acme-one").stdout


def test_one_target_shows_all_that_is_known_of_it() -> None:
    shown = run("targets", "jetson-tx2").stdout
    facts = json.loads(run("targets", "jetson-tx2", "--json").stdout)
    for fact, value in facts["tags"].items():
        assert re.search(rf"^{fact} +{re.escape(value)} *$", shown, re.MULTILINE), fact
    assert "8.0 GiB" in shown
    assert "python >=3.10; libc glibc>=2.27" in shown
    assert re.search(r"^pytorch +no +torch>=2\.9 has wheels", shown, re.MULTILINE)
    assert re.search(r"^onnxruntime +yes +onnxruntime <1\.29", shown, re.MULTILINE)
    unknown = run("targets", "jetson-tx3")
    assert unknown.exit_code == 2
    assert "did you mean 'jetson-tx2'?" in unknown.stderr


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
