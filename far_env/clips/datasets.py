"""The data sets of the benchmark and of FAR: names, folders, lists and actions. How clips are cut is in `VideoFolder`."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class Recordings(VideoFolder):
    """Any folder of videos or episodes, with the actions that they come with, however many there are."""

    name = "recordings"
    num_actions = None


class UCF101(VideoFolder):
    """UCF-101, for short prediction: the original .avi files, FAR's .mp4 files with its lists, or any other folder of videos.

    FAR tests on every tenth entry of its test list.
    """

    name = "ucf101"
    variable = "UCF101_DATA_DIR"
    preferred_lists = ("train03.json", "test03.json")
    test_stride = 10


class BAIR(VideoFolder):
    """BAIR robot pushing, for short prediction: FAR's lists of videos, or any folder of videos.

    The robot's actions are not read, because FAR's host for BAIR takes none.
    """

    name = "bair"
    variable = "BAIR_DATA_DIR"
    preferred_lists = ("bair_train.json", "bair_val.json")


class DMLab(VideoFolder):
    """DMLab, for long prediction: .npz episodes (``video`` uint8 (T, 64, 64, 3), ``actions`` int64 (T,)), latents or videos.

    Actions: 0 … 3, ``actions[i]`` leads to frame i. The benchmark does not use them: its host receives the null action.
    """

    name = "dmlab"
    variable = "DMLAB_DATA_DIR"
    preferred_lists = ("dmlab_train.json", "dmlab_val.json")
    num_actions = 4


class Minecraft(VideoFolder):
    """Minecraft, for long prediction, 128×128 by default: .mp4 files with actions in .npz files, or latents.

    Actions: 0 … 3, ``actions[i]`` leads to frame i. FAR's lists name their files; otherwise they have the video's name.
    """

    name = "minecraft"
    variable = "MINECRAFT_DATA_DIR"
    default_size = 128
    preferred_lists = ("minecraft_train.json", "minecraft_val.json")
    num_actions = 4


DATASETS: dict[str, type[VideoFolder]] = {kind.name: kind for kind in (UCF101, DMLab, BAIR, Minecraft)}
CLIP_FRAMES = {"ucf101": 16, "dmlab": 72, "bair": 30, "minecraft": 300}
"""Frames of a clip in the benchmark's workloads, and in FAR's protocols for the others."""
