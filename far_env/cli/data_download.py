"""``far-env data download``: one of FAR's data sets, from the Hugging Face hub to the folder where workloads find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from far_env.config import parse


@dataclass(frozen=True)
class DownloadOptions:
    """Fetch a data set of FAR from the Hugging Face hub, verify it and unpack it; stopped, the same command continues.

    What it will take is said first. The data set goes to FAR_ENV_DATA_DIR, or else into the cache, where data check and the
    workloads find it without a path. HF_TOKEN and HF_ENDPOINT are those of the hub.
    """

    name: tyro.conf.Positional[str]
    """ucf101, bair, minecraft, dmlab, or the latents to train on: minecraft_latent, dmlab_latent."""
    max_shards: int | None = None
    """Only the first shards, for a try; without it all. More can be fetched later."""
    dry_run: bool = False
    """Only say what it will take."""


def download(args: Sequence[str]) -> None:
    """Fetch a data set of FAR from the Hugging Face hub."""
    options = parse(DownloadOptions, args, "far-env data download", DownloadOptions.__doc__ or "")
    from far_env.clips.data_folders import data_dir
    from far_env.clips.download import download as fetch
    from far_env.clips.download import download_plan

    plan = download_plan(options.name, options.max_shards)
    if plan is None:
        print(f"{options.name} is complete in {data_dir() / options.name}")
        return
    print(plan.text(), flush=True)
    if options.dry_run:
        return
    files = fetch(plan)
    print(f"unpacked {files:,} files; far-env data check --dataset {options.name.removesuffix('_latent')} examines them")
