"""The command ``far-env clip-facts``. Heavy imports are inside the function, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from far_env.config import parse


@dataclass(frozen=True)
class ClipFacts:
    """Print the size of a workload's splits and of its clips."""

    workload: tyro.conf.Positional[str]
    """A registered workload."""


def clip_facts(args: Sequence[str]) -> None:
    """Print the size of a workload's splits and of its clips."""
    options = parse(ClipFacts, args, "far-env clip-facts", ClipFacts.__doc__ or "")
    from far_env.clips.clip import SPLITS
    from far_env.workloads import make_workload

    clips = make_workload(options.workload).clips
    print(", ".join(f"{split}: {clips.num_clips(split)} clips" for split in SPLITS))
    print("frames", clips.clip("test", 0).frames.shape)
