"""Linear layers by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from far_env.host import linear as module
from far_env.host.linear import linear


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((4, 16, 96), (64, 96), (64,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_it_is_torchs_layer_and_its_gelu_in_float64_to_rounding(layer, dtype, gelu):
    x, weight, bias = (part.to(dtype) for part in layer)
    exact = F.linear(x.double(), weight.double(), bias.double())
    if gelu:
        exact = F.gelu(exact, approximate="tanh")
    error = (linear(x, weight, bias, gelu).double() - exact).abs() / (1 + exact.abs())
    assert error.max() < (2e-5 if dtype == torch.float32 else 8e-3)


def test_rows_do_not_depend_on_who_is_in_the_batch(layer):
    x, weight, bias = layer
    assert torch.equal(linear(x, weight, bias, gelu=True)[1:2], linear(x[1:2], weight, bias, gelu=True))


def test_autocast_is_obeyed(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*layer).dtype == F.linear(*layer).dtype == torch.bfloat16


def test_gradients_are_torchs(layer):
    x, weight, bias = (part.requires_grad_() for part in layer)
    linear(x, weight, bias, gelu=True).sum().backward()
    found = [part.grad.clone() for part in layer]
    for part in layer:
        part.grad = None
    F.gelu(F.linear(x, weight, bias), approximate="tanh").sum().backward()
    assert all(torch.equal(one, part.grad) for one, part in zip(found, layer, strict=True))


def test_its_operations_are_counted_as_those_of_torchs_layer(layer):
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(*layer)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 4 * 16 * 96 * 64] * 2


def test_the_rate_is_of_the_products_that_are_timed(monkeypatch):
    called = []
    monkeypatch.setattr(module, "linear", lambda x, weight, bias: called.append((x.shape, weight.shape)))
    clock = iter((10.0, 14.0))
    monkeypatch.setattr("far_env.device.time.perf_counter", lambda: next(clock))
    rate = module.linear_rate((8, 4, 2), torch.float32, torch.device("cpu"), 5)
    assert called == [((8, 4), (2, 4))] * 7 and rate == 5 * 2 * 8 * 4 * 2 / 4


def test_without_onednn_torchs_layer_is_used(layer, monkeypatch):
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    assert torch.equal(linear(*layer), F.linear(*layer))
