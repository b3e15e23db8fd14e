"""Made rollouts for tests of scorers: frames without a host, and what a policy receives of them at every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from far_env.frame_meta import frame_features


@dataclass
class Call:
    """A call of a policy: true numbers of the frames in the history, their features, and the signals asked for."""

    step: int
    numbers: list[int]
    features: np.ndarray
    signals: dict[str, np.ndarray]
    kept: list[int] = field(default_factory=list)
    """Positions of the frames that stay; the caller may change it before it asks for the next call."""


@dataclass
class MadeClip:
    """Latents (T, C, h, w) of a clip, of which the first ``num_context`` are given."""

    latents: np.ndarray
    num_context: int

    @property
    def total_steps(self) -> int:
        return len(self.latents) - self.num_context

    def calls(self, budget: int, seed: int, signals: tuple = (), fewest: int | None = None) -> Iterator[Call]:
        """A policy's calls; by default random frames stay, at least ``fewest`` (by default as many as the budget allows)."""
        rng = np.random.default_rng(seed)
        history = list(range(self.num_context))
        for step in range(self.total_steps):
            history = [*history, self.num_context + step]
            if len(history) <= budget:
                continue
            count = int(rng.integers(budget if fewest is None else fewest, budget + 1))
            kept = [*sorted(rng.permutation(len(history) - 1)[: count - 1].tolist()), len(history) - 1]
            call = Call(step, history, self.features(history), self.signals(history, signals, rng), kept)
            yield call
            history = [history[i] for i in call.kept]

    def features(self, history: list[int]) -> np.ndarray:
        return frame_features(torch.from_numpy(self.latents[history])[None])[0].numpy()

    def signals(self, history: list[int], names: tuple, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Random numbers in the shapes of signals; the newest frame has none of key_cos and expected_mass yet."""
        n, values = len(history), {}
        for name in names:
            shape = {"attn_mass": (n,), "expected_mass": (n,)}.get(name, (n, n))
            values[name] = rng.normal(size=shape).astype(np.float32)
            if name in ("key_cos", "expected_mass"):
                values[name][-1] = np.nan
                values[name][..., -1] = np.nan
        return values


def made_clip(seed: int, num_context: int = 5, num_predict: int = 11, scale: float = 1.0) -> MadeClip:
    """A random walk of latents, a third of whose frames look like an earlier one."""
    rng = np.random.default_rng(seed)
    frames = [rng.normal(size=(3, 2, 2)) + 1]
    for number in range(1, num_context + num_predict):
        source = frames[int(rng.integers(number))] if rng.random() < 1 / 3 else frames[-1]
        frames.append(source + 0.3 * rng.normal(size=(3, 2, 2)))
    return MadeClip((scale * np.stack(frames)).astype(np.float32), num_context)
