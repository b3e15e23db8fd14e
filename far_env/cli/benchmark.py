"""``far-env benchmark``: a policy's line of metrics, as the public benchmark prints it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from far_env.cli.console import remark
from far_env.config import parse
from far_env.contract import RetentionPolicy
from far_env.policies import is_policy_file, load_policy


@dataclass(frozen=True)
class BenchmarkOptions:
    """Print a policy's line of metrics as the benchmark ar-video-kv-temporal-policy does."""

    policy: str
    """A .py file (which runs in a separate process), a baseline, a run folder, pretrained/NAME, a plugin's policy or
    full_history."""
    workload: str = "ucf101_short_prediction"
    """A workload of the benchmark."""
    budget: str = "tight_history_budget"
    """One of the benchmark's names of budgets, or a number of frames."""
    host: str | None = None
    """By default the released host; a shipped one, such as embedded, makes a dry run on generated clips if no data is given."""
    clips: int | None = None
    """Number of clips; by default as many as the benchmark plays, or all if there are fewer."""
    data_dir: str | None = None
    """Folder of the benchmark's videos."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 elsewhere."""
    policy_seconds: float = 10.0
    """Largest duration of one call of a policy file, in seconds."""


def benchmark(args: Sequence[str]) -> None:
    """Print a policy's line of metrics as the public benchmark does."""
    options = parse(BenchmarkOptions, args, "far-env benchmark", BenchmarkOptions.__doc__ or "")
    from far_env.evaluation import benchmark
    from far_env.workloads import resolve_budget

    max_frames = resolve_budget(options.budget)
    with _policy(options) as policy:
        place = {"device": options.device, "precision": options.precision, "data_dir": options.data_dir}
        workload, dry = benchmark.benchmark_workload(options.workload, options.host, **place)
        task_clips, available = benchmark.TASKS[options.workload].num_clips, workload.clips.num_clips("test")
        if dry:
            remark(
                f"a dry run: host {workload.host.name} on clips of the world {workload.clips.name}, not the benchmark's data"
            )
        if options.clips is None and available < task_clips:
            remark(f"the benchmark plays {task_clips} clips, {available} are available")
        num_clips = min(task_clips, available) if options.clips is None else options.clips
        score = benchmark.run_benchmark(workload, max_frames, policy, num_clips)
    for name, reason in score.unavailable.items():
        remark(f"no {name}: {reason}")
    print(score.line())


@contextmanager
def _policy(options: BenchmarkOptions) -> Iterator[RetentionPolicy | None]:
    """The policy; that of a file runs in a separate process."""
    from far_env.policy_process import PolicyProcess

    if not is_policy_file(options.policy):
        yield load_policy(options.policy)
        return
    if not options.policy_seconds > 0:
        raise ValueError(f"policy-seconds must be above 0, got {options.policy_seconds}")
    with PolicyProcess(Path(options.policy), call_seconds=options.policy_seconds) as policy:
        try:
            yield policy
        finally:
            if (sentence := policy.printed()) is not None:
                remark(sentence)
