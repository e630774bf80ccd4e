"""Align the proxies to the original at the interface, on calibration data."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from pbc import parallel
from pbc.atomic import replacing
from pbc.calibration import Calibration
from pbc.errors import PbcError
from pbc.interface import BATCH, Standard, Tapped, sample_fidelity, standards
from pbc.ladder import ALIGNED
from pbc.program import Program, body, get_tensor, op_name, prefix, put_tensor, tensor_names
from pbc.progress import report
from pbc.runtime.interrupt import Interrupt, deferred_interrupt
from pbc.work import work_file

SAVE_SECONDS = 60.0
STATISTICS_BATCHES = 16
LEARNING_RATE = 5e-4
# Who lost channels has further to go; without batch norms that is not stable.
LEARNING_RATE_AFTER_PRUNING = 1e-3
MINUTES = 10.0
# Of the ladder's time: the first proxy pays for all, since each further one starts from it.
FIRST_LEVEL_SHARE = 0.5
TRAINING, MOMENTUM = 5, 6  # positions among batch_norm's arguments


@dataclass(frozen=True)
class Align:
    """Distil each proxy so that what reaches the trainable part matches what level 0 sends there.

    Graphs keep their form; the frozen weights of `prefix/k` (and of `body/k`, as far as a
    trainable layer reads what they compute) change, and `program.ladder` gains fidelities. Level k
    starts from the slices of the aligned level k-1. The loss is, on interface tensors standardised
    by level 0's per-channel statistics, mean squared error plus one minus the cosine (PieBridge,
    SenSys 2024, «latent space alignment»); AdamW with cosine decay. Batch norms' statistics are
    measured afresh where channels went, and then stay: training with those of each batch is slower
    to learn and worse on images of another kind (docs/alignment.md). It runs on a GPU where there
    is one, in bfloat16 autocast; processes started by torchrun share each step's batch.

    A level that differs from the original in precision alone keeps the original's weights, and is
    only measured. Does nothing without calibration data: levels stay unaligned and unrouted.

    align_steps: steps per level; None lets `align_time` decide alone.
    align_time: minutes for the whole ladder, of which the first level that is trained gets half;
        None lets `align_steps` decide alone. With neither, ten minutes.
    """

    align_steps: int | None = None
    align_time: float | None = None
    stage: ClassVar[str] = "align"

    def __call__(self, program: Program) -> Program:
        calibration = program.calibration
        proxies = [level for level in program.levels if level > 0]
        if calibration is None or not proxies:
            return program.copy()
        program = program.copy()
        device = parallel.device()
        # A copy of its own: moving a module moves the tensors it shares.
        original = copy.deepcopy(Tapped(program, 0)).to(device).eval()
        standard = standards(
            original, (batch.to(device) for batch in _unaugmented(calibration, STATISTICS_BATCHES))
        )
        trained = [level for level in proxies if _gives_up_more_than_precision(program, level)]
        for level in trained:
            self._start_from_above(program, level)
            # A copy of its own: tensors that no plan shrank are level 0's too.
            tapped = copy.deepcopy(Tapped(program, level))
            run = _Run(
                original,
                tapped.to(device),
                standard,
                calibration,
                program.seed * 1000 + level,
                steps=self.align_steps,
                seconds=self._seconds(level == trained[0], len(trained)),
                saved=self._saved_as(program, level),
                channels_went=bool(program.plan[level]),
                label=f"level {level} of {len(proxies)}",
            )
            run.train()
            _adopt(program, level, tapped.cpu())
        values = sample_fidelity(program, proxies, calibration, calibration.held_out)
        levels = list(program.ladder.levels)
        for level, fidelity in zip(proxies, values.mean(0), strict=True):
            levels[level] = replace(levels[level], fidelity=float(fidelity), status=ALIGNED)
        return replace(program, ladder=replace(program.ladder, levels=tuple(levels)))

    def _seconds(self, first: bool, count: int) -> float | None:
        """The time for one of `count` levels; None when steps alone decide."""
        minutes = self.align_time
        if minutes is None and self.align_steps is None:
            minutes = MINUTES
        if minutes is None:
            return None
        share = 1.0
        if count > 1:
            share = FIRST_LEVEL_SHARE if first else (1 - FIRST_LEVEL_SHARE) / (count - 1)
        return minutes * 60 * share

    def _start_from_above(self, program: Program, level: int) -> None:
        """Replace a proxy's tensors by the slices of the level above, which is aligned already."""
        assert program.dims is not None
        if level == 1:
            return
        for kind in (prefix, body):
            if kind(level) not in program.graphs:
                continue
            graph, above = program.graphs[kind(level)], program.graphs[kind(level - 1)]
            for name in tensor_names(graph):
                _put(graph, name, program.dims.slice(
                    name, get_tensor(above, name), program.plan[level], program.plan[level - 1]
                ))  # fmt: skip

    def _saved_as(self, program: Program, level: int) -> Path | None:
        """Where this level's training is kept between interruptions, by all that decides it."""
        assert program.calibration is not None
        decided_by = [
            asdict(self),
            program.seed,
            program.plan[: level + 1],
            [program.ladder.resolution(above) for above in range(level + 1)],
            program.calibration.samples.digest(),
        ]
        graphs = (prefix(0), body(0))
        return work_file(program, f"align-{level}", decided_by, graphs, ".safetensors")


def _gives_up_more_than_precision(program: Program, level: int) -> bool:
    return bool(program.sizes[level]) or program.ladder.resolution(level) is not None


@dataclass
class _Run:
    """The distillation of one level: its state can be saved at any step and continued."""

    original: Tapped
    proxy: Tapped
    standard: list[Standard]
    calibration: Calibration
    seed: int
    steps: int | None
    seconds: float | None
    saved: Path | None
    channels_went: bool
    label: str
    step: int = 0
    elapsed: float = 0.0

    def train(self) -> None:
        weights = list(self.proxy.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        self._forward = self._distributed()
        pruned = self.channels_went and _batch_norms(self.proxy)
        rate = LEARNING_RATE_AFTER_PRUNING if pruned else LEARNING_RATE
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-4)
        if not self._resume(optimizer):
            if self.step == 0 and self.channels_went:
                self._recalibrate()
            with deferred_interrupt() as interrupt:
                self._steps(optimizer, rate, interrupt)
            self._save(optimizer, done=True)
        for weight in weights:
            weight.requires_grad_(False)

    def _distributed(self) -> Callable[[Tensor], list[Tensor]]:
        """The proxy's forward; among several processes its gradients are averaged."""
        if parallel.size() == 1:
            return self.proxy
        return nn.parallel.DistributedDataParallel(self.proxy)

    def _steps(self, optimizer: torch.optim.Optimizer, rate: float, interrupt: Interrupt) -> None:
        last = saved_at = time.monotonic()
        while parallel.once(self.fraction) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * self._decay()
            loss = self._step(optimizer)
            if not math.isfinite(loss):
                raise PbcError(
                    f"alignment of {self.label} diverged: the loss is {loss} at step {self.step}; "
                    "check the calibration images and the weights"
                )
            self.step += 1
            now = time.monotonic()
            self.elapsed += now - last
            last = now
            report("align", self.fraction(), f"{self.label}, step {self.step}, loss {loss:.3f}")
            if interrupt.requested or now - saved_at > SAVE_SECONDS:
                self._save(optimizer, done=False)
                saved_at = now
            if interrupt.requested:
                raise KeyboardInterrupt

    def fraction(self) -> float:
        """How much of the budget is used: of steps or time, whichever is nearer its end."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return max(by_steps, by_time)

    def _decay(self) -> float:
        warm_up = min(1.0, (self.step + 1) / 20)
        return warm_up * 0.5 * (1 + math.cos(math.pi * min(self.fraction(), 1.0)))

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        device = self.standard[0].mean.device
        seed = (self.seed * 1_000_003 + self.step) * parallel.size() + parallel.rank()
        generator = torch.Generator().manual_seed(seed)
        count = max(2, BATCH // parallel.size())
        chosen = torch.randint(len(self.calibration.align), (count,), generator=generator)
        images = self.calibration.batch(self.calibration.align[chosen.numpy()]).to(device)
        images = augment(images, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                targets = self.original(images)
            outputs = self._forward(images)
        loss = alignment_loss(outputs, targets, self.standard)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.proxy.parameters(), 5.0)
        optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _recalibrate(self) -> None:
        """Measure the batch norms' statistics afresh, of the channels that are left."""
        norms = _batch_norms(self.proxy)
        if not norms:
            return
        device = self.standard[0].mean.device
        _use_batch_statistics(self.proxy, True)
        for number, images in enumerate(_unaugmented(self.calibration, STATISTICS_BATCHES)):
            for graph, node in norms:
                _set_argument(graph, node, MOMENTUM, 1 / (number + 1))
            for graph in {id(g): g for g, _ in norms}.values():
                graph.recompile()
            self.proxy(images.to(device))
        _use_batch_statistics(self.proxy, False)

    def _save(self, optimizer: torch.optim.Optimizer, done: bool) -> None:
        if self.saved is None or parallel.rank() > 0:
            return
        tensors = {f"proxy/{n}": t.contiguous() for n, t in self.proxy.state_dict().items()}
        if not done:
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"adam/{number}/{k}": v.contiguous() for k, v in state.items()}
        facts = {"step": self.step, "elapsed": self.elapsed, "done": done}
        data = safetensors.torch.save(tensors, {"run": json.dumps(facts)})
        with replacing(self.saved) as file:
            file.write(data)

    def _resume(self, optimizer: torch.optim.Optimizer) -> bool:
        """Continue from what an interrupted compilation saved; True if it had finished."""
        facts, tensors = parallel.once(self._kept)
        if not facts:
            return False
        self.step, self.elapsed = facts["step"], facts["elapsed"]
        self.proxy.load_state_dict(
            {n.removeprefix("proxy/"): t for n, t in tensors.items() if n.startswith("proxy/")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam/"):
                _, number, key = name.split("/")
                state.setdefault(int(number), {})[key] = tensor
        if state:
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        return bool(facts["done"])

    def _kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts and tensors that `_save` wrote; none where there are none, or damaged ones."""
        if self.saved is None or not self.saved.is_file():
            return {}, {}
        try:
            with safe_open(self.saved, "pt") as file:
                facts = json.loads(file.metadata()["run"])
                return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            self.saved.unlink()  # what it held is computed again
            return {}, {}


def alignment_loss(
    outputs: list[Tensor], targets: list[Tensor], standard: list[Standard]
) -> Tensor:
    """Mean over interface tensors of squared error plus one minus cosine, both standardised."""
    total = torch.zeros((), device=outputs[0].device)
    for output, target, normal in zip(outputs, targets, standard, strict=True):
        z, goal = normal(output.float()).flatten(1), normal(target.float()).flatten(1)
        total = total + functional.mse_loss(z, goal) + 1 - torch.cosine_similarity(z, goal).mean()
    return total / len(outputs)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the batch, and resize one random crop of it to the full size."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    scale = 0.6 + 0.4 * float(torch.rand((), generator=generator))
    crop = [max(1, round(height * scale)), max(1, round(width * scale))]
    top = int(torch.randint(height - crop[0] + 1, (), generator=generator))
    left = int(torch.randint(width - crop[1] + 1, (), generator=generator))
    images = images[:, :, top : top + crop[0], left : left + crop[1]]
    images = functional.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return images.contiguous(memory_format=torch.channels_last)


def _unaugmented(calibration: Calibration, count: int) -> Iterator[Tensor]:
    """At most `count` batches, evenly spread over the alignment images."""
    chosen = calibration.align
    if len(chosen) > count * BATCH:
        chosen = chosen[np.linspace(0, len(chosen) - 1, count * BATCH).astype(int)]
    for start in range(0, len(chosen), BATCH):
        yield calibration.batch(chosen[start : start + BATCH])


def _batch_norms(proxy: Tapped) -> list[tuple[GraphModule, torch.fx.Node]]:
    graphs = [g for g in (proxy.prefix, proxy.body) if g is not None]
    return [
        (graph, node)
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and op_name(node) == "aten.batch_norm.default"
        and all(a.op == "get_attr" for a in node.args[1:5] if isinstance(a, torch.fx.Node))
    ]


def _set_argument(graph: GraphModule, node: torch.fx.Node, position: int, value: object) -> None:
    arguments = list(node.args)
    arguments[position] = value  # type: ignore[call-overload]
    node.args = tuple(arguments)


def _use_batch_statistics(proxy: Tapped, on: bool) -> None:
    """Switch batch norms between their batch's statistics (updating the running ones) and those."""
    for graph, node in _batch_norms(proxy):
        _set_argument(graph, node, TRAINING, on)
    for part in (proxy.prefix, proxy.body):
        if part is not None:
            part.recompile()


def _put(graph: GraphModule, name: str, tensor: Tensor) -> None:
    """Replace a tensor, keeping its kind (parameter or buffer)."""
    if isinstance(get_tensor(graph, name), nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=False)
    owner, _, leaf = name.rpartition(".")
    delattr(graph.get_submodule(owner), leaf)
    put_tensor(graph, name, tensor)


def _adopt(program: Program, level: int, proxy: Tapped) -> None:
    """Take a trained proxy's tensors over into the program's graphs."""
    for kind, trained in ((prefix, proxy.prefix), (body, proxy.body)):
        if trained is not None:
            for name in tensor_names(trained):
                value = get_tensor(trained, name).detach().contiguous().clone()
                _put(program.graphs[kind(level)], name, value)
