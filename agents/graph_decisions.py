"""Collected decisions as batches of network inputs: the calls of `ExpertData`, replayed into frame graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.expert_data import ExpertData
from far_env.agents.graph_batches import PAIR_ARRAYS, network_inputs, stacked
from far_env.agents.observation import FrameGraph

BATCHES_SORTED_TOGETHER = 16
"""Batches among which calls are sorted by the number of their nodes, so that little is padded."""


@dataclass(frozen=True)
class Decisions:
    """A batch of D single evictions in B calls; N nodes, padded.

    Attributes:
        nodes, edges, mask: of each call, as `far_env.agents.network.RetentionNetwork.encode` takes them.
        similarity: float32 (B, N, N), of the true frames with the nodes' numbers, see `ExpertData`.
        call: int64 (D,), in which of the calls.
        remaining: (D, N), as in `ExpertData`; 0 at nodes that are not in the history.
        costs: float32 (D, N) or (D, N, 2), as in `ExpertData`; infinite at nodes that cannot be dropped.
    """

    nodes: Tensor
    edges: Tensor
    mask: Tensor
    similarity: Tensor
    call: Tensor
    remaining: Tensor
    costs: Tensor

    def __len__(self) -> int:
        return len(self.call)


class GraphDecisions:
    """The decisions of one workload, with the arrays of a frame graph at every call that has some.

    Measurements of pairs are in half precision, to save memory.

    Attributes:
        sizes: int64 (calls,), nodes of the graph at each call that has decisions.
    """

    def __init__(self, data: ExpertData, config: NetworkConfig) -> None:
        self.data, self.config = data, config
        self.arrays: dict[int, dict] = {}
        self.numbers: dict[int, np.ndarray] = {}
        decided = set(data.call.tolist())
        rollouts, steps, lengths = data.rollout.tolist(), data.step.tolist(), data.length.tolist()
        features, kept, total_steps = data.features.numpy(), data.kept.numpy(), int(data.total_steps[0])
        frame_signals, pair_signals = data.frame_signals.numpy(), data.pair_signals.numpy()
        graph = FrameGraph()
        for call, (rollout, step, length) in enumerate(zip(rollouts, steps, lengths, strict=True)):
            if not call or rollout != rollouts[call - 1]:
                graph = FrameGraph(config.dropped_frames)
            of_frames = [frame_signals[call, :length, i] for i in range(frame_signals.shape[2])]
            of_pairs = [pair_signals[call, :length, :length, i] for i in range(pair_signals.shape[3])]
            graph.observe_frames(features[call, :length], step, of_frames, of_pairs)
            if call in decided:
                arrays = graph.arrays(total_steps - step - 1, data.max_frames[rollout].item())
                self.arrays[call] = {name: _compact(values, name in PAIR_ARRAYS) for name, values in arrays.items()}
                self.numbers[call] = graph.numbers.copy()
            graph.keep(np.flatnonzero(kept[call]).tolist())
        self.calls = sorted(decided)
        self.sizes = np.array([len(self.numbers[call]) for call in self.calls])
        self.ends = np.searchsorted(data.call.numpy(), self.calls, side="right")

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray) -> Decisions:
        """All decisions of some of the calls that have decisions, whose indices these are."""
        calls = [self.calls[index] for index in indices]
        batch, mask = stacked([self.arrays[call] for call in calls])
        batch = {name: values.astype(np.float32) if values.dtype == np.float16 else values for name, values in batch.items()}
        count, size = mask.shape
        similarity = np.zeros((count, size, size), dtype=np.float32)
        call_of, remaining, costs = [], [], []
        for row, (index, call) in enumerate(zip(indices.tolist(), calls, strict=True)):
            rows, numbers = np.flatnonzero(self.arrays[call]["in_history"]), self.numbers[call]
            of_clip = self.data.similarity[self.data.rollout[call]].numpy()
            similarity[row, : len(numbers), : len(numbers)] = of_clip[np.ix_(numbers, numbers)]
            of_call = slice(self.ends[index - 1] if index else 0, self.ends[index])
            call_of += [row] * (of_call.stop - of_call.start)
            for target, source, fill in ((remaining, self.data.remaining, False), (costs, self.data.costs, np.inf)):
                values = source[of_call, : len(rows)].numpy()
                target.append(np.full((len(values), size, *values.shape[2:]), fill, dtype=values.dtype))
                target[-1][:, rows] = values
        evictions = np.array(call_of), np.concatenate(remaining), np.concatenate(costs)
        inputs = network_inputs(batch, mask, self.config)
        return Decisions(*inputs, *map(torch.from_numpy, (similarity, *evictions)))


def shuffled_batches(
    parts: Sequence[GraphDecisions], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[GraphDecisions, np.ndarray]]:
    """Every call with decisions once, in batches of one workload and of similar numbers of nodes, in a random order."""
    batches = []
    for part in parts:
        order = rng.permutation(len(part.calls))
        for first in range(0, len(order), batch_size * BATCHES_SORTED_TOGETHER):
            together = order[first : first + batch_size * BATCHES_SORTED_TOGETHER]
            together = together[np.argsort(part.sizes[together], kind="stable")]
            batches += [(part, together[start : start + batch_size]) for start in range(0, len(together), batch_size)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def _compact(values: np.ndarray, of_pairs: bool) -> np.ndarray:
    """A copy, in half precision where it has numbers of pairs."""
    return values.astype(np.float16) if of_pairs and values.dtype == np.float32 else values.copy()
