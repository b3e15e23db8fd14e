"""What a training run will do, counted before it starts: clips, rollouts, frames and decisions of every stage.

All of it follows from the settings: how many frames an episode generates and drops does not depend on which it drops.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import gymnasium as gym

from far_env.agents.collection import BATCH_SIZE
from far_env.agents.expert import LAST_EVICTIONS, OTHER_EVICTIONS
from far_env.agents.expert_data import CALLS_PER_ROLLOUT
from far_env.agents.histories import uses_true_frames
from far_env.agents.imitation import Part, planned_parts
from far_env.agents.ppo import PPOStage
from far_env.agents.surrogate import MEMO_BYTES, SurrogateVectorEnv, comparison_bytes
from far_env.agents.trainer import Run
from far_env.contract import UNLIMITED_FRAMES
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.policies import load_policy
from far_env.workload import Workload, deciding_budgets


@dataclass
class Counts:
    """What is done with one workload in one stage.

    Attributes:
        clips_encoded: clips whose frames are encoded, counted as often as that happens; frames_encoded: of these.
        compared: clips of which every two frames are compared.
        rollouts: begun, of true frames or of the host.
        frames: budget → frames that the host generates; `UNLIMITED_FRAMES` for full history.
        frames_decoded: generated frames that become pixels.
        calls: in which the scorer decides.
        decisions: single evictions that are learned from.
    """

    clips_encoded: int = 0
    frames_encoded: int = 0
    compared: int = 0
    rollouts: int = 0
    frames: Counter[int] = field(default_factory=Counter)
    frames_decoded: int = 0
    calls: int = 0
    decisions: int = 0

    @property
    def frames_generated(self) -> int:
        """Under all budgets."""
        return sum(self.frames.values())


@dataclass
class StageCounts:
    """A stage: its counts by workload, and the passes over decisions (forward and backward) that it learns with."""

    name: str
    by_workload: dict[str, Counts]
    passes: int = 0

    def total(self, name: str) -> int:
        """The sum of one of the counts over the workloads."""
        return sum(getattr(counts, name) for counts in self.by_workload.values())


@dataclass(frozen=True)
class Episode:
    """The course of an episode, which is the same whatever is dropped.

    Attributes:
        before: frames that are generated before the first decision.
        first_cut: frames that the first decision drops; each later one drops one.
        evictions: in all decisions that can influence a frame.
        calls: these decisions.
    """

    before: int
    first_cut: int
    evictions: int
    calls: int

    @staticmethod
    def of(workload: Workload, budget: int) -> Episode:
        """Of one workload under one budget that leaves something to decide."""
        before = max(1, budget - workload.num_context + 1)
        first_cut = workload.num_context + before - budget
        later = workload.num_predict - 1 - before
        return Episode(before, first_cut, first_cut + later, 1 + later)

    @property
    def recorded(self) -> int:
        """Decisions of imitation that are recorded."""
        of_others = min(self.calls, CALLS_PER_ROLLOUT) - 1
        return min(LAST_EVICTIONS + OTHER_EVICTIONS, self.first_cut) + of_others


def run_counts(run: Run, envs: dict[str, list[FrameRetentionVectorEnv]], planned: Sequence[PPOStage]) -> list[StageCounts]:
    """The counts of all stages of a run, of validation, and of the final table.

    Args:
        envs: of each stage of PPO by its name, made by `PPOStage.make_envs`.
        planned: these stages, in order.
    """
    counted = list(imitation_counts(run))
    for stage in planned:
        counted += [ppo_counts(stage, envs[stage.name]), validation_counts(run, stage)]
    return [*counted, table_counts(run)]


def imitation_counts(run: Run) -> Iterator[StageCounts]:
    """A stage for the expert's decisions and one for each round."""
    settings, learned_from = run.config.imitation, 0
    planned = planned_parts(settings, run.workloads, run.budgets, seed=run.config.seed, num_clips=run.config.train_clips)
    for number, parts in enumerate(planned):
        if not parts:
            continue
        stage = StageCounts(f"imitation, {parts[0].kind}", {})
        for part in parts:
            stage.by_workload[part.workload.name] = _part_counts(part, run.config.network.signals)
        learned_from += stage.total("decisions")
        stage.passes = learned_from * (settings.round_epochs if number or settings.start else settings.epochs)
        yield stage


def _part_counts(part: Part, signals: Sequence[str]) -> Counts:
    workload, counts = part.workload, Counts(rollouts=len(part.clip_ids))
    for first in range(0, len(part.clip_ids), BATCH_SIZE):
        counts.compared += len(set(part.clip_ids[first : first + BATCH_SIZE]))
    counts.clips_encoded, counts.frames_encoded = counts.compared, counts.compared * workload.num_frames
    generates = not part.true_frames and not uses_true_frames(workload, signals)
    if generates:
        given = workload.num_frames if workload.true_feedback else workload.num_context
        counts.clips_encoded += counts.rollouts
        counts.frames_encoded += counts.rollouts * given
    for budget in part.budgets:
        episode = Episode.of(workload, budget)
        counts.decisions += episode.recorded
        counts.calls += 0 if part.kind == "expert" else episode.calls
        if generates:
            counts.frames[budget] += workload.num_predict - 1
    return counts


def updates_of(stage: PPOStage) -> int:
    """Updates of a stage of PPO."""
    return math.ceil(stage.settings.total_timesteps / (stage.settings.num_envs * stage.settings.n_steps))


def ppo_counts(stage: PPOStage, envs: Sequence[FrameRetentionVectorEnv]) -> StageCounts:
    """Play the stage's episodes without frames: which clips and budgets are drawn follows from the seed."""
    steps, first_row, by_workload = updates_of(stage) * stage.settings.n_steps, 0, {}
    for env in envs:
        workload, counts = env.episodes.workload, Counts()
        is_surrogate = isinstance(env, SurrogateVectorEnv)
        begun: list[tuple[int, int, int]] = []
        for row in range(env.num_envs):
            rng = gym.utils.seeding.np_random(stage.config.seed + first_row + row)[0]
            done = 0
            while True:
                clip_id, _, budget = env.config.draw(rng, workload)
                begun.append((done, row, clip_id))
                episode = Episode.of(workload, budget)
                left = min(steps - done, episode.evictions)
                calls = max(0, 1 + left - episode.first_cut)
                frames = episode.before + calls
                ended = left == episode.evictions
                counts.rollouts += 1
                counts.calls += calls
                if not is_surrogate:
                    counts.frames[budget] += frames
                    counts.frames_decoded += frames if (calls if stage.config.reward.telescoping else ended) else 0
                done += left
                if not ended:
                    break
        counts.decisions = steps * env.num_envs
        if is_surrogate:
            counts.compared = _not_remembered([clip for _, _, clip in sorted(begun)], MEMO_BYTES // comparison_bytes(workload))
            counts.clips_encoded, counts.frames_encoded = counts.compared, counts.compared * workload.num_frames
        else:
            counts.clips_encoded = counts.rollouts
            given = workload.num_frames if workload.true_feedback else workload.num_context
            counts.frames_encoded = counts.rollouts * given
        by_workload[workload.name] = counts
        first_row += env.num_envs
    decisions = sum(counts.decisions for counts in by_workload.values())
    return StageCounts(stage.name, by_workload, decisions * stage.settings.n_epochs)


def validation_counts(run: Run, stage: PPOStage) -> StageCounts:
    """All validations of a stage of PPO."""
    times = math.ceil(updates_of(stage) / run.config.validate_every) + 1
    by_workload = {}
    for workload in stage.chosen_workloads:
        deciding = deciding_budgets(workload, run.budgets)
        counts = Counter({b: len(range(run.config.validation_clips)[i :: len(deciding)]) for i, b in enumerate(deciding)})
        by_workload[workload.name] = _evaluated(workload, Counter({b: times * count for b, count in counts.items()}))
    return StageCounts(f"{times} validations", by_workload)


def table_counts(run: Run) -> StageCounts:
    """The final table and the picture of one clip; frames that policies share are counted for each of them."""
    by_workload = {}
    limited = 1 + sum(load_policy(name) is not None for name in run.config.table)
    for workload in run.workloads:
        deciding = deciding_budgets(workload, run.budgets)
        clips = Counter({budget: run.config.test_clips * limited for budget in deciding})
        clips[UNLIMITED_FRAMES] = run.config.test_clips * len(deciding) * (1 + len(run.config.table) - limited)
        counts = _evaluated(workload, clips)
        counts.clips_encoded = run.config.test_clips * len(deciding)
        counts.calls //= limited
        if workload is run.workloads[0]:
            picture = _evaluated(workload, Counter({deciding[0]: 2}))
            counts.frames += picture.frames
            for name in ("clips_encoded", "rollouts", "frames_decoded"):
                setattr(counts, name, getattr(counts, name) + getattr(picture, name))
        given = workload.num_frames if workload.true_feedback else workload.num_context
        counts.frames_encoded = counts.clips_encoded * given
        by_workload[workload.name] = counts
    return StageCounts("table", by_workload)


def _evaluated(workload: Workload, clips: Counter[int]) -> Counts:
    """Rollouts of so many clips under each budget by `far_env.evaluation.evaluate.evaluate`, each with its context encoded."""
    total = sum(clips.values())
    given = workload.num_frames if workload.true_feedback else workload.num_context
    return Counts(
        clips_encoded=total,
        frames_encoded=total * given,
        rollouts=total,
        frames=Counter({budget: count * workload.num_predict for budget, count in clips.items() if count}),
        frames_decoded=total * workload.num_predict,
        calls=sum(Episode.of(workload, b).calls * count for b, count in clips.items() if b != UNLIMITED_FRAMES),
    )


def _not_remembered(clip_ids: Sequence[int], capacity: int) -> int:
    """How many of these clips are not among the last ``capacity`` different ones when they are used."""
    memory: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for clip_id in clip_ids:
        missed += clip_id not in memory
        memory[clip_id] = None
        memory.move_to_end(clip_id)
        if len(memory) > max(capacity, 0):
            memory.popitem(last=False)
    return missed
