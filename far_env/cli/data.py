"""``far-env data check``: how many clips a folder of videos gives, and which of its files are damaged. ``data encode``: the
latents of a host's training, made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from far_env.cli.data_download import download
from far_env.config import parse


@dataclass(frozen=True)
class DataOptions:
    """Count the clips of a folder of videos and find its damaged files; the exit status is 2 if there are any."""

    action: tyro.conf.Positional[Literal["check", "download", "encode"]]
    """check examines a folder. download fetches one of FAR's data sets and has options of its own. encode takes the settings
    of train-host instead of these, and encodes what that training would encode; stopped, the same command continues."""
    folder: tyro.conf.Positional[str | None] = None
    """Folder of videos; subfolders are searched. By default the one that --dataset was downloaded to."""
    dataset: str | None = None
    """ucf101, dmlab, bair, minecraft, recorded or doom; by default guessed from the files."""
    frames: int | None = None
    """Frames of a clip; by default those of the data set's workload."""
    quick: bool = False
    """Read only the headers of files, not every file to its end."""


def data(args: Sequence[str]) -> None:
    """Count a folder's clips and find its damaged files, download a data set of FAR, or encode the clips of a training."""
    if args[:1] == ["download"]:
        download(args[1:])
        return
    if args[:1] == ["encode"]:
        encode(args[1:])
        return
    options = parse(DataOptions, args, "far-env data", DataOptions.__doc__ or "")
    from far_env.clips.check import check_data

    report = check_data(_folder(options), options.dataset, options.frames, whole=not options.quick)
    print(report.text())
    if report.problem is not None:
        raise ValueError(report.problem)


def encode(args: Sequence[str]) -> None:
    """Encode the sources of a host's training."""
    from far_env.host.training.config import HostTraining

    text = "Encode the clips of a host's training beforehand, into its latents_dir."
    config = parse(HostTraining, args, "far-env data encode", text)
    from far_env.host.training.train import encode_sources

    for source in encode_sources(config):
        skipped = f", {source.skipped} skipped" if source.skipped else ""
        print(f"{source.name}: {len(source)} episodes encoded{skipped}")


def _folder(options: DataOptions) -> Path:
    """The folder to check. Raises ValueError if none is given and the data set was not downloaded."""
    if options.folder is not None:
        return Path(options.folder)
    from far_env.clips.data_folders import data_dir, find_data

    if options.dataset is None:
        raise ValueError("data check needs a folder, or with --dataset the name of a data set that was downloaded")
    folder = find_data(options.dataset)
    if folder is None:
        raise ValueError(f"{options.dataset} is not in {data_dir()}; far-env data download fetches it, or give a folder")
    return folder
