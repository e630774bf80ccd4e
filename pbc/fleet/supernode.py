"""Flower's SuperNode as a child process that ends when its parent does, however that ends."""

from __future__ import annotations

import sys

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli import flower_supernode


def main() -> None:
    """Run `flower-supernode` with the arguments after the first, the parent's process id."""
    start_parent_process_monitor(int(sys.argv.pop(1)))
    flower_supernode()


if __name__ == "__main__":
    main()
