"""An eager network as strategies see it: its head, its blocks, and what runs when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.frontend import head
from pbc.frontend.blocks import blocks, matching
from pbc.frontend.trace import Trace, trace
from pbc.ir.program import Block, Head


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """A module that maps images to class scores, with the run in which it was read.

    blocks: names of the modules that strategies count, in the order of execution.
    """

    module: nn.Module
    head: Head
    trace: Trace
    blocks: tuple[str, ...]

    @classmethod
    def of(
        cls, module: nn.Module, head: Head, example: Tensor, pattern: str | None = None
    ) -> TracedNetwork:
        """Run the module once and read it; whatever it raises passes through.

        pattern: a glob over the names of modules, for those who know better what the blocks are.
        """
        run = trace(module, example)
        found = blocks(run, head.parameters) if pattern is None else matching(run, pattern)
        return cls(module, head, run, found)

    def again(self, example: Tensor) -> TracedNetwork:
        """The same network after something was inserted into it, with the blocks that it had.

        The head's parameters are the same; what they read may be wider.
        """
        run = trace(self.module, example)
        found = head.find(run)
        names = self.head.parameters.keys()
        if isinstance(found, head.Found) and found.head.parameters.keys() == names:
            return replace(self, trace=run, head=found.head)
        return replace(self, trace=run)

    def last_blocks(self, count: int) -> tuple[str, ...]:
        """Names of the last blocks to run; raises PbcError when there are fewer."""
        if count > len(self.blocks):
            raise PbcError(
                f"{type(self.module).__name__} has {len(self.blocks)} blocks; the strategy asks "
                f"for the last {count} (--blocks PATTERN says which modules are blocks)"
            )
        return self.blocks[-count:]

    def start(self, name: str) -> int:
        """The number of the first operator that runs in a module."""
        return self._starts[name]

    @cached_property
    def _starts(self) -> dict[str, int]:
        starts: dict[str, int] = {}
        for call in self.trace.calls():
            starts.setdefault(call.name, call.first)
        return starts

    def described(self, trainable: frozenset[str]) -> tuple[Block, ...]:
        """Each block with how many values it has and how many of them train."""
        sizes = {name: value.numel() for name, value in self.module.named_parameters()}
        described = []
        for block in self.blocks:
            inside = [name for name in sizes if name.startswith(f"{block}.")]
            trained = sum(sizes[name] for name in inside if name in trainable)
            described.append(Block(block, sum(sizes[name] for name in inside), trained))
        return tuple(described)
