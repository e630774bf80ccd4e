"""How tables are printed: to the terminal's width, and in whole lines into a pipe."""

from __future__ import annotations

from rich.console import Console

_PIPE_WIDTH = 200


def console() -> Console:
    """Return standard output; whoever reads a pipe wants whole lines."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made
