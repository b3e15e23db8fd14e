"""Parameters of a policy by its score on validation clips: a grid, of which the better half plays on with twice the clips."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from far_env.errors import PolicyError
from far_env.evaluation.aggregate import collect_episodes
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.records import Results, cell
from far_env.evaluation.statistics import mean_interval
from far_env.io import write_json
from far_env.metrics import LOWER_IS_BETTER
from far_env.policies import TunedForm, load_policy, policy_facts, policy_variants
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import Workload

VALIDATION = "validation"


def rungs(num_variants: int, clips: int, halvings: int) -> list[tuple[int, int]]:
    """Forms and clips of every round of successive halving (Jamieson & Talwalkar, arXiv 1502.07943), the last with all clips.

    Raises:
        ValueError: on less than one clip in the first round, or a negative number of halvings.
    """
    if halvings < 0 or clips < 2**halvings:
        raise ValueError(f"{halvings} halvings need 0 or more of them, and at least {2 ** max(0, halvings)} clips; got {clips}")
    return [
        (max(1, math.ceil(num_variants / 2**round_)), math.ceil(clips / 2 ** (halvings - round_)))
        for round_ in range(halvings + 1)
    ]


def most_rollouts(rounds: Sequence[tuple[int, int]]) -> int:
    """The rollouts that these rounds of `rungs` play at most for each noise seed: every round those of the clips that it adds.

    The default form plays in all rounds, beside the better half where it is not of it.
    """
    before, total = 0, 0
    for number, (forms, clips) in enumerate(rounds):
        total += (forms + (number > 0)) * (clips - before)
        before = clips
    return total


def clips_within(num_variants: int, rollouts: int, halvings: int, num_seeds: int = 1) -> int:
    """The most clips of the last round with which so many forms are tuned by at most so many rollouts.

    Raises:
        ValueError: if the fewest clips take more.
    """
    clips = 2**halvings
    if (fewest := num_seeds * most_rollouts(rungs(num_variants, clips, halvings))) > rollouts:
        raise ValueError(f"{num_variants} forms are tuned by {fewest} rollouts or more, got {rollouts}")
    while num_seeds * most_rollouts(rungs(num_variants, clips + 1, halvings)) <= rollouts:
        clips += 1
    return clips


def tune(
    workload: Workload,
    max_frames: int,
    name: str,
    folder: Path,
    *,
    clips: int = 32,
    seeds: Sequence[int] = (BENCHMARK_SEED,),
    metric: str = "psnr",
    halvings: int = 2,
    batch_size: int = 64,
    progress: bool = True,
) -> TunedForm:
    """Find the form of a policy with the best mean on validation clips.

    All forms play the first clips; in each further round the better half plays on with twice as many, the default form in any
    case. Of equal forms the earlier one wins, and the default is the first.

    Args:
        folder: keeps the episodes; those that it holds are not played again.
        clips: validation clips of the last round, from the first on.
        halvings: rounds after the first; 0 plays every form on all clips.

    Raises:
        ValueError: if the policy has nothing to tune, or as `evaluate_grid`.
        PolicyError: if the default form fails.
    """
    names = policy_variants(name, max_frames)
    default, ranked = names[0], list(names)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for most, num_clips in rungs(len(names), clips, halvings):
        remaining = [form for form in names if form in ranked[:most] or form == default]
        results = evaluate_grid(
            [workload],
            [max_frames],
            {form: load_policy(form) for form in remaining},
            range(num_clips),
            seeds=seeds,
            split=VALIDATION,
            metrics=[metric],
            batch_size=batch_size,
            optional=set(remaining) - {default},
            out=folder,
            policy_facts={form: policy_facts(form) for form in remaining},
            progress=progress,
        )
        means = _means(results, workload.name, max_frames, remaining, range(num_clips), seeds, metric)
        ranked = sorted(means, key=lambda form: -sign * means[form])  # stable: of equal forms the earlier one comes first
    best = ranked[0]
    return TunedForm(
        policy=best,
        default=default,
        parameters=policy_facts(best).get("parameters", "default parameters"),
        workload=workload.name,
        budget=max_frames,
        weights=workload.host.weights_hash,
        metric=metric,
        value=means[best],
        default_value=means[default],
        clips=clips,
        seeds=tuple(seeds),
        num_variants=len(names),
        validation_rollouts=len(results.records),
    )


def tune_into(folder: Path, workload: Workload, max_frames: int, name: str, **options: Any) -> tuple[TunedForm, Path]:
    """`tune`, and the file FOLDER/POLICY_WORKLOAD_BUDGET.json that holds the form; the episodes are below FOLDER/episodes."""
    stem = re.sub(r"[^\w.-]", "_", f"{name}_{workload.name}_{max_frames}")
    form = tune(workload, max_frames, name, folder / "episodes" / stem, **options)
    path = folder / f"{stem}.json"
    write_json(path, asdict(form))
    return form, path


def _means(
    results: Results,
    workload: str,
    max_frames: int,
    forms: Sequence[str],
    clip_ids: Sequence[int],
    seeds: Sequence[int],
    metric: str,
) -> dict[str, float]:
    """The mean of each form that played all clips that can be read, in the order of ``forms``.

    Raises:
        PolicyError: if none did.
    """
    readable = [clip for clip in clip_ids if (workload, clip) not in results.unreadable]
    played = {episodes.policy: episodes for episodes in collect_episodes(results, workload, readable, seeds)}
    finished = [form for form in forms if form in played and not played[form].missing]
    if not finished:
        raise PolicyError(next(iter(results.settings.failed.values()))[cell(workload, max_frames)])
    return {form: mean_interval(played[form].scores(metric)).mean for form in finished}
