"""Train a host, measure its quality on test clips, and write its model card.

Run as ``far-env train-host --config configs/host_embedded.yaml``.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from far_env.clips.worlds import WORLDS
from far_env.contract import NewestFrames
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.statistics import mean_interval
from far_env.host.far_host import FARHost
from far_env.host.far_long import FARLong
from far_env.host.training.config import HostTraining, Source
from far_env.host.training.next_frame import HISTORIES, NextFrameTest
from far_env.host.training.processes import is_first_process
from far_env.host.training.train import all_episodes, train_models
from far_env.io import write_text
from far_env.metrics import psnr
from far_env.policies import FULL_HISTORY
from far_env.provenance import load_facts
from far_env.tensor_files import load_tensors
from far_env.workloads import WORKLOADS, make_workload


def train_host(config: HostTraining) -> FARHost:
    """Train (or finish training) a host, measure it, write its folder with a model card, and return it as loaded from there.

    Raises:
        TrainingStopped, ValueError: as `train_models` does.
    """
    host = train_models(config)
    if not is_first_process():
        return host
    quality = measure_quality(config, str(host.device)) if config.quality_clips else {}
    card = _model_card(config, host, quality, Path(config.run_dir))
    if config.validation.every:
        card += _next_frame_section(config, host)
    write_text(Path(config.output_dir) / "README.md", card)
    return host


def measurable(config: HostTraining) -> list[str]:
    """The worlds among the sources that are registered as workloads too, in which the host can be evaluated."""
    return [source.clips for source in config.sources if source.clips in WORLDS and source.clips in WORKLOADS]


def measure_quality(config: HostTraining, device: str) -> dict[str, dict[str, float]]:
    """Mean clip PSNR on test clips in dB, per world: "reconstruction" (autoencoder alone), "full_history" and "recent_fill"."""
    quality = {}
    for name in measurable(config):
        workload = make_workload(name, host=config.output_dir, device=device)
        ids = range(config.quality_clips)
        result = evaluate(
            workload,
            config.quality_budget,
            {FULL_HISTORY: None, "recent_fill": NewestFrames()},
            ids,
            metrics=("psnr",),
        )
        reconstructions = []
        for clip_id in ids:
            frames = torch.from_numpy(workload.clips.clip("test", clip_id).frames)[None].to(device)
            decoded = workload.host.autoencoder.decode(workload.host.autoencoder.encode(frames))
            reconstructions.append(psnr(decoded, frames).item())
        quality[name] = {"reconstruction": float(np.mean(reconstructions))}
        for policy, columns in result.scores.items():
            quality[name][policy] = mean_interval(columns["psnr"]).mean
    return quality


def _model_card(config: HostTraining, host: FARHost, quality: dict[str, dict[str, float]], run_dir: Path) -> str:
    """The README.md of a host folder."""
    parts = {"autoencoder": host.autoencoder, "transformer": host.transformer}
    weights = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    steps = {
        "autoencoder": f"autoencoder {config.autoencoder.steps:,} steps of {config.autoencoder.batch_size} frames",
        "transformer": f"transformer {config.transformer.steps:,} steps of {config.transformer.batch_size} "
        f"({config.transformer.objective})",
    }
    stages = [
        f"{text} ({_stage_hours(run_dir, name)} h)" for name, text in steps.items() if (run_dir / f"{name}.ckpt").exists()
    ]
    if config.start_from is not None:
        stages.insert(0, f"autoencoder of the host {config.start_from}, whose transformer initialised this one")
    if config.autoencoder_from is not None:
        stages.insert(0, f"autoencoder of {config.autoencoder_from}")
    rows = [
        f"| {world} | {values['reconstruction']:.1f} | {values[FULL_HISTORY]:.2f} | {values['recent_fill']:.2f} |"
        for world, values in quality.items()
    ]
    table = "\n".join(
        [
            f"Mean over {config.quality_clips} test clips per world, noise seed 42 + clip id, {host.num_steps} ODE steps; "
            "PSNR in dB:",
            "",
            f"| world | autoencoder reconstruction | full history | recent_fill, budget {config.quality_budget} |",
            "|---|---|---|---|",
            *rows,
        ]
    )
    names = " and ".join(source.clips for source in config.sources)
    data = ", ".join(f"{source.clips}{_share(config, source)}" for source in config.sources)
    taken = host.transformer.condition
    condition = "" if taken is None else f"; it takes {taken}s, {host.transformer.null_class} classes"
    model = "FAR-Long" if isinstance(host.transformer, FARLong) else "FAR"
    sessions = load_facts(run_dir)

    def joined(key: str, separator: str = ", then ") -> str:
        """The distinct values of all sessions, in order."""
        return separator.join(dict.fromkeys(session[key] for session in sessions))

    torch_version = sessions[-1]["versions"]["torch"]
    return f"""\
# Model card: a {model} host for {names}

A frame-autoregressive flow-matching transformer (FAR, arXiv 2503.19325) and a deep-compression autoencoder (arXiv
2410.10733). It predicts only clips like those that it was trained on{condition}.

- Weights: hash {host.weights_hash}; autoencoder {weights["autoencoder"]:,}, transformer {weights["transformer"]:,}
  parameters; float16.
- Data: train clips of {data}; {config.frame_size}×{config.frame_size}, seed {config.seed};
  {config.transformer.clips_per_world:,} clips of a world for the transformer.
- Training: {", ".join(stages)}, in {joined("dtype")} on {joined("machine")}, torch {torch_version},
  {time.strftime("%Y-%m")}, commit {joined("commit")}.
- Command: `{joined("command", "`, then `")}`; training.yaml has all settings.

## Measured quality

{table if rows else "Not measured."}
"""


def _next_frame_section(config: HostTraining, host: FARHost) -> str:
    """The next-frame test of the finished host, as a section of its card."""
    settings = config.validation
    test = NextFrameTest(settings, all_episodes(config), host.autoencoder, config.seed)
    kinds = [f"{kind}{where}" for where in ("", "_where_old") for kind in HISTORIES]
    rows = []
    for name, measured in test.measure(host.transformer).items():
        values = measured.scalars()
        cells = [f"{values[kind]:.2f}" if kind in values else "–" for kind in kinds]
        rows.append(f"| {name} | {' | '.join(cells)} | {values['share_old']:.0%} |")
    if not rows:
        return ""
    budget = settings.budget
    histories = f"all | newest {budget} | right {budget} | all, old | newest {budget}, old | right {budget}, old"
    return "\n".join(
        [
            "",
            "## Next frame after true frames",
            "",
            f"PSNR in dB of {settings.targets} frames of up to {settings.clips} validation clips per source, each predicted",
            f"from true frames in {settings.num_steps} ODE steps: all before it, the newest {budget}, or the right {budget}",
            "(the newest one and those that cover the frame best). *Old*: frames for which the best copy is at least 3 dB",
            "better than from the newest.",
            "",
            f"| source | {histories} | share of old |",
            f"|---|{'---|' * (len(kinds) + 1)}",
            *rows,
            "",
        ]
    )


def _share(config: HostTraining, source: Source) -> str:
    """How often a source was drawn, if there are others."""
    if len(config.sources) == 1:
        return ""
    return f" ({source.share / sum(other.share for other in config.sources):.0%})"


def _stage_hours(run_dir: Path, stage: str) -> str:
    return f"{load_tensors(run_dir / f'{stage}.ckpt')['seconds'] / 3600:.1f}"
