"""Episodes: rollouts that pause at every decision that can influence a frame; behind the single and the vector environment.

Each row of a batch is begun with a clip, run to its next decision, given a keep mask, run again, and scored at the end.
Observations hold exactly what the benchmark gives a policy, and the signals of the rollout that were requested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import OF_PAIRS, check_signals, newest_within_budget
from far_env.device import torch_defaults, upload
from far_env.envs.rendering import render_workload_episode
from far_env.frame_meta import FEATURES
from far_env.metrics import METRICS, clip_metrics, require_metrics
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.workload import Workload, check_decides

ROW_FEATURES = ("age", "recentness", *FEATURES)
"""Columns of ``observation["frames"]``: age / slots, 1 / (1 + age), and the benchmark's content features, of which
motion_strength m, unbounded in the benchmark, is squashed to m / (1 + m). keyframe_score equals it and is left out."""
MUST_DROP, MUST_KEEP, FREE = 0, 1, 2


@dataclass(frozen=True)
class Reward:
    """The scoring of an episode.

    Attributes:
        weights: metric name to factor; the score is the weighted sum of a clip's metrics.
        telescoping: pay the change of the running clip score at every decision instead of everything at the end. The sum is
            the same.
    """

    weights: dict[str, float]
    telescoping: bool = False

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"a reward needs at least one of the metrics {', '.join(METRICS)}")
        require_metrics(list(self.weights))

    @staticmethod
    def make(reward: str | Mapping[str, float], telescoping: bool = False) -> Reward:
        """Make a reward from a metric's name (lpips counts negatively, lower being better) or a dict of weights."""
        weights = {reward: -1.0 if reward == "lpips" else 1.0} if isinstance(reward, str) else dict(reward)
        return Reward(weights, telescoping)

    def score(self, metrics: dict[str, float]) -> float:
        """The weighted sum."""
        return sum(weight * metrics[name] for name, weight in self.weights.items())


class EpisodeBatch:
    """``num_rows`` episodes of one workload, each with its clip, noise seed and budget.

    Args:
        workload: clips, host and lengths of the rollouts.
        budgets: frames that an episode may be allowed to keep.
        num_rows: episodes in the batch.
        reward: the scoring of the episodes.
        metrics: metrics reported at the end, besides those of the reward.
        memo_bytes: memory for frames that are generated again, see `far_env.rollout.memo.FrameMemo`.
        signals: names of `far_env.contract.SIGNALS` that observations contain as well.

    Raises:
        ValueError: if no decision under one of these budgets can influence a frame, or on an unknown signal.

    Attributes:
        max_frames: per row, the units (frames, or chunks where the host generates these) that its episode may keep.
        decisions: per row, (step, true numbers of the frames that stayed) of every decision of its episode.
        raw_signals: per row, the signals at its last observation, by name: of its frames alone, NaN where there is no value.
        num_slots: rows of an observation and bits of an action, max(n_context, *max_frames) + 1. Histories are
            right-aligned: the newest frame is always in the last slot.
    """

    @torch_defaults()
    def __init__(
        self,
        workload: Workload,
        budgets: Sequence[int],
        num_rows: int,
        reward: Reward,
        metrics: Sequence[str] = (),
        memo_bytes: int = 0,
        signals: Sequence[str] = (),
    ) -> None:
        for budget in budgets:
            check_decides(workload, budget)
        self.workload = workload
        self.max_frames = [workload.max_units(budgets[0])] * num_rows
        self.num_slots = max(workload.context_units, *map(workload.max_units, budgets)) + 1
        self.memo = FrameMemo(memo_bytes)
        self.signals = check_signals(signals)
        self.rollouts = self.new_rollouts(num_rows)
        self.reward = reward
        self.metric_names = tuple(dict.fromkeys([*reward.weights, *metrics]))
        require_metrics(self.metric_names)
        self.splits = ["train"] * num_rows
        self.clips: list[Clip | None] = [None] * num_rows
        self.noise_seeds = [0] * num_rows
        self.decisions: list[list[tuple[int, list[int]]]] = [[] for _ in range(num_rows)]
        self._rewarded = np.zeros(num_rows)
        side = workload.host.frame_size
        self._pixels = torch.zeros(num_rows, workload.num_predict, 3, side, side, device=workload.host.device)
        self._decoded = np.zeros(num_rows, dtype=int)
        self._features = np.zeros((num_rows, self.num_slots, len(FEATURES)), dtype=np.float32)
        self.raw_signals: list[dict[str, np.ndarray]] = [{} for _ in range(num_rows)]

    @property
    def picture_bytes(self) -> int:
        """What the decoded frames of all rows take on the host's device."""
        return self._pixels.nbytes

    def new_rollouts(self, num_rows: int) -> RolloutBatch:
        """The object that generates the frames."""
        return RolloutBatch(self.workload, num_rows, self.memo, self.signals)

    @torch_defaults()
    def begin(
        self,
        rows: Sequence[int],
        splits: Sequence[str],
        clip_ids: Sequence[int],
        noise_seeds: Sequence[int],
        budgets: Sequence[int],
    ) -> None:
        """Put a fresh episode in each row, not yet run. Raises IndexError on a clip id out of range."""
        if not rows:
            return
        clips = [self.workload.clips.clip(split, int(i)) for split, i in zip(splits, clip_ids, strict=True)]
        self.rollouts.begin(rows, clips, noise_seeds)
        for row, split, clip, seed, budget in zip(rows, splits, clips, noise_seeds, budgets, strict=True):
            self.splits[row], self.clips[row], self.noise_seeds[row] = split, clip, int(seed)
            self.max_frames[row] = self.workload.max_units(int(budget))
            self.decisions[row] = []
            self._rewarded[row] = 0.0
            self._decoded[row] = 0

    def retain(self, row: int, action: np.ndarray) -> int:
        """Apply a keep mask (slots,) to a row that awaits a decision; returns how many bits the benchmark's rule changed.

        Bits of padding slots are ignored; the rest follows `newest_within_budget`.
        """
        num_frames = self.rollouts.history_length(row)
        wanted = np.asarray(action[self.num_slots - num_frames :]) > 0
        kept = newest_within_budget(wanted, self.max_frames[row])
        self.rollouts.retain(row, np.flatnonzero(kept).tolist())
        self.decisions[row].append((self.last_step(row), list(self.rollouts.frame_numbers(row))))
        ignored = int((np.asarray(action[: self.num_slots - num_frames]) > 0).sum())
        return int((kept != wanted).sum()) + ignored

    def run(self, rows: Sequence[int]) -> None:
        """Generate frames until every row awaits a decision or has ended."""
        while active := [row for row in rows if not self.ended(row) and not self.awaits_decision(row)]:
            self.rollouts.advance(active)

    def ended(self, row: int) -> bool:
        """Return whether the row has generated all its frames."""
        return self.rollouts.finished(row)

    def awaits_decision(self, row: int) -> bool:
        """Return whether the history is over budget and a frame is still to come.

        A context over budget is first cut after one new frame.
        """
        over = self.rollouts.history_length(row) > self.max_frames[row]
        return over and self.rollouts.step(row) > 0 and not self.ended(row)

    def rewards(self, rows: Sequence[int]) -> tuple[np.ndarray, list[dict[str, float] | None]]:
        """The reward of each row since the last call, and the final metrics of rows that ended (else None)."""
        earned = np.zeros(len(rows))
        finals: list[dict[str, float] | None] = [None] * len(rows)
        by_step: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if self.reward.telescoping or self.ended(row):
                by_step.setdefault(self.rollouts.step(row), []).append(index)
        for done, indices in by_step.items():
            same_step = [rows[index] for index in indices]
            ended = done == self.workload.predict_units
            names = self.metric_names if ended else tuple(self.reward.weights)
            num_frames = self.workload.predicted_frames(done)
            truth = torch.stack([self.truth(row, num_frames) for row in same_step])
            for index, metrics in zip(indices, clip_metrics(self.predicted(same_step), truth, names), strict=True):
                row = rows[index]
                score = self.reward.score(metrics)
                earned[index] = score - self._rewarded[row]
                self._rewarded[row] = score
                if ended:
                    finals[index] = metrics
        return earned, finals

    @torch_defaults()
    def truth(self, row: int, num_predicted: int) -> Tensor:
        """The true frames of the first ``num_predicted`` predicted ones, (num_predicted, 3, H, W) on the host's device."""
        start = self.workload.num_context
        frames = self.clips[row].frames[start : start + num_predicted]
        return upload(torch.from_numpy(frames), self.workload.host.device)

    @torch_defaults()
    def predicted(self, rows: Sequence[int]) -> Tensor:
        """Frames generated so far, decoded, of rows that are at the same step: float32 (R, F, 3, H, W)."""
        done = self.rollouts.step(rows[0])
        for first in np.unique(self._decoded[rows]).tolist():
            outdated = [row for row in rows if self._decoded[row] == first]
            if first < done:
                shown = slice(self.workload.predicted_frames(first), self.workload.predicted_frames(done))
                self._pixels[outdated, shown] = self.rollouts.decode(outdated, first, done).float()
                self._decoded[outdated] = done
        return self._pixels[rows, : self.workload.predicted_frames(done)]

    def observe(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Observations of rows, stacked: frames (R, slots, 6), mask (R, slots), budget (R, 3) and signals, all float32.

        Updates the ``frame_features`` of `info` and `raw_signals` too.
        """
        slots = self.num_slots
        lengths = np.array([self.rollouts.history_length(row) for row in rows])
        frames = np.zeros((len(rows), slots, len(ROW_FEATURES)), dtype=np.float32)
        mask = np.zeros((len(rows), slots), dtype=np.float32)
        ages = np.arange(slots - 1, -1, -1, dtype=np.float32)
        features = self.rollouts.features(rows)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            occupied = slice(slots - length, slots)
            mask[i, occupied] = 1
            frames[i, occupied, 0] = ages[occupied] / slots
            frames[i, occupied, 1] = 1 / (1 + ages[occupied])
            frames[i, occupied, 2:] = features[i, :length]
            self._features[row] = frames[i, :, 2:]
        motion = frames[:, :, -1]
        frames[:, :, -1] = motion / (1 + motion)
        steps = np.array([self.last_step(row) for row in rows])
        allowed = np.array([self.max_frames[row] for row in rows])
        budget = np.stack([allowed / slots, steps / self.workload.predict_units, lengths / slots], axis=1)
        observation = {"frames": frames.clip(0, 1), "mask": mask, "budget": budget.astype(np.float32)}
        if self.signals:
            by_row = self.rollouts.signals(rows)
            for row, signals in zip(rows, by_row, strict=True):
                self.raw_signals[row] = signals
            for name in self.signals:
                observation[name] = np.stack([right_aligned(name, signals[name], slots) for signals in by_row])
        return observation

    @property
    def action_space(self) -> spaces.MultiBinary:
        """The mask of one row: a bit per slot."""
        return spaces.MultiBinary(self.num_slots)

    @property
    def observation_space(self) -> spaces.Dict:
        """The observation of one row, see `observe`."""
        slots = self.num_slots
        signals = {name: spaces.Box(-np.inf, np.inf, self.signal_shape(name), np.float32) for name in self.signals}
        return spaces.Dict(
            {
                "frames": spaces.Box(0.0, 1.0, (slots, len(ROW_FEATURES)), np.float32),
                "mask": spaces.Box(0.0, 1.0, (slots,), np.float32),
                "budget": spaces.Box(0.0, 1.0, (3,), np.float32),
                **signals,
            }
        )

    def signal_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a signal in an observation: one entry per slot, or per pair of slots, and the signal's dimensions."""
        host, slots = self.workload.host, self.num_slots
        dimensions: tuple[int, ...] = ()
        if name == "column_gap":
            dimensions = self.workload.unit_shape[-1:]
        elif name == "key_proto":
            dimensions = (sum(host.transformer.axes_dims_rope),)
        return (slots, *((slots,) if name in OF_PAIRS else ()), *dimensions)

    def action_mask(self, row: int) -> np.ndarray:
        """int8 (slots,): 0 must drop (padding), 1 must keep (the newest frame), 2 free."""
        length = self.rollouts.history_length(row)
        mask = np.full(self.num_slots, FREE, dtype=np.int8)
        mask[: self.num_slots - length] = MUST_DROP
        mask[-1] = MUST_KEEP
        return mask

    def last_step(self, row: int) -> int:
        """The benchmark's ``step``: number of the frame generated last."""
        return self.rollouts.step(row) - 1

    def info(self, row: int) -> dict:
        """The ``info`` of a row, as of the last `observe`.

        ``frame_features`` are the benchmark's content features before any squashing, right-aligned: float32 (slots, 4).
        """
        return {
            "clip_id": self.clips[row].clip_id,
            "noise_seed": self.noise_seeds[row],
            "step": self.last_step(row),
            "total_steps": self.workload.predict_units,
            "max_frames": self.max_frames[row],
            "capacity_mb": self.workload.capacity_mb(self.max_frames[row]),
            "action_mask": self.action_mask(row),
            "kept_frames": list(self.rollouts.frame_numbers(row)),
            "frame_features": self._features[row].copy(),
        }

    def picture(self, row: int) -> np.ndarray:
        """A row's episode so far, uint8 (height, width, 3) in one size for all episodes of the workload."""
        clip = self.clips[row].frames[: self.workload.num_frames]
        return render_workload_episode(self.workload, clip, self.predicted([row])[0].cpu().numpy(), self.decisions[row])

    def state_dict(self) -> dict:
        """The rows as tensors and plain values."""
        clip_ids = [None if clip is None else clip.clip_id for clip in self.clips]
        return {
            "rollouts": self.rollouts.state_dict(),
            "splits": list(self.splits),
            "clip_ids": clip_ids,
            "noise_seeds": list(self.noise_seeds),
            "max_frames": list(self.max_frames),
            "decisions": [list(decisions) for decisions in self.decisions],
            "rewarded": self._rewarded.tolist(),
        }

    @torch_defaults()
    def load_state_dict(self, state: dict) -> None:
        """Restore rows saved by `state_dict`; clips are loaded again, pixels decoded again when needed."""
        self.rollouts.load_state_dict(state["rollouts"])
        self.splits, self.noise_seeds = list(state["splits"]), list(state["noise_seeds"])
        self.max_frames = list(state["max_frames"])
        ids = zip(state["splits"], state["clip_ids"], strict=True)
        self.clips = [None if clip_id is None else self.workload.clips.clip(split, clip_id) for split, clip_id in ids]
        self.decisions = [[(step, list(kept)) for step, kept in decisions] for decisions in state["decisions"]]
        self._rewarded = np.array(state["rewarded"])
        self._decoded[:] = 0


def right_aligned(name: str, signal: np.ndarray, slots: int) -> np.ndarray:
    """A signal of n frames in an array of so many slots, float32: zero on padding and in place of NaN."""
    frames = slice(slots - len(signal), slots)
    pairs = name in OF_PAIRS
    aligned = np.zeros((slots, slots, *signal.shape[2:]) if pairs else (slots, *signal.shape[1:]), dtype=np.float32)
    aligned[(frames, frames) if pairs else frames] = np.nan_to_num(signal)
    return aligned
