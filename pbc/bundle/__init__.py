"""The bundle: the one file that a device receives, as either side reads it."""

from pbc.bundle.reader import Bundle, manifest_digest
from pbc.bundle.writer import write

__all__ = ["Bundle", "manifest_digest", "write"]
