"""Entry point of ``far-env``: finds the command among the entry points ``far_env.commands`` and turns errors into sentences.

A command is a function ``(args: Sequence[str]) -> int | None`` that returns its exit status. The first line of its docstring is
its line in ``far-env --help``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence

from far_env.allocator import keep_fewer_kernels, keep_freed_memory
from far_env.cli.console import accept_any_text
from far_env.errors import ClipIdError, MetricUnavailable, PolicyError, TrainingStopped, unknown_name
from far_env.io import DISK_ERRORS, disk_error
from far_env.plugins import COMMANDS, DISTRIBUTION, distribution_name, entry_points, load

REPLACED = {"extended": "far-env evaluate --memory tokens, whose budget counts tokens"}
"""Commands of earlier versions, and what does the same now."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("far-env", lambda: _dispatch(args))


def run_guarded(prog: str, function: Callable[[], int | None]) -> int:
    """Call ``function`` and return its exit status, or 0 where it returns None.

    An error that the user can correct is printed as one sentence, with exit status 2. Ctrl-C and SIGTERM end with status 130.
    Text that the terminal cannot encode is replaced, never an error.
    """
    accept_any_text()
    keep_freed_memory()
    keep_fewer_kernels()
    # Precision float32 is to be that on a GPU, too, in the autoencoder's convolutions.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    # A plain kill is treated like Ctrl-C, so that training saves its progress.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = function() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except (ValueError, ClipIdError, PolicyError, MetricUnavailable) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as head, has closed it.
        _forget_output()
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _forget_output()
        print(f"{prog}: error: {disk_error(error, 'the output')}", file=sys.stderr)
        return 2


def _forget_output() -> None:
    """Let what is left of the output go nowhere, because Python would fail again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """The text of ``far-env --help``: every command with the first line of its docstring."""
    commands = entry_points(COMMANDS)
    width = max(map(len, commands))
    lines = []
    for name, entry in commands.items():
        try:
            line = (inspect.getdoc(load(entry)) or "").partition("\n")[0]
        except ValueError as error:
            line = str(error)
        source = distribution_name(entry)
        lines.append(f"  {name:<{width}}  {line}" + ("" if source == DISTRIBUTION else f" (from {source})"))
    usage = "usage: far-env COMMAND [options]"
    return "\n".join([usage, "", *lines, "", "far-env COMMAND --help describes the options of a command."])


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, *arguments = args
    commands = entry_points(COMMANDS)
    if name in REPLACED:
        raise ValueError(f"there is no command {name!r} any more: use {REPLACED[name]}")
    if name not in commands:
        raise ValueError(unknown_name("command", name, list(commands)))
    return load(commands[name])(arguments)
