"""The settings of the TVM runtime before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SPINS = "TVM_THREAD_POOL_SPIN_COUNT"
SCRIPT = f"""
import ctypes, os
from pbc.runtime.engines.tvm.library import runtime
runtime()
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print(getenv(b"{SPINS}").decode())
"""


@pytest.mark.parametrize("own", [None, "7"])
def test_idle_threads_soon_sleep_unless_somebody_wants_otherwise(own: str | None) -> None:
    """As the library reads it: a process ends when its idle threads have yielded so often."""
    environment = {name: value for name, value in os.environ.items() if name != SPINS}
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment if own is None else {**environment, SPINS: own},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == (own or "1000")
