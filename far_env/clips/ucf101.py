"""UCF-101: the original release of .avi files, FAR's of .mp4 files and lists, or any other folder of videos."""

from __future__ import annotations

from far_env.clips.video_folder import VideoFolder


class UCF101(VideoFolder):
    """Clips for short prediction; see `VideoFolder`. FAR tests on every tenth entry of its test list."""

    name = "ucf101"
    variable = "UCF101_DATA_DIR"
    preferred_lists = ("train03.json", "test03.json")
    test_stride = 10
