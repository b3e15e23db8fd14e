"""Calls of a policy with the costs of dropping each frame, as they are stored.

What is stored are the calls themselves, so that the network's inputs are made from them by `far_env.agents.observation`, as
they are when a policy acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CALLS_PER_ROLLOUT = 4
"""Calls whose evictions are recorded: the first of a rollout, and others chosen at random, early ones more often."""


@dataclass(frozen=True)
class ExpertData:
    """Calls of policies in R rollouts of one workload, and D single evictions in them with what they cost.

    Attributes:
        rollout: int64 (K,), of each call; the calls of a rollout follow one another.
        step: int64 (K,), the benchmark's step. length: int64 (K,), frames in the history.
        features: float32 (K, slots, 4), as `far_env.frame_meta.frame_features`; here and below frames come first, then padding.
        frame_signals: float32 (K, slots, F), pair_signals: float32 (K, slots, slots, P).
        kept: bool (K, slots), the frames that stayed.
        max_frames: (R,), the budget in frames. total_steps: int64 (1,).
        similarity: float16 (R, T, T), how well the content of true frame i could be copied from true frame j, between 0 and 1.
        call: int64 (D,). remaining: bool (D, slots), frames of the call that were not dropped yet; of a token memory float32,
            the share of its tokens that a frame still has.
        costs: float32 (D, slots), the logarithm of the error to be expected where this frame is dropped next; infinite where
            it cannot be. Of a token memory (D, slots, 2), of dropping and of compressing it, see
            `far_env.agents.token_expert`.
    """

    rollout: Tensor
    step: Tensor
    length: Tensor
    features: Tensor
    frame_signals: Tensor
    pair_signals: Tensor
    kept: Tensor
    max_frames: Tensor
    total_steps: Tensor
    similarity: Tensor
    call: Tensor
    remaining: Tensor
    costs: Tensor

    def __len__(self) -> int:
        return len(self.call)

    @staticmethod
    def join(parts: Sequence[ExpertData]) -> ExpertData:
        """All of them, of one workload."""
        offsets = {"rollout": 0, "call": 0}
        pieces: dict[str, list[Tensor]] = {field.name: [] for field in fields(ExpertData)}
        for part in parts:
            for name, values in vars(part).items():
                pieces[name].append(values + offsets[name] if name in offsets else values)
            offsets = {"rollout": offsets["rollout"] + len(part.max_frames), "call": offsets["call"] + len(part.step)}
        pieces["total_steps"] = pieces["total_steps"][:1]
        return ExpertData(**{name: torch.cat(values) for name, values in pieces.items()})


def load_expert_data(path: Path) -> ExpertData:
    """Read collected decisions. Raises ValueError if the file is damaged."""
    try:
        return ExpertData(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to collect it again") from error


class Recorder:
    """Collects the fields of `ExpertData`.

    Args:
        slots: rows of its arrays.
        generators: random numbers of each rollout.
        calls_per_rollout: by default `CALLS_PER_ROLLOUT`.
    """

    def __init__(self, slots: int, generators: Sequence[np.random.Generator], calls_per_rollout: int | None = None) -> None:
        self.slots, self.generators = slots, generators
        self.calls_per_rollout = CALLS_PER_ROLLOUT if calls_per_rollout is None else calls_per_rollout
        self.calls: list[tuple] = []
        self.decisions: list[tuple] = []

    def padded(self, values: np.ndarray, axes: int, fill: float = 0.0) -> np.ndarray:
        """An array whose first axes are as long as there are slots."""
        width = [(0, self.slots - values.shape[axis] if axis < axes else 0) for axis in range(values.ndim)]
        return np.pad(values, width, constant_values=fill)

    def call(self, row: int, step: int, features: np.ndarray, signals: tuple, kept: np.ndarray) -> None:
        """Record a call and the frames that stayed."""
        count = len(features)
        frame = np.stack([*signals[0], np.zeros(count)], axis=-1)[..., :-1].astype(np.float32)
        pair = np.stack([*signals[1], np.zeros((count, count))], axis=-1)[..., :-1].astype(np.float32)
        padded = self.padded(features, 1), self.padded(frame, 1), self.padded(pair, 2), self.padded(kept, 1)
        self.calls.append((row, step, count, *padded))

    def decision(self, call: int, remaining: np.ndarray, costs: np.ndarray) -> None:
        """Record an eviction in a call, which may be recorded later."""
        self.decisions.append((call, self.padded(remaining, 1), self.padded(costs.astype(np.float32), 1, np.inf)))

    def data(self, max_frames: Sequence[int], total_steps: int, similarity: np.ndarray) -> ExpertData:
        """All of it, with the calls and the decisions of a rollout one after the other."""
        rollout, step, length, features, frame, pair, kept = (np.stack(column) for column in zip(*self.calls, strict=True))
        order = np.argsort(rollout, kind="stable")
        call, remaining, costs = (np.stack(column) for column in zip(*self.decisions, strict=True))
        recorded = np.isin(call, _some_calls(rollout, self.generators, self.calls_per_rollout))
        call, remaining, costs = call[recorded], remaining[recorded], costs[recorded]
        decided = np.argsort(rollout[call], kind="stable")
        call, remaining, costs = call[decided], remaining[decided], costs[decided]
        columns = [column[order] for column in (rollout, step, length, features, frame, pair, kept)]
        shared = np.array(max_frames), np.array([total_steps]), similarity
        return ExpertData(*map(torch.from_numpy, (*columns, *shared, np.argsort(order)[call], remaining, costs)))


def _some_calls(rollouts: np.ndarray, generators: Sequence[np.random.Generator], number: int) -> np.ndarray:
    """Indices of at most ``number`` calls of each rollout: its first, and others chosen by its generator.

    The earlier a call, the more likely it is chosen, in proportion to the calls that follow: what it drops is missing longer.
    """
    chosen = []
    for rollout, rng in enumerate(generators):
        first, *others = np.flatnonzero(rollouts == rollout)
        following = np.arange(len(others), 0, -1)
        count = min(number - 1, len(others))
        chosen += [first, *rng.choice(others, count, replace=False, p=following / following.sum() if count else None)]
    return np.array(chosen)
