"""Muon on kernels equals torch's Muon on the same numbers as matrices."""

from __future__ import annotations

import torch
from torch import nn

from far_env.host.training.muon import ConvolutionMuon


def train(kernel: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradient = torch.randn((8, 4, 3, 3), generator=torch.Generator().manual_seed(step))
        kernel.grad = gradient.reshape(kernel.shape).to(memory_format=torch.preserve_format)
        optimizer.step()
        optimizer.zero_grad()
        assert kernel.grad is None


def test_a_kernel_is_trained_as_a_matrix_in_any_memory_format():
    start = torch.randn((8, 4, 3, 3), generator=torch.Generator().manual_seed(99))
    matrix = nn.Parameter(start.reshape(8, 36).clone())
    train(matrix, torch.optim.Muon([matrix], lr=0.02, weight_decay=0.01), range(3))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(start.clone(memory_format=memory_format))
        train(kernel, ConvolutionMuon([kernel], lr=0.02, weight_decay=0.01), range(3))
        torch.testing.assert_close(kernel.reshape(8, 36), matrix)
    assert not torch.equal(kernel, start)


def test_a_resumed_training_equals_an_unbroken_one():
    start = torch.randn((8, 4, 3, 3), generator=torch.Generator().manual_seed(99))
    unbroken = nn.Parameter(start.clone())
    train(unbroken, ConvolutionMuon([unbroken], lr=0.02, weight_decay=0.01), range(4))
    kernel = nn.Parameter(start.clone())
    first = ConvolutionMuon([kernel], lr=0.02, weight_decay=0.01)
    train(kernel, first, range(2))
    resumed = nn.Parameter(kernel.detach().clone())
    second = ConvolutionMuon([resumed], lr=0.5, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    train(resumed, second, range(2, 4))
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)
