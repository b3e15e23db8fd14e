"""Quality under budgets of tokens, where demoted frames stay as coarse tokens; outside the benchmark.

See `far_env.rollout.extended` for the rollouts. The folder receives extended.json (per policy, budget and clip) and the figure,
as PNG and SVG. Finished parts are kept, so that a stopped run can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from far_env.config import from_dict
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.evaluation.plots import COLOURS, MARKERS, STYLE, save_figure
from far_env.evaluation.statistics import mean_interval
from far_env.evaluation.table import interval_text, signed_interval_text
from far_env.io import read_json, write_json
from far_env.metrics import psnr
from far_env.policies import FULL_HISTORY
from far_env.progress import Progress, show_progress
from far_env.rollout.extended import play_extended
from far_env.rollout.play import play
from far_env.text import text_table
from far_env.workloads import Workload

RESULTS_FILE = "extended.json"
REFERENCE = "recent_fill"


@dataclass(frozen=True)
class Part:
    """One policy under one budget on all clips.

    Attributes:
        policy: its name.
        token_budget: None for full history.
        facts: what `far_env.policies.policy_facts` said of the policy.
        psnr: of every clip, in dB; None where it is infinite.
        tokens: per clip, mean over the generated frames of the tokens of the history that each was generated from.
    """

    policy: str
    token_budget: int | None
    facts: dict[str, str]
    psnr: list[float | None]
    tokens: list[float]

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of a part; a policy whose content has changed under the same name is another part."""
        return self.policy, self.token_budget, *sorted(self.facts.items())

    def scores(self) -> np.ndarray:
        """PSNR, float64 (clips,), NaN where it is infinite."""
        return np.array(self.psnr, dtype=np.float64)

    def mean_tokens(self) -> float:
        """Over clips."""
        return float(np.mean(self.tokens))


@dataclass(frozen=True)
class ExtendedRun:
    """One run: the first ``num_clips`` clips of a split of a workload, clip i with the noise seed ``seed`` + i."""

    workload: Workload
    split: str
    num_clips: int
    seed: int
    batch_size: int
    data_dir: str | None = None

    def settings(self) -> dict[str, object]:
        """The settings that must be equal for parts to be comparable."""
        host = self.workload.host
        return {
            "workload": self.workload.name,
            "num_context": self.workload.num_context,
            "num_predict": self.workload.num_predict,
            "host": host.name,
            "weights": host.weights_hash,
            "ode_steps": self.workload.num_steps,
            "guidance": self.workload.guidance,
            "dtype": str(host.dtype).removeprefix("torch."),
            "split": self.split,
            "clips": self.num_clips,
            "noise_seed": self.seed,
            "data_dir": None if self.data_dir is None else str(Path(self.data_dir).resolve()),
        }

    def play(
        self,
        policies: Mapping[str, RetentionPolicy | None],
        facts: Mapping[str, dict[str, str]],
        budgets: Sequence[int],
        known: Sequence[Part],
        folder: Path,
    ) -> list[Part]:
        """Every policy under every budget, less the parts that are known; each part is saved when it is finished."""
        jobs = [(name, None if policies[name] is None else budget) for name in policies for budget in budgets]
        wanted = [Part(name, budget, facts[name], [], []) for name, budget in dict.fromkeys(jobs)]
        saved = {part.key: part for part in known}
        total = sum(part.key not in saved for part in wanted) * self.num_clips * self.workload.num_predict
        with show_progress(total=total, description=self.workload.name, unit="frames", disable=not total) as bar:
            for part in wanted:
                if part.key in saved:
                    continue
                for first in range(0, self.num_clips, self.batch_size):
                    ids = range(first, min(first + self.batch_size, self.num_clips))
                    scores, tokens = self._play_clips(policies[part.policy], part.token_budget, ids, bar)
                    part.psnr.extend(scores)
                    part.tokens.extend(tokens)
                saved[part.key] = part
                content = {"settings": self.settings(), "parts": [asdict(item) for item in saved.values()]}
                write_json(folder / RESULTS_FILE, content, allow_nan=False)
        return [saved[part.key] for part in wanted]

    def _play_clips(
        self, policy: RetentionPolicy | None, token_budget: int | None, ids: Sequence[int], bar: Progress
    ) -> tuple[list[float | None], list[float]]:
        """PSNR in dB (None where it is infinite) and mean tokens of some clips."""
        workload = self.workload
        clips = [workload.clips.clip(self.split, i) for i in ids]
        seeds = [self.seed + i for i in ids]
        if policy is None or token_budget is None:
            batch, _ = play(workload, clips, seeds, None, UNLIMITED_FRAMES, on_frame=bar.update)
            latents = batch.generated(range(len(clips)))
            like, lengths = torch.empty(workload.host.latent_shape), range(workload.num_context, workload.num_frames)
            counts = [sum(workload.host.transformer.token_counts(length, like)) for length in lengths]
            tokens = [float(np.mean(counts))] * len(clips)
        else:
            rollouts = play_extended(workload, clips, seeds, policy, token_budget, on_frame=bar.update)
            latents = torch.stack([rollout.latents for rollout in rollouts])
            tokens = [float(np.mean(rollout.tokens)) for rollout in rollouts]
        with torch.no_grad():
            frames = workload.host.autoencoder.decode(latents)
        truth = torch.from_numpy(np.stack([clip.frames[workload.num_context : workload.num_frames] for clip in clips]))
        scores = psnr(frames, truth.to(frames.device)).tolist()
        return [score if math.isfinite(score) else None for score in scores], tokens


def load_parts(folder: Path, settings: Mapping[str, object]) -> list[Part]:
    """The parts that earlier runs with the same settings have saved in a folder.

    Raises:
        ValueError: if the file is damaged, or if its numbers were made with other settings.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    content = read_json(path, "choose another folder")
    found, entries = (content.get(key) for key in ("settings", "parts")) if isinstance(content, dict) else (None, None)
    if not isinstance(found, dict) or not isinstance(entries, list):
        raise ValueError(f"{path} is damaged (it lacks settings or parts); choose another folder")
    parts = [from_dict(Part, part, f"{path}, part {number}") for number, part in enumerate(entries)]
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(f"{path} was made with {name} {found.get(name)}, not {value}; choose another folder")
    for number, part in enumerate(parts):
        if {len(part.psnr), len(part.tokens)} != {settings.get("clips", len(part.psnr))}:
            raise ValueError(
                f"{path}, part {number}: needs psnr and tokens of {settings.get('clips')} clips; choose another folder"
            )
    return parts


def parts_table(parts: Sequence[Part]) -> str:
    """Rows by budget, best policy first: tokens used on average, mean PSNR with its interval, the paired difference."""
    intervals = {id(part): mean_interval(part.scores()) for part in parts}
    references = {part.token_budget: part for part in parts if part.policy == REFERENCE}
    rows = []
    for part in sorted(parts, key=lambda part: (part.token_budget or math.inf, -intervals[id(part)].mean)):
        reference = references.get(part.token_budget)
        paired = reference not in (None, part)
        difference = signed_interval_text(mean_interval(part.scores() - reference.scores())) if paired else ""
        budget = "full" if part.token_budget is None else str(part.token_budget)
        rows.append([part.policy, budget, f"{part.mean_tokens():.1f}", interval_text(intervals[id(part)], 2), difference])
    return text_table(["policy", "token budget", "tokens used", "PSNR dB [95 %]", f"− {REFERENCE} [95 %]"], rows)


def quality_figure(parts: Sequence[Part], title: str) -> Figure:
    """Mean PSNR against the mean number of history tokens per generated frame, with 95 % intervals; full history is a line."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(part.policy for part in parts)):
        curve = sorted((part for part in parts if part.policy == name), key=Part.mean_tokens)
        intervals = [mean_interval(part.scores()) for part in curve]
        if name == FULL_HISTORY:
            axes.axhspan(intervals[0].low, intervals[0].high, color="#1c2025", alpha=0.1, linewidth=0)
            axes.axhline(intervals[0].mean, color="#1c2025", linestyle="--", linewidth=1.2, label=name)
            continue
        errors = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        tokens, means = [part.mean_tokens() for part in curve], [i.mean for i in intervals]
        axes.errorbar(tokens, means, yerr=errors, **style, markersize=4.5, linewidth=1.6, elinewidth=1, label=name)
    axes.set(xlabel="tokens of the history (mean over generated frames)", ylabel="PSNR (dB)", title=title)
    figure.legend(loc="outside right upper")
    return figure


def save_quality_figure(parts: Sequence[Part], folder: Path, title: str, source: str) -> None:
    """Write `quality_figure` into a folder as extended.png and extended.svg, with its source in the metadata."""
    with rc_context(STYLE):
        figure = quality_figure(parts, title)
        for kind in ("png", "svg"):
            save_figure(figure, folder / f"extended.{kind}", kind, source)
