"""``far-env weights``: the released FAR models and the weights of LPIPS are listed, downloaded or verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from far_env.config import parse
from far_env.errors import WeightsError

LPIPS = "lpips"
"""The name of AlexNet's weights, which the metric needs."""


@dataclass(frozen=True)
class WeightsOptions:
    """List, download or verify the released FAR models and the weights of LPIPS."""

    action: tyro.conf.Positional[Literal["list", "download", "verify"]]
    """What to do."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names from the list, or lpips for the weights of that metric; a transformer brings its autoencoder. Without names, verify
    checks all files that are present."""


def weights(args: Sequence[str]) -> None:
    """List, download or verify the released FAR models and the weights of LPIPS."""
    options = parse(WeightsOptions, args, "far-env weights", WeightsOptions.__doc__ or "")
    from far_env.host import zoo

    names = list(options.names)
    for name in options.names:
        autoencoder = None if name == LPIPS else zoo.find_released(name).autoencoder
        if autoencoder is not None and autoencoder not in names:
            names.append(autoencoder)
    if options.action == "list":
        print(zoo.listing([name for name in names if name != LPIPS] or list(zoo.RELEASED)))
        print(f"{LPIPS}: AlexNet's ImageNet weights for the metric LPIPS, from torchvision")
        return
    if options.action == "download" and not names:
        raise ValueError("weights download needs the names of released models; far-env weights list shows them")
    from far_env import perceptual  # imports torch, which a list does without

    if not names:
        names = [name for name, released in zoo.RELEASED.items() if released.path.exists()]
        names += [LPIPS] * perceptual.alexnet_path().exists()
        if not names:
            raise ValueError(f"no released weights in {zoo.weights_dir()}; far-env weights download NAME fetches some")
    failures = []
    for name in names:
        try:
            if name == LPIPS:
                path = (perceptual.download_alexnet if options.action == "download" else perceptual.verify_alexnet)()
            else:
                path = (zoo.download if options.action == "download" else zoo.verify)(name)
            print(f"{name}: {path} is complete")
        except WeightsError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("; ".join(failures))
