"""The regret of policies against searches of several widths that use the true frames of the clip, and the searches' cost.

The best rollout that any of the searches found for a clip is a lower bound of what is possible; a policy's regret is that PSNR
minus the policy's, clip by clip.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from far_env.agents.options import RegretOptions
from far_env.agents.oracle import search
from far_env.agents.reproduce import put_section, read_results
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.statistics import mean_interval
from far_env.evaluation.table import interval_text, source_lines
from far_env.io import write_text
from far_env.policies import load_policy
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.text import markdown_lines
from far_env.workload import Workload
from far_env.workloads import make_workload


@dataclass(frozen=True)
class Bound:
    """The result of a search.

    Attributes:
        psnr: float64 (clips,), of the best rollouts, dB.
        cost: frames generated per frame of a rollout.
        seconds: per clip.
    """

    psnr: np.ndarray
    cost: float
    seconds: float


def measure_regret(options: RegretOptions) -> None:
    """Search, evaluate, print the table and write it into the results file."""
    workload = make_workload(
        options.workload,
        host=options.host,
        device=options.device,
        precision=options.precision,
        feedback=options.feedback,
    )
    name = f"regret-{options.workload}-{options.budget}" + "-true-frames" * workload.true_feedback
    path = Path(options.out)
    put_section(read_results(path), name, "")
    policies = {policy: load_policy(policy) for policy in options.policies}
    bounds = {label: bound(workload, options, *widths) for label, widths in options.widths().items()}
    result = evaluate(workload, options.budget, policies, range(options.clips), metrics=("psnr",))
    table = regret_table(bounds, {policy: scores["psnr"][:, 0] for policy, scores in result.scores.items()})
    (source,) = source_lines([result.summary()])
    text = f"## {name}\n\n{table}\n\n- {source}."
    write_text(path, put_section(read_results(path), name, text))
    print(f"{text}\n\nwrote {name} into {path}")


def bound(workload: Workload, options: RegretOptions, width: int, branches: int) -> Bound:
    """Search all clips."""
    start, rollouts = time.perf_counter(), []
    for first in range(0, options.clips, options.batch_size):
        ids = range(first, min(first + options.batch_size, options.clips))
        clips = [workload.clips.clip("test", i) for i in ids]
        seeds = [BENCHMARK_SEED + i for i in ids]
        rollouts += search(workload, clips, seeds, options.budget, width=width, branches=branches)
    cost = sum(rollout.frames_generated for rollout in rollouts) / (len(rollouts) * workload.num_predict)
    seconds = (time.perf_counter() - start) / len(rollouts)
    return Bound(np.array([rollout.psnr for rollout in rollouts]), cost, seconds)


def regret_table(bounds: Mapping[str, Bound], scores: Mapping[str, np.ndarray]) -> str:
    """Markdown: bounds, then policies, each best first.

    Args:
        bounds: by search.
        scores: policy → PSNR per clip, the same clips.
    """
    best = np.max([search_result.psnr for search_result in bounds.values()], axis=0)
    lines = [["policy", "PSNR dB [95 %]", "regret dB [95 %]", "frames generated", "s per clip"]]
    lines.append(["best found", _interval(best), "", "", ""])
    for name, search_result in sorted(bounds.items(), key=lambda item: -item[1].psnr.mean()):
        cost = [f"{search_result.cost:.1f}×", f"{search_result.seconds:.2f}"]
        lines.append([f"search {name}", _interval(search_result.psnr), _interval(best - search_result.psnr), *cost])
    for name, psnr in sorted(scores.items(), key=lambda item: -item[1].mean()):
        lines.append([name, _interval(psnr), _interval(best - psnr), "1×", ""])
    return markdown_lines(lines)


def _interval(values: np.ndarray) -> str:
    return interval_text(mean_interval(values), 2)
