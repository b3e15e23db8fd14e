"""The description of the tables of RESULTS.md: what each compares, and what measuring it costs (configs/results.yaml)."""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from far_env.agents.checkpoints import PRETRAINED
from far_env.config import from_dict, load_yaml
from far_env.errors import unknown_name
from far_env.evaluation.comparison import check_runs
from far_env.evaluation.tuning import clips_within, most_rollouts, rungs
from far_env.policies import FULL_HISTORY, policy_variants
from far_env.rollout.intervention import check_interventions
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import WORKLOADS

HALVINGS = 2
"""Rounds of tuning before the last, see `far_env.evaluation.tuning.tune`."""


@dataclass(frozen=True)
class Part:
    """Policies on the same clips with the same noise, for each of the workloads and budgets."""

    workloads: tuple[str, ...]
    budgets: tuple[int, ...]
    policies: tuple[str, ...]
    """Policies, and rows of the table's ``runs``."""
    clips: int = 512
    """Number of clips."""
    first_clip: int | None = None
    """The first of them; by default that of the file."""
    split: str = "test"
    """train, validation, test, or another split of the workload's clips."""
    seeds: tuple[int, ...] = (BENCHMARK_SEED,)
    """Clip i is played with the noise seeds s + i."""
    precision: str = "float32"
    host: str | None = None
    """By default the workload's."""
    feedback: str | bool | None = None
    """generated or true; by default the workload's."""
    interventions: tuple[str, ...] = ()
    """PSNR is also measured under each of these, see `far_env.rollout.intervention`."""
    intervention_clips: int | None = None
    """On how many of the clips, from the first on; by default on all."""
    tune: tuple[str, ...] = ()
    """Rules that have a second row each, of the form that is tuned for the workload and the budget on validation clips."""
    tune_rollouts: int = 512
    """Validation rollouts that tuning one of them takes at most."""

    @property
    def clip_ids(self) -> range:
        """The clips that are played."""
        first = self.first_clip or 0
        return range(first, first + self.clips)

    @property
    def disturbed(self) -> Part | None:
        """The part of the clips that interventions are played on, where these are not all."""
        if not self.interventions or self.intervention_clips is None or self.intervention_clips >= self.clips:
            return None
        return replace(self, clips=self.intervention_clips, intervention_clips=None, tune=())

    def tune_clips(self, rule: str, budget: int) -> int:
        """Validation clips of the last round of a rule's tuning, as many as `tune_rollouts` allow."""
        return clips_within(len(policy_variants(rule, budget)), self.tune_rollouts, HALVINGS, len(self.seeds))


@dataclass(frozen=True)
class Table:
    """One table of results."""

    caption: str
    parts: tuple[Part, ...]
    reference: str = "recent_fill"
    """The policy that the others are compared with, clip by clip."""
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows that are the mean over several training runs: name → its policies."""
    robust: bool = True
    """Whether the table has columns of the interquartile mean and the probability of improvement."""
    tiers: bool = False
    """Whether it has a column of what the policies read, see `far_env.contract.tier`."""

    def policies_of(self, part: Part) -> list[str]:
        """The policies that a part plays, in place of its rows of several runs their policies; without tuned forms."""
        return list(dict.fromkeys(policy for name in part.policies for policy in self.runs.get(name, (name,))))

    @property
    def policies(self) -> list[str]:
        """The policies that all parts play, each once."""
        return list(dict.fromkeys(name for part in self.parts for name in self.policies_of(part)))

    @property
    def num_frames(self) -> int:
        """Number of frames that are generated; full history is played once, whatever the number of budgets."""
        return sum(self._num_frames(part) for part in self.parts)

    def _num_frames(self, part: Part) -> int:
        policies = self.policies_of(part)
        limited = [name for name in policies if name != FULL_HISTORY]
        rollouts = len(part.budgets) * (len(limited) + len(part.tune)) + len(policies) - len(limited)
        played_clips = part.clips * (1 + len(part.interventions))
        if part.disturbed is not None:
            played_clips = part.clips + part.disturbed.clips * (1 + len(part.interventions))
        rollouts *= played_clips * len(part.seeds)
        for rule, budget in itertools.product(part.tune, part.budgets):
            rounds = rungs(len(policy_variants(rule, budget)), part.tune_clips(rule, budget), HALVINGS)
            rollouts += len(part.seeds) * most_rollouts(rounds)
        return rollouts * sum(WORKLOADS[name].num_predict for name in part.workloads)

    def limited(self, clips: int | None) -> Table:
        """The table with at most so many clips."""
        if clips is None:
            return self
        return replace(self, parts=tuple(replace(part, clips=min(clips, part.clips)) for part in self.parts))

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The table with policies renamed, by old name."""

        def new(policies: Sequence[str]) -> tuple[str, ...]:
            return tuple(names.get(name, name) for name in policies)

        parts = [replace(part, policies=new(part.policies)) for part in self.parts]
        runs = {row: new(members) for row, members in self.runs.items()}
        return replace(self, parts=tuple(parts), runs=runs, reference=names.get(self.reference, self.reference))


@dataclass(frozen=True)
class ResultsFile:
    """The file of tables: tables by name, and learned policy → arguments of train_agent.py that train it."""

    tables: dict
    agents: dict = field(default_factory=dict)
    first_clip: int = 0
    """The first clip of all parts that do not say otherwise."""


def load_tables(path: str | Path) -> tuple[dict[str, Table], dict[str, str]]:
    """The tables by name, and learned policy → arguments of train_agent.py.

    Raises:
        ValueError: naming the place, if the file cannot be read, has unknown keys, or describes a table that cannot be made.
    """
    content = load_yaml(ResultsFile, path)
    tables = {}
    for name, values in content.tables.items():
        where = f"{path}: {name}"
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(name)):
            raise ValueError(f"{where}: a table's name is made of lower-case letters, digits and hyphens")
        table = from_dict(Table, values, where)
        if not table.parts:
            raise ValueError(f"{where}: parts needs one or more")
        parts = [from_dict(Part, values, f"{where}, part {number}") for number, values in enumerate(table.parts, start=1)]
        parts = [replace(part, first_clip=content.first_clip) if part.first_clip is None else part for part in parts]
        tables[name] = table = replace(table, parts=tuple(parts), runs=check_runs(table.runs, f"{where}: runs"))
        for number, part in enumerate(parts, start=1):
            _check(part, table, f"{where}, part {number}")
        for policy in table.policies:
            if policy.startswith(PRETRAINED) and policy not in content.agents:
                raise ValueError(f"{where}: agents does not say how {policy} is trained")
    for policy, arguments in content.agents.items():
        if not isinstance(arguments, str):
            raise ValueError(
                f"{path}: agents: {policy} needs the arguments of train_agent.py as text, got {reprlib.repr(arguments)}"
            )
    return tables, content.agents


def listing(tables: Mapping[str, Table]) -> str:
    """A line for each table: its name, the frames that it generates, and its caption."""
    width = max(map(len, tables), default=0)
    costs = {name: f"{table.num_frames:,}" for name, table in tables.items()}
    digits = max(map(len, costs.values()), default=0)
    lines = [f"{name:<{width}}  {costs[name]:>{digits}} frames  {table.caption.strip()}" for name, table in tables.items()]
    return "\n".join(lines)


def _check(part: Part, table: Table, where: str) -> None:
    """Raise ValueError if a part cannot be evaluated."""
    for name in ("workloads", "budgets", "policies", "seeds"):
        if not getattr(part, name):
            word = "whole numbers" if name in ("budgets", "seeds") else "names"
            raise ValueError(f"{where}: {name} needs one or more {word}, got []")
    for name in part.workloads:
        if name not in WORKLOADS:
            raise ValueError(f"{where}: {unknown_name('workload', name, list(WORKLOADS))}")
    if part.intervention_clips is not None and part.intervention_clips < 1:
        raise ValueError(f"{where}: intervention_clips must be at least 1, got {part.intervention_clips}")
    if part.clips < 1 or min(part.budgets) < 1 or min(part.seeds) < 0 or part.first_clip < 0:
        raise ValueError(f"{where}: clips and budgets must be at least 1, seeds and first_clip at least 0")
    if table.reference in table.runs:
        raise ValueError(f"{where}: the reference {table.reference} is a row of several runs; choose a single policy")
    if table.reference not in part.policies:
        raise ValueError(
            f"{where}: the reference {table.reference} is not among the policies, so there would be no differences"
        )
    try:
        check_interventions(part.interventions)
        for rule in part.tune:
            for budget in part.budgets:
                part.tune_clips(rule, budget)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
