"""The command line of a benchmark whose results can be printed as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tyro


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
