"""Five steps of every optimizer's graph against torch.optim, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from pbc.bundle.optimizers import BETA_MEAN, BETA_SQUARE, NEW, OPTIMIZERS
from pbc.ir.graph import NAME, graph_inputs, graph_outputs, output_node, placeholders
from pbc.ir.rewrite import in_float64
from pbc.training_graph.optimizers import with_update

STEPS = 5
Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def gradients(shapes: Shapes) -> GraphModule:
    """A graph that returns as gradients what it is given."""
    graph, mode = Graph(), FakeTensorMode()
    given = []
    for name, shape in shapes.items():
        node = graph.placeholder("gradient_" + name.replace(".", "_"))
        with mode:
            node.meta = {"val": torch.empty(shape), NAME: f"gradient/{name}"}
        given.append(node)
    graph.output(tuple(given)).meta[NAME] = list(shapes)
    return GraphModule(torch.nn.Module(), graph)


def random(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def torch_rule(name: str, theta: list[Tensor], scalars: dict[str, float]) -> torch.optim.Optimizer:
    rate, decay = scalars["learning_rate"], scalars["weight_decay"]
    if name == "sgd":
        return torch.optim.SGD(theta, rate, scalars["momentum"], weight_decay=decay)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(theta, rate, eps=scalars["epsilon"], weight_decay=decay)


def assert_steps(name: str, shapes: Shapes, scalars: dict[str, float], seed: int) -> None:
    """The learning rate halves at every step, as a schedule would have it."""
    graph = in_float64(with_update(gradients(shapes), name))
    generator = torch.Generator().manual_seed(seed)
    theta = {key: random(shape, generator) for key, shape in shapes.items()}
    twins = {key: value.clone().requires_grad_() for key, value in theta.items()}
    rule = torch_rule(name, list(twins.values()), scalars)
    values = dict(theta)
    for part in OPTIMIZERS[name].state:
        values |= {f"{part}/{key}": torch.zeros_like(value) for key, value in theta.items()}
    for step in range(1, STEPS + 1):
        settings_now = scalars | {
            "learning_rate": scalars["learning_rate"] / 2**step,
            "mean_correction": 1 - BETA_MEAN**step,
            "square_correction": 1 - BETA_SQUARE**step,
        }
        rule.param_groups[0]["lr"] = settings_now["learning_rate"]
        for key, value in settings_now.items():
            values[key] = torch.tensor(value, dtype=torch.float64)
        for key, twin in twins.items():
            twin.grad = values[f"gradient/{key}"] = random(shapes[key], generator)
        results = graph(*[values[title] for title in graph_inputs(graph)])
        new = dict(zip(graph_outputs(graph), results, strict=True))
        values |= {title.removeprefix(NEW): value for title, value in new.items()}
        rule.step()
        expected = {key: twin.detach() for key, twin in twins.items()}
        of_torch = {"momentum": "momentum_buffer"}
        for part in OPTIMIZERS[name].state:
            for key, twin in twins.items():
                kept = rule.state[twin].get(of_torch.get(part, part))
                # Without momentum torch keeps nothing; ours is then the last gradient.
                if kept is not None:
                    expected[f"{part}/{key}"] = kept
        assert {title.removeprefix(NEW) for title in new} >= expected.keys()
        for title, value in expected.items():
            assert values[title].shape == value.shape, title
            torch.testing.assert_close(values[title], value, rtol=1e-11, atol=1e-13)


SHAPES = st.lists(
    st.one_of(
        st.just((1,)),
        st.just(()),
        st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=3,
).map(lambda shapes: {f"layer.{number}": shape for number, shape in enumerate(shapes)})
RATES = st.sampled_from([0.5, 0.1, 1e-3])
DECAYS = st.sampled_from([0.0, 0.01, 0.3])
quick = settings(deadline=None, max_examples=25)


@quick
@given(
    shapes=SHAPES,
    rate=RATES,
    decay=DECAYS,
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_sgd(shapes: Shapes, rate: float, decay: float, momentum: float, seed: int) -> None:
    scalars = {"learning_rate": rate, "momentum": momentum, "weight_decay": decay}
    assert_steps("sgd", shapes, scalars, seed)


@quick
@given(
    name=st.sampled_from(["adam", "adamw"]),
    shapes=SHAPES,
    rate=RATES,
    decay=DECAYS,
    epsilon=st.sampled_from([1e-8, 0.1]),
    seed=st.integers(0, 99),
)
def test_adam_and_adamw(
    name: str, shapes: Shapes, rate: float, decay: float, epsilon: float, seed: int
) -> None:
    scalars = {"learning_rate": rate, "weight_decay": decay, "epsilon": epsilon}
    assert_steps(name, shapes, scalars, seed)


def test_everything_that_may_differ_from_run_to_run_is_an_input() -> None:
    graphs = {name: with_update(gradients({"fc.bias": (3,)}), name) for name in OPTIMIZERS}
    inputs = {name: graph_inputs(graph)[1:] for name, graph in graphs.items()}
    adaptive = [
        "fc.bias", "exp_avg/fc.bias", "exp_avg_sq/fc.bias", "learning_rate", "weight_decay",
        "epsilon", "mean_correction", "square_correction",
    ]  # fmt: skip
    assert inputs == {
        "sgd": ["fc.bias", "momentum/fc.bias", "learning_rate", "momentum", "weight_decay"],
        "adam": adaptive,
        "adamw": adaptive,
    }
    assert graph_outputs(graphs["sgd"]) == ["new/fc.bias", "new/momentum/fc.bias"]
    for name in ("adam", "adamw"):
        assert graph_outputs(graphs[name]) == [
            "new/fc.bias", "new/exp_avg/fc.bias", "new/exp_avg_sq/fc.bias",
        ]  # fmt: skip
    for graph in graphs.values():
        # Every one of them is read, and no number stands in for one.
        assert all(node.users for node in placeholders(graph))
        numbers = {
            argument
            for node in graph.graph.nodes
            for argument in node.args
            if isinstance(argument, float)
        }
        assert numbers <= {1 - BETA_MEAN, 1 - BETA_SQUARE}


def test_parameters_of_one_rank_share_their_scalars() -> None:
    graph = with_update(gradients({"a": (2, 3), "b": (4, 1), "c": (5,)}), "sgd")
    shapes = [
        node.args[1] for node in graph.graph.nodes if node.target is torch.ops.aten.reshape.default
    ]
    assert shapes == [[1, 1]] * 3 + [[1]] * 3


def test_the_graph_of_gradients_is_left_as_it_was() -> None:
    before = gradients({"fc.weight": (4, 3), "fc.bias": (4,)})
    code, names = before.code, list(output_node(before).meta[NAME])
    with_update(before, "adamw")
    assert before.code == code
    assert output_node(before).meta[NAME] == names
    assert [node.meta[NAME] for node in placeholders(before)] == [
        "gradient/fc.weight", "gradient/fc.bias",
    ]  # fmt: skip
