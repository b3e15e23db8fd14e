"""The next-frame test: how well a transformer predicts a frame from true frames, and whether it can use old ones.

One frame of a validation window is predicted from all frames before it, from the newest ones, and from as many *right* ones:
the newest, and those whose content the frame needs. The evidence is *old* where the best frame to copy is clearly better than
the best among the newest. No predicted frame is fed back, so this measures memory apart from drift. Rollouts measure drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.sampler import sample_next_frame
from far_env.host.training.config import ValidationSettings
from far_env.host.training.episodes import Classes, Episodes
from far_env.host.training.loop import step_generator
from far_env.latent_cells import cell_distances
from far_env.metrics import psnr

OLD_DECIBELS = 3.0
"""The evidence is old where the best copy is this much better than the best of the newest frames."""
HISTORIES = ("all", "newest", "right")


@dataclass(frozen=True)
class _Window:
    """A validation window: latents (T, C, h, w), classes; per target the truth (3, H, W) and whether its evidence is old.

    ``continuation`` holds the true frames (n, 3, H, W) of a rollout, after the first half.
    """

    latents: Tensor
    classes: Classes
    truth: dict[int, Tensor]
    old: dict[int, bool]
    continuation: Tensor


@dataclass(frozen=True)
class Measured:
    """Predictions of one source.

    Attributes:
        psnr: of each kind of history, dB per predicted frame, float64 (n,).
        old: whether the evidence of each is old, (n,).
        pictures: for some frames the truth, then one prediction per kind of history, (pictures, 4, 3, H, W).
        rollout: mean PSNR of the first, second, … frame of rollouts, which keep and continue their own frames, (n,).
    """

    psnr: dict[str, np.ndarray]
    old: np.ndarray
    pictures: Tensor
    rollout: np.ndarray

    def scalars(self) -> dict[str, float]:
        """Means over the predicted frames, and over those whose evidence is old, if there are any."""
        values = {kind: float(decibels.mean()) for kind, decibels in self.psnr.items()}
        values["share_old"] = float(self.old.mean())
        if len(self.rollout):
            values |= {"rollout_first": float(self.rollout[0]), "rollout_last": float(self.rollout[-1])}
        if self.old.any():
            values |= {f"{kind}_where_old": float(decibels[self.old].mean()) for kind, decibels in self.psnr.items()}
        return values


class NextFrameTest:
    """Validation windows of some sources, encoded once.

    Args:
        settings: how many windows and targets, and how long the compared histories are.
        sources: where the windows come from; those without validation clips are left out.
        autoencoder: encodes windows and decodes predictions, on its device.
        seed: of the noise that predictions start from, the same at every measurement.
    """

    def __init__(
        self, settings: ValidationSettings, sources: Sequence[Episodes], autoencoder: Autoencoder, seed: int = 0
    ) -> None:
        self.settings, self._autoencoder, self._seed = settings, autoencoder, seed
        self._windows: dict[str, list[_Window]] = {}
        for source in sources:
            count = min(settings.clips, source.num_validation())
            if count:
                self._windows[source.name] = [self._window(source, index) for index in range(count)]

    def log(self, model: FAR, step: int, writer: SummaryWriter) -> None:
        """Measure, and write scalars and pictures to TensorBoard."""
        for name, measured in self.measure(model).items():
            for key, value in measured.scalars().items():
                writer.add_scalar(f"validation/{name}/{key}", value, step)
            if len(measured.pictures):
                # One row per frame: the truth, then the predictions in the order of HISTORIES.
                rows = [torch.cat(list(row), dim=2) for row in measured.pictures]
                writer.add_image(f"validation/{name}/truth_{'_'.join(HISTORIES)}", torch.cat(rows, dim=1), step)

    @torch.no_grad()
    def measure(self, model: FAR) -> dict[str, Measured]:
        """Predict every target of every window; by source."""
        return {name: self._measure(model, windows, number) for number, (name, windows) in enumerate(self._windows.items())}

    def _measure(self, model: FAR, windows: list[_Window], number: int) -> Measured:
        truths, old = [], []
        predictions: dict[str, list[Tensor]] = {kind: [] for kind in HISTORIES}
        for target in windows[0].truth:
            truths += [window.truth[target] for window in windows]
            old += [window.old[target] for window in windows]
            shape = (len(windows), 1, *windows[0].latents.shape[1:])
            noise = torch.randn(shape, generator=step_generator(self._seed, 7, number, target))
            for kind in HISTORIES:
                histories = [self._history(window.latents, target, kind) for window in windows]
                predictions[kind] += list(self._predict(model, windows, target, histories, noise))
        truth = torch.stack(truths)
        decibels = {kind: psnr(torch.stack(predictions[kind])[:, None], truth[:, None]).double().numpy() for kind in HISTORIES}
        # Those with old evidence first, as they show what memory does.
        shown = np.argsort(~np.array(old), kind="stable")[: self.settings.pictures]
        pictures = torch.stack([torch.stack([truths[i], *(predictions[kind][i] for kind in HISTORIES)]) for i in shown])
        return Measured(decibels, np.array(old), pictures, self._rollout(model, windows, number))

    def _rollout(self, model: FAR, windows: list[_Window], number: int) -> np.ndarray:
        """Mean PSNR (n,) of the frames of rollouts from the first halves of all windows."""
        first = len(windows[0].latents) // 2
        latents = torch.stack([window.latents[:first] for window in windows])
        decibels = []
        for step in range(len(windows[0].continuation)):
            shape = (len(windows), 1, *latents.shape[2:])
            noise = torch.randn(shape, generator=step_generator(self._seed, 8, number, step))
            new = self._sample(model, windows, latents, [np.arange(first + step + 1)] * len(windows), noise)
            latents = torch.cat([latents, new], dim=1)
            truth = torch.stack([window.continuation[step] for window in windows])
            decibels.append(psnr(self._decode(new)[:, None], truth[:, None]).mean().item())
        return np.array(decibels)

    def _predict(self, model: FAR, windows: list[_Window], target: int, histories: list[np.ndarray], noise: Tensor) -> Tensor:
        """The target frame (clips, 3, H, W) of every window from a history of frame numbers each."""
        context = torch.stack([window.latents[history] for window, history in zip(windows, histories, strict=True)])
        numbers = [np.append(history, target) for history in histories]
        return self._decode(self._sample(model, windows, context, numbers, noise))

    def _sample(self, model: FAR, windows: list[_Window], context: Tensor, numbers: list[np.ndarray], noise: Tensor) -> Tensor:
        """The next latent (clips, 1, C, h, w) after context (clips, n, C, h, w); ``numbers`` (n + 1,) are of all frames."""
        device = next(model.parameters()).device
        classes = {}
        if model.condition == "action":
            rows = [_actions(window, model)[frames] for window, frames in zip(windows, numbers, strict=True)]
            classes = {"action": torch.from_numpy(np.stack(rows)).to(device)}
        elif model.condition == "label":
            labels = [model.null_class if window.classes.label is None else window.classes.label for window in windows]
            classes = {"label": torch.tensor(labels, device=device)}
        steps = self.settings.num_steps
        return sample_next_frame(model, context.to(device), noise.to(device), num_steps=steps, **classes).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames (clips, 3, H, W) of latents (clips, 1, C, h, w), on the CPU."""
        device = next(self._autoencoder.parameters()).device
        return self._autoencoder.decode(latents.to(device))[:, 0].float().cpu()

    def _window(self, source: Episodes, index: int) -> _Window:
        window, autoencoder = source.validation(index), self._autoencoder
        device = next(autoencoder.parameters()).device
        if window.latents is None:
            frames = torch.from_numpy(np.ascontiguousarray(window.frames))
            latents = autoencoder.encode(frames[None].to(device))[0].cpu()
        else:
            latents = torch.from_numpy(window.latents) * autoencoder.scaling_factor
            frames = autoencoder.decode(latents[None].to(device))[0].cpu()
        num_frames = len(frames)
        first = max(num_frames // 2, min(2, num_frames - 1))
        targets = np.unique(np.linspace(first, num_frames - 1, self.settings.targets).round().astype(int)).tolist()
        old = {}
        for target in targets:
            errors = (frames[:target] - frames[target]).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
            gain = 10 * (errors[-self.settings.budget :].min() / errors.min()).log10()
            old[target] = bool(gain >= OLD_DECIBELS)
        classes = window.classes if source.classes_given else Classes()
        truth = {target: frames[target].clone() for target in targets}
        continuation = frames[num_frames // 2 :][: self.settings.rollout].clone()
        return _Window(latents, classes, truth, old, continuation)

    def _history(self, latents: Tensor, target: int, kind: str) -> np.ndarray:
        """The frame numbers of a kind of history of the target."""
        if kind == "all":
            return np.arange(target)
        if kind == "newest":
            return np.arange(max(0, target - self.settings.budget), target)
        return right_frames(latents[:target], latents[target], self.settings.budget)


def right_frames(history: Tensor, target: Tensor, budget: int) -> np.ndarray:
    """The newest frame and those that together cover the target best, in order, at most ``budget``; chosen one after the other.

    A latent cell of the target is covered by the nearest cell in any kept frame, see `far_env.latent_cells.cell_distances`.

    Args:
        history: latents (n, C, h, w).
        target: latent (C, h, w).
    """
    distance = cell_distances(target[None, None], history[None])[0, 0]  # (n, h·w)
    kept = [len(history) - 1]
    covered = distance[kept[0]]
    while len(kept) < min(budget, len(history)):
        cost = torch.minimum(distance, covered).sum(dim=1)
        cost[kept] = torch.inf
        kept.append(int(cost.argmin()))
        covered = torch.minimum(covered, distance[kept[-1]])
    return np.sort(kept)


def _actions(window: _Window, model: FAR) -> np.ndarray:
    """Actions (T,) of a window, or the null class for all."""
    if window.classes.actions is None:
        return np.full(len(window.latents), model.null_class)
    return window.classes.actions
