"""Encoded episodes on disk: written once in chunks by all processes, then mapped into memory, so that any amount of data fits.

A folder holds one source, encoded by one autoencoder:

    source.json            what was encoded, and by which autoencoder
    latents_000000.npy     float16 (frames, C, h, w), scaled: the episodes of a chunk, one after the other
    chunk_000000.npz       their ``lengths`` (0 if one cannot be read), ``labels`` and, per frame, ``actions``; −1 is none

A chunk's .npz file is written last: without it, the chunk is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from far_env.errors import VideoError
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.training.episodes import Episodes
from far_env.io import make_run_dir, replacing, write_json
from far_env.progress import show_progress

CHUNK_FRAMES = 8192
"""A chunk ends with the episode that brings it to at least so many frames."""
OPEN_CHUNKS = 256
"""Chunks that are kept mapped; each takes a file descriptor."""
CHECKED_EPISODES = 20
"""Episodes whose actions are checked before the autoencoder is trained; the others are while they are encoded."""
NONE = -1
"""The label or action of a source that has none."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """Some frames of an episode: latents float16 (n, C, h, w), actions int64 (n,) and the episode's label; −1 is none."""

    latents: np.ndarray
    actions: np.ndarray
    label: int


class EncodedEpisodes:
    """The encoded train episodes of a source that are at least one window long.

    Args:
        episodes: the source.
        chunks: the chunks' files in order: latents and facts.
    """

    def __init__(self, episodes: Episodes, chunks: Sequence[tuple[Path, Path]]) -> None:
        self.name, self._classes_given = episodes.name, episodes.classes_given
        self.window, self.interval = episodes.frames, episodes.interval
        self._latents = [latents for latents, _ in chunks]
        self._facts = [facts for _, facts in chunks]
        places, self.skipped = [], 0
        for number, facts in enumerate(self._facts):
            lengths = _chunk_facts(facts)["lengths"]
            starts = np.cumsum(lengths) - lengths
            usable = lengths > (self.window - 1) * self.interval
            self.skipped += int((~usable).sum())
            numbers = np.full(len(lengths), number)
            places.append(np.stack([numbers, np.arange(len(lengths)), starts, lengths], axis=1)[usable])
        self._places = np.concatenate(places)
        if not len(self._places):
            raise ValueError(f"no episode of the source {self.name} can be read for windows of {self.window} frames")

    def __len__(self) -> int:
        return len(self._places)

    def length(self, index: int) -> int:
        """Frames of an episode."""
        return int(self._places[index, 3])

    def read(self, index: int, frames: np.ndarray) -> History:
        """Frames of an episode by their numbers within it."""
        chunk, place, start, _ = self._places[index]
        rows = start + frames
        latents = _mapped(self._latents[chunk])[rows]
        if not self._classes_given:
            return History(latents, np.full(len(rows), NONE), NONE)
        facts = _chunk_facts(self._facts[chunk])
        return History(latents, facts["actions"][rows], int(facts["labels"][place]))


@lru_cache(maxsize=OPEN_CHUNKS)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=OPEN_CHUNKS)
def _chunk_facts(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # zipfile and NumPy raise many kinds of them on damaged files
        raise ValueError(f"{path} is damaged; delete it, and the same command encodes its episodes again") from error


def encode_episodes(episodes: Episodes, autoencoder: Autoencoder, folder: Path, model: FAR, share: slice = slice(None)) -> None:
    """Encode the train episodes of a source, unless they are in the folder already.

    Args:
        episodes: the source.
        autoencoder: encodes frames, on its device.
        folder: of all encoded sources; each gets a folder inside.
        model: the host for which actions and labels are checked.
        share: the chunks that this process encodes.

    Raises:
        ValueError: if an action or a label is outside the model's classes, or the disk is full; what was encoded stays.
    """
    own = make_run_dir(folder / folder_name(episodes, autoencoder))
    write_json(own / "source.json", {"autoencoder": state_hash(autoencoder), **episodes.facts})
    plan = list(zip(_chunks(episodes), _chunk_files(episodes, own), strict=True))[share]
    for numbers, (latents, facts) in show_progress(plan, description=f"encode {episodes.name}", unit="chunks", delay=1):
        if not facts.exists():
            _encode_chunk(episodes, autoencoder, numbers, latents, facts)
        if model.condition is not None and episodes.classes_given:
            check_classes(episodes.name, _chunk_facts(facts)["actions" if model.condition == "action" else "labels"], model)


def open_encoded(episodes: Episodes, autoencoder: Autoencoder, folder: Path) -> EncodedEpisodes:
    """The train episodes that `encode_episodes` has encoded. Raises ValueError if a chunk is damaged."""
    return EncodedEpisodes(episodes, _chunk_files(episodes, folder / folder_name(episodes, autoencoder)))


def check_first_classes(sources: Sequence[Episodes], model: FAR) -> None:
    """Check the actions, or labels, of the first episodes as `check_classes` does, so that an error is met before long work."""
    if model.condition is None:
        return
    for source in sources:
        if source.classes_given:
            first = [source.classes(index) for index in range(min(CHECKED_EPISODES, source.count()))]
            actions = [np.zeros(0, np.int64) if each.actions is None else each.actions for each in first]
            labels = [NONE if each.label is None else each.label for each in first]
            given = np.concatenate(actions) if model.condition == "action" else np.array(labels)
            check_classes(source.name, given if len(given) else np.array([NONE]), model)


def check_classes(name: str, given: np.ndarray, model: FAR) -> None:
    """Raise ValueError if all actions, or labels, for a model that takes them are missing, or one is outside its classes."""
    if len(given) and (given == NONE).all():
        raise ValueError(
            f"the source {name} has no {model.condition}s, on which the host is conditioned; set classes: false in the source "
            "to give its frames the null class"
        )
    if given.max(initial=NONE) >= model.null_class or given.min(initial=NONE) < NONE:
        raise ValueError(
            f"the source {name} has {model.condition}s from {given[given != NONE].min()} to {given.max()}, the host has "
            f"{model.null_class} classes, 0 to {model.null_class - 1}; set the number in condition_cfg"
        )


def folder_name(episodes: Episodes, autoencoder: Autoencoder) -> str:
    """The folder of a source that is encoded by an autoencoder: its name and hashes of both."""
    facts = hashlib.sha256(json.dumps(episodes.facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{episodes.name}_{facts}_{state_hash(autoencoder)}"


def state_hash(model: torch.nn.Module) -> str:
    """First eight hex digits of the SHA-256 over all weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _chunk_files(episodes: Episodes, folder: Path) -> list[tuple[Path, Path]]:
    """The files of all chunks of a source: latents and facts."""
    numbers = range(len(_chunks(episodes)))
    return [(folder / f"latents_{number:06d}.npy", folder / f"chunk_{number:06d}.npz") for number in numbers]


def _chunks(episodes: Episodes) -> list[range]:
    """The numbers of the episodes in each chunk."""
    chunks, start, frames = [], 0, 0
    for index in range(episodes.count()):
        frames += episodes.length(index)
        if frames >= CHUNK_FRAMES:
            chunks.append(range(start, index + 1))
            start, frames = index + 1, 0
    return [*chunks, range(start, episodes.count())] if start < episodes.count() else chunks


def _encode_chunk(episodes: Episodes, autoencoder: Autoencoder, numbers: range, latents_path: Path, facts_path: Path) -> None:
    """Write one chunk. A file that cannot be read to its end is skipped: it has no frames."""
    lengths, labels, actions = [0] * len(numbers), [NONE] * len(numbers), [np.zeros(0, np.int64)]
    with replacing(latents_path) as temporary, temporary.open("w+b") as file:
        array = _GrowingArray(file)
        for place, index in enumerate(numbers):
            length, end = episodes.length(index), len(array)
            try:
                classes = episodes.classes(index)
                for block in episodes.blocks(index):
                    array.append(_scaled_latents(autoencoder, block, episodes.holds_latents))
                if len(array) != end + length:
                    raise VideoError(
                        f"{episodes.name}, episode {index}: {length} frames were announced, {len(array) - end} read"
                    )
            except VideoError as error:
                _logger.warning("skipping: %s", error)
                array.truncate(end)
                continue
            lengths[place] = length
            labels[place] = NONE if classes.label is None else classes.label
            actions.append(np.full(length, NONE) if classes.actions is None else classes.actions[:length])
        array.finish()
    with replacing(facts_path) as temporary, temporary.open("wb") as file:
        np.savez(file, lengths=np.array(lengths), labels=np.array(labels), actions=np.concatenate(actions).astype(np.int64))


def _scaled_latents(autoencoder: Autoencoder, block: np.ndarray, are_latents: bool) -> np.ndarray:
    """Scaled latents (t, C, h, w) float16 of frames (t, 3, H, W), or of latents that are not scaled yet."""
    block = torch.from_numpy(np.ascontiguousarray(block))
    if are_latents:
        channels = autoencoder.settings.get("latent_channels", 32)
        if block.shape[1] != channels:
            raise VideoError(f"latents of {block.shape[1]} channels were given, the autoencoder has {channels}")
        return (block * autoencoder.scaling_factor).numpy().astype(np.float16)
    parameter = next(autoencoder.parameters())
    return autoencoder.encode(block[None].to(parameter.device, parameter.dtype))[0].float().cpu().numpy().astype(np.float16)


class _GrowingArray:
    """Writes a float16 .npy file row by row, which takes no memory and meets a full disk as an OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._row, self._first, self._length = file, (), 0, 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n, …)."""
        if not self._first:
            self._row = rows.shape[1:]
            self._write_header()
            self._first = self._file.tell()
        if rows.shape[1:] != self._row:
            raise VideoError(f"latents of the shape {rows.shape[1:]} were given, earlier ones have {self._row}")
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self._length += len(rows)

    def truncate(self, length: int) -> None:
        """Remove the rows from ``length`` on."""
        self._length = length
        self._file.seek(self._first + 2 * length * math.prod(self._row))

    def finish(self) -> None:
        """Write the number of rows into the header, whose size is the same for any number."""
        self._file.truncate()
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (self._length, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)
