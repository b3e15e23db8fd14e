"""Stop a training as Ctrl-C does, right after a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from far_env.agents.training_callbacks import ValidationCheckpoint


@contextmanager
def stopped_after_checkpoints(*numbers: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt after the checkpoints with these numbers, counted from 1 over all trainings in the block.

    Yields:
        The decisions at which each checkpoint was written.
    """
    original, saves = ValidationCheckpoint._save, list[int]()

    def save_then_stop(self: ValidationCheckpoint) -> None:
        original(self)
        saves.append(self.model.num_timesteps)
        if len(saves) in numbers:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationCheckpoint, "_save", save_then_stop)
        yield saves
