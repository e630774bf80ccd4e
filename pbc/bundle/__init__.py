"""The bundle: the one file that a device receives, as either side reads it."""

from pbc.bundle.bundle import Bundle, write

__all__ = ["Bundle", "write"]
