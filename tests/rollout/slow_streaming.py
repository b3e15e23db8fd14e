"""A streaming rollout in loops over layers, heads and entries, which the fast one must equal: one clip, a FAR, no batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.host.blocks import modulated_norm, patchify, rotary_table, rotate, unpatchify
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import make_scheduler
from far_env.rollout.context import context_latents
from far_env.rollout.noise import rollout_noise


@dataclass
class Entry:
    frame: int
    cell: int
    key: Tensor
    value: Tensor
    weight: float = 1.0
    merged: bool = False
    accumulated: float = 0.0


Decide = Callable[[list[Entry], int, int], list[int]]
"""From the entries of one head, the newest frame and the budget to the index into which each goes, or -1."""


@dataclass
class SlowStream:
    workload: object
    decide: Decide | None = None
    budget: int | None = None
    max_gap: int | None = 1
    heads: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)

    def run(self, clip, seed: int, num_frames: int) -> Tensor:
        workload = self.workload
        model = workload.host.transformer
        self.heads = {(i, h): [] for i, b in enumerate(model.transformer_blocks) for h in range(b.attn.num_heads)}
        given = context_latents(workload.host, [clip], workload.num_context)[0]
        noise = rollout_noise(seed, num_frames, workload.host.latent_shape)
        for number, frame in enumerate(given):
            self.remember(number, frame)
        generated = []
        for step in range(num_frames):
            number, frame = workload.num_context + step, noise[step]
            scheduler = make_scheduler(workload.num_steps)
            for time in scheduler.timesteps:
                velocity, _ = self.forward(number, frame, time)
                frame = scheduler.step(velocity, time, frame).prev_sample
            generated.append(frame)
            self.remember(number, frame)
        return torch.stack(generated)

    def remember(self, number: int, frame: Tensor) -> None:
        _, written = self.forward(number, frame, torch.tensor(CLEAN_TIME))
        for place, (keys, values, paid) in written.items():
            entries = self.heads[place]
            entries += [Entry(number, cell, k, v) for cell, (k, v) in enumerate(zip(keys, values, strict=True))]
            for entry, attention in zip(entries, paid.sum(dim=0).tolist(), strict=True):
                entry.accumulated += attention
        if self.budget is None or max(map(len, self.heads.values())) <= self.budget:
            return
        for place, entries in self.heads.items():
            self.heads[place] = self.apply(entries, self.decide(entries, number, self.budget), number)

    def forward(self, number: int, frame: Tensor, time: Tensor):
        """Velocity, and per layer and head the keys, values and attention of the frame's tokens."""
        model = self.workload.host.transformer
        rows, columns = (side // model.patch_size for side in frame.shape[-2:])
        modulations = model.modulate(time.reshape(1, 1), dtype=frame.dtype)
        x = model.x_embedder(patchify(frame[None, None], model.patch_size))[0, 0]
        written = {}
        for layer, (block, modulation) in enumerate(zip(model.transformer_blocks, modulations.blocks, strict=True)):
            shift, factor, gate, mlp_shift, mlp_factor, mlp_gate = (m.reshape(-1) for m in modulation)
            attn, normed = block.attn, F.layer_norm(x, x.shape[-1:], eps=1e-6) * factor + shift
            projected = (project(normed).unflatten(-1, (attn.num_heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
            queries, keys, values = projected
            queries, keys = attn.norm_q(queries), attn.norm_k(keys)
            outs = []
            for head in range(attn.num_heads):
                entries = self.heads[layer, head]
                times = self.times(entries, number)
                own = [Entry(number, cell, keys[cell, head], values[cell, head]) for cell in range(len(x))]
                everything, everywhen = entries + own, times + [0] * len(own)
                rotated = torch.stack(
                    [self.at(e.key, t, e.cell, rows, columns) for e, t in zip(everything, everywhen, strict=True)]
                )
                out, paid = [], []
                for cell in range(len(x)):
                    query = self.at(queries[cell, head], 0, cell, rows, columns)
                    logits = rotated @ query / math.sqrt(len(query))
                    weights = torch.tensor([e.weight for e in everything]) * (logits - logits.max()).exp()
                    weights = weights / weights.sum()
                    paid.append(weights)
                    out.append(weights @ torch.stack([e.value for e in everything]))
                outs.append(torch.stack(out))
                written[layer, head] = (keys[:, head], values[:, head], torch.stack(paid))
            x = x + gate * attn.to_out[0](torch.cat(outs, dim=-1))
            x = x + mlp_gate * block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * mlp_factor + mlp_shift)
        final = model.proj_out(modulated_norm(x[None, None], *modulations.final))
        return unpatchify(final, model.patch_size, *frame.shape[-2:])[0, 0], written

    def times(self, entries: list[Entry], number: int) -> list[int]:
        """Minus the sum of the gaps between the distinct frames from an entry's to this one, each gap clipped."""
        frames = sorted({entry.frame for entry in entries} | {number})
        gaps = {a: b - a if self.max_gap is None else min(b - a, self.max_gap) for a, b in pairwise(frames)}
        return [-sum(gap for frame, gap in gaps.items() if frame >= entry.frame) for entry in entries]

    def at(self, key: Tensor, time: int, cell: int, rows: int, columns: int, back: bool = False) -> Tensor:
        table = rotary_table(torch.tensor([float(time)]), rows, columns, self.workload.host.transformer.axes_dims_rope)
        table = table.conj() if back else table
        return rotate(key[None, None, None], table[None, cell])[0, 0, 0]

    def apply(self, entries: list[Entry], into: list[int], number: int) -> list[Entry]:
        """What is left of the entries of a head. Keys are averaged as they are met, at the times and cells of each."""
        times = dict(zip(map(id, entries), self.times(entries, number), strict=True))
        rows, columns = (side // self.workload.host.transformer.patch_size for side in self.workload.host.latent_shape[1:])
        left = []
        for index, entry in enumerate(entries):
            group = [other for other, target in zip(entries, into, strict=True) if target == index]
            if into[index] != index:
                continue
            total = sum(other.weight for other in group)
            shifted = [(o.weight, self.at(o.key, times[id(o)], o.cell, rows, columns)) for o in group]
            key = self.at(sum(w * k for w, k in shifted) / total, times[id(entry)], entry.cell, rows, columns, back=True)
            value = sum(other.weight * other.value for other in group) / total
            merged = len(group) > 1 or entry.merged
            accumulated = sum(other.accumulated for other in group)
            left.append(replace(entry, key=key, value=value, weight=total, merged=merged, accumulated=accumulated))
        return left
