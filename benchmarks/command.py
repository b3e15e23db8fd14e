"""What benchmarks share: the command line, with results as text or as JSON, and the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import tyro

from far_env.device import synchronize


def run_benchmark(
    options_class: type, measure: Callable[[Any, Callable[[str], None]], dict[str, Any]], description: str
) -> None:
    """Parse the options, measure, and print lines as they are measured or, with ``--json -``, the result at the end.

    Raises:
        ValueError: if ``--json`` is given another value.
    """
    options = tyro.cli(options_class, description=description)
    if options.json not in (None, "-"):
        raise ValueError("--json takes only '-', the standard output")
    result = measure(options, print if options.json is None else lambda line: None)
    if options.json is not None:
        print(json.dumps(result, indent=2))


def clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds: on one thread of a CPU the processor time of this process, so that other programs do not count."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return now
