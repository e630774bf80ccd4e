"""Memory that is freed is used again, without a page fault for every page of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
import numpy as np
from pbc.runtime.allocator import keep_freed_memory

def faults_per_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(64 * 2**20, np.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

default = faults_per_block()
assert keep_freed_memory()
np.ones(64 * 2**20, np.uint8)
print(default, faults_per_block())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    default, kept = map(float, result.stdout.split())
    assert default > 20
    assert kept < default / 4
