"""A training loop that can be stopped and resumed, with checkpoints, TensorBoard logs and a progress bar."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from far_env.errors import TrainingStopped
from far_env.events import session_writer
from far_env.host.training.processes import Processes
from far_env.io import disk_errors
from far_env.progress import show_progress
from far_env.tensor_files import load_tensors, save_tensors


class Stateful(Protocol):
    """A part of a checkpoint: a model, an optimiser or an average."""

    def state_dict(self) -> dict:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict) -> object:
        """Restore them."""


def run_steps(
    name: str,
    run_dir: Path,
    num_steps: int,
    state: Mapping[str, Stateful],
    train_step: Callable[[int], dict[str, float]],
    *,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validate: Callable[[int, SummaryWriter], None] | None = None,
    validate_every: int = 0,
    processes: Processes | None = None,
) -> None:
    """Call ``train_step(step)`` for the steps not yet done.

    Each step must depend on ``step`` and ``state`` alone (seed its randomness by the step), so that a resumed run equals an
    uninterrupted one. Scalars that a step returns go to TensorBoard under ``name``. Every ``validate_every`` steps and after
    the last, ``validate`` is called with the number of steps done; it must not change the state. Of several processes, the
    first one writes and validates; after an interrupt of any, all stop.

    Raises:
        TrainingStopped: after Ctrl-C or SIGTERM, with the progress saved.
    """
    checkpoint = run_dir / f"{name}.ckpt"
    first = processes is None or processes.first
    done, seconds = 0, 0.0
    if checkpoint.exists():
        saved = load_tensors(checkpoint)
        done, seconds = saved["step"], saved["seconds"]
        for key, part in state.items():
            part.load_state_dict(saved["state"][key])
    if done >= num_steps:
        return
    start = time.perf_counter() - seconds

    def save(step: int) -> None:
        parts = {key: part.state_dict() for key, part in state.items()}
        save_tensors(checkpoint, {"step": step, "seconds": time.perf_counter() - start, "state": parts})

    bar = show_progress(total=num_steps, initial=done, description=name, unit="steps", disable=not first)
    with disk_errors(run_dir), bar, _InterruptFlag() as interrupt, ExitStack() as stack:
        writer = None
        if first:
            writer = stack.enter_context(session_writer(run_dir / "tensorboard" / name, done))
        while done < num_steps:
            scalars = train_step(done)
            done += 1
            interrupted = interrupt.raised if processes is None else processes.any(interrupt.raised)
            bar.update()
            if writer is not None and (done % log_every == 0 or done == num_steps):
                for key, value in scalars.items():
                    writer.add_scalar(f"{name}/{key}", value, done)
                bar.set_postfix_str(", ".join(f"{key} {value:.4g}" for key, value in scalars.items()))
            if writer is not None and validate_every and (done % validate_every == 0 or done == num_steps):
                validate(done, writer)
            if first and (done % checkpoint_every == 0 or done == num_steps or interrupted):
                save(done)
            if interrupted and done < num_steps:
                raise TrainingStopped(f"{name} stopped at step {done} of {num_steps}; run the same command to resume")


class _InterruptFlag:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that no step is interrupted; the second one interrupts."""

    def __init__(self) -> None:
        self.raised = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


def cosine_with_warmup(step: int, num_steps: int, warmup: int) -> float:
    """Learning-rate factor: linear from 0 over ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant_with_warmup(step: int, num_steps: int, warmup: int) -> float:
    """Learning-rate factor: linear from 0 over ``warmup`` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's learning rate from its initial value."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor


def step_generator(*key: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, stage, step), so that a resumed training draws the same numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
