"""Lists and numbers in the options of commands."""

from __future__ import annotations

import csv
from pathlib import Path

ALL = "all"
"""As a policy's name: every baseline."""


def split_list(text: str, option: str, noun: str) -> list[str]:
    """The parts of a comma-separated option, each once.

    A part that holds a comma is put in double quotes. A text that names an existing file or folder is one part.

    Raises:
        ValueError: if there is no part.
    """
    fields = [text] if "," in text and Path(text).exists() else next(csv.reader([text], skipinitialspace=True), [])
    parts = list(dict.fromkeys(field.strip() for field in fields if field.strip()))
    if not parts:
        raise ValueError(f"--{option} names no {noun}; give one or more, separated by commas")
    return parts


def whole_number(text: str, option: str) -> int:
    """A whole number from 0 on. Raises ValueError for any other text."""
    if not text.isdecimal():
        raise ValueError(f"--{option} takes whole numbers from 0 on, got {text!r}")
    return int(text)
