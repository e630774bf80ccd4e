"""Distillation: a proxy learns, on calibration data, to send what level 0 sends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from pbc.errors import PbcError
from pbc.ir.calibration import BATCH, Calibration, batches
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.rewrite import replace_tensor
from pbc.proxies import parallel
from pbc.proxies.align_losses import AlignmentLoss
from pbc.proxies.fidelity import UpToInterface
from pbc.util.atomic import replacing
from pbc.util.interrupt import Interrupt, deferred_interrupt
from pbc.util.progress import report

SAVE_SECONDS = 60.0
MINUTES = 10.0
"""Of all levels together, where nobody says how long."""
STATISTICS_BATCHES = 16


@dataclass
class Distillation:
    """One level learns to send what level 0 sends; it can be saved at any step and continued.

    loss: of what both make of the same images. rate: the learning rate of a tensor, from which it
        decays (cosine); AdamW.

    steps, seconds: the budget, whichever ends first; None leaves it to the other.
    saved: where the state is kept between interruptions; None where it is not.
    begin: what is done to the proxy before its first step.
    task: the pass's name, for its progress; label: the level's, for progress and errors.
    autocast: compute in bfloat16 on a GPU.
    """

    original: UpToInterface
    proxy: UpToInterface
    loss: AlignmentLoss
    calibration: Calibration
    seed: int
    steps: int | None
    seconds: float | None
    saved: Path | None
    rate: Callable[[Tensor], float]
    task: str
    label: str
    begin: Callable[[], None] | None = None
    autocast: bool = True
    step: int = 0
    elapsed: float = 0.0

    def train(self) -> None:
        weights = list(self.proxy.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        self._forward = self._distributed()
        groups = [{"params": [weight], "first": self.rate(weight)} for weight in weights]
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        if not self._resume(optimizer):
            if self.step == 0 and self.begin is not None:
                self.begin()
            with deferred_interrupt() as interrupt:
                self._steps(optimizer, interrupt)
            self._save(optimizer, done=True)
        for weight in weights:
            weight.requires_grad_(False)

    def _distributed(self) -> Callable[[Tensor], list[Tensor]]:
        """The proxy's forward; among several processes its gradients are averaged."""
        if parallel.size() == 1:
            return self.proxy
        return nn.parallel.DistributedDataParallel(self.proxy)

    def _steps(self, optimizer: torch.optim.Optimizer, interrupt: Interrupt) -> None:
        last = saved_at = time.monotonic()
        while parallel.once(self.fraction) < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["first"] * self._decay()
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
            report(self.task, self.fraction(), f"{self.label}, step {self.step}, loss {loss:.3f}")
            if interrupt.requested or now - saved_at > SAVE_SECONDS:
                self._save(optimizer, done=False)
                saved_at = now
            if interrupt.requested:
                raise KeyboardInterrupt

    def fraction(self) -> float:
        """Share of the budget that is used: of steps or time, whichever is nearer its end."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return max(by_steps, by_time)

    def _decay(self) -> float:
        warm_up = min(1.0, (self.step + 1) / 20)
        return warm_up * 0.5 * (1 + math.cos(math.pi * min(self.fraction(), 1.0)))

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        device = self.loss.standard[0].mean.device
        seed = (self.seed * 1_000_003 + self.step) * parallel.size() + parallel.rank()
        generator = torch.Generator().manual_seed(seed)
        count = max(2, BATCH // parallel.size())
        chosen = torch.randint(len(self.calibration.align), (count,), generator=generator)
        images = self.calibration.batch(self.calibration.align[chosen.numpy()]).to(device)
        images = augment(images, generator)
        low = self.autocast and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            with torch.no_grad():
                targets = self.original(images)
            outputs = self._forward(images)
        loss = self.loss(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.proxy.parameters(), 5.0)
        optimizer.step()
        return float(loss.detach())

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


def spread(calibration: Calibration, count: int) -> Iterator[np.ndarray]:
    """The indices of at most `count` batches, evenly spread over the alignment images."""
    chosen = calibration.align
    if len(chosen) > count * BATCH:
        chosen = chosen[np.linspace(0, len(chosen) - 1, count * BATCH).astype(int)]
    return batches(chosen)


def unaugmented(calibration: Calibration, count: int) -> Iterator[Tensor]:
    """These images."""
    return map(calibration.batch, spread(calibration, count))


def adopt(level: LevelGraphs, proxy: UpToInterface) -> None:
    """Take a trained proxy's tensors over into the level's graphs."""
    for own, trained in ((level.prefix, proxy.prefix), (level.body, proxy.body)):
        if own is not None and trained is not None:
            for name in tensor_names(trained):
                value = get_tensor(trained, name).detach().contiguous().clone()
                replace_tensor(own, name, value)
