"""The results folder: an evaluation's records are appended as they are played, and read back for reports and validation.

``evaluation.json`` holds the settings, ``records.jsonl`` a line per episode, ``frames/`` pictures of the first clips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from far_env.config import from_dict
from far_env.contract import GENERATED
from far_env.errors import short
from far_env.evaluation.plans import check_token_plan, histories
from far_env.evaluation.records import BY_WORKLOAD, FRAMES, MEMORIES, Record, Results, Settings
from far_env.evaluation.stored_records import StoredRecords
from far_env.hub import is_hub_name, snapshot
from far_env.io import lock, make_run_dir, read_json, replacing, write_json

FORMAT = 1
SETTINGS_FILE = "evaluation.json"
RECORDS_FILE = "records.jsonl"
SMALL_BYTES = 2**26
"""Up to this size of its file, the records of a folder are kept in memory."""
_OLDER_FACTS = {"feedback": GENERATED}
"""What folders that were written before a fact was recorded were made with."""
_TYPES = {
    "workload": str,
    "budget": int,
    "policy": str,
    "clip": int,
    "seed": int,
    "plan": list,
    "metrics": dict,
    "psnr_per_frame": list,
    "decision_ms": (int, float, type(None)),
    "clip_sha256": str,
    "latents_sha256": str,
}
_FACTS = {"host": str, "weights": str, "ode_steps": int, "dtype": str, "device": str}
MAX_FRAMES = 100_000
"""Of a clip, and pixels of a frame's side."""


def load(folder: str | Path) -> Results:
    """Read a results folder, or one that was shared as hub:user/name[@revision]; a torn last line is left out.

    Raises:
        HubError: if the repository cannot be used.
        ValueError: one sentence, naming file and line, if the folder is not a results folder or is damaged.
    """
    shared = is_hub_name(str(folder))
    folder = snapshot(str(folder), (SETTINGS_FILE, RECORDS_FILE), ("frames/*",)).folder if shared else Path(folder)
    settings = _load_settings(folder / SETTINGS_FILE)
    path = folder / RECORDS_FILE
    try:
        with path.open("rb") as file:
            records, _ = _parse(file, settings, path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a folder written by far-env evaluate --out") from error
    return Results(settings, records, folder)


def session_precision(folder: str | Path | None, precision: str) -> str:
    """The precision for adding to a results folder: "auto", which is measured, stays what it was at first."""
    if precision != "auto" or folder is None or not (Path(folder) / SETTINGS_FILE).exists():
        return precision
    made_with = _load_settings(Path(folder) / SETTINGS_FILE).made_with
    return next((facts["dtype"] for facts in made_with.values()), precision)


class Recorder:
    """Adds episodes to a results folder; what the folder holds already is in ``results``. One recorder per folder at a time.

    Args:
        folder: new, empty, or of an evaluation that these settings can be merged with.
        settings: of this evaluation.

    Raises:
        ValueError: if the folder cannot be written, is being written by another evaluation, or holds a different one.
    """

    def __init__(self, folder: str | Path, settings: Settings) -> None:
        folder = make_run_dir(folder)
        self._file = _open_alone(folder / RECORDS_FILE)
        try:
            path = folder / SETTINGS_FILE
            earlier = _load_settings(path) if path.exists() else settings
            with open(self._file.fileno(), "rb", closefd=False) as lines:
                records, size = _parse(lines, earlier, folder / RECORDS_FILE)
            self.results = Results(earlier, records, folder)
            settings = earlier.merged(settings, folder, {policy for _, _, policy, *_ in self.results.episode_keys()})
            self.results = Results(settings, records, folder)
            self._file.truncate(size)
            self._write_settings()
        except BaseException:
            self.close()
            raise

    def add(self, records: Iterable[Record]) -> None:
        """Append episodes that the folder does not hold yet. Raises ValueError if they cannot be written."""
        records = list(records)
        text, size = "".join(record.line() for record in records).encode(), self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(text):  # a full disk takes a part, and refuses the rest
                written += self._file.write(text[written:])
        except OSError as error:
            self._file.truncate(size)
            raise ValueError(f"cannot write {self._file.name}: {error.strerror}") from error
        self.results.records.extend(records)

    def leave_out(self, policy: str, where: str, reason: str) -> None:
        """Remember why a policy has no further episodes in a `cell`."""
        self.results.settings.failed.setdefault(policy, {})[where] = reason
        self._write_settings()

    def has_picture(self, path: Path) -> bool:
        """Whether the picture is there already."""
        return path.exists()

    def save_picture(self, path: Path, frames: np.ndarray) -> None:
        """Write frames (T, 3, H, W) in [0, 1] side by side as a PNG, whole or not at all."""
        self.write_picture(path, png(frames))

    def write_picture(self, path: Path, content: bytes) -> None:
        """Write a picture, whole or not at all."""
        with replacing(path) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)

    def close(self) -> None:
        """Release the folder for other recorders."""
        self._file.close()

    def _write_settings(self) -> None:
        write_json(self.results.folder / SETTINGS_FILE, {"format": FORMAT, **asdict(self.results.settings)})


def png(frames: np.ndarray) -> bytes:
    """Frames (T, 3, H, W) in [0, 1] side by side as a PNG."""
    pixels, file = np.rint(frames.transpose(2, 0, 3, 1) * 255).clip(0, 255).astype(np.uint8), BytesIO()
    Image.fromarray(pixels.reshape(len(pixels), -1, 3)).save(file, format="png")
    return file.getvalue()


def _load_settings(path: Path) -> Settings:
    values = read_json(path, "give a folder written by far-env evaluate --out, or evaluate into another folder")
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}, which this version reads; evaluate into another folder")
    settings = from_dict(Settings, values, f"{path}, the evaluation's settings")
    made_with = {workload: {**_OLDER_FACTS, **facts} for workload, facts in settings.made_with.items()}
    settings = replace(settings, made_with=made_with)
    if settings.memory not in MEMORIES:
        raise ValueError(f"{path} has the memory {short(settings.memory)}; this version reads {' and '.join(MEMORIES)}")
    sizes = [*settings.num_context.values(), *settings.num_predict.values(), *settings.frame_size.values()]
    if not all(len(units) == 3 and units[2] > 0 for units in settings.units.values()):
        raise ValueError(f"{path} has units that are not three numbers; restore it or evaluate into another folder")
    sizes += [size for units in settings.units.values() for size in units]
    if not all(0 <= size <= MAX_FRAMES for size in sizes):
        raise ValueError(f"{path} has a size that is not in 0 to {MAX_FRAMES}; restore it or evaluate into another folder")
    if not all(workload in getattr(settings, name) for name in BY_WORKLOAD for workload in settings.workloads):
        raise ValueError(f"{path} lacks the sizes of a workload; restore it or evaluate into another folder")
    return settings


def _parse(lines: Iterable[bytes], settings: Settings, path: Path) -> tuple[list[Record] | StoredRecords, int]:
    """Records of all complete lines of a file, and the bytes of these lines."""
    asked, size, keys = _asked(settings), 0, set()
    records: list[Record] | StoredRecords = []
    if path.stat().st_size > SMALL_BYTES:
        records = StoredRecords(path, _checked_before)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = _record(json.loads(line), settings, asked)
            if record.key in keys:
                raise ValueError("repeats an episode of an earlier line")
        except (ValueError, RecursionError) as error:  # also JSON's and UTF-8's
            not_json = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
            reason = "is not JSON" if not_json else str(error)
            raise ValueError(f"{path}, line {number} {reason}; delete the line and evaluate again") from error
        keys.add(record.key)
        records.append(record, len(line)) if isinstance(records, StoredRecords) else records.append(record)
        size += len(line)
    return records, size


def _is_number(value: object) -> bool:
    """Whether a value can be a float64."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53)


def _are_gaps(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(gap is None or (type(gap) is int and 1 <= gap <= MAX_FRAMES) for gap in value)
    )


def _asked(settings: Settings) -> dict[str, frozenset]:
    """What the fields of a record may be, by name."""
    lists = {"workload": settings.workloads, "policy": settings.policies, "clip": settings.clips, "seed": settings.seeds}
    return {name: frozenset(values) for name, values in {**lists, "budget": settings.budgets}.items()}


def _record(values: object, settings: Settings, asked: Mapping[str, frozenset]) -> Record:
    """A record from the values of a line; ``asked`` is `_asked` of the settings.

    Raises:
        ValueError: in a few words, if they are not a record of these settings.
    """
    if not isinstance(values, dict):
        raise ValueError("is no JSON object")
    fields = {name: values.pop(name, None) for name in _TYPES}
    for name, kind in _TYPES.items():
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise ValueError(f"has no valid {name!r} ({short(fields[name])})")
    for name, values_asked in asked.items():
        if fields[name] not in values_asked:
            raise ValueError(f"has the {name} {short(fields[name])}, which is not in {SETTINGS_FILE}")
    num_predict = settings.num_predict[fields["workload"]]
    numbers = [*fields["metrics"].values(), *fields["psnr_per_frame"]]
    # Videos that are generated from prompts alone have no true frames.
    counts = (num_predict,) if settings.num_context[fields["workload"]] else (num_predict, 0)
    if len(fields["psnr_per_frame"]) not in counts or not all(map(_is_number, numbers)):
        raise ValueError(f"needs numbers as metrics and {num_predict} of them in psnr_per_frame")
    if fields["metrics"].keys() != set(settings.metrics):
        raise ValueError(f"has the metrics {', '.join(fields['metrics'])}; {SETTINGS_FILE} has {', '.join(settings.metrics)}")
    if lacking := [name for name, kind in _FACTS.items() if not isinstance(values.get(name), kind)]:
        raise ValueError(f"lacks {', '.join(lacking)}")
    gaps = values.pop("evidence_gaps", None)
    if gaps is not None and not _are_gaps(gaps, num_predict):
        raise ValueError(f"needs {num_predict} evidence_gaps, each null or a whole number from 1 on")
    record = _made(fields, values, gaps)
    if settings.memory == FRAMES:
        histories(record, *settings.plan_sizes(record.workload, record.budget))
    else:
        check_token_plan(record, settings.num_context[record.workload], num_predict)
    return record


def _made(fields: Mapping[str, Any], facts: Mapping[str, Any], gaps: list[int | None] | None) -> Record:
    return Record(**fields, facts={**_OLDER_FACTS, **facts}, evidence_gaps=gaps)


def _checked_before(values: dict[str, Any]) -> Record:
    """A record from the values of a line that `_record` has read before."""
    fields = {name: values.pop(name, None) for name in _TYPES}
    gaps = values.pop("evidence_gaps", None)
    return _made(fields, values, gaps)


def _open_alone(path: Path) -> FileIO:
    """Open for reading and appending, without a buffer, locked against a second evaluation."""
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    try:
        lock(file, path.parent, "evaluation")
    except ValueError:
        file.close()
        raise
    file.seek(0)
    return file
