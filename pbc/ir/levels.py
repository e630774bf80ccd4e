"""A level as a compilation sees it: first planned, then graphs with what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY, FORWARD, PREFIX, GraphName, update
from pbc.bundle.ladder import FLOAT32, UNALIGNED, Ladder, Level
from pbc.ir.graph import feature_names, graph_outputs, parameter_names
from pbc.ir.rewrite import copy_graph, fuse_batch_norms

IMAGES = "x"
"""The images' name in a graph that reads them."""

Keep = Mapping[str, list[int]]
"""The indices that stay, by dimension name; what is not named stays whole."""

Size = tuple[int, int]
"""Height and width in pixels."""


MODEL = GraphName("model")
"""The whole network, until it is split; no bundle has it."""


@dataclass(frozen=True)
class LevelPlan:
    """A proxy before it is made: what it will give up, and its expected cost.

    sizes: of each dimension that shrinks, by its name. cost: relative to level 0. macs:
    multiply-accumulates of one sample. resolution: what images are reduced to; None leaves them.
    merges: how many tokens are merged after each attention; empty where none are.
    """

    sizes: Mapping[str, int]
    cost: float
    macs: float
    precision: str = FLOAT32
    resolution: Size | None = None
    merges: tuple[int, ...] = ()

    def rung(self, level: int) -> Level:
        """Return the level as the manifest has it."""
        return Level(
            level=level,
            cost=self.cost,
            latency_ms=None,
            macs=self.macs,
            fidelity=None,
            status=UNALIGNED,
            precision=self.precision,
            resolution=self.resolution,
            merged_tokens=sum(self.merges),
        )


@dataclass(frozen=True)
class LevelGraphs:
    """One level: its graphs, and what running the frozen part costs and how faithful it is.

    prefix: images to features; None where the trainable part starts at the input. body: features
    and θ to logits. forward, updates: the derived step, by optimizer, once there is one.
    keep: the plan: which indices stay of each dimension that shrank. merges: likewise, how many
    tokens are merged after each attention.
    cost, latency_ms, macs, fidelity, status, precision, resolution, accuracy_loss: see
    pbc.bundle.ladder.Level.
    """

    body: GraphModule
    prefix: GraphModule | None = None
    forward: GraphModule | None = None
    updates: Mapping[str, GraphModule] = field(default_factory=dict)
    keep: Keep = field(default_factory=dict)
    cost: float = 1.0
    latency_ms: float | None = None
    macs: float = 0.0
    fidelity: float | None = None
    status: str = UNALIGNED
    precision: str = FLOAT32
    resolution: Size | None = None
    accuracy_loss: float | None = None
    merges: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """What it gives up, as notes say it; empty for the original."""
        parts = ["with fewer channels"] if self.keep else []
        parts += ["at {}x{}".format(*self.resolution)] if self.resolution else []
        parts += [f"with {sum(self.merges)} tokens merged"] if any(self.merges) else []
        parts += [f"in {self.precision}"] if self.precision != FLOAT32 else []
        return " ".join(parts)

    @property
    def graphs(self) -> dict[GraphName, GraphModule]:
        """Every graph by its role, in the order of their names."""
        steps = {update(name): self.updates[name] for name in sorted(self.updates)}
        graphs = {BODY: self.body, FORWARD: self.forward, PREFIX: self.prefix, **steps}
        return {role: graph for role, graph in graphs.items() if graph is not None}

    @property
    def frozen(self) -> list[GraphModule]:
        """The graphs that alignment may change: the prefix, where there is one, and the body."""
        return [graph for graph in (self.prefix, self.body) if graph is not None]

    @property
    def sent(self) -> list[str]:
        """The names of the features that the prefix sends; of the images without one."""
        return [IMAGES] if self.prefix is None else graph_outputs(self.prefix)

    @property
    def read(self) -> list[str]:
        """The names of the features that the body reads."""
        return feature_names(self.body)

    def copy(self) -> LevelGraphs:
        """Return a level whose graphs can be changed without touching this one's."""
        return replace(
            self,
            body=copy_graph(self.body),
            prefix=None if self.prefix is None else copy_graph(self.prefix),
            forward=None if self.forward is None else copy_graph(self.forward),
            updates={name: copy_graph(graph) for name, graph in self.updates.items()},
        )

    def fused(self) -> LevelGraphs:
        """Return the level as a device runs it: batch norms are part of the layers before them."""
        level = self.copy()
        for graph in level.graphs.values():
            fuse_batch_norms(graph)
        return level

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the body receives, by name: the images themselves without a prefix."""
        values = (images,) if self.prefix is None else self.prefix(images)
        return dict(zip(self.sent, values, strict=True))

    def logits(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return [batch, classes]: prefix and body at these parameters."""
        theta = [parameters[name] for name in parameter_names(self.body)]
        logits: Tensor = self.body(*self.features(images).values(), *theta)[0]
        return logits

    def rung(self, level: int) -> Level:
        """Return the level as the manifest has it."""
        return Level(
            level=level,
            cost=self.cost,
            latency_ms=self.latency_ms,
            macs=self.macs,
            fidelity=self.fidelity,
            status=self.status,
            precision=self.precision,
            resolution=self.resolution,
            accuracy_loss=self.accuracy_loss,
            merged_tokens=sum(self.merges),
        )


def ladder(levels: tuple[LevelGraphs | LevelPlan, ...], cost_model: str) -> Ladder:
    """Return the levels as a device knows them."""
    return Ladder(tuple(one.rung(number) for number, one in enumerate(levels)), cost_model)
