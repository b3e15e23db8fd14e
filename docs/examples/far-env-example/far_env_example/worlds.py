"""A workload whose clips are taken from two shipped worlds alternately."""

from __future__ import annotations

from dataclasses import replace

from far_env.clips.clip import Clip, check_clip_id
from far_env.clips.worlds import WORLDS
from far_env.workloads import WorkloadSpec


class Mixed:
    """Clips with an even id come from pan, the others from cuts. Clips are a function of split and id alone."""

    name = "mixed"
    size = 64
    parts = (WORLDS["pan"], WORLDS["cuts"])

    def num_clips(self, split: str) -> int:
        """Clips in a split."""
        return 2 * min(part.num_clips(split) for part in self.parts)

    def clip(self, split: str, clip_id: int) -> Clip:
        """One clip. Raises ValueError on an unknown split and ClipIdError on an id out of range."""
        check_clip_id(self, split, clip_id)
        return replace(self.parts[clip_id % 2].clip(split, clip_id // 2), clip_id=clip_id)


MIXED = WorkloadSpec(clips=Mixed, num_context=5, num_predict=11, host="embedded")
