"""What decisions are collected on: the part of the engine that collecting uses, and true frames in place of generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.frame_meta import frame_features
from far_env.rollout.signals import latent_cosines
from far_env.workload import Workload


class Histories(Protocol):
    """The part of `far_env.rollout.engine.RolloutBatch` that collecting uses."""

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next frame of each row."""

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), padded at the end, and lengths (R,)."""

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of kept histories, (R, K, 4)."""

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Signals of each row's history, by name."""

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""


class TrueHistories:
    """Histories of true frames, for use without a host; see `Histories`.

    Args:
        latents: of whole clips (R, T, C, h, w).
        num_context: frames that each history begins with.
    """

    SIGNALS = ("lat_cos",)
    """The `far_env.contract.SIGNALS` of true frames; all others are recorded while a host generates a frame."""

    def __init__(self, latents: Tensor, num_context: int) -> None:
        self.latents = latents
        self.num_context = num_context
        self.kept = [list(range(num_context)) for _ in latents]
        self.next = [num_context] * len(latents)

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next true frame of each row."""
        for row in rows:
            self.kept[row].append(self.next[row])
            self.next[row] += 1

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""
        return len(self.kept[row])

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, padded with zeros at the end, and lengths (R,)."""
        histories = [self.latents[row, self.kept[row]] for row in rows]
        lengths = torch.tensor([len(history) for history in histories], device=self.latents.device)
        return torch.nn.utils.rnn.pad_sequence(histories, batch_first=True), lengths

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos of each row's history."""
        cosines = [latent_cosines(self.latents[row, self.kept[row]][None])[0] for row in rows]
        return [{"lat_cos": values.float().cpu().numpy()} for values in cosines]

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""
        self.kept[row] = [self.kept[row][i] for i in ids]


def uses_true_frames(workload: Workload, signals: Sequence[str]) -> bool:
    """Whether true frames are fed back and no signal is the host's: generating frames would change nothing that is recorded."""
    return workload.true_feedback and set(signals) <= set(TrueHistories.SIGNALS)


def check_true_signals(signals: Sequence[str]) -> None:
    """Raise ValueError on signals that only rollouts of a host have."""
    if not set(signals) <= set(TrueHistories.SIGNALS):
        raise ValueError("true frames have no signal but lat_cos")
