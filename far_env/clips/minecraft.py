"""Minecraft: FAR's .mp4 files at 128×128 with actions in .npz files, listed or side by side, or its latents."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class Minecraft(VideoFolder):
    """Clips for long prediction, 128×128 unless asked otherwise, with their actions where there are any; see `VideoFolder`.

    Actions: 0 … 3, ``actions[i]`` leads to frame i.
    """

    name = "minecraft"
    variable = "MINECRAFT_DATA_DIR"
    default_size = 128
    preferred_lists = ("minecraft_train.json", "minecraft_val.json")
    num_actions = 4
