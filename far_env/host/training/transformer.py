"""Second stage of training a host: fit a transformer, FAR or FAR-Long, to encoded episodes by one of the objectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from far_env.host.far import FAR
from far_env.host.far_long import FARLong, initialise_from, make_transformer
from far_env.host.training.config import TransformerTraining
from far_env.host.training.latent_cache import EncodedEpisodes
from far_env.host.training.loop import constant_with_warmup, cosine_with_warmup, run_steps, set_learning_rate
from far_env.host.training.muon import split_parameters
from far_env.host.training.next_frame import NextFrameTest
from far_env.host.training.objectives import OBJECTIVES, Drawing, NoisyFrames, velocity_loss
from far_env.host.training.processes import Processes


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


class _Learner(nn.Module):
    """The loss of a transformer as a module's output, as distributed training needs it."""

    def __init__(self, model: FAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: NoisyFrames) -> Tensor:
        """The loss of a batch."""
        return velocity_loss(self.model, batch)


def train_transformer(
    config: TransformerTraining,
    sources: Sequence[EncodedEpisodes],
    shares: Sequence[float],
    run_dir: Path,
    *,
    seed: int,
    processes: Processes,
    dtype: torch.dtype,
    start_from: FAR | None = None,
    test: NextFrameTest | None = None,
    checkpoint_every: int = 500,
) -> FAR:
    """Train (or finish training) and return the averaged transformer in float32, in eval mode.

    Args:
        sources: encoded train episodes, drawn in these shares.
        processes: those that train together.
        start_from: a transformer that provides the initial weights, which are random by default.
        test: measures the averaged transformer from time to time.

    Raises:
        ValueError: if a batch cannot be divided among the processes.
    """
    parts = processes.rows(config.batch_size, config.gradient_accumulation)
    torch.manual_seed(seed)
    model = make_transformer(config.model)
    if start_from is not None:
        initialise_from(model, start_from)
    model = model.to(processes.device).train()
    if model.condition is not None:
        model.class_embedder.dropout = 0.0  # the objective drops classes, seeded by the step
    objective = OBJECTIVES[config.objective](Drawing(config, sources, shares, model, seed, processes.device))
    average = ExponentialAverage(model, config.ema_decay)
    optimizers = _optimizers(config, model)
    # The coarse parts of FAR-Long take no part in steps with short histories.
    learner = processes.distributed(_Learner(model), find_unused=isinstance(model, FARLong))
    factor_of = cosine_with_warmup if config.schedule == "cosine" else constant_with_warmup

    def train_step(step: int) -> dict[str, float]:
        factor = factor_of(step, config.steps, config.warmup)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, factor)
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=processes.device)
        for part in parts:
            batch = objective.inputs(step, part)
            with (
                processes.local_gradients(learner, part != parts[-1]),
                torch.autocast(processes.device.type, dtype, enabled=dtype != torch.float32),
            ):
                loss = learner(batch) / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        average.update(model, step)
        return {objective.loss_name(step): processes.mean(total).item()}

    state = {"model": model, **optimizers, "average": average}
    options = {"checkpoint_every": checkpoint_every, "log_every": 1, "processes": processes}
    if test is not None:
        averaged = make_transformer(config.model).to(processes.device).eval()

        def validate(step: int, writer: SummaryWriter) -> None:
            averaged.load_state_dict(average.average)
            test.log(averaged, step, writer)

        options |= {"validate": validate, "validate_every": test.settings.every}
    run_steps("transformer", run_dir, config.steps, state, train_step, **options)
    model.load_state_dict(average.average)
    return model.eval()


def _optimizers(config: TransformerTraining, model: FAR) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the model's parameters, by name."""
    matrices, others = split_parameters(model, lambda name, p: config.optimizer == "muon" and _is_hidden_matrix(name))
    adamw = torch.optim.AdamW(others, lr=config.adamw_learning_rate, weight_decay=config.weight_decay)
    if not matrices:
        return {"adamw": adamw}
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    return {"muon": muon, "adamw": adamw}


def _is_hidden_matrix(name: str) -> bool:
    """Attention and MLP matrices, which Muon trains."""
    return (
        name.startswith("transformer_blocks")
        and name.endswith("weight")
        and any(part in name for part in (".attn.to_", ".attn.add_", ".mlp."))
    )
