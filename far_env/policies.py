"""Policies by name."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from far_env.contract import RetentionPolicy
from far_env.policy_file import policy_from_file

FULL_HISTORY = "full_history"


def load_policy(name: str) -> RetentionPolicy | None:
    """A policy by name: a baseline, a Python file, a run folder, pretrained/NAME, or full_history (None: nothing is dropped).

    Raises:
        ValueError: if the name is none of these, or the file or folder cannot be used.
    """
    from far_env import baselines
    from far_env.agents import checkpoints

    if name == FULL_HISTORY:
        return None
    if name in baselines.names():
        return baselines.make(name)
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        policy = policy_from_file(path)
        with contextlib.suppress(AttributeError):
            policy.name = name
        return policy
    if checkpoints.accepts(name):
        return checkpoints.load(name)
    known = ", ".join([*baselines.names(), FULL_HISTORY, *checkpoints.names()])
    raise ValueError(f"no policy {name!r}: it is neither one of {known}, nor an existing .py file or run folder")


def policy_facts(name: str) -> dict[str, str]:
    """What results record of a policy."""
    from far_env import baselines
    from far_env.agents import checkpoints

    if name == FULL_HISTORY:
        return {"note": "nothing is dropped"}
    if name in baselines.names():
        about = baselines.info(name)
        return {"family": about.family, "tier": about.tier, "source": about.source, "note": about.note.split("\n")[0]}
    path = Path(name)
    if path.is_file():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"family": "file", "source": str(path.resolve()), "sha256": sha256}
    return checkpoints.facts(name)
