"""Collecting of decisions for imitation: rollouts of train clips, or their true frames, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from far_env.agents import token_expert
from far_env.agents.config import TOKENS, NetworkConfig
from far_env.agents.expert import play_with_expert
from far_env.agents.expert_data import ExpertData, Recorder, load_expert_data
from far_env.agents.histories import check_true_signals
from far_env.agents.network import RetentionNetwork
from far_env.agents.token_expert import play_tokens_with_expert
from far_env.progress import show_progress
from far_env.tensor_files import save_weights
from far_env.workload import Workload

BATCH_SIZE = 32
"""Rollouts that are played together."""


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


def play_batch(workload: Workload, batch: Batch, actor: RetentionNetwork | None) -> ExpertData:
    """The decisions of a batch; see `collect`."""
    rows = range(batch.first, batch.first + len(batch.clip_ids))
    generators = [np.random.default_rng((batch.seed, row, 8)) for row in rows]
    if batch.config.memory == TOKENS:
        play_batch_of, recorder = play_tokens_with_expert, Recorder(batch.slots, generators, token_expert.CALLS_PER_ROLLOUT)
    else:
        play_batch_of, recorder = play_with_expert, Recorder(batch.slots, generators)
    return play_batch_of(workload, batch.clip_ids, batch.budgets, actor, batch.config, batch.true_frames, recorder)


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
    if config.memory == TOKENS:
        slots = workload.num_frames - 1
    else:
        slots = max(workload.context_units, *map(workload.max_units, budgets)) + 1
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
