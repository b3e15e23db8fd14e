"""Fréchet video distance (FVD, Unterthiner et al., arXiv 1812.01717) of generated videos to true ones.

The features are those of the package cd-fvd (extra ``fvd``; Ge et al., arXiv 2404.12391): the 400 outputs of an I3D trained on
Kinetics-400, of frames resized to 224 × 224. Its weights are fetched once by far-env weights download fvd; the package itself
would fetch them unasked. Without package or weights FVD is absent, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import MetricUnavailable, WeightsError, first_line
from far_env.evaluation.comparison import Evaluation
from far_env.evaluation.records import Key
from far_env.hub import HubError, fetch_url
from far_env.io import cache_dir, read_json, replacing, write_json
from far_env.rollout.context import context_latents
from far_env.rollout.noise import trajectory_seeds
from far_env.tensor_files import file_hash
from far_env.workload import Workload

FVD = "fvd"
"""The metric's name. It is one of sets of videos, and so none of `far_env.metrics.METRICS`."""
MIN_FRAMES = 10
"""Of a video, as in the program of FAR's authors; the network needs nine."""
I3D_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
"""From where cd-fvd takes the network's weights."""
_FRAMES_AT_ONCE = 256
_NO_PACKAGE = 'FVD needs the package cd-fvd: pip install "far-env[fvd]"'
_REMEDY = "delete the file and evaluate again"

Extract = Callable[[np.ndarray], np.ndarray]
"""Videos, uint8 (N, T, H, W, 3), to features, float32 (N, D)."""


def i3d_path() -> Path:
    """Where the network's weights are or would be."""
    return cache_dir() / "weights" / I3D_URL.rsplit("/", 1)[1]


def fvd_unavailable() -> str | None:
    """None where FVD can be computed, else one sentence: why not and what helps. Never touches the network."""
    if importlib.util.find_spec("cdfvd") is None:
        return _NO_PACKAGE
    if not i3d_path().exists():
        return f"FVD needs the weights of its network, which are not at {i3d_path()}; far-env weights download fvd fetches them"
    return None


def download_i3d() -> Path:
    """Fetch the network's weights, unless they are there, and load them once.

    Raises:
        WeightsError: without the package, or if they cannot be fetched or loaded; what was fetched is then removed.
    """
    path = i3d_path()
    if path.exists():
        return verify_i3d()
    if importlib.util.find_spec("cdfvd") is None:
        raise WeightsError(_NO_PACKAGE)
    try:
        # Nobody publishes the file's hash; the network that loads it is the check.
        fetch_url(I3D_URL, path, None)
    except HubError as error:
        raise WeightsError(f"{error}; or put the file at {path}") from error
    try:
        return verify_i3d()
    except WeightsError:
        path.unlink(missing_ok=True)
        raise


def verify_i3d() -> Path:
    """The file with the network's weights. Raises WeightsError if it is missing or is not that of the network."""
    try:
        VideoFeatures(torch.device("cpu"))
    except MetricUnavailable as error:
        raise WeightsError(str(error)) from error
    return i3d_path()


class VideoFeatures:
    """The features of videos, by cd-fvd.

    Raises:
        MetricUnavailable: without the package, without the weights, or if they cannot be loaded.

    Attributes:
        source: the package, its version, and the weights, by the first eight digits of their SHA-256.
    """

    def __init__(self, device: torch.device) -> None:
        if (reason := fvd_unavailable()) is not None:
            raise MetricUnavailable(reason)
        try:
            from cdfvd.fvd import FeatureStats, cdfvd

            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
                package = cdfvd("i3d", n_real="full", n_fake="full", ckpt_path=str(i3d_path()), device=str(device))
        except Exception as error:
            raise MetricUnavailable(
                f"FVD: cd-fvd with the weights at {i3d_path()} cannot be used ({first_line(error)}); install the extra fvd "
                "again, or delete the file and fetch it again with far-env weights download fvd"
            ) from error
        self._package, self._statistics = package, FeatureStats
        self.source = f"cd-fvd {version('cd-fvd')}, I3D ({file_hash(i3d_path())[:8]})"

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """Features, float32 (N, 400), of videos, uint8 (N, T, H, W, 3). Raises ValueError on videos that are too short."""
        if videos.shape[1] < MIN_FRAMES:
            raise ValueError(f"FVD needs videos of at least {MIN_FRAMES} frames, these have {videos.shape[1]}")
        package, features = self._package, self._statistics(capture_all=True)
        at_once = max(1, _FRAMES_AT_ONCE // videos.shape[1])
        place = {"device": package.device, "model_dtype": package.model_dtype}
        return package.feature_fn(features, package.model, videos, batchsize=at_once, **place).get_all()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance between Gaussians with the mean and covariance (unbiased) of two sets of features (n, D), (m, D).

    Raises:
        ValueError: on fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a Fréchet distance needs at least two videos on each side, got {len(first)} and {len(second)}")
    moments = [(features.mean(axis=0), np.cov(features, rowvar=False)) for features in map(np.float64, (first, second))]
    return gaussian_distance(*moments[0], *moments[1])


def gaussian_distance(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of means (D,) and covariances (D, D) (Dowson and Landau 1982).

    Σ₁ Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, whose roots are exact also where a covariance is singular, as it is
    with fewer videos than features.
    """
    covariance, other_covariance = np.atleast_2d(covariance), np.atleast_2d(other_covariance)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    products = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(products.clip(min=0)).sum()
    return float(np.square(mean - other_mean).sum() + trace)


@dataclass(frozen=True)
class _Part:
    """Features of some episodes (clip and seed of each), or of true clips (seed 0)."""

    clips: np.ndarray
    seeds: np.ndarray
    features: np.ndarray


class FeatureStore:
    """Features of all videos of an evaluation, those of a results folder included; they are added to it as they are made.

    A video is the given frames as the autoencoder gives them back and the predicted ones, as in the program of FAR's authors;
    with them are compared all frames of the true clips.

    Args:
        extract: makes the features.
        source: what makes them, for the record.
        folder: the results folder, or None.

    Raises:
        ValueError: if the folder has features of another source, or a damaged file.
    """

    def __init__(self, extract: Extract, source: str, folder: Path | None) -> None:
        self.source = source
        self._extract = extract
        self._folder = None if folder is None else folder / "features"
        self._of_episodes: dict[Key, np.ndarray] = {}
        self._of_clips: dict[tuple[str, int], np.ndarray] = {}
        if self._folder is not None and self._folder.exists():
            self._load(self._folder)

    @property
    def episodes(self) -> set[Key]:
        """The episodes that have features."""
        return set(self._of_episodes)

    def add(
        self, workload: Workload, budget: int, policy: str, clips: Sequence[Clip], seeds: Sequence[int], predicted: Tensor
    ) -> None:
        """Add the features of episodes, and of their clips.

        Args:
            clips, seeds: of each episode.
            predicted: their frames (N, n_predict, 3, H, W) in [0, 1].
        """
        unique = {clip.clip_id: clip for clip in clips}
        new = [clip for i, clip in unique.items() if (workload.name, i) not in self._of_clips]
        if new:
            features = self._extract(np.stack([_uint8(clip.frames[: workload.num_frames]) for clip in new]))
            ids = np.array([clip.clip_id for clip in new])
            self._save(_Part(ids, np.zeros_like(ids), features), workload.name, "truth")
            self._of_clips |= {(workload.name, int(i)): row for i, row in zip(ids, features, strict=True)}
        given = {} if workload.num_context == 0 else dict(zip(unique, _given(workload, list(unique.values())), strict=True))
        videos = [
            np.concatenate([*([given[clip.clip_id]] if given else []), _uint8(frames)])
            for clip, frames in zip(clips, predicted.cpu().numpy(), strict=True)
        ]
        features = self._extract(np.stack(videos))
        part = _Part(np.array([clip.clip_id for clip in clips]), np.array(seeds), features)
        self._save(part, workload.name, f"b{budget}", quote(policy, safe=""))
        self._keep(part, workload.name, budget, policy)

    def distances(
        self, workload: str, budget: int, policy: str, clip_ids: Sequence[int], seeds: Sequence[int], trajectories: int
    ) -> np.ndarray | None:
        """FVD of every noise seed, float64 (seeds,): the mean over its trajectories, each of which has one video of every clip.

        None unless all of these episodes have features.

        Raises:
            ValueError: with fewer than two clips.
        """
        all_seeds = [seed for first in seeds for seed in trajectory_seeds(first, trajectories)]
        keys = [[(workload, budget, policy, i, seed) for i in clip_ids] for seed in all_seeds]
        if not all(key in self._of_episodes for row in keys for key in row):
            return None
        truth = np.stack([self._of_clips[workload, i] for i in clip_ids])
        values = [frechet_distance(np.stack([self._of_episodes[key] for key in row]), truth) for row in keys]
        return np.reshape(values, (len(seeds), trajectories)).mean(axis=1)

    def _keep(self, part: _Part, workload: str, budget: int, policy: str) -> None:
        for clip, seed, row in zip(part.clips.tolist(), part.seeds.tolist(), part.features, strict=True):
            self._of_episodes[workload, budget, policy, clip, seed] = row

    def _save(self, part: _Part, *parts: str) -> None:
        if self._folder is None:
            return
        source = self._folder / "source.json"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            write_json(source, {"source": self.source})
        path = self._folder.joinpath(*parts, f"c{part.clips[0]}_s{part.seeds[0]}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, clips=part.clips, seeds=part.seeds, features=part.features)

    def _load(self, folder: Path) -> None:
        content = read_json(folder / "source.json", "choose another folder")
        source = content.get("source") if isinstance(content, dict) else None
        if source != self.source:
            raise ValueError(f"{folder} holds features of {source}, not of {self.source}; choose another folder")
        for path in sorted(folder.glob("*/truth/*.npz")):
            part, workload = _read(path), path.parent.parent.name
            self._of_clips |= {(workload, i): row for i, row in zip(part.clips.tolist(), part.features, strict=True)}
        for path in sorted(folder.glob("*/b*/*/*.npz")):
            workload, budget, policy = path.relative_to(folder).parts[:3]
            self._keep(_read(path), workload, int(budget[1:]), unquote(policy))


def with_fvd(
    table: Evaluation, features: FeatureStore | None, reason: str | None, seeds: Sequence[int], budget: int
) -> Evaluation:
    """The table with FVD of the policies whose videos have features, or with the reason why there is none.

    Args:
        seeds, budget: the table's; noise seeds without those of its trajectories.
    """
    workload = str(table.provenance["workload"])
    if features is not None and len(table.clip_ids) < 2:
        features, reason = None, f"FVD needs at least two clips, there are {len(table.clip_ids)}"
    if features is None:
        return replace(table, unavailable={**table.unavailable, FVD: str(reason)})
    distances = {}
    for name, played_under in itertools.product(table.scores, (UNLIMITED_FRAMES, budget)):
        values = features.distances(workload, played_under, name, table.clip_ids, seeds, table.trajectories)
        if values is not None:
            distances[name] = values
    return replace(table, fvd=distances, provenance={**table.provenance, FVD: features.source})


def _given(workload: Workload, clips: Sequence[Clip]) -> Iterator[np.ndarray]:
    """The given frames of each clip, uint8 (n_context, H, W, 3), through the autoencoder."""
    with torch.no_grad():
        frames = workload.host.decode(context_latents(workload.host, clips, workload.num_context))
    return map(_uint8, frames.float().cpu().numpy())


def _uint8(frames: np.ndarray) -> np.ndarray:
    """(T, 3, H, W) in [0, 1] to uint8 (T, H, W, 3)."""
    return np.rint(frames.transpose(0, 2, 3, 1) * 255).clip(0, 255).astype(np.uint8)


def _read(path: Path) -> _Part:
    """A file of features. Raises ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays: dict[str, Any] = {name: content[name] for name in ("clips", "seeds", "features")}
    except Exception as error:  # zipfile and NumPy raise many kinds of them
        raise ValueError(f"{path} is damaged ({first_line(error)}); {_REMEDY}") from error
    part = _Part(**arrays)
    count = len(part.features) if part.features.ndim == 2 else -1
    if part.clips.shape != (count,) or part.seeds.shape != (count,) or not np.isfinite(part.features).all():
        raise ValueError(f"{path} is damaged (its arrays do not fit together); {_REMEDY}")
    return part
