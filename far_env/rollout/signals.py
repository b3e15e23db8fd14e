"""What a rollout can tell a policy beyond FrameMeta: the signals of `far_env.contract.SIGNALS`, collected while frames
are made.

Watching a frame does not change it: attention goes through its fused kernel as ever, and is computed once more, plainly and in
float32, for what is asked. Everything is reduced in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.contract import OF_LATENTS
from far_env.host.blocks import rotate
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import FrameSampler, with_null_class
from far_env.rollout.memo import content_key

EXPECTED = ("expected_mass", "expected_cos")
PROXY_RANK = 8
"""Leading eigenvectors of the queries' covariance that span what future queries can tell apart."""
REAL_SHARE = 1e-3
"""Eigenvalues below this share of the largest, or a mean with less than this share outside of the eigenvectors, span nothing:
their directions would be those of rounding errors."""
EPS = 1e-8


@dataclass(frozen=True)
class QueryMoments:
    """Of queries before rotation: running mean (layers, heads, d), sum of deviations' outer products (layers, heads, d, d)."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(queries: Tensor) -> QueryMoments:
        """Of queries (layers, tokens, heads, d)."""
        mean = queries.mean(dim=1)
        centred = queries - mean[:, None]
        return QueryMoments(queries.shape[1], mean, torch.einsum("lthd,lthe->lhde", centred, centred))

    def joined(self, other: QueryMoments | None) -> QueryMoments:
        """Of both samples together (Chan, Golub and LeVeque 1983)."""
        if other is None:
            return self
        count, change = self.count + other.count, other.mean - self.mean
        between = change[..., :, None] * change[..., None, :] * (self.count * other.count / count)
        return QueryMoments(count, self.mean + change * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(layers, heads, d, d), divided by the count."""
        return self.scatter / self.count


@dataclass(frozen=True)
class Observed:
    """What was seen of one rollout so far. Never changed in place, so that copies of a rollout may share it.

    Attributes:
        newest: signals of the frame made last, by name.
        gaps: denoise_gap of every frame so far, kept or not, by true number.
        moments: of the queries of all generated frames.
    """

    newest: dict[str, Tensor] = field(default_factory=dict)
    gaps: tuple[Tensor, ...] = ()
    moments: QueryMoments | None = None

    def state_dict(self) -> dict[str, object]:
        """All of it as tensors and plain values, on the CPU."""
        moments = self.moments and (self.moments.count, self.moments.mean.cpu(), self.moments.scatter.cpu())
        newest = {name: value.cpu() for name, value in self.newest.items()}
        return {"newest": newest, "gaps": [gap.cpu() for gap in self.gaps], "moments": moments}

    @staticmethod
    def from_state_dict(state: dict[str, object], device: torch.device) -> Observed:
        """What `state_dict` returned, on a device."""
        count, *moments = state["moments"] or (None,)
        return Observed(
            newest={name: value.to(device) for name, value in state["newest"].items()},
            gaps=tuple(gap.to(device) for gap in state["gaps"]),
            moments=None if count is None else QueryMoments(count, *(value.to(device) for value in moments)),
        )


class Watch:
    """Follows one new frame per row through the ODE; see `far_env.host.sampler.FrameWatch`.

    Args:
        wanted: signals that are asked for.
        token_counts: of each row, the tokens of its clean frames.
        num_tokens: (context, own): room for clean tokens in front of the new frame's, and the new frame's.
        probe: the ODE step at which the clean frame is estimated, and its sigma.
        like: a latent.
    """

    def __init__(
        self,
        wanted: Sequence[str],
        token_counts: Sequence[Sequence[int]],
        num_tokens: tuple[int, int],
        probe: tuple[int, float],
        like: Tensor,
    ) -> None:
        self.wanted = wanted
        self.token_counts = token_counts
        self.probe_step, self.sigma = probe
        room, own = num_tokens
        rows, most = len(token_counts), max(map(len, token_counts))
        # Which frame a token belongs to; the new frame has the last column, padding none.
        member = torch.zeros(rows, room + own, most + 1)
        for row, counts in enumerate(token_counts):
            frames = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
            member[row, torch.arange(len(frames)), frames] = 1
        member[:, room:, most] = 1
        self.member = member.to(like.device)
        self.shares = self.member / self.member.sum(dim=1, keepdim=True).clamp(min=1)
        self.step = 0
        self.first_step: dict[str, list[Tensor]] = {"qk_first": [], "key_cos": []}
        self.queries: list[Tensor] = []
        self.table: Tensor | None = None
        self.mass: list[Tensor] = []
        self.estimate: Tensor | None = None

    def attention(self, query: Tensor, key: Tensor, table: Tensor, mask: Tensor | None) -> None:
        """Read one block's queries and keys."""
        rows = len(self.member)
        query, key, table = query[-rows:].float(), key[-rows:].float(), table[-rows:]
        if "attn_mass" in self.wanted:
            self.mass.append(self._mass(query, key, None if mask is None else mask[-rows:]))
        if self.step > 0:
            return
        if "qk_first" in self.wanted:
            # The mean of all products is the product of the means.
            frames = torch.einsum("rtk,rthd->rkhd", self.shares, key)
            products = torch.einsum("rhd,rkhd->rk", query.mean(dim=1), frames)
            self.first_step["qk_first"].append(products / (key.shape[2] * key.shape[3] ** 0.5))
        if "key_cos" in self.wanted:
            frames = torch.einsum("rtk,rthd->rkhd", self.shares, F.normalize(key, dim=-1, eps=EPS))
            self.first_step["key_cos"].append(torch.einsum("rkhd,rjhd->rkj", frames, frames) / key.shape[2])
        if any(name in self.wanted for name in EXPECTED):
            self.queries.append(rotate(query, table.conj()))
            self.table = table

    def velocity(self, step: int, latent: Tensor, velocity: Tensor) -> None:
        """Estimate the clean frame at the probe step."""
        if step == self.probe_step:
            self.estimate = latent.float() - self.sigma * velocity.float()
        self.step = step + 1

    def newest(self, row: int) -> dict[str, Tensor]:
        """Signals of a row's frame over its history, itself the last."""
        kept = len(self.token_counts[row])
        found = {}
        if self.mass:
            mass = torch.stack([own[row] for own in self.mass]).mean(dim=0)
            found["attn_mass"] = torch.cat([mass[:kept], mass[-1:]])
        if self.first_step["qk_first"]:
            products = torch.stack([own[row] for own in self.first_step["qk_first"]]).mean(dim=0)
            found["qk_first"] = torch.cat([products[:kept], products[-1:]])
        if self.first_step["key_cos"]:
            cosines = torch.stack([own[row] for own in self.first_step["key_cos"]]).mean(dim=0)
            found["key_cos"] = F.pad(cosines[:kept, :kept], (0, 1, 0, 1), value=float("nan"))
        return found

    def expected(self, row: int, memory: Tensor, before: QueryMoments | None) -> tuple[dict[str, Tensor], QueryMoments]:
        """What future queries are expected to see in a row's history.

        Args:
            memory: keys and values (layers, 2, tokens, heads, d) of the row's clean frames.
            before: moments of the frames generated earlier.
        """
        moments = QueryMoments.of(torch.stack([own[row] for own in self.queries]))
        if before is not None:
            moments = before.joined(moments)
        kept = len(self.token_counts[row])
        shares = self.shares[row, : memory.shape[2], :kept]
        turn = self.table[row if len(self.table) > 1 else 0].mean(dim=0)[0]
        mean, covariance = _turned(moments.mean, turn), moments.covariance
        covariance = _turned(_turned(covariance, turn).transpose(-1, -2), turn)
        keys, values = memory.float().unbind(1)
        mass = expected_mass(mean, covariance, keys, values)
        cosines = expected_cosines(mean, covariance, torch.einsum("tk,lthd->lhkd", shares, keys))
        found = {
            "expected_mass": F.pad(mass @ shares, (0, 1), value=float("nan")),
            "expected_cos": F.pad(cosines, (0, 1, 0, 1), value=float("nan")),
        }
        return {name: found[name] for name in EXPECTED if name in self.wanted}, moments

    def gaps(self, latents: Tensor) -> Tensor:
        """Mean squared difference (R,) between the estimates and the frames (R, 1, C, h, w) as they became."""
        return (self.estimate - latents.float()).square().flatten(1).mean(dim=1)

    def _mass(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention per frame (R, frames + 1), mean over heads and queries."""
        logits = torch.einsum("rshd,rthd->rhst", query, key) / query.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
        attention = logits.softmax(dim=-1).mean(dim=(1, 2))
        return torch.einsum("rt,rtk->rk", attention, self.member)


def expected_mass(mean: Tensor, covariance: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Expected attention (arXiv 2510.00636) times the norm of the values, mean over layers and heads.

    Args:
        mean, covariance: of the queries (layers, heads, d), (layers, heads, d, d), turned to where they will stand.
        keys, values: (layers, tokens, heads, d), float32.

    Returns:
        (tokens,).
    """
    dim = keys.shape[-1]
    logits = torch.einsum("lhd,lthd->lth", mean, keys) / dim**0.5
    logits = logits + torch.einsum("lthd,lhde,lthe->lth", keys, covariance, keys) / (2 * dim)
    return (logits.softmax(dim=1) * values.norm(dim=-1)).mean(dim=(0, 2))


def expected_cosines(mean: Tensor, covariance: Tensor, keys: Tensor) -> Tensor:
    """Cosines (K, K) of frames as future queries tell them apart, mean over layers and heads.

    Args:
        mean, covariance: as in `expected_mass`.
        keys: mean keys of frames (layers, heads, K, d).
    """
    centred = keys - keys.mean(dim=2, keepdim=True)
    values, vectors = torch.linalg.eigh(covariance)
    leading = vectors[..., -PROXY_RANK:] * (values[..., -PROXY_RANK:] > REAL_SHARE * values[..., -1:])[..., None, :]
    mean = mean[..., None]
    rest = mean - leading @ (leading.transpose(-1, -2) @ mean)
    rest = rest * (rest.norm(dim=-2, keepdim=True) > REAL_SHARE * mean.norm(dim=-2, keepdim=True))
    basis = torch.cat([leading, F.normalize(rest, dim=-2, eps=EPS)], dim=-1)
    projected = F.normalize(centred @ basis, dim=-1, eps=EPS)
    return (projected @ projected.transpose(-1, -2)).mean(dim=(0, 1))


def latent_cosines(latents: Tensor) -> Tensor:
    """Cosines (R, K, K) of latents (R, K, C, h, w)."""
    unit = F.normalize(latents.float().flatten(2), dim=-1, eps=EPS)
    return unit @ unit.transpose(1, 2)


def column_gaps(latents: Tensor) -> Tensor:
    """For each column of latent i the smallest mean squared difference to any column of latent j.

    Args:
        latents: (R, K, C, h, w).

    Returns:
        (R, K, K, w), indexed row, i, j, column of i.
    """
    frames, width = latents.shape[1], latents.shape[-1]
    columns = latents.float().permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    # Not by way of scalar products, whose rounding errors would hide that two columns are alike.
    distances = torch.cdist(columns, columns, compute_mode="donot_use_mm_for_euclid_dist")
    gaps = distances.square() / columns.shape[-1]
    return gaps.unflatten(2, (frames, width)).unflatten(1, (frames, width)).amin(dim=-1).transpose(2, 3)


def context_noise(noise_seed: int, number: int, latent_shape: Sequence[int]) -> Tensor:
    """What context frame ``number`` is noised with for its denoise_gap, float32 (C, h, w): the same in every rollout."""
    seed = int(content_key("context noise", int(noise_seed), number)[:12], 16)
    return torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed))


def probe_of(times: Sequence[float]) -> tuple[int, float]:
    """The ODE step half-way, and its sigma."""
    step = len(times) // 2
    return step, times[step] / 1000


class Collector:
    """Collects the wanted signals for a batch of rollouts.

    Args:
        wanted: names of `far_env.contract.SIGNALS`.
        sampler: what makes the frames.

    Attributes:
        watching: whether frames have to be watched while they are made.
    """

    def __init__(self, wanted: Sequence[str], sampler: FrameSampler) -> None:
        self.wanted = tuple(wanted)
        self.watching = any(name not in OF_LATENTS for name in wanted)
        self._sampler = sampler
        self._probe = probe_of(sampler.times)

    @torch.no_grad()
    def begin(
        self, contexts: Sequence[Tensor], noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None = None
    ) -> list[Observed]:
        """Of fresh rollouts with these context latents, each (n, C, h, w); actions of their frames, if the host needs them."""
        if "denoise_gap" not in self.wanted or not contexts:
            return [Observed() for _ in contexts]
        gaps = self._context_gaps(torch.stack(list(contexts)), noise_seeds, actions)
        return [Observed(gaps=tuple(own)) for own in gaps]

    def watch(self, token_counts: Sequence[Sequence[int]], room: int, latents: Tensor) -> Watch | None:
        """For the next frames of rows with so many tokens per clean frame, or None if there is nothing to watch."""
        if not self.watching:
            return None
        own = self._sampler.model.tokens_per_frame(latents)
        return Watch(self.wanted, token_counts, (room, own), self._probe, latents)

    def observed(self, watch: Watch, before: Sequence[Observed], memory: Tensor, latents: Tensor) -> list[Observed]:
        """What is known of rows after a frame was made.

        Args:
            before: what was known of each.
            memory: keys and values (layers, 2, R, T, heads, d), a row's clean frames first; with guidance those of the null
                class come before these.
            latents: the frames (R, 1, C, h, w).
        """
        memory = memory[:, :, -len(before) :]
        gaps = watch.gaps(latents) if "denoise_gap" in self.wanted else None
        after = []
        for row, known in enumerate(before):
            newest, moments = watch.newest(row), known.moments
            if watch.queries:
                own = memory[:, :, row, : sum(watch.token_counts[row])]
                expected, moments = watch.expected(row, own, moments)
                newest |= expected
            own_gaps = known.gaps if gaps is None else (*known.gaps, gaps[row])
            after.append(Observed(newest, own_gaps, moments))
        return after

    @torch.no_grad()
    def arrays(
        self,
        observed: Sequence[Observed],
        kept: Sequence[Sequence[int]],
        latents: Tensor,
        actions: Sequence[Sequence[int]] | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """The wanted signals of each row, float32.

        Args:
            observed: of each row.
            kept: the true numbers of its history.
            latents: its history (R, K, C, h, w), padded at the end.
            actions: of its history's frames, where the host is conditioned on them.

        Raises:
            ValueError: if a row's history is no longer the one its newest frame was made from.
        """
        padded = {}
        if "lat_cos" in self.wanted:
            padded["lat_cos"] = latent_cosines(latents).cpu()
        if "column_gap" in self.wanted:
            padded["column_gap"] = column_gaps(latents).cpu()
        if "key_proto" in self.wanted:
            padded["key_proto"] = self._key_prototypes(latents, actions).cpu()
        rows = []
        for row, (own, numbers) in enumerate(zip(observed, kept, strict=True)):
            count = len(numbers)
            found = {name: tensor[row, :count] for name, tensor in padded.items()}
            for name in ("lat_cos", "column_gap"):
                if name in found:
                    found[name] = found[name][:, :count]
            found |= own.newest
            if own.gaps:
                found["denoise_gap"] = torch.stack([own.gaps[number] for number in numbers])
            if any(name not in found or len(found[name]) != count for name in self.wanted):
                raise ValueError(
                    "signals describe the frame made last and the history it was made from: ask for them after a frame was "
                    "made and before others are dropped"
                )
            rows.append({name: found[name].float().cpu().numpy() for name in self.wanted})
        return rows

    def _key_prototypes(self, latents: Tensor, actions: Sequence[Sequence[int]] | None) -> Tensor:
        """key_proto (R, K, d) of latents (R, K, C, h, w)."""
        model = self._sampler.model
        if actions is None:
            return model.key_prototypes(latents, self._sampler.shared_modulations(CLEAN_TIME))
        longest = latents.shape[1]
        padded = torch.tensor([[*own, *[model.null_class] * (longest - len(own))] for own in actions], device=latents.device)
        times = torch.full(padded.shape, CLEAN_TIME, device=latents.device)
        return model.key_prototypes(latents, model.modulate(times, action=padded, dtype=latents.dtype))

    def _context_gaps(self, contexts: Tensor, noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None) -> Tensor:
        """denoise_gap (R, n) of context frames (R, n, C, h, w), each predicted once from those before it."""
        sampler, (step, sigma) = self._sampler, self._probe
        model, branches = sampler.model, 2 if sampler.guided else 1
        classes = None if actions is None else torch.tensor([list(own) for own in actions], device=contexts.device)
        gaps = []
        for number in range(contexts.shape[1]):
            frame, past = contexts[:, number : number + 1], contexts[:, :number]
            noise = [context_noise(seed, number, frame.shape[2:]) for seed in noise_seeds]
            noisy = (1 - sigma) * frame + sigma * torch.stack(noise)[:, None].to(frame)
            room = sum(model.token_counts(number, frame))
            memory = model.new_memory(branches * len(frame), room + model.tokens_per_frame(frame), frame)
            if number:
                known = {"shared": sampler.shared_modulations}
                if classes is not None:
                    past_classes = classes[:, :number]
                    known = {"action": with_null_class(model, past_classes) if sampler.guided else past_classes}
                memory[:, :, :, :room] = model.encode_context(torch.cat([past] * branches), **known)
            action = None if classes is None else classes[:, number : number + 1]
            velocity = sampler.velocity(memory, noisy, [number] * len(frame), step, action=action)
            estimate = noisy.float() - sigma * velocity.float()
            gaps.append((estimate - frame.float()).square().flatten(1).mean(dim=1))
        return torch.stack(gaps, dim=1)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs of x (…, d) multiplied by complex numbers (d / 2,)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)
