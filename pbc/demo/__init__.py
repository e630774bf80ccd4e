"""`pbc demo`: a small network learns four handwritten digits, from what is installed alone."""

from __future__ import annotations

from pbc.demo.teach import Demo, teach

__all__ = ["Demo", "teach"]
