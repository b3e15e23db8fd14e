"""Clips with prompts: a folder of texts alone, which no video continues, or of texts with videos beside them.

The text of NAME.txt is a prompt, and NAME.mp4, .avi or .npz beside it the video that it describes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from far_env.clips.clip import Clip, check_clip_id
from far_env.clips.video import VIDEO_SUFFIXES
from far_env.clips.video_folder import VideoFolder
from far_env.errors import first_line

VARIABLE = "PROMPTS_DATA_DIR"
SIZE = 480
"""Side of the frames in pixels by default."""
TEXT_SUFFIX = ".txt"
MAX_CHARACTERS = 16_384
"""Longest text of a prompt."""


def read_prompt(path: Path) -> str:
    """The text of a file on one line. Raises ValueError if it cannot be read, is empty, or is longer than `MAX_CHARACTERS`."""
    try:
        text = " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt {path} cannot be read: {first_line(error)}") from error
    if not text or len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the prompt {path} {'is empty' if not text else f'is longer than {MAX_CHARACTERS} characters'}; change it"
        )
    return text


class PromptFolder:
    """Prompts without videos, sorted by path; all are test clips, which have no frames.

    Args:
        data_dir: folder of .txt files at any depth; by default the value of PROMPTS_DATA_DIR.
        num_frames: of the videos to be generated.
        size: side of their frames in pixels.

    Raises:
        ValueError: without a folder, if it holds no prompt, or one that is empty.
    """

    name = "prompts"
    splits = ("test",)
    without_frames = True
    """That no clip has true frames."""

    def __init__(self, data_dir: str | os.PathLike | None = None, *, num_frames: int, size: int = SIZE) -> None:
        self.folder, self.num_frames, self.size = _folder(data_dir), num_frames, size
        self._prompts = [read_prompt(path) for path in sorted(self.folder.rglob(f"*{TEXT_SUFFIX}"))]
        if not self._prompts:
            raise ValueError(f"{self.folder} holds no prompts: put each into a {TEXT_SUFFIX} file of its own")

    def num_clips(self, split: str) -> int:
        """Prompts, all of the test split."""
        return len(self._prompts) if split == "test" else 0

    def clip(self, split: str, clip_id: int) -> Clip:
        """A prompt. Raises ValueError and ClipIdError as every source does."""
        check_clip_id(self, split, clip_id)
        return Clip(clip_id, np.zeros((0, 3, self.size, self.size), dtype=np.float32), prompt=self._prompts[clip_id])


class PromptedVideos(VideoFolder):
    """Videos with prompts: every tenth of the sorted files is test, the file after it validation, the others train.

    Args:
        data_dir: folder of videos with a .txt file beside each; by default the value of PROMPTS_DATA_DIR.
        num_frames: frames per clip, from the first on.
        size: side of the squares that are cut from their middle.

    Raises:
        ValueError: as `VideoFolder`, or if a video has no prompt, or an empty one.
    """

    name = "prompted_videos"
    variable = VARIABLE
    default_size = SIZE
    remedy = "each needs a .txt file beside it"

    def __init__(self, data_dir: str | os.PathLike | None = None, *, num_frames: int, size: int = SIZE) -> None:
        folder = _folder(data_dir)
        self._prompts: dict[Path, str] = {}
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
            text = path.with_suffix(TEXT_SUFFIX)
            if not text.is_file():
                raise ValueError(f"the video {path} has no prompt: {text.name} beside it must hold one")
            self._prompts[path] = read_prompt(text)
        super().__init__(folder, "far", num_frames=num_frames, size=size)

    def clip(self, split: str, clip_id: int) -> Clip:
        """Decode one clip. Raises VideoError if the file turns out to be damaged."""
        clip = super().clip(split, clip_id)
        return Clip(clip.clip_id, clip.frames, label=clip.label, prompt=self._prompts[self.path(split, clip_id)])


def _folder(data_dir: str | os.PathLike | None) -> Path:
    """The folder that is given or named by PROMPTS_DATA_DIR. Raises ValueError if there is none."""
    path = data_dir or os.environ.get(VARIABLE)
    if not path:
        raise ValueError(f"prompts need a folder: give data_dir (--data-dir), or set {VARIABLE}")
    if not Path(path).is_dir():
        raise ValueError(f"the folder of prompts {path} does not exist; give another one")
    return Path(path)
