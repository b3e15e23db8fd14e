"""Hand-written retention policies, by name. Each answers `build_temporal_cache_plan` and needs only `far_env.contract`."""

from __future__ import annotations

import inspect

from baselines.benchmark import CausalCacheVDM, FlowCache, PackCache, RecentWindow
from baselines.controls import RandomSubset
from baselines.recency import RecentFill
from baselines.redundancy import LeastChangeNext, LeastChangePrevious
from far_env.contract import RetentionPolicy, unknown_name

_BASELINES: dict[str, type] = {
    cls.name: cls
    for cls in (
        RecentWindow,
        PackCache,
        CausalCacheVDM,
        FlowCache,
        RecentFill,
        RandomSubset,
        LeastChangePrevious,
        LeastChangeNext,
    )
}


def names() -> list[str]:
    """Every baseline's name, sorted."""
    return sorted(_BASELINES)


def make(name: str, **params: object) -> RetentionPolicy:
    """A baseline by name.

    Raises:
        ValueError: on an unknown name (the nearest one is suggested) or a parameter the baseline does not take.
    """
    if name not in _BASELINES:
        raise ValueError(unknown_name("baseline", name, names()))
    cls = _BASELINES[name]
    known = [] if cls.__init__ is object.__init__ else [p for p in inspect.signature(cls).parameters]
    for key in params:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"baseline {name} has no parameter {key!r}; {takes}")
    return cls(**params)
