"""Output of commands on a terminal: text in any encoding, and remarks beside their output."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "far_env.replace"
_REPLACEMENTS = {
    **dict.fromkeys("−–—‐─━═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╔╗╚╝", "+"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "…": "...",
    "×": "x",
    "·": "*",
    "²": "^2",
    "±": "+-",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "μ": "mu",
    "Σ": "Sigma",
    "√": "sqrt",
    "‖": "||",
}


def accept_any_text() -> None:
    """Let the standard streams write text that their encoding lacks: "−" as "-", and "?" for what has no replacement."""
    codecs.register_error(_HANDLER, _replace)
    # Python sets a stream to None that was closed before the command began (``>&-``); what is written is then lost.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, as long as the process
    for stream in (sys.stdout, sys.stderr):
        # Streams that are replaced by other objects, or closed, have nothing to configure.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def remark(sentence: str) -> None:
    """Print a sentence about the output to the standard error, so that it does not mix with the output."""
    print(f"far-env: {sentence}", file=sys.stderr)


@contextmanager
def keeping_episodes(out: str | os.PathLike | None, kind: str = "episodes") -> Iterator[None]:
    """On Ctrl-C, print that the finished episodes (or another ``kind``) are in the folder ``out``, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            print(f"\nthe {kind} finished so far are in {out}; the same command resumes from there", file=sys.stderr)
        raise


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of `codecs.register_error`: replacements for the characters that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in characters):
        # Bytes of a file name that are not UTF-8, as Python's surrogateescape represents them.
        return bytes(ord(character) - 0xDC00 for character in characters), error.end
    text = "".join(_REPLACEMENTS.get(character, "?") for character in characters)
    return "".join(character if character.isascii() else "?" for character in text), error.end
