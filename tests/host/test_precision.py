"""What the precision "auto" becomes, and that it is decided by the layer that the host computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from far_env.host import precision
from far_env.host.blocks import FeedForward
from far_env.host.precision import resolve_precision

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Records the operators for which torch counts operations, with the dtype that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.found.add((func.overloadpacket, out.dtype))
        return out


def products(function: Callable[[], object]) -> set:
    with Products() as recorded:
        function()
    return recorded.found


@pytest.mark.parametrize(("seconds", "expected"), [((3.0, 1.0), torch.bfloat16), ((1.4, 1.0), torch.float32)])
@pytest.mark.parametrize("training", [False, True])
def test_auto_is_the_dtype_whose_layer_is_clearly_faster(monkeypatch, seconds, expected, training):
    timed = dict(zip(((torch.float32, training), (torch.bfloat16, training)), seconds, strict=True))
    monkeypatch.setattr(precision, "_layer_seconds", lambda *key: timed[key])
    assert resolve_precision("auto", CPU, training) == expected


def test_the_timed_layer_is_that_of_a_host():
    layers = [FeedForward(32).requires_grad_(False).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    of_a_host = products(lambda: [layer(torch.randn(4, 32).to(layer.net[2].weight)) for layer in layers])
    assert {dtype for _, dtype in of_a_host} == {torch.float32, torch.bfloat16}
    assert products(lambda: resolve_precision("auto", CPU)) == of_a_host


def test_for_a_training_the_timed_layer_is_that_of_a_training():
    layers = [nn.Linear(32, 32).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    of_a_training = products(lambda: [layer(torch.randn(4, 32).to(layer.weight)) for layer in layers])
    assert products(lambda: resolve_precision("auto", CPU, training=True)) == of_a_training


def test_a_precision_is_taken_by_name():
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        resolve_precision("half", CPU)
