"""Hand-written retention policies, by name: policies from the literature, the benchmark's, and controls.

The module is the collection ``baselines`` of the entry points ``far_env.policies`` (see `far_env.policies`). The policies
import nothing of far_env but the contract.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from far_env.baselines import (
    anchor,
    attention,
    benchmark,
    chunkwise,
    controls,
    coverage,
    extended,
    forcing,
    queue,
    recency,
    redundancy,
    similarity,
    tracker,
)
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
        coverage.KCenter,
        coverage.LatentRI,
        coverage.Keepsake,
        similarity.StableWorld,
        similarity.DySink,
        tracker.SceneTracker,
        tracker.PathTracker,
    )
}


@dataclass(frozen=True)
class BaselineInfo:
    """The description of a baseline.

    Attributes:
        family: recency, anchor, queue or chunkwise, as in its plans; control, redundancy or tracker.
        source: paper or other origin.
        tier: what it reads: M (FrameMeta rows alone), L (also latents), A (also attention); "A or M" works with either.
        note: what it does, what is faithful to its source and what is adapted.
        parameters: name → default.
        equivalent_to: baseline with the same plans → the largest budget for which they are the same.
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


def accepts(name: str) -> bool:
    """Return whether `load` accepts the name: that of a baseline, or of a policy for token budgets, which is not listed."""
    return name in _BASELINES or name in extended.EXTENDED


def load(name: str) -> RetentionPolicy:
    """A baseline with its default parameters, or a policy for token budgets. Raises ValueError on an unknown name."""
    return make(name) if name in _BASELINES else extended.make(name)


def facts(name: str) -> dict[str, str]:
    """Facts about a policy that results record: family, tier, source and the first line of its description."""
    if name not in _BASELINES:
        policy = type(extended.make(name))
        return {"family": "token budget", "tier": "M", "source": policy.source, "note": _description(policy).split("\n")[0]}
    baseline = info(name)
    return {"family": baseline.family, "tier": baseline.tier, "source": baseline.source, "note": baseline.note.split("\n")[0]}


def info(name: str) -> BaselineInfo:
    """The description of a baseline. Raises ValueError on an unknown name."""
    cls = _find(name)
    family = getattr(cls, "family", None) or getattr(cls, "tags", {}).get(
        "retention_family", TemporalCachePlan.retention_family
    )
    tier = " or ".join(getattr(cls, "needs", {"M": ()}))
    note = _description(cls).partition("\n\nSource:")[0]
    parameters = {key: parameter.default for key, parameter in _parameters(cls).items()}
    return BaselineInfo(name, family, cls.source, tier, note, parameters, dict(getattr(cls, "equivalent_to", {})))


def make(name: str, **params: object) -> RetentionPolicy:
    """A baseline by name.

    Raises:
        ValueError: on an unknown name (the nearest one is suggested), a parameter the baseline does not take or a value that it
            cannot have.
    """
    cls = _find(name)
    accepted = list(_parameters(cls))
    for key in params:
        if key not in accepted:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"baseline {name} has no parameter {key!r}; {takes}")
    return cls(**params)


def _find(name: str) -> type:
    if name not in _BASELINES:
        raise ValueError(unknown_name("baseline", name, names()))
    return _BASELINES[name]


def _description(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    return {} if cls.__init__ is object.__init__ else dict(inspect.signature(cls).parameters)
