"""The tables of RESULTS.md, measured again.

A file (configs/results.yaml) describes what each table compares and how its learned policies are trained. Episodes are kept in
a folder per table, so a table that was stopped is resumed; then the text between the table's two marks in RESULTS.md is
replaced.
"""

from __future__ import annotations

import re
import reprlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from far_env.agents.checkpoints import PRETRAINED, WEIGHTS_FILE
from far_env.agents.config import AgentTraining
from far_env.agents.options import ReproduceOptions
from far_env.agents.trainer import check_run_dir, train
from far_env.cli.console import keeping_episodes
from far_env.config import config_path, from_dict, load_yaml, parse, require_positive
from far_env.contract import RetentionPolicy
from far_env.errors import unknown_name
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.ranking import select_policies
from far_env.evaluation.records import RECORDS_FILE
from far_env.evaluation.table import markdown_table, source_lines
from far_env.io import make_run_dir, write_text
from far_env.policies import FULL_HISTORY, load_policy, policy_facts
from far_env.provenance import load_facts, save_facts
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import WORKLOADS, make_workload

ALL = "all"
METRICS = ("psnr", "ssim")
"""Those that every machine can compute, so that tables have the same columns everywhere."""
HEADING = """\
# Results

Measured by `far-env reproduce`, which replaces the text between a table's marks and nothing else.
"""


@dataclass(frozen=True)
class Part:
    """Policies on the same clips with the same noise, for each of the workloads and budgets."""

    workloads: tuple[str, ...]
    budgets: tuple[int, ...]
    policies: tuple[str, ...]
    clips: int = 512
    """Number of clips, from the first of the split on."""
    split: str = "test"
    """train, validation, test, or another split of the workload's clips."""
    seeds: tuple[int, ...] = (BENCHMARK_SEED,)
    """Clip i is played with the noise seeds s + i."""
    precision: str = "float32"
    host: str | None = None
    """By default the workload's."""
    feedback: str | bool | None = None
    """generated or true; by default the workload's."""

    @property
    def num_frames(self) -> int:
        """Number of frames that are generated; full history is played once, whatever the number of budgets."""
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
        """The policies of all parts, each once."""
        return list(dict.fromkeys(name for part in self.parts for name in part.policies))

    def limited(self, clips: int | None) -> Table:
        """The table with at most so many clips."""
        if clips is None:
            return self
        return replace(self, parts=tuple(replace(part, clips=min(clips, part.clips)) for part in self.parts))

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The table with policies renamed, by old name."""
        parts = [replace(part, policies=tuple(names.get(name, name) for name in part.policies)) for part in self.parts]
        return replace(self, parts=tuple(parts), reference=names.get(self.reference, self.reference))


@dataclass(frozen=True)
class ResultsFile:
    """The file of tables: tables by name, and learned policy → arguments of train_agent.py that train it."""

    tables: dict
    agents: dict = field(default_factory=dict)


def reproduce(options: ReproduceOptions) -> None:
    """Measure tables and write them into the results file; without a table, print the list of them."""
    require_positive(options, "batch_size", *(["clips"] if options.clips is not None else []))
    all_tables, agents = load_tables(config_path(options.file))
    tables = {name: table.limited(options.clips) for name, table in all_tables.items()}
    if not options.tables:
        print(listing(tables))
        return
    for name in options.tables:
        if name not in (*tables, ALL):
            raise ValueError(unknown_name("table", name, [*tables, ALL]))
    names = list(tables) if ALL in options.tables else list(dict.fromkeys(options.tables))
    path = Path(options.out)
    for name in names:
        put_section(read_results(path), name, "")
    trained = {}
    if options.from_scratch:
        learned = dict.fromkeys(policy for name in names for policy in tables[name].policies if policy in agents)
        trained = _train({name: agents[name] for name in learned}, options.device)
    trained_by = {trained.get(name, name): arguments for name, arguments in agents.items()}
    policies = _load({name: tables[name].renamed(trained) for name in names}, trained_by)
    for name in names:
        table = tables[name].renamed(trained)
        folder = make_run_dir(Path(options.episodes) / name)
        with _session(folder):
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
    content = load_yaml(ResultsFile, path)
    tables = {}
    for name, values in content.tables.items():
        where = f"{path}: {name}"
        if name == ALL or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(name)):
            raise ValueError(f"{where}: a table's name is made of lower-case letters, digits and hyphens, and not {ALL!r}")
        table = from_dict(Table, values, where)
        if not table.parts:
            raise ValueError(f"{where}: parts needs one or more")
        parts = [from_dict(Part, values, f"{where}, part {number}") for number, values in enumerate(table.parts, start=1)]
        tables[name] = table = replace(table, parts=tuple(parts))
        for number, part in enumerate(parts, start=1):
            _check(part, table.reference, f"{where}, part {number}")
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
    costs = {name: f"{sum(part.num_frames for part in table.parts):,}" for name, table in tables.items()}
    digits = max(map(len, costs.values()), default=0)
    lines = [f"{name:<{width}}  {costs[name]:>{digits}} frames  {table.caption.strip()}" for name, table in tables.items()]
    return "\n".join(lines)


def put_section(content: str, name: str, text: str) -> str:
    """The content with the text between the table's marks, which are added at the end where there are none.

    Raises:
        ValueError: if one mark is missing, a mark occurs twice, or the last comes first.
    """
    marks = [f"<!-- {word} {name} -->" for word in ("begin", "end")]
    section = f"{marks[0]}\n{text}\n{marks[1]}"
    counts = [content.count(mark) for mark in marks]
    if counts == [0, 0]:
        return f"{content.rstrip()}\n\n{section}\n"
    if counts != [1, 1] or content.index(marks[0]) > content.index(marks[1]):
        raise ValueError(
            f"the results file needs {marks[0]} once and {marks[1]} once after it; repair the marks or remove both"
        )
    before, following = content.split(marks[0])
    return before + section + following.split(marks[1])[1]


def _check(part: Part, reference: str, where: str) -> None:
    """Raise ValueError if a part cannot be evaluated."""
    for name in ("workloads", "budgets", "policies", "seeds"):
        if not getattr(part, name):
            word = "whole numbers" if name in ("budgets", "seeds") else "names"
            raise ValueError(f"{where}: {name} needs one or more {word}, got []")
    for name in part.workloads:
        if name not in WORKLOADS:
            raise ValueError(f"{where}: {unknown_name('workload', name, list(WORKLOADS))}")
    if part.clips < 1 or min(part.budgets) < 1 or min(part.seeds) < 0:
        raise ValueError(f"{where}: clips and budgets must be at least 1, seeds at least 0")
    if reference not in part.policies:
        raise ValueError(f"{where}: the reference {reference} is not among the policies, so there would be no differences")


def _train(agents: Mapping[str, str], device: str) -> dict[str, str]:
    """Learned policy → the run folder trained in its place; finished runs are not trained again.

    Raises:
        ValueError: if a run folder contains a run with other settings.
    """
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
    """All policies of the tables. Raises ValueError on one that does not exist, saying how it is trained if that is known."""
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
    """Summaries by part, workload and budget. Episodes with the same host, precision, feedback and split share a folder."""
    summaries = []
    for part in table.parts:
        for name in part.workloads:
            place = {"host": part.host, "device": options.device, "precision": part.precision}
            workload = make_workload(name, **place, feedback=part.feedback)
            dtype = str(workload.host.dtype).removeprefix("torch.")
            protocol = "_true_frames" * workload.true_feedback + f"_{part.split}" * (part.split != "test")
            results = evaluate_grid(
                [workload],
                part.budgets,
                {policy: policies[policy] for policy in part.policies},
                range(part.clips),
                seeds=part.seeds,
                split=part.split,
                metrics=METRICS,
                batch_size=options.batch_size,
                out=folder / f"{workload.host.weights_hash}_{dtype}{protocol}",
                policy_facts={policy: policy_facts(policy) for policy in part.policies},
            )
            selection = {"clip_ids": range(part.clips), "seeds": part.seeds}
            selected = select_policies(results, part.policies)
            summaries += [tabulate(selected, name, budget, **selection).summary(table.reference) for budget in part.budgets]
    return summaries


def _section(
    name: str,
    table: Table,
    summaries: Sequence[Mapping[str, object]],
    agents: Mapping[str, str],
    sessions: Sequence[Mapping[str, object]],
    command: str,
) -> str:
    """The table in Markdown, with the sources of its numbers."""
    sources = [f"- {line}." for line in source_lines(summaries)]
    for policy in table.policies:
        if policy in agents:
            facts = policy_facts(policy)
            training = f"{facts['note']} by `python train_agent.py {agents[policy]}`"
            sources.append(f"- {policy}: {training}; weights {facts['sha256'][:8]}.")
    dates = " and ".join(dict.fromkeys(session["date"] for session in sessions))
    sources.append(f"- `{command}`: {sum(session['seconds'] for session in sessions):.0f} s of evaluation, {dates}.")
    lines = [f"## {name}", table.caption.strip(), markdown_table(summaries, table.reference), "\n".join(sources)]
    return "\n\n".join(lines)


@contextmanager
def _session(folder: Path) -> Iterator[None]:
    """Record when and for how long episodes were played, also after Ctrl-C; a session that played none is not recorded."""
    before, start = _num_lines(folder), time.perf_counter()
    try:
        with keeping_episodes(folder):
            yield
    finally:
        if (episodes := _num_lines(folder) - before) > 0:
            seconds = round(time.perf_counter() - start, 1)
            save_facts(folder, {"date": time.strftime("%Y-%m-%d"), "episodes": episodes, "seconds": seconds})


def _num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*/{RECORDS_FILE}"))


def read_results(path: Path) -> str:
    """The content of the results file, or the heading of a new one. Raises ValueError if it cannot be read."""
    if not path.exists():
        return HEADING
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
