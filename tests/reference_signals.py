"""The executable specification of the signals: one clip, frame by frame and head by head, from whole uncached passes.

Slow on purpose. `far_env.rollout.signals` must equal it; the formulas are written out again here, from what hooks record of an
unchanged transformer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.host.blocks import rotary_table
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import make_scheduler
from far_env.rollout.attention_probe import MIN_EIGENVALUE_SHARE, PROXY_RANK
from far_env.rollout.signals import context_noise, halfway
from far_env.workload import Workload


class ReferenceSignals:
    """Signals of one rollout, collected from passes over whole sequences.

    Args:
        workload: what is rolled out.
        wanted: names of `far_env.contract.SIGNALS`.
        context: context latents (n, C, h, w).
        noise_seed: of the rollout.
        actions: of all its frames, empty for the null class on all of them.
    """

    def __init__(
        self, workload: Workload, wanted: Sequence[str], context: Tensor, noise_seed: int, actions: Sequence[int] = ()
    ) -> None:
        self.workload, self.wanted, self.actions = workload, wanted, actions
        self.model = workload.host.transformer
        self.times = make_scheduler(workload.num_steps).timesteps.tolist()
        self.probe, self.sigma = halfway(self.times)
        self.all_queries: list[list[Tensor]] = [[] for _ in self.model.transformer_blocks]
        self.gaps = [self._context_gap(context, number, noise_seed) for number in range(len(context))]

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Record the passes that denoise one frame."""
        blocks = self.model.transformer_blocks
        self.passes: list[dict] = []
        now: dict = {"attention": {}, "raw_queries": {}}

        def before_attention(layer: int) -> object:
            return lambda module, args: now["attention"].update({layer: args[:4]})

        def after_norm(layer: int) -> object:
            return lambda module, args, output: now["raw_queries"].update({layer: output})

        def after_pass(module: object, args: tuple, velocity: Tensor) -> None:
            nonlocal now
            self.passes.append(now | {"noisy": args[0][0, -1], "velocity": velocity[0, -1]})
            now = {"attention": {}, "raw_queries": {}}

        hooks = [self.model.register_forward_hook(after_pass)]
        for layer, block in enumerate(blocks):
            # Of FAR-Long's two passes through a block, coarse frames first, the second is the one that remains.
            hooks.append(block.attn.register_forward_pre_hook(before_attention(layer)))
            hooks.append(block.attn.norm_q.register_forward_hook(after_norm(layer)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self.workload.guidance > 1:
            # Of the two passes per step the first is the conditional one.
            pairs = list(zip(self.passes[0::2], self.passes[1::2], strict=True))
            self.passes = [one | {"velocity": self._guided(one["velocity"], other["velocity"])} for one, other in pairs]

    def finish(self, frame: Tensor) -> None:
        """Record the finished frame (C, h, w)."""
        halfway_pass = self.passes[self.probe]
        estimate = halfway_pass["noisy"].float() - self.sigma * halfway_pass["velocity"].float()
        self.gaps.append((estimate - frame.float()).square().mean())
        num_tokens = self.model.tokens_per_frame(frame)
        for layer, queries in enumerate(self.all_queries):
            queries.append(self.passes[0]["raw_queries"][layer][0, -num_tokens:].float())

    def arrays(self, kept: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The wanted signals of a history (latents (C, h, w) and their true numbers), float32."""
        values = {
            "lat_cos": lambda: _pairs(kept, lambda a, b: torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
            "column_gap": lambda: _column_gaps(kept),
            "key_proto": lambda: torch.stack([self._key_prototype(*frame) for frame in zip(kept, numbers, strict=True)]),
            "attn_mass": lambda: self._attention_mass(kept),
            "qk_first": lambda: self._first_products(kept),
            "key_cos": lambda: self._key_cosines(kept),
            "expected_mass": lambda: self._expected(kept)[0],
            "expected_cos": lambda: self._expected(kept)[1],
            "denoise_gap": lambda: torch.stack([self.gaps[number] for number in numbers]),
        }
        return {name: values[name]().float().cpu().numpy() for name in self.wanted}

    def _pieces(self, kept: Sequence[Tensor]) -> list[slice]:
        """Where each frame's tokens are in the last pass's keys, the newest's last."""
        counts = [*self.model.token_counts(len(kept) - 1, kept[0]), self.model.tokens_per_frame(kept[0])]
        ends = np.cumsum(counts).tolist()
        return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def _attention_mass(self, kept: Sequence[Tensor]) -> Tensor:
        pieces, shares = self._pieces(kept), []
        num_new = pieces[-1].stop - pieces[-1].start
        for one_pass in self.passes:
            for query, key, _, mask in one_pass["attention"].values():
                for head in range(query.shape[2]):
                    logits = query[0, -num_new:, head].float() @ key[0, :, head].float().T / math.sqrt(query.shape[-1])
                    if mask is not None:
                        allowed = mask[0, 0, -num_new:]
                        logits = logits + (allowed.log() if mask.dtype == torch.bool else allowed.float())
                    attention = logits.softmax(dim=-1)
                    shares.append(torch.stack([attention[:, piece].sum(dim=1).mean() for piece in pieces]))
        return torch.stack(shares).mean(dim=0)

    def _first_products(self, kept: Sequence[Tensor]) -> Tensor:
        pieces = self._pieces(kept)
        means = []
        for query, key, _, _ in self.passes[0]["attention"].values():
            newest = query[0, pieces[-1].start - pieces[-1].stop :].float()
            products = torch.einsum("shd,thd->hst", newest, key[0].float()) / math.sqrt(query.shape[-1])
            means.append(torch.stack([products[:, :, piece].mean() for piece in pieces]))
        return torch.stack(means).mean(dim=0)

    def _key_cosines(self, kept: Sequence[Tensor]) -> Tensor:
        *pieces, _ = self._pieces(kept)
        square = torch.full((len(kept), len(kept)), float("nan"))
        for i, one in enumerate(pieces):
            for j, other in enumerate(pieces):
                means = []
                for _, key, _, _ in self.passes[0]["attention"].values():
                    a, b = key[0, one].float(), key[0, other].float()
                    means.append(torch.cosine_similarity(a[:, None], b[None], dim=-1).mean())
                square[i, j] = torch.stack(means).mean()
        return square

    def _key_prototype(self, frame: Tensor, number: int) -> Tensor:
        """Pass the frame alone and record the first layer's normalised keys."""
        calls = []
        hook = self.model.transformer_blocks[0].attn.norm_k.register_forward_hook(lambda *call: calls.append(call[2]))
        self._pass(frame[None], CLEAN_TIME, self.actions[number : number + 1])
        hook.remove()
        mean = calls[-1][0].float().mean(dim=(0, 1))
        return mean / mean.norm()

    def _expected(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        *pieces, newest = self._pieces(kept)
        size = len(kept)
        mass, square = torch.full((size,), float("nan")), torch.full((size, size), float("nan"))
        rotation = self._mean_rotation(kept[0], size - 1)
        masses, squares = [], []
        for layer, (_, key, value, _) in self.passes[0]["attention"].items():
            queries = torch.cat(self.all_queries[layer])
            for head in range(queries.shape[1]):
                past, clean = queries[:, head], key[0, : newest.start, head].float()
                mean, covariance = rotation @ past.mean(dim=0), rotation @ torch.cov(past.T, correction=0) @ rotation.T
                logits = torch.stack([mean @ k / math.sqrt(len(k)) + k @ covariance @ k / (2 * len(k)) for k in clean])
                scores = logits.softmax(dim=0) * value[0, : newest.start, head].float().norm(dim=-1)
                masses.append(torch.stack([scores[piece].mean() for piece in pieces]))
                squares.append(_proxy_cosines(mean, covariance, torch.stack([clean[piece].mean(dim=0) for piece in pieces])))
        mass[:-1], square[:-1, :-1] = torch.stack(masses).mean(dim=0), torch.stack(squares).mean(dim=0)
        return mass, square

    def _mean_rotation(self, frame: Tensor, position: int) -> Tensor:
        """Mean over a frame's tokens of the rotation matrices (d, d) at a time position."""
        patch = self.model.patch_size
        rows, columns = frame.shape[-2] // patch, frame.shape[-1] // patch
        turns = rotary_table(torch.tensor([position]), rows, columns, self.model.axes_dims_rope)[:, 0]
        blocks = [[torch.tensor([[z.real, -z.imag], [z.imag, z.real]]) for z in token] for token in turns]
        return torch.stack([torch.block_diag(*token) for token in blocks]).mean(dim=0).to(frame.device)

    def _context_gap(self, context: Tensor, number: int, noise_seed: int) -> Tensor:
        """Noise a context frame half-way and predict it from those before it."""
        frame = context[number]
        noise = context_noise(noise_seed, number, frame.shape).to(frame)
        noisy = (1 - self.sigma) * frame + self.sigma * noise
        frames, time = torch.cat([context[:number], noisy[None]]), self.times[self.probe]
        velocity = self._pass(frames, time, self.actions[: number + 1])
        if self.workload.guidance > 1:
            velocity = self._guided(velocity, self._pass(frames, time))
        return (noisy.float() - self.sigma * velocity.float() - frame.float()).square().mean()

    def _pass(self, frames: Tensor, time: float, actions: Sequence[int] = ()) -> Tensor:
        """Velocity of the last of these frames (F, C, h, w), at this time; the others are clean."""
        times = torch.full((1, len(frames)), CLEAN_TIME, device=frames.device)
        times[:, -1] = time
        conditions = self.model.null_conditions(1, len(frames), frames.device)
        if actions:
            conditions = {"action": torch.tensor([list(actions)], device=frames.device)}
        return self.model(frames[None], times, **conditions)[0, -1]

    def _guided(self, conditional: Tensor, null: Tensor) -> Tensor:
        return null + self.workload.guidance * (conditional - null)


def _pairs(frames: Sequence[Tensor], function: object) -> Tensor:
    return torch.stack([torch.stack([function(a.float(), b.float()) for b in frames]) for a in frames])


def _column_gaps(frames: Sequence[Tensor]) -> Tensor:
    def gaps(a: Tensor, b: Tensor) -> Tensor:
        return (a[..., :, None] - b[..., None, :]).square().mean(dim=(0, 1)).amin(dim=1)

    return _pairs(frames, gaps)


def _proxy_cosines(mean: Tensor, covariance: Tensor, keys: Tensor) -> Tensor:
    """Cosines (K, K) of keys (K, d), centred, after projection on the mean and the leading eigenvectors of the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    spanning = [vector for value, vector in zip(values, vectors.T, strict=True) if value > MIN_EIGENVALUE_SHARE * values[-1]][
        -PROXY_RANK:
    ]
    outside = mean - sum((mean @ vector) * vector for vector in spanning)
    if outside.norm() > MIN_EIGENVALUE_SHARE * mean.norm():
        spanning.append(outside)
    basis, _ = torch.linalg.qr(torch.stack(spanning, dim=1))
    projected = (keys - keys.mean(dim=0)) @ (basis @ basis.T)
    return torch.cosine_similarity(projected[:, None], projected[None], dim=-1)
