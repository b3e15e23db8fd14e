"""Muon for convolutions: torch's Muon takes matrices, and a kernel is one, with a row per output channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ConvolutionMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on kernels (out, in, h, w) as matrices (out, in·h·w)."""

    def __init__(self, kernels: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        self._kernels = list(kernels)
        self._matrices = [torch.nn.Parameter(self._as_matrix(kernel)) for kernel in self._kernels]
        super().__init__(self._matrices, lr=lr, weight_decay=weight_decay)

    @staticmethod
    def _as_matrix(kernel: Tensor) -> Tensor:
        return kernel.detach().reshape(len(kernel), -1).clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the kernels from their gradients."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.copy_(kernel.reshape(matrix.shape))
            matrix.grad = None if kernel.grad is None else kernel.grad.reshape(matrix.shape)
        super().step()
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            kernel.copy_(matrix.reshape(kernel.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the kernels."""
        for kernel in self._kernels:
            kernel.grad = None
