"""Hand-written retention policies, by name. Each answers `build_temporal_cache_plan` and needs only `far_env.contract`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from far_env.baselines import anchor, attention, benchmark, chunkwise, controls, forcing, queue, recency, redundancy

from far_env.contract import RetentionPolicy, TemporalCachePlan
from far_env.errors import unknown_name

_BASELINES: dict[str, type] = {
    cls.name: cls
    for cls in (
        benchmark.RecentWindow,
        benchmark.PackCache,
        benchmark.CausalCacheVDM,
        benchmark.FlowCache,
        recency.RecentFill,
        recency.FarWindow,
        queue.Ca2VDM,
        anchor.SinkRecent,
        anchor.RollingForcing,
        anchor.PackCachePaper,
        anchor.DeCoPrune,
        chunkwise.FlowCachePaper,
        forcing.PackForcing,
        forcing.DeepForcing,
        forcing.RelaxForcing,
        forcing.FutureForcing,
        attention.H2O,
        attention.SnapKV,
        controls.RandomSubset,
        controls.RandomMid,
        controls.Uniform,
        controls.DriftMatch,
        controls.ContextMatch,
        redundancy.LeastChangePrevious,
        redundancy.LeastChangeNext,
        redundancy.NearestNeighbour,
        redundancy.LeastNovel,
    )
}


@dataclass(frozen=True)
class BaselineInfo:
    """What reports tell of a baseline.

    Attributes:
        family: recency, anchor, queue or chunkwise, as in its plans; control or redundancy.
        source: paper or other origin.
        tier: what it reads: M (FrameMeta rows alone), L (also latents), A (also attention); "A or M" works with either.
        note: what it does, and what is faithful to its source and what is adapted.
        parameters: their defaults.
        equivalent_to: baselines with the same answers, each up to a budget; a table shows such rows once.
    """

    name: str
    family: str
    source: str
    tier: str
    note: str
    parameters: dict[str, object]
    equivalent_to: dict[str, int]


def names() -> list[str]:
    """Every baseline's name, sorted."""
    return sorted(_BASELINES)


def info(name: str) -> BaselineInfo:
    """What is known of a baseline. Raises ValueError on an unknown name."""
    cls = _find(name)
    family = getattr(cls, "family", None) or getattr(cls, "tags", {}).get(
        "retention_family", TemporalCachePlan.retention_family
    )
    tier = " or ".join(getattr(cls, "needs", {"M": ()}))
    note = inspect.cleandoc(cls.__doc__).partition("\n\nSource:")[0]
    parameters = {key: parameter.default for key, parameter in _parameters(cls).items()}
    return BaselineInfo(name, family, cls.source, tier, note, parameters, dict(getattr(cls, "equivalent_to", {})))


def listing(chosen: Sequence[str] = ()) -> str:
    """A table of all baselines, or of these with what is to be said of each. Raises ValueError on an unknown name."""
    rows = [info(name) for name in chosen or names()]
    table = [("baseline", "tier", "family", "source", "parameters")]
    for row in rows:
        parameters = ", ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.parameters.items()
        )
        table.append((row.name, row.tier, row.family, row.source, parameters))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "─" * max(map(len, lines)))
    for row in rows:
        lines += [f"{row.name} answers as {other} does up to a budget of {most}" for other, most in row.equivalent_to.items()]
    if chosen:
        lines += [f"\n{row.name}: {row.note}" for row in rows]
    else:
        lines.append(
            "tier: reads M FrameMeta rows alone, L also latents, A also attention; A or M takes M where it gets no more"
        )
    return "\n".join(lines)


def make(name: str, **params: object) -> RetentionPolicy:
    """A baseline by name.

    Raises:
        ValueError: on an unknown name (the nearest one is suggested), a parameter the baseline does not take or a value that it
            cannot have.
    """
    cls = _find(name)
    known = list(_parameters(cls))
    for key in params:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"baseline {name} has no parameter {key!r}; {takes}")
    return cls(**params)


def _find(name: str) -> type:
    if name not in _BASELINES:
        raise ValueError(unknown_name("baseline", name, names()))
    return _BASELINES[name]


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    return {} if cls.__init__ is object.__init__ else dict(inspect.signature(cls).parameters)
