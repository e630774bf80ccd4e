"""pbc: a compiler and a runtime for personalising pretrained networks on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbc.compiler import compile as compile

__all__ = ["__version__", "compile"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `pbc.compile` on first use: a device that only trains has no compiler."""
    if name == "compile":
        from pbc.compiler import compile

        return compile
    raise AttributeError(f"module 'pbc' has no attribute {name!r}")
