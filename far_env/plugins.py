"""Entry points: what installed distributions, far-env among them, add to far-env.

A distribution adds policies, policies over tokens, hosts, workloads or commands by declaring entry points in its metadata, for
example in its pyproject.toml:

    [project.entry-points."far_env.policies"]
    keep_every_second = "my_package.policies:KeepEverySecond"

Names are read from the metadata; a plugin is imported when it is used.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from far_env.errors import first_line

POLICIES = "far_env.policies"
TOKEN_POLICIES = "far_env.token_policies"
HOSTS = "far_env.hosts"
WORKLOADS = "far_env.workloads"
COMMANDS = "far_env.commands"
DISTRIBUTION = "far-env"


def entry_points(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, those of far-env first.

    A name that several distributions declare belongs to far-env, otherwise to the first distribution in alphabetical order.

    Raises:
        ValueError: if the installed metadata of far-env declare nothing for this group.
    """
    entries: dict[str, EntryPoint] = {}
    for entry in sorted(_all_entry_points().select(group=group), key=_order):
        entries.setdefault(entry.name, entry)
    if not any(distribution_name(entry) == DISTRIBUTION for entry in entries.values()):
        raise ValueError(
            f"the installed metadata of far-env declare no {group}: the package is not installed in this environment, or was "
            "installed before its entry points changed; run pip install again (pip install -e . for a checkout)"
        )
    return entries


def load(entry: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        ValueError: if that fails, naming the distribution and the error.
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the plugin {entry.name!r} of the distribution {distribution_name(entry)} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def distribution_name(entry: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return "unknown" if entry.dist is None else entry.dist.name


@cache
def _all_entry_points() -> importlib.metadata.EntryPoints:
    # Every call reads the metadata of all installed distributions.
    return importlib.metadata.entry_points()


def _order(entry: EntryPoint) -> tuple[bool, str]:
    """far-env first, keeping the order of its declarations, then the other distributions by name."""
    name = distribution_name(entry)
    return name != DISTRIBUTION, name
