from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from pbc import plugins
from pbc.cli import COMMANDS, main
from pbc.ir import pipeline


def run(*args: str, columns: int | None = None) -> Result:
    runner = CliRunner(env={} if columns is None else {"COLUMNS": str(columns)})
    return runner.invoke(main, args, prog_name="pbc")


@pytest.mark.parametrize(("command", "tables"), [("passes", 2), ("strategies", 1)])
def test_a_listing_has_a_table_and_json_that_agree(command: str, tables: int) -> None:
    table, data = run(command), run(command, "--json")
    assert (table.exit_code, data.exit_code) == (0, 0)
    rows = json.loads(data.stdout)
    assert rows
    lines = [line for line in table.stdout.splitlines() if line]
    heads = [line for line in lines if line.endswith("  from")]
    assert len(heads) == tables
    assert len(lines) == len(rows) + tables
    for row, line in zip(rows, (line for line in lines if line not in heads), strict=True):
        assert row["name"] in line
        assert row["description"], row["name"]
        assert row["description"] in line
        assert f"{row['distribution']} {row['version']}" in line


def test_targets_are_listed_by_family() -> None:
    rows = json.loads(run("targets", "--json").stdout)
    lines = run("targets").stdout.splitlines()
    assert len(lines) == len(rows) + len({row["family"] for row in rows}) + 2
    headings = [line for line in lines[1:-1] if not line.startswith("  ")]
    assert set(headings) == {row["family"] for row in rows}
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == [row["name"]]]
        assert row["description"] in line
    (pi,) = [line for line in lines if "raspberry-pi-4b" in line]
    assert pi.endswith("Raspberry Pi 4 Model B, 4 GB, also arm-rasp4b64")
    assert run("targets", "arm-rasp4b64").stdout.startswith("target        raspberry-pi-4b: ")
    assert lines.index("NVIDIA Jetson") < next(
        number for number, line in enumerate(lines) if line.startswith("  jetson-")
    )


@pytest.mark.parametrize("columns", [60, 80])
def test_listings_fit_a_terminal_and_cut_no_name(columns: int) -> None:
    for command in ("targets", "passes", "strategies"):
        lines = run(command, columns=columns).stdout.splitlines()
        assert max(map(len, lines)) <= columns
        words = {line.split()[0] for line in lines if line}
        assert {row["name"] for row in json.loads(run(command, "--json").stdout)} <= words
        assert not any("…" in line for line in lines)


def test_a_pipe_gets_lines_no_wider_than_their_words() -> None:
    for command in ("targets", "passes", "strategies"):
        lines = run(command).stdout.splitlines()
        assert all(line == line.rstrip() for line in lines)
    assert max(map(len, run("targets").stdout.splitlines())) < 100


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
    assert lines[number].split() == ["acme-one", "(acme)", "Acme", "One"]
    assert lines[number - 1].strip() == "acme 1.2.3"
    assert "(engine): not installed here; the target's next one is taken" in lines
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


def test_passes_are_listed_as_they_run() -> None:
    rows = json.loads(run("passes", "--json").stdout)
    own = [row for row in rows if row["group"] == "pbc.passes"]
    assert [row["name"] for row in own] == [
        "mark-trainable", "split-prefix", "try-engine", "independent-dims", "plan-levels",
        "prune-dims", "merge-tokens", "align", "fold-batch-norm", "quantize", "prune-weights",
        "cluster-weights", "fit-accuracy-map", "choose-levels", "learn-policy",
        "derive-train-step", "lower",
    ]  # fmt: skip
    asked_for = ["prune-weights", "cluster-weights"]
    built = pipeline.build({}, asked_for).passes
    assert [row["name"] for row in own] == [name for name, _ in built]
    usual = [name for name, _ in pipeline.build({}).passes]
    assert usual == [name for name, _ in built if name not in asked_for]
    assert own[1]["after"] == ["mark-trainable"]
    assert [row["name"] for row in rows if row["group"] == "pbc.tvm_schedules"] == [
        "schedule-cpu", "schedule-gpu"
    ]  # fmt: skip
    table = run("passes").stdout
    assert re.search(r"^mark-trainable +mark +Turn", table, re.MULTILINE)
    assert re.search(r"^split-prefix +Cut .* \(after mark-trainable\) +pbc", table, re.MULTILINE)


SHRINK = """
import a_module_that_does_not_exist

class Shrink:
    '''Make [b]everything[/b] smaller.'''
    stage = "prune"
    before: tuple = ("prune-dims",)
    default = False
"""


def test_a_plugin_of_another_distribution_is_listed(install_plugin: Callable[..., None]) -> None:
    install_plugin("acme", "[pbc.passes]\nshrink = acme_plugin:Shrink\n", SHRINK)
    lines = run("passes").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("shrink")]
    assert line.split() == [
        "shrink", "prune", "Make", "[b]everything[/b]", "smaller.",
        "(before", "prune-dims;", "only", "--with", "shrink)", "acme", "1.2.3",
    ]  # fmt: skip
    assert lines[lines.index(line) + 1].startswith("prune-dims")
    assert "  align, choose-levels, cluster-weights" in (listed := run("plugins").stdout)
    assert "shrink (acme 1.2.3)" in listed


INHERITING = """
class Base:
    after = tuple(["prune-dims"])

    def __call__(self, program):
        return program

class Shrink(Base):
    stage = "prune"
"""


def test_a_pass_whose_order_is_not_spelt_out_is_asked_itself(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin("acme", "[pbc.passes]\nshrink = acme_plugin:Shrink\n", INHERITING)
    rows = {row["name"]: row for row in json.loads(run("passes", "--json").stdout)}
    assert (rows["shrink"]["stage"], rows["shrink"]["after"]) == ("prune", ["prune-dims"])


def test_plugins_lists_every_group_with_what_a_member_has_to_be() -> None:
    rows = json.loads(run("plugins", "--json").stdout)
    assert [row["group"] for row in rows] == list(plugins.GROUPS)
    text = run("plugins", columns=80).stdout
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for row in rows:
        assert f"{row['group']}: {row['description']} ({row['protocol']})" in flat
        assert row["members"]
        for member in row["members"]:
            assert member["name"] in flat


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
