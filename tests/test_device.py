"""Device and precision: what "auto" becomes, and names that are none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from far_env import device
from far_env.device import denormals_flushed


def test_auto_is_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.resolve_device("auto").type == expected
    with pytest.raises(ValueError, match="unknown device 'toaster'"):
        device.resolve_device("toaster")
    with pytest.raises(ValueError, match="device 'mps' is not supported"):
        device.resolve_device("mps")
    with pytest.raises(ValueError, match=r"device 'cuda:77' is not available: torch finds \d+ CUDA devices"):
        device.resolve_device("cuda:77")


def test_torch_defaults_are_those_of_a_fresh_process_and_come_back():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), device.torch_defaults():
            made = torch.ones(2, 2)
            product = made @ made
        assert (made.dtype, made.device.type, product.dtype) == (torch.float32, "cpu", torch.float32)
        assert (torch.ones(1).dtype, torch.ones(1).device.type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(("parent", "expected"), [(None, []), ("a process", [1])])
def test_child_processes_use_one_thread(monkeypatch, parent, expected):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(device.multiprocessing, "parent_process", lambda: parent)
    device.use_one_thread_in_child_process()
    assert chosen == expected


def test_a_gpu_that_the_parent_of_a_forked_process_used_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device.resolve_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(ValueError, match=r"start processes with context='spawn'.*or use device='cpu'"):
        device.resolve_device("auto")
    assert device.resolve_device("cpu") == torch.device("cpu")


def test_denormal_floats_are_flushed_within_a_block_and_restored_after_it():
    tiny = torch.tensor([1e-40])
    with denormals_flushed():
        assert sys.float_info.min / 2 == 0 and (tiny * 1).item() == 0
        with denormals_flushed():
            pass
        assert sys.float_info.min / 2 == 0, "a block within leaves them flushed"
    assert sys.float_info.min / 2 > 0 and (tiny * 1).item() > 0
    with pytest.raises(RuntimeError), denormals_flushed():
        raise RuntimeError
    assert sys.float_info.min / 2 > 0


def test_an_upload_to_the_cpu_copies_nothing_and_changes_the_dtype_if_asked():
    values = torch.arange(6.0)
    assert device.upload(values, torch.device("cpu")) is values
    assert device.upload(values, torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
    assert device.upload(values, torch.device("meta"), torch.float16).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_an_upload_to_a_gpu_may_be_changed_on_the_cpu_at_once():
    values = torch.arange(2.0**22)
    there = device.upload(values, torch.device("cuda", 0), torch.float64)
    values.zero_()
    assert torch.equal(there.cpu(), torch.arange(2.0**22, dtype=torch.float64))


def test_free_memory_of_a_gpu_is_without_what_cuda_graphs_hold(monkeypatch):
    def segment(pool: tuple[int, int], number: int, *blocks: tuple[str, int]) -> dict:
        return {"device": number, "segment_pool_id": pool, "blocks": [{"state": state, "size": size} for state, size in blocks]}

    segments = [
        segment((0, 0), 1, ("inactive", 7), ("active_allocated", 20)),
        segment((0, 1), 1, ("inactive", 100), ("active_allocated", 3)),
        segment((0, 1), 0, ("inactive", 5000)),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda of: 130)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda of: 23)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (1000, 2000))
    assert device.free_bytes(torch.device("cuda", 1)) == 1007


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_free_memory_of_a_gpu_is_that_of_the_card_and_what_torch_holds_unused():
    place = device.resolve_device("cuda")
    before = device.free_bytes(place)
    tensor = torch.zeros(2**24, device=place)
    assert before - device.free_bytes(place) >= tensor.nbytes
    del tensor
    assert abs(device.free_bytes(place) - before) < 2**26


@pytest.mark.parametrize(("platform", "counted"), [("linux", 300 * 1024), ("darwin", 300 * 1024**2)])
def test_peak_memory_is_in_mib_where_the_system_counts_kib_or_bytes(monkeypatch, platform, counted):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=counted))
    assert device.peak_memory_mib(torch.device("cpu")) == 300


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc/self/statm, which says the memory in use")
def test_peak_memory_is_not_below_the_memory_in_use_and_of_its_size():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    in_use = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert in_use <= 1.1 * device.peak_memory_mib(torch.device("cpu")) <= 100 * in_use
