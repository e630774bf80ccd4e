"""Let graphs have modules that are named like a keyword of Python, as in ModuleDict({"class": …}).

torch.fx writes a graph as Python code, where it reads `self.heads.class.weight`: it spells out with
getattr what is no identifier, and a keyword is one.
"""

from __future__ import annotations

import keyword

import torch.fx.graph

_own_format = torch.fx.graph._format_target


def _format_target(base: str, target: str) -> str:
    if not any(keyword.iskeyword(part) for part in target.split(".")):
        return _own_format(base, target)
    for part in target.split("."):
        base = f"getattr({base}, {part!r})"
    return base


torch.fx.graph._format_target = _format_target
