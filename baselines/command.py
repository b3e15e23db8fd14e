"""``far-env baselines``: the hand-written policies as a table, or one of them in detail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from far_env.config import parse


@dataclass(frozen=True)
class BaselinesOptions:
    """List the hand-written policies: source, tier and parameters."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these, with what is faithful to the source and what is adapted."""


def baselines(args: Sequence[str]) -> None:
    """List the hand-written policies: source, tier and parameters."""
    options = parse(BaselinesOptions, args, "far-env baselines", BaselinesOptions.__doc__ or "")
    from far_env import baselines

    print(baselines.listing(options.names))
