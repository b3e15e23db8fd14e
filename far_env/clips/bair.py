"""BAIR robot pushing: FAR's lists of videos, or any folder of them."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class BAIR(VideoFolder):
    """Clips for short prediction; see `VideoFolder`. The robot's actions are not read: FAR's host for BAIR takes none."""

    name = "bair"
    variable = "BAIR_DATA_DIR"
    preferred_lists = ("bair_train.json", "bair_val.json")
