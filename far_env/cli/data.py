"""``far-env data check``: how many clips a folder of videos gives, and which of its files are damaged. ``data encode``: the
latents of a host's training, made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from far_env.config import parse


@dataclass(frozen=True)
class DataOptions:
    """Count the clips of a folder of videos and find its damaged files; the exit status is 2 if there are any."""

    action: tyro.conf.Positional[Literal["check", "encode"]]
    """check examines a folder. encode takes the configuration and options of train-host instead of these, and encodes what that
    training would encode; stopped, the same command continues."""
    folder: tyro.conf.Positional[str]
    """Folder of videos; subfolders are searched."""
    dataset: str | None = None
    """ucf101, dmlab, bair, minecraft, recorded or doom; by default guessed from the files."""
    frames: int | None = None
    """Frames of a clip; by default those of the data set's workload."""
    quick: bool = False
    """Read only the headers of files, not every file to its end."""


def data(args: Sequence[str]) -> None:
    """Count the clips of a folder of videos and find its damaged files, or encode videos for training a host."""
    if args[:1] == ["encode"]:
        encode(args[1:])
        return
    options = parse(DataOptions, args, "far-env data", DataOptions.__doc__ or "")
    from far_env.clips.check import check_data

    report = check_data(Path(options.folder), options.dataset, options.frames, whole=not options.quick)
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
