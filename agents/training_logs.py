"""Logs of a PPO stage: a CSV per session and TensorBoard's events, without what a session logged after its last checkpoint."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat, filter_excluded_keys

from far_env.errors import first_line
from far_env.events import session_writer
from far_env.io import write_text

TIMESTEPS = "time/total_timesteps"
VALIDATED_AT = "validation/timesteps"
"""Column: the decisions after which the scorer was validated."""


def log_writers(folder: Path, begun: int, logged: int) -> list[KVWriter]:
    """The writers of a session; what earlier sessions logged after their last checkpoint is removed.

    Args:
        begun: decisions before the session.
        logged: decisions up to which earlier sessions logged; -1 without a checkpoint.

    Raises:
        ValueError: if a file cannot be written, or an earlier session's is damaged.
    """
    current, rows = folder / f"progress_{begun:08d}.csv", []
    for path in folder.glob("progress_*.csv"):
        before = [] if logged < 0 else _read(path)
        kept = [row for row in before if not row.get(TIMESTEPS) or int(row[TIMESTEPS]) <= logged]
        if not kept:
            path.unlink()
        elif path == current:
            rows = kept
        elif len(kept) < len(before):
            _write(path, kept)
    return [_SessionCSV(current, rows), _Events(folder, logged)]


class _SessionCSV(KVWriter):
    """The log of one session, replaced as a whole with every line."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows = path, rows

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a line."""
        self.rows.append(filter_excluded_keys(key_values, key_excluded, "csv"))
        _write(self.path, self.rows)

    def close(self) -> None:
        """Nothing is left to write."""


class _Events(TensorBoardOutputFormat):
    """TensorBoard's events, see `far_env.events`."""

    def __init__(self, folder: Path, logged: int) -> None:
        self.writer = session_writer(folder, logged)
        self._is_closed = False


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a session. Raises ValueError if the file is damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row.get(TIMESTEPS) or 0)
            if None in row:
                raise ValueError("a line has more values than there are columns")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); restore it, or delete it to go on without it") from error
    return rows


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
