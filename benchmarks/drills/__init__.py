"""Drills that nothing is lost: commands are killed, meet a full disk, run twice at once, and end as undisturbed ones do.

OMP_NUM_THREADS=1 python -m benchmarks.drills [--kills 20] [--disks 5] [--others 1] [imitation evaluation …]

Every command runs in a process of its own, forked from one that has imported everything, on a tiny host with random weights.
An attempt survives if the command, given again, leaves what the undisturbed one left: the same weights, checkpoints, records,
pictures, learning curves and texts to the last bit, and no other file. Times, and facts about a session, may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Options:
    """Which drills, and how many."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of the commands; all by default."""
    kills: int = 20
    """Moments at which each command is killed."""
    disks: int = 5
    """Amounts of free space under which each command meets a full disk."""
    others: int = 1
    """How often each command meets two processes, a moved folder, another user and a clock that was set back."""
    seed: int = 0
