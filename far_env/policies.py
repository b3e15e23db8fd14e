"""Policies by name: hand-written ones, learned ones, those of other distributions, policy files, and tuned forms.

They are found through the entry points ``far_env.policies``, and policies over tokens, which `far_env.rollout.streaming` plays,
through ``far_env.token_policies``. An entry point is a policy class, which is called without
arguments and named by the entry point, or a collection: a module or object with

- ``names() -> list[str]``: the policies that are listed,
- ``load(name) -> RetentionPolicy``,
- ``facts(name) -> dict[str, str]``: what results record of a policy (family, tier, source, note, remark, sha256),
- optionally ``accepts(name) -> bool``: whether ``load`` also takes a name that is not listed, such as a run folder,
- optionally ``variants(name, max_frames) -> list[str]``: the names of a policy's forms that tuning tries, the default first.

A tuned form is a JSON file that far-env tune wrote: the best of these forms on validation clips, and what finding it cost.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from far_env.config import from_dict
from far_env.contract import RetentionPolicy
from far_env.errors import PolicyError
from far_env.io import read_json
from far_env.plugins import POLICIES, TOKEN_POLICIES, distribution_name, entry_points, load
from far_env.policy_process import CALL_SECONDS, IsolatedPolicy, PolicyProcess

VALIDATION_ROLLOUTS = "validation_rollouts"
"""The fact that says how many rollouts of validation clips a policy's parameters were chosen by."""
TRAINING_ROLLOUTS = "training_validation_rollouts"
"""The fact that says by how many rollouts of validation clips, of which worlds, a learned policy's weights were chosen."""
FULL_HISTORY = "full_history"
"""The reference without a budget: this name means that no policy is asked and nothing is dropped."""


def load_policy(name: str, policy_seconds: float = CALL_SECONDS) -> RetentionPolicy | None:
    """The policy of this name: of a collection or plugin, a Python file, run folder or tuned form; None for `FULL_HISTORY`.

    A file is not trusted: it runs in a separate process, see `far_env.policy_process.IsolatedPolicy`.

    Args:
        name: as listed by `policy_names`, a baseline with parameters (``sink_recent:n_sink=2``), or a path.
        policy_seconds: how long one call of a policy file may take.

    Raises:
        ValueError: if the name is none of these, or if the file, folder or plugin cannot be used.
    """
    if name == FULL_HISTORY:
        return None
    if is_policy_file(name):
        try:
            return IsolatedPolicy(PolicyProcess(Path(name), call_seconds=policy_seconds))
        except PolicyError as error:
            raise ValueError(str(error) if name in str(error) else f"the policy file {name} {error}") from error
    if is_tuned_form(name):
        return load_policy(load_tuned_form(name).policy, policy_seconds)
    return _find(name).load(name)


def policy_facts(name: str) -> dict[str, str]:
    """Facts about a policy that results record: family, tier, source and note, and the SHA-256 of its file.

    Raises:
        ValueError: as `load_policy`.
    """
    if name == FULL_HISTORY:
        return {"note": "nothing is dropped"}
    if is_policy_file(name):
        path = Path(name)
        return {"family": "file", "source": str(path.resolve()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if is_tuned_form(name):
        tuned = load_tuned_form(name)
        return {
            **policy_facts(tuned.policy),
            "label": f"{tuned.default} tuned on {tuned.workload} {tuned.budget}",
            "parameters": tuned.parameters,
            VALIDATION_ROLLOUTS: str(tuned.validation_rollouts),
            "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest(),
        }
    return _find(name).facts(name)


def policy_names(collection: str | None = None) -> list[str]:
    """The policies that are listed: of all entry points that can be imported, or of the one of this name.

    Raises:
        ValueError: if there is no such entry point, or if it cannot be imported.
    """
    if collection is not None:
        return _source(entry_points(POLICIES)[collection]).names()
    sources, _ = _sources()
    return [*(name for source in sources for name in source.names()), FULL_HISTORY]


@dataclass(frozen=True)
class TunedForm:
    """The best form of a policy on validation clips.

    Attributes:
        policy: its name.
        default: the name of the form with default parameters.
        parameters: in words.
        workload, budget, weights: for which it was found, with the hash of the host's weights.
        metric, value, default_value: the mean on the validation clips, of this form and of the default.
        clips: validation clips on which these were measured.
        seeds: noise seeds.
        num_variants: forms that were tried.
        validation_rollouts: rollouts that this took.
    """

    policy: str
    default: str
    parameters: str
    workload: str
    budget: int
    weights: str
    metric: str
    value: float
    default_value: float
    clips: int
    seeds: tuple[int, ...]
    num_variants: int
    validation_rollouts: int
    format: int = 1


def load_tuned_form(path: str) -> TunedForm:
    """Read a tuned form. Raises ValueError if the file is not one."""
    remedy = "give a file that far-env tune wrote"
    values = read_json(Path(path), remedy)
    if not isinstance(values, dict) or values.get("format") != 1 or is_tuned_form(str(values.get("policy"))):
        raise ValueError(f"{path} is no tuned form of a policy; {remedy}")
    return from_dict(TunedForm, values, f"{path}, a tuned form")


def is_tuned_form(name: str) -> bool:
    """Whether the name is the path of an existing JSON file."""
    path = Path(name)
    return path.suffix == ".json" and path.is_file()


def is_policy_file(name: str) -> bool:
    """Whether the name is the path of an existing Python file."""
    path = Path(name)
    return path.suffix == ".py" and path.is_file()


def policy_variants(name: str, max_frames: int) -> list[str]:
    """The names of a policy's forms that tuning tries under a budget, the default first.

    Raises:
        ValueError: if the policy has no such forms, or as `load_policy`.
    """
    source = None if is_policy_file(name) or is_tuned_form(name) or name == FULL_HISTORY else _find(name)
    if not hasattr(source, "variants"):
        raise ValueError(f"{name} has no parameters that are tuned; far-env baselines lists policies that have some")
    return source.variants(name, max_frames)


def load_token_policy(name: str) -> Any:
    """The policy of this name over tokens (`far_env.rollout.token_policy.TokenPolicy`); None for `FULL_HISTORY`.

    Raises:
        ValueError: if there is none, or if its parameters or the plugin cannot be used.
    """
    return None if name == FULL_HISTORY else _find_token_policy(name).load(name)


def token_policy_facts(name: str) -> dict[str, str]:
    """Facts about a policy over tokens that results record, as `policy_facts`. Raises ValueError as `load_token_policy`."""
    return {"note": "nothing is dropped"} if name == FULL_HISTORY else _find_token_policy(name).facts(name)


def token_policy_names() -> list[str]:
    """The policies over tokens that are listed."""
    sources, _ = _sources(TOKEN_POLICIES)
    return [*(name for source in sources for name in source.names()), FULL_HISTORY]


@dataclass(frozen=True)
class _PolicyClass:
    """A policy class of an entry point, as a collection of one."""

    entry: EntryPoint
    cls: type

    def names(self) -> list[str]:
        return [self.entry.name]

    def load(self, name: str) -> RetentionPolicy:
        return self.cls()

    def facts(self, name: str) -> dict[str, str]:
        version = "" if self.entry.dist is None else f" {self.entry.dist.version}"
        note = inspect.getdoc(self.cls) or ""
        return {
            "family": str(getattr(self.cls, "family", "plugin")),
            "source": f"{distribution_name(self.entry)}{version} ({self.entry.value})",
            "note": note.split("\n")[0],
        }


def _source(entry: EntryPoint) -> Any:
    """The collection of an entry point. Raises ValueError if it cannot be imported."""
    loaded = load(entry)
    return _PolicyClass(entry, loaded) if isinstance(loaded, type) else loaded


def _sources(group: str = POLICIES) -> tuple[list[Any], list[str]]:
    """The collections that can be imported, and one sentence for each that cannot."""
    sources, failures = [], []
    for entry in entry_points(group).values():
        try:
            sources.append(_source(entry))
        except ValueError as error:
            failures.append(str(error))
    return sources, failures


def _find(name: str) -> Any:
    """The collection that has the policy. Raises ValueError if none has it."""
    source, failures = _search(name, POLICIES)
    if source is None:
        known = ", ".join(policy_names())
        others = "an existing .py file or run folder, nor hub:USER/NAME"
        raise ValueError(f"no policy {name!r}: it is neither one of {known}, nor {others}{failures}")
    return source


def _find_token_policy(name: str) -> Any:
    """The collection that has the policy over tokens. Raises ValueError if none has it."""
    source, failures = _search(name, TOKEN_POLICIES)
    if source is None:
        raise ValueError(f"no token policy {name!r}; use one of {', '.join(token_policy_names())}{failures}")
    return source


def _search(name: str, group: str) -> tuple[Any, str]:
    """The collection that has the policy, or None; and what to say about collections that cannot be imported."""
    sources, failures = _sources(group)
    found = next((source for source in sources if name in source.names()), None)
    if found is None:  # only then, because a folder may have the name of a policy that is listed
        found = next((source for source in sources if hasattr(source, "accepts") and source.accepts(name)), None)
    return found, "".join(f"; {failure}" for failure in failures)
