"""Which parameters Muon trains, and Muon for convolutions: torch's takes matrices, and a kernel is one, a row per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def split_parameters(
    model: torch.nn.Module, is_muons: Callable[[str, torch.nn.Parameter], bool]
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters that Muon trains, and the others, each in the model's order.

    Args:
        is_muons: whether Muon trains the parameter of this name.
    """
    named = list(model.named_parameters())
    return [p for name, p in named if is_muons(name, p)], [p for name, p in named if not is_muons(name, p)]


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
