"""Train a host on the procedural worlds from nothing: autoencoder, transformer, measured quality, model card.

Run as ``far-env train-host --config configs/host_embedded.yaml``.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

from far_env.clips.worlds import WORLDS, World
from far_env.config import save_yaml
from far_env.contract import NewestFrames
from far_env.device import resolve_device, resolve_precision
from far_env.errors import unknown_name
from far_env.evaluation.evaluate import FULL_HISTORY, evaluate
from far_env.evaluation.statistics import mean_interval
from far_env.host.far import FAR
from far_env.host.far_long import FARLong, make_transformer
from far_env.host.training.autoencoder import train_autoencoder
from far_env.host.training.config import HostTraining
from far_env.host.training.transformer import train_transformer
from far_env.host.weights import SHIPPED, Host, load_host, save_host
from far_env.io import make_run_dir, write_text
from far_env.metrics import psnr
from far_env.provenance import load_facts, run_facts, save_facts
from far_env.tensor_files import load_tensors
from far_env.workloads import make_workload


def train_host(config: HostTraining) -> Host:
    """Train (or finish training), save, measure, and return the host as loaded from its folder.

    Raises:
        TrainingStopped: after Ctrl-C, with the progress saved.
        ValueError: on an unknown world, an unwritable folder, or a run folder that holds a run with other settings.
    """
    if not config.worlds:
        raise ValueError(f"worlds names none; choose from {', '.join(WORLDS)}")
    for name in config.worlds:
        if name not in WORLDS:
            raise ValueError(unknown_name("world", name, list(WORLDS)))
    if config.autoencoder_of is not None and config.autoencoder_of not in SHIPPED:
        raise ValueError(unknown_name("shipped host", config.autoencoder_of, list(SHIPPED)))
    # Training drives many values towards zero; denormal floats make CPU kernels three times slower.
    torch.set_flush_denormal(True)
    device = resolve_device(config.device)
    source = None if config.start_from is None else load_host(config.start_from, str(device))
    check_models(config, source)
    dtype = resolve_precision(config.precision, device)
    run_dir = make_run_dir(config.run_dir)
    _check_same_run(config, run_dir)
    save_facts(run_dir, run_facts(device, dtype))
    worlds: list[World] = [WORLDS[name] for name in config.worlds]
    common = {"seed": config.seed, "device": device, "dtype": dtype, "checkpoint_every": config.checkpoint_every}
    if source is None:
        autoencoder, start = train_autoencoder(config.autoencoder, worlds, run_dir, **common), None
    else:
        autoencoder, start = source.autoencoder, source.transformer
    transformer = train_transformer(config.transformer, autoencoder, worlds, run_dir, start_from=start, **common)
    output_dir = make_run_dir(config.output_dir)
    save_host(
        output_dir,
        transformer,
        autoencoder,
        {"autoencoder": autoencoder.settings, "transformer": config.transformer.model},
        frame_size=64,
        num_steps=config.num_steps,
        autoencoder_of=config.autoencoder_of,
    )
    host = load_host(output_dir, config.device)
    quality = measure_quality(config, str(device)) if config.quality_clips else {}
    save_yaml(config, output_dir / "training.yaml")
    write_text(output_dir / "README.md", _model_card(config, host, quality, run_dir))
    return host


def check_models(config: HostTraining, source: Host | None) -> None:
    """Build both models without memory, so that settings that do not fit are told before hours of work.

    Args:
        source: the host that training starts from, if any; its autoencoder is taken over instead of trained.

    Raises:
        ValueError: on an unknown argument (the nearest one is suggested), a wrong one, or channels that do not match.
    """
    encoding = config.autoencoder.model if source is None else source.autoencoder.settings
    parts: dict[str, tuple[Callable, list[type], dict]] = {
        "autoencoder": (lambda settings: AutoencoderDC(**settings), [AutoencoderDC], encoding),
        "transformer": (make_transformer, [FARLong, FAR], config.transformer.model),
    }
    for part, (build, takers, arguments) in parts.items():
        known = [name for taker in takers for name in inspect.signature(taker).parameters]
        for key in arguments:
            if key not in known:
                raise ValueError(f"{part}: model: {unknown_name('key', key, known)}")
        try:
            with torch.device("meta"):
                build(arguments)
        except Exception as error:
            raise ValueError(f"{part}: model: these settings do not fit: {error}") from error
    latent_channels = encoding.get("latent_channels", 32)
    for key in ("in_channels", "out_channels"):
        if config.transformer.model.get(key, 32) != latent_channels:
            raise ValueError(f"transformer: model: {key} must equal the autoencoder's latent_channels {latent_channels}")


def measure_quality(config: HostTraining, device: str) -> dict[str, dict[str, float]]:
    """Per world on test clips, in dB: autoencoder reconstruction, full-history and recent_fill clip PSNR."""
    quality = {}
    for name in config.worlds:
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


def _check_same_run(config: HostTraining, run_dir: Path) -> None:
    """Save the settings, or refuse to go on with a run whose settings that shape the weights differ."""
    path = run_dir / "training.json"
    shaping = ("autoencoder", "transformer", "worlds", "start_from", "seed")
    settings = json.loads(json.dumps({key: value for key, value in asdict(config).items() if key in shaping}))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{run_dir} holds a run with other settings (see {path.name}); choose another run_dir or delete it")
    write_text(path, json.dumps(settings, indent=2) + "\n")
    save_yaml(config, run_dir / "config.yaml")


def _model_card(config: HostTraining, host: Host, quality: dict[str, dict[str, float]], run_dir: Path) -> str:
    """The README.md of a host folder."""
    parts = {"autoencoder": host.autoencoder, "transformer": host.transformer}
    weights = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    made = {
        "autoencoder": f"autoencoder {config.autoencoder.steps:,} steps of {config.autoencoder.batch_size} frames",
        "transformer": f"transformer {config.transformer.steps:,} steps of {config.transformer.batch_size} histories",
    }
    stages = [f"{text} ({_stage_hours(run_dir, name)} h)" for name, text in made.items() if (run_dir / f"{name}.ckpt").exists()]
    if config.start_from is not None:
        stages.insert(0, f"autoencoder of the host {config.start_from}, whose transformer this one began from")
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
    names = " and ".join(config.worlds)
    model = "FAR-Long" if isinstance(host.transformer, FARLong) else "FAR"
    sessions = load_facts(run_dir)

    def told(key: str, separator: str = ", then ") -> str:
        """What the sessions say of themselves, each thing once, in order."""
        return separator.join(dict.fromkeys(session[key] for session in sessions))

    torch_version = sessions[-1]["versions"]["torch"]
    return f"""\
# Model card: a small {model} host for the procedural world{"s" if len(config.worlds) > 1 else ""} {names}

A frame-autoregressive flow-matching transformer (FAR, arXiv 2503.19325) and a deep-compression autoencoder (arXiv
2410.10733), trained from nothing on procedural clips, so that retention policies can be trained and compared without
downloads or a GPU. It predicts these worlds and nothing else.

- Weights: hash {host.weights_hash}; autoencoder {weights["autoencoder"]:,}, transformer {weights["transformer"]:,}
  parameters; float16.
- Data: train clips of {names}, 64×64, {WORLDS[config.worlds[0]].num_frames} frames, seed {config.seed};
  {config.transformer.clips_per_world:,} clips per world for the transformer.
- Training: {", ".join(stages)}, in {told("dtype")} on {told("machine")}, torch {torch_version},
  {time.strftime("%Y-%m")}, commit {told("commit")}.
- Command: `{told("command", "`, then `")}`; all settings are in training.yaml.

## Measured quality

{table if rows else "Not measured."}
"""


def _stage_hours(run_dir: Path, stage: str) -> str:
    return f"{load_tensors(run_dir / f'{stage}.ckpt')['seconds'] / 3600:.1f}"
