"""``far-env report``: a results folder → one self-contained HTML page, and plots for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from far_env.cli.options import split_list
from far_env.config import parse
from far_env.io import make_run_dir, write_text


@dataclass(frozen=True)
class ReportOptions:
    """Make one HTML page of an evaluation, and plots for papers."""

    results: tyro.conf.Positional[str]
    """Folder that far-env evaluate --out wrote, or hub:USER/NAME[@REVISION] for one on the Hugging Face hub."""
    out: str = "report.html"
    """File to write."""
    plots: str | None = None
    """Write plots into this folder too, as PNG and SVG."""
    policies: str | None = None
    """Comma-separated: only these; all by default. A name that holds a comma is put in double quotes."""
    reference: str | None = None
    """Policy that the others are compared with; recent_fill by default."""
    show_clips: int | None = None
    """At most this many clips of each workload in the player, for a smaller page."""


def report(args: Sequence[str]) -> None:
    """Make one HTML page of an evaluation, and plots for papers."""
    options = parse(ReportOptions, args, "far-env report", ReportOptions.__doc__ or "")
    from far_env.evaluation.plots import save_plots
    from far_env.evaluation.ranking import select_policies
    from far_env.evaluation.report import report_page
    from far_env.evaluation.results_folder import load

    if options.show_clips is not None and options.show_clips < 0:
        raise ValueError(f"--show-clips must be at least 0, got {options.show_clips}")
    names = [] if options.policies is None else split_list(options.policies, "policies", "policy")
    results = select_policies(load(options.results), names)
    if not results.settings.metrics:
        raise ValueError(f"{options.results} has no metric of single clips (psnr, ssim, lpips), which a report shows")
    if options.plots is not None:
        make_run_dir(options.plots)
    page = report_page(results, options.reference, options.show_clips)
    write_text(Path(options.out), page)
    plots = [] if options.plots is None else save_plots(results, Path(options.plots), options.reference)
    print(f"wrote {options.out} ({len(page.encode()) / 1e6:.1f} MB)")
    if options.plots is not None:
        print(f"wrote {len(plots)} plots into {options.plots}")
