"""Ask early whether the engine can run what was captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pbc import plugins
from pbc.ir.program import Program, body, step_forward, step_update
from pbc.lower.lowering import Lowering, Tries
from pbc.passes.derive_train_step import open_axes
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

    levels: how many proxies will be made.
    """

    levels: int = 4
    stage: ClassVar[str] = "mark"
    after: ClassVar[tuple[str, ...]] = ("split-prefix",)

    def __call__(self, program: Program) -> Program:
        lowering: Lowering = plugins.load("pbc.lowerings", program.engine)()
        if not self.levels or not isinstance(lowering, Tries):
            return program
        # What was captured fails at once, and its gradient takes longer to derive.
        lowering.try_graphs(program, program.graphs)
        if lowering.derives_steps:
            gradient = differentiate(program.graphs[body(0)], open_axes(program))
            update = with_update(gradient.backward, "sgd")
            lowering.try_graphs(
                program, {step_forward(0): gradient.forward, step_update(0, "sgd"): update}
            )
        return program
