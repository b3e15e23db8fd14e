"""The command ``far-env``: one function per subcommand, errors as one sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from far_env.clips.clip import ClipIdError
from far_env.config import parse
from far_env.contract import PolicyError, unknown_name
from far_env.evaluation.commands import run_benchmark, run_evaluate, run_report, run_validate


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained policy as one self-contained Python file for the benchmark."""

    run: tyro.conf.Positional[str]
    """Run folder of train_agent.py."""
    out: str = "policy.py"


@dataclass(frozen=True)
class WeightsOptions:
    """The released FAR models: list them, fetch them, or check their files."""

    action: tyro.conf.Positional[Literal["list", "download", "verify"]]
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """As in the list; a transformer brings its autoencoder. verify without names checks all that are there."""


def run_train_host(args: Sequence[str]) -> None:
    """Train the embedded host."""
    from far_env.train_host import HostTraining, train_host

    config = parse(HostTraining, args, "far-env train-host", "Train a host on procedural worlds.")
    host = train_host(config)
    print((Path(config.output_dir) / "README.md").read_text())
    print(f"host {host.weights_hash} saved in {config.output_dir}")


def run_export(args: Sequence[str]) -> None:
    """Export a policy."""
    options = parse(ExportOptions, args, "far-env export", ExportOptions.__doc__ or "")
    from agents.export import export_run

    export_run(Path(options.run), Path(options.out))
    print(f"wrote {options.out}")


def run_weights(args: Sequence[str]) -> None:
    """List, download or verify the released models."""
    options = parse(WeightsOptions, args, "far-env weights", WeightsOptions.__doc__ or "")
    from far_env.host import zoo

    names = list(options.names)
    for name in options.names:
        autoencoder = zoo.find_released(name).autoencoder
        if autoencoder is not None and autoencoder not in names:
            names.append(autoencoder)
    if options.action == "list":
        print(zoo.listing(names or list(zoo.RELEASED)))
        return
    if options.action == "download" and not names:
        raise ValueError("weights download needs the names of released models; far-env weights list shows them")
    if not names:
        names = [name for name, released in zoo.RELEASED.items() if released.path.exists()]
        if not names:
            raise ValueError(f"no released weights in {zoo.weights_dir()}; far-env weights download NAME fetches some")
    failures = []
    for name in names:
        try:
            path = (zoo.download if options.action == "download" else zoo.verify)(name)
            print(f"{name}: {path} is complete")
        except zoo.WeightsError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("; ".join(failures))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train-host": run_train_host,
    "evaluate": run_evaluate,
    "validate": run_validate,
    "report": run_report,
    "benchmark": run_benchmark,
    "export": run_export,
    "weights": run_weights,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {function.__doc__}" for name, function in COMMANDS.items()]
        print(
            "usage: far-env COMMAND [options]\n\n" + "\n".join(lines) + "\n\nfar-env COMMAND --help tells a command's options."
        )
        return 0
    return run_guarded("far-env", lambda: _dispatch(args))


def run_guarded(prog: str, function: Callable[[], int | None]) -> int:
    """Call ``function``, which may return a status; what a user can mend is printed as one sentence, with exit status 2, and
    Ctrl-C ends quietly."""
    from far_env.host.training_loop import TrainingStopped
    from far_env.metrics import MetricUnavailable

    # A plain kill is treated like Ctrl-C, so that training saves its progress.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return function() or 0
    except (ValueError, ClipIdError, PolicyError, MetricUnavailable) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int | None:
    name, *rest = args
    if name not in COMMANDS:
        raise ValueError(unknown_name("command", name, list(COMMANDS)))
    return COMMANDS[name](rest)


if __name__ == "__main__":
    sys.exit(main())
