from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

import pbc
from pbc import cli
from pbc.errors import PbcError, UsageError


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.main, args, prog_name="pbc")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give `pbc targets` another body."""

    def define(body: Callable[[], None]) -> None:
        monkeypatch.setattr("pbc.cli.listing.targets", click.command("targets")(body))

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
        ("train", "torch", "device"),
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
        f"error: this needs {package}, which is not installed: pip install 'pbc[{extra}]'"
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
