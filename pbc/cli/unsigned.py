"""The option that lets code of a bundle run which nobody vouches for."""

from __future__ import annotations

import os

import click

from pbc.bundle.trust import UNSIGNED_VARIABLE


def _allow(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    # Of this process and what it starts: workers of a bench load the bundle too.
    if value:
        os.environ[UNSIGNED_VARIABLE] = "1"


unsigned = click.option(
    "--unsigned",
    is_flag=True,
    expose_value=False,
    callback=_allow,
    help="Run a bundle's machine code though nobody signed it.",
)
