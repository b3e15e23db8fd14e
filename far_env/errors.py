"""The errors that commands print as one sentence, and the sentence for an unknown name. No heavy import in here."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from difflib import get_close_matches

MAX_LINE = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 76


class ClipIdError(IndexError):
    """A clip id that a source does not have."""


class VideoError(ValueError):
    """A file of frames, latents or actions cannot be used; the message names the file and the reason."""


class PolicyError(Exception):
    """A policy raised or answered something that is not a valid plan. The message names policy, clip and step."""


class MetricUnavailable(RuntimeError):
    """A metric cannot be computed here; the message gives the reason and the remedy."""


class WeightsError(ValueError):
    """A weight file is missing, damaged, or does not fit its configuration; the message names it and the remedy."""


class TrainingStopped(Exception):
    """Raised after Ctrl-C, once the checkpoint is written; the message gives the command that continues."""


def unknown_name(kind: str, name: object, known: Sequence[str]) -> str:
    """The sentence for an unknown name: with the nearest known one, or all of them."""
    near = get_close_matches(str(name)[:200], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {short(name)}; {hint}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of at most 300 characters, or the error's type where the line is empty.

    Messages of libraries quote what they read, and a damaged file can hold anything.
    """
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


def short(value: object) -> str:
    """A value from a file as text of at most 80 characters in one line, however large or deep it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
