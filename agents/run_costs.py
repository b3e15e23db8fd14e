"""What one frame, one rollout and one decision of a run cost: operations counted, and the CPU's part timed on made data.

Operations are counted on torch's meta device, which computes shapes alone: it takes no memory and little time, and attention is
made of matrix products there, while the counter does not know the CPU's fused attention.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from far_env.agents.collection import collect
from far_env.agents.config import ImitationSettings, NetworkConfig
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.graph_decisions import GraphDecisions
from far_env.agents.imitation import imitation_loss
from far_env.agents.network import RetentionNetwork
from far_env.agents.surrogate import SurrogateRollouts, SurrogateVectorEnv
from far_env.clips.clip import Clip
from far_env.contract import UNLIMITED_FRAMES
from far_env.host.far_host import FARHost
from far_env.host.linear import linear_rate
from far_env.rollout.engine import RolloutBatch
from far_env.workload import Workload, deciding_budgets

TIMED_ROWS, TIMED_STEPS = 8, 16
TIMED_PRODUCTS = 10


@dataclass(frozen=True)
class HostCosts:
    """Of one workload's host.

    Attributes:
        encode, decode: operations for one frame.
        frame: budget → operations for one generated frame whose whole history was cut just before, the most that a frame takes;
            of full history one in the middle of a rollout.
        cache_bytes: budget → the most that keys and values of one rollout take; twice that while a frame is generated.
        weight_bytes: of both models.
    """

    encode: int
    decode: int
    frame: dict[int, int]
    cache_bytes: dict[int, int]
    weight_bytes: int


@dataclass(frozen=True)
class RolloutCosts:
    """Of the CPU's part of one rollout of a workload, made here of random latents under its smallest budget.

    Attributes:
        collect_seconds: to decide and record on true frames. file_bytes, memory_bytes: of the recorded decisions.
        begin_seconds, evict_seconds: to begin an episode with the surrogate, and for one eviction in it; zero where a reward or
            signals are not the surrogate's.
        nodes: most nodes of a frame graph. mean_nodes: of recorded decisions.
        learn_flops: operations to learn from one recorded decision. learn_seconds: the time that takes.
    """

    collect_seconds: float
    file_bytes: int
    memory_bytes: int
    begin_seconds: float
    evict_seconds: float
    nodes: int
    mean_nodes: int
    learn_flops: int
    learn_seconds: float


def on_meta(workload: Workload) -> Workload:
    """The workload with its host on the meta device."""
    host = workload.host
    parts = {name: _meta_copy(getattr(host, name)) for name in ("transformer", "autoencoder")}
    return replace(workload, host=replace(host, **parts))


def host_costs(workload: Workload, budgets: Sequence[int]) -> HostCosts:
    """Count the operations of a workload's host under these budgets and under full history.

    Args:
        workload: of `on_meta`.
    """
    host, (channels, height, width) = workload.host, workload.host.latent_shape
    side, autoencoder = host.frame_size, host.autoencoder
    frames = torch.zeros(1, 1, 3, side, side, device="meta", dtype=host.dtype)
    latents = torch.zeros(1, 1, channels, height, width, device="meta", dtype=host.dtype)
    found = {budget: _next_frame(workload, budget, known=False) for budget in budgets}
    middle = workload.num_context + workload.num_predict // 2
    found[UNLIMITED_FRAMES] = _next_frame(workload, middle, known=True)
    longest = {budget: max(budget, workload.num_context) for budget in budgets}
    longest[UNLIMITED_FRAMES] = workload.num_frames - 1
    tensors = [*host.transformer.state_dict().values(), *autoencoder.state_dict().values()]
    return HostCosts(
        encode=counted(lambda: autoencoder.encode(frames)),
        decode=counted(lambda: autoencoder.decode(latents)),
        frame=found,
        cache_bytes={budget: _cache_bytes(workload, length) for budget, length in longest.items()},
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
    )


def scorer_flops(config: NetworkConfig, nodes: int, *, learn: bool) -> int:
    """Operations of the scorer for one decision about a graph of so many nodes; with ``learn``, of the backward pass too."""
    with torch.device("meta"):
        network = RetentionNetwork(config)
        of_nodes = torch.zeros(1, nodes, network.embed_nodes.in_features)
        of_edges = torch.zeros(1, nodes, nodes, network.embed_edges[0].in_features)
        mask = torch.ones(1, nodes, dtype=torch.bool)

        def passed() -> None:
            x, e = network.encode(of_nodes, of_edges, mask)
            scores = network.score(x, e, mask)
            if learn:
                (scores.sum() + network.similarity(e).sum()).backward()

        return counted(passed)


def rollout_costs(
    workload: Workload, budgets: Sequence[int], network: NetworkConfig, settings: ImitationSettings
) -> RolloutCosts:
    """Make and time the CPU's part of a rollout: decisions on true frames, learning from them, an episode of the surrogate."""
    made = replace(workload, clips=_MadeClips(workload), host=_without_autoencoder(workload.host))
    budget = deciding_budgets(workload, budgets)[0]
    signals = tuple(name for name in network.signals if name in SurrogateRollouts.SIGNALS)
    config = replace(network, signals=signals)
    start = time.perf_counter()
    data = collect(made, [0], [budget], actor=None, config=config, true_frames=True, progress=False)
    collect_seconds = time.perf_counter() - start
    decisions = GraphDecisions(data, config)
    held = [value.nbytes for arrays in decisions.arrays.values() for value in arrays.values()]
    file_bytes = sum(value.nbytes for value in vars(data).values())
    of_calls = sum(scorer_flops(config, int(size), learn=True) for size in decisions.sizes)
    learn_flops = of_calls // len(decisions)
    begin, evict, nodes = _episode_seconds(made, budget, config)
    return RolloutCosts(
        collect_seconds,
        file_bytes,
        file_bytes + sum(held),
        begin,
        evict,
        nodes,
        round(float(decisions.sizes.mean())),
        learn_flops,
        _learning_seconds(decisions, config, settings, workload.host.dtype),
    )


def measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of matrix products, rows by ``size`` by 4 · ``size`` as in a transformer of this width."""
    rows = 512 if device.type == "cpu" else 16384
    return linear_rate((rows, size, 4 * size), dtype, device, TIMED_PRODUCTS)


def counted(function: object) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call of ``function``."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _MadeClips:
    """Black clips, with an action and a label for hosts that want one."""

    name = "made"

    def __init__(self, workload: Workload) -> None:
        self.size, self._frames = workload.host.frame_size, workload.num_frames

    def num_clips(self, split: str) -> int:
        """One."""
        return 1

    def clip(self, split: str, clip_id: int, num_frames: int | None = None) -> Clip:
        """A clip as long as the workload's."""
        count = self._frames if num_frames is None else num_frames
        frames = np.zeros((count, 3, self.size, self.size), dtype=np.float32)
        return Clip(clip_id, frames, np.zeros(count, dtype=np.int64), label=0)


class _RandomLatents:
    """In place of an autoencoder: latents at random."""

    def __init__(self, host: FARHost) -> None:
        self.host = host

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) for frames (B, F, 3, H, W)."""
        return torch.randn(*frames.shape[:2], *self.host.latent_shape).to(frames.device, self.host.dtype)


def _without_autoencoder(host: FARHost) -> FARHost:
    return replace(host, autoencoder=_RandomLatents(host))


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device; the weights are not copied in between."""
    memo: dict[int, Tensor] = {id(value): value.to("meta") for value in module.buffers()}
    for value in module.parameters():
        memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


def _begun(workload: Workload, num_kept: int) -> RolloutBatch:
    """A rollout with a history of so many true frames."""
    batch = RolloutBatch(workload, 1)
    clip = _MadeClips(workload).clip("train", 0, num_kept + 3)
    batch.begin([0], [clip], [0], num_context=num_kept, num_predict=3)
    return batch


def _next_frame(workload: Workload, num_kept: int, *, known: bool) -> int:
    """Operations of the frame that follows so many; ``known`` where all but the newest of them have keys and values already."""
    by_steps = []
    for num_steps in (1, 2):  # of which every further step costs the same
        batch = _begun(replace(workload, num_steps=num_steps), num_kept - known)
        if known:
            batch.advance([0])
        by_steps.append(counted(lambda batch=batch: batch.advance([0])))
    return by_steps[0] + (workload.num_steps - 1) * (by_steps[1] - by_steps[0])


def _cache_bytes(workload: Workload, num_kept: int) -> int:
    batch = _begun(replace(workload, num_steps=1), num_kept)
    batch.advance([0])
    return batch.cache_bytes(0)


def _learning_seconds(
    decisions: GraphDecisions, config: NetworkConfig, settings: ImitationSettings, precision: torch.dtype
) -> float:
    """Seconds to learn from one decision, in a batch of the settings' size."""
    network = RetentionNetwork(config)
    indices = np.resize(np.arange(len(decisions.calls)), settings.batch_size)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        batch = decisions.batch(indices)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = imitation_loss(network, batch, settings)
        loss.backward()
        seconds.append((time.perf_counter() - start) / len(batch))
    return min(seconds)


def _episode_seconds(made: Workload, budget: int, config: NetworkConfig) -> tuple[float, float, int]:
    """Seconds to begin an episode with the surrogate and for one eviction in it, and the nodes of observations."""
    options = {"reward": {"psnr": 1.0}, "telescoping": True, "num_clips": 1, "signals": config.signals}
    env = EvictionVecEnv([SurrogateVectorEnv(TIMED_ROWS, made, [budget], autoreset_mode="SAME_STEP", **options)], config)
    start = time.perf_counter()
    env.reset()  # the rows play one clip, which is compared once
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        env.step(env.action_masks().argmax(axis=1))
    return begun - start, (time.perf_counter() - begun) / (TIMED_ROWS * TIMED_STEPS), env.num_nodes
