"""The command ``far-env``: one function per subcommand, errors as one sentence."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from far_env.config import parse
from far_env.errors import ClipIdError, PolicyError, first_line, unknown_name
from far_env.evaluation.commands import run_benchmark, run_evaluate, run_report, run_validate
from far_env.io import make_run_dir, write_text


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained policy as one self-contained Python file for the benchmark."""

    run: tyro.conf.Positional[str]
    """Run folder of train_agent.py, or pretrained/NAME for a policy that ships."""
    out: str = "policy.py"


@dataclass(frozen=True)
class BaselinesOptions:
    """The hand-written policies: source, what each reads, and its parameters."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these, with what is faithful to the source and what is adapted."""


@dataclass(frozen=True)
class WeightsOptions:
    """The released FAR models: list them, fetch them, or check their files."""

    action: tyro.conf.Positional[Literal["list", "download", "verify"]]
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """As in the list; a transformer brings its autoencoder. verify without names checks all that are there."""


@dataclass(frozen=True)
class DataOptions:
    """Say what a folder of videos is good for, and which of its files are damaged."""

    action: tyro.conf.Positional[Literal["check"]]
    folder: tyro.conf.Positional[str]
    dataset: str | None = None
    """ucf101, dmlab, bair or minecraft; by default what it looks like."""
    frames: int | None = None
    """Frames of a clip; by default those of the data set's workload."""
    quick: bool = False
    """Read only the headers of files, not every file to its end."""


@dataclass(frozen=True)
class SelfTestOptions:
    """Run a few frames of a benchmark workload at full size, with random weights, and compare the engine with the reference."""

    workload: str = "ucf101_short_prediction"
    """Any whose host is a released model."""
    device: str = "auto"
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 on a CPU."""
    frames: int = 3
    """Frames to generate."""
    steps: int | None = None
    """ODE steps per frame; by default the workload's own on a GPU, 2 on a CPU."""
    data_dir: str | None = None
    """Folder of videos to take the clip from; by default it is made."""
    json: str | None = None
    """Write one JSON object to this file, or to the standard output if "-", instead of text."""


def run_train_host(args: Sequence[str]) -> None:
    """Train the embedded host."""
    from far_env.host.training.config import HostTraining

    config = parse(HostTraining, args, "far-env train-host", "Train a host on procedural worlds.")
    from far_env.evaluation.host_training import train_host

    host = train_host(config)
    print((Path(config.output_dir) / "README.md").read_text())
    print(f"host {host.weights_hash} saved in {config.output_dir}")


def run_extended(args: Sequence[str]) -> None:
    """Evaluate policies under token budgets, demoted frames being coarse."""
    from far_env.evaluation import extended

    extended.run_extended(args)


def run_reproduce(args: Sequence[str]) -> None:
    """Measure the tables of RESULTS.md anew."""
    from far_env.agents import commands

    commands.reproduce(args)


def run_export(args: Sequence[str]) -> None:
    """Export a policy."""
    options = parse(ExportOptions, args, "far-env export", ExportOptions.__doc__ or "")
    from far_env.agents.checkpoints import scorer_folder
    from far_env.agents.export import export_run

    export_run(scorer_folder(options.run), Path(options.out))
    print(f"wrote {options.out}")


def run_baselines(args: Sequence[str]) -> None:
    """List the hand-written policies."""
    options = parse(BaselinesOptions, args, "far-env baselines", BaselinesOptions.__doc__ or "")
    from far_env import baselines

    print(baselines.listing(options.names))


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


def run_data(args: Sequence[str]) -> None:
    """Check a folder of videos."""
    options = parse(DataOptions, args, "far-env data", DataOptions.__doc__ or "")
    from far_env.clips.check import check_data

    report = check_data(Path(options.folder), options.dataset, options.frames, whole=not options.quick)
    print(report.text())
    if report.problem is not None:
        raise ValueError(report.problem)


def run_selftest(args: Sequence[str]) -> None:
    """Run a workload at full size, with random weights."""
    options = parse(SelfTestOptions, args, "far-env selftest", SelfTestOptions.__doc__ or "")
    from torch import OutOfMemoryError

    from far_env.evaluation.selftest import full_size_workload, self_test

    if options.json not in (None, "-"):
        make_run_dir(Path(options.json).parent)
    try:
        workload, clip = full_size_workload(
            options.workload,
            device=options.device,
            precision=options.precision,
            num_frames=options.frames,
            num_steps=options.steps,
            data_dir=options.data_dir,
        )
        result = self_test(workload, clip)
    except OutOfMemoryError as error:
        raise ValueError(f"the memory of {options.device} does not suffice: {first_line(error)}") from error
    text = result.text() if options.json is None else json.dumps(result.summary(), indent=2)
    if options.json in (None, "-"):
        print(text)
    else:
        write_text(Path(options.json), text + "\n")
    if result.failures:
        raise ValueError(f"the self-test failed; {'; '.join(result.failures)}")


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train-host": run_train_host,
    "evaluate": run_evaluate,
    "validate": run_validate,
    "report": run_report,
    "benchmark": run_benchmark,
    "extended": run_extended,
    "reproduce": run_reproduce,
    "export": run_export,
    "baselines": run_baselines,
    "weights": run_weights,
    "data": run_data,
    "selftest": run_selftest,
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
    from far_env.errors import MetricUnavailable, TrainingStopped

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
