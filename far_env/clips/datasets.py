"""The data sets of the benchmark, of FAR and of ``far-env record``. How clips are cut is in `VideoFolder`."""

from __future__ import annotations

import os
from dataclasses import replace

from far_env.clips.benchmark_files import VIDEO_SUBFOLDER
from far_env.clips.clip import SPLITS
from far_env.clips.recorder.folder import FACTS_FILE, read_facts
from far_env.clips.recordings import Recording, find_recordings
from far_env.clips.video_folder import VideoFolder


class Recordings(VideoFolder):
    """Any folder of videos or episodes, with the actions that they come with, however many there are."""

    name = "recordings"
    num_actions = None


class UCF101(VideoFolder):
    """UCF-101, for short prediction: the original .avi files, FAR's .mp4 files with its lists, or any other folder of videos.

    FAR tests on every tenth entry of its test list. The benchmark plays .mp4 files, of the subfolder video if there is one.
    """

    name = "ucf101"
    variable = "UCF101_DATA_DIR"
    benchmark_clips = 50
    benchmark_suffixes = (".mp4",)
    benchmark_subfolder = VIDEO_SUBFOLDER
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
    benchmark_clips = 20
    benchmark_suffixes = (".mp4", ".avi")
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


class RecordedFolder(VideoFolder):
    """Clips that ``far-env record`` wrote, or any videos in subfolders train/, validation/ and test/, which are the splits.

    The protocol determines only where clips start and how frames become squares; by default clips start at frame 0. Actions
    are read where there are some; their number, and by default the frames' size, are those in recording.json.

    Raises:
        ValueError: as `VideoFolder` does, if there is none of the subfolders, or if the recording is not finished.
    """

    name = "recorded"
    variable = "RECORDED_DATA_DIR"
    num_actions = None
    remedy = "far-env record makes such folders"

    def __init__(
        self, data_dir: str | os.PathLike | None = None, protocol: str = "far", *, num_frames: int, size: int | None = None
    ) -> None:
        self._any_size = size is None
        super().__init__(data_dir, protocol, num_frames=num_frames, size=size)

    @classmethod
    def as_read(cls, recording: Recording) -> Recording:
        """The recording as it is."""
        return recording

    def _splits_of_files(self) -> dict[str, list[Recording]]:
        if not any((self.folder / split).is_dir() for split in SPLITS):
            state = "has none of the subfolders train, validation and test" if self.folder.is_dir() else "does not exist"
            raise ValueError(f"the recorded folder {self.folder} {state}; {self.remedy}")
        facts = read_facts(self.folder)
        if facts is not None:
            self._check_facts(facts)
            self.num_actions = facts["source"].get("num_actions")
            self.size = facts["settings"]["size"] if self._any_size else self.size
        folders = {split: self.folder / split for split in SPLITS}
        return {
            split: [replace(recording, num_actions=self.num_actions) for recording in find_recordings(folder)]
            if folder.is_dir()
            else []
            for split, folder in folders.items()
        }

    def _check_facts(self, facts: dict) -> None:
        if not facts.get("complete"):
            raise ValueError(f"{self.folder} is not finished ({FACTS_FILE}): give the far-env record that began it again")
        frames = facts["settings"]["frames"]
        if frames < self.num_frames:
            raise ValueError(f"the episodes in {self.folder} have {frames} frames, clips of {self.num_frames} were asked for")


class Doom(RecordedFolder):
    """Walks through Freedoom's maps, recorded by ``far-env record --config record_doom``; splits share no map.

    Actions: 0 turns left by 30°, 1 right, 2 steps forward, 3 backward; ``actions[i]`` leads to frame i. Policies are tested on
    these clips, and never trained on them.

    Raises:
        ValueError: as `RecordedFolder` does, or if something else was recorded.
    """

    name = "doom"
    variable = "DOOM_DATA_DIR"
    remedy = 'make the clips with far-env record --config record_doom, which needs pip install "far-env[record]"'
    environment = "far_env/DoomWalk-v0"

    def _check_facts(self, facts: dict) -> None:
        super()._check_facts(facts)
        name = facts["source"].get("name")
        if name != self.environment:
            raise ValueError(f"{self.folder} holds clips of {name}, not of {self.environment}; {self.remedy}")


DATASETS: dict[str, type[VideoFolder]] = {kind.name: kind for kind in (UCF101, DMLab, BAIR, Minecraft, RecordedFolder, Doom)}
CLIP_FRAMES = {"ucf101": 16, "dmlab": 72, "bair": 30, "minecraft": 300, "recorded": 32, "doom": 40}
"""Frames of a clip in the benchmark's workloads, in FAR's protocols, and in the workloads of recorded clips."""
