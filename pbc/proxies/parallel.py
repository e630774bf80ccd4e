"""Several compiling processes under torchrun: they align together, rank 0 decides and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")


@contextmanager
def group() -> Iterator[None]:
    """Join the processes that torchrun started; does nothing where it started this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        # Objects travel over the current device, which is the first GPU unless told.
        torch.cuda.set_device(device())
    # What one process measures while the others wait may take long.
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2)
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """Return the number of processes that work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def device() -> torch.device:
    """This process's own GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def once(compute: Callable[[], Result]) -> Result:
    """Rank 0's result on every rank: for what is measured, which differs from run to run."""
    if size() == 1:
        return compute()
    box: list[Result | None] = [compute() if rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    (result,) = box
    assert result is not None
    return result


def wait() -> None:
    """Go on only when every process has come here."""
    if size() > 1:
        distributed.barrier()
