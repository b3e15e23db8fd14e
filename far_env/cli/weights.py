"""``far-env weights``: the released FAR models and the weights of LPIPS and FVD are listed, downloaded or verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from far_env.config import parse
from far_env.errors import WeightsError, unknown_name

LPIPS = "lpips"
"""The name of AlexNet's weights, which the metric needs."""
FVD = "fvd"
"""The name of the weights of I3D, which the metric needs."""


@dataclass(frozen=True)
class WeightsOptions:
    """List, download or verify the released FAR models and the weights of LPIPS and FVD."""

    action: tyro.conf.Positional[Literal["list", "download", "verify"]]
    """What to do."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names from the list, or lpips or fvd for the weights of that metric; a transformer brings its autoencoder. Without names,
    verify checks all files that are present."""


def weights(args: Sequence[str]) -> None:
    """List, download or verify the released FAR models and the weights of LPIPS and FVD."""
    options = parse(WeightsOptions, args, "far-env weights", WeightsOptions.__doc__ or "")
    from far_env.host import zoo

    names, known = list(options.names), [LPIPS, FVD, *zoo.RELEASED]
    for name in options.names:
        if name not in known:
            raise ValueError(unknown_name("weights", name, known))
        autoencoder = None if name in (LPIPS, FVD) else zoo.RELEASED[name].autoencoder
        if autoencoder is not None and autoencoder not in names:
            names.append(autoencoder)
    if options.action == "list":
        print(zoo.listing([name for name in names if name not in (LPIPS, FVD)] or list(zoo.RELEASED)))
        print(f"{LPIPS}: AlexNet's ImageNet weights for the metric LPIPS, from torchvision")
        print(
            f"{FVD}: I3D's Kinetics weights for the metric FVD, as the package cd-fvd takes them from github.com/songweige/TATS"
        )
        return
    if options.action == "download" and not names:
        raise ValueError("weights download needs the names of released models; far-env weights list shows them")
    from far_env import perceptual  # imports torch, which a list does without
    from far_env.evaluation import fvd

    if not names:
        names = [name for name, released in zoo.RELEASED.items() if released.path.exists()]
        names += [LPIPS] * perceptual.alexnet_path().exists() + [FVD] * fvd.i3d_path().exists()
        if not names:
            raise ValueError(f"no released weights in {zoo.weights_dir()}; far-env weights download NAME fetches some")
    failures = []
    for name in names:
        try:
            if name == LPIPS:
                path = (perceptual.download_alexnet if options.action == "download" else perceptual.verify_alexnet)()
            elif name == FVD:
                path = (fvd.download_i3d if options.action == "download" else fvd.verify_i3d)()
            else:
                path = (zoo.download if options.action == "download" else zoo.verify)(name)
            print(f"{name}: {path} is complete")
        except WeightsError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("; ".join(failures))
