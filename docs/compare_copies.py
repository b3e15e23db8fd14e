"""How well the frames that policies keep could be copied from: a comparison that needs no video model that knows the world.

    python docs/compare_copies.py --workload doom --data-dir data/doom --split test --clips 256 POLICY …

Policies keep frames of histories of true frames. Each frame to come is copied from the kept frame that is most like it, so the
PSNR of a clip says what its memory could give, whatever a host makes of it. ``hindsight`` is the expert that agents imitate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from far_env.agents.histories import TrueHistories
from far_env.agents.oracle import best_cover, coverage
from far_env.cli.main import run_guarded
from far_env.clips.clip import check_clip_options
from far_env.config import parse, parse_mapping
from far_env.contract import ObservedRolloutState, RetentionPolicy, RolloutState, ask_policy, copy_for_clip, wanted_signals
from far_env.evaluation.statistics import mean_interval
from far_env.evaluation.table import interval_text
from far_env.frame_meta import frame_meta_list
from far_env.policies import load_policy
from far_env.progress import show_progress
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.text import markdown_lines
from far_env.workload import Workload
from far_env.workloads import make_workload

BASELINE = "recent_fill"
HINDSIGHT = "hindsight"


@dataclass(frozen=True)
class Options:
    """What is compared."""

    policies: tyro.conf.Positional[tuple[str, ...]]
    """Policies beside recent_fill, hindsight and full_history."""
    workload: str = "doom"
    """A registered workload."""
    budgets: tuple[int, ...] = (4, 8)
    """Frames that may be kept."""
    clips: int = 256
    """Clips, from the first on."""
    split: str = "test"
    """Split of the clips."""
    data_dir: str | None = None
    """Folder of recorded clips, for workloads that read them."""
    host: str | None = "embedded_maze"
    """The host whose autoencoder makes the latents from which policies get their features."""
    clip_options: str = ""
    """Further options of the clips in YAML, as for far-env evaluate."""


def copying_psnr(frames: np.ndarray, kept: list[list[int]]) -> float:
    """PSNR in dB of copying each of the last frames (T, 3, H, W) from the best of the frames kept before it."""
    pixels = frames.reshape(len(frames), -1)
    start = len(frames) - len(kept)
    errors = [np.square(pixels[ids] - pixels[start + step]).mean(axis=1).min() for step, ids in enumerate(kept)]
    return float(-10 * np.log10(max(np.mean(errors), 1e-10)))


@torch.no_grad()
def kept_frames(workload: Workload, latents: torch.Tensor, policy: object, budget: int | None, clip_id: int) -> list[list[int]]:
    """The numbers of the frames from which each predicted frame is made."""
    histories, context, total = TrueHistories(latents[None], workload.num_context), workload.num_context, workload.num_predict
    kept = [list(range(context))]
    asked: RetentionPolicy | None = None if isinstance(policy, str) else copy_for_clip(policy, BENCHMARK_SEED + clip_id)
    signals = wanted_signals(asked)
    for step in range(total - 1):
        histories.advance([0])
        numbers = histories.kept[0]
        if budget is not None and len(numbers) > budget:
            if policy == HINDSIGHT:
                newest = context + step
                cover = coverage(latents[numbers], latents[newest], latents[newest + 1 :], feedback=True)
                ids = best_cover(cover, budget)[0]
            else:
                features = torch.from_numpy(histories.features([0])[0])
                state = RolloutState(step, float(budget), total)
                if signals:
                    state = ObservedRolloutState(*vars(state).values(), signals=histories.signals([0])[0])
                limits = {"max_frames": budget, "capacity_mb": float(budget)}
                ids = ask_policy(asked, frame_meta_list(features, step, 1.0), state, limits, clip=clip_id).kept
            histories.retain(0, ids)
        kept.append(list(histories.kept[0]))
    return kept


def score(workload: Workload, split: str, clip_ids: Iterable[int], policy: object, budget: int | None) -> list[float]:
    """PSNR in dB of copying, for each clip; without a budget from all frames."""
    scores = []
    for clip_id in clip_ids:
        frames = workload.clips.clip(split, clip_id).frames[: workload.num_frames]
        with torch.no_grad():
            latents = workload.host.autoencoder.encode(torch.from_numpy(frames)[None])[0].float()
        scores.append(copying_psnr(frames, kept_frames(workload, latents, policy, budget, clip_id)))
    return scores


def main(options: Options) -> None:
    """Play, and print a table for each budget."""
    sources = check_clip_options(parse_mapping(options.clip_options, "clip-options"))
    sources |= {} if options.data_dir is None else {"data_dir": options.data_dir}
    workload = make_workload(options.workload, host=options.host, device="cpu", **sources)
    policies = {name: load_policy(name) for name in dict.fromkeys([BASELINE, *options.policies])} | {HINDSIGHT: HINDSIGHT}
    clips = range(options.clips)
    everything = np.array(score(workload, options.split, clips, HINDSIGHT, None))
    total = len(policies) * len(options.budgets)
    with show_progress(total=total, description="copies", unit="policies") as bar:
        for budget in options.budgets:
            rows = {"full_history": everything}
            for name, policy in policies.items():
                rows[name] = np.array(score(workload, options.split, clips, policy, budget))
                bar.update()
            lines = [["policy", "PSNR dB [95 %]", f"PSNR − {BASELINE} [95 %]"]]
            for name, values in sorted(rows.items(), key=lambda item: -item[1].mean()):
                texts = [interval_text(mean_interval(part), 2) for part in (values, values - rows[BASELINE])]
                lines.append([name, *texts])
            print(f"\n{options.workload} {options.split}, budget {budget}, {options.clips} clips\n\n{markdown_lines(lines)}")


def run() -> None:
    """Compare as the command line says."""
    main(parse(Options, sys.argv[1:], "python docs/compare_copies.py", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(run_guarded("docs/compare_copies.py", run))
