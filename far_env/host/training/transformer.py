"""Second stage of training a host: teach a small FAR to continue histories from which frames have been dropped.

Teacher forcing in one pass: the tokens are [clean frames | noisy frames] under a mask that lets every noisy frame attend to the
clean frames before it (time −1) and itself. Frame-drop augmentation makes each clean history a few random older frames plus
a contiguous tail, re-indexed as in a rollout; only tail frames are predicted, because only their true predecessor is present.
FAR is trained differently (arXiv 2503.19325, section 3): its frames attend to noisy frames, and none is dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far_env.clips.worlds import World
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import CLEAN_TIME, FAR
from far_env.host.far_long import initialise_from, make_transformer
from far_env.host.training.config import TransformerTraining
from far_env.host.training.loop import cosine_with_warmup, run_steps, set_learning_rate, step_generator
from far_env.io import replacing
from far_env.progress import show_progress

CHUNK_CLIPS = 500


@dataclass(frozen=True)
class TeacherForcingBatch:
    """Clean histories and which of their frames are predicted.

    Attributes:
        frames: clean latents (B, n, C, h, w), older frames first.
        predicted: int64 (P,), indices into the n frames whose predecessor is the true one.
    """

    frames: Tensor
    predicted: Tensor


def draw_frames(rng: np.random.Generator, clip_length: int, num_older: int, tail: int) -> np.ndarray:
    """Frame numbers (num_older + tail,) of one history: random older ones in order, then a contiguous tail."""
    end = int(rng.integers(num_older + tail, clip_length + 1))
    older = np.sort(rng.choice(end - tail, size=num_older, replace=False))
    return np.concatenate([older, np.arange(end - tail, end)])


def teacher_forcing_loss(
    model: FAR, batch: TeacherForcingBatch, config: TransformerTraining, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity of every predicted frame at ``noisy_copies`` noise levels each.

    For FAR-Long, the frames are coarse that are coarse when the last frame is predicted.
    """
    frames, predicted = batch.frames, batch.predicted.repeat(config.noisy_copies)
    device, num_rows = frames.device, len(frames)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    num_clean = frames.shape[1] - 1
    context_sigma = (uniform(num_rows) < 0.5) * uniform(num_rows) * config.context_noise
    clean = frames[:, :num_clean]
    clean = clean + context_sigma[:, None, None, None, None] * (normal(*clean.shape) - clean)

    sigma = torch.sigmoid(normal(num_rows, len(predicted)) + config.noise_mean)
    sigma = sigma.masked_fill(uniform(*sigma.shape) < config.pure_noise_share, 1.0)
    target = frames[:, predicted]
    noise = normal(*target.shape)
    level = sigma[:, :, None, None, None]
    noisy = level * noise + (1 - level) * target

    clean_positions = torch.arange(num_clean, device=device)
    positions = torch.cat([clean_positions, predicted])
    visible = torch.zeros(len(positions), len(positions), dtype=torch.bool, device=device)
    visible[:, :num_clean] = clean_positions < positions[:, None]
    visible |= torch.eye(len(positions), dtype=torch.bool, device=device)
    times = torch.cat([torch.full((num_rows, num_clean), CLEAN_TIME, device=device), 1000 * sigma], dim=1)
    coarse = {"num_coarse": num_coarse} if (num_coarse := model.num_coarse(num_clean + 1)) else {}
    velocity = model.velocity(torch.cat([clean, noisy], dim=1), times, positions, visible, **coarse)[:, num_clean:]
    return (velocity.float() - (noise - target)).square().mean()


class ExponentialAverage:
    """Exponential moving average of a model's parameters; these are the weights that are saved."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model; in early steps by more than ``1 - decay``, to forget the initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            self.average[key].lerp_(value, 1 - decay)

    def state_dict(self) -> dict:
        """The averaged parameters."""
        return self.average

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        for key, value in state.items():
            self.average[key].copy_(value)


def train_transformer(
    config: TransformerTraining,
    autoencoder: Autoencoder,
    worlds: list[World],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    start_from: FAR | None = None,
    checkpoint_every: int = 500,
) -> FAR:
    """Train (or finish training) and return the averaged transformer in float32, in eval mode.

    Args:
        start_from: a transformer that provides the initial weights, which are random by default.
    """
    torch.manual_seed(seed)
    model = make_transformer(config.model)
    if start_from is not None:
        initialise_from(model, start_from)
    model = model.to(device).train()
    # Named by the autoencoder's hash, so that latents of an earlier one are not reused.
    folder = run_dir / f"latents_{_state_hash(autoencoder)}"
    clips = [_encoded_clips(autoencoder, world, config.clips_per_world, folder, device) for world in worlds]
    average = ExponentialAverage(model, config.ema_decay)
    matrices = [p for name, p in model.named_parameters() if _is_hidden_matrix(name)]
    others = [p for name, p in model.named_parameters() if not _is_hidden_matrix(name)]
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(others, lr=config.adamw_learning_rate, weight_decay=config.weight_decay)

    def train_step(step: int) -> dict[str, float]:
        batch = _draw_batch(config, clips, model, seed, step, device)
        factor = cosine_with_warmup(step, config.steps, config.warmup)
        for optimizer in (muon, adamw):
            set_learning_rate(optimizer, factor)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = teacher_forcing_loss(model, batch, config, step_generator(seed, 3, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        average.update(model, step)
        kind = "loss_contiguous" if _is_contiguous(config, step) else "loss_dropped"
        return {kind: loss.item()}

    state = {"model": model, "muon": muon, "adamw": adamw, "average": average}
    run_steps("transformer", run_dir, config.steps, state, train_step, checkpoint_every=checkpoint_every, log_every=1)
    model.load_state_dict(average.average)
    return model.eval()


def _is_hidden_matrix(name: str) -> bool:
    """Attention and MLP matrices, which Muon trains."""
    return (
        name.startswith("transformer_blocks")
        and name.endswith("weight")
        and any(part in name for part in (".attn.to_", ".attn.add_", ".mlp."))
    )


def _is_contiguous(config: TransformerTraining, step: int) -> bool:
    return step % config.contiguous_every == config.contiguous_every - 1


def _draw_batch(
    config: TransformerTraining, clips: list[np.ndarray], model: FAR, seed: int, step: int, device: torch.device
) -> TeacherForcingBatch:
    """A batch of histories of one shape, alternating between the worlds row by row."""
    rng = np.random.default_rng((seed, 2, step))
    clip_length = clips[0].shape[1]
    if _is_contiguous(config, step):
        num_older, tail = 0, int(rng.integers(config.min_contiguous, clip_length + 1))
        first = 1 + model.num_coarse(tail)
        predicted = first + np.sort(rng.choice(tail - first, config.contiguous_predicted, replace=False))
    else:
        num_older, tail = int(rng.integers(config.max_older + 1)), int(rng.integers(2, config.max_tail + 1))
        predicted = np.arange(num_older + 1, num_older + tail)
    rows = []
    for row in range(config.batch_size):
        source = clips[row % len(clips)]
        rows.append(source[rng.integers(len(source)), draw_frames(rng, clip_length, num_older, tail)])
    frames = torch.from_numpy(np.stack(rows)).to(device).float()
    return TeacherForcingBatch(frames, torch.from_numpy(predicted).to(device))


def _encoded_clips(autoencoder: Autoencoder, world: World, num_clips: int, folder: Path, device: torch.device) -> np.ndarray:
    """Latents (num_clips, T, C, h, w) float16 of the first train clips, encoded once and stored on disk in chunks."""
    folder.mkdir(exist_ok=True)
    chunks = []
    for start in show_progress(range(0, num_clips, CHUNK_CLIPS), description=f"encode {world.name}", unit="chunks"):
        path = folder / f"{world.name}_{start:06d}.npy"
        ids = range(start, min(start + CHUNK_CLIPS, num_clips))
        if not path.exists():
            latents = np.concatenate([_encode(autoencoder, world, ids[i : i + 10], device) for i in range(0, len(ids), 10)])
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, latents)
        chunks.append(np.load(path)[: len(ids)])
    return np.concatenate(chunks)


def _state_hash(model: torch.nn.Module) -> str:
    """First eight hex digits of the SHA-256 over all weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _encode(autoencoder: Autoencoder, world: World, ids: range, device: torch.device) -> np.ndarray:
    frames = np.stack([world.clip("train", clip_id).frames for clip_id in ids])
    return autoencoder.encode(torch.from_numpy(frames).to(device)).cpu().numpy().astype(np.float16)
