"""Lists and numbers in the options of commands."""

from __future__ import annotations

import csv
import os

from far_env.errors import first_line

ALL = "all"
"""As a policy's name: every baseline."""
MAX_DIGITS = 18
"""Of a whole number, which then fits into 64 bits."""


def split_list(text: str, option: str, noun: str) -> list[str]:
    """The parts of a comma-separated option, each once.

    A part that holds a comma is put in double quotes. A text that names an existing file or folder is one part.

    Raises:
        ValueError: if there is no part, or the text holds a line break outside quotes or is too long.
    """
    try:
        # os.path.exists is false, not an error, for names that are too long.
        fields = [text] if "," in text and os.path.exists(text) else next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(f"--{option} is no list separated by commas: {first_line(error)}") from error
    parts = list(dict.fromkeys(field.strip() for field in fields if field.strip()))
    if not parts:
        raise ValueError(f"--{option} names no {noun}; give one or more, separated by commas")
    return parts


def check_policy_seconds(seconds: float) -> None:
    """Raise ValueError unless it can be the longest time of a call of a policy file."""
    if not seconds > 0:
        raise ValueError(f"policy-seconds must be above 0, got {seconds}")


def whole_number(text: str, option: str) -> int:
    """A whole number from 0 on. Raises ValueError for any other text."""
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise ValueError(f"--{option} takes whole numbers from 0 on, got {text[:40]!r}")
    return int(text)
