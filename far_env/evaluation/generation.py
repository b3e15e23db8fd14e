"""Rollouts of policies as video files: what ``far-env generate`` writes, and which of its files are missing."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from far_env.clips.clip import Clip, check_clip_id
from far_env.clips.video_writing import WRITERS, is_whole
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.errors import VideoError
from far_env.evaluation.facts import record_facts
from far_env.io import read_json, write_json
from far_env.progress import show_progress
from far_env.rollout.memo import FrameMemo
from far_env.rollout.noise import TRAJECTORY_STRIDE, trajectory
from far_env.rollout.play import play
from far_env.workload import Workload

SETTINGS_FILE = "videos.json"
_OF_THE_MACHINE = ("device", "machine", "commit", "versions")


@dataclass(frozen=True)
class VideoJob:
    """One policy under one budget; policy None is full history."""

    name: str
    policy: RetentionPolicy | None
    budget: int

    @property
    def folder(self) -> str:
        """The name of the folder with its videos."""
        name = quote(self.name, safe="").replace(".", "%2E") if set(self.name) == {"."} else quote(self.name, safe="")
        return name if self.budget >= UNLIMITED_FRAMES else f"{name}_budget{self.budget}"


@dataclass(frozen=True)
class VideoForm:
    """How rollouts become files.

    Attributes:
        formats: of `WRITERS`.
        truth: the true frames on the left, beside those of the rollout.
        fps: frames a second.
        scale: side in pixels of every pixel.
    """

    formats: tuple[str, ...] = ("mp4",)
    truth: bool = False
    fps: int = 8
    scale: int = 1

    def frames(self, clip: Clip, predicted: np.ndarray, num_context: int) -> np.ndarray:
        """A video's frames, uint8 (T, H, W, 3): given frames, then predicted ones (n, 3, H, W) in [0, 1]."""
        video = np.concatenate([clip.frames[:num_context], predicted])
        if self.truth:
            video = np.concatenate([clip.frames[: len(video)], video], axis=3)
        video = video.repeat(self.scale, axis=2).repeat(self.scale, axis=3)
        return np.rint(video.transpose(0, 2, 3, 1) * 255).clip(0, 255).astype(np.uint8)


def video_path(folder: Path, job: VideoJob, clip_id: int, seed: int, suffix: str) -> Path:
    """The file of one rollout; ``seed`` is one of `far_env.rollout.noise.trajectory_seeds`."""
    name = f"clip{clip_id}_seed{seed % TRAJECTORY_STRIDE}_trajectory{trajectory(seed)}.{suffix}"
    return folder / job.folder / name


def check_settings(
    folder: Path, workload: Workload, split: str, form: VideoForm, policies: Mapping[str, dict[str, str]], data_dir: str | None
) -> None:
    """Write what the folder's videos are made with, or compare it with what is there.

    Args:
        policies: name → `far_env.policies.policy_facts`.
        data_dir: that of the clips.

    Raises:
        ValueError: if the folder has videos that are made in another way, or of a policy that had another content.
    """
    settings = {name: value for name, value in record_facts(workload).items() if name not in _OF_THE_MACHINE}
    settings |= {"workload": workload.name, "num_context": workload.num_context, "num_predict": workload.num_predict}
    settings |= {"split": split, "truth": form.truth, "fps": form.fps, "scale": form.scale}
    settings["data_dir"] = None if data_dir is None else str(Path(data_dir).resolve())
    settings = json.loads(json.dumps(settings, default=str))
    path, known = folder / SETTINGS_FILE, {}
    if path.exists():
        content = read_json(path, "choose another folder")
        found = content.get("settings") if isinstance(content, dict) else None
        known = content.get("policies") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not isinstance(known, dict):
            raise ValueError(f"{path} is damaged (it lacks settings or policies); choose another folder")
        for name in {**found, **settings}:
            if found.get(name) != settings.get(name):
                raise ValueError(
                    f"{folder} holds videos made with {name} {found.get(name)}, not {settings.get(name)}; choose another folder"
                )
        for name in known.keys() & policies.keys():
            if known[name] != policies[name]:
                raise ValueError(f"{folder} holds videos of another content of policy {name}; choose another folder")
    write_json(path, {"settings": settings, "policies": {**known, **policies}})


@dataclass(frozen=True)
class Written:
    """What `generate_videos` did.

    Attributes:
        new, kept: rollouts whose files were written, and those that had them.
        unreadable: clip → why its file cannot be read; it has no new videos.
    """

    new: int
    kept: int
    unreadable: dict[int, str]


def generate_videos(
    workload: Workload,
    jobs: Sequence[VideoJob],
    clip_ids: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
    form: VideoForm,
    *,
    split: str = "test",
    batch_size: int = 16,
    progress: bool = True,
) -> Written:
    """Write the videos of all jobs, clips and seeds; a file that is there and whole is not made again.

    A clip whose file is damaged is left out, with the reason; the others are played.

    Args:
        seeds: clip i is played with the noise seeds s + i.
        batch_size: rollouts that are generated together.

    Raises:
        PolicyError: if a policy raises or answers an invalid plan.
        ClipIdError, ValueError: on a clip that does not exist, or a file that cannot be written.
    """
    for clip_id in (min(clip_ids), max(clip_ids)):
        check_clip_id(workload.clips, split, clip_id)
    episodes = list(itertools.product(clip_ids, seeds))
    missing = {
        (job.folder, episode)
        for job, episode in itertools.product(jobs, episodes)
        if not all(is_whole(video_path(folder, job, *episode, kind), workload.num_frames, form.fps) for kind in form.formats)
    }
    memo, new, unreadable = FrameMemo(), 0, dict[int, str]()
    total = len(missing) * workload.num_predict
    with show_progress(total=total, unit="frames", description="generate", disable=not progress) as bar:
        for first in range(0, len(episodes), batch_size):
            batch, clips = episodes[first : first + batch_size], dict[int, Clip]()
            for job in jobs:
                wanted = [episode for episode in batch if (job.folder, episode) in missing]
                for clip_id in {i for i, _ in wanted} - clips.keys() - unreadable.keys():
                    try:
                        clips[clip_id] = workload.clips.clip(split, clip_id)
                    except VideoError as error:
                        unreadable[clip_id] = str(error)
                        bar.write(f"left out clip {clip_id}: {error}", file=sys.stderr)
                wanted = [episode for episode in wanted if episode[0] in clips]
                if not wanted:
                    continue
                rows = [clips[i] for i, _ in wanted]
                noise_seeds = [seed + i for i, seed in wanted]
                rollouts, _ = play(workload, rows, noise_seeds, job.policy, job.budget, memo=memo, on_frame=bar.update)
                pixels = rollouts.decode(range(len(rows))).float().cpu().numpy()
                _check_numbers(pixels, workload, job)
                for clip, predicted, episode in zip(rows, pixels, wanted, strict=True):
                    video = form.frames(clip, predicted, workload.num_context)
                    for kind in form.formats:
                        path = video_path(folder, job, *episode, kind)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        WRITERS[kind](path, video, form.fps)
                new += len(wanted)
    return Written(new, len(jobs) * len(episodes) - len(missing), unreadable)


def _check_numbers(pixels: np.ndarray, workload: Workload, job: VideoJob) -> None:
    if not np.isfinite(pixels).all():
        raise ValueError(
            f"{workload.name}, under {job.name}: the host {workload.host.name} generated values that are not numbers"
        )


def generation_facts(workload: Workload) -> dict[str, Any]:
    """What the last line of the command says of a workload."""
    facts = record_facts(workload)
    return {name: facts[name] for name in ("host", "weights", "ode_steps", "guidance", "dtype", "device", "commit")}
