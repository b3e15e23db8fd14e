"""Interventions on the memory at equal budget: how much does what the kept frames show contribute to a frame?

Just before a frame is generated, the latents of all kept frames but the newest are replaced. The frame that is then generated
is for scoring alone: the frame of the undisturbed rollout enters the history. So every decision of a policy, everything that it
observes, and the number of frames are those of the undisturbed rollout, and no later frame is affected. Positions, actions,
noise and the newest frame stay as they are; where the newest is the only one, nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from far_env.clips.clip import Clip, ClipSource
from far_env.device import torch_defaults
from far_env.errors import unknown_name
from far_env.rollout.context import context_latents
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo, content_key
from far_env.workload import Workload

SWAP, NOISE, BLANK, SHUFFLE = INTERVENTIONS = ("swap", "noise", "blank", "shuffle")
"""Each kept frame becomes: the true frame of the same number of another clip; noise; grey; another one of the kept frames."""
GREY = 0.5
_METRIC = "psnr_"

Keyed = tuple[Tensor, str]
"""A latent (C, h, w) and the key of its content."""


def check_interventions(names: Sequence[str]) -> tuple[str, ...]:
    """The names of interventions, each once, in the order of `INTERVENTIONS`. Raises ValueError on an unknown one."""
    for name in names:
        if name not in INTERVENTIONS:
            raise ValueError(unknown_name("intervention", name, [*INTERVENTIONS, "none"]))
    return tuple(name for name in INTERVENTIONS if name in names)


def metric_of(intervention: str) -> str:
    """The name of the metric that is measured under an intervention, such as psnr_swap."""
    return _METRIC + intervention


def interventions_of(metrics: Sequence[str]) -> tuple[str, ...]:
    """The interventions under which these metrics are measured."""
    return tuple(name for name in INTERVENTIONS if metric_of(name) in metrics)


def partner_of(clips: ClipSource, split: str, clip_id: int) -> int:
    """The clip whose frames another one is given in a swap: the next one of the split, and the first one after the last.

    Raises:
        ValueError: if the split has one clip alone.
    """
    count = clips.num_clips(split)
    if count < 2:
        raise ValueError(f"a swap needs two clips, and {clips.name}/{split} has {count}; choose another intervention")
    return (clip_id + 1) % count


class Intervention:
    """One intervention on the rollout of one clip.

    Args:
        name: of `INTERVENTIONS`.
        workload, noise_seed: of the rollout.
        partner: the other clip of a swap.
        memo: holds its latents, or receives them.

    Raises:
        ValueError: if the partner has fewer frames than a rollout, or if the host generates chunks.
    """

    @torch_defaults()
    @torch.no_grad()
    def __init__(
        self, name: str, workload: Workload, noise_seed: int, partner: Clip | None = None, memo: FrameMemo | None = None
    ) -> None:
        self.name, self.noise_seed = name, int(noise_seed)
        host = workload.host
        if host.chunked:
            raise ValueError(f"interventions replace single frames, and host {host.name} keeps chunks of them; leave them out")
        if name == SWAP:
            memo = FrameMemo(0) if memo is None else memo
            self._key = content_key(SWAP, memo.host_number(host), partner.context(workload.num_frames).data.cast("B"))
            known = memo.get(self._key)
            self._latents = context_latents(host, [partner], workload.num_frames)[0] if known is None else known
            if known is None:
                memo.put(self._key, self._latents)
        elif name == BLANK:
            grey = torch.full((1, 1, 3, host.frame_size, host.frame_size), GREY, device=host.device, dtype=host.dtype)
            self._latents, self._key = host.encode(grey)[0], content_key(BLANK)

    def replace(self, kept: Sequence[Keyed], numbers: Sequence[int], step: int) -> list[Keyed]:
        """What is given to the host in place of a history.

        Args:
            kept: its frames, oldest first.
            numbers: their true numbers.
            step: the number of the predicted frame that is generated next.
        """
        if not kept:
            return []
        *older, newest = kept
        if self.name == SHUFFLE:
            return [*(older[place] for place in self._order(len(older), step)), newest]
        return [*(self._replacement(latent, number) for (latent, _), number in zip(older, numbers, strict=False)), newest]

    def _replacement(self, latent: Tensor, number: int) -> Keyed:
        if self.name == SWAP:
            return self._latents[number], content_key(self._key, number)
        if self.name == BLANK:
            return self._latents[0], self._key
        key = content_key("intervention noise", self.noise_seed, number)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(key[:12], 16)))
        return noise.to(latent), key

    def _order(self, count: int, step: int) -> list[int]:
        """An order of ``count`` frames, of all but theirs with equal probability; theirs if there is no other."""
        seed = int(content_key("intervention order", self.noise_seed, step)[:12], 16)
        generator = torch.Generator().manual_seed(seed)
        order = list(range(count))
        while count > 1 and order == list(range(count)):
            order = torch.randperm(count, generator=generator).tolist()
        return order


class IntervenedFrames:
    """The frames of a batch of rollouts under interventions; called before each frame of `far_env.rollout.play.play`.

    Args:
        names: of `INTERVENTIONS`.
        workload, noise_seeds: of the rollouts.
        partners: for a swap, the other clip of each rollout.
        memo: as in `Intervention`.
    """

    def __init__(
        self,
        names: Sequence[str],
        workload: Workload,
        noise_seeds: Sequence[int],
        partners: Sequence[Clip] | None = None,
        memo: FrameMemo | None = None,
    ) -> None:
        self._workload = workload
        clips = [None] * len(noise_seeds) if partners is None else partners
        self._interventions = {
            name: [Intervention(name, workload, seed, clip, memo) for seed, clip in zip(noise_seeds, clips, strict=True)]
            for name in names
        }
        self._latents: Mapping[str, list[list[Tensor]]] = {name: [[] for _ in noise_seeds] for name in names}

    def __call__(self, batch: RolloutBatch, rows: Sequence[int]) -> None:
        """Generate the next frame of each row under each intervention; the rows stay as they are."""
        for name, interventions in self._interventions.items():
            histories = [
                interventions[row].replace(batch.keyed_history(row), batch.frame_numbers(row), batch.step(row)) for row in rows
            ]
            for row, latent in zip(rows, batch.next_frames(rows, histories), strict=True):
                self._latents[name][row].append(latent)

    def latents(self, name: str) -> Tensor:
        """Generated latents (R, n, C, h, w) under an intervention, of the rollouts that have come as far as the longest."""
        longest = max(map(len, self._latents[name]))
        return torch.stack([torch.stack(frames) for frames in self._latents[name] if len(frames) == longest])

    @torch_defaults()
    @torch.no_grad()
    def decode(self, name: str) -> Tensor:
        """The same as pixels (R, n, 3, H, W)."""
        return self._workload.host.decode(self.latents(name))
