"""Device and precision: what "auto" becomes, and names that are none."""

from __future__ import annotations

import pytest
import torch

from far_env import device


def test_auto_is_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.resolve_device("auto").type == expected
    with pytest.raises(ValueError, match="unknown device 'toaster'"):
        device.resolve_device("toaster")
    with pytest.raises(ValueError, match="device 'mps' is not supported"):
        device.resolve_device("mps")
    with pytest.raises(ValueError, match=r"device 'cuda:77' was asked for, but torch sees \d+ CUDA devices"):
        device.resolve_device("cuda:77")


@pytest.mark.parametrize(("seconds", "expected"), [((3.0, 1.0), torch.bfloat16), ((1.0, 3.0), torch.float32)])
def test_auto_precision_is_the_one_that_multiplies_faster(monkeypatch, seconds, expected):
    timed = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(device, "_product_seconds", timed.get)
    assert device.resolve_precision("auto", torch.device("cpu")) == expected


def test_a_precision_is_taken_by_name():
    cpu = torch.device("cpu")
    assert device.resolve_precision("float32", cpu) == torch.float32
    assert device.resolve_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        device.resolve_precision("half", cpu)
