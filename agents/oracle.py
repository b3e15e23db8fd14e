"""Labels, and what can be gained: an expert that knows the rest of the clip, and a search on the true reward. Both no policies.

The expert keeps the frames whose content the rest of the clip will need most; the search rolls alternatives out, continues the
most promising ones, and returns the best finished rollout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.latent_cells import cell_distances, nearest_cells
from far_env.metrics import psnr
from far_env.progress import show_progress
from far_env.rollout.context import true_units
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.play import Decision
from far_env.workload import Workload, check_decides


@dataclass(frozen=True)
class Coverage:
    """How well the frames of a history cover the content of the m frames to come, cell by cell of their latents.

    A cell can be copied from the nearest cell of a kept frame, or from the frame generated before it, whose own error it then
    inherits. So where content was dropped, every frame that shows it is wrong, not only the first.

    Attributes:
        distance: float32 (history, m, cells), the squared distance of each cell of a coming frame to the nearest cell in each
            frame of the history, of which the newest is the last.
        previous: float32 (m, cells), the same to the nearest cell in the true frame before it.
        nearest: integers (m, cells), the index of that cell.
        feedback: whether the true frame is fed back, so that the frame before has no error to be inherited.
    """

    distance: np.ndarray
    previous: np.ndarray
    nearest: np.ndarray
    feedback: bool = False

    def cost(self, kept: Sequence[int]) -> float:
        """The expected squared error of all cells when these frames are kept, the newest among them."""
        return float(self._errors(self.distance[list(kept)].min(axis=0)[..., None])[0])

    def costs_without(self, kept: Sequence[int], instead: Sequence[int] | None = None) -> np.ndarray:
        """`cost` of these frames, two at least, without the first, without the second, and so on: float64 (kept,).

        Without the newest, the frame before is not what it was copied from, so that its cost has no meaning.

        Args:
            instead: rows of ``distance``, one for each of the frames, that takes its place; by default nothing does.
        """
        distance = self.distance[list(kept)].transpose(1, 2, 0).copy()
        nearest = distance.argmin(axis=-1)[..., None]
        without = np.repeat(np.take_along_axis(distance, nearest, axis=-1), len(kept), axis=-1)
        np.put_along_axis(distance, nearest, np.inf, axis=-1)
        np.put_along_axis(without, nearest, distance.min(axis=-1, keepdims=True), axis=-1)
        if instead is not None:
            without = np.minimum(without, self.distance[list(instead)].transpose(1, 2, 0))
        return self._errors(without)

    def _errors(self, distance: np.ndarray) -> np.ndarray:
        """Expected squared errors of sets of frames, float64 (sets,), from distances to the nearest cell (m, cells, sets)."""
        total = np.zeros(distance.shape[-1])
        errors = None
        for of_kept, previous, nearest in zip(distance, self.previous[..., None], self.nearest, strict=True):
            if self.feedback:
                errors = np.minimum(of_kept, previous)
            elif errors is None:  # the frame before the first is the newest of the history
                errors = of_kept
            else:
                errors = np.minimum(of_kept, previous + errors[nearest])
            total += errors.sum(axis=0, dtype=np.float64)
        return total


def coverage(history: Tensor, newest: Tensor, future: Tensor, *, feedback: bool = False) -> Coverage:
    """Match the cells of coming frames with those of the history, see `far_env.latent_cells.cell_distances`.

    Args:
        history: latents (n, C, h, w) of the frames that may be kept.
        newest: the true latent (C, h, w) of the frame generated last.
        future: true latents (m, C, h, w) of the frames still to come.
        feedback: see `Coverage`.
    """
    previous, nearest = nearest_cells(future[:, None], torch.cat([newest[None], future[:-1]])[:, None])
    distance = cell_distances(future[None], history[None])[0].transpose(0, 1)
    return Coverage(*(part.cpu().numpy() for part in (distance, previous[:, 0, 0], nearest[:, 0, 0])), feedback)


def best_cover(cover: Coverage, max_frames: int, limit: int = 1) -> list[list[int]]:
    """The sets of ``max_frames`` rows, the newest among them, that cover best, ascending in cost.

    Exhaustive for at most 2,000 sets; else rows are dropped one by one, the one with the lowest cost first, and the
    alternatives swap one kept row for a dropped one.
    """
    num_frames = len(cover.distance)
    newest = num_frames - 1
    if num_frames <= max_frames:
        return [list(range(num_frames))]
    if math.comb(newest, max_frames - 1) <= 2_000:
        sets = [[*chosen, newest] for chosen in itertools.combinations(range(newest), max_frames - 1)]
    else:
        kept = list(range(num_frames))
        while len(kept) > max_frames:
            kept.pop(int(cover.costs_without(kept)[:-1].argmin()))
        sets = [kept]
        if limit > 1:
            dropped = [row for row in range(num_frames) if row not in kept]
            sets += [sorted({*kept, new} - {old}) for old in kept[:-1] for new in dropped]
    return sorted(sets, key=cover.cost)[:limit]


def pixel_error_scale(frames: Tensor, latents: Tensor) -> float:
    """Mean squared pixel error per summed squared latent error of a frame, as the ratio of their variances."""
    return float(frames.var() / latents.float().var()) / latents.shape[-3:].numel()


@dataclass(frozen=True)
class OracleRollout:
    """The best rollout that a search found for a clip.

    Attributes:
        psnr: of the predicted clip, dB.
        decisions: the frames kept at each step.
        frames_generated: frames that the search rolled out for this clip, those of its other branches included.
    """

    psnr: float
    decisions: list[Decision]
    frames_generated: int


@torch.no_grad()
def search(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    max_frames: int,
    *,
    width: int = 4,
    branches: int = 4,
    memo_bytes: int = DEFAULT_BYTES,
    progress: bool = True,
) -> list[OracleRollout]:
    """Beam search on the true reward, guided by an estimate of the error to the end of the clip.

    At every decision each rollout in the beam continues with the ``branches`` sets that cover the future best. Of all these,
    the ``width`` continuations stay whose squared error so far plus expected squared error of the frames to come is smallest.
    At the end the true PSNR decides. With width = branches = 1 this is the expert alone.

    Args:
        width: rollouts per clip in the beam.
        branches: alternatives tried at every decision.
        memo_bytes: memory for frames that are generated again.

    Raises:
        ValueError: if no decision matters under this budget, or width or branches is below 1.
    """
    check_decides(workload, max_frames)
    if width < 1 or branches < 1:
        raise ValueError(f"a search needs a width and branches of at least 1, got {width} and {branches}")
    per_clip = 2 * width
    batch = RolloutBatch(workload, len(clips) * per_clip, FrameMemo(memo_bytes))
    batch.begin([index * per_clip for index in range(len(clips))], clips, noise_seeds)
    beams = [
        _Beam(batch, clip, range(index * per_clip, (index + 1) * per_clip), width, branches) for index, clip in enumerate(clips)
    ]
    with show_progress(total=workload.predict_units, description="search", unit="steps", disable=not progress) as bar:
        for step in range(workload.predict_units):
            batch.advance([row for beam in beams for row in beam.alive])
            for beam in beams:
                beam.score(step)
                if step < workload.predict_units - 1 and batch.history_length(beam.alive[0]) > max_frames:
                    beam.branch(step, max_frames)
            bar.update()
    return [beam.best() for beam in beams]


class _Beam:
    """The rollouts of one clip: ``alive`` are the rows that are in the beam."""

    def __init__(self, batch: RolloutBatch, clip: Clip, rows: range, width: int, branches: int) -> None:
        workload = batch.workload
        self.batch, self.rows, self.width, self.branches = batch, rows, width, branches
        frames = torch.from_numpy(clip.frames[: workload.num_frames]).to(workload.host.device)
        self.truth = frames[workload.num_context :]
        self.latents = true_units(workload, [clip])[0, workload.context_units :]
        self.scale = pixel_error_scale(frames, self.latents)
        self.alive = [rows[0]]
        self.errors = {rows[0]: 0.0}
        self.decisions: dict[int, list[Decision]] = {rows[0]: []}
        self.generated = 0

    def score(self, step: int) -> None:
        """Add the squared error of what was just generated, summed over its frames."""
        frames = self.batch.decode(self.alive, step, step + 1).float()
        shown = slice(*map(self.batch.workload.predicted_frames, (step, step + 1)))
        errors = (frames - self.truth[shown]).square().mean(dim=(2, 3, 4)).sum(dim=1).tolist()
        for row, error in zip(self.alive, errors, strict=True):
            self.errors[row] += error
        self.generated += len(self.alive)

    def branch(self, step: int, max_frames: int) -> None:
        """Replace the rollouts by the best of their continuations, whose histories fit the budget."""
        options = []
        for row in self.alive:
            length = self.batch.history_length(row)
            history = self.batch.history([row])[0][0, :length]
            feedback = self.batch.workload.true_feedback
            cover = coverage(history, self.latents[step], self.latents[step + 1 :], feedback=feedback)
            numbers = self.batch.frame_numbers(row)
            for kept in best_cover(cover, max_frames, self.branches):
                expected = self.errors[row] + self.scale * cover.cost(kept)
                options.append((expected, row, kept, Decision(step, tuple(numbers[i] for i in kept))))
        options.sort(key=lambda option: option[0])
        # One half of the rows contains the rollouts that are continued, the other half their continuations.
        free = [row for row in self.rows if row not in self.alive][: self.width]
        errors, decisions = {}, {}
        for target, (_, row, kept, decision) in zip(free, options, strict=False):
            self.batch.fork(row, [target])
            self.batch.retain(target, kept)
            errors[target] = self.errors[row]
            decisions[target] = [*self.decisions[row], decision]
        self.alive, self.errors, self.decisions = list(errors), errors, decisions

    def best(self) -> OracleRollout:
        """The finished rollout with the smallest error, which is the highest PSNR."""
        row = min(self.alive, key=self.errors.__getitem__)
        score = psnr(self.batch.decode([row])[0], self.truth)
        return OracleRollout(float(score), self.decisions[row], self.generated)
