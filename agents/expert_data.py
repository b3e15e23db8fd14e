"""Calls of a policy with the costs of dropping each frame, collected in rollouts of train clips or from their true frames.

What is stored are the calls themselves, so that the network's inputs are made from them by `far_env.agents.observation`, as
they are when a policy acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.graph_batches import Scores
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import FrameGraph, signal_arrays
from far_env.agents.oracle import Coverage
from far_env.clips.clip import Clip
from far_env.frame_meta import frame_features
from far_env.latent_cells import cell_distances
from far_env.progress import show_progress
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.signals import column_gaps, latent_cosines
from far_env.tensor_files import save_weights
from far_env.workloads import Workload

LAST_EVICTIONS, OTHER_EVICTIONS = 4, 4
"""Evictions that are recorded where a call drops more: the last ones, which cost most, and as many others, chosen at random."""
CALLS_PER_ROLLOUT = 4
"""Calls whose evictions are recorded: the first of a rollout, and others chosen at random."""
EXPLORATION_PROBABILITY = 0.15
"""Share of evictions from true frames in which a random frame is dropped, not the cheapest, so that histories vary."""
BATCH_SIZE = 32
"""Rollouts that are played together."""
COST_FLOOR = 0.01
"""Error that any host leaves, as a share of the clip's variance."""


@dataclass(frozen=True)
class ExpertData:
    """Calls of policies in R rollouts of one workload, and D single evictions in them with what they cost.

    Attributes:
        rollout: int64 (K,), of each call; the calls of a rollout follow one another.
        step: int64 (K,), the benchmark's step. length: int64 (K,), frames in the history.
        features: float32 (K, slots, 4), as `far_env.frame_meta.frame_features`; here and below frames come first, then padding.
        frame_signals: float32 (K, slots, F), pair_signals: float32 (K, slots, slots, P).
        kept: bool (K, slots), the frames that stayed.
        max_frames: int64 (R,), the budget. total_steps: int64 (1,).
        similarity: float16 (R, T, T), how well the content of true frame i could be copied from true frame j, between 0 and 1.
        call: int64 (D,). remaining: bool (D, slots), frames of the call that were not dropped yet.
        costs: float32 (D, slots), the logarithm of the error to be expected where this frame is dropped next; infinite where
            it cannot be.
    """

    rollout: Tensor
    step: Tensor
    length: Tensor
    features: Tensor
    frame_signals: Tensor
    pair_signals: Tensor
    kept: Tensor
    max_frames: Tensor
    total_steps: Tensor
    similarity: Tensor
    call: Tensor
    remaining: Tensor
    costs: Tensor

    def __len__(self) -> int:
        return len(self.call)

    @staticmethod
    def join(parts: Sequence[ExpertData]) -> ExpertData:
        """All of them, of one workload."""
        offsets = {"rollout": 0, "call": 0}
        pieces: dict[str, list[Tensor]] = {field.name: [] for field in fields(ExpertData)}
        for part in parts:
            for name, values in vars(part).items():
                pieces[name].append(values + offsets[name] if name in offsets else values)
            offsets = {"rollout": offsets["rollout"] + len(part.max_frames), "call": offsets["call"] + len(part.step)}
        pieces["total_steps"] = pieces["total_steps"][:1]
        return ExpertData(**{name: torch.cat(values) for name, values in pieces.items()})


class Histories(Protocol):
    """The part of `far_env.rollout.engine.RolloutBatch` that collecting uses."""

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next frame of each row."""

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), padded at the end, and lengths (R,)."""

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of kept histories, (R, K, 4)."""

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Signals of each row's history, by name."""

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""


class TrueHistories:
    """Histories of true frames, for use without a host; see `Histories`.

    Args:
        latents: of whole clips (R, T, C, h, w).
        num_context: frames that each history begins with.
    """

    SIGNALS = ("lat_cos", "column_gap")
    """The `far_env.contract.SIGNALS` of true frames; all others are recorded while a host generates a frame."""

    def __init__(self, latents: Tensor, num_context: int) -> None:
        self.latents = latents
        self.num_context = num_context
        self.kept = [list(range(num_context)) for _ in latents]
        self.next = [num_context] * len(latents)

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next true frame of each row."""
        for row in rows:
            self.kept[row].append(self.next[row])
            self.next[row] += 1

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""
        return len(self.kept[row])

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, padded with zeros at the end, and lengths (R,)."""
        histories = [self.latents[row, self.kept[row]] for row in rows]
        lengths = torch.tensor([len(history) for history in histories], device=self.latents.device)
        return torch.nn.utils.rnn.pad_sequence(histories, batch_first=True), lengths

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos and column_gap of each row's history."""
        per_history = []
        for row in rows:
            history = self.latents[row, self.kept[row]][None]
            per_history.append({"lat_cos": latent_cosines(history)[0], "column_gap": column_gaps(history)[0]})
        return [{name: value.float().cpu().numpy() for name, value in signals.items()} for signals in per_history]

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""
        self.kept[row] = [self.kept[row][i] for i in ids]


def uses_true_frames(workload: Workload, signals: Sequence[str]) -> bool:
    """Whether true frames are fed back and no signal is the host's: generating frames would change nothing that is recorded."""
    return workload.true_feedback and set(signals) <= set(TrueHistories.SIGNALS)


def check_true_signals(signals: Sequence[str]) -> None:
    """Raise ValueError on signals that only rollouts of a host have."""
    if not set(signals) <= set(TrueHistories.SIGNALS):
        raise ValueError("true frames have no signals but lat_cos and column_gap")


def true_frames(workload: Workload, clip: Clip) -> Tensor:
    """The clip's frames that correspond to a rollout's, (T, 3, H, W), on the host's device."""
    return torch.from_numpy(clip.frames[: workload.num_frames]).to(workload.host.device)


@dataclass(frozen=True)
class Batch:
    """Rollouts of one workload that are played together.

    Attributes:
        first: the row of the first of them among all that are collected, which their random numbers depend on.
        slots: as in `ExpertData`. seed, config, true_frames: as in `collect`.
    """

    first: int
    clip_ids: tuple[int, ...]
    budgets: tuple[int, ...]
    slots: int
    seed: int
    config: NetworkConfig
    true_frames: bool


BatchPlayer = Callable[[Workload, Sequence[Batch], RetentionNetwork | None], Iterator[tuple[Batch, ExpertData]]]
"""Plays batches of a workload and hands out each with its decisions, in any order."""


@torch.no_grad()
def play_batch(workload: Workload, batch: Batch, actor: RetentionNetwork | None) -> ExpertData:
    """The decisions of a batch; see `collect`."""
    rows = range(batch.first, batch.first + len(batch.clip_ids))
    recorder = _Recorder(batch.slots, [np.random.default_rng((batch.seed, row, 8)) for row in rows])
    return _play(workload, batch.clip_ids, batch.budgets, actor, batch.config, batch.true_frames, recorder)


def play_here(
    workload: Workload, batches: Sequence[Batch], actor: RetentionNetwork | None
) -> Iterator[tuple[Batch, ExpertData]]:
    """Play batches in this process, one after the other; a `BatchPlayer`."""
    for batch in batches:
        yield batch, play_batch(workload, batch, actor)


def collect(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    *,
    actor: RetentionNetwork | None,
    config: NetworkConfig,
    true_frames: bool,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    player: BatchPlayer = play_here,
    parts: Path | None = None,
) -> ExpertData:
    """Roll train clips out and record, at every decision that matters, what dropping each frame would cost.

    Every rollout has random numbers of its own, so that ``batch_size`` changes none of them.

    Args:
        clip_ids: of the train split; a clip may come more than once.
        budgets: one per clip.
        actor: the scorer that decides; None lets the expert decide, which drops the frame that costs least, sometimes a random
            one (`EXPLORATION_PROBABILITY`).
        config: whose signals are recorded.
        true_frames: use the clip's frames in place of generated ones, which is much faster, and nearly what a policy observes
            while the right frames are kept.
        player: plays the batches; the decisions do not depend on where.
        parts: a folder in which finished batches are kept, so that a stopped collection goes on; whoever calls removes it.

    Raises:
        ValueError: if ``true_frames`` is combined with signals that only rollouts have.
    """
    if true_frames:
        check_true_signals(config.signals)
    slots = max(workload.num_context, *budgets) + 1
    ids, limits, shared = tuple(clip_ids), tuple(budgets), (slots, seed, config, true_frames)
    starts = range(0, len(ids), batch_size)
    batches = [Batch(first, ids[first : first + batch_size], limits[first : first + batch_size], *shared) for first in starts]
    found: dict[int, ExpertData] = {}
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
        paths = {batch.first: parts / f"{batch.first:08d}.safetensors" for batch in batches}
        found = {first: load_expert_data(path) for first, path in paths.items() if path.exists()}
    description = f"collect decisions in {'true clips' if true_frames else 'rollouts'}"
    with show_progress(total=len(clip_ids), description=description, unit="clips", disable=not progress) as bar:
        bar.update(sum(len(found[first].max_frames) for first in found))
        missing = [batch for batch in batches if batch.first not in found]
        for batch, data in player(workload, missing, actor) if missing else ():
            found[batch.first] = data
            if parts is not None:
                save_weights(vars(data), paths[batch.first])
            bar.set_postfix(decisions=f"{sum(map(len, found.values())):,}")
            bar.update(len(batch.clip_ids))
    return ExpertData.join([found[batch.first] for batch in batches])


def load_expert_data(path: Path) -> ExpertData:
    """Read collected decisions. Raises ValueError if the file is damaged."""
    try:
        return ExpertData(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to collect it again") from error


class _Recorder:
    """Collects the fields of `ExpertData`.

    Args:
        slots: rows of its arrays.
        generators: random numbers of each rollout.
    """

    def __init__(self, slots: int, generators: Sequence[np.random.Generator]) -> None:
        self.slots, self.generators = slots, generators
        self.calls: list[tuple] = []
        self.decisions: list[tuple] = []

    def padded(self, values: np.ndarray, axes: int, fill: float = 0.0) -> np.ndarray:
        """An array whose first axes are as long as there are slots."""
        width = [(0, self.slots - values.shape[axis] if axis < axes else 0) for axis in range(values.ndim)]
        return np.pad(values, width, constant_values=fill)

    def call(self, row: int, step: int, features: np.ndarray, signals: tuple, kept: np.ndarray) -> None:
        """Record a call and the frames that stayed."""
        count = len(features)
        frame = np.stack([*signals[0], np.zeros(count)], axis=-1)[..., :-1].astype(np.float32)
        pair = np.stack([*signals[1], np.zeros((count, count))], axis=-1)[..., :-1].astype(np.float32)
        padded = self.padded(features, 1), self.padded(frame, 1), self.padded(pair, 2), self.padded(kept, 1)
        self.calls.append((row, step, count, *padded))

    def decision(self, call: int, remaining: np.ndarray, costs: np.ndarray) -> None:
        """Record an eviction in a call, which may be recorded later."""
        self.decisions.append((call, self.padded(remaining, 1), self.padded(costs.astype(np.float32), 1, np.inf)))

    def data(self, max_frames: Sequence[int], total_steps: int, similarity: np.ndarray) -> ExpertData:
        """All of it, with the calls and the decisions of a rollout one after the other."""
        rollout, step, length, features, frame, pair, kept = (np.stack(column) for column in zip(*self.calls, strict=True))
        order = np.argsort(rollout, kind="stable")
        call, remaining, costs = (np.stack(column) for column in zip(*self.decisions, strict=True))
        recorded = np.isin(call, _some_calls(rollout, self.generators))
        call, remaining, costs = call[recorded], remaining[recorded], costs[recorded]
        decided = np.argsort(rollout[call], kind="stable")
        call, remaining, costs = call[decided], remaining[decided], costs[decided]
        columns = [column[order] for column in (rollout, step, length, features, frame, pair, kept)]
        shared = np.array(max_frames), np.array([total_steps]), similarity
        return ExpertData(*map(torch.from_numpy, (*columns, *shared, np.argsort(order)[call], remaining, costs)))


def _some_calls(rollouts: np.ndarray, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Indices of at most `CALLS_PER_ROLLOUT` calls of each rollout: its first, and others chosen by its generator."""
    chosen = []
    for rollout, rng in enumerate(generators):
        first, *others = np.flatnonzero(rollouts == rollout)
        chosen += [first, *rng.permutation(others)[: CALLS_PER_ROLLOUT - 1]]
    return np.array(chosen)


def _play(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    actor: RetentionNetwork | None,
    config: NetworkConfig,
    use_true_frames: bool,
    recorder: _Recorder,
) -> ExpertData:
    """Decisions about some clips, which are played in one batch."""
    unique = list(dict.fromkeys(clip_ids))
    clip_of_row = [unique.index(clip_id) for clip_id in clip_ids]
    clips = [workload.clips.clip("train", clip_id) for clip_id in unique]
    host, context, steps = workload.host, workload.num_context, workload.num_predict
    frames = torch.stack([true_frames(workload, clip) for clip in clips])
    latents = host.autoencoder.encode(frames.to(host.dtype)).float()
    histories: Histories
    if use_true_frames or uses_true_frames(workload, config.signals):
        histories = TrueHistories(latents[clip_of_row], context)
    else:
        histories = RolloutBatch(workload, len(clip_ids), signals=config.signals)
        seeds = [BENCHMARK_SEED + clip_id for clip_id in clip_ids]
        histories.begin(range(len(clip_ids)), [clips[index] for index in clip_of_row], seeds)
    expert = _Expert(latents, clip_of_row, context, isinstance(histories, TrueHistories))
    graphs = [FrameGraph(config.dropped_frames) for _ in clip_ids]
    rows = range(len(clip_ids))
    for step in range(steps - 1):
        histories.advance(rows)
        expert.see(histories)
        full = [row for row in rows if histories.history_length(row) > budgets[row]]
        if not full:
            continue
        features = histories.features(full)
        by_name = histories.signals(full) if config.signals else [{}] * len(full)
        signals = [signal_arrays(of_row, config.signals) for of_row in by_name]
        for index, row in enumerate(full):
            graphs[row].observe_frames(features[index, : histories.history_length(row)], step, *signals[index])
        situations = [(graphs[row], budgets[row], steps - step - 1) for row in full]
        scores = None if actor is None else Scores(actor, situations)
        remaining = _evict(recorder, expert, scores, full, graphs, [budgets[row] for row in full], step)
        for index, (row, stays) in enumerate(zip(full, remaining, strict=True)):
            kept = np.flatnonzero(stays).tolist()
            recorder.call(row, step, features[index, : len(stays)], signals[index], stays)
            histories.retain(row, kept)
            graphs[row].keep(kept)
    return recorder.data(budgets, steps, expert.similarity)


def _evict(
    recorder: _Recorder,
    expert: _Expert,
    scores: Scores | None,
    full: Sequence[int],
    graphs: Sequence[FrameGraph],
    budgets: Sequence[int],
    step: int,
) -> list[np.ndarray]:
    """Drop frames one by one until every history fits; record some of the decisions. Returns masks of the frames that stay."""
    covers = [expert.cover(row, graphs[row].births, step) for row in full]
    remaining = [np.ones(len(graphs[row].births), dtype=bool) for row in full]
    sizes = [np.arange(budget + 1, len(stays) + 1) for budget, stays in zip(budgets, remaining, strict=True)]
    generators = [recorder.generators[row] for row in full]
    recorded = [
        {*choices[:LAST_EVICTIONS].tolist(), *rng.permutation(choices[LAST_EVICTIONS:])[:OTHER_EVICTIONS].tolist()}
        for rng, choices in zip(generators, sizes, strict=True)
    ]
    first_call = len(recorder.calls)
    while any(stays.sum() > budget for stays, budget in zip(remaining, budgets, strict=True)):
        chosen = None if scores is None else scores.lowest(remaining)
        for index, row in enumerate(full):
            stays, rng = remaining[index], generators[index]
            left = np.flatnonzero(stays)
            if len(left) <= budgets[index]:
                continue
            costs = np.full(len(stays), np.inf)
            costs[left[:-1]] = expert.log_error(row, covers[index].costs_without(left)[:-1])
            if len(left) in recorded[index]:
                recorder.decision(first_call + index, stays.copy(), costs)
            if chosen is not None:
                stays[chosen[index]] = False
            elif rng.random() < EXPLORATION_PROBABILITY:
                stays[rng.choice(left[:-1])] = False
            else:
                stays[costs.argmin()] = False
    return remaining


class _Expert:
    """Knows the true rest of the clips, and so what dropping a frame costs.

    Args:
        latents: of whole clips (C, T, C, h, w), each clip once.
        clip: of each row, the index of its clip.
        context: frames that are given.
        true_frames: whether histories consist of true frames.
    """

    def __init__(self, latents: Tensor, clip: Sequence[int], context: int, true_frames: bool) -> None:
        self.clip, self.context, self.true_frames = list(clip), context, true_frames
        self.truth = latents[:, context:]
        num_steps = self.truth.shape[1]
        self.unit = (latents.flatten(1).var(dim=1) * latents[0, 0].numel() * num_steps).tolist()
        between = cell_distances(latents, latents)
        mean = between.mean(dim=-1)
        similarity = torch.exp(-mean / mean.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12))
        self.similarity = similarity.half().cpu().numpy()[self.clip]
        coming = range(context, latents.shape[1])
        self.missing = torch.stack([between[:, frame, frame - 1] for frame in coming], dim=1).cpu().numpy()
        if true_frames:
            self.distances = between[:, context:].transpose(1, 2).cpu().numpy()
        else:
            self.distances = np.zeros((len(clip), latents.shape[1], *self.missing.shape[1:]), dtype=np.float32)
            self.num_seen = 0

    def see(self, histories: Histories) -> None:
        """Compare the newest frame of each row, at first also those before it, with the coming frames."""
        if self.true_frames:
            return
        kept, lengths = histories.history(range(len(self.clip)))
        if self.num_seen:
            kept = torch.stack([history[length - 1 : length] for history, length in zip(kept, lengths, strict=True)])
        found = cell_distances(self.truth[self.clip], kept).transpose(1, 2).cpu().numpy()
        self.distances[:, self.num_seen : self.num_seen + found.shape[1]] = found
        self.num_seen += found.shape[1]

    def cover(self, row: int, births: Sequence[int], step: int) -> Coverage:
        """How well these frames cover what comes after a step."""
        distances = self.distances[self.clip[row] if self.true_frames else row]
        coming = distances[list(births), step + 1 :].reshape(len(births), -1)
        return Coverage(self.missing[self.clip[row], step + 1 :].ravel(), coming)

    def log_error(self, row: int, costs: np.ndarray) -> np.ndarray:
        """The logarithm of the expected error of a rollout, from a cost of `Coverage`."""
        return np.log(costs / self.unit[self.clip[row]] + COST_FLOOR)
