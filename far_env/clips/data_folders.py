"""Where downloaded data sets are: a folder per data set below FAR_ENV_DATA_DIR or the cache, and how far each download is."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from far_env.config import from_dict
from far_env.io import cache_dir, read_json, write_json

DATA_VARIABLE = "FAR_ENV_DATA_DIR"
DOWNLOAD_FOLDER = ".download"
"""Subfolder of a data set's folder with the state of its download; hidden, so that no video is looked for in it."""
_STATE_FILE = "state.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownloadState:
    """How far the download of a data set is.

    Attributes:
        repository, commit: where it comes from.
        shards: all shards of the commit, in order.
        wanted: how many of them are to be here.
        done: the shards that are unpacked.
    """

    repository: str
    commit: str
    shards: list[str]
    wanted: int
    done: list[str]

    @property
    def complete(self) -> bool:
        """Return whether all wanted shards are here."""
        return set(self.shards[: self.wanted]) <= set(self.done)

    @property
    def partial(self) -> bool:
        """Return whether the data set has more shards than are here."""
        return len(set(self.done)) < len(self.shards)


def data_dir() -> Path:
    """The folder of the environment variable FAR_ENV_DATA_DIR, else the folder data in the cache."""
    configured = os.environ.get(DATA_VARIABLE)
    return Path(configured).expanduser() if configured else cache_dir() / "data"


def read_state(folder: Path) -> DownloadState | None:
    """The state of a folder's download; None if the folder was not made by one. Raises ValueError if it is damaged."""
    path = folder / DOWNLOAD_FOLDER / _STATE_FILE
    if not path.exists():
        return None
    remedy = f"delete {folder / DOWNLOAD_FOLDER} and download the data set again"
    return from_dict(DownloadState, read_json(path, remedy), str(path))


def write_state(folder: Path, state: DownloadState) -> None:
    """Replace the state of a folder's download."""
    (folder / DOWNLOAD_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / DOWNLOAD_FOLDER / _STATE_FILE, asdict(state))


def find_data(name: str) -> Path | None:
    """The folder of a data set: what was downloaded, or put at that place, as videos or else as latents; None without any.

    Raises:
        ValueError: if its download is not finished.
    """
    for candidate in (name, f"{name}_latent"):
        folder = data_dir() / candidate
        if not folder.is_dir():
            continue
        state = read_state(folder)
        if state is not None and not state.complete:
            raise ValueError(
                f"the download of {candidate} to {folder} is not finished: {len(state.done)} of {state.wanted} shards are "
                f"there; far-env data download {candidate} continues it"
            )
        if state is not None and state.partial:
            _logger.warning(
                "%s holds %d of the %d shards of %s: numbers are not those of the whole data set",
                folder,
                len(state.done),
                len(state.shards),
                state.repository,
            )
        return folder
    return None
