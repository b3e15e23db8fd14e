"""The settings of the public benchmark ar-video-kv-temporal-policy, the score that it makes of them, and kept records.

The score is that of the task's ``score_spec.py`` with MLS-Bench's ``scoring/evaluate.py``. A number counts from the worst of
the benchmark's four baselines (0) to its bound (1), raised to the power that gives their best one 0.5. A setting's score is the
mean of those of quality (weight 2) and of peak memory (weight 0.5), the task's their geometric mean over settings. The
baselines are played here: those of the published leaderboard were not made by rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from far_env.clips.video_folder import VideoFolder
from far_env.evaluation.benchmark import BenchmarkScore
from far_env.evaluation.facts import record_facts
from far_env.io import make_run_dir, read_json, write_json
from far_env.workload import Workload

ANCHORS = ("recent_window", "packcache", "causalcache_vdm", "flowcache")
"""The benchmark's baselines, between whose numbers a score counts."""
_TERMS = {"temporal_quality_main": (2.0, 100.0), "peak_kv_memory_mb": (0.5, 0.0)}
"""Weight and bound of what a score is made of. A bound of 0 means that lower is better."""
_BEST_BASELINE = 0.5
_LEAST = 0.01
"""A setting counts at least this much in the geometric mean, unless all are 0."""
_MACHINE = ("machine", "commit", "versions", "device")


@dataclass(frozen=True)
class Setting:
    """One of the benchmark's evaluations: a workload under a budget."""

    name: str
    workload: str
    max_frames: int


SETTINGS = (
    Setting("ucf-short", "ucf101_short_prediction", 8),
    Setting("dmlab-long-medium", "dmlab_long_prediction", 8),
    Setting("dmlab-long-tight", "dmlab_long_prediction", 4),
    Setting("ucf-scene-cut", "ucf101_short_prediction", 4),
)
SCORES = {
    "card": ("ucf-short", "dmlab-long-medium", "ucf-scene-cut"),
    "script": ("ucf-short", "dmlab-long-tight", "ucf-scene-cut"),
}
"""The task's card asks for the medium budget on DMLab, and the script that it runs for the tight one."""

Values = Mapping[str, float]
"""Numbers of one setting, by their names in the benchmark's line."""


def setting_score(values: Values, baselines: Sequence[Values]) -> float:
    """Score of a policy in one setting, from 0 to 1, between the numbers of the baselines there."""
    parts = [
        weight * _term(values[name], [baseline[name] for baseline in baselines], bound)
        for name, (weight, bound) in _TERMS.items()
    ]
    return sum(parts) / sum(weight for weight, _ in _TERMS.values())


def suite_score(scores: Sequence[float]) -> float:
    """Geometric mean of the scores of all settings, none below 0.01; 0 if all are 0."""
    if not any(scores):
        return 0.0
    return math.exp(sum(math.log(max(score, _LEAST)) for score in scores) / len(scores))


def _term(value: float, baselines: Sequence[float], bound: float) -> float:
    sign = 1 if bound > 0 else -1
    worst, best = min(sign * number for number in baselines), max(sign * number for number in baselines)
    span = sign * bound - worst
    if span <= 0:
        return 0.0
    share, best_share = (min(1.0, max(0.0, (number - worst) / span)) for number in (sign * value, best))
    # Where the baselines are alike, as in memory, which depends on the budget alone, there is no power that fits.
    exponent = math.log(_BEST_BASELINE) / math.log(best_share) if 0 < best_share < 1 else 1.0
    return share**exponent


def score_line(policy: str, results: Mapping[str, Mapping[str, Values]]) -> str:
    """The line with a policy's scores, in points of 100: of both variants of the suite, then of every setting.

    Args:
        policy: its name in ``results``.
        results: policy → setting → numbers; the baselines are among them.

    Raises:
        ValueError: if a number is missing.
    """
    for name in (policy, *ANCHORS):
        for setting in SETTINGS:
            if missing := [term for term in _TERMS if term not in results.get(name, {}).get(setting.name, {})]:
                raise ValueError(f"no score of the suite for {policy}: {name} has no {missing[0]} in {setting.name}")
    by_setting = {
        setting.name: setting_score(results[policy][setting.name], [results[name][setting.name] for name in ANCHORS])
        for setting in SETTINGS
    }
    scores = {variant: suite_score([by_setting[name] for name in names]) for variant, names in SCORES.items()}
    points = " ".join(f"{name}={100 * score:.2f}" for name, score in (scores | by_setting).items())
    return f"SUITE_SCORE: policy={policy} {points}"


def made_with(workload: Workload, setting: Setting, num_clips: int, policy_facts: Mapping[str, str]) -> dict[str, object]:
    """What determines the numbers of a run, and under ``machine`` where it was played."""
    facts = record_facts(workload)
    clips: list[list[object]] | str = workload.clips.name
    if isinstance(workload.clips, VideoFolder):
        folder = workload.clips
        places = [folder.place("test", clip_id) for clip_id in range(num_clips)]
        clips = [[path.relative_to(folder.folder).as_posix(), start] for path, start in places]
    return {
        "setting": asdict(setting),
        "policy": policy_facts.get("sha256") or policy_facts.get("source") or "",
        "num_clips": num_clips,
        "clips": clips,
        **{key: value for key, value in facts.items() if key not in _MACHINE},
        "machine": {key: facts[key] for key in _MACHINE},
    }


def record_path(out: Path, policy: str, setting: Setting) -> Path:
    """The file of a policy's run in one setting."""
    return out / quote(policy, safe="") / f"{setting.name}.json"


def load_record(path: Path, facts: Mapping[str, object]) -> BenchmarkScore | None:
    """A run that was recorded before, None if there is none.

    Raises:
        ValueError: if the file is damaged, or if the run was made with anything else.
    """
    if not path.exists():
        return None
    remedy = "choose another folder"
    content = read_json(path, remedy)
    if not isinstance(content, dict) or not isinstance(content.get("made_with"), dict):
        raise ValueError(f"{path} is no record of far-env benchmark; {remedy}")
    for key, value in facts.items():
        if key != "machine" and content["made_with"].get(key) != _as_read(value):
            raise ValueError(f"{path} was made with another value of {key}; {remedy}")
    try:
        score = BenchmarkScore(**content["score"])
        return replace(score, failed={int(clip): reason for clip, reason in score.failed.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no record of far-env benchmark; {remedy}") from error


def save_record(path: Path, facts: Mapping[str, object], score: BenchmarkScore) -> None:
    """Write a run's record, whole or not at all. Raises ValueError if it cannot be written."""
    make_run_dir(path.parent)
    write_json(path, {"line": score.line(), "made_with": facts, "score": asdict(score)})


def _as_read(value: object) -> object:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _as_read(item) for key, item in value.items()}
    return [_as_read(item) for item in value] if isinstance(value, list | tuple) else value
