from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
from click.testing import CliRunner, Result

import pbc
from pbc import bundle, cli
from pbc.errors import PbcError, UsageError
from pbc.util.extras import install


def run(*args: str, columns: int | None = None) -> Result:
    runner = CliRunner(env={} if columns is None else {"COLUMNS": str(columns)})
    return runner.invoke(cli.main, args, prog_name="pbc")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give `pbc targets` another body."""

    def define(body: Callable[[], None]) -> None:
        monkeypatch.setattr("pbc.cli.targets.targets", click.command("targets")(body))

    return define


def raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (PbcError("no such photo"), 1, "error: no such photo"),
        (UsageError("no such target"), 2, "error: no such target"),
        (click.ClickException("from click"), 1, "error: from click"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (PbcError("two\nlines\x1b[2J"), 1, "error: two lines\\x1b[2J"),
        (PbcError("two", "reasons"), 1, "error: two\nreasons"),
        (PbcError("x" * 1000), 1, "error: " + "x" * 492 + "…"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    command: Callable[..., None], error: BaseException, exit_code: int, line: str
) -> None:
    command(raises(error))
    result = run("targets")
    assert result.exit_code == exit_code
    assert result.stderr.strip() == line


def test_our_own_bugs_keep_their_traceback(command: Callable[..., None]) -> None:
    command(raises(ZeroDivisionError("a bug")))
    assert isinstance(run("targets").exception, ZeroDivisionError)


def test_a_command_may_choose_its_exit_code(command: Callable[..., None]) -> None:
    command(lambda: click.get_current_context().exit(3))
    assert run("targets").exit_code == 3


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("compile", "torch", "compile"),
        ("compile", "torch._C", "compile"),
        ("compile", "timm", "models"),
        ("compile", "torchvision.models", "models"),
        ("compile", "torch_pruning", "compile"),
        ("compile", "onnx", "onnx"),
        ("compile", "onnxruntime.capi", "onnx"),
        ("compile", "onnxscript", "onnx"),
        ("train", "torch", "device-torch"),
        ("train", "onnxruntime", "device"),
        ("predict", "onnxruntime", "device"),
        ("bench", "onnxruntime", "device"),
        ("train", "tensorboard", "tensorboard"),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    def import_module(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("pbc.cli.importlib.import_module", import_module)
    result = run(name)
    package = module.partition(".")[0]
    assert result.exit_code == 1
    assert result.stderr.strip() == (
        f"error: this needs {package}, which is not installed: {install(extra)}"
    )


def test_a_missing_module_that_no_extra_brings_is_a_bug(command: Callable[..., None]) -> None:
    command(raises(ModuleNotFoundError("No module named 'acme'", name="acme")))
    assert isinstance(run("targets").exception, ModuleNotFoundError)


def test_unknown_commands_and_options_get_a_suggestion() -> None:
    result = run("complie")
    assert result.exit_code == 2
    assert "no command named 'complie'; did you mean 'compile'?" in result.stderr
    result = run("targets", "--jsn")
    assert result.exit_code == 2
    assert "--json" in result.stderr


HELP = """\
Usage: pbc [OPTIONS] COMMAND [ARGS]...

  Compile a pretrained network for a device, and personalise it there.

    pbc compile resnet50 --target jetson-tx2 -o model.pbc
    pbc train model.pbc photos/ -o mine
    pbc predict mine photo.jpg

Options:
"""


def test_the_help_shows_its_examples_a_line_each() -> None:
    assert run("--help", columns=80).stdout.startswith(HELP)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    result = run(*filter(None, [command]), "--help", columns=80)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not set(result.stdout) & set(map(chr, range(32))) - {"\n"}
    assert "\\b" not in result.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_json_is_a_flag_and_output_has_one_name(command: str) -> None:
    found = cli.main.get_command(click.Context(cli.main), command)
    assert found is not None
    options: dict[str, Any] = {name: each for each in found.params for name in each.opts}
    assert "--json" not in options or options["--json"].is_flag
    assert "--out" not in options
    assert options.get("-o") is options.get("--output")


def test_no_color_is_honoured_by_errors_and_notes(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., None]
) -> None:
    def body() -> None:
        click.echo(click.style("note:", fg="yellow"))
        raise PbcError("no such photo")

    command(body)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = CliRunner().invoke(cli.main, ["targets"], color=True)
    assert "\x1b[31m" in coloured.stderr
    assert "\x1b[33m" in coloured.stdout
    plain = CliRunner(env={"NO_COLOR": "1"}).invoke(cli.main, ["targets"], color=True)
    assert (plain.stdout, plain.stderr) == ("note:\n", "error: no such photo\n")


def test_no_command_prints_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert "error:" not in result.stderr


def test_version() -> None:
    assert run("--version").stdout == f"pbc, version {pbc.__version__}\n"


@pytest.mark.parametrize("args", [["--help"], ["targets"], ["targets", "--json"]])
def test_a_closed_pipe_is_no_drama(args: list[str]) -> None:
    code = "import sys; sys.stdin.read(); from pbc.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # the reader is gone before the first line
        process.stdin.close()
        assert process.stderr.read() == ""


# ---- pbc inspect: the policy and the accuracy map ----------------------------------------------

Row = dict[str, Any]

FLOOR: Row = {
    "floor": 0.9, "right": 0.8, "off_by_one_at_most": 0.97, "violations": 0.06,
    "mean_cost": 0.74, "mean_fidelity": 0.95, "gain": 0.02, "gain_error": 0.004,
}  # fmt: skip
NETWORK: Row = {
    "explained_variance": [0.31, 0.12], "mean_absolute_error": 0.02, "floors": [FLOOR]
}  # fmt: skip


@pytest.fixture
def inspected(tmp_path: Path) -> Callable[..., str]:
    """Write a bundle whose policy was reported on like this, and return what inspect prints."""

    def show(shipped: str, network: Row | None, accuracy_map: list[list[float]] | None) -> str:
        manifest, files = tiny.contents(accuracy_map=accuracy_map)
        manifest["policy"]["report"] = {
            "shipped": shipped, "confidence": 0.9, "held_out_samples": 500, "cost_share": 0.012,
            "network": network, "means": {"floors": [FLOOR | {"right": 0.5}]},
        }  # fmt: skip
        manifest["levels"][1]["accuracy_loss"] = 1.84
        manifest["notes"] = []
        manifest["provenance"] = {"weights": "w", "pbc": "1", "torch": "2", "command": "c"}
        bundle.write(tmp_path / "m.pbc", manifest, files)
        result = run("inspect", str(tmp_path / "m.pbc"))
        assert result.exit_code == 0, result.output
        return result.stdout

    return show


def test_inspect_shows_what_the_policy_is_worth(inspected: Callable[..., str]) -> None:
    shown = inspected("network", NETWORK, [[0.8, 6.0], [0.9, 2.0], [1.0, 0.0]])
    assert (
        "policy: predicts fidelity from 4x4 views (ships the network); its network explains 31% of "
        "the variance between images at best, at 1.2% of level 0's cost\n"
        "  at floor 0.9: 80% at the right level, 97% within one, 6% below the floor, mean cost 0.74"
    ) in shown
    assert "N points: 0.5: 0.975, 1: 0.950, 2: 0.900, 5: 0.825" in shown
    assert " 1.8 " in shown


def test_inspect_shows_that_means_are_shipped(inspected: Callable[..., str]) -> None:
    shown = inspected("means", NETWORK, None)
    assert "(ships the means)" in shown
    assert "  at floor 0.9: 50% at the right level" in shown
    assert "accuracy: unknown what a fidelity costs (no map was fitted)" in shown
    assert "500 held-out images are too few to judge a network" in inspected("means", None, None)
