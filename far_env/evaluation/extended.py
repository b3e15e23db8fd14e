"""The command ``far-env extended``: quality under budgets of tokens, where demoted frames stay as coarse tokens.

Outside the benchmark, see `far_env.rollout.extended`. The folder gets extended.json (per policy, budget and clip), run.json
(who made it, with what) and the figure, as PNG and SVG. Finished parts are kept, so the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from far_env.clips.clip import check_clip_id
from far_env.config import parse, require_positive
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.evaluation.commands import listed
from far_env.evaluation.plots import COLOURS, MARKERS, STYLE, save_figure
from far_env.evaluation.records import FULL_HISTORY
from far_env.evaluation.statistics import Interval, mean_interval
from far_env.evaluation.table import text_table
from far_env.io import make_run_dir, write_text
from far_env.metrics import psnr
from far_env.provenance import run_facts, save_facts
from far_env.rollout.extended import check_token_budget, play_extended
from far_env.rollout.play import play
from far_env.workloads import Workload, make_workload

RESULTS_FILE = "extended.json"
REFERENCE = "recent_fill"


@dataclass(frozen=True)
class ExtendedOptions:
    """Compare policies under budgets of tokens, demoted frames being coarse: not the benchmark; FAR-Long hosts alone."""

    out: str
    """Folder for the figure and the numbers; the same command goes on where it stopped."""
    workload: str = "orbit"
    tokens: str = "64,128,192,256"
    """Tokens of the history that each generated frame may see; one or more."""
    policies: str = f"{REFERENCE},sink_recent_fine,far_coarse,packforcing_coarse,{FULL_HISTORY}"
    """Comma-separated: those of baselines/extended.py, baselines, .py files, run folders, pretrained/NAME, or full_history,
    which is the host's own: its window fine, all older frames coarse."""
    clips: int = 16
    """The first so many clips of the split."""
    seed: int = 42
    """Noise seed; clip i is played with it plus i."""
    split: str = "test"
    host: str | None = None
    """A FAR-Long: shipped, released or a host folder; by default the workload's own."""
    device: str = "auto"
    precision: str = "float32"
    """float32, bfloat16 or auto."""
    batch_size: int = 16
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""


@dataclass(frozen=True)
class Part:
    """One policy under one budget on all clips.

    Attributes:
        policy: its name.
        token_budget: None for full history.
        facts: what the policy's name stood for.
        psnr: of every clip, in dB; None where it is infinite.
        tokens: per clip, mean over the generated frames of the tokens of the history each was made from.
    """

    policy: str
    token_budget: int | None
    facts: dict[str, str]
    psnr: list[float | None]
    tokens: list[float]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells parts apart; another content under the same name is another part."""
        return self.policy, self.token_budget, *sorted(self.facts.items())

    def scores(self) -> np.ndarray:
        """PSNR, float64 (clips,), NaN where it is infinite."""
        return np.array(self.psnr, dtype=np.float64)

    def mean_tokens(self) -> float:
        """Over clips."""
        return float(np.mean(self.tokens))


def run_extended(args: Sequence[str]) -> None:
    """Compare policies under token budgets, with coarse frames."""
    options = parse(ExtendedOptions, args, "far-env extended", ExtendedOptions.__doc__ or "")
    require_positive(options, "clips", "batch_size")
    if options.seed < 0:
        raise ValueError(f"--seed takes a whole number from 0 on, got {options.seed}")
    budgets = sorted({_budget(text) for text in listed(options.tokens, "tokens", "token budget")})
    policies, facts = _load(listed(options.policies, "policies", "policy"))
    clip_options = {} if options.data_dir is None else {"data_dir": options.data_dir}
    place = {"host": options.host, "device": options.device, "precision": options.precision}
    workload = make_workload(options.workload, **place, **clip_options)
    for budget in budgets:
        check_token_budget(workload.host, budget)
    check_clip_id(workload.clips, options.split, options.clips - 1)
    folder = make_run_dir(options.out)
    settings = _settings(workload, options)
    known = load_parts(folder, settings)
    save_facts(folder, run_facts(workload.host.device, workload.host.dtype))
    try:
        parts = _play_parts(workload, options, policies, facts, budgets, known, folder, settings)
    except KeyboardInterrupt:
        print(f"\nwhat was finished so far is in {folder}; the same command goes on from there", file=sys.stderr)
        raise
    source = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    with rc_context(STYLE):
        figure = quality_figure(parts, f"{workload.name}, {options.clips} clips, extended (not the benchmark)")
        for kind in ("png", "svg"):
            save_figure(figure, folder / f"extended.{kind}", kind, source)
    print(f"{parts_table(parts)}\n\nextended, not the benchmark: {source}\n\nnumbers and figure in {folder}")


def load_parts(folder: Path, settings: Mapping[str, object]) -> list[Part]:
    """What a folder holds of earlier runs with the same settings.

    Raises:
        ValueError: if its file is damaged, or its numbers were made otherwise.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, parts = content["settings"], [Part(**own) for own in content["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another folder") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(f"{path} was made with {name} {found.get(name)}, not {value}; choose another folder")
    return parts


def parts_table(parts: Sequence[Part]) -> str:
    """Rows by budget, best policy first: tokens seen on average, mean PSNR with its interval, the paired difference."""
    intervals = {id(part): mean_interval(part.scores()) for part in parts}
    references = {part.token_budget: part for part in parts if part.policy == REFERENCE}
    rows = []
    for part in sorted(parts, key=lambda own: (own.token_budget or math.inf, -intervals[id(own)].mean)):
        reference = references.get(part.token_budget)
        difference = "" if reference in (None, part) else _text(mean_interval(part.scores() - reference.scores()), "+.2f")
        budget = "full" if part.token_budget is None else str(part.token_budget)
        rows.append([part.policy, budget, f"{part.mean_tokens():.1f}", _text(intervals[id(part)], ".2f"), difference])
    return text_table(["policy", "token budget", "tokens seen", "PSNR dB [95 %]", f"− {REFERENCE} [95 %]"], rows)


def quality_figure(parts: Sequence[Part], title: str) -> Figure:
    """Mean PSNR against the mean number of tokens that a generated frame saw, with 95 % intervals; full history is a line."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(part.policy for part in parts)):
        own = sorted((part for part in parts if part.policy == name), key=Part.mean_tokens)
        intervals = [mean_interval(part.scores()) for part in own]
        if name == FULL_HISTORY:
            axes.axhspan(intervals[0].low, intervals[0].high, color="#1c2025", alpha=0.1, linewidth=0)
            axes.axhline(intervals[0].mean, color="#1c2025", linestyle="--", linewidth=1.2, label=name)
            continue
        errors = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        places, means = [part.mean_tokens() for part in own], [i.mean for i in intervals]
        axes.errorbar(places, means, yerr=errors, **look, markersize=4.5, linewidth=1.6, elinewidth=1, label=name)
    axes.set(xlabel="tokens of the history (mean over generated frames)", ylabel="PSNR (dB)", title=title)
    figure.legend(loc="outside right upper")
    return figure


def _play_parts(
    workload: Workload,
    options: ExtendedOptions,
    policies: Mapping[str, RetentionPolicy | None],
    facts: Mapping[str, dict[str, str]],
    budgets: Sequence[int],
    known: list[Part],
    folder: Path,
    settings: Mapping[str, object],
) -> list[Part]:
    """Every policy under every budget; each part is saved when it is finished."""
    jobs = [(name, None if policies[name] is None else budget) for name in policies for budget in budgets]
    wanted = [Part(*job, facts[job[0]], [], []) for job in dict.fromkeys(jobs)]
    saved = {part.key: part for part in known}
    total = sum(part.key not in saved for part in wanted) * options.clips * workload.num_predict
    with tqdm(total=total, desc=workload.name, unit="frame", dynamic_ncols=True, disable=not total) as bar:
        for part in wanted:
            if part.key in saved:
                continue
            for first in range(0, options.clips, options.batch_size):
                ids = range(first, min(first + options.batch_size, options.clips))
                scores, tokens = _play(workload, options, policies[part.policy], part.token_budget, ids, bar)
                part.psnr.extend(scores)
                part.tokens.extend(tokens)
            saved[part.key] = part
            content = {"settings": settings, "parts": [asdict(own) for own in saved.values()]}
            write_text(folder / RESULTS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return [saved[part.key] for part in wanted]


def _play(
    workload: Workload,
    options: ExtendedOptions,
    policy: RetentionPolicy | None,
    token_budget: int | None,
    ids: Sequence[int],
    bar: tqdm,
) -> tuple[list[float | None], list[float]]:
    """PSNR and mean tokens of some clips."""
    clips = [workload.clips.clip(options.split, i) for i in ids]
    seeds = [options.seed + i for i in ids]
    if policy is None or token_budget is None:
        batch, _ = play(workload, clips, seeds, None, UNLIMITED_FRAMES, on_frame=bar.update)
        latents = batch.generated(range(len(clips)))
        like, lengths = torch.empty(workload.host.latent_shape), range(workload.num_context, workload.num_frames)
        counts = [sum(workload.host.transformer.token_counts(length, like)) for length in lengths]
        tokens = [float(np.mean(counts))] * len(clips)
    else:
        rollouts = play_extended(workload, clips, seeds, policy, token_budget, on_frame=bar.update)
        latents = torch.stack([own.latents for own in rollouts])
        tokens = [float(np.mean(own.tokens)) for own in rollouts]
    with torch.no_grad():
        frames = workload.host.autoencoder.decode(latents)
    truth = torch.from_numpy(np.stack([clip.frames[workload.num_context : workload.num_frames] for clip in clips]))
    scores = psnr(frames, truth.to(frames.device)).tolist()
    return [score if math.isfinite(score) else None for score in scores], tokens


def _load(names: Sequence[str]) -> tuple[dict[str, RetentionPolicy | None], dict[str, dict[str, str]]]:
    """Policies by name, and what is known of each. Raises ValueError on a name that is none."""
    from far_env.baselines import extended
    from far_env.policies import load_policy, policy_facts

    policies, facts = {}, {}
    for name in names:
        own = name in extended.EXTENDED
        policies[name] = extended.make(name) if own else load_policy(name)
        facts[name] = {"note": extended.note(name)} if own else policy_facts(name)
    return policies, facts


def _settings(workload: Workload, options: ExtendedOptions) -> dict[str, object]:
    """What must be the same for parts to be compared."""
    host = workload.host
    return {
        "workload": workload.name,
        "num_context": workload.num_context,
        "num_predict": workload.num_predict,
        "host": host.name,
        "weights": host.weights_hash,
        "ode_steps": workload.num_steps,
        "guidance": workload.guidance,
        "dtype": str(host.dtype).removeprefix("torch."),
        "split": options.split,
        "clips": options.clips,
        "noise_seed": options.seed,
        "data_dir": None if options.data_dir is None else str(Path(options.data_dir).resolve()),
    }


def _budget(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--tokens takes whole numbers, got {text!r}")
    return int(text)


def _text(interval: Interval, form: str) -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
