"""What a scorer sees of a rollout, and what signals become for it: further columns of its rows, and edges between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from far_env.agents.memory import HistoryMemory
from torch import Tensor

from far_env.contract import OF_LATENTS, OF_PAIRS, check_signals
from far_env.envs.episodes import ROW_FEATURES

GAP = "column_gap"
UNUSABLE = ("key_proto",)
"""As long as the host's keys are, so a scorer could not be used with another host."""


@dataclass(frozen=True)
class ObservationSpec:
    """What a scorer sees beside the benchmark's matrix.

    Attributes:
        memory: what a `HistoryMemory` recalls.
        surroundings: of frames that were dropped as well.
        signals: names of `far_env.contract.SIGNALS`.
        places: which frames show the same place.
        path: how far apart frames are along the camera's path.

    Raises:
        ValueError: on surroundings without memory, places or path without surroundings, or a signal that cannot be used.
    """

    memory: bool = False
    surroundings: bool = False
    signals: tuple[str, ...] = ()
    places: bool = False
    path: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "signals", check_usable(self.signals))
        if self.surroundings and not self.memory:
            raise ValueError("surroundings are remembered: set memory as well")
        if (self.places or self.path) and not self.surroundings:
            raise ValueError("places and path are told by surroundings: set surroundings as well")

    def new_memory(self) -> HistoryMemory | None:
        """For a new clip."""
        return HistoryMemory(self.surroundings, self.places, self.path) if self.memory else None

    @property
    def num_remembered(self) -> int:
        """Columns of memory."""
        further = 3 * len(HistoryMemory.AROUND) * self.surroundings + self.places + HistoryMemory.PATH_WIDTH * self.path
        return HistoryMemory.WIDTH * self.memory + further

    @property
    def num_told(self) -> int:
        """Columns of rows before those of signals."""
        return len(ROW_FEATURES) + self.num_remembered


def check_usable(names: Sequence[str]) -> tuple[str, ...]:
    """The names. Raises ValueError on one that is no signal, or of no use to a scorer."""
    names = check_signals(names)
    for name in names:
        if name in UNUSABLE:
            raise ValueError(f"a scorer cannot be shown {name}, whose length depends on the host; show it lat_cos or key_cos")
    return names


def tier(names: Sequence[str]) -> str:
    """What a policy that sees these signals is compared with: "M" (FrameMeta alone), "L" (latents) or "A" (attention)."""
    return "M" if not names else "L" if all(name in OF_LATENTS for name in names) else "A"


def columns(signals: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Signals as columns of rows, float32 (…, N, C), to stand behind the others.

    First those of single frames, squashed to x / (1 + |x|), then the N entries of each one of pairs, then those of column_gap,
    for each pair one per latent column, squashed after taking the root. What is not a number is zero.
    """
    parts = []
    for name in _in_order(names):
        values = np.nan_to_num(np.asarray(signals[name], dtype=np.float32))
        if name == GAP:
            root = np.sqrt(values)
            parts.append((root / (1 + root)).reshape(*values.shape[:-2], -1))
        else:
            parts.append(values if name in OF_PAIRS else (values / (1 + abs(values)))[..., None])
    return np.concatenate(parts, axis=-1)


def num_columns(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many columns signals of these shapes (N, …) become."""
    return sum(int(np.prod(shape[1:])) for shape in shapes.values())


def num_edges(names: Sequence[str]) -> int:
    """Channels of the edges of `rows_and_edges`."""
    return 1 + sum(3 if name == GAP else 1 for name in names if name in OF_PAIRS)


def num_row_inputs(names: Sequence[str]) -> int:
    """Columns of the rows of `rows_and_edges`."""
    return sum(2 if name == GAP else 1 for name in names)


def rows_and_edges(packed: Tensor, mask: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The columns of `columns` as the scorer uses them; there may be padding.

    Args:
        packed: (B, N, C).
        mask: (B, N), 1 where a frame is.

    Returns:
        rows (B, N, R): each single signal; of each one of pairs the largest over the other frames; of column_gap, which is
        what the other frames leave unexplained, the mean and the largest over columns of the smallest over the other frames.
        edges (B, N, N, E): whether i is j; each one of pairs; of column_gap the mean and the largest over columns of frame i,
        and the mean over those of frame j.
    """
    slots = mask.shape[1]
    own = torch.eye(slots, device=mask.device).expand(len(mask), -1, -1)
    no_other = (own + (1 - mask)[:, None, :]) > 0
    rows, edges, start = [], [own], 0
    for name in _in_order(names):
        if name not in OF_PAIRS:
            rows.append(packed[..., start : start + 1])
            start += 1
        elif name != GAP:
            values = packed[..., start : start + slots]
            rows.append(_or_zero(values.masked_fill(no_other, -torch.inf).amax(dim=2))[..., None])
            edges.append(values)
            start += slots
        else:
            gaps = packed[..., start:].unflatten(-1, (slots, -1))
            nearest = _or_zero(gaps.masked_fill(no_other[..., None], torch.inf).amin(dim=2))
            rows.append(torch.stack([nearest.mean(dim=-1), nearest.amax(dim=-1)], dim=-1))
            mean = gaps.mean(dim=-1)
            edges += [mean, gaps.amax(dim=-1), mean.transpose(1, 2)]
    return torch.cat(rows, dim=-1) * mask[..., None], torch.stack(edges, dim=-1)


def _or_zero(values: Tensor) -> Tensor:
    """A frame without others has no nearest."""
    return values.masked_fill(values.isinf(), 0.0)


def _in_order(names: Sequence[str]) -> list[str]:
    """Single frames' first, column_gap last."""
    return sorted(names, key=lambda name: (name == GAP, name in OF_PAIRS, name))
