"""Many rollouts in lock-step: the batched implementation behind the environments and the evaluation.

The context of every generated frame is encoded once for all ODE steps, rows with histories of different lengths share one
padded batch, and encoding and decoding are batched. The result is that of `far_env.rollout.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.frame_meta import frame_features
from far_env.host.sampler import sample_next_frame
from far_env.rollout.noise import rollout_noise
from far_env.workloads import Workload


class RolloutBatch:
    """The state of ``num_rows`` independent rollouts of one workload.

    A row is begun with a clip and a noise seed, then advanced frame by frame and cut down by `retain`. Rows may stand at
    different steps and hold histories of different lengths.

    Attributes:
        steps: int (rows,), generated frames per row.
        frame_numbers: per row, true numbers of the kept frames; context frames are 0 … n_context-1.
    """

    def __init__(self, workload: Workload, num_rows: int) -> None:
        host = workload.host
        self.workload = workload
        shape = host.latent_shape
        self.steps = np.full(num_rows, workload.num_predict)
        self.frame_numbers: list[list[int]] = [[] for _ in range(num_rows)]
        self._latents = torch.zeros(num_rows, workload.num_frames, *shape, device=host.device, dtype=host.dtype)
        self._noise = torch.zeros(num_rows, workload.num_predict, *shape, device=host.device, dtype=host.dtype)

    def begin(self, rows: Sequence[int], clips: Sequence[Clip], noise_seeds: Sequence[int]) -> None:
        """Start a rollout in each of ``rows``: encode its clip's context frames, draw its noise."""
        if not rows:
            return
        workload, host = self.workload, self.workload.host
        context = np.stack([clip.frames[: workload.num_context] for clip in clips])
        frames = torch.from_numpy(context).to(host.device, host.dtype)
        index = torch.as_tensor(rows, device=host.device)
        self._latents[index, : workload.num_context] = host.autoencoder.encode(frames)
        noise = torch.stack([rollout_noise(seed, workload.num_predict, host.latent_shape) for seed in noise_seeds])
        self._noise[index] = noise.to(host.device, host.dtype)
        for row in rows:
            self.steps[row] = 0
            self.frame_numbers[row] = list(range(workload.num_context))

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, shorter rows padded with zeros at the end, and lengths (R,)."""
        numbers = [self.frame_numbers[row] for row in rows]
        lengths = torch.tensor([len(kept) for kept in numbers], device=self._latents.device)
        longest = max(len(kept) for kept in numbers)
        padded = torch.tensor([kept + [0] * (longest - len(kept)) for kept in numbers], device=self._latents.device)
        index = torch.as_tensor(rows, device=self._latents.device)
        latents = self._latents[index[:, None], padded]
        padding = torch.arange(longest, device=latents.device) >= lengths[:, None]
        return latents.masked_fill(padding[:, :, None, None, None], 0.0), lengths

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    def advance(self, rows: Sequence[int]) -> None:
        """Generate the next frame of each row and append it to its history."""
        if not rows:
            return
        context, lengths = self.history(rows)
        ragged = bool((lengths != context.shape[1]).any())
        index = torch.as_tensor(rows, device=context.device)
        steps = torch.as_tensor(self.steps[list(rows)], device=context.device)
        frames = sample_next_frame(
            self.workload.host.transformer,
            context,
            self._noise[index, steps][:, None],
            num_steps=self.workload.num_steps,
            guidance_scale=self.workload.guidance_scale,
            lengths=lengths if ragged else None,
        )
        self._latents[index, self.workload.num_context + steps] = frames[:, 0]
        for row in rows:
            self.frame_numbers[row].append(self.workload.num_context + int(self.steps[row]))
            self.steps[row] += 1

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep the frames at these positions of the row's history, ascending."""
        self.frame_numbers[row] = [self.frame_numbers[row][i] for i in ids]

    def finished(self, row: int) -> bool:
        """Whether the row has generated all its frames (or was never begun)."""
        return bool(self.steps[row] >= self.workload.num_predict)

    def generated(self, rows: Sequence[int]) -> Tensor:
        """Generated latents (R, n_predict, C, h, w), zero where not generated yet."""
        index = torch.as_tensor(rows, device=self._latents.device)
        return self._latents[index, self.workload.num_context :]

    def decode(self, rows: Sequence[int], first: int = 0, last: int | None = None) -> Tensor:
        """Predicted frames first … last-1 of each row as pixels (R, last − first, 3, H, W)."""
        return self.workload.host.autoencoder.decode(self.generated(rows)[:, first:last])

    def state_dict(self) -> dict:
        """The rollouts as tensors and plain values."""
        return {
            "steps": self.steps.tolist(),
            "frame_numbers": [list(kept) for kept in self.frame_numbers],
            "latents": self._latents.cpu().clone(),
            "noise": self._noise.cpu().clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore rollouts saved by `state_dict` from a batch of the same size."""
        self.steps = np.array(state["steps"])
        self.frame_numbers = [list(kept) for kept in state["frame_numbers"]]
        self._latents.copy_(state["latents"])
        self._noise.copy_(state["noise"])
