"""``far-env selftest``: a benchmark workload at full size with random weights, the engine compared with the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from far_env.config import parse
from far_env.errors import first_line
from far_env.io import make_run_dir, write_text


@dataclass(frozen=True)
class SelfTestOptions:
    """Run a few frames of a benchmark workload at full size, with random weights, and compare the engine with the reference."""

    workload: str = "ucf101_short_prediction"
    """A workload whose host is a released model."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 on a CPU."""
    frames: int = 3
    """Frames to generate."""
    steps: int | None = None
    """ODE steps per frame; by default those of the workload on a GPU, 2 on a CPU."""
    data_dir: str | None = None
    """Folder of videos to take the clip from; by default the clip is generated."""
    json: str | None = None
    """Write one JSON object to this file, or to the standard output if "-", instead of text."""


def selftest(args: Sequence[str]) -> None:
    """Run a workload at full size with random weights, and compare the engine with the reference."""
    options = parse(SelfTestOptions, args, "far-env selftest", SelfTestOptions.__doc__ or "")
    from torch import OutOfMemoryError

    from far_env.evaluation.selftest import full_size_workload, self_test

    if options.json not in (None, "-"):
        make_run_dir(Path(options.json).parent)
    try:
        workload, clip = full_size_workload(
            options.workload,
            device=options.device,
            precision=options.precision,
            num_frames=options.frames,
            num_steps=options.steps,
            data_dir=options.data_dir,
        )
        result = self_test(workload, clip)
    except OutOfMemoryError as error:
        raise ValueError(f"the memory of {options.device} does not suffice: {first_line(error)}") from error
    text = result.text() if options.json is None else json.dumps(result.summary(), indent=2)
    if options.json in (None, "-"):
        print(text)
    else:
        write_text(Path(options.json), text + "\n")
    if result.failures:
        raise ValueError(f"the self-test failed; {'; '.join(result.failures)}")
