"""``far-env leaderboard``: policies on a fixed suite, an entry of each as a JSON file, checked by replay and ranked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from far_env.cli.console import keeping_episodes, remark
from far_env.cli.options import check_policy_seconds
from far_env.config import parse
from far_env.io import write_text
from far_env.policies import load_policy, policy_facts

if TYPE_CHECKING:
    from far_env.evaluation.leaderboard_entry import Suite

FOLDER = "leaderboard"


@dataclass(frozen=True)
class LeaderboardOptions:
    """Rank the entries that ship with far-env and those of a folder, on the terminal or as an HTML page."""

    action: tyro.conf.Positional[Literal["show", "add", "check"]]
    """show ranks entries. add and check have options of their own: far-env leaderboard add --help."""
    folder: str = FOLDER
    """Folder of entries, which are ranked among those that ship; of equal names its own counts."""
    html: str | None = None
    """Write the ranking to this file, as one page that needs no network."""


@dataclass(frozen=True)
class AddOptions:
    """Play policies on the suite, about two minutes each on a laptop, and write an entry of each.

    Stopped, the same command continues. The policies are ranked among the other entries.
    """

    policies: tyro.conf.Positional[tuple[str, ...]]
    """As far-env evaluate takes them: .py files, run folders, pretrained/NAME, hub:USER/NAME, baselines, full_history."""
    name: str | None = None
    """Name of the entry, for a single policy; by default the last part of the policy's name or path."""
    author: str | None = None
    """Who made the policy."""
    link: str | None = None
    """Where the policy or its description is: an https address."""
    folder: str = FOLDER
    """Folder of entries, to which NAME.json is written."""
    replace: bool = False
    """Replace an entry of this name."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    batch_size: int = 64
    """Rollouts that are played together."""
    policy_seconds: float = 10.0
    """How long one call of a policy file may take; such files run in separate processes."""


@dataclass(frozen=True)
class CheckOptions:
    """Check entries: the file against the schema and the suite, and its scores by playing its decisions again.

    The policy is not needed. The exit status is 1 if a score differs, 2 if a file is not an entry of the suite.
    """

    entries: tyro.conf.Positional[tuple[str, ...]]
    """Files."""
    clips: int = 4
    """Clips of each workload that are played again, drawn at random."""
    all: bool = False
    """Play all clips again."""
    seed: int = 0
    """Seed of the draw."""
    tolerance: float = 1e-2
    """Largest difference of a metric that counts as equal, in dB for PSNR; other processors change the last digits."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def leaderboard(args: Sequence[str]) -> int | None:
    """Rank policies on a fixed suite: add an entry, check entries by replay, show the ranking."""
    actions = {"add": add, "check": check}
    if args[:1] and args[0] in actions:
        return actions[args[0]](args[1:])
    options = parse(LeaderboardOptions, args, "far-env leaderboard", LeaderboardOptions.__doc__ or "")
    from far_env.evaluation.leaderboard_entry import load_suite

    folder = Path(options.folder)
    if not folder.is_dir():
        remark(f"there is no folder {folder}; these are the entries that ship")
    _show(load_suite(), folder, options.html)
    return None


def add(args: Sequence[str]) -> None:
    """Play policies on the suite and write an entry of each."""
    options = parse(AddOptions, args, "far-env leaderboard add", AddOptions.__doc__ or "")
    from far_env.evaluation.leaderboard import entry_name, new_entry, play_suite
    from far_env.evaluation.leaderboard_entry import check_name, load_suite, save_entry

    if not options.policies:
        raise ValueError("leaderboard add needs a policy: a .py file, a run folder, or a name that far-env evaluate takes")
    if options.name is not None and len(options.policies) > 1:
        raise ValueError(f"--name is for a single policy, got {len(options.policies)}")
    check_policy_seconds(options.policy_seconds)
    if options.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {options.batch_size}")
    suite, folder = load_suite(), Path(options.folder)
    names = {policy: options.name or entry_name(policy) for policy in options.policies}
    for name in names.values():
        check_name(name)
    paths = {policy: folder / f"{name}.json" for policy, name in names.items()}
    for policy, path in paths.items():
        if path.exists() and not options.replace:
            raise ValueError(f"{path} exists; add --replace to replace it, or choose another --name for {policy}")
        if list(paths.values()).count(path) > 1:
            raise ValueError(f"several policies would be written to {path}; add them one by one, with --name")
    loaded = {policy: (load_policy(policy, options.policy_seconds), policy_facts(policy)) for policy in paths}
    for policy_name, (policy, facts) in loaded.items():
        path = paths[policy_name]
        entry = new_entry(suite, path.stem, policy_name, policy, facts, options.author or "", options.link or "")
        made_with = json.dumps([policy_name, facts, suite.version], sort_keys=True)
        workspace = folder / f".{path.stem}-{hashlib.sha256(made_with.encode()).hexdigest()[:8]}.part"
        with keeping_episodes(workspace):
            entry = play_suite(suite, entry, policy, workspace, options.device, options.batch_size)
        save_entry(entry, path)
        print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)", flush=True)
    _show(suite, folder, None)


def check(args: Sequence[str]) -> int:
    """Check entries by playing their decisions again, without the policies."""
    options = parse(CheckOptions, args, "far-env leaderboard check", CheckOptions.__doc__ or "")
    from far_env.evaluation.leaderboard import replayed
    from far_env.evaluation.leaderboard_entry import load_entry, load_suite

    if not options.entries:
        raise ValueError("leaderboard check needs the file of an entry")
    if options.clips < 1 or not options.tolerance >= 0:
        raise ValueError(f"clips must be at least 1 and tolerance not negative, got {options.clips} and {options.tolerance}")
    suite, status = load_suite(), 0
    for path in map(Path, options.entries):
        try:
            entry = load_entry(path, suite)
        except ValueError as error:
            print(error)
            status = 2
            continue
        sample = None if options.all else options.clips
        findings = replayed(entry, suite, sample, options.seed, options.device, options.tolerance)
        wrong = [finding for finding in findings if finding.difference is not None]
        for finding in wrong:
            print(f"{path}: {finding.record.workload}, clip {finding.record.clip}: {finding.difference}")
        total = len(suite.cells) * suite.clips
        print(f"{path}: {len(findings) - len(wrong)} of {len(findings)} episodes played again match (it has {total})")
        status = status or int(bool(wrong))
    return status


def _show(suite: Suite, folder: Path, html: str | None) -> None:
    from far_env.evaluation.leaderboard_entry import load_entries
    from far_env.evaluation.leaderboard_ranking import ranking, ranking_page, ranking_text

    standings = ranking(load_entries(folder, suite), suite)
    if not standings:
        raise ValueError(f"there is no entry in {folder}; far-env leaderboard add makes one")
    print(ranking_text(standings, suite))
    if html is not None:
        write_text(Path(html), ranking_page(standings, suite))
        print(f"\nwrote {html}")
