"""Second stage of training a host: teach a small FAR to continue histories from which frames have been dropped.

Teacher forcing in one pass: the tokens are [clean frames | noisy frames] under a mask that lets every noisy frame attend to the
clean frames before it (time −1) and itself. Frame-drop augmentation makes each clean history a few random older frames plus
a contiguous tail, re-indexed as in a rollout; only tail frames are predicted, because only their true predecessor is present.
FAR is trained differently (arXiv 2503.19325, section 3): its frames attend to noisy frames, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from far_env.host.far import CLEAN_TIME, FAR
from far_env.host.far_long import initialise_from, make_transformer
from far_env.host.training.config import TransformerTraining
from far_env.host.training.histories import TeacherForcingBatch, draw_batch, is_contiguous
from far_env.host.training.latent_cache import EncodedEpisodes
from far_env.host.training.loop import cosine_with_warmup, run_steps, set_learning_rate, step_generator
from far_env.host.training.next_frame import NextFrameTest


@dataclass(frozen=True)
class NoisyFrames:
    """What a transformer sees in a training step, and what it should answer.

    Attributes:
        latents: (B, F, C, h, w); the last P frames are to be predicted.
        times: (B, F).
        positions: (F,) time positions.
        visible: (F, F), True where a frame attends to another.
        num_coarse: oldest frames that FAR-Long sees coarsely.
        velocities: (B, P, C, h, w), noise − clean.
        classes: actions (B, F) or labels (B,), or None.
    """

    latents: Tensor
    times: Tensor
    positions: Tensor
    visible: Tensor
    num_coarse: int
    velocities: Tensor
    classes: Tensor | None = None


def teacher_forcing_loss(
    model: FAR, batch: TeacherForcingBatch, config: TransformerTraining, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity of every predicted frame at ``noisy_copies`` noise levels each.

    For FAR-Long, the frames are coarse that are coarse when the last frame is predicted.
    """
    return velocity_loss(model, add_noise(model, batch, config, generator))


def add_noise(model: FAR, batch: TeacherForcingBatch, config: TransformerTraining, generator: torch.Generator) -> NoisyFrames:
    """The clean history of a batch, possibly a little noisy, and noisy copies of the frames to be predicted.

    A tenth of the actions, or labels, becomes the null class, as in FAR's training, clean and noisy frames separately.
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
    classes = batch.classes
    if classes is not None:
        classes = classes[:, positions] if model.condition == "action" else classes
        classes = classes.masked_fill(uniform(*classes.shape) < config.class_dropout, model.null_class)
    num_coarse = model.num_coarse(num_clean + 1)
    return NoisyFrames(torch.cat([clean, noisy], dim=1), times, positions, visible, num_coarse, noise - target, classes)


def velocity_loss(model: FAR, batch: NoisyFrames) -> Tensor:
    """Mean squared error of the velocities of the frames to be predicted."""
    options: dict[str, Any] = {"num_coarse": batch.num_coarse} if batch.num_coarse else {}
    if batch.classes is not None:
        options[model.condition] = batch.classes
    velocity = model.velocity(batch.latents, batch.times, batch.positions, batch.visible, **options)
    return (velocity[:, -batch.velocities.shape[1] :].float() - batch.velocities).square().mean()


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
    sources: Sequence[EncodedEpisodes],
    shares: Sequence[float],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    start_from: FAR | None = None,
    test: NextFrameTest | None = None,
    checkpoint_every: int = 500,
) -> FAR:
    """Train (or finish training) and return the averaged transformer in float32, in eval mode.

    Args:
        sources: encoded train episodes, drawn in these shares.
        start_from: a transformer that provides the initial weights, which are random by default.
        test: measures the averaged transformer from time to time.
    """
    torch.manual_seed(seed)
    model = make_transformer(config.model)
    if start_from is not None:
        initialise_from(model, start_from)
    model = model.to(device).train()
    if model.condition is not None:
        model.class_embedder.dropout = 0.0  # classes are dropped by `add_noise`, from the step's seed
    average = ExponentialAverage(model, config.ema_decay)
    matrices = [p for name, p in model.named_parameters() if _is_hidden_matrix(name)]
    others = [p for name, p in model.named_parameters() if not _is_hidden_matrix(name)]
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(others, lr=config.adamw_learning_rate, weight_decay=config.weight_decay)

    def train_step(step: int) -> dict[str, float]:
        batch = draw_batch(config, sources, shares, model, seed, step).to(device)
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
        kind = "loss_contiguous" if is_contiguous(config, step) else "loss_dropped"
        return {kind: loss.item()}

    state = {"model": model, "muon": muon, "adamw": adamw, "average": average}
    options = {"checkpoint_every": checkpoint_every, "log_every": 1}
    if test is not None:
        averaged = make_transformer(config.model).to(device).eval()

        def validate(step: int, writer: SummaryWriter) -> None:
            averaged.load_state_dict(average.average)
            test.log(averaged, step, writer)

        options |= {"validate": validate, "validate_every": test.settings.every}
    run_steps("transformer", run_dir, config.steps, state, train_step, **options)
    model.load_state_dict(average.average)
    return model.eval()


def _is_hidden_matrix(name: str) -> bool:
    """Attention and MLP matrices, which Muon trains."""
    return (
        name.startswith("transformer_blocks")
        and name.endswith("weight")
        and any(part in name for part in (".attn.to_", ".attn.add_", ".mlp."))
    )
