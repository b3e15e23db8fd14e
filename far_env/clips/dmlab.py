"""DMLab episodes: FAR's .npz files (``video`` uint8 (T, 64, 64, 3), ``actions`` int64 (T,)), its latents, or videos."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class DMLab(VideoFolder):
    """Clips for long prediction, with their actions where the data has them; see `VideoFolder`.

    Actions: 0 … 3, ``actions[i]`` leads to frame i. The benchmark does not use them: it gives its host the null action.
    """

    name = "dmlab"
    variable = "DMLAB_DATA_DIR"
    preferred_lists = ("dmlab_train.json", "dmlab_val.json")
    num_actions = 4
