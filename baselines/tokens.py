"""Policies over the entries of streaming rollouts, by name: a collection of the entry points ``far_env.token_policies``.

A name may be followed by parameters, ``h2o:f_recent=0.25``, as those of the baselines for frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from far_env.baselines import description, parameters_in, parameters_text
from far_env.baselines.token_merging import FutureForcingReconstruction
from far_env.baselines.token_packing import PackForcing, RecentAveraged
from far_env.baselines.token_rules import (
    FlowCacheTokens,
    HeavyHitters,
    RecentEntries,
    SinkRecent,
    SinksAndCoarse,
    SnapKV,
    StreamingLLM,
    TwoLevels,
)
from far_env.errors import unknown_name

if TYPE_CHECKING:
    from far_env.rollout.token_policy import TokenPolicy

_POLICIES: dict[str, type] = {
    cls.name: cls
    for cls in (
        RecentEntries,
        StreamingLLM,
        SinkRecent,
        HeavyHitters,
        SnapKV,
        FlowCacheTokens,
        TwoLevels,
        SinksAndCoarse,
        PackForcing,
        RecentAveraged,
        FutureForcingReconstruction,
    )
}


def names() -> list[str]:
    """Every policy's name, sorted."""
    return sorted(_POLICIES)


def accepts(name: str) -> bool:
    """Whether `load` accepts the name, with parameters or without."""
    return name.partition(":")[0] in _POLICIES


def load(name: str) -> TokenPolicy:
    """A policy with its default parameters or those in its name. Raises ValueError on an unknown name, parameter or value."""
    cls = _find(name)
    return cls(**parameters_in(name, cls, "token policy"))


def facts(name: str) -> dict[str, str]:
    """Family, source, the first line of the description, and the parameters that are in the name."""
    cls = _find(name)
    facts = {"family": cls.family, "source": cls.source, "note": description(cls).split("\n")[0]}
    if parameters := parameters_in(name, cls, "token policy"):
        facts["parameters"] = parameters_text(parameters)
    return facts


def _find(name: str) -> type:
    base = name.partition(":")[0]
    if base not in _POLICIES:
        raise ValueError(unknown_name("token policy", base, names()))
    return _POLICIES[base]
