"""Freed memory is kept by the process and returned when asked for, where the C library is glibc; oneDNN keeps fewer kernels."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from far_env.allocator import keep_freed_memory
from far_env.contract import NewestFrames
from far_env.evaluation.evaluate import evaluate_grid

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_an_evaluation_begins_without_the_memory_that_was_freed_before(tiny_workload):
    def resident(*_):
        with open("/proc/self/statm") as file:
            found.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)

    found = []
    keep_freed_memory()
    pieces = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
    del pieces
    resident()
    evaluate_grid([tiny_workload], [4], {"newest": NewestFrames()}, [0], metrics=["psnr"], progress=False, player=resident)
    before, within = found
    assert before - within > 150


PRODUCTS = """
import torch
from far_env.cli import run_guarded
def products():
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    for _ in range(2):
        print("PASS", flush=True)
        for rows in range(1, 301):
            torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 8, dtype=torch.bfloat16), weight, None, "none", [], "")
run_guarded("products", products)
"""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bfloat16 of oneDNN")
@pytest.mark.parametrize(("chosen", "compiled_again"), [(None, True), ("1000", False)])
def test_commands_keep_the_kernels_of_fewer_shapes_unless_told(chosen, compiled_again):
    """Of 300 shapes in turn none is still there at its second use if 256 are kept."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    if chosen is not None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = chosen
    run = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, env=environment)
    second = run.stdout.rpartition("PASS")[2]
    assert ("create:cache_miss" in second) == compiled_again and ("create:cache_hit" in second) != compiled_again
