"""Lite residual modules: small branches beside blocks, on maps of a quarter of the positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from pbc.errors import PbcError
from pbc.frontend.strategy import Bias, inserted, without_argument
from pbc.frontend.trace import Call
from pbc.frontend.traced_network import TracedNetwork

# Of the network's weights, what all modules together may have.
SHARE = 0.1
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
_CHANNELS = 8


@dataclass(frozen=True)
class LiteResidual:
    """Train all biases, a small module beside each block, and the classifier.

    Cai et al., TinyTL, NeurIPS 2020, section 3.2: y + up(norm(1x1(relu(norm(5x5(pool(x))))))), the
    5x5 of 2 groups, norms over groups of 8 channels, the last one's scale zero, so that the model
    starts unchanged. Where the modules would have more than a tenth of the network's weights,
    they are narrower; a kernel is no larger than the map. Deviations: the modules were not
    pretrained on ImageNet, weights are not standardised, batch norms stay as they are.
    """

    @classmethod
    def parse(cls, text: str) -> LiteResidual:
        without_argument(text)
        return cls()

    def insert(self, network: TracedNetwork, example: Tensor) -> None:
        module = network.module
        calls = {call.name: call for call in network.trace.calls()}
        shapes = {name: _maps(calls[name]) for name in network.blocks}
        most = SHARE * sum(weight.numel() for weight in module.parameters())
        modules: dict[str, LiteModule] = {}
        for share in _SHARES:
            modules = {name: LiteModule(*maps, share) for name, maps in shapes.items()}
            if sum(w.numel() for lite in modules.values() for w in lite.parameters()) <= most:
                break
        for name, lite in modules.items():
            block = module.get_submodule(name)
            block.add_module("lite", lite)
            block.register_forward_hook(lambda owner, inputs, y: y + owner.lite(inputs[0], y))

    def trainable(self, network: TracedNetwork) -> frozenset[str]:
        return Bias().trainable(network) | inserted(network, LiteModule)


class LiteModule(nn.Module):
    """From a block's input to what is added to its output.

    given, made: shapes of both, [batch, channels, height, width]. share: of the input's channels,
    how many there are between the two convolutions.
    """

    def __init__(self, given: Sequence[int], made: Sequence[int], share: float) -> None:
        super().__init__()
        channels, out = given[1], made[1]
        self.pooling = 2 if min(given[2:]) > 1 else 1
        smallest = min(given[2:]) // self.pooling
        kernel = next(size for size in (5, 3, 1) if size <= smallest)
        stride = max(1, round(given[2] / made[2]))
        hidden = max(_CHANNELS, int(channels * share) // _CHANNELS * _CHANNELS)
        groups = 2 if channels % 2 == 0 else 1
        self.grouped = nn.Conv2d(
            channels, hidden, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.GroupNorm(hidden // _CHANNELS, hidden)
        self.narrow = nn.Conv2d(hidden, out, 1, bias=False)
        self.last_norm = nn.GroupNorm(out // _CHANNELS if out % _CHANNELS == 0 else 1, out)
        nn.init.zeros_(self.last_norm.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f32 like `y`, the block's output for `x`."""
        if self.pooling > 1:
            x = functional.avg_pool2d(x, self.pooling)
        x = functional.relu(self.norm(self.grouped(x)))
        x = self.last_norm(self.narrow(x))
        # By sizes, not by `y`'s shape: they are constants of the graph.
        size = [int(length) for length in y.shape[2:]]
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def _maps(call: Call) -> tuple[Sequence[int], Sequence[int]]:
    """Shapes of a block's input and output; raises PbcError where they are no maps."""
    shapes = [value.shape for value in (*call.inputs[:1], *call.outputs)]
    if len(shapes) != 2 or any(len(shape) != 4 for shape in shapes):
        raise PbcError(
            f"block {call.name} takes and returns {' and '.join(str(list(s)) for s in shapes)}; "
            "lite-residual needs maps [batch, channels, height, width]"
        )
    return shapes[0], shapes[1]
