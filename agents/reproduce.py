"""The tables of RESULTS.md, measured again.

A file (configs/results.yaml) describes what each table compares and how its learned policies are trained. Episodes are kept in
a folder per table, so a table that was stopped is resumed; then the text between the table's two marks in RESULTS.md is
replaced. All tables together are of one commit: the source tree has to be clean, and episodes of another commit are refused.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from far_env.agents.checkpoints import PRETRAINED, WEIGHTS_FILE, load_scorer, scorer_folder
from far_env.agents.config import AgentTraining
from far_env.agents.options import ReproduceOptions
from far_env.agents.results_tables import HALVINGS, Part, Table, listing, load_tables
from far_env.agents.trainer import check_run_dir, train
from far_env.cli.console import keeping_episodes, remark
from far_env.clips.clip import check_clip_id
from far_env.config import config_path, parse, require_positive
from far_env.contract import RetentionPolicy
from far_env.errors import ClipIdError, unknown_name
from far_env.evaluation.comparison import runs_text, tabulate, with_interventions, with_runs
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.ranking import select_policies
from far_env.evaluation.results_folder import RECORDS_FILE, SETTINGS_FILE, load
from far_env.evaluation.table import comparisons_of, family_line, markdown_table, source_lines
from far_env.evaluation.tuning import tune_into
from far_env.io import make_run_dir, write_text
from far_env.policies import load_policy, policy_facts
from far_env.provenance import load_facts, require_commit, save_facts
from far_env.workload import Workload
from far_env.workloads import make_workload

METRICS = ("psnr", "ssim")
"""Those that every machine can compute, so that tables have the same columns everywhere."""
HEADING = """\
# Results

Measured by `far-env reproduce`, which replaces the text between a table's marks and nothing else.
"""


def reproduce(options: ReproduceOptions) -> None:
    """Measure tables and write them into the results file; without a table, print the list of them."""
    require_positive(options, "batch_size", *(["clips"] if options.clips is not None else []))
    all_tables, agents = load_tables(config_path(options.file))
    tables = {name: table.limited(options.clips) for name, table in all_tables.items()}
    if options.all and options.tables:
        raise ValueError(f"--all measures every table; give either --all or names, not also {', '.join(options.tables)}")
    if not options.tables and not options.all:
        print(listing(tables))
        return
    for name in options.tables:
        if name not in tables:
            raise ValueError(f"{unknown_name('table', name, list(tables))}; --all measures all of them")
    names = list(tables) if options.all else list(dict.fromkeys(options.tables))
    path = Path(options.out)
    for name in names:
        put_section(read_results(path), name, "")
    if options.all:
        _check_commit(names, Path(options.episodes))
    _check_workloads({name: tables[name] for name in names}, options.device)
    learned = dict.fromkeys(policy for name in names for policy in tables[name].policies if policy in agents)
    wanted = {name: agents[name] for name in learned if options.from_scratch or not name.startswith(PRETRAINED)}
    trained = _train(wanted, options.device)
    trained_by = {trained.get(name, name): arguments for name, arguments in agents.items()}
    policies = _load({name: tables[name].renamed(trained) for name in names})
    for name in names:
        table = tables[name].renamed(trained)
        folder = make_run_dir(Path(options.episodes) / name)
        with _timed(folder):
            summaries = _measure(table, policies, folder, options)
        if options.all:  # the tree may have been changed meanwhile
            _check_commit([name], Path(options.episodes))
        command = ["far-env", "reproduce", "--all" if options.all else name]
        command += ["--from-scratch"] * options.from_scratch
        command += [] if options.clips is None else ["--clips", str(options.clips)]
        text = _section(name, table, summaries, trained_by, load_facts(folder), shlex.join(command))
        write_text(path, put_section(read_results(path), name, text))
        print(f"{text}\n\nwrote {name} into {path}; its episodes are in {folder}\n")
    others = [name for name in re.findall(r"<!-- begin (\S+) -->", read_results(path)) if name not in names]
    if options.all and others:
        remark(f"{path} also has sections that are not of these tables and stay as they were: {', '.join(others)}")


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


def _train(agents: Mapping[str, str], device: str) -> dict[str, str]:
    """Learned policy → the run folder trained in its place; finished runs are not trained again.

    Raises:
        ValueError: if a run folder contains a run with other settings, or a policy that is not shipped is none.
    """
    configs = {}
    for name, arguments in agents.items():
        config = parse(AgentTraining, shlex.split(arguments), "train_agent.py", f"As {name} is trained.")
        configs[name] = replace(config, resume=True, device=device)
        if not name.startswith(PRETRAINED) and config.run_dir != name:
            raise ValueError(
                f"agents: {name} is trained into {config.run_dir}; a policy that is not shipped has its folder's name"
            )
        check_run_dir(configs[name], Path(config.run_dir))
    for name, config in configs.items():
        if not (Path(config.run_dir) / WEIGHTS_FILE).exists():
            print(f"{name}: python train_agent.py {agents[name]}")
            train(config)
    return {name: config.run_dir for name, config in configs.items()}


def _load(tables: Mapping[str, Table]) -> dict[str, RetentionPolicy | None]:
    """All policies of the tables. Raises ValueError on one that does not exist."""
    return {name: load_policy(name) for name in dict.fromkeys(policy for table in tables.values() for policy in table.policies)}


def _check_commit(names: Sequence[str], episodes: Path) -> None:
    """Raise ValueError unless the source tree is clean, and all episodes of the tables are of its commit."""
    commit = require_commit()
    for name in names:
        for path in sorted((episodes / name).rglob(RECORDS_FILE)):
            if not (path.parent / SETTINGS_FILE).exists():  # killed before the first episode
                continue
            for record in load(path.parent).records:
                if (other := record.facts.get("commit", "unknown")) != commit:
                    raise ValueError(
                        f"{path.parent} holds episodes of commit {other}, and this is commit {commit}, so the tables would be "
                        f"mixed; give another folder (--episodes), delete {episodes / name}, or go back to that commit"
                    )


def _check_workloads(tables: Mapping[str, Table], device: str) -> None:
    """Raise ValueError, before anything is played, if a workload or a clip of the tables is not there."""
    for name, table in tables.items():
        for part in table.parts:
            for workload in part.workloads:
                try:
                    check_clip_id(_workload(workload, part, device).clips, part.split, part.clip_ids[-1])
                except (ClipIdError, ValueError) as error:
                    raise ValueError(f"the table {name} cannot be measured: {error}") from error


def _workload(name: str, part: Part, device: str) -> Workload:
    return make_workload(name, host=part.host, device=device, precision=part.precision, feedback=part.feedback)


def _measure(
    table: Table, policies: Mapping[str, RetentionPolicy | None], folder: Path, options: ReproduceOptions
) -> list[dict[str, object]]:
    """Summaries by part, workload and budget. Episodes with the same host, precision, feedback, split, … share a folder."""
    summaries = []
    for part in table.parts:
        for name in part.workloads:
            workload = _workload(name, part, options.device)
            dtype = workload.host.precision
            protocol = [dtype, *["true_frames"] * workload.true_feedback, *[part.split] * (part.split != "test")]
            place = folder / "_".join([workload.host.weights_hash, *protocol])
            # A tuned form is played under the budget for which it was tuned.
            for budgets in [(budget,) for budget in part.budgets] if part.tune else [part.budgets]:
                played = {policy: policies[policy] for policy in table.policies_of(part)}
                for rule in part.tune:
                    path = _tuned(rule, workload, budgets[0], part, place.with_name(f"{place.name}_tuned"), options)
                    played[path] = load_policy(path)
                measured = _measure_part(table, part, workload, budgets, played, place, options.batch_size)
                if part.disturbed is not None:
                    few = _measure_part(table, part.disturbed, workload, budgets, played, place, options.batch_size)
                    measured = list(map(with_interventions, measured, few))
                summaries += measured
    return summaries


def _measure_part(
    table: Table,
    part: Part,
    workload: Workload,
    budgets: Sequence[int],
    played: Mapping[str, RetentionPolicy | None],
    place: Path,
    batch_size: int,
) -> list[dict[str, object]]:
    """The summaries of one workload by budget; without interventions where these are played on fewer clips."""
    interventions = part.interventions if part.disturbed is None else ()
    results = evaluate_grid(
        [workload],
        budgets,
        played,
        part.clip_ids,
        seeds=part.seeds,
        split=part.split,
        metrics=METRICS,
        interventions=interventions,
        batch_size=batch_size,
        out=place.with_name("_".join([place.name, *interventions])),
        policy_facts={policy: policy_facts(policy) for policy in played},
    )
    selected = select_policies(results, list(played))
    rows = {row: members for row, members in table.runs.items() if row in part.policies}
    tables = [tabulate(selected, workload.name, budget, clip_ids=part.clip_ids, seeds=part.seeds) for budget in budgets]
    return [with_runs(measured, rows).summary(table.reference) for measured in tables]


def _tuned(rule: str, workload: Workload, budget: int, part: Part, folder: Path, options: ReproduceOptions) -> str:
    """The file of a rule's tuned form, which is searched on validation clips as far as that has not been done."""
    search = {
        "clips": part.tune_clips(rule, budget),
        "seeds": part.seeds,
        "halvings": HALVINGS,
        "batch_size": options.batch_size,
    }
    return str(tune_into(folder, workload, budget, rule, **search)[1])


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
    sources += [f"- {row}: {runs_text(members)}." for row, members in table.runs.items()]
    for policy in table.policies:
        if policy in agents:
            facts = policy_facts(policy)
            commit = load_scorer(scorer_folder(policy))[1].get("commit", "unknown")
            training = f"{facts['note']} by `python train_agent.py {agents[policy]}` at commit {commit}"
            sources.append(f"- {policy}: {training}; weights {facts['sha256'][:8]}.")
    dates = " and ".join(dict.fromkeys(session["date"] for session in sessions))
    sources.append(f"- `{command}`: {sum(session['seconds'] for session in sessions):.0f} s of evaluation, {dates}.")
    rows = markdown_table(summaries, table.reference, robust=table.robust, tiers=table.tiers)
    family = family_line(comparisons_of(summaries, table.reference), table.reference)
    lines = [f"## {name}", table.caption.strip(), rows, f"{family}.", "\n".join(sources)]
    return "\n\n".join(lines)


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
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
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob(RECORDS_FILE))


def read_results(path: Path) -> str:
    """The content of the results file, or the heading of a new one. Raises ValueError if it cannot be read."""
    if not path.exists():
        return HEADING
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
