"""Many rollouts in lock-step: the fast implementation behind the environments and the evaluation.

What makes it fast, and exact:

- With FAR, keys and values of clean frames are computed once per frame, not once per ODE step, and rows share every forward
  pass: `far_env.rollout.cached_frames`. Other hosts generate unit after unit: `far_env.rollout.plain_units`.
- On a GPU, histories that stay as long are replayed as CUDA graphs: `far_env.host.cuda_graphs`.
- A latent is a pure function of host, clip, noise seed, step, kept frames and their classes: a memo under a hash of these
  returns what was computed before, for example for another policy. The same holds for its pixels.

With feedback of true frames, the history holds the clip's encoded frames, which are given from the start, in place of generated
ones; generated frames are kept beside it.

Where a host generates chunks, "frame" stands for a chunk wherever histories, numbers and steps are meant; `decode` and
`generated` give the frames and the latents that the chunks hold.

The result is that of `far_env.rollout.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import GENERATED
from far_env.device import torch_defaults, upload
from far_env.frame_meta import frame_features
from far_env.host.far_host import FARHost
from far_env.host.protocol import as_wide_latent, join_units, split_units
from far_env.rollout.cached_frames import CachedFrames
from far_env.rollout.context import context_latents
from far_env.rollout.memo import FrameMemo, content_key
from far_env.rollout.noise import workload_noise
from far_env.rollout.plain_units import PlainUnits
from far_env.rollout.signals import RecordedSignals
from far_env.rollout.state import Rollout, UnitGenerator
from far_env.workload import Workload


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
        PolicyError: on signals that are not recorded with this workload and host.
    """

    @torch_defaults()
    def __init__(self, workload: Workload, num_rows: int, memo: FrameMemo | None = None, signals: Sequence[str] = ()) -> None:
        host = workload.host
        self.workload = workload
        self.memo = FrameMemo(0) if memo is None else memo
        self._empty = torch.zeros(workload.unit_shape, device=host.device, dtype=host.dtype)
        self._rows = [self._unbegun() for _ in range(num_rows)]
        self._origin = (self.memo.host_number(host), workload.num_steps, workload.guidance, workload.noise)
        self._generator: UnitGenerator = (CachedFrames if isinstance(host, FARHost) else PlainUnits)(workload, signals)

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
            num_context, num_predict: other lengths than the workload's, for hosts whose units are frames.

        Raises:
            ValueError: if the workload needs actions, labels or prompts and a clip has none that fit, or is too short.
        """
        host = self.workload.host
        num_context = self.workload.num_context if num_context is None else num_context
        num_predict = self.workload.num_predict if num_predict is None else num_predict
        context_units = num_context if not host.chunked else self.workload.context_units
        units = self.workload.units if host.chunked else host.units(num_context + num_predict)
        actions = [self.workload.actions_of(clip, num_context + num_predict) for clip in clips]
        labels = [self.workload.label_of(clip) for clip in clips]
        prompts = [self.workload.prompt_of(clip) for clip in clips]
        num_given = num_context + (num_predict if self.workload.true_feedback else 0)
        contexts = [clip.context(num_given) for clip in clips]
        keys = [content_key(*self._origin, context.data.cast("B") if num_given else b"") for context in contexts]
        latents_by_row = [self.memo.get(key) for key in keys]
        missing = [i for i, latents in enumerate(latents_by_row) if latents is None]
        if missing:
            for i, latents in zip(missing, context_latents(host, [clips[i] for i in missing], num_given), strict=True):
                latents_by_row[i] = latents.clone()
                self.memo.put(keys[i], latents_by_row[i])
        given_units = units if self.workload.true_feedback else units[:context_units]
        frames_by_row = [split_units(host, latents, given_units) for latents in latents_by_row]
        context_by_row = [latents[: sum(unit.latents for unit in units[:context_units])] for latents in latents_by_row]
        recorded = self._generator.begin(context_by_row, noise_seeds, actions if self.workload.actions else None)
        begun = zip(rows, keys, frames_by_row, noise_seeds, actions, labels, prompts, recorded, strict=True)
        for row, key, frames, seed, row_actions, label, prompt, row_recorded in begun:
            self._rows[row] = Rollout(
                units=units,
                num_context=context_units,
                steps=0,
                noise=workload_noise(self.workload, seed, units[context_units:]),
                noise_seed=int(seed),
                actions=row_actions,
                kept=list(range(context_units)),
                frames=frames,
                keys=[content_key(key, number) for number in range(len(frames))],
                recorded=row_recorded,
                label=label,
                prompt=prompt,
            )

    def cache_bytes(self, row: int) -> int:
        """Bytes of the keys and values that the row holds."""
        return sum(block.nbytes for block in self._rows[row].prefix)

    def fork(self, row: int, onto: Sequence[int]) -> None:
        """Replace the rows ``onto`` by copies of ``row``. Nothing is computed, and only references are copied."""
        for other in onto:
            self._rows[other] = self._rows[row].copy()

    def keyed_history(self, row: int) -> list[tuple[Tensor, str]]:
        """The latents of the row's history, oldest first, each with the key of its content."""
        rollout = self._rows[row]
        return [(rollout.frames[number], rollout.keys[number]) for number in rollout.kept]

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, shorter rows padded with zeros at the end, and lengths (R,).

        A chunk is one wide latent, see `far_env.host.protocol.as_wide_latent`.
        """
        size = self.workload.most_latents
        histories = [
            [as_wide_latent(rollout.frames[number], size) for number in rollout.kept] for rollout in self._chosen(rows)
        ]
        longest = max(map(len, histories))
        padded = [frame for history in histories for frame in history + [self._empty] * (longest - len(history))]
        lengths = upload(torch.tensor([len(history) for history in histories]), self._empty.device)
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
        return self._generator.arrays([rollout.recorded for rollout in chosen], kept, self.history(rows)[0], actions)

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
        """The next frame of each row if its history held other latents. The rows stay as they are.

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
        """Generated latents (R, L, C, h, w) of steps first … last-1, zero where there is none (yet).

        The rows must have units of the same sizes.
        """
        chosen = self._chosen(rows)
        steps = self._steps(chosen, first, last)
        return torch.stack([join_units(self.workload.host, [_at(rollout, step) for step in steps]) for rollout in chosen])

    @torch_defaults()
    def decode(self, rows: Sequence[int], first: int = 0, last: int | None = None) -> Tensor:
        """What steps first … last-1 of each row predicted, as pixels (R, F, 3, H, W); one frame per step unless in chunks."""
        host = self.workload.host
        chosen = self._chosen(rows)
        if host.chunked:
            return torch.stack([self._decode_chunks(rollout, first, last) for rollout in chosen])
        latents = self.generated(rows, first, last)
        if self.memo.max_bytes == 0:
            return host.decode(latents)
        keys = [
            content_key("pixels", *self._origin, rollout.generated_keys[step] if step < rollout.steps else "not generated")
            for rollout in chosen
            for step in self._steps(chosen, first, last)
        ]
        pixels = {key: self.memo.get(key) for key in dict.fromkeys(keys)}
        place = {key: i for i, key in enumerate(keys) if pixels[key] is None}
        if place:
            decoded = host.decode(latents.flatten(0, 1)[list(place.values())][None])[0]
            for key, frame in zip(place, decoded, strict=True):
                pixels[key] = frame.clone()
                self.memo.put(key, pixels[key])
        return torch.stack([pixels[key] for key in keys]).unflatten(0, latents.shape[:2])

    def _decode_chunks(self, rollout: Rollout, first: int, last: int | None) -> Tensor:
        """The frames (F, 3, H, W) of generated chunks; a chunk is decoded with all that come before it in the clip."""
        steps = self._steps([rollout], first, last)
        sequence = [*rollout.frames[: rollout.num_context], *(_at(rollout, step) for step in range(steps.stop))]
        frames = self.workload.host.decode(join_units(self.workload.host, sequence)[None])[0]
        return frames[sum(unit.frames for unit in rollout.units[: rollout.num_context + steps.start]) :]

    def state_dict(self) -> dict:
        """The rollouts as tensors and plain values."""
        return {
            "host": self.workload.host.weights_hash,
            "feedback": self.workload.feedback,
            "lengths": [
                tuple(
                    sum(unit.frames for unit in part) for part in (row.units[: row.num_context], row.units[row.num_context :])
                )
                for row in self._rows
            ],
            "steps": [rollout.steps for rollout in self._rows],
            "kept": [list(rollout.kept) for rollout in self._rows],
            "keys": [list(rollout.keys) for rollout in self._rows],
            "noise_seeds": [rollout.noise_seed for rollout in self._rows],
            "actions": [list(rollout.actions) for rollout in self._rows],
            "labels": [rollout.label for rollout in self._rows],
            "prompts": [rollout.prompt for rollout in self._rows],
            "frames": [self._stored(rollout.frames) for rollout in self._rows],
            "generated": [self._stored(rollout.generated) if self.workload.true_feedback else None for rollout in self._rows],
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
            units = self.workload.host.units(num_context + num_predict)
            if self.workload.host.chunked:
                num_context = self.workload.context_units
            keys = list(state["keys"][row])
            latents = split_units(self.workload.host, frames.to(self._empty), units[: len(keys)])
            generated, generated_keys = latents[num_context:], keys[num_context:]
            if self.workload.true_feedback:
                outputs, generated_keys = state["generated"][row], list(state["generated_keys"][row])
                done = units[num_context : num_context + len(generated_keys)]
                generated = [] if outputs is None else split_units(self.workload.host, outputs.to(self._empty), done)
            self._rows[row] = Rollout(
                label=state.get("labels", [None] * len(self._rows))[row],
                prompt=state.get("prompts", [None] * len(self._rows))[row],
                units=units,
                num_context=num_context,
                steps=state["steps"][row],
                noise=workload_noise(self.workload, seed, units[num_context:]),
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
        steps, host = self.workload.predict_units, self.workload.host
        sizes = [(unit.latents,) if host.chunked else () for unit in self.workload.units[self.workload.context_units :]]
        noise = [self._empty.new_zeros((*size, *host.latent_shape)) for size in sizes]
        return Rollout(self.workload.units, self.workload.context_units, steps, noise, noise_seed=0)

    def _chosen(self, rows: Sequence[int]) -> list[Rollout]:
        return [self._rows[row] for row in rows]

    def _steps(self, rollouts: Sequence[Rollout], first: int, last: int | None) -> range:
        """Steps first … last-1 of the longest of these rollouts."""
        return range(max(rollout.num_predict for rollout in rollouts))[first:last]

    def _generate(self, rollouts: Sequence[Rollout]) -> list[tuple[str, Tensor]]:
        """Key and latent of each rollout's next frame. Rollouts that would become the same one are computed once."""
        frames: dict[str, Tensor] = {}
        missing: dict[tuple[str, ...], list[Rollout]] = {}
        keys = []
        for rollout in rollouts:
            kept_keys = [rollout.keys[number] for number in rollout.kept]
            classes = rollout.visible_actions() if rollout.label is None else ("label", rollout.label)
            if rollout.prompt is not None:
                classes = ("prompt", rollout.prompt)
            shape = rollout.noise[rollout.steps].shape  # workloads of other lengths may have shorter chunks here
            key = content_key(*self._origin, rollout.noise_seed, rollout.steps, *shape, *kept_keys, *classes)
            keys.append(key)
            latent = None if self._generator.needs_probe else self.memo.get(key)
            if latent is None:
                # Where true frames are fed back, signals of the frames so far may differ though the next one does not.
                before = rollout.generated_keys if self._generator.needs_probe else ()
                missing.setdefault((key, *before), []).append(rollout)
            else:
                frames[key] = latent
        if missing:
            first = [alike[0] for alike in missing.values()]
            for ((key, *_), alike), latent in zip(missing.items(), self._generator.generate(first), strict=True):
                # A view would keep the frames of all rows alive for as long as one of them.
                frames[key] = latent.clone()
                self.memo.put(key, frames[key])
                for rollout in alike[1:]:
                    rollout.prefix, rollout.num_coarse = list(alike[0].prefix), alike[0].num_coarse
                    rollout.recorded = alike[0].recorded
        return [(key, frames[key]) for key in keys]

    def _append(self, rollout: Rollout, latent: Tensor, key: str) -> None:
        rollout.num_before = len(rollout.kept)
        rollout.kept.append(rollout.newest + 1)
        rollout.generated.append(latent)
        rollout.generated_keys.append(key)
        if not self.workload.true_feedback:
            rollout.frames.append(latent)
            rollout.keys.append(key)
        rollout.steps += 1
        if rollout.steps == rollout.num_predict:
            rollout.prefix = []

    def _stored(self, units: Sequence[Tensor]) -> Tensor | None:
        """The latents of units in turn on the CPU, None if there are none."""
        return join_units(self.workload.host, units).cpu() if units else None


def _at(rollout: Rollout, step: int) -> Tensor:
    """The unit that a rollout generated at a step, zeros if it has not yet or, where units are frames, is shorter."""
    return (
        rollout.generated[step] if step < rollout.steps else torch.zeros_like(rollout.noise[min(step, len(rollout.noise) - 1)])
    )
