"""``far-env record``: plays what is missing of a recording, counts what is there, and writes its card."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from far_env.clips.arrays import read_episode
from far_env.clips.clip import SPLITS
from far_env.clips.copying import copying_psnr
from far_env.clips.recorder import behaviours
from far_env.clips.recorder.card import card
from far_env.clips.recorder.folder import FACTS_FILE, RecordedEpisodes, begin
from far_env.clips.recorder.player import Player, environment_seed
from far_env.clips.recorder.settings import RecordSettings
from far_env.clips.recorder.workers import Job, play_all
from far_env.io import locked, make_run_dir, write_json, write_text
from far_env.progress import show_progress

_NEWEST = (4, 8, None)
_COPIED_CLIPS = 64
_PACKAGES = ("far-env", "gymnasium", "numpy", "pillow")


@dataclass(frozen=True)
class Recorded:
    """What a call of `record` did.

    Attributes:
        facts: the content of recording.json.
        new: episodes that were played now.
        replaced: how many of them replaced a damaged file.
    """

    facts: dict[str, Any]
    new: int
    replaced: int


def record(settings: RecordSettings) -> Recorded:
    """Record an environment, or continue a recording that was interrupted.

    Raises:
        ValueError: if the environment, a behaviour, a map or the folder cannot be used, or if the folder holds a recording with
            other settings. Finished episodes are kept.
    """
    with closing(Player(settings)) as player:
        folder = make_run_dir(settings.out)
        with locked(folder):
            return _record(settings, player, folder)


def _record(settings: RecordSettings, player: Player, folder: Path) -> Recorded:
    done = begin(folder, {"settings": settings.determining, "source": _source(settings, player)}, settings.episodes)
    files = RecordedEpisodes(folder, settings.frames, settings.size, player.num_actions is not None)
    missing = _missing(files, settings, player)
    if not missing and done["complete"]:
        return Recorded(done, 0, 0)
    if missing and "repeatable" not in done:
        done = {**done, "repeatable": _is_repeatable(player, missing[0]), "drawn": player.drawn}
    player.close()  # the processes have environments of their own
    done["sessions"] = [*done.get("sessions", []), session()]
    write_json(folder / FACTS_FILE, done)
    replaced = sum(files.path(*job).exists() for job in missing)
    total = sum(settings.episodes.values())
    options = {"total": total, "initial": total - len(missing), "description": "record", "unit": "episodes"}
    with show_progress(**options) as progress, closing(play_all(settings, missing)) as played:
        for _ in played:
            progress.update()
    return Recorded(finish(folder, files, done, settings.episodes), len(missing), replaced)


def finish(folder: Path, files: RecordedEpisodes, facts: dict[str, Any], episodes: dict[str, int]) -> dict[str, Any]:
    """Count the episodes of a recording that is complete, and write its card and its facts; returns the facts."""
    counts = files.counts(episodes)
    seed = facts["settings"]["seed"]
    for split in SPLITS if facts["source"]["kind"] == "environment" else ():
        if episodes[split]:
            counts[split]["seeds"] = [environment_seed(seed, split, 0), environment_seed(seed, split, episodes[split] - 1)]
    facts = {**facts, "splits": counts, "copying": _copying(files, episodes["test"]), "complete": True}
    write_text(folder / "README.md", card(facts))
    write_json(folder / FACTS_FILE, facts)
    return facts


def package_of(module: str) -> dict[str, str | None]:
    """The distribution that a module belongs to: name, version and licence; None where it is unknown."""
    top = module.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [])
    if not names:
        return {"package": top, "version": None, "licence": None}
    found = importlib.metadata.metadata(names[0])
    classifiers = [text for text in found.get_all("Classifier", []) if text.startswith("License ::")]
    licence = found.get("License-Expression") or found.get("License") or "".join(classifiers[:1]).rpartition(" :: ")[2]
    return {"package": names[0], "version": found["Version"], "licence": licence.splitlines()[0] if licence else None}


def session() -> dict[str, Any]:
    """The command of this process, and the versions it runs with."""
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of the packages that every recording depends on."""
    found = {"python": sys.version.partition(" ")[0]}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except PackageNotFoundError:
            continue
    return found


def _source(settings: RecordSettings, player: Player) -> dict[str, Any]:
    """What is recorded: facts that a continued recording must share."""
    kind = type(player.env.unwrapped)
    space = player.env.action_space
    start = int(space.start) if isinstance(space, gym.spaces.Discrete) else 0
    names = [name.strip() for name in settings.behaviours.split(",")]
    digests = {name: digest for name in names if (digest := behaviours.file_sha256(name)) is not None}
    return {
        "kind": "environment",
        "name": settings.env,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        **package_of(getattr(kind, "package", kind.__module__)),
        "licence_of_data": getattr(kind, "licence", None),
        "action_space": str(space),
        "num_actions": player.num_actions,
        "moves": {name: number - start for name, number in player.moves.items()},
        "maps": {split: list(names) for split, names in player.maps.items()},
        "behaviour_files": digests,
    }


def _copying(files: RecordedEpisodes, num_test: int) -> dict[str, Any] | None:
    """PSNR of copying in the second half of the first test episodes, from the newest frames and from all; None without any."""
    clips, context = min(num_test, _COPIED_CLIPS), files.frames // 2
    if not clips or not context:
        return None
    videos = (read_episode(files.path("test", number)) for number in range(clips))
    means = np.mean([copying_psnr(video, context, _NEWEST) for video in videos], axis=0)
    names = ["all" if count is None else str(count) for count in _NEWEST]
    return {"clips": clips, "num_context": context, "psnr": dict(zip(names, means.tolist(), strict=True))}


def _missing(files: RecordedEpisodes, settings: RecordSettings, player: Player) -> list[Job]:
    """The episodes without a finished file; those of one map after another, because a change of map takes a while."""
    jobs = []
    for split in SPLITS:
        num_maps = max(1, len(player.maps.get(split, ())))
        numbers = sorted(range(settings.episodes[split]), key=lambda number, num_maps=num_maps: (number % num_maps, number))
        jobs += [(split, number) for number in numbers if not files.finished(split, number)]
    return jobs


def _is_repeatable(player: Player, job: Job) -> bool:
    """Whether an episode that is played twice is the same, another one of the same map being played between."""
    split, number = job
    first = player.play(split, number)
    player.play(split, number + max(1, len(player.maps.get(split, ()))))
    second = player.play(split, number)
    return np.array_equal(first.video, second.video)
