"""Ask early whether the engine can run what was captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pbc.bundle.graph_name import FORWARD, update
from pbc.ir.program import Program
from pbc.lower.backend import backend
from pbc.training_graph.autodiff import differentiate
from pbc.training_graph.optimizers import with_update


@dataclass(frozen=True)
class TryEngine:
    """Refuse what the engine cannot run, before levels are planned and aligned.

    Level 0 is converted once, and differentiated where the engine trains by derived steps; what
    comes of it is thrown away. The program stays as it is::

        graph prefix/0 takes %x does
          %sort = sort(%flatten)      PbcError: operator aten.sort.default is not supported …

    Does nothing where no levels are made: lowering comes next then, and says the same.

    levels: how many proxies will be made. trials: False does nothing.
    """

    levels: int = 4
    trials: bool = True
    stage: ClassVar[str] = "mark"
    after: ClassVar[tuple[str, ...]] = ("split-prefix",)

    def __call__(self, program: Program) -> Program:
        if not self.levels or not self.trials:
            return program
        engine = backend(program.request.engine)
        lowering = engine.lowering()
        # As it will be lowered, so that what is kept of the conversion serves then too.
        level = program.levels[0].fused()
        # What was captured fails at once, and its gradient takes longer to derive.
        lowering.try_graphs(program, {role.at(0): graph for role, graph in level.graphs.items()})
        if engine.derives_steps:
            gradient = differentiate(level.body, program.open_axes)
            backward = with_update(gradient.backward, "sgd")
            step = {FORWARD.at(0): gradient.forward, update("sgd").at(0): backward}
            lowering.try_graphs(program, step)
        return program
