"""Many rollouts in lock-step: the fast implementation behind the environments and the evaluation.

What makes it fast, and exact:

- Keys and values of clean frames are computed once per frame, not once per ODE step, and outlive an eviction as long as no
  frame before them was dropped.
- Rows share every forward pass; shorter histories are padded and masked.
- A latent is a pure function of host, clip, noise seed, step, kept frames and their classes: a memo under a hash of these
  returns what was computed before, for example for another policy. The same holds for its pixels.

With feedback of true frames, the history holds the clip's encoded frames, which are given from the start, in place of generated
ones; generated frames are kept beside it.

The result is that of `far_env.rollout.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import GENERATED
from far_env.device import torch_defaults
from far_env.errors import PolicyError
from far_env.frame_meta import frame_features
from far_env.host.sampler import FrameSampler, with_null_class
from far_env.rollout.context import context_latents
from far_env.rollout.memo import FrameMemo, content_key
from far_env.rollout.noise import workload_noise
from far_env.rollout.signals import RecordedSignals, SignalRecorder
from far_env.workloads import Workload


@dataclass
class Rollout:
    """One row. Tensors are never changed in place, so that copies may share them.

    Attributes:
        num_context, num_predict: frames given and to be generated.
        steps: generated frames.
        kept: true numbers of the history's frames; context frames are 0 … n_context-1.
        frames: clean latents (C, h, w) by true number, kept or not: of all frames so far, or where true frames are fed back of
            the whole clip, without the generated ones.
        keys: content keys of these frames.
        generated: latents of the generated frames so far, by step.
        generated_keys: content keys of these.
        actions: of all frames, by true number; none where the host is not conditioned on actions.
        label: of the clip; None where the host is not conditioned on labels.
        prefix: keys and values (layers, 2, branches, tokens, heads, d) of the first frames of the history, as many as are
            valid. There is one branch, or with guidance two, that of the null class first.
        num_coarse: how many of the history's oldest frames were coarse when these were computed.
        noise: (n_predict, C, h, w).
        noise_seed: the seed of that noise.
        recorded: signals of its frames, where they are recorded.
    """

    num_context: int
    num_predict: int
    steps: int
    noise: Tensor
    noise_seed: int
    actions: tuple[int, ...] = ()
    kept: list[int] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    generated: list[Tensor] = field(default_factory=list)
    generated_keys: list[str] = field(default_factory=list)
    prefix: list[Tensor] = field(default_factory=list)
    num_coarse: int = 0
    recorded: RecordedSignals = field(default_factory=RecordedSignals)
    label: int | None = None

    @property
    def newest(self) -> int:
        """The true number of the newest frame."""
        return self.num_context + self.steps - 1

    def visible_actions(self) -> list[int]:
        """Actions of the history's frames and of the next one, where the host is conditioned on actions."""
        return [self.actions[number] for number in (*self.kept, self.newest + 1)] if self.actions else []

    def copy(self) -> Rollout:
        """A rollout that continues from the same state independently; the tensors are shared."""
        names = ("kept", "frames", "keys", "generated", "generated_keys", "prefix")
        lists = {name: list(getattr(self, name)) for name in names}
        return replace(self, **lists)


class RolloutBatch:
    """The state of ``num_rows`` independent rollouts of one workload.

    A row is begun with a clip and a noise seed, then advanced frame by frame and cut down by `retain`. Rows may have different
    lengths, be at different steps and hold different histories.

    Args:
        workload: what is rolled out.
        num_rows: rollouts in the batch.
        memo: shared with other batches to reuse their frames, or None.
        signals: names of `far_env.contract.SIGNALS` to be recorded. Frames that are recorded while they are generated are
            computed even if the memo holds them.

    Raises:
        PolicyError: on signals of a workload without given frames or with labels, where they are not recorded.
    """

    @torch_defaults()
    def __init__(self, workload: Workload, num_rows: int, memo: FrameMemo | None = None, signals: Sequence[str] = ()) -> None:
        host = workload.host
        if signals and (workload.labels or workload.num_context == 0):
            raise PolicyError(f"signals are not recorded in {workload.name}: they need given frames, and a host without labels")
        self.workload = workload
        self.memo = FrameMemo(0) if memo is None else memo
        self._empty = torch.zeros(host.latent_shape, device=host.device, dtype=host.dtype)
        self._rows = [self._unbegun() for _ in range(num_rows)]
        self._sampler = FrameSampler(host.transformer, workload.num_steps, workload.guidance)
        self._num_branches = 2 if self._sampler.guided else 1
        self._origin = (self.memo.host_number(host), workload.num_steps, workload.guidance, workload.noise)
        self._recorder = SignalRecorder(signals, self._sampler)

    def step(self, row: int) -> int:
        """Number of frames that the row has generated."""
        return self._rows[row].steps

    def history_length(self, row: int) -> int:
        """Number of frames that the row's history holds."""
        return len(self._rows[row].kept)

    def frame_numbers(self, row: int) -> list[int]:
        """True numbers of the row's history, oldest first; context frames are 0 … n_context-1."""
        return list(self._rows[row].kept)

    @torch_defaults()
    def begin(
        self,
        rows: Sequence[int],
        clips: Sequence[Clip],
        noise_seeds: Sequence[int],
        *,
        num_context: int | None = None,
        num_predict: int | None = None,
    ) -> None:
        """Start a rollout in each of ``rows``: encode its clip's context frames, or all that are fed back, and draw its noise.

        Args:
            num_context, num_predict: other lengths than the workload's.

        Raises:
            ValueError: if the workload needs actions and a clip has none that fit, or if a clip is too short.
        """
        host = self.workload.host
        num_context = self.workload.num_context if num_context is None else num_context
        num_predict = self.workload.num_predict if num_predict is None else num_predict
        actions = [self.workload.actions_of(clip, num_context + num_predict) for clip in clips]
        labels = [self.workload.label_of(clip) for clip in clips]
        num_given = num_context + (num_predict if self.workload.true_feedback else 0)
        contexts = [clip.context(num_given) for clip in clips]
        keys = [content_key(*self._origin, context.data.cast("B") if num_given else b"") for context in contexts]
        latents_by_row = [self.memo.get(key) for key in keys]
        missing = [i for i, latents in enumerate(latents_by_row) if latents is None]
        if missing:
            for i, latents in zip(missing, context_latents(host, [clips[i] for i in missing], num_given), strict=True):
                latents_by_row[i] = latents.clone()
                self.memo.put(keys[i], latents_by_row[i])
        context_by_row = [latents[:num_context] for latents in latents_by_row]
        recorded = self._recorder.begin(context_by_row, noise_seeds, actions if self.workload.actions else None)
        begun = zip(rows, keys, latents_by_row, noise_seeds, actions, labels, recorded, strict=True)
        for row, key, latents, seed, row_actions, label, row_recorded in begun:
            self._rows[row] = Rollout(
                num_context=num_context,
                num_predict=num_predict,
                steps=0,
                noise=workload_noise(self.workload, seed, num_predict),
                noise_seed=int(seed),
                actions=row_actions,
                kept=list(range(num_context)),
                frames=list(latents),
                keys=[content_key(key, number) for number in range(num_given)],
                recorded=row_recorded,
                label=label,
            )

    def cache_bytes(self, row: int) -> int:
        """Bytes of the keys and values that the row holds."""
        return sum(block.nbytes for block in self._rows[row].prefix)

    def fork(self, row: int, onto: Sequence[int]) -> None:
        """Replace the rows ``onto`` by copies of ``row``. Nothing is computed, and only references are copied."""
        for other in onto:
            self._rows[other] = self._rows[row].copy()

    def keyed_history(self, row: int) -> list[tuple[Tensor, str]]:
        """The latents (C, h, w) of the row's history, oldest first, each with the key of its content."""
        rollout = self._rows[row]
        return [(rollout.frames[number], rollout.keys[number]) for number in rollout.kept]

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, shorter rows padded with zeros at the end, and lengths (R,)."""
        histories = [[rollout.frames[number] for number in rollout.kept] for rollout in self._chosen(rows)]
        longest = max(map(len, histories))
        padded = [frame for history in histories for frame in history + [self._empty] * (longest - len(history))]
        lengths = torch.tensor([len(history) for history in histories], device=self._empty.device)
        return torch.stack(padded).unflatten(0, (len(histories), longest)), lengths

    @torch_defaults()
    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    @torch_defaults()
    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The recorded signals of each row's history, by name. Raises ValueError unless the row was just advanced."""
        chosen = self._chosen(rows)
        actions = (
            [[rollout.actions[number] for number in rollout.kept] for rollout in chosen] if self.workload.actions else None
        )
        kept = [rollout.kept for rollout in chosen]
        return self._recorder.arrays([rollout.recorded for rollout in chosen], kept, self.history(rows)[0], actions)

    @torch_defaults()
    @torch.no_grad()
    def advance(self, rows: Sequence[int]) -> None:
        """Generate the next frame of each row and append it to its history."""
        chosen = self._chosen(rows)
        for rollout, (key, latent) in zip(chosen, self._generate(chosen), strict=True):
            self._append(rollout, latent, key)

    @torch_defaults()
    @torch.no_grad()
    def next_frames(self, rows: Sequence[int], histories: Sequence[Sequence[tuple[Tensor, str]]]) -> list[Tensor]:
        """The next frame (C, h, w) of each row if its history held other latents. The rows stay as they are.

        Args:
            histories: of each row, the latents in place of its frames, oldest first, with the keys of their contents.
        """
        others = []
        for rollout, history in zip(self._chosen(rows), histories, strict=True):
            other = replace(rollout.copy(), prefix=[], num_coarse=0)
            for number, (latent, key) in zip(rollout.kept, history, strict=True):
                other.frames[number], other.keys[number] = latent, key
            others.append(other)
        return [latent for _, latent in self._generate(others)]

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep the frames at these positions of the row's history, ascending."""
        rollout = self._rows[row]
        unchanged = next((place for place, i in enumerate(ids) if place != i), len(ids))
        rollout.kept = [rollout.kept[i] for i in ids]
        rollout.prefix = rollout.prefix[:unchanged]

    def finished(self, row: int) -> bool:
        """Return whether the row has generated all its frames (or was never begun)."""
        return self._rows[row].steps >= self._rows[row].num_predict

    def generated(self, rows: Sequence[int], first: int = 0, last: int | None = None) -> Tensor:
        """Generated latents first … last-1 (R, n, C, h, w), zero where there is none (yet)."""
        chosen = self._chosen(rows)
        steps = self._steps(chosen, first, last)
        frames = [rollout.generated[step] if step < rollout.steps else self._empty for rollout in chosen for step in steps]
        return torch.stack(frames).unflatten(0, (len(chosen), len(steps)))

    @torch_defaults()
    def decode(self, rows: Sequence[int], first: int = 0, last: int | None = None) -> Tensor:
        """Predicted frames first … last-1 of each row as pixels (R, last − first, 3, H, W)."""
        latents = self.generated(rows, first, last)
        autoencoder = self.workload.host.autoencoder
        if self.memo.max_bytes == 0:
            return autoencoder.decode(latents)
        chosen = self._chosen(rows)
        keys = [
            content_key("pixels", *self._origin, rollout.generated_keys[step] if step < rollout.steps else "not generated")
            for rollout in chosen
            for step in self._steps(chosen, first, last)
        ]
        pixels = {key: self.memo.get(key) for key in dict.fromkeys(keys)}
        place = {key: i for i, key in enumerate(keys) if pixels[key] is None}
        if place:
            decoded = autoencoder.decode(latents.flatten(0, 1)[list(place.values())][None])[0]
            for key, frame in zip(place, decoded, strict=True):
                pixels[key] = frame.clone()
                self.memo.put(key, pixels[key])
        return torch.stack([pixels[key] for key in keys]).unflatten(0, latents.shape[:2])

    def state_dict(self) -> dict:
        """The rollouts as tensors and plain values."""
        return {
            "host": self.workload.host.weights_hash,
            "feedback": self.workload.feedback,
            "lengths": [(rollout.num_context, rollout.num_predict) for rollout in self._rows],
            "steps": [rollout.steps for rollout in self._rows],
            "kept": [list(rollout.kept) for rollout in self._rows],
            "keys": [list(rollout.keys) for rollout in self._rows],
            "noise_seeds": [rollout.noise_seed for rollout in self._rows],
            "actions": [list(rollout.actions) for rollout in self._rows],
            "labels": [rollout.label for rollout in self._rows],
            "frames": [_stacked(rollout.frames) for rollout in self._rows],
            "generated": [_stacked(rollout.generated) if self.workload.true_feedback else None for rollout in self._rows],
            "generated_keys": [list(rollout.generated_keys) for rollout in self._rows],
            "recorded": [rollout.recorded.state_dict() for rollout in self._rows],
        }

    @torch_defaults()
    def load_state_dict(self, state: dict) -> None:
        """Restore rollouts saved by `state_dict`.

        Raises:
            ValueError: if they are of another host, number of rows or feedback, or have no actions where the workload needs
                them.
        """
        feedback = state.get("feedback", GENERATED)  # of states that were saved before there was another
        if feedback != self.workload.feedback:
            raise ValueError(
                f"the state has feedback of {feedback} frames, {self.workload.name} of {self.workload.feedback} ones"
            )
        host = self.workload.host.weights_hash
        if (state["host"], len(state["frames"])) != (host, len(self._rows)):
            raise ValueError(
                f"the state has {len(state['frames'])} rows of host {state['host']}, this batch {len(self._rows)} of {host}"
            )
        actions = [tuple(row_actions) for row_actions in state.get("actions", [()] * len(self._rows))]
        for row, (frames, lengths) in enumerate(zip(state["frames"], state["lengths"], strict=True)):
            num_needed = sum(lengths) if self.workload.actions and frames is not None else 0
            if len(actions[row]) != num_needed:
                raise ValueError(
                    f"row {row} of the state has {len(actions[row])} actions, {self.workload.name} needs {num_needed}"
                )
        for row, frames in enumerate(state["frames"]):
            if frames is None:
                self._rows[row] = self._unbegun()
                continue
            seed = state["noise_seeds"][row]
            num_context, num_predict = state["lengths"][row]
            latents, keys = list(frames.to(self._empty)), list(state["keys"][row])
            generated, generated_keys = latents[num_context:], keys[num_context:]
            if self.workload.true_feedback:
                outputs, generated_keys = state["generated"][row], list(state["generated_keys"][row])
                generated = [] if outputs is None else list(outputs.to(self._empty))
            self._rows[row] = Rollout(
                label=state.get("labels", [None] * len(self._rows))[row],
                num_context=num_context,
                num_predict=num_predict,
                steps=state["steps"][row],
                noise=workload_noise(self.workload, seed, num_predict),
                noise_seed=seed,
                actions=actions[row],
                kept=list(state["kept"][row]),
                frames=latents,
                keys=keys,
                generated=generated,
                generated_keys=generated_keys,
                recorded=RecordedSignals.from_state_dict(state["recorded"][row], self._empty.device),
            )

    def _unbegun(self) -> Rollout:
        lengths = {"num_context": self.workload.num_context, "num_predict": self.workload.num_predict}
        return Rollout(**lengths, steps=self.workload.num_predict, noise=self._empty[None], noise_seed=0)

    def _chosen(self, rows: Sequence[int]) -> list[Rollout]:
        return [self._rows[row] for row in rows]

    def _steps(self, rollouts: Sequence[Rollout], first: int, last: int | None) -> range:
        """Steps first … last-1 of the longest of these rollouts."""
        return range(max(rollout.num_predict for rollout in rollouts))[first:last]

    def _generate(self, rollouts: Sequence[Rollout]) -> list[tuple[str, Tensor]]:
        """Key and latent (C, h, w) of each rollout's next frame. Rollouts that would become the same one are computed once."""
        frames: dict[str, Tensor] = {}
        missing: dict[str, list[Rollout]] = {}
        keys = []
        for rollout in rollouts:
            kept_keys = [rollout.keys[number] for number in rollout.kept]
            classes = rollout.visible_actions() if rollout.label is None else ("label", rollout.label)
            key = content_key(*self._origin, rollout.noise_seed, rollout.steps, *kept_keys, *classes)
            keys.append(key)
            latent = None if self._recorder.needs_probe else self.memo.get(key)
            if latent is None:
                missing.setdefault(key, []).append(rollout)
            else:
                frames[key] = latent
        if missing:
            first = [alike[0] for alike in missing.values()]
            self._encode_histories(first)
            for (key, alike), latent in zip(missing.items(), self._sample(first), strict=True):
                # A view would keep the frames of all rows alive for as long as one of them.
                frames[key] = latent.clone()
                self.memo.put(key, frames[key])
                for rollout in alike[1:]:
                    rollout.prefix, rollout.num_coarse = list(alike[0].prefix), alike[0].num_coarse
                    rollout.recorded = alike[0].recorded
        return [(key, frames[key]) for key in keys]

    def _append(self, rollout: Rollout, latent: Tensor, key: str) -> None:
        rollout.kept.append(rollout.newest + 1)
        rollout.generated.append(latent)
        rollout.generated_keys.append(key)
        if not self.workload.true_feedback:
            rollout.frames.append(latent)
            rollout.keys.append(key)
        rollout.steps += 1
        if rollout.steps == rollout.num_predict:
            rollout.prefix = []

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
        actions = torch.tensor([rollout.visible_actions()[num_known:-1] for rollout in rollouts], device=self._empty.device)
        return {"action": with_null_class(self._sampler.model, actions) if self._sampler.guided else actions}

    def _labels(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        """Labels (R,), where the host is conditioned on them."""
        return (
            torch.tensor([rollout.label for rollout in rollouts], device=self._empty.device) if self.workload.labels else None
        )

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
            action = torch.tensor([rollout.visible_actions()[-1:] for rollout in rollouts], device=noise.device)
        probe = self._recorder.probe([[block.shape[3] for block in rollout.prefix] for rollout in rollouts], num_tokens, noise)
        lengths, label = [len(rollout.kept) for rollout in rollouts], self._labels(rollouts)
        latents = self._sampler(memory, noise, lengths, label=label, action=action, probe=probe)
        if probe is not None:
            recorded = self._recorder.record(probe, [rollout.recorded for rollout in rollouts], memory, latents)
            for rollout, row_recorded in zip(rollouts, recorded, strict=True):
                rollout.recorded = row_recorded
        return latents[:, 0]


def _stacked(frames: Sequence[Tensor]) -> Tensor | None:
    """Latents as one tensor on the CPU, None if there are none."""
    return torch.stack(list(frames)).cpu() if frames else None
