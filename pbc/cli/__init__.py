"""Command line: each command parses, calls one library function, and prints.

A command's module is imported when the command runs, so that `pbc --help` and `pbc train` never
load the compiler.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import click

from pbc import __version__
from pbc.errors import PbcError, UsageError, suggest
from pbc.util.extras import DEVICE_EXTRAS, EXTRAS, missing
from pbc.util.source import summary
from pbc.util.terminal import LONGEST_LINE, one_line

_HEAD = "error:"


@dataclass(frozen=True)
class Command:
    """Place of a command, and the extras that bring what it may need beside the core."""

    module: str
    attribute: str
    extras: Mapping[str, str] = field(default_factory=lambda: EXTRAS)


COMMANDS: Mapping[str, Command] = {
    "demo": Command("pbc.cli.demo", "demo", DEVICE_EXTRAS),
    "compile": Command("pbc.cli.compile", "compile"),
    "analyze": Command("pbc.cli.analyze", "analyze"),
    "inspect": Command("pbc.cli.inspect", "inspect"),
    "train": Command("pbc.cli.train", "train", DEVICE_EXTRAS),
    "eval": Command("pbc.cli.train", "evaluate", DEVICE_EXTRAS),
    "predict": Command("pbc.cli.train", "predict", DEVICE_EXTRAS),
    "report": Command("pbc.cli.report", "report", DEVICE_EXTRAS),
    "export": Command("pbc.cli.export", "export"),
    "forget": Command("pbc.cli.train", "forget"),
    "bench": Command("pbc.cli.bench", "bench", DEVICE_EXTRAS),
    "fleet": Command("pbc.cli.fleet", "fleet", DEVICE_EXTRAS),
    "profile": Command("pbc.cli.profile", "profile", DEVICE_EXTRAS),
    "audit": Command("pbc.cli.audit", "audit", DEVICE_EXTRAS),
    "keygen": Command("pbc.cli.sign", "keygen"),
    "sign": Command("pbc.cli.sign", "sign"),
    "verify": Command("pbc.cli.sign", "verify"),
    "deploy": Command("pbc.cli.deploy", "deploy"),
    "pack": Command("pbc.cli.pack", "pack"),
    "targets": Command("pbc.cli.targets", "targets"),
    "strategies": Command("pbc.cli.plugins", "strategies"),
    "passes": Command("pbc.cli.plugins", "passes"),
    "plugins": Command("pbc.cli.plugins", "list_plugins"),
    "doctor": Command("pbc.cli.doctor", "doctor"),
}


class Main(click.Group):
    """Group of all commands: finds them lazily and says what went wrong in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        where = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(where.module), where.attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UsageError(suggest("command", args[0], COMMANDS))
        ctx.invoked_subcommand = args[0]  # known before its module is imported
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        rows = [(name, summary(c.module, c.attribute)) for name, c in COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = COMMANDS.get(ctx.invoked_subcommand or "")
            needs = missing(error, EXTRAS if command is None else command.extras)
            if needs is None:
                raise
            raise PbcError(f"this needs {needs}") from error
        sys.stdout.flush()  # a closed pipe is met here, where click expects it
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; as the standalone program, end with one line on stderr and an exit code."""
        if "NO_COLOR" in os.environ:
            extra.setdefault("color", False)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except PbcError as error:
            _fail(error.lines, error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail([error.format_message()], error.exit_code)
        except click.Abort:
            _fail(["interrupted"], 130)
        except MemoryError:
            _fail(["not enough memory"], 1)
        except OSError as error:  # of a disk or a terminal, wherever it was met
            where = f"{error.filename}: " if error.filename else ""
            _fail([f"{where}{error.strerror or error}"], 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(messages: Sequence[str], exit_code: int) -> NoReturn:
    """End with a line for each message."""
    head = click.style(_HEAD, fg="red", bold=True)
    rest = len(_HEAD) + 1
    text = "\n".join(one_line(message, LONGEST_LINE - rest) for message in messages)
    with suppress(OSError):
        click.echo(f"{head} {text}", err=True, color=False if "NO_COLOR" in os.environ else None)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # what could not be written is not tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(exit_code)


# \b keeps click from running the lines that follow into one paragraph.
_HELP = """Compile a pretrained network for a device, and personalise it there.

\b
  pbc compile resnet50 --target jetson-tx2 -o model.pbc
  pbc train model.pbc photos/ -o mine
  pbc predict mine photo.jpg
"""


@click.group(cls=Main, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pbc")
def main() -> None:
    """Run `pbc`."""
