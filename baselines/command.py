"""``far-env baselines``: the hand-written policies as a table, or one of them in detail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tyro

from far_env.config import parse
from far_env.text import text_table


@dataclass(frozen=True)
class BaselinesOptions:
    """List the hand-written policies: source, tier and parameters."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Baselines to describe: what is faithful to the source and what is adapted; all are listed by default."""


def baselines(args: Sequence[str]) -> None:
    """List the hand-written policies: source, tier and parameters."""
    options = parse(BaselinesOptions, args, "far-env baselines", BaselinesOptions.__doc__ or "")
    print(listing(options.names))


def listing(names: Sequence[str] = ()) -> str:
    """A table of all baselines, or of these with their descriptions. Raises ValueError on an unknown name."""
    from far_env import baselines

    infos = [baselines.info(name) for name in names or baselines.names()]
    rows = [(info.name, info.tier, info.family, info.source, _parameters(info.parameters)) for info in infos]
    lines = [text_table(("baseline", "tier", "family", "source", "parameters"), rows, numbers=False)]
    for info in infos:
        lines += [
            f"{info.name} has the plans of {other} up to a budget of {most}" for other, most in info.equivalent_to.items()
        ]
    if names:
        for info in infos:
            lines.append(f"\n{info.name}: {info.note}")
            lines += [f"tuned: {key} in {', '.join(map(str, values))}" for key, values in info.grid.items()]
    else:
        lines.append("tier: M reads FrameMeta rows alone, L also latents, A also attention; A or M works without attention too")
    return "\n".join(lines)


def _parameters(defaults: Mapping[str, object]) -> str:
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in defaults.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())
