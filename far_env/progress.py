"""Progress of long work: a bar on a terminal, otherwise a line every few seconds, so that a log shows it as well."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm.auto import tqdm

INTERVAL_SECONDS = 10.0
"""Between the lines of a log."""


def show_progress(
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    initial: int = 0,
    delay: float = 0.0,
    disable: bool = False,
) -> Progress:
    """Progress of an iteration, or of work that calls ``update``, written to the standard error stream.

    Args:
        iterable: what to iterate over; without one, call ``update`` in a ``with`` block.
        total: number of items; by default the iterable's length, if it has one.
        description: what is done.
        unit: what is counted, in the plural.
        initial: items that were done before, by a run that is resumed.
        delay: show nothing of work that takes fewer seconds.
        disable: show nothing.

    Returns:
        A tqdm bar if the standard error stream is a terminal, else `ProgressLines`, which has the same methods.
    """
    if sys.stderr.isatty():
        # leave=None removes the bars of work within other work when they end.
        options = {"desc": description, "unit": f" {unit}", "disable": disable, "leave": None, "dynamic_ncols": True}
        return tqdm(iterable, total=total, initial=initial, delay=delay, **options)
    options = {"description": description, "unit": unit, "initial": initial, "delay": delay, "disable": disable}
    return ProgressLines(iterable, total=total, **options)


class ProgressLines:
    """Writes a line every `INTERVAL_SECONDS`, and one at the end: what is done, how much, how fast, the time left, and notes.

    A line is written by the call of ``update`` that comes after the interval, or by ``refresh``.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        *,
        total: int | None = None,
        description: str = "",
        unit: str = "it",
        initial: int = 0,
        delay: float = 0.0,
        disable: bool = False,
        file: TextIO | None = None,
    ) -> None:
        self.iterable = iterable
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.description, self.unit, self.disable = description, unit, disable
        self.file = sys.stderr if file is None else file
        self.initial, self.delay = initial, delay
        self.n = initial
        self.postfix = ""
        self._start = self._last_line = time.monotonic()
        self._written = initial

    def update(self, n: int = 1) -> None:
        """Count ``n`` more items."""
        self.n += n
        if time.monotonic() - self._last_line >= INTERVAL_SECONDS:
            self.refresh()

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        """Replace the notes at the end of the next lines; ``refresh`` is tqdm's and has no effect."""
        self.postfix = ", ".join(f"{key} {value}" for key, value in values.items())

    def set_postfix_str(self, postfix: str, refresh: bool = True) -> None:
        """Replace the notes by a text."""
        self.postfix = postfix

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Write a remark on a separate line, by default to the progress' file."""
        print(text, file=self.file if file is None else file, flush=True)

    def refresh(self) -> None:
        """Write a line now."""
        if not self.disable:
            self._last_line, self._written = time.monotonic(), self.n
            print(self._line(), file=self.file, flush=True)

    def close(self) -> None:
        """Write the last line, unless nothing was done since the one before."""
        if self.n > self._written and time.monotonic() - self._start >= self.delay:
            self.refresh()

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        count = f"{self.n:,}" if self.total is None else f"{self.n:,}/{self.total:,}"
        parts = [f"{self.description}: {count} {self.unit}", _duration(seconds)]
        done = self.n - self.initial
        if self.total is not None and done > 0 and self.n < self.total:
            parts.append(f"{_duration(seconds * (self.total - self.n) / done)} left")
        if seconds > 0:
            parts.append(f"{done / seconds:.3g} {self.unit}/s")
        return ", ".join([*parts, self.postfix] if self.postfix else parts)

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable if self.iterable is not None else ():
                yield item
                self.update()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Progress = tqdm | ProgressLines
"""Either form; both have ``update``, ``set_postfix``, ``set_postfix_str``, ``write``, ``refresh`` and ``close``."""


def _duration(seconds: float) -> str:
    """Format a duration, such as 0.4 s, 17 s, 12:05 or 1:02:30."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
