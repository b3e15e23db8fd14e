"""The next unit of rollouts from any host, one after the other: `Host.generate` on the kept units, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.errors import PolicyError
from far_env.rollout.signals import RecordedSignals, column_gaps, latent_cosines
from far_env.rollout.state import Rollout
from far_env.workload import Workload

SIGNALS = {"lat_cos": latent_cosines, "column_gap": column_gaps}
"""The signals of `far_env.contract.SIGNALS` that need latents alone, and no FAR."""


class PlainUnits:
    """Generates the units of rollouts one by one; see `far_env.rollout.state.UnitGenerator`.

    Raises:
        PolicyError: on a signal that only a FAR has.
    """

    needs_probe = False

    def __init__(self, workload: Workload, signals: Sequence[str] = ()) -> None:
        if others := [name for name in signals if name not in SIGNALS]:
            raise PolicyError(
                f"host {workload.host.name} has no signal {others[0]}, which only FAR has; {' and '.join(SIGNALS)} are recorded"
            )
        self._workload, self._signals = workload, tuple(signals)

    def begin(
        self, contexts: Sequence[Tensor], noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None
    ) -> list[RecordedSignals]:
        """Nothing is recorded ahead."""
        return [RecordedSignals() for _ in contexts]

    def generate(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The next unit of each rollout.

        Raises:
            ValueError: if the host answers another shape.
        """
        host, units = self._workload.host, []
        for rollout in rollouts:
            noise = rollout.noise[rollout.steps]
            conditions = self._workload.conditions(rollout.visible_actions(), rollout.label, rollout.prompt)
            unit = host.generate([rollout.frames[number] for number in rollout.kept], noise, conditions)
            units.append(check_shape(host.name, unit, noise))
        return units

    def arrays(
        self,
        recorded: Sequence[RecordedSignals],
        kept: Sequence[Sequence[int]],
        latents: Tensor,
        actions: Sequence[Sequence[int]] | None,
    ) -> list[dict[str, np.ndarray]]:
        """lat_cos and column_gap of each row's history (R, K, C, h, w), where they were requested."""
        padded = {name: SIGNALS[name](latents).float().cpu().numpy() for name in self._signals}
        lengths = map(len, kept)
        return [{name: value[row, :n, :n] for name, value in padded.items()} for row, n in enumerate(lengths)]


def check_shape(host: str, unit: Tensor, noise: Tensor) -> Tensor:
    """Return a unit that a host generated. Raises ValueError unless it has the shape of its noise."""
    if not isinstance(unit, Tensor) or unit.shape != noise.shape:
        found = tuple(unit.shape) if isinstance(unit, torch.Tensor) else type(unit).__name__
        raise ValueError(f"host {host} generated {found} where a unit has the shape {tuple(noise.shape)}")
    return unit
