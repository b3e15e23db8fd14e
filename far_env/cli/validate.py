"""``far-env validate``: the records of a results folder are played again, and what differs is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from far_env.config import parse

if TYPE_CHECKING:
    from far_env.workload import Workload


@dataclass(frozen=True)
class ValidateOptions:
    """Play the records of a results folder again and compare; the exit status is 1 if any differs."""

    folder: tyro.conf.Positional[str]
    """Results folder of far-env evaluate --out, or hub:USER/NAME[@REVISION] for one on the Hugging Face hub."""
    sample: int | None = None
    """Number of records to draw at random; all by default."""
    seed: int = 0
    """Seed of the sample."""
    tolerance: float = 1e-3
    """Largest difference of a metric that counts as equal, in dB for PSNR."""
    host: str | None = None
    """The host, if it has moved."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    batch_size: int = 64
    """Rollouts that are played together."""
    data_dir: str | None = None
    """Folder of the videos, if they have moved."""


def validate(args: Sequence[str]) -> int:
    """Play the records of a results folder again and compare."""
    options = parse(ValidateOptions, args, "far-env validate", ValidateOptions.__doc__ or "")
    from far_env.clips.worlds import WORLDS
    from far_env.evaluation.results_folder import load
    from far_env.evaluation.validate import choose, report, validate
    from far_env.policies import load_token_policy
    from far_env.workloads import make_workload

    if options.batch_size < 1 or not options.tolerance >= 0:
        raise ValueError(
            f"batch size must be at least 1 and tolerance not negative, got {options.batch_size} and {options.tolerance}"
        )
    results = load(options.folder)
    records = choose(results.records, options.sample, options.seed)

    def make(name: str) -> Workload:
        made_with = results.settings.made_with[name]
        clip_options = dict(made_with["clip_options"])
        if options.data_dir is not None and name not in WORLDS:
            clip_options["data_dir"] = options.data_dir
        host = options.host or next(record.facts["host"] for record in records if record.workload == name)
        common = {"device": options.device, "precision": made_with["dtype"], "feedback": made_with["feedback"]}
        return make_workload(name, host=host, **common, **clip_options)

    common = {"tolerance": options.tolerance, "batch_size": options.batch_size}
    findings = validate(results, records, make, load_policy=load_token_policy, **common)
    print(report(findings, options.tolerance, len(results.records)))
    return int(any(finding.difference is not None for finding in findings))
