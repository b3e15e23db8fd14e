"""TensorBoard's event files of a training that is resumed: what the stopped session logged after its checkpoint is hidden."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

PREFIX = "events.out.tfevents."


def session_writer(folder: Path, done: int) -> SummaryWriter:
    """The writer of a session that begins after step ``done``; TensorBoard hides later steps of the sessions before.

    They are hidden whatever their tags are, so every stage of a training needs its folder.

    TensorBoard reads the files in the order of the times in their names, which may be equal, or run backwards where the clock
    was set back. So the files of earlier sessions get numbers instead, which come before any time.
    """
    for number, path in enumerate(sorted(folder.glob(f"{PREFIX}*"))):
        rest = path.name.removeprefix(PREFIX).partition(".")[2]
        path.rename(path.with_name(f"{PREFIX}{number:010d}.{rest}"))
    return SummaryWriter(str(folder), purge_step=done + 1)
