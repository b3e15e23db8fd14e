"""The command ``far-env reproduce``: the tables of RESULTS.md, measured anew.

A file (configs/results.yaml) tells what each table compares and how its learned policies are trained. Episodes are kept in a
folder per table, so a table that was stopped goes on; what stands between the table's two marks in RESULTS.md is then replaced.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from far_env.cli.console import keeping_episodes as resumable
from far_env.cli.options import ALL
from far_env.config import from_dict, load_yaml, parse, require_positive
from far_env.contract import RetentionPolicy
from far_env.errors import unknown_name
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.ranking import select_policies
from far_env.evaluation.records import RECORDS_FILE
from far_env.evaluation.table import markdown_table, source_lines
from far_env.io import make_run_dir, write_text
from far_env.policies import FULL_HISTORY
from far_env.provenance import load_facts, save_facts
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import WORKLOADS, make_workload

METRICS = ("psnr", "ssim")
"""Those that every machine can compute, so that tables have the same columns everywhere."""
HEADING = """\
# Results

Measured by `far-env reproduce`, which replaces what stands between a table's marks and leaves everything else.
"""


@dataclass(frozen=True)
class ReproduceOptions:
    """Measure tables of results anew and write them into RESULTS.md; without a table, list them and what each costs."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or more, or "all"."""
    from_scratch: bool = False
    """First train the tables' learned policies, in run folders, and compare those instead of the policies that ship."""
    clips: int | None = None
    """At most so many clips, for a quick look; the table tells how many it has."""
    file: str = "configs/results.yaml"
    """Where the tables are described."""
    results: str = "RESULTS.md"
    out: str = "runs/reproduce"
    """Keeps the episodes, in a folder per table; the same command goes on where it stopped."""
    device: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class Part:
    """Policies on the same clips with the same noise, for each of the workloads and budgets."""

    workloads: tuple[str, ...]
    budgets: tuple[int, ...]
    policies: tuple[str, ...]
    clips: int = 512
    """The first so many test clips."""
    seeds: tuple[int, ...] = (BENCHMARK_SEED,)
    """Clip i is played with the noise seeds s + i."""
    precision: str = "float32"
    host: str | None = None
    """By default the workload's own."""

    @property
    def num_frames(self) -> int:
        """How many frames are generated; full history is played once, whatever the number of budgets."""
        limited = [name for name in self.policies if name != FULL_HISTORY]
        rollouts = len(self.budgets) * len(limited) + len(self.policies) - len(limited)
        predicted = sum(WORKLOADS[name].num_predict for name in self.workloads)
        return predicted * rollouts * self.clips * len(self.seeds)


@dataclass(frozen=True)
class Table:
    """One table of results."""

    caption: str
    parts: tuple[Part, ...]
    reference: str = "recent_fill"
    """The policy that the others are compared with, clip by clip."""

    @property
    def policies(self) -> list[str]:
        """All that it names, each once."""
        return list(dict.fromkeys(name for part in self.parts for name in part.policies))

    def limited(self, clips: int | None) -> Table:
        """The table with at most so many clips."""
        if clips is None:
            return self
        return replace(self, parts=tuple(replace(part, clips=min(clips, part.clips)) for part in self.parts))

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The table with other policies in the place of some."""
        own = [replace(part, policies=tuple(names.get(name, name) for name in part.policies)) for part in self.parts]
        return replace(self, parts=tuple(own), reference=names.get(self.reference, self.reference))


@dataclass(frozen=True)
class ResultsFile:
    """What the file of tables holds: tables by name, and learned policy → arguments of train_agent.py that train it."""

    tables: dict
    agents: dict = field(default_factory=dict)


def run_reproduce(args: Sequence[str]) -> None:
    """Measure the tables of RESULTS.md anew."""
    options = parse(ReproduceOptions, args, "far-env reproduce", ReproduceOptions.__doc__ or "")
    require_positive(options, "batch_size", *(["clips"] if options.clips is not None else []))
    known, agents = load_tables(options.file)
    tables = {name: table.limited(options.clips) for name, table in known.items()}
    if not options.tables:
        print(listing(tables))
        return
    for name in options.tables:
        if name not in (*tables, ALL):
            raise ValueError(unknown_name("table", name, [*tables, ALL]))
    names = list(tables) if ALL in options.tables else list(dict.fromkeys(options.tables))
    path = Path(options.results)
    for name in names:
        put_section(read_results(path), name, "")
    surrogates = {}
    if options.from_scratch:
        wanted = dict.fromkeys(policy for name in names for policy in tables[name].policies if policy in agents)
        surrogates = _train({name: agents[name] for name in wanted}, options.device)
    trained_by = {surrogates.get(name, name): arguments for name, arguments in agents.items()}
    policies = _load({name: tables[name].renamed(surrogates) for name in names}, trained_by)
    for name in names:
        table = tables[name].renamed(surrogates)
        folder = make_run_dir(Path(options.out) / name)
        with resumable(str(folder)), _session(folder):
            summaries = _measure(table, policies, folder, options)
        command = ["far-env", "reproduce", name, *(["--from-scratch"] if options.from_scratch else [])]
        command += [] if options.clips is None else ["--clips", str(options.clips)]
        text = _section(name, table, summaries, trained_by, load_facts(folder), shlex.join(command))
        write_text(path, put_section(read_results(path), name, text))
        print(f"{text}\n\nwrote {name} into {path}; its episodes are in {folder}\n")


def load_tables(path: str | Path) -> tuple[dict[str, Table], dict[str, str]]:
    """The tables by name, and learned policy → arguments of train_agent.py.

    Raises:
        ValueError: naming the place, if the file cannot be read, has unknown keys, or describes a table that cannot be made.
    """
    from far_env.agents.checkpoints import PRETRAINED

    content = load_yaml(ResultsFile, path)
    tables = {}
    for name, values in content.tables.items():
        where = f"{path}: {name}"
        if name == ALL or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(name)):
            raise ValueError(f"{where}: a table's name is made of lower-case letters, digits and hyphens, and not {ALL!r}")
        table = from_dict(Table, values, where)
        parts = [from_dict(Part, own, f"{where}, part {number}") for number, own in enumerate(table.parts, start=1)]
        tables[name] = table = replace(table, parts=tuple(parts))
        for number, part in enumerate(parts, start=1):
            _check(part, table.reference, f"{where}, part {number}")
        for policy in table.policies:
            if policy.startswith(PRETRAINED) and policy not in content.agents:
                raise ValueError(f"{where}: agents does not tell how {policy} is trained")
    for policy, arguments in content.agents.items():
        if not isinstance(arguments, str):
            raise ValueError(f"{path}: agents: {policy} needs the arguments of train_agent.py as text, got {arguments!r}")
    return tables, content.agents


def listing(tables: Mapping[str, Table]) -> str:
    """A line for each table: its name, what it costs, and what it tells."""
    width = max(map(len, tables), default=0)
    costs = {name: f"{sum(part.num_frames for part in table.parts):,}" for name, table in tables.items()}
    digits = max(map(len, costs.values()), default=0)
    lines = [f"{name:<{width}}  {costs[name]:>{digits}} frames  {table.caption.strip()}" for name, table in tables.items()]
    return "\n".join(lines)


def put_section(content: str, name: str, text: str) -> str:
    """The content with the text between the table's marks, which are added at the end where there are none.

    Raises:
        ValueError: if one mark is missing, stands twice, or the last comes first.
    """
    marks = [f"<!-- {word} {name} -->" for word in ("begin", "end")]
    section = f"{marks[0]}\n{text}\n{marks[1]}"
    counts = [content.count(mark) for mark in marks]
    if counts == [0, 0]:
        return f"{content.rstrip()}\n\n{section}\n"
    if counts != [1, 1] or content.index(marks[0]) > content.index(marks[1]):
        raise ValueError(f"the results file needs {marks[0]} once and {marks[1]} once after it; mend it or remove both")
    before, rest = content.split(marks[0])
    return before + section + rest.split(marks[1])[1]


def _check(part: Part, reference: str, where: str) -> None:
    """Raise ValueError if a part cannot be evaluated."""
    for name in ("workloads", "budgets", "policies", "seeds"):
        values, kind, word = getattr(part, name), *((int, "whole numbers") if name in ("budgets", "seeds") else (str, "names"))
        if not values or any(not isinstance(value, kind) or isinstance(value, bool) for value in values):
            raise ValueError(f"{where}: {name} needs one or more {word}, got {list(values)}")
    for name in part.workloads:
        if name not in WORKLOADS:
            raise ValueError(f"{where}: {unknown_name('workload', name, list(WORKLOADS))}")
    if part.clips < 1 or min(part.budgets) < 1 or min(part.seeds) < 0:
        raise ValueError(f"{where}: clips and budgets must be at least 1, seeds at least 0")
    if reference not in part.policies:
        raise ValueError(f"{where}: the reference {reference} is not among the policies, so there would be no differences")


def _train(agents: Mapping[str, str], device: str) -> dict[str, str]:
    """Learned policy → the run folder that was trained in its place; runs that are finished are taken as they are.

    Raises:
        ValueError: if a run folder holds a run with other settings.
    """
    from far_env.agents.checkpoints import WEIGHTS_FILE
    from far_env.agents.ppo import AgentTraining
    from far_env.agents.trainer import check_run_dir, train

    configs = {}
    for name, arguments in agents.items():
        config = parse(AgentTraining, shlex.split(arguments), "train_agent.py", f"As {name} is trained.")
        configs[name] = replace(config, resume=True, device=device)
        check_run_dir(configs[name], Path(config.run_dir))
    for name, config in configs.items():
        if not (Path(config.run_dir) / WEIGHTS_FILE).exists():
            print(f"{name}: python train_agent.py {agents[name]}")
            train(config)
    return {name: config.run_dir for name, config in configs.items()}


def _load(tables: Mapping[str, Table], agents: Mapping[str, str]) -> dict[str, RetentionPolicy | None]:
    """All policies of the tables. Raises ValueError on one that is not there, telling how it is trained where that is known."""
    from far_env.agents.checkpoints import load_policy

    policies = {}
    for name in dict.fromkeys(policy for table in tables.values() for policy in table.policies):
        try:
            policies[name] = load_policy(name)
        except ValueError as error:
            hint = f"; --from-scratch trains it with train_agent.py {agents[name]}" if name in agents else ""
            raise ValueError(f"{error}{hint}") from error
    return policies


def _measure(
    table: Table, policies: Mapping[str, RetentionPolicy | None], folder: Path, options: ReproduceOptions
) -> list[dict[str, object]]:
    """Summaries by part, workload and budget. Episodes of one host in one precision share a folder, others may not."""
    from far_env.agents.checkpoints import policy_facts

    summaries = []
    for part in table.parts:
        for name in part.workloads:
            workload = make_workload(name, host=part.host, device=options.device, precision=part.precision)
            dtype = str(workload.host.dtype).removeprefix("torch.")
            results = evaluate_grid(
                [workload],
                part.budgets,
                {own: policies[own] for own in part.policies},
                range(part.clips),
                seeds=part.seeds,
                metrics=METRICS,
                batch_size=options.batch_size,
                out=folder / f"{workload.host.weights_hash}_{dtype}",
                policy_facts={own: policy_facts(own) for own in part.policies},
            )
            asked = {"clip_ids": range(part.clips), "seeds": part.seeds}
            own = select_policies(results, part.policies)
            summaries += [tabulate(own, name, budget, **asked).summary(table.reference) for budget in part.budgets]
    return summaries


def _section(
    name: str,
    table: Table,
    summaries: Sequence[Mapping[str, object]],
    agents: Mapping[str, str],
    sessions: Sequence[Mapping[str, object]],
    command: str,
) -> str:
    """The table in Markdown, with all that its numbers depend on."""
    from far_env.agents.checkpoints import policy_facts

    sources = [f"- {line}." for line in source_lines(summaries)]
    for policy in table.policies:
        if policy in agents:
            facts = policy_facts(policy)
            trained = f"{facts['note']} by `python train_agent.py {agents[policy]}`"
            sources.append(f"- {policy}: {trained}; weights {facts['sha256'][:8]}.")
    dates = " and ".join(dict.fromkeys(session["date"] for session in sessions))
    sources.append(f"- `{command}`: {sum(session['seconds'] for session in sessions):.0f} s of evaluation, {dates}.")
    lines = [f"## {name}", table.caption.strip(), markdown_table(summaries, table.reference), "\n".join(sources)]
    return "\n\n".join(lines)


@contextmanager
def _session(folder: Path) -> Iterator[None]:
    """Note when and how long episodes were played, also where that was stopped; a session that played none is not noted."""
    before, start = _num_lines(folder), time.perf_counter()
    try:
        yield
    finally:
        if (episodes := _num_lines(folder) - before) > 0:
            seconds = round(time.perf_counter() - start, 1)
            save_facts(folder, {"date": time.strftime("%Y-%m-%d"), "episodes": episodes, "seconds": seconds})


def _num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*/{RECORDS_FILE}"))


def read_results(path: Path) -> str:
    """The results file, or how a new one begins. Raises ValueError if it cannot be read."""
    if not path.exists():
        return HEADING
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
