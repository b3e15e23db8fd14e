"""Learned policies over a token memory, and the collection of them: shipped (pretrained/NAME), on the hub, run folders.

`names`, `load`, `facts` and `accepts` are what `far_env.policies` asks of a collection of token policies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from far_env.agents import checkpoints
from far_env.agents.config import TOKENS
from far_env.agents.observation import FrameGraph
from far_env.agents.token_reductions import REDUCTIONS, Reductions
from far_env.agents.token_scores import choose_reduction, encoded
from far_env.frame_meta import frame_features
from far_env.rollout.frame_actions import DROP, regrouping

if TYPE_CHECKING:
    from torch import Tensor

    from far_env.agents.network import RetentionNetwork
    from far_env.rollout.token_cache import CacheView
    from far_env.rollout.token_policy import TokenSizes


class LearnedTokenPolicy:
    """Keeps, compresses or drops whole frames, the same in every layer and head, as a trained scorer says.

    Until the tokens fit the budget, the frame with the lowest score is dropped or compressed (the means of 2×2 tokens), and the
    others are scored again. A copy plays one batch of clips.

    Args:
        network: a scorer of a token memory.
    """

    def __init__(self, network: RetentionNetwork, name: str = checkpoints.LEARNED) -> None:
        self.network, self.name = network, name
        self._graphs: list[FrameGraph] = []
        self._latents: list[dict[int, Tensor]] = []
        self._number = self._step = self._total_steps = 0

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """None: coarse tokens of a FAR-Long are not used."""
        return []

    def enter(self, step: int, total_steps: int, latents: Tensor) -> None:
        """Remember the latents (R, C, h, w) of a frame."""
        if not self._graphs:
            self._graphs = [FrameGraph(self.network.config.dropped_frames) for _ in latents]
            self._latents = [{} for _ in latents]
            self._number = -1
        self._number, self._step, self._total_steps = self._number + 1, step, total_steps
        for held, latent in zip(self._latents, latents, strict=True):
            held[self._number] = latent

    @torch.no_grad()
    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        return regrouping(view, [self._actions(row, view) for row in range(len(self._graphs))])

    def _actions(self, row: int, view: CacheView) -> dict[int, int]:
        """DROP, COMPRESS or KEEP of the frames of a row by number. Where the budget is not exceeded nothing is observed."""
        frame, graph = view.frame[0, row, 0], self._graphs[row]
        numbers, counts = frame[frame >= 0].unique(return_counts=True)
        numbers, full = numbers.tolist(), view.tokens_per_frame
        reductions = Reductions(counts.tolist(), full, view.budget)
        if not reductions.done:
            latents = torch.stack([self._latents[row][number] for number in numbers])
            graph.observe_frames(frame_features(latents[None])[0].cpu().numpy(), self._step)
            inputs = encoded(self.network, graph, view.budget / full, self._total_steps - self._step - 1)
            while not reductions.done:
                index, reduction = choose_reduction(self.network, inputs, graph, reductions)
                reductions.reduce(index, REDUCTIONS[reduction])
            graph.keep(np.flatnonzero(reductions.sizes).tolist())
        actions = dict(zip(numbers, reductions.actions(), strict=True))
        self._latents[row] = {number: self._latents[row][number] for number in numbers if actions[number] != DROP}
        return actions


def names() -> list[str]:
    """The shipped policies."""
    return checkpoints.names(TOKENS)


def accepts(name: str) -> bool:
    """As `far_env.agents.checkpoints.accepts`."""
    return checkpoints.accepts(name)


def load(name: str) -> LearnedTokenPolicy:
    """The policy of a shipped scorer, of one on the hub, or of a run folder; a scorer of whole frames compresses none.

    Raises:
        ValueError: as `far_env.agents.checkpoints.load`, or if the scorer reads signals.
    """
    from far_env.agents.network import network_with_weights, token_weights

    network, _ = checkpoints.load_scorer(checkpoints.scorer_folder(name))
    if network.config.signals:
        raise ValueError(f"{name} reads {', '.join(network.config.signals)}, which a token memory does not have")
    if network.config.memory != TOKENS:
        config = replace(network.config, memory=TOKENS)
        network = network_with_weights(config, token_weights(network, config))
    return LearnedTokenPolicy(network, name)


def facts(name: str) -> dict[str, str]:
    """As `far_env.agents.checkpoints.facts`."""
    return checkpoints.facts(name, TOKENS)
