"""Minecraft: FAR's lists of .mp4 files at 128×128 with their actions in .npz files, or a folder in which both lie side by side."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class Minecraft(VideoFolder):
    """Clips for long prediction, 128 pixels wide unless asked otherwise; see `VideoFolder`."""

    name = "minecraft"
    variable = "MINECRAFT_DATA_DIR"
    default_size = 128
