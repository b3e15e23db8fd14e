"""The actor of `benchmarks.actors`. Without torch, so that a hundred of its processes fit into the memory of one machine."""

from __future__ import annotations

import time
from typing import Any

RECORDS, RECORD_BYTES = 64, 1100
"""Of a task: the records of a batch, as text of the size that records of 11 predicted frames have."""


class SleepingActor:
    """Sleeps, and answers as much as an evaluation does."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def prepare(self) -> dict[str, Any]:
        """No facts."""
        return {}

    def work(self, number: int) -> bytes:
        """Sleep; the answer has the size of a batch of records."""
        time.sleep(self._seconds)
        return bytes(RECORDS * RECORD_BYTES)
