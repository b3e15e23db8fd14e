"""The signals of `far_env.contract.SIGNALS`, recorded for a batch of rollouts while their frames are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.contract import OF_LATENTS
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import FrameSampler, with_null_class
from far_env.rollout.attention_probe import EPS, AttentionProbe, QueryMoments
from far_env.rollout.memo import content_key


@dataclass(frozen=True)
class RecordedSignals:
    """The signals recorded of one rollout so far. Never changed in place, so that copies of a rollout may share it.

    Attributes:
        newest: signals of the frame generated last, by name.
        gaps: denoise_gap of every frame so far, kept or not, by true number.
        moments: moments of the queries of all generated frames.
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
    def from_state_dict(state: dict[str, object], device: torch.device) -> RecordedSignals:
        """Restore what `state_dict` returned, on a device."""
        count, *moments = state["moments"] or (None,)
        return RecordedSignals(
            newest={name: value.to(device) for name, value in state["newest"].items()},
            gaps=tuple(gap.to(device) for gap in state["gaps"]),
            moments=None if count is None else QueryMoments(count, *(value.to(device) for value in moments)),
        )


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
    # Not by way of scalar products, whose rounding errors would hide that two columns are equal.
    distances = torch.cdist(columns, columns, compute_mode="donot_use_mm_for_euclid_dist")
    gaps = distances.square() / columns.shape[-1]
    return gaps.unflatten(2, (frames, width)).unflatten(1, (frames, width)).amin(dim=-1).transpose(2, 3)


def context_noise(noise_seed: int, number: int, latent_shape: Sequence[int]) -> Tensor:
    """The noise of context frame ``number`` for its denoise_gap, float32 (C, h, w): the same in every rollout."""
    seed = int(content_key("context noise", int(noise_seed), number)[:12], 16)
    return torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed))


def halfway(times: Sequence[float]) -> tuple[int, float]:
    """The ODE step half-way through these times, and its sigma."""
    step = len(times) // 2
    return step, times[step] / 1000


class SignalRecorder:
    """Records the requested signals for a batch of rollouts.

    Args:
        signal_names: names of `far_env.contract.SIGNALS`.
        sampler: generates the frames.

    Attributes:
        needs_probe: whether a requested signal is recorded while frames are generated, so that none may come from a memo.
    """

    def __init__(self, signal_names: Sequence[str], sampler: FrameSampler) -> None:
        self.signal_names = tuple(signal_names)
        self.needs_probe = any(name not in OF_LATENTS for name in signal_names)
        self._sampler = sampler
        self._estimate_at = halfway(sampler.times)

    @torch.no_grad()
    def begin(
        self, contexts: Sequence[Tensor], noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None = None
    ) -> list[RecordedSignals]:
        """The signals of new rollouts.

        Args:
            contexts: context latents of each (n, C, h, w).
            noise_seeds: of each.
            actions: of their frames, where the host is conditioned on them.
        """
        if "denoise_gap" not in self.signal_names or not contexts:
            return [RecordedSignals() for _ in contexts]
        gaps = self._context_gaps(torch.stack(list(contexts)), noise_seeds, actions)
        return [RecordedSignals(gaps=tuple(row_gaps)) for row_gaps in gaps]

    def probe(self, token_counts: Sequence[Sequence[int]], num_clean_tokens: int, latents: Tensor) -> AttentionProbe | None:
        """A probe for the next frame of each row, or None if no requested signal needs one.

        Args:
            token_counts: per row, the tokens of each clean frame.
            num_clean_tokens: slots for clean tokens in every row.
            latents: of the shape of the next frames.
        """
        if not self.needs_probe:
            return None
        num_tokens = (num_clean_tokens, self._sampler.model.tokens_per_frame(latents))
        return AttentionProbe(self.signal_names, token_counts, num_tokens, self._estimate_at, latents.device)

    def record(
        self, probe: AttentionProbe, before: Sequence[RecordedSignals], memory: Tensor, latents: Tensor
    ) -> list[RecordedSignals]:
        """The signals of rows after a frame was generated.

        Args:
            probe: the one that was called while the frame was generated.
            before: the signals of each row before it.
            memory: keys and values (layers, 2, R, T, heads, d), a row's clean frames first; with guidance the rows of the null
                class come before these.
            latents: the frames (R, 1, C, h, w).
        """
        memory = memory[:, :, -len(before) :]
        new_gaps = probe.denoise_gaps(latents) if "denoise_gap" in self.signal_names else None
        after = []
        for row, earlier in enumerate(before):
            newest, moments = probe.frame_signals(row), earlier.moments
            if probe.queries:
                clean = memory[:, :, row, : sum(probe.token_counts[row])]
                expected, moments = probe.expected_signals(row, clean, moments)
                newest |= expected
            gaps = earlier.gaps if new_gaps is None else (*earlier.gaps, new_gaps[row])
            after.append(RecordedSignals(newest, gaps, moments))
        return after

    @torch.no_grad()
    def arrays(
        self,
        recorded: Sequence[RecordedSignals],
        kept: Sequence[Sequence[int]],
        latents: Tensor,
        actions: Sequence[Sequence[int]] | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """The requested signals of each row, float32, in the shapes of `far_env.contract.SIGNALS`.

        Args:
            recorded: of each row.
            kept: per row, the true numbers of its history.
            latents: its history (R, K, C, h, w), padded at the end.
            actions: of its history's frames, where the host is conditioned on them.

        Raises:
            ValueError: if a row's history is no longer the one its newest frame was generated from.
        """
        padded = {}
        if "lat_cos" in self.signal_names:
            padded["lat_cos"] = latent_cosines(latents).cpu()
        if "column_gap" in self.signal_names:
            padded["column_gap"] = column_gaps(latents).cpu()
        if "key_proto" in self.signal_names:
            padded["key_proto"] = self._key_prototypes(latents, actions).cpu()
        rows = []
        for row, (row_recorded, numbers) in enumerate(zip(recorded, kept, strict=True)):
            count = len(numbers)
            signals = {name: tensor[row, :count] for name, tensor in padded.items()}
            for name in ("lat_cos", "column_gap"):
                if name in signals:
                    signals[name] = signals[name][:, :count]
            signals |= row_recorded.newest
            if row_recorded.gaps:
                signals["denoise_gap"] = torch.stack([row_recorded.gaps[number] for number in numbers])
            if any(name not in signals or len(signals[name]) != count for name in self.signal_names):
                raise ValueError(
                    "signals describe the frame generated last and the history it was generated from: request them after a "
                    "frame was generated and before others are dropped"
                )
            rows.append({name: signals[name].float().cpu().numpy() for name in self.signal_names})
        return rows

    def _key_prototypes(self, latents: Tensor, actions: Sequence[Sequence[int]] | None) -> Tensor:
        """key_proto (R, K, d) of latents (R, K, C, h, w)."""
        model = self._sampler.model
        if actions is None:
            return model.key_prototypes(latents, self._sampler.shared_modulations(CLEAN_TIME))
        longest = latents.shape[1]
        padded = torch.tensor([[*row, *[model.null_class] * (longest - len(row))] for row in actions], device=latents.device)
        times = torch.full(padded.shape, CLEAN_TIME, device=latents.device)
        return model.key_prototypes(latents, model.modulate(times, action=padded, dtype=latents.dtype))

    def _context_gaps(self, contexts: Tensor, noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None) -> Tensor:
        """denoise_gap (R, n) of context frames (R, n, C, h, w), each predicted once from those before it."""
        sampler, (step, sigma) = self._sampler, self._estimate_at
        model, branches = sampler.model, 2 if sampler.guided else 1
        classes = None if actions is None else torch.tensor([list(row) for row in actions], device=contexts.device)
        gaps = []
        for number in range(contexts.shape[1]):
            frame, past = contexts[:, number : number + 1], contexts[:, :number]
            noise = [context_noise(seed, number, frame.shape[2:]) for seed in noise_seeds]
            noisy = (1 - sigma) * frame + sigma * torch.stack(noise)[:, None].to(frame)
            num_clean = sum(model.token_counts(number, frame))
            memory = model.new_memory(branches * len(frame), num_clean + model.tokens_per_frame(frame), frame)
            if number:
                conditions = {"shared": sampler.shared_modulations}
                if classes is not None:
                    past_classes = classes[:, :number]
                    conditions = {"action": with_null_class(model, past_classes) if sampler.guided else past_classes}
                memory[:, :, :, :num_clean] = model.encode_context(torch.cat([past] * branches), **conditions)
            action = None if classes is None else classes[:, number : number + 1]
            velocity = sampler.velocity(memory, noisy, [number] * len(frame), step, action=action)
            estimate = noisy.float() - sigma * velocity.float()
            gaps.append((estimate - frame.float()).square().flatten(1).mean(dim=1))
        return torch.stack(gaps, dim=1)
