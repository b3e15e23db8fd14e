"""What a rollout needs of a host: frames to latents and back, and one new unit from clean ones, noise and conditions.

A *unit* is what a host generates at once, and what a policy keeps or drops: a frame, or a chunk of frames. A model of one's own
is a class with the attributes ``name``, ``latent_shape`` and ``frame_size`` and the methods ``encode``, ``decode`` and
``generate``, best as a subclass of `Host`, from which it has everything else. The plain rollout, `far_env.rollout.reference`,
asks for nothing more. `far_env.rollout.engine` also takes hosts of this kind, and generates their units one by one; for
`far_env.host.far_host.FARHost` it has a faster way with keys and values, and records signals of the attention.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

CONDITIONS = ("action", "label", "prompt")
"""What a host may be conditioned on: an action of every frame, a class of the clip, or a text that describes the clip."""
NEEDED = ("name", "latent_shape", "frame_size", "encode", "decode", "generate")
"""What every host has to define itself."""
INHERITED = ("device", "dtype", "weights_hash", "num_steps", "condition", "num_classes", "chunked", "units", "precision")
"""What a subclass of `Host` has without defining it."""


@dataclass(frozen=True)
class Unit:
    """The size of a unit.

    Attributes:
        frames: that it shows.
        latents: that encode it.
    """

    frames: int = 1
    latents: int = 1


@dataclass(frozen=True)
class Conditions:
    """What a unit is generated with, besides the kept units and the noise.

    Attributes:
        num_steps: ODE steps, or of whatever kind the host takes.
        guidance: scale of classifier-free guidance, 1 for none.
        actions: of the kept frames and the new one, oldest first; empty without actions.
        label: class of the clip, or None.
        prompt: text that describes the clip, or None.
    """

    num_steps: int
    guidance: float = 1.0
    actions: tuple[int, ...] = ()
    label: int | None = None
    prompt: str | None = None


class Host(Protocol):
    """A frozen video model on one device.

    A host for frames of several sizes also has ``with_frame_size(size)``, which returns a host for that size.

    A subclass without an ``__init__`` of its own is made with a device and a dtype, so that it can be an entry point of
    ``far_env.hosts`` itself.

    Attributes:
        name: of the model.
        weights_hash: eight hex digits that are others if the model is another one. Unless a subclass sets it, those of the file
            that holds its source; a model with weights should set that of their file, `far_env.tensor_files.file_hash`.
        latent_shape: (C, h, w) of one latent.
        frame_size: side of its square frames in pixels.
        num_steps: default number of steps per unit.
        condition: one of `CONDITIONS`, or None.
        num_classes: of its actions or labels.
        chunked: False where every unit is a frame, and its latents have the shape (C, h, w). True where units are chunks,
            (n, C, h, w), whose sizes `units` tells.
        device, dtype: of its tensors.
    """

    name: str
    weights_hash: str
    latent_shape: tuple[int, int, int]
    frame_size: int
    num_steps: int = 1
    condition: str | None = None
    num_classes: int = 0
    chunked: bool = False
    device: torch.device
    dtype: torch.dtype

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.weights_hash = source_hash(type(self))

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (B, L, C, h, w) of frames (B, F, 3, H, W) in [0, 1]; L = F unless the host is chunked."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [0, 1] of latents (B, L, C, h, w).

        A host that is not chunked decodes each alone. A chunked one is given all latents from the first one of a clip on.
        """
        ...

    def generate(self, kept: Sequence[Tensor], noise: Tensor, conditions: Conditions) -> Tensor:
        """The unit that follows the kept ones, in the shape of the noise.

        Args:
            kept: clean latents of the units in the history, oldest first; others may have been dropped between them.
            noise: standard normal values in the shape of the new unit's latents.
            conditions: steps, guidance, and what the model is conditioned on.
        """
        ...

    def units(self, num_frames: int) -> tuple[Unit, ...]:
        """The units of a clip of so many frames. Raises ValueError if such a clip is not made of whole ones."""
        return (Unit(),) * num_frames

    @property
    def precision(self) -> str:
        """The name of its dtype, such as float32, as options and records have it."""
        return str(self.dtype).removeprefix("torch.")


def source_hash(cls: type) -> str:
    """First eight hex digits of the SHA-256 of the file that defines a class; "unknown" for a class without a file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:8]
    except (OSError, TypeError):
        return "unknown"


def check_host(host: Any, origin: str) -> Host:
    """Return the object as a host. Raises ValueError, naming its origin, if it lacks something that every host has.

    What has to be defined and is only inherited counts as lacking.
    """

    def has(name: str) -> bool:
        return hasattr(host, name) and (name not in NEEDED or getattr(type(host), name, None) is not getattr(Host, name, host))

    if lacking := [name for name in (*NEEDED, *INHERITED) if not has(name)]:
        raise ValueError(
            f"{origin} is none: {type(host).__name__} lacks {', '.join(lacking)}; make it a subclass of "
            "far_env.host.protocol.Host that defines them, and call its __init__ with the device and the dtype"
        )
    return host


def split_units(host: Host, latents: Tensor, units: Sequence[Unit]) -> list[Tensor]:
    """The latents of each unit, (C, h, w) or (n, C, h, w), of those of a clip (L, C, h, w)."""
    return list(latents.split([unit.latents for unit in units])) if host.chunked else list(latents)


def join_units(host: Host, units: Sequence[Tensor]) -> Tensor:
    """Latents (L, C, h, w) of units in turn, one at least; the inverse of `split_units`."""
    return torch.cat(list(units)) if host.chunked else torch.stack(list(units))


def as_wide_latent(unit: Tensor, num_latents: int) -> Tensor:
    """A chunk (n, C, h, w) as one latent (C, h, N·w), so that chunks are compared as frames are.

    Its latents stand side by side. A shorter chunk is stretched to N by repeating latents: column block j is latent ⌊j·n/N⌋. A
    unit (C, h, w) is returned as it is.
    """
    if unit.ndim == 3:
        return unit
    places = torch.arange(num_latents, device=unit.device) * len(unit) // num_latents
    return unit[places].permute(1, 2, 0, 3).flatten(2)
