"""``far-env benchmark``: a policy's lines of metrics, as the public benchmark prints them, and its score over all settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from far_env.cli.console import keeping_episodes, remark
from far_env.cli.options import ALL, check_policy_seconds, split_list
from far_env.config import parse
from far_env.contract import RetentionPolicy
from far_env.errors import PolicyError
from far_env.policies import FULL_HISTORY, is_policy_file, load_policy, policy_facts, policy_names

if TYPE_CHECKING:
    from far_env.clips.video_folder import VideoFolder
    from far_env.evaluation.benchmark import BenchmarkScore
    from far_env.evaluation.suite import Setting
    from far_env.workload import Workload


@dataclass(frozen=True)
class BenchmarkOptions:
    """Print a policy's line of metrics as the benchmark ar-video-kv-temporal-policy does, or with --suite all and the score."""

    policy: str
    """A .py file (which runs in a separate process), a baseline, "all" of them, a run folder, pretrained/NAME, a plugin's
    policy or full_history; one or more, separated by commas."""
    workload: str = "ucf101_short_prediction"
    """A workload of the benchmark; without --suite."""
    budget: str = "tight_history_budget"
    """One of the benchmark's names of budgets, or a number of frames; without --suite."""
    suite: bool = False
    """Play all settings, UCF-101 at 8 and at 4 frames, DMLab at 8 and at 4, also with the benchmark's four baselines, between
    which the score counts."""
    host: str | None = None
    """By default the released host; a shipped one, such as embedded, makes a dry run on generated clips if no data is given.
    With --suite also two, separated by a comma: UCF-101's and DMLab's."""
    clips: int | None = None
    """Number of clips; by default as many as the benchmark plays, or all if there are fewer."""
    data_dir: str | None = None
    """Folder of the benchmark's videos. With --suite also two, separated by a comma: UCF-101's and DMLab's."""
    file_order: str | None = None
    """Text file with the path of a video per line: the files in the order in which another run found them, before they are
    shuffled, to repeat it. By default they are sorted. With --suite also two, separated by a comma."""
    list_clips: str | None = None
    """Write to this file which videos are played, and from which frame, and stop; training can leave them out (the clip option
    exclude)."""
    steps: int | None = None
    """ODE steps per frame; by default the benchmark's 20."""
    noise: Literal["portable", "harness"] = "portable"
    """portable is the same on all devices; harness is drawn as the benchmark does, on the device and in its precision."""
    lenient: bool = False
    """Leave out clips on which a policy fails, as the benchmark does, and count them; otherwise the first one ends the run."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 elsewhere."""
    policy_seconds: float = 10.0
    """Largest duration of one call of a policy file, in seconds."""
    out: str | None = None
    """Folder for a record of every run: its line, clips, scores by clip and what it was made with. What it holds is not played
    again."""


def benchmark(args: Sequence[str]) -> None:
    """Print a policy's line of metrics as the public benchmark does."""
    options = parse(BenchmarkOptions, args, "far-env benchmark", BenchmarkOptions.__doc__ or "")
    from far_env.evaluation.suite import ANCHORS, SETTINGS, Setting, score_line
    from far_env.workloads import resolve_budget

    if options.list_clips is not None:
        _list_clips(options)
        return
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps needs at least 1 ODE step, got {options.steps}")
    policies, settings = _policy_names(options.policy), list(SETTINGS)
    if not options.suite:
        max_frames = resolve_budget(options.budget)
        settings = [Setting(f"{options.workload}-{max_frames}", options.workload, max_frames)]
    elif FULL_HISTORY in policies:
        raise ValueError("the suite has budgets, under which full_history is no policy; play it without --suite")
    played = _Benchmark(options, labelled=options.suite or len(policies) > 1, optional=ALL in options.policy.split(","))
    with keeping_episodes(options.out, "runs"):
        for name in [*policies, *(anchor for anchor in ANCHORS if options.suite and anchor not in policies)]:
            for setting in settings:
                if not played.play(name, setting):
                    policies = [policy for policy in policies if policy != name]
                    break
    for name in policies if options.suite else ():
        print(score_line(name, played.values))


class _Benchmark:
    """Plays policies in settings, each workload being made once, and prints their lines."""

    def __init__(self, options: BenchmarkOptions, labelled: bool, optional: bool) -> None:
        self.options = options
        self.values: dict[str, dict[str, dict[str, float]]] = {}
        self._labelled, self._optional = labelled, optional
        self._workloads: dict[str, Workload] = {}
        self._said: set[str] = set()

    def play(self, name: str, setting: Setting) -> bool:
        """Play and print one run; False if one of all baselines cannot be played, for which the reason is printed."""
        from far_env.evaluation.suite import load_record, made_with, record_path, save_record

        options, path = self.options, None
        with _policy(name, options.policy_seconds) as policy:
            workload, num_clips = self._workload(setting.workload)
            score = None
            if options.out is not None:
                path = record_path(Path(options.out), name, setting)
                facts = made_with(workload, setting, num_clips, policy_facts(name)) | {"lenient": options.lenient}
                score = load_record(path, facts)
            if score is None:
                try:
                    score = self._run(workload, setting, policy, num_clips)
                except PolicyError as error:
                    if not self._optional:
                        raise
                    remark(f"left out {name}: {error}")
                    return False
                if path is not None:
                    save_record(path, facts, score)
        self.values.setdefault(name, {})[setting.name] = score.values
        self._report(name, setting, score, num_clips)
        return True

    def _run(self, workload: Workload, setting: Setting, policy: RetentionPolicy | None, num_clips: int) -> BenchmarkScore:
        from far_env.evaluation.benchmark import run_benchmark

        return run_benchmark(workload, setting.max_frames, policy, num_clips, lenient=self.options.lenient)

    def _report(self, name: str, setting: Setting, score: BenchmarkScore, num_clips: int) -> None:
        for metric, reason in score.unavailable.items():
            self._remark_once(f"no {metric}: {reason}")
        for clip_id, reason in score.failed.items():
            remark(f"clip {clip_id} failed: {reason}")
        if score.failed:
            remark(f"{len(score.failed)} of {num_clips} clips failed and are left out of the means of {name} in {setting.name}")
        if self._labelled:
            print(f"{name}, {setting.name}: {setting.workload}, {setting.max_frames} frames")
        print(score.line(), flush=True)

    def _workload(self, name: str) -> tuple[Workload, int]:
        """A workload, and how many of its clips are played. What differs from the benchmark is printed once."""
        from far_env.clips.video_folder import VideoFolder
        from far_env.evaluation.benchmark import TASKS, benchmark_workload

        options = self.options
        if name not in self._workloads:
            place = {"device": options.device, "precision": options.precision, "data_dir": _of(options, name, "data_dir")}
            order = _of(options, name, "file_order")
            changes = {"num_steps": options.steps, "noise": options.noise, "file_order": order}
            workload, dry = benchmark_workload(name, _of(options, name, "host"), **place, **changes)
            self._workloads[name] = workload
            if dry:
                source = f"host {workload.host.name} on clips of the world {workload.clips.name}"
                remark(f"a dry run: {source}, not the benchmark's data")
            elif isinstance(workload.clips, VideoFolder):
                _remark_on_clips(workload.clips)
            precision = workload.host.precision
            where = f"in {precision} on {workload.host.device}"
            remark(f"{name}: noise {workload.noise}, {workload.num_steps} ODE steps {where}")
        workload = self._workloads[name]
        task_clips, available = TASKS[name].num_clips, workload.clips.num_clips("test")
        if options.clips is None and available < task_clips:
            self._remark_once(f"the benchmark plays {task_clips} clips, {available} are available")
        return workload, min(task_clips, available) if options.clips is None else options.clips

    def _remark_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            remark(sentence)


def _policy_names(text: str) -> list[str]:
    """The policies of the option, "all" being every baseline."""
    names = split_list(text, "policy", "policy")
    baselines = policy_names("baselines") if ALL in names else []
    return list(dict.fromkeys(single for name in names for single in (baselines if name == ALL else [name])))


def _of(options: BenchmarkOptions, workload: str, option: str) -> str | None:
    """The value of an option for a workload: with --suite the first of two is UCF-101's, the second DMLab's."""
    text = getattr(options, option)
    if text is None or not options.suite:
        return text
    values = split_list(text, option.replace("_", "-"), "value")
    if len(values) > 2:
        raise ValueError(f"--{option.replace('_', '-')} takes one or two values, UCF-101's and DMLab's, got {len(values)}")
    if workload == "ucf101_short_prediction" or len(values) == 2:
        return values[0 if workload == "ucf101_short_prediction" else 1]
    from far_env.host.weights import SHIPPED

    return "embedded_long" if option == "host" and values[0] in SHIPPED else None


def _remark_on_clips(clips: VideoFolder) -> None:
    """Print what is played that the benchmark would not play."""
    if not clips.found_by_benchmark:
        kinds = " or ".join(clips.benchmark_suffixes)
        remark(f"the benchmark reads {kinds} files and finds none in {clips.folder}; the clips that are there are played")
    elif clips.name == "dmlab" and clips.num_clips("test") + len(clips.skipped) < clips.benchmark_clips:
        remark("with so few videos the benchmark would play made clips of plain colours; here the videos are played")


def _list_clips(options: BenchmarkOptions) -> None:
    from far_env.clips.benchmark_files import write_clip_list
    from far_env.evaluation.benchmark import benchmark_clips

    if options.suite:
        raise ValueError("--list-clips lists those of one workload; give --workload in place of --suite")
    clips = benchmark_clips(options.workload, options.data_dir, options.file_order)
    places = [clips.place("test", clip_id) for clip_id in range(clips.num_clips("test"))]
    write_clip_list(Path(options.list_clips), clips.folder, options.workload, clips.num_frames, places)
    _remark_on_clips(clips)
    print(f"{len(places)} clips of {options.workload} listed in {options.list_clips}")


@contextmanager
def _policy(name: str, seconds: float) -> Iterator[RetentionPolicy | None]:
    """The policy; that of a file runs in a separate process."""
    from far_env.policy_process import PolicyProcess

    if not is_policy_file(name):
        yield load_policy(name)
        return
    check_policy_seconds(seconds)
    with PolicyProcess(Path(name), call_seconds=seconds) as policy:
        try:
            yield policy
        finally:
            if (sentence := policy.printed()) is not None:
                remark(sentence)
