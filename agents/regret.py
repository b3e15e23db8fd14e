"""What policies lose against upper bounds: searches that know what the clip will show, of several widths, and their cost.

    python -m far_env.agents.regret --workload pan --budget 4 --policies uniform pretrained/pan-tight

The best rollout that any of the searches found for a clip bounds from below what was possible; a policy's regret is that PSNR
minus its own, clip by clip. The table is printed and written into RESULTS.md.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from far_env.agents.checkpoints import load_policy
from far_env.agents.oracle import search
from far_env.agents.reproduce import put_section, read_results

from far_env.cli import run_guarded
from far_env.config import parse, require_positive
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.statistics import mean_interval
from far_env.evaluation.table import interval_text, source_lines
from far_env.io import write_text
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.text import markdown_lines
from far_env.workloads import Workload, make_workload


@dataclass(frozen=True)
class Options:
    """Measure what policies lose against searches that know the clip."""

    workload: str = "pan"
    budget: int = 4
    clips: int = 64
    """Of the test split."""
    searches: tuple[str, ...] = ("1x1", "3x3")
    """Width × branches of each search, see `far_env.agents.oracle.search`; 1x1 is the hindsight expert alone."""
    policies: tuple[str, ...] = ("recent_fill", "uniform", "nearest_neighbour", "pretrained/pan-tight", "full_history")
    results: str = "RESULTS.md"
    host: str | None = None
    device: str = "auto"
    precision: str = "float32"
    batch_size: int = 16
    """Clips searched together."""

    def __post_init__(self) -> None:
        require_positive(self, "clips", "batch_size")
        self.widths()

    def widths(self) -> dict[str, tuple[int, int]]:
        """Search → width and branches. Raises ValueError on one that is not WIDTHxBRANCHES."""
        found = {}
        for name in self.searches:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
                raise ValueError(f"a search is WIDTHxBRANCHES, such as 3x3, got {name!r}")
            width, branches = map(int, name.split("x"))
            found[name] = (width, branches)
        return found


@dataclass(frozen=True)
class Bound:
    """What a search found: PSNR per clip in dB, frames generated per frame of a rollout, and seconds per clip."""

    psnr: np.ndarray
    cost: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("far_env.agents.regret", lambda: run(parse(Options, args, "far_env.agents.regret", __doc__ or "")))


def run(options: Options) -> None:
    """Search, evaluate, print and write the table."""
    name = f"regret-{options.workload}-{options.budget}"
    path = Path(options.results)
    put_section(read_results(path), name, "")
    policies = {own: load_policy(own) for own in options.policies}
    workload = make_workload(options.workload, host=options.host, device=options.device, precision=options.precision)
    bounds = {own: bound(workload, options, *widths) for own, widths in options.widths().items()}
    result = evaluate(workload, options.budget, policies, range(options.clips), metrics=("psnr",))
    table = regret_table(bounds, {own: values["psnr"][:, 0] for own, values in result.scores.items()})
    (source,) = source_lines([result.summary()])
    text = f"## {name}\n\n{table}\n\n- {source}."
    write_text(path, put_section(read_results(path), name, text))
    print(f"{text}\n\nwrote {name} into {path}")


def bound(workload: Workload, options: Options, width: int, branches: int) -> Bound:
    """Search all clips."""
    start, found = time.perf_counter(), []
    for first in range(0, options.clips, options.batch_size):
        ids = range(first, min(first + options.batch_size, options.clips))
        clips = [workload.clips.clip("test", i) for i in ids]
        seeds = [BENCHMARK_SEED + i for i in ids]
        found += search(workload, clips, seeds, options.budget, width=width, branches=branches)
    frames = sum(own.frames_generated for own in found) / (len(found) * workload.num_predict)
    seconds = (time.perf_counter() - start) / len(found)
    return Bound(np.array([own.psnr for own in found]), frames, seconds)


def regret_table(bounds: Mapping[str, Bound], scores: Mapping[str, np.ndarray]) -> str:
    """Markdown: bounds, then policies, each best first.

    Args:
        bounds: by search.
        scores: policy → PSNR per clip, the same clips.
    """
    best = np.max([own.psnr for own in bounds.values()], axis=0)
    lines = [["policy", "PSNR dB [95 %]", "regret dB [95 %]", "frames generated", "s per clip"], ["---"] * 5]
    lines.append(["best found", _told(best), "", "", ""])
    for name, own in sorted(bounds.items(), key=lambda item: -item[1].psnr.mean()):
        lines.append([f"search {name}", _told(own.psnr), _told(best - own.psnr), f"{own.cost:.1f}×", f"{own.seconds:.2f}"])
    for name, psnr in sorted(scores.items(), key=lambda item: -item[1].mean()):
        lines.append([name, _told(psnr), _told(best - psnr), "1×", ""])
    return markdown_lines(lines)


def _told(values: np.ndarray) -> str:
    return interval_text(mean_interval(values), 2)


if __name__ == "__main__":
    sys.exit(main())
