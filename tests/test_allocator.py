"""Freed memory is kept by the process and returned when asked for, where the C library is glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from far_env.allocator import keep_freed_memory, return_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
assert keep_freed_memory()
before = resident()
pieces = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
held = resident()
del pieces
freed = resident()
assert return_freed_memory()
print(held - before, held - freed, freed - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_stays_until_it_is_returned():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    held, lost, returned = map(float, out.split())
    assert held > 190 and lost < 20 and returned > 150
