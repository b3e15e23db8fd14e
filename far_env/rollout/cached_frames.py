"""The next frame of rollouts from FAR, in one pass for all of them; keys and values of clean frames are computed once.

They outlive an eviction as long as no frame before them was dropped. Shorter histories are padded and masked.

With CUDA graphs, rows whose history is as long as before their newest frame are generated from the latents of all its frames:
that repeats some keys and values, and costs one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.device import upload
from far_env.errors import PolicyError
from far_env.host.cuda_graphs import FrameShape
from far_env.host.sampler import FrameSampler, with_null_class
from far_env.rollout.signals import RecordedSignals, SignalRecorder
from far_env.rollout.state import Rollout
from far_env.workload import Workload


class CachedFrames:
    """Generates the frames of rollouts together; see `far_env.rollout.state.UnitGenerator`.

    Args:
        workload: whose host is a `far_env.host.far_host.FARHost`.
        signals: names of `far_env.contract.SIGNALS` to be recorded.

    Raises:
        PolicyError: on signals of a workload without given frames or with labels, where they are not recorded.
    """

    def __init__(self, workload: Workload, signals: Sequence[str] = ()) -> None:
        if signals and (workload.labels or workload.num_context == 0):
            raise PolicyError(f"signals are not recorded in {workload.name}: they need given frames, and a host without labels")
        self.workload = workload
        self._sampler = FrameSampler(workload.host.transformer, workload.num_steps, workload.guidance)
        self._num_branches = 2 if self._sampler.guided else 1
        self._recorder = SignalRecorder(signals, self._sampler)
        self.needs_probe = self._recorder.needs_probe

    def begin(
        self, contexts: Sequence[Tensor], noise_seeds: Sequence[int], actions: Sequence[Sequence[int]] | None
    ) -> list[RecordedSignals]:
        """The signals of new rollouts."""
        return self._recorder.begin(contexts, noise_seeds, actions)

    def arrays(
        self,
        recorded: Sequence[RecordedSignals],
        kept: Sequence[Sequence[int]],
        latents: Tensor,
        actions: Sequence[Sequence[int]] | None,
    ) -> list[dict[str, np.ndarray]]:
        """The requested signals of each row."""
        return self._recorder.arrays(recorded, kept, latents, actions)

    def generate(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The next frame (C, h, w) of each rollout."""
        latents = self._repeat_graphs(rollouts)
        if places := [place for place in range(len(rollouts)) if place not in latents]:
            others = [rollouts[place] for place in places]
            self._encode_histories(others)
            latents.update(zip(places, self._sample(others), strict=True))
        return [latents[place] for place in range(len(rollouts))]

    def _repeat_graphs(self, rollouts: Sequence[Rollout]) -> dict[int, Tensor]:
        """The next frames, by place, of those rollouts for which there is a CUDA graph."""
        host, latents = self.workload.host, {}
        if host.cuda_graphs is None or self.needs_probe:
            return latents
        by_length: dict[int, list[int]] = {}
        for place, rollout in enumerate(rollouts):
            if len(rollout.kept) == rollout.num_before > 0:
                by_length.setdefault(len(rollout.kept), []).append(place)
        kind = "label" if self.workload.labels else "action" if self.workload.actions else None
        for num_kept, places in by_length.items():
            sampling = (self.workload.num_steps, self.workload.guidance)
            graph = host.cuda_graphs.find(FrameShape(num_kept, host.latent_shape, host.dtype, *sampling, kind), len(places))
            if graph is None:
                continue
            alike = [rollouts[place] for place in places]
            kept = torch.stack([rollout.frames[number] for rollout in alike for number in rollout.kept])
            noise = torch.stack([rollout.noise[rollout.steps] for rollout in alike])[:, None]
            classes = self._labels(alike)
            if self.workload.actions:
                classes = upload(torch.tensor([rollout.visible_actions() for rollout in alike]), host.device)
            positions = torch.arange(num_kept + 1, device=noise.device)
            generated = graph(kept.unflatten(0, (len(alike), num_kept)), noise, positions, classes)
            for place, rollout, latent in zip(places, alike, generated[:, 0], strict=True):
                latents[place] = latent
                rollout.prefix = []  # what the graph has encoded stays inside, so nothing is known outside any more
        return latents

    def _encode_histories(self, rollouts: Sequence[Rollout]) -> None:
        """Compute the keys and values that are not known yet, rows with alike histories together."""
        model = self._sampler.model
        groups: dict[tuple[int, int], list[Rollout]] = {}
        for rollout in rollouts:
            num_coarse = model.num_coarse(len(rollout.kept) + 1)
            if num_coarse != rollout.num_coarse:
                # A frame that becomes coarse or fine is another one, and so is every finer frame that attends to it.
                rollout.prefix = rollout.prefix[: min(num_coarse, rollout.num_coarse)]
                rollout.num_coarse = num_coarse
            if len(rollout.prefix) < len(rollout.kept):
                groups.setdefault((len(rollout.prefix), len(rollout.kept)), []).append(rollout)
        for (num_known, num_kept), alike in groups.items():
            frames = torch.stack([rollout.frames[number] for rollout in alike for number in rollout.kept[num_known:]])
            frames = frames.unflatten(0, (len(alike), num_kept - num_known))
            counts = model.token_counts(num_kept, frames)[num_known:]
            past = None
            if num_known:
                past = torch.stack([torch.cat(rollout.prefix, dim=3) for rollout in alike], dim=3).flatten(2, 3)
            if self._sampler.guided:
                frames = torch.cat([frames, frames])
            encoded = model.encode_context(frames, past, num_known, **self._context_conditions(alike, num_known))
            encoded = encoded.unflatten(2, (self._num_branches, len(alike)))
            for row, rollout in enumerate(alike):
                rollout.prefix += [block.clone() for block in encoded[:, :, :, row].split(counts, dim=3)]

    def _context_conditions(self, rollouts: Sequence[Rollout], num_known: int) -> dict[str, Any]:
        """Arguments of `FAR.encode_context` for the rollouts' frames after the first ``num_known`` kept ones."""
        if self.workload.labels:
            labels = self._labels(rollouts)
            return {"label": with_null_class(self._sampler.model, labels) if self._sampler.guided else labels}
        if not self.workload.actions:
            return {"shared": self._sampler.shared_modulations}
        numbers = [rollout.visible_actions()[num_known:-1] for rollout in rollouts]
        actions = upload(torch.tensor(numbers), self.workload.host.device)
        return {"action": with_null_class(self._sampler.model, actions) if self._sampler.guided else actions}

    def _labels(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        """Labels (R,), where the host is conditioned on them."""
        if not self.workload.labels:
            return None
        return upload(torch.tensor([rollout.label for rollout in rollouts]), self.workload.host.device)

    def _sample(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The next latent (R, C, h, w) of rollouts whose histories are encoded."""
        noise = torch.stack([rollout.noise[rollout.steps] for rollout in rollouts])[:, None]
        model = self._sampler.model
        num_tokens = max(sum(block.shape[3] for block in rollout.prefix) for rollout in rollouts)
        memory = model.new_memory(self._num_branches * len(rollouts), num_tokens + model.tokens_per_frame(noise), noise)
        by_branch = memory.unflatten(2, (self._num_branches, len(rollouts)))
        for row, rollout in enumerate(rollouts):
            start = 0
            for block in rollout.prefix:
                end = start + block.shape[3]
                by_branch[:, :, :, row, start:end] = block
                start = end
            # Masked, but 0 times what memory happens to hold might not be 0.
            by_branch[:, :, :, row, start:num_tokens] = 0
        action = None
        if self.workload.actions:
            action = upload(torch.tensor([rollout.visible_actions()[-1:] for rollout in rollouts]), noise.device)
        probe = self._recorder.probe([[block.shape[3] for block in rollout.prefix] for rollout in rollouts], num_tokens, noise)
        lengths, label = [len(rollout.kept) for rollout in rollouts], self._labels(rollouts)
        latents = self._sampler(memory, noise, lengths, label=label, action=action, probe=probe)
        if probe is not None:
            recorded = self._recorder.record(probe, [rollout.recorded for rollout in rollouts], memory, latents)
            for rollout, row_recorded in zip(rollouts, recorded, strict=True):
                rollout.recorded = row_recorded
        return latents[:, 0]
