"""The contents of a scorer's observations, and how signals are encoded: as columns of its rows, and as edges between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import check_inputs
from far_env.agents.memory import HistoryMemory
from far_env.contract import OF_LATENTS, OF_PAIRS
from far_env.envs.episodes import ROW_FEATURES

GAP = "column_gap"


@dataclass(frozen=True)
class ObservationSpec:
    """The inputs of a scorer beside the benchmark's matrix.

    Attributes:
        memory: true ages and features at birth, from a `HistoryMemory`.
        surroundings: how frames changed around each one, dropped frames included.
        signals: names of `far_env.contract.SIGNALS`.
        places: which frames show the same place.
        path: how far apart frames are along the camera's path.

    Raises:
        ValueError: on a combination or a signal that `far_env.agents.config.check_inputs` refuses.
    """

    memory: bool = False
    surroundings: bool = False
    signals: tuple[str, ...] = ()
    places: bool = False
    path: bool = False

    def __post_init__(self) -> None:
        checked = check_inputs(self.memory, self.surroundings, self.places, self.path, self.signals)
        object.__setattr__(self, "signals", checked)

    def new_memory(self) -> HistoryMemory | None:
        """Make the memory for a new clip; None if the scorer has none."""
        return HistoryMemory(self.surroundings, self.places, self.path) if self.memory else None

    @property
    def num_memory_columns(self) -> int:
        """Columns that the memory recalls."""
        surroundings = 3 * len(HistoryMemory.SURROUNDING_OFFSETS) * self.surroundings
        inferred = surroundings + self.places + HistoryMemory.PATH_WIDTH * self.path
        return HistoryMemory.WIDTH * self.memory + inferred

    @property
    def num_row_columns(self) -> int:
        """Columns of the benchmark's matrix and of memory; those of signals come after them."""
        return len(ROW_FEATURES) + self.num_memory_columns


def tier(names: Sequence[str]) -> str:
    """The tier of a policy that reads these signals: "M" (FrameMeta alone), "L" (latents) or "A" (attention)."""
    return "M" if not names else "L" if all(name in OF_LATENTS for name in names) else "A"


def columns(signals: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Signals as columns of rows, float32 (…, N, C), which are appended to the others.

    First those of single frames, squashed to x / (1 + |x|), then the N entries of each one of pairs, then those of column_gap,
    for each pair one per latent column, squashed after taking the root. NaN becomes zero.
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
    """Number of columns that signals of these shapes (N, …) become."""
    return sum(int(np.prod(shape[1:])) for shape in shapes.values())


def num_edges(names: Sequence[str]) -> int:
    """Channels of the edges of `rows_and_edges`."""
    return 1 + sum(3 if name == GAP else 1 for name in names if name in OF_PAIRS)


def num_row_inputs(names: Sequence[str]) -> int:
    """Columns of the rows of `rows_and_edges`."""
    return sum(2 if name == GAP else 1 for name in names)


def rows_and_edges(packed: Tensor, mask: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The columns of `columns` as rows and edges for the scorer; there may be padding.

    Args:
        packed: (B, N, C).
        mask: (B, N), 1 where a frame is.

    Returns:
        rows (B, N, R): each signal of single frames; of each signal of pairs the largest over the other frames; of column_gap,
        the part of a frame that another does not explain, the mean and the largest over columns of the smallest over the other
        frames.
        edges (B, N, N, E): whether i is j; each one of pairs; of column_gap the mean and the largest over columns of frame i,
        and the mean over those of frame j.
    """
    slots = mask.shape[1]
    same = torch.eye(slots, device=mask.device).expand(len(mask), -1, -1)
    no_other = (same + (1 - mask)[:, None, :]) > 0
    rows, edges, start = [], [same], 0
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
    """Zero in place of the infinite extremes of frames that have no other frame."""
    return values.masked_fill(values.isinf(), 0.0)


def _in_order(names: Sequence[str]) -> list[str]:
    """Signals of single frames first, column_gap last."""
    return sorted(names, key=lambda name: (name == GAP, name in OF_PAIRS, name))
