"""Set the smallest frozen weights to zero, so that a bundle packs smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.errors import UsageError
from pbc.ir.graph import get_tensor
from pbc.ir.program import Program
from pbc.proxies import compression
from pbc.proxies.codebooks import is_dense
from pbc.proxies.compression import weight_names
from pbc.proxies.masks import masked, with_masks
from pbc.proxies.retraining import Retraining

DENSE = "no engine here computes sparse layers faster: prune-weights makes the bundle smaller alone"


@dataclass(frozen=True)
class PruneWeights:
    """Set the frozen weights of least magnitude to zero (Deep Compression, Han et al., ICLR 2016).

    `prune-weights:0.5` does so to half of each layer, `prune-weights:0.5,global` to the half of all
    layers that is smallest beside its own layer's root mean square. Section 2 of the paper; zeros
    are ordinary values here, which the bundle stores in few bits (pbc.bundle.packing): no engine
    computes faster for them, and a note says so. Weights are those that fold-batch-norm leaves;
    biases, norms, depthwise and small layers (pbc.proxies.compression), what trains, and int8
    levels stay.

    With calibration data, what is left then learns to send what level 0 sent before, as `align`
    does it and as the paper retrains; the result is kept where it brings images of the alignment
    set nearer. cluster-weights, which comes after, aims at the result.

    Graphs keep their form. Level 0 is the pruned network from here on: `checks.compression` has its
    fidelity to what it was.

    align_steps, align_time: as for `align`; a quarter of either is spent here, on top.
    """

    share: float = 0.5
    everywhere: bool = False
    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("quantize",)
    before: ClassVar[tuple[str, ...]] = ("cluster-weights",)
    default: ClassVar[bool] = False

    @staticmethod
    def options(argument: str) -> Mapping[str, Any]:
        """Return the fields that `0.5` or `0.5,global` asks for."""
        text, comma, scope = argument.partition(",")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share < 1 or (comma and scope != "global"):
            raise UsageError(
                f"prune-weights:{argument} is no share; expected prune-weights:0.5 or "
                "prune-weights:0.5,global, between 0 and 1"
            )
        return {"share": share, "everywhere": bool(comma)}

    def __call__(self, program: Program) -> Program:
        changed = compression.replaced(program, self._pruned)
        if program.calibration is not None:
            train = Retraining(
                "prune-weights",
                f"{self.share:.0%} of the weights zero",
                [asdict(self)],
                _with_masks,
                masked,
                self.align_steps,
                self.align_time,
            )
            changed = train(program, changed, program.calibration)
        return compression.judged(program, changed, "prune-weights", (DENSE,))

    def _pruned(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dense = {n: w for n, w in weights.items() if is_dense(w)}
        magnitudes = {name: _relative(weight) for name, weight in dense.items()}
        everywhere = _threshold(torch.cat(list(magnitudes.values())), self.share)
        pruned = dict(weights)
        for name, weight in dense.items():
            least = everywhere if self.everywhere else _threshold(magnitudes[name], self.share)
            kept = magnitudes[name].reshape(weight.shape) > least
            pruned[name] = torch.where(kept, weight, torch.zeros(()))
        return pruned


def _with_masks(was: GraphModule, pruned: GraphModule) -> GraphModule:
    return with_masks(was, {n: get_tensor(pruned, n) != 0 for n in weight_names(was)})


def _relative(weight: Tensor) -> Tensor:
    """Return magnitudes beside the layer's root mean square, flat."""
    flat = weight.detach().flatten()
    return flat.abs() / flat.square().mean().sqrt().clamp_min(1e-30)


def _threshold(magnitudes: Tensor, share: float) -> Tensor:
    """Return what this share of the magnitudes does not exceed."""
    rank = int(share * len(magnitudes))
    if not rank:
        return magnitudes.new_tensor(-1.0)
    return magnitudes.kthvalue(rank).values
