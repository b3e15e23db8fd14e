"""The state of one rollout in a batch, and what generates the next unit of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from far_env.host.protocol import Unit
from far_env.rollout.signals import RecordedSignals


@dataclass
class Rollout:
    """One row. Tensors are never changed in place, so that copies may share them.

    With FAR a unit is a frame and its latent (C, h, w); otherwise it may be a chunk (n, C, h, w).

    Attributes:
        units: sizes of all units, those that are given first.
        num_context: units that are given.
        steps: generated units.
        noise: of each unit to be generated.
        noise_seed: the seed of that noise.
        kept: true numbers of the history's units; those of the context are 0 … num_context-1.
        frames: clean latents by true number, kept or not: of all units so far, or where true frames are fed back of the
            whole clip, without the generated ones.
        keys: content keys of these units.
        generated: latents of the generated units so far, by step.
        generated_keys: content keys of these.
        actions: of all frames, by true number; none where the host is not conditioned on actions.
        label, prompt: of the clip; None where the host is not conditioned on them.
        prefix: keys and values (layers, 2, branches, tokens, heads, d) of the first frames of the history, as many as are
            valid. There is one branch, or with guidance two, that of the null class first.
        num_coarse: how many of the history's oldest frames were coarse when these were computed.
        num_before: units that the history held when the newest one was generated from it; 0 if none was, or it was restored.
        recorded: signals of its frames, where they are recorded.
    """

    units: tuple[Unit, ...]
    num_context: int
    steps: int
    noise: Sequence[Tensor]
    noise_seed: int
    actions: tuple[int, ...] = ()
    kept: list[int] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    generated: list[Tensor] = field(default_factory=list)
    generated_keys: list[str] = field(default_factory=list)
    prefix: list[Tensor] = field(default_factory=list)
    num_coarse: int = 0
    num_before: int = 0
    recorded: RecordedSignals = field(default_factory=RecordedSignals)
    label: int | None = None
    prompt: str | None = None

    @property
    def num_predict(self) -> int:
        """Units to be generated."""
        return len(self.units) - self.num_context

    @property
    def newest(self) -> int:
        """The true number of the newest unit."""
        return self.num_context + self.steps - 1

    def visible_actions(self) -> list[int]:
        """Actions of the history's frames and of the next one, where the host is conditioned on actions."""
        return [self.actions[number] for number in (*self.kept, self.newest + 1)] if self.actions else []

    def copy(self) -> Rollout:
        """A rollout that continues from the same state independently; the tensors are shared."""
        names = ("kept", "frames", "keys", "generated", "generated_keys", "prefix")
        lists = {name: list(getattr(self, name)) for name in names}
        return replace(self, **lists)


class UnitGenerator(Protocol):
    """Generates the next unit of rollouts, and records signals meanwhile.

    Attributes:
        needs_probe: whether signals are recorded while units are generated, so that none may come from a memo.
    """

    needs_probe: bool

    def begin(
        self, contexts: Sequence[Tensor], noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None
    ) -> list[RecordedSignals]:
        """The signals of new rollouts, from context latents (L, C, h, w) of each."""

    def generate(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The next unit of each. The rollouts' keys, values and signals are brought up to date; nothing else changes."""

    def arrays(
        self,
        recorded: Sequence[RecordedSignals],
        kept: Sequence[Sequence[int]],
        latents: Tensor,
        actions: Sequence[Sequence[int]] | None,
    ) -> list[dict[str, np.ndarray]]:
        """The requested signals of each row, see `far_env.rollout.signals.SignalRecorder.arrays`."""
