"""The leaderboard's suite and its entries: a policy's scores and decisions on fixed clips, one JSON file per policy.

An entry holds for every decision the frames that were dropped, which is what is needed to play its episodes again without the
policy. `load_entry` checks a file against the schema, the suite and the rules of a rollout; `far_env.evaluation.leaderboard`
plays.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from far_env.config import from_dict, load_yaml
from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import short
from far_env.evaluation.plans import plan_of_dropped
from far_env.evaluation.records import Record
from far_env.io import make_run_dir, read_json, write_text
from far_env.workload import Workload
from far_env.workloads import WORKLOADS, make_workload

FORMAT = 1
SHIPPED_PACKAGE = "far_env.leaderboard"
"""The package of the entries that ship."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_CONTENT = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}|")
_INPUTS = re.compile(r"[MLA]( or [MLA])*")
_MAX_TEXT = 500
_AGAIN = "make it again with far-env leaderboard add"


@dataclass(frozen=True)
class SuiteCell:
    """A workload under a budget, with what its numbers depend on: the hash of the host's weights and the ODE steps."""

    workload: str
    budget: int
    weights: str
    ode_steps: int

    @property
    def label(self) -> str:
        """Its name in tables and messages."""
        return f"{self.workload} {self.budget}"


@dataclass(frozen=True)
class Suite:
    """What every entry plays.

    Attributes:
        version: entries of another version are not comparable.
        clips: the first of the split are played, of each workload as many, which `ranking` relies on.
        seed: clip i is played with the noise seed ``seed + i``.
        reference: the entry that the others are compared with.
    """

    version: int
    split: str
    clips: int
    seed: int
    metrics: tuple[str, ...]
    precision: str
    reference: str
    cells: tuple[SuiteCell, ...]

    def workload(self, cell: SuiteCell, device: str = "auto") -> Workload:
        """The workload of a cell with its own host.

        Raises:
            ValueError: if the host or its ODE steps are not those of the suite.
        """
        workload = make_workload(cell.workload, device=device, precision=self.precision)
        found = {"weights": workload.host.weights_hash, "ode_steps": workload.num_steps}
        for name, value in found.items():
            if value != getattr(cell, name):
                raise ValueError(
                    f"suite {self.version} of the leaderboard plays {cell.workload} with {name} {getattr(cell, name)}; this "
                    f"version of far-env has {value}; use the version that the suite belongs to"
                )
        return workload

    def text(self) -> str:
        """What is played, in a few words."""
        clips = f"the first {self.clips} {self.split} clips of each workload"
        return f"suite {self.version}: {clips}, noise seed {self.seed} + clip id, {self.precision}"


@dataclass(frozen=True)
class Episode:
    """One clip of a cell."""

    clip: int
    """Its number in the split."""
    dropped: tuple[tuple[int, ...], ...]
    """Per decision, in order, the numbers of the frames that were dropped; given frames are numbered first, from 0."""
    metrics: dict[str, float]
    """`psnr` in dB and `ssim`, means over the predicted frames, rounded to 4 decimals."""
    clip_sha256: str
    """First 16 hex digits of the SHA-256 of the true frames (float32)."""


@dataclass(frozen=True)
class Cell:
    """The episodes of one workload under one budget."""

    workload: str
    """As in the suite."""
    budget: int
    """As in the suite."""
    weights: str
    """Hash of the host's weights, as in the suite."""
    episodes: tuple[Episode, ...]
    """Those of the suite's clips, in order."""


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard."""

    format: int
    """Version of this schema: 1."""
    suite: int
    """Version of the suite that was played."""
    name: str
    """The row's name, and that of the file: 1 to 64 letters, digits, `.`, `_` and `-`, a letter or digit first."""
    author: str
    """Who made the policy; may be empty."""
    link: str
    """Where the policy or its description is, an https address; may be empty."""
    policy: str
    """The policy as it was given to the command; of files and folders the last part of the path."""
    sha256: str
    """SHA-256 of the policy's file or weights; empty for what is part of the package, whose version `made_with` names."""
    family: str
    """The kind of policy, such as recency, learned or file; may be empty."""
    inputs: str
    """What the policy reads: M for FrameMeta alone, L for latents too, A for attention too; "A or M" for either."""
    source: str
    """Paper or other origin; may be empty."""
    note: str
    """One line on the policy; may be empty."""
    limited: bool
    """false for full history, which ignores the budget and is shown without a place."""
    made_with: dict[str, str]
    """Versions of far-env, torch, diffusers and numpy, the commit, device and machine."""
    cells: tuple[Cell, ...]
    """Those of the suite, in its order."""

    def scores(self, metric: str = "psnr") -> np.ndarray:
        """A metric of every clip, float64 (cells, clips)."""
        return np.array([[episode.metrics[metric] for episode in cell.episodes] for cell in self.cells], dtype=np.float64)


def load_suite() -> Suite:
    """The suite of this version of far-env."""
    path = Path(str(files("far_env") / "assets" / "leaderboard" / "suite.yaml"))
    suite = load_yaml(Suite, path)
    return replace(suite, cells=tuple(from_dict(SuiteCell, cell, str(path)) for cell in suite.cells))


def check_name(name: str) -> None:
    """Raise ValueError unless the name can be that of an entry."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"an entry's name is 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first; got {short(name)}"
        )


def save_entry(entry: Entry, path: Path) -> None:
    """Write an entry as JSON, one line per episode. Raises ValueError if it cannot be written."""
    values = asdict(entry)
    cells = []
    for cell in values.pop("cells"):
        episodes = ",\n".join(f"      {json.dumps(episode, allow_nan=False)}" for episode in cell.pop("episodes"))
        cells.append(f'    {json.dumps(cell)[:-1]}, "episodes": [\n{episodes}\n    ]}}')
    make_run_dir(path.parent)
    head = json.dumps(values, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_text(path, head + ',\n  "cells": [\n' + ",\n".join(cells) + "\n  ]\n}\n")


def load_entry(path: Path, suite: Suite) -> Entry:
    """Read an entry and check everything but its scores.

    Raises:
        ValueError: one sentence that names the file and the field.
    """
    values = read_json(path, f"restore it, or {_AGAIN}")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: format is not {FORMAT}, that of the leaderboard's entries; {_AGAIN}")
    if values.get("suite") != suite.version:
        raise ValueError(
            f"{path}: suite is {short(values.get('suite'))}, and this version of far-env plays suite {suite.version}; {_AGAIN}"
        )
    cells = values.get("cells")
    wanted = [cell.label for cell in suite.cells]
    if not isinstance(cells, list) or len(cells) != len(wanted):
        raise ValueError(f"{path}: cells is not a list of {len(wanted)}, {', '.join(wanted)}; {_AGAIN}")
    entry = from_dict(Entry, values, str(path))
    try:
        check_name(entry.name)
        check_link(entry.link)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if entry.name != path.stem:
        raise ValueError(f"{path}: name is {entry.name!r}, and the file is named {path.stem!r}; rename one of them")
    check_texts(entry, path)
    if not (_INPUTS.fullmatch(entry.inputs) if entry.limited else not entry.inputs):
        wanted = "M, L, A or several with 'or'" if entry.limited else "empty, for full history"
        raise ValueError(f"{path}: inputs is {short(entry.inputs)}; it must be {wanted}")
    if not _SHA256.fullmatch(entry.sha256):
        raise ValueError(f"{path}: sha256 is {short(entry.sha256)}, which is neither 64 hex digits nor empty; {_AGAIN}")
    read = [_cell(values, cell, entry, suite, path) for values, cell in zip(cells, suite.cells, strict=True)]
    return replace(entry, cells=tuple(read))


def load_entries(folder: Path | None, suite: Suite) -> dict[str, Entry]:
    """The entries that ship, and those of a folder, by name; of equal names that of the folder.

    Raises:
        ValueError: as `load_entry`, of a file of the folder.
    """
    shipped = Path(str(files(SHIPPED_PACKAGE)))
    paths = [path for place in (shipped, folder) if place is not None for path in sorted(place.glob("*.json"))]
    return {path.stem: load_entry(path, suite) for path in paths}


def replayable(entry: Entry, cell: SuiteCell, suite: Suite, episode: Episode) -> Record:
    """An episode as the record that validation plays again. Raises ValueError, in a few words, on an impossible plan."""
    spec = WORKLOADS[cell.workload]
    budget = cell.budget if entry.limited else UNLIMITED_FRAMES
    return Record(
        workload=cell.workload,
        budget=budget,
        policy=entry.name,
        clip=episode.clip,
        seed=suite.seed,
        plan=plan_of_dropped(episode.dropped, spec.num_context, spec.num_predict, budget),
        metrics=episode.metrics,
        psnr_per_frame=[],
        decision_ms=None,
        clip_sha256=episode.clip_sha256,
        latents_sha256="",
        facts={"weights": cell.weights, "ode_steps": cell.ode_steps},
    )


def check_texts(entry: Entry, path: Path) -> None:
    """Raise ValueError on a text of several lines, a very long one, or one that could steer a terminal."""
    names = ("author", "link", "policy", "family", "source", "note")
    texts = {
        **{name: getattr(entry, name) for name in names},
        **{f"made_with {k}": f"{k} {v}" for k, v in entry.made_with.items()},
    }
    for name, text in texts.items():
        if not text.isprintable() or len(text) > _MAX_TEXT:
            raise ValueError(f"{path}: {name} is not one line of at most {_MAX_TEXT} printable characters: {short(text)}")


def check_link(link: str) -> None:
    """Raise ValueError unless the link is empty or an https address."""
    try:
        parts = urlsplit(link)
    except ValueError as error:
        raise ValueError(f"link is {short(link)}, which is no address: {error}") from error
    if link and (parts.scheme != "https" or not parts.netloc):
        raise ValueError(f"link is {short(link)}; it must be an address that begins with https://, or be empty")


def _cell(values: object, wanted: SuiteCell, entry: Entry, suite: Suite, path: Path) -> Cell:
    """A cell of the file, which must be the wanted one. Raises ValueError, naming file and field."""
    where = f"{path}: cell {wanted.label}"
    cell = from_dict(Cell, values, where)
    for name in ("workload", "budget", "weights"):
        if getattr(cell, name) != getattr(wanted, name):
            found = short(getattr(cell, name))
            raise ValueError(f"{where}: {name} is {found}, and suite {suite.version} has {getattr(wanted, name)!r}; {_AGAIN}")
    if len(cell.episodes) != suite.clips:
        raise ValueError(
            f"{where}: episodes has {len(cell.episodes)} clips, and suite {suite.version} has {suite.clips}; {_AGAIN}"
        )
    episodes = []
    for number, item in enumerate(cell.episodes):
        place = f"{where}, clip {number}"
        episode = from_dict(Episode, item, place)
        if episode.clip != number:
            raise ValueError(f"{place}: clip is {episode.clip}; the clips are those from 0 on, in order")
        if episode.metrics.keys() != set(suite.metrics):
            raise ValueError(f"{place}: metrics has {', '.join(episode.metrics)}, not {', '.join(suite.metrics)}; {_AGAIN}")
        if not _CONTENT.fullmatch(episode.clip_sha256):
            raise ValueError(f"{place}: clip_sha256 is {short(episode.clip_sha256)}, which is not 16 hex digits; {_AGAIN}")
        try:
            replayable(entry, wanted, suite, episode)
        except ValueError as error:
            raise ValueError(f"{place}: dropped {error}; {_AGAIN}") from error
        episodes.append(episode)
    return replace(cell, episodes=tuple(episodes))
