"""The PyTorch engine: runs a bundle's declarative graphs with torch's own operators."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pbc.bundle import Bundle
from pbc.bundle.graph_name import BODY, POLICY, PREFIX, GraphName
from pbc.errors import PbcError
from pbc.runtime.engines import Arrays, NodeTimes, Shapes
from pbc.runtime.engines.pytorch.graph import parse
from pbc.runtime.engines.pytorch.group_norm import mend_group_norm
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.pytorch.optimizers import OPTIMIZERS, Optimizer, Sgd
from pbc.runtime.engines.pytorch.resolved_graph import ResolvedGraph
from pbc.runtime.objective import Objective
from pbc.util.processor import cpu_identity


class PyTorchEngine:
    """Run bundles with PyTorch on the CPU."""

    name = "pytorch"

    def version(self) -> str:
        return f"torch {torch.__version__} on {cpu_identity()}"

    def load(self, bundle: Bundle, *, threads: int | None = None) -> PyTorchExecutable:
        mend_group_norm()
        if threads is not None:
            torch.set_num_threads(threads)
        return PyTorchExecutable(bundle)


class PyTorchExecutable:
    """A bundle's graphs, each read, verified and resolved when it is first run."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._graphs: dict[GraphName, ResolvedGraph] = {}
        self._contents: dict[str, ResolvedGraph] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._theta: dict[str, Tensor] = {}
        self._objective = Objective()
        self._optimizer: Optimizer = Sgd({}, self._objective)
        self._loss: Tensor | None = None
        self._selected: Collection[str] | None = None

    def foresee(self, inputs: Shapes) -> None:
        own = self._bundle.manifest["parameters"]
        parameters = {name: shape for name, shape in inputs.items() if name in own}
        batch = {name: shape for name, shape in inputs.items() if name not in own}
        self._graph(BODY.at(0)).foresee(batch, parameters)

    def policy(self, views: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs = self._graph(POLICY).run({"view": torch.from_numpy(views)})
        return _to_numpy(outputs["fidelity"])

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        graph = PREFIX.at(level)
        if not self._bundle.has_graph(graph):
            return {"x": images}
        with torch.inference_mode():
            outputs = self._graph(graph).run({"x": torch.from_numpy(images)})
        return {name: _to_numpy(value) for name, value in outputs.items()}

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        with torch.inference_mode():
            return _to_numpy(self._body(level, features))

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._objective = objective
        self._theta = {
            name: torch.tensor(value, dtype=torch.float32) for name, value in parameters.items()
        }
        self._optimizer = OPTIMIZERS[objective.optimizer](self._theta, objective)
        self.select(self._selected)

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        logits = self._body(level, features)
        losses = cross_entropy(
            logits,
            torch.from_numpy(labels),
            reduction="none",
            label_smoothing=self._objective.label_smoothing,
        )
        self._loss = losses.mean()
        return losses.detach().numpy(), logits.detach().numpy()

    def update(self) -> None:
        assert self._loss is not None, "update() follows forward()"
        loss, self._loss = self._loss, None
        gradients = self._gradients(loss, keep=False)
        with torch.no_grad():
            self._optimizer.step(tuple(gradients.get(name) for name in self._theta))

    def gradients(self) -> dict[str, np.ndarray]:
        assert self._loss is not None, "gradients() follows forward()"
        gradients = self._gradients(self._loss, keep=True)
        return {name: _to_numpy(gradient).copy() for name, gradient in gradients.items()}

    def select(self, names: Collection[str] | None) -> None:
        self._selected = names
        self._loss = None
        for name, value in self._theta.items():
            value.requires_grad_(names is None or name in names)

    def node_times(self) -> NodeTimes:
        raise PbcError(
            "the pytorch engine cannot time the operators of its backward; compile the model with "
            "--engine onnxruntime to select tensors by their time"
        )

    def _gradients(self, loss: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """Differentiate by what is selected, and what the loss depends on."""
        theta = {name: value for name, value in self._theta.items() if value.requires_grad}
        found = torch.autograd.grad(
            loss, list(theta.values()), allow_unused=True, retain_graph=keep
        )
        return {name: g for name, g in zip(theta, found, strict=True) if g is not None}

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in self._theta.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self._optimizer.state().items()}

    def load_optimizer_state(self, state: Arrays) -> None:
        own = self._optimizer.state()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in state.items()}:
            raise PbcError("the optimizer state is not of this optimizer and these parameters")
        for name, value in own.items():
            value.copy_(torch.from_numpy(state[name]))

    def _body(self, level: int, features: Arrays) -> Tensor:
        batch = {name: torch.from_numpy(value) for name, value in features.items()}
        return self._graph(BODY.at(level)).run(batch, self._theta)["logits"]

    def _graph(self, name: GraphName) -> ResolvedGraph:
        graph = self._graphs.get(name)
        if graph is None:
            # Made in inference mode, a frozen tensor could not take part in a backward later.
            with torch.inference_mode(False):
                graph = self._graphs[name] = self._load(name)
        return graph

    def _load(self, name: GraphName) -> ResolvedGraph:
        """Read a graph; levels whose files are the same share one graph."""
        bundle = self._bundle
        file = bundle.graph_file(name)
        content = bundle.sha256(file)
        if content not in self._contents:
            where = f"{bundle.path}: {file}"
            graph = parse(bundle.json(file), OPS, where)
            self._contents[content] = ResolvedGraph(graph, self._tensor, where)
        return self._contents[content]

    def _tensor(self, file: str, key: str) -> Tensor:
        """Read one frozen tensor; a file is read once, and its tensors are shared by all graphs."""
        tensors = self._tensors.get(file)
        if tensors is None:
            arrays = self._bundle.tensors(file)
            tensors = self._tensors[file] = {
                name: _from_frozen(array) for name, array in arrays.items()
            }
        if key not in tensors:
            raise PbcError(f"{self._bundle.path}: {file} has no tensor {key!r}")
        return tensors[key]


def _to_numpy(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.numpy()
    return array


def _from_frozen(array: np.ndarray) -> Tensor:
    """Copy a stored array; float16 is a storage format only, everything computes in float32."""
    return torch.tensor(array.astype(np.float32) if array.dtype == np.float16 else array)
