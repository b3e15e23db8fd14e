"""Results folders made up for reports: every number comes from a seed, every plan is one that its budget allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.records import Record, Results, Settings
from far_env.evaluation.results_folder import Recorder

NASTY = '<img src="x" onerror="alert(1)"></script>&amp;'

GAINS = {"recent_fill": 0.0, "learned": 6.0, "uniform": 3.0, NASTY: -2.0}


@dataclass
class MadeUp:
    """The content of the folder; ``policies`` name → gain in dB over the mean of 20."""

    workloads: dict[str, tuple[int, int]] = field(default_factory=lambda: {"pan": (3, 6), "cuts": (2, 4)})
    budgets: tuple[int, ...] = (2, 4)
    policies: dict[str, float] = field(default_factory=lambda: dict(GAINS))
    seeds: tuple[int, ...] = (42, 7)
    clips: int = 5
    show_clips: int = 2
    size: int = 12
    unseen: tuple[str, ...] = (NASTY,)
    families: tuple[str, ...] = ("recency", "learned", "anchor")


def make_results(folder: Path, made: MadeUp | None = None) -> Results:
    """Write such a folder; policies in ``unseen`` have no pictures."""
    made = made or MadeUp()
    facts_of_policies = {
        name: {"family": made.families[i % len(made.families)], "tier": "MLA"[i % 3], "source": f"arXiv 2500.{i:05}"}
        for i, name in enumerate(made.policies)
    }
    settings = Settings(
        workloads=list(made.workloads),
        budgets=[*made.budgets, UNLIMITED_FRAMES],
        policies={**facts_of_policies, "full_history": {"family": "reference"}},
        seeds=list(made.seeds),
        split="test",
        clips=list(range(made.clips)),
        metrics=["psnr", "ssim"],
        unavailable={"lpips": "LPIPS needs weights <that> are not here"},
        num_context={name: context for name, (context, _) in made.workloads.items()},
        num_predict={name: predict for name, (_, predict) in made.workloads.items()},
        frame_size=dict.fromkeys(made.workloads, made.size),
        show_clips=made.show_clips,
        made_with={name: {"weights": "c0ffee00"} for name in made.workloads},
    )
    recorder = Recorder(folder, settings)
    recorder.add(_records(made))
    for record in recorder.results.records:
        context, predict = made.workloads[record.workload]
        if record.clip < made.show_clips and record.policy not in made.unseen:
            truth = _frames(made.size, context + predict, record.clip)
            recorder.save_picture(recorder.results.truth_picture(record.workload, record.clip), truth)
            noise = np.random.default_rng(len(record.policy)).normal(0, 0.1, truth[context:].shape)
            recorder.save_picture(recorder.results.picture(record), (truth[context:] + noise).clip(0, 1))
    recorder.close()
    return recorder.results


def _records(made: MadeUp) -> Iterator[Record]:
    rng, gap_rng = np.random.default_rng(0), np.random.default_rng(1)
    for workload, (context, predict) in made.workloads.items():
        gaps = [[int(gap) or None for gap in gap_rng.integers(0, 8, predict)] for _ in range(made.clips)]
        hardness = rng.normal(0, 4, made.clips)
        for budget in (*made.budgets, UNLIMITED_FRAMES):
            for name, gain in (made.policies if budget < UNLIMITED_FRAMES else {"full_history": 12.0}).items():
                for clip in range(made.clips):
                    for seed in made.seeds:
                        level = 20 + gain + hardness[clip] + np.log2(min(budget, 64)) + rng.normal(0, 1)
                        by_frame = level - 0.5 * np.arange(predict) + rng.normal(0, 0.5, predict)
                        facts = {"host": "made_up", "weights": "c0ffee00", "ode_steps": 3, "dtype": "float32", "device": "cpu"}
                        yield Record(
                            workload=workload,
                            budget=budget,
                            policy=name,
                            clip=clip,
                            seed=seed,
                            plan=_plan(rng, context, predict, budget),
                            metrics={"psnr": float(by_frame.mean()), "ssim": float(np.tanh(by_frame.mean() / 30))},
                            psnr_per_frame=by_frame.tolist(),
                            decision_ms=None if budget >= UNLIMITED_FRAMES else 0.25,
                            clip_sha256="0" * 16,
                            latents_sha256="0" * 16,
                            facts={**facts, "commit": "abc1234", "versions": {"torch": "2.9"}},
                            evidence_gaps=gaps[clip],
                        )


def _plan(rng: np.random.Generator, context: int, predict: int, budget: int) -> list[dict]:
    """Random choices; the oldest frame that stays is demoted."""
    history, plan = list(range(context)), []
    for step in range(predict - 1):
        history.append(context + step)
        if len(history) > budget:
            old = rng.choice(history[:-1], size=budget - 1, replace=False).tolist()
            history = sorted([*old, context + step])
            demoted = history[: budget > 1]
            plan.append({"step": step, "kept": [i for i in history if i not in demoted], "demoted": demoted})
    return plan


def _frames(size: int, num_frames: int, clip: int) -> np.ndarray:
    """A bright square that moves over a grey ground, float64 (T, 3, size, size)."""
    frames = np.full((num_frames, 3, size, size), 0.3)
    for i, frame in enumerate(frames):
        frame[clip % 3, 2:6, i % (size - 3) : i % (size - 3) + 3] = 1
    return frames
