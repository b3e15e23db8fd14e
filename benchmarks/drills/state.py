"""What a command left in a folder, in a form in which two outcomes can be compared to the last bit."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from far_env.agents.checkpoints import RESULTS_FILE
from far_env.evaluation.results_folder import RECORDS_FILE
from far_env.io import LOCK_FILE
from far_env.provenance import FILE as FACTS_FILE
from far_env.tensor_files import load_tensors

TIMES = {"decision_ms", "seconds", "time/fps", "time/time_elapsed", "training_seconds"}
SESSION = {"commit", "command", "sessions"}
LEFT_OUT = {LOCK_FILE, FACTS_FILE, "README.md", "results.txt"}
"""Files about sessions, and texts with times."""


def folder_state(folder: Path) -> dict[str, object]:
    """Name → content of every file, without times and facts about sessions; logs of several sessions are joined."""
    state: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        where = path.parent.relative_to(folder).as_posix()
        if path.is_dir() or path.name in LEFT_OUT:
            continue
        if path.name.startswith("events.out.tfevents"):
            if f"{where}/events" not in state:
                state[f"{where}/events"] = _events(path.parent)
        elif path.name.startswith("progress_"):
            state.setdefault(f"{where}/progress", []).extend(_rows(path))
        elif path.name == RECORDS_FILE:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            state[name] = sorted(json.dumps(_without(json.loads(line)), sort_keys=True) for line in lines)
        elif path.name == RESULTS_FILE or path.suffix == ".json":
            state[name] = _without(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".ckpt":
            state[name] = _plain(load_tensors(path))
        elif path.suffix == ".yaml":
            state[name] = path.read_text(encoding="utf-8").replace(str(folder), "FOLDER")
        else:
            state[name] = path.read_bytes()
    check_times(folder)
    return state


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """What differs between two folders, in words."""
    lacking, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    changed = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    kinds = {"missing": lacking, "superfluous": more, "different": changed}
    return ["; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)] if any(kinds.values()) else []


def leftovers(folder: Path) -> list[str]:
    """Temporary files that should be gone."""
    return [path.name for path in folder.rglob("*") if path.suffix == ".part" or path.name == ".write_probe"]


def check_times(folder: Path) -> None:
    """Raise ValueError if a session's duration is negative."""
    for path in folder.rglob(FACTS_FILE):
        for session in json.loads(path.read_text(encoding="utf-8")):
            if session.get("training_seconds", 0) < 0:
                raise ValueError(f"{path} has a negative duration")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value and key not in TIMES} for row in csv.DictReader(file)]


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in TIMES]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def _without(value: Any) -> Any:
    """A JSON value without times and facts about sessions."""
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in TIMES | SESSION}
    return [_without(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """The content of a checkpoint, with tensors as hashes."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if key not in TIMES}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
