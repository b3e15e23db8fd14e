"""Hand-written retention policies, by name: policies from the literature, the benchmark's, and controls.

The module is the collection ``baselines`` of the entry points ``far_env.policies`` (see `far_env.policies`). The policies
import nothing of far_env but the contract. A name may be followed by parameters, ``sink_recent:n_sink=2`` or
``path_tracker:near=0.3:drop=older``.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from far_env.baselines import (
    anchor,
    attention,
    benchmark,
    chunkwise,
    composed,
    controls,
    coverage,
    forcing,
    queue,
    recency,
    redundancy,
    similarity,
    tracker,
)
from far_env.baselines.filling import FillingPolicy
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
        composed.Partition,
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
        grid: parameter → the values that tuning tries.
        equivalent_to: baseline with the same plans → the largest budget for which they are the same.
    """

    name: str
    family: str
    source: str
    tier: str
    note: str
    parameters: dict[str, object]
    grid: dict[str, tuple[object, ...]]
    equivalent_to: dict[str, int]


def names() -> list[str]:
    """Every baseline's name, sorted."""
    return sorted(_BASELINES)


def accepts(name: str) -> bool:
    """Return whether `load` accepts the name, with parameters or without."""
    return name.partition(":")[0] in _BASELINES


def load(name: str) -> RetentionPolicy:
    """A baseline with its default parameters or those in its name.

    Raises:
        ValueError: on an unknown name, and as `make`.
    """
    baseline, parameters = parse(name)
    return make(baseline, **parameters)


def facts(name: str) -> dict[str, str]:
    """Facts about a policy that results record: family, tier, source and the first line of its description.

    Parameters that are in its name are a fact too.
    """
    base, parameters = parse(name)
    baseline = info(base)
    facts = {"family": baseline.family, "tier": baseline.tier, "source": baseline.source, "note": baseline.note.split("\n")[0]}
    if parameters:
        facts["tier"] = " or ".join(getattr(make(base, **parameters), "needs", {"M": ()}))
        facts["parameters"] = parameters_text(parameters)
    return facts


def variants(name: str, max_frames: int) -> list[str]:
    """The forms of a baseline that tuning tries under a budget, the default first, as names with parameters.

    Raises:
        ValueError: if it has no parameters that are tuned.
    """
    cls = _find(name)
    defaults = {key: parameter.default for key, parameter in _parameters(cls).items()}
    tried = list(cls.grid(max_frames)) if issubclass(cls, FillingPolicy) else []
    if not tried:
        tunable = [other for other, policy in sorted(_BASELINES.items()) if getattr(policy, "GRID", {})]
        raise ValueError(f"baseline {name} has no parameters that are tuned; these have: {', '.join(tunable)}")
    others = [parameters for parameters in tried if {**defaults, **parameters} != defaults]
    return [name, *(":".join([name, *(f"{key}={value}" for key, value in values.items())]) for values in others)]


def parse(name: str) -> tuple[str, dict[str, object]]:
    """The baseline and the parameters in a name such as ``sink_recent:n_sink=2``, each of the type of its default.

    Raises:
        ValueError: on an unknown name or parameter, a parameter that is named twice, or a text that is no such value.
    """
    base = name.partition(":")[0]
    return base, parameters_in(name, _find(base))


def parameters_in(name: str, cls: type, kind: str = "baseline") -> dict[str, object]:
    """The parameters in a name, each of the type of the class's default.

    Raises:
        ValueError: on an unknown parameter, one that is named twice, or a text that is no such value.
    """
    base, *parts = name.split(":")
    accepted, parameters = _parameters(cls), {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or key in parameters:
            raise ValueError(f"{name!r} needs each parameter once, as NAME:parameter=value:parameter=value; {part!r} is not")
        if key not in accepted:
            raise ValueError(_unknown_parameter(kind, base, key, accepted))
        parameters[key] = _value(text, accepted[key].default, f"{kind} {base}: {key}")
    return parameters


def parameters_text(parameters: Mapping[str, object]) -> str:
    """Parameters as facts and tables name them."""
    return ", ".join(f"{key}={value}" for key, value in parameters.items())


def _value(text: str, default: object, where: str) -> object:
    """A parameter's value from text. Raises ValueError unless it is of the type of the default."""
    if isinstance(default, str):
        return text
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{where} must be {wanted}, got {text!r}") from error


def info(name: str) -> BaselineInfo:
    """The description of a baseline. Raises ValueError on an unknown name."""
    cls = _find(name)
    family = getattr(cls, "family", None) or getattr(cls, "tags", {}).get(
        "retention_family", TemporalCachePlan.retention_family
    )
    tier = " or ".join(getattr(cls, "needs", {"M": ()}))
    note = description(cls).partition("\n\nSource:")[0]
    parameters = {key: parameter.default for key, parameter in _parameters(cls).items()}
    grid, equivalent_to = (dict(getattr(cls, key, {})) for key in ("GRID", "equivalent_to"))
    return BaselineInfo(name, family, cls.source, tier, note, parameters, grid, equivalent_to)


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
            raise ValueError(_unknown_parameter("baseline", name, key, accepted))
    return cls(**params)


def _find(name: str) -> type:
    if name not in _BASELINES:
        raise ValueError(unknown_name("baseline", name, names()))
    return _BASELINES[name]


def _unknown_parameter(kind: str, name: str, key: str, accepted: Collection[str]) -> str:
    takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
    return f"{kind} {name} has no parameter {key!r}; {takes}"


def description(cls: type) -> str:
    """A policy's docstring."""
    return inspect.cleandoc(cls.__doc__ or "")


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    return {} if cls.__init__ is object.__init__ else dict(inspect.signature(cls).parameters)
