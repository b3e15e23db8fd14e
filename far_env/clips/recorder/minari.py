"""Reads a Minari data set of pixels into a recorded folder: its episodes are cut into pieces of the wanted length."""

from __future__ import annotations

import contextlib
from typing import Any

import gymnasium as gym
import numpy as np

from far_env.clips.clip import SPLITS
from far_env.clips.recorder.folder import FACTS_FILE, RecordedEpisodes, begin
from far_env.clips.recorder.player import as_rgb, resize
from far_env.clips.recorder.run import Recorded, finish, package_of, session
from far_env.clips.recorder.settings import RecordSettings
from far_env.errors import first_line, unknown_name
from far_env.io import locked, make_run_dir, write_json
from far_env.progress import show_progress


def convert(settings: RecordSettings) -> Recorded:
    """Read a local Minari data set, or continue where this was interrupted.

    Every tenth of its episodes is test, the one after it validation, the others train. An episode is cut into pieces of
    ``settings.frames`` frames from its beginning on; frames that are left are counted.

    Raises:
        ValueError: if minari is not installed, or the data set is not there, has no pixels or no episode that is long enough,
            or if the folder holds something else.
    """
    dataset = _load(settings.minari)
    key = _pixel_key(dataset, settings.pixels)
    space = dataset.action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    lengths = [int(episode["total_steps"]) + 1 for episode in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    pieces = [length // settings.frames for length in lengths]
    splits = [{0: "test", 1: "validation"}.get(position % 10, "train") for position in range(len(lengths))]
    episodes = {split: sum(n for n, of in zip(pieces, splits, strict=True) if of == split) for split in SPLITS}
    if not any(pieces):
        longest = max(lengths, default=0)
        raise ValueError(f"no episode of {settings.minari} has {settings.frames} frames; the longest has {longest}")
    folder = make_run_dir(settings.out)
    with locked(folder):
        done = begin(folder, {"settings": settings.determining, "source": _source(settings.minari, dataset, key)}, episodes)
        files = RecordedEpisodes(folder, settings.frames, settings.size, discrete)
        total = sum(pieces)
        missing = [(split, n) for split in SPLITS for n in range(episodes[split]) if not files.finished(split, n)]
        if not missing and done["complete"]:
            return Recorded(done, 0, 0)
        done["left_out"] = sum(length % settings.frames for length in lengths)
        done["sessions"] = [*done.get("sessions", []), session()]
        write_json(folder / FACTS_FILE, done)
        replaced = sum(files.path(*job).exists() for job in missing)
        wanted, next_piece = set(missing), dict.fromkeys(SPLITS, 0)
        options = {"total": total, "initial": total - len(missing), "description": "read", "unit": "episodes"}
        with show_progress(**options) as progress:
            for index, split, count in zip(dataset.episode_indices, splits, pieces, strict=True):
                numbers = range(next_piece[split], next_piece[split] + count)
                next_piece[split] += count
                if not wanted.intersection((split, number) for number in numbers):
                    continue
                (episode,) = dataset.iterate_episodes([int(index)])
                pixels = episode.observations if key is None else episode.observations[key]
                for piece, number in enumerate(numbers):
                    if (split, number) in wanted:
                        start = piece * settings.frames
                        drawn = [_frame(pixels[at], settings) for at in range(start, start + settings.frames)]
                        actions = _actions(episode.actions, space, start, settings.frames) if discrete else None
                        files.write(split, number, np.stack(drawn), actions, 0)
                        progress.update()
        done = finish(folder, files, done, episodes)
        return Recorded(done, len(missing), replaced)


def _load(name: str) -> Any:
    """The data set. Raises ValueError if it, or the package, is not there."""
    try:
        import minari
    except ImportError as error:
        raise ValueError('Minari data sets need the package minari: pip install "far-env[record]"') from error
    try:
        return minari.load_dataset(name)
    except Exception as error:  # of many kinds: names, files, formats, versions
        known: list[str] = []
        with contextlib.suppress(Exception):
            known = list(minari.list_local_datasets())
        if known and name not in known:
            raise ValueError(f"{unknown_name('local Minari data set', name, known)}; minari download fetches one") from error
        reason = first_line(error) if known else "no data set is there; minari download fetches one"
        raise ValueError(f"the Minari data set {name} cannot be read: {reason}") from error


def _pixel_key(dataset: Any, wanted: str | None) -> str | None:
    """The entry of the observations that holds pixels; None if they are pixels themselves. Raises ValueError if unclear."""
    space = dataset.observation_space
    if _are_pixels(space):
        return None
    entries = space.spaces if isinstance(space, gym.spaces.Dict) else {}
    keys = [key for key, entry in entries.items() if _are_pixels(entry)]
    if wanted is not None and wanted not in keys:
        raise ValueError(unknown_name("entry with pixels", wanted, keys or ["none"]))
    if not keys:
        raise ValueError(f"the observations of {dataset.id} hold no pixels: they are {space}")
    if wanted is None and len(keys) > 1:
        raise ValueError(f"the observations of {dataset.id} hold several images ({', '.join(keys)}); choose one with pixels")
    return keys[0] if wanted is None else wanted


def _are_pixels(space: gym.Space) -> bool:
    """Whether a space is one of pictures: uint8 (H, W), or (H, W, channels)."""
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[-1] in (1, 3, 4))


def _source(name: str, dataset: Any, key: str | None) -> dict[str, Any]:
    """What is read: facts that must be the same when this is continued."""
    space = dataset.action_space
    metadata = dataset.storage.metadata
    pixels = dataset.observation_space if key is None else dataset.observation_space.spaces[key]
    authors = metadata.get("author") or "unknown"
    return {
        "kind": "minari",
        "name": name,
        **package_of("minari"),
        "licence": None,
        "environment": dataset.env_spec.id if dataset.env_spec else "unknown",
        "authors": authors if isinstance(authors, str) else ", ".join(sorted(authors)),
        "drawn": f"{pixels.dtype} {pixels.shape}",
        "episodes": int(dataset.total_episodes),
        "steps": int(dataset.total_steps),
        "action_space": str(space),
        "num_actions": int(space.n) if isinstance(space, gym.spaces.Discrete) else None,
        "moves": {},
    }


def _frame(pixels: Any, settings: RecordSettings) -> np.ndarray:
    try:
        return resize(as_rgb(pixels), settings.size)
    except ValueError as error:
        raise ValueError(f"{settings.minari}: {error}") from error


def _actions(actions: np.ndarray, space: gym.spaces.Discrete, start: int, frames: int) -> np.ndarray:
    """Actions of frames start … start+frames-1, counted from 0; a data set's action t leads from observation t to t + 1."""
    numbers = np.asarray(actions, dtype=np.int64) - int(space.start)
    return np.concatenate([[0], numbers[start : start + frames - 1]])
