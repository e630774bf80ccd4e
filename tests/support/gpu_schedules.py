"""Schedules for GPUs, run on the host."""

from __future__ import annotations

import re
from typing import Any

import tvm


def in_turn(function: Any) -> Any:
    """The same function where threads are loops and every kind of memory is the host's.

    A schedule keeps what a function computes when its threads run one after another, so this is
    what the schedule computes, all but the barriers, which TVM adds afterwards.
    """
    text = function.script()
    text = re.sub(r'T\.thread_binding\(([^,]+), thread="[^"]+"', r"T.serial(\1", text)
    text = re.sub(r'scope="(shared|shared\.dyn|local)"', 'scope="global"', text)
    assert "thread_binding" not in text
    return tvm.script.from_source(text)
