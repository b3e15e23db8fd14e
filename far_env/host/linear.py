"""Linear layers of models that are not trained: on a CPU by oneDNN, with the bias and a GELU in the same pass.

torch multiplies float32 matrices on CPUs with MKL, which uses half the width of the registers of processors that are not
Intel's, and computes a GELU from memory afterwards. oneDNN has neither limit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from far_env.device import timed

_DTYPES = (torch.float32, torch.bfloat16)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """``torch.nn.functional.linear`` of x (..., D), followed by the tanh approximation of GELU if ``gelu``.

    With gradients, under autocast, on other devices and in other dtypes it is torch's own; the rounding differs.
    """
    usual = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or _needs_grad(x, weight)
    if _HAS_ONEDNN and not usual and x.dtype == weight.dtype and x.dtype in _DTYPES:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, by `linear` where it is one."""
    return linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)


def linear_rate(sides: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Floating-point operations per second of `linear` on random numbers.

    Args:
        sides: rows, features in, and features out.
        repeats: products that are timed together.
    """
    rows, inner, columns = sides
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (columns, inner)))
    for _ in range(2):  # the first ones take longer
        linear(x, weight, None)
    seconds: dict[str, float] = {}
    with timed(seconds, "products", device):
        for _ in range(repeats):
            linear(x, weight, None)
    return 2 * rows * inner * columns * repeats / seconds["products"]


def _needs_grad(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


if _HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(_: torch.Size, weight_shape: torch.Size, *args: object, out_shape: torch.Size, **options: object) -> int:
        """Operations of the product, which torch's counter does not know."""
        return 2 * out_shape.numel() * weight_shape[1]
