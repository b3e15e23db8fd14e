"""What the tests of ``far-env reproduce`` read of its answers."""

from __future__ import annotations


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][2:]


def refused(result, *fragments):
    status, _, (error,) = result
    assert status == 2 and error.startswith("far-env: error: ")
    for fragment in fragments:
        assert fragment in error
