"""A scorer's choice among the reductions of a token memory, for one clip at a time so that batches do not change it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from far_env.agents.graph_batches import network_inputs, stacked
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import FrameGraph
from far_env.agents.token_reductions import Reductions


def encoded(network: RetentionNetwork, graph: FrameGraph, max_frames: float, steps_left: int) -> tuple[Tensor, Tensor]:
    """The network's representations of a graph's nodes and edges, under a budget of so many whole frames."""
    return network.encode(*network_inputs(*stacked([graph.arrays(steps_left, max_frames)]), network.config))


def choose_reduction(
    network: RetentionNetwork, inputs: tuple[Tensor, Tensor], graph: FrameGraph, reductions: Reductions
) -> tuple[int, int]:
    """The allowed reduction with the lowest score: the position of the frame, and which of its reductions."""
    shares = np.zeros((1, len(graph.numbers)), dtype=np.float32)
    shares[0, graph.rows()] = reductions.shares
    scores = network.score(*inputs, torch.from_numpy(shares))[0].numpy()[graph.rows()]
    chosen = np.where(reductions.allowed(), scores, np.inf).argmin()
    return divmod(int(chosen), scores.shape[1])
