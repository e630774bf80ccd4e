"""Let the frozen weights of a layer share few values, so that a bundle packs smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from pbc.errors import UsageError
from pbc.ir.graph import get_tensor
from pbc.ir.program import Program
from pbc.proxies import compression
from pbc.proxies.codebooks import MOST_BITS, bits_of, codebook, from_codebooks, with_codebooks
from pbc.proxies.compression import weight_names
from pbc.proxies.retraining import Retraining


@dataclass(frozen=True)
class ClusterWeights:
    """Round the frozen weights of each layer to 2**bits values (Deep Compression, section 3).

    `cluster-weights:4`: one-dimensional k-means with linear initialisation, a codebook for each
    layer (Han et al., ICLR 2016). A bundle then stores values and Huffman-coded indices
    (pbc.bundle.packing) in place of float32 numbers; what a device computes with is float32 as
    ever, so that speed and memory stay. Weights are those that fold-batch-norm leaves; depthwise
    layers get 256 values each; biases, norms, small layers (pbc.proxies.compression), what trains,
    and int8 levels stay. Zeros that prune-weights made stay zero.

    With calibration data, each level's codebooks, biases and what else it has then learn to send
    what level 0 sent before, as `align` does it: a value's gradient is the sum of its members'. The
    result is kept where it brings images of the alignment set nearer. Tensors that a level has in
    common with level 0 stay in common.

    Graphs keep their form. Level 0 is the clustered network from here on: `checks.compression` has
    its fidelity to what it was.

    align_steps, align_time: as for `align`; a quarter of either is spent here, on top.
    """

    bits: int = 4
    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("quantize",)
    default: ClassVar[bool] = False

    @staticmethod
    def options(argument: str) -> Mapping[str, Any]:
        """Return the fields that `4` asks for."""
        if not argument.isdigit() or not 1 <= int(argument) <= MOST_BITS:
            raise UsageError(
                f"cluster-weights:{argument} is no number of bits; expected 1 to {MOST_BITS}, "
                "for example cluster-weights:4"
            )
        return {"bits": int(argument)}

    def __call__(self, program: Program) -> Program:
        changed = compression.replaced(program, self._clustered)
        if program.calibration is not None:
            train = Retraining(
                "cluster-weights",
                f"{2**self.bits} values a layer",
                [asdict(self)],
                self._with_codebooks,
                from_codebooks,
                self.align_steps,
                self.align_time,
            )
            changed = train(program, changed, program.calibration)
        return compression.judged(program, changed, "cluster-weights")

    def _clustered(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clustered = {}
        for name, weight in weights.items():
            values, indices = codebook(weight, bits_of(weight, self.bits))
            clustered[name] = values[indices.long()]
        return clustered

    def _with_codebooks(self, was: GraphModule, _: GraphModule) -> GraphModule:
        names = weight_names(was)
        return with_codebooks(was, {n: bits_of(get_tensor(was, n), self.bits) for n in names})
