"""DMLab episodes: FAR's .npz files (``video`` uint8 (T, 64, 64, 3), ``actions`` int64 (T,)) or videos."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class DMLab(VideoFolder):
    """Clips for long prediction; see `VideoFolder`. Actions are not used: the benchmark gives its host the null action."""

    name = "dmlab"
    variable = "DMLAB_DATA_DIR"
