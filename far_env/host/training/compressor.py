"""Train a compressor for a frozen host: to predict with the middle of a history compressed what it does with all its frames.

A history is, in time order: first frames at full resolution, compressed blocks, newest frames at full resolution. Each of the
last frames is predicted from noise, as when a host is trained. Time positions count frames and blocks without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from far_env.host.blocks import modulated_norm, patchify, rotary_table, unpatchify
from far_env.host.compressor import SPACING, Compressor, block_modulations
from far_env.host.far import CLEAN_TIME, FAR, Modulations
from far_env.host.far_host import FARHost
from far_env.host.training.compressor_clips import BlockClips
from far_env.host.training.compressor_config import CompressorTraining
from far_env.host.training.loop import cosine_with_warmup, run_steps, set_learning_rate, step_generator

NAME = "compressor"
MIDDLES = ("full", "compressed", "none")
"""What may be between the first and the newest frames of a history: all its frames, blocks, or nothing."""


@dataclass(frozen=True)
class CompressedHistory:
    """A batch of histories, and noisy frames to be predicted after them.

    Attributes:
        sink, middle, recent: clean latents (B, n, C, h, w); ``middle`` holds whole blocks.
        small: of the blocks (B, m, C, h / 2, w / 2).
        noisy, velocities: (B, p, C, h, w); the i-th follows the newest frame ``len(recent) − p + i``, that one included.
        times: of the noisy frames (B, p).
        actions: of sinks, middle, newest and noisy frames, in this order (B, …); None for a host without.
    """

    sink: Tensor
    middle: Tensor
    recent: Tensor
    small: Tensor
    noisy: Tensor
    velocities: Tensor
    times: Tensor
    actions: Tensor | None = None


def draw_history(
    config: CompressorTraining, clips: BlockClips, key: tuple[int, ...], device: torch.device, batch_size: int | None = None
) -> CompressedHistory:
    """A batch that depends on the key, such as (seed, step), alone. All rows have parts of the same lengths."""
    rng, generator = np.random.default_rng(key), step_generator(*key)
    rows = config.batch_size if batch_size is None else batch_size
    num_clips, num_frames = clips.latents.shape[:2]
    num_sink, num_blocks, num_recent = draw_lengths(config, rng, num_frames)
    span = num_blocks * config.block_frames + num_recent + 1
    chosen = rng.integers(num_clips, size=rows)
    starts = rng.integers(num_sink, num_frames - span + 1, size=rows)
    index = torch.from_numpy(chosen)[:, None]
    sink = np.tile(np.arange(num_sink), (rows, 1))
    window = starts[:, None] + np.arange(span)
    numbers = torch.from_numpy(np.concatenate([sink, window], axis=1))
    first = torch.from_numpy(starts[:, None] + config.block_frames * np.arange(num_blocks))
    frames, small = clips.latents[index, numbers].float(), clips.small[index, first].float()
    predicted = min(config.predicted, num_recent)
    # From here on numbers are drawn by torch, for the noise of flow matching, see `far_env.host.training.objectives.add_noise`.
    target = frames[:, -predicted:]
    noise = torch.randn(target.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn((rows, predicted), generator=generator) + config.noise_mean)
    sigma = sigma.masked_fill(torch.rand((rows, predicted), generator=generator) < config.pure_noise_share, 1.0)
    level = sigma[:, :, None, None, None]
    noisy = level * noise + (1 - level) * target
    clean = frames[:, :-1]
    context = (torch.rand(rows, generator=generator) < 0.5) * torch.rand(rows, generator=generator) * config.context_noise
    clean = clean + context[:, None, None, None, None] * (torch.randn(clean.shape, generator=generator) - clean)
    parts = clean.split([num_sink, num_blocks * config.block_frames, num_recent], dim=1)
    actions = None
    if clips.actions is not None:
        given = clips.actions[index, numbers]
        actions = torch.cat([given[:, :-1], given[:, -predicted:]], dim=1).to(device)
    values = (*parts, small, noisy, noise - target, 1000 * sigma)
    return CompressedHistory(*(value.to(device) for value in values), actions)


def draw_lengths(config: CompressorTraining, rng: np.random.Generator, num_frames: int) -> tuple[int, int, int]:
    """First frames, blocks and newest frames of a history that, with one more frame, fits into a clip.

    Raises:
        ValueError: if not even the shortest fits.
    """
    room = num_frames - 1 - config.block_frames - config.min_recent
    if room < 0:
        needed = num_frames - room
        raise ValueError(f"clips of {num_frames} frames are too short for a block and the newest frames; {needed} are needed")
    num_sink = int(rng.integers(min(config.max_sink, room) + 1))
    room -= num_sink
    num_blocks = 1 + int(rng.integers(min(config.max_blocks - 1, room // config.block_frames) + 1))
    room -= (num_blocks - 1) * config.block_frames
    return num_sink, num_blocks, config.min_recent + int(rng.integers(min(config.max_recent - config.min_recent, room) + 1))


def history_velocity(model: FAR, compressor: Compressor, batch: CompressedHistory, middle: str = "compressed") -> Tensor:
    """Velocities (B, p, C, h, w) of the noisy frames after histories whose middle is one of `MIDDLES`."""
    predicted, num_recent = batch.noisy.shape[1], batch.recent.shape[1]
    actions = None
    if batch.actions is not None:
        lengths = [part.shape[1] for part in (batch.sink, batch.middle, batch.recent, batch.noisy)]
        actions = dict(zip(("sink", "middle", "recent", "noisy"), batch.actions.split(lengths, dim=1), strict=True))
    groups = _Groups(model, batch.recent)
    groups.add(batch.sink, _modulations(model, batch.sink, actions, "sink"))
    modulations = _modulations(model, batch.middle, actions, "middle")
    if middle == "full":
        groups.add(batch.middle, modulations)
    elif middle == "compressed":
        blocks = batch.middle.unflatten(1, (-1, compressor.block_frames)).flatten(0, 1)
        tokens = compressor(blocks, batch.small.flatten(0, 1))[:, 0].unflatten(0, batch.small.shape[:2])
        groups.add_tokens(tokens, block_modulations(modulations, compressor.block_frames), compressor)
    # Without gradients: in a rollout most of the newest frames were encoded while the frames of the blocks were still there.
    with torch.no_grad():
        groups.add(batch.recent, _modulations(model, batch.recent, actions, "recent"))
    followed = num_recent - predicted + 1 + torch.arange(predicted)
    noisy = model.modulate(batch.times, dtype=batch.noisy.dtype, **_conditions(model, batch.noisy, actions, "noisy"))
    return groups.predict(batch.noisy, noisy, followed)


def history_loss(model: FAR, compressor: Compressor, batch: CompressedHistory, middle: str = "compressed") -> Tensor:
    """Mean squared error of the velocities."""
    return (history_velocity(model, compressor, batch, middle).float() - batch.velocities).square().mean()


def taught(model: FAR, compressor: Compressor, batch: CompressedHistory) -> CompressedHistory:
    """The batch with the velocities that the model predicts when all frames of the middle are there."""
    with torch.no_grad():
        return replace(batch, velocities=history_velocity(model, compressor, batch, "full").float())


def _conditions(model: FAR, frames: Tensor, actions: dict[str, Tensor] | None, part: str) -> dict[str, Tensor]:
    if actions is not None:
        return {"action": actions[part]}
    return model.null_conditions(len(frames), frames.shape[1], frames.device)


def _modulations(model: FAR, frames: Tensor, actions: dict[str, Tensor] | None, part: str) -> Modulations:
    """Of clean frames (B, n, …)."""
    times = torch.full(frames.shape[:2], CLEAN_TIME, device=frames.device)
    return model.modulate(times, dtype=frames.dtype, **_conditions(model, frames, actions, part))


class _Groups:
    """Groups of tokens that pass through a transformer one after the other, each attending to those before it.

    Args:
        model: the transformer.
        like: latents (B, …, C, h, w).
    """

    def __init__(self, model: FAR, like: Tensor) -> None:
        self._model, self._like = model, like
        self._grid = tuple(side // model.patch_size for side in like.shape[-2:])
        empty = like.new_empty(model.layer_shape(len(like), 0))
        self._memories = [(empty, empty) for _ in model.transformer_blocks]
        self._positions = torch.empty(0, dtype=torch.int64, device=like.device)
        self._next = 0
        self._newest = 0

    def add(self, frames: Tensor, modulations: Modulations) -> None:
        """Clean frames (B, n, C, h, w)."""
        if frames.shape[1]:
            self._newest = self._next
            self._run(self._embedded(frames), modulations, self._grid, 1)

    def add_tokens(self, x: Tensor, modulations: Modulations, compressor: Compressor) -> None:
        """Tokens of blocks (B, m, S, D)."""
        self._run(x, modulations, compressor.grid(self._like), SPACING)

    def predict(self, noisy: Tensor, modulations: Modulations, followed: Tensor) -> Tensor:
        """Velocities of noisy frames (B, p, C, h, w), the i-th after the first ``followed[i]`` frames of the last group."""
        positions = self._newest + followed.to(noisy.device)
        x = self._run(self._embedded(noisy), modulations, self._grid, 1, positions)
        tokens = self._model.proj_out(modulated_norm(x, *modulations.final))
        return unpatchify(tokens, self._model.patch_size, *noisy.shape[-2:])

    def _embedded(self, frames: Tensor) -> Tensor:
        return self._model.x_embedder(patchify(frames, self._model.patch_size))

    def _run(
        self,
        x: Tensor,
        modulations: Modulations,
        grid: tuple[int, int],
        spacing: int,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks; clean tokens are remembered. Noisy frames have these positions, and none attends to another."""
        model, (batch, frames, size, _) = self._model, x.shape
        own = torch.arange(frames, device=x.device)
        positions = self._next + own if noisy is None else noisy
        queries = positions.repeat_interleave(size)
        keys = torch.cat([self._positions, queries])
        of_frame = own.repeat_interleave(size)
        within = of_frame[None] <= of_frame[:, None] if noisy is None else of_frame[None] == of_frame[:, None]
        visible = torch.cat([self._positions[None] < queries[:, None], within], dim=1)
        logits = model.slope_scale * (keys[None] - queries[:, None]).to(x.dtype)
        mask = logits.masked_fill(~visible, float("-inf"))[None, None]
        table = rotary_table(positions[None], *grid, model.axes_dims_rope, spacing)
        for index, block in enumerate(model.transformer_blocks):
            # New tensors for every layer and group, because autograd needs what was written unchanged.
            new = [x.new_empty(model.layer_shape(batch, frames * size)) for _ in range(2)]
            memory = tuple(torch.cat(pair, dim=1) for pair in zip(self._memories[index], new, strict=True))
            x = block(x, modulations.blocks[index], table, mask, memory)
            if noisy is None:
                own_part = (part[:, -frames * size :] for part in memory)
                with torch.enable_grad():  # what was there before keeps its gradients
                    self._memories[index] = tuple(
                        torch.cat(pair, dim=1) for pair in zip(self._memories[index], own_part, strict=True)
                    )
        if noisy is None:
            self._positions = keys
            self._next += frames
        return x


def train_compressor(
    config: CompressorTraining, host: FARHost, clips: dict[str, BlockClips], run_dir: Path, dtype: torch.dtype
) -> Compressor:
    """Train (or finish training) a compressor; returned in float32, in eval mode.

    Args:
        clips: "train" and "validation".
        run_dir: of the checkpoint and logs.
        dtype: of the training; weights are float32.

    Raises:
        TrainingStopped: after Ctrl-C, with the progress saved.
    """
    torch.manual_seed(config.seed)
    settings = {"block_frames": config.block_frames, "channels": config.channels, "branches": config.branches}
    compressor = Compressor.of(host.transformer, **settings).to(host.device).train()
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    def train_step(step: int) -> dict[str, float]:
        set_learning_rate(optimizer, cosine_with_warmup(step, config.steps, config.warmup))
        optimizer.zero_grad(set_to_none=True)
        batch = draw_history(config, clips["train"], (config.seed, 1, step), host.device)
        with torch.autocast(host.device.type, dtype, enabled=dtype != torch.float32):
            target = taught(host.transformer, compressor, batch) if config.teacher else batch
            loss = history_loss(host.transformer, compressor, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(compressor.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    def validate(step: int, writer: SummaryWriter) -> None:
        compressor.eval()
        for name, value in validation_losses(config, host, compressor, clips["validation"]).items():
            writer.add_scalar(f"{NAME}/validation_{name}", value, step)
        compressor.train()

    options = {"checkpoint_every": config.checkpoint_every, "validate": validate, "validate_every": config.validate_every}
    run_steps(NAME, run_dir, config.steps, {"model": compressor, "optimizer": optimizer}, train_step, **options)
    return compressor.eval().requires_grad_(False)


@torch.no_grad()
def validation_losses(config: CompressorTraining, host: FARHost, compressor: Compressor, clips: BlockClips) -> dict[str, float]:
    """The loss with every one of `MIDDLES`, in float32, mean over as many batches as validation clips fill."""
    losses = {middle: 0.0 for middle in MIDDLES}
    num_batches = max(1, config.validation_clips // config.batch_size)
    for number in range(num_batches):
        batch = draw_history(config, clips, (config.seed, 2, number), host.device)
        for middle in MIDDLES:
            losses[middle] += history_loss(host.transformer, compressor, batch, middle).item() / num_batches
    return losses
