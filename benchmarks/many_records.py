"""A results folder of very many made-up records: time and memory of reading, tables and report, and the size of the page.

python -m benchmarks.many_records --records 1000000 --folder /tmp/many

One workload under two budgets, with 40 policies and full history.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from far_env.cli import run_guarded
from far_env.config import parse
from far_env.contract import UNLIMITED_FRAMES
from far_env.device import peak_memory_mib
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.records import Settings
from far_env.evaluation.report import report_page
from far_env.evaluation.results_folder import RECORDS_FILE, Recorder, load
from far_env.evaluation.table import results_table
from far_env.progress import show_progress

BUDGETS, CONTEXT, PREDICT = (4, 8), 5, 11


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    records: int = 1_000_000
    """Records that are made, at least."""
    folder: str = "many_records"
    """Where they are made."""
    policies: int = 40
    """Policies with a budget; full history is one more."""
    part: Literal["all", "make", "read"] = "all"
    """read reads an existing folder in this process; all makes one and reads it in another process."""


def make(folder: Path, num_records: int, num_policies: int) -> None:
    """Write a folder with at least so many records."""
    clips = -(-num_records // (num_policies * len(BUDGETS) + 1))
    names = ["recent_fill", *(f"policy_{i:02}" for i in range(1, num_policies))]
    settings = Settings(
        workloads=["pan"],
        budgets=[*BUDGETS, UNLIMITED_FRAMES],
        policies={name: {} for name in [*names, "full_history"]},
        seeds=[42],
        split="test",
        clips=list(range(clips)),
        metrics=["psnr", "ssim", "lpips"],
        unavailable={},
        num_context={"pan": CONTEXT},
        num_predict={"pan": PREDICT},
        frame_size={"pan": 64},
        made_with={"pan": {"weights": "c0ffee00"}},
    )
    Recorder(folder, settings).close()
    facts = {"host": "made_up", "weights": "c0ffee00", "ode_steps": 4, "dtype": "float32", "device": "cpu", "commit": "none"}
    jobs = [(budget, name) for budget in BUDGETS for name in names] + [(UNLIMITED_FRAMES, "full_history")]
    rng = np.random.default_rng(0)
    # What the records of a policy have in common is written as JSON once, which most of the time would go to.
    shared = {}
    for budget, name in jobs:
        record = {"workload": "pan", "budget": budget, "policy": name, "seed": 42, "plan": _plan(budget), "decision_ms": 0.25}
        shared[budget, name] = json.dumps(record | facts)[:-1]
    with (folder / RECORDS_FILE).open("w", encoding="utf-8") as file:
        for clip in show_progress(range(clips), description="make records", unit="clips"):
            gaps = rng.integers(1, 12, PREDICT).tolist()
            by_frame = rng.normal(20, 3, (len(jobs), PREDICT))
            of_clip = {"clip": clip, "evidence_gaps": gaps, "clip_sha256": f"{clip:016x}", "latents_sha256": f"{clip:016x}"}
            begin = json.dumps(of_clip)[1:-1]
            for job, values, mean in zip(jobs, by_frame.tolist(), by_frame.mean(axis=1).tolist(), strict=True):
                metrics = f'{{"psnr": {mean}, "ssim": {mean / 40}, "lpips": {1 - mean / 40}}}'
                file.write(f'{shared[job]}, {begin}, "metrics": {metrics}, "psnr_per_frame": {values}}}\n')


def _plan(budget: int) -> list[dict]:
    """The newest frames at every step that needs a decision."""
    plan = []
    for step in range(PREDICT - 1):
        if (newest := CONTEXT + step) >= budget:
            plan.append({"step": step, "kept": list(range(newest - budget + 1, newest + 1)), "demoted": []})
    return plan


def clocks() -> tuple[float, float]:
    """Seconds of the wall clock and of the processor; the latter are few where other processes take it."""
    return time.perf_counter(), time.process_time()


def read(folder: Path) -> None:
    """Read the folder, print a table and write the report's page; print the time and this process's highest memory so far."""

    def measured(what: str, start: tuple[float, float]) -> None:
        memory = peak_memory_mib(torch.device("cpu"))
        wall, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
        print(f"{what}: {cpu:.0f} s of the processor ({wall:.0f} s), memory so far {memory:.0f} MiB", flush=True)

    measured("imports", clocks())
    start = clocks()
    results = load(folder)
    measured(f"read {len(results.records):,} records, {(folder / RECORDS_FILE).stat().st_size / 2**20:.0f} MiB", start)
    start = clocks()
    text = results_table(tabulate(results, "pan", BUDGETS[0]))
    measured(f"table of {len(text.splitlines())} lines", start)
    start = clocks()
    page = report_page(results)
    (folder / "report.html").write_text(page, encoding="utf-8")
    measured(f"page of {len(page.encode()) / 1e6:.1f} MB", start)


def run() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], "python -m benchmarks.many_records", __doc__ or "")
    folder = Path(options.folder)
    if options.part in ("all", "make"):
        make(folder, options.records, options.policies)
    if options.part == "read":
        read(folder)
    elif options.part == "all":  # in a process of its own, whose memory is that of reading alone
        command = [sys.executable, "-m", "benchmarks.many_records", "--part", "read", "--folder", options.folder]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.many_records", run))
