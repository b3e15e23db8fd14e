"""A decision about a token memory as a sequence of reductions: one frame is dropped or compressed at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.rollout.frame_actions import COMPRESS, DROP, KEEP, compressed_size

REDUCTIONS = (DROP, COMPRESS)
"""What can become of a frame in one reduction, in the order of a scorer's outputs."""


class Reductions:
    """The frames of a token memory while a decision is made.

    Args:
        sizes: tokens of each frame, oldest first; the newest stays whole.
        full: tokens of a whole frame.
        budget: tokens of all together, at least ``full``.

    Attributes:
        sizes: int64 (n,), what each frame has left; 0 where it was dropped.
    """

    def __init__(self, sizes: Sequence[int], full: int, budget: int) -> None:
        self.sizes = np.array(sizes)
        self.full, self.small, self.budget = full, compressed_size(full), budget

    @property
    def done(self) -> bool:
        """Whether what is left fits the budget."""
        return int(self.sizes.sum()) <= self.budget

    @property
    def shares(self) -> np.ndarray:
        """The share of its tokens that each frame has left, float32 (n,)."""
        return (self.sizes / self.full).astype(np.float32)

    def allowed(self) -> np.ndarray:
        """bool (n, 2): which frames may be dropped, and which compressed."""
        allowed = np.stack([self.sizes > 0, self.sizes > self.small], axis=-1)
        allowed[-1] = False
        return allowed

    def freed(self) -> np.ndarray:
        """int64 (n, 2): tokens that dropping and compressing each frame frees."""
        return np.stack([self.sizes, (self.sizes - self.small).clip(0)], axis=-1)

    def reduce(self, index: int, reduction: int) -> None:
        """Drop or compress a frame, one of `REDUCTIONS`."""
        self.sizes[index] = 0 if reduction == DROP else self.small

    def actions(self) -> list[int]:
        """DROP, COMPRESS or KEEP of each frame."""
        return [DROP if size == 0 else KEEP if size == self.full else COMPRESS for size in self.sizes.tolist()]
