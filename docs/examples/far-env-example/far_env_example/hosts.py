"""A host: the shipped one with half the ODE steps per frame."""

from __future__ import annotations

from dataclasses import replace

import torch

from far_env.host.weights import Host, load_host


def load_two_steps(device: torch.device, dtype: torch.dtype) -> Host:
    """The host on a device, computing in ``dtype``. It is called once per device and dtype."""
    return replace(load_host("embedded", str(device), dtype), name="embedded_two_steps", num_steps=2)
