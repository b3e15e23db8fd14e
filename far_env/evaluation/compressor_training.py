"""Train a compressor of a token memory, measure what it recovers, and write its card.

Run as ``far-env train-compressor --workload orbit``.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from far_env.config import save_yaml
from far_env.device import denormals_flushed, resolve_device
from far_env.host.compressor import Compressor, load_compressor, save_compressor
from far_env.host.far_host import FARHost, require_far
from far_env.host.precision import resolve_precision
from far_env.host.training.compressor import NAME, train_compressor, validation_losses
from far_env.host.training.compressor_clips import encode_clips
from far_env.host.training.compressor_config import CompressorTraining
from far_env.io import locked, make_run_dir, read_json, write_json, write_text
from far_env.provenance import load_facts, run_facts, save_facts, session_precision
from far_env.tensor_files import load_tensors
from far_env.workload import Workload
from far_env.workloads import make_workload

_NOT_DETERMINING = ("run_dir", "output_dir", "device", "precision", "checkpoint_every", "validate_every")


@denormals_flushed()
def train(config: CompressorTraining) -> Compressor:
    """Train (or finish training) a compressor, write its folder with a card, and return it as loaded from there.

    Raises:
        TrainingStopped: after Ctrl-C, with the progress saved.
        ValueError: on a host that is conditioned on labels, clips that are too few or too short, or a run folder that holds a
            run with other settings.
    """
    workload = make_workload(config.workload, host=config.host, device=config.device)
    host = require_far(workload.host, "a compressor of token memories")
    if workload.labels:
        raise ValueError(f"{workload.name} has labels, with which no compressor is trained; use a workload without")
    Compressor.of(host.transformer, block_frames=config.block_frames, channels=1, branches=config.branches)
    run_dir, output_dir = make_run_dir(config.run_dir), make_run_dir(config.output_dir)
    device = resolve_device(config.device)
    dtype = resolve_precision(session_precision(run_dir, config.precision), device, training=True)
    with locked(run_dir):
        _check_same_run(config, host, run_dir)
        save_facts(run_dir, run_facts(device, dtype))
        folder = make_run_dir(run_dir / "clips")
        common = (workload.num_frames, config.block_frames, host, workload.actions, folder)
        counts = {"train": config.clips, "validation": config.validation_clips}
        clips = {split: encode_clips(workload.clips, split, count, *common) for split, count in counts.items()}
        compressor = train_compressor(config, host, clips, run_dir, dtype)
        save_compressor(output_dir, compressor, host)
        save_yaml(config, output_dir / "training.yaml")
        compressor = load_compressor(str(output_dir), host)
        losses = validation_losses(config, host, compressor, clips["validation"])
        write_text(output_dir / "README.md", _card(config, workload, compressor, losses, run_dir))
    return compressor


def _check_same_run(config: CompressorTraining, host: FARHost, run_dir: Path) -> None:
    """Save the settings, or refuse to resume a run whose settings that determine the weights differ."""
    path = run_dir / "training.json"
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_DETERMINING}
    settings = json.loads(json.dumps({**settings, "host": host.weights_hash}))
    if path.exists() and read_json(path, "choose another run_dir or delete it") != settings:
        raise ValueError(f"{run_dir} holds a run with other settings (see {path.name}); choose another run_dir or delete it")
    write_json(path, settings)


def _card(
    config: CompressorTraining, workload: Workload, compressor: Compressor, losses: dict[str, float], run_dir: Path
) -> str:
    """The README.md of a compressor's folder."""
    host, sessions = workload.host, load_facts(run_dir)
    minutes = load_tensors(run_dir / f"{NAME}.ckpt")["seconds"] / 60
    parameters = sum(parameter.numel() for parameter in compressor.parameters())
    goal = "to predict what the host predicts with all frames" if config.teacher else "on the host's flow-matching loss"
    recovered = (losses["none"] - losses["compressed"]) / (losses["none"] - losses["full"])

    def joined(key: str) -> str:
        """The distinct values of all sessions, in order."""
        return ", then ".join(dict.fromkeys(session[key] for session in sessions))

    version = sessions[-1]["versions"]["torch"]
    return f"""\
# Card: a compressor of token memories for {host.name}

PackForcing's dual-branch compressor (arXiv 2603.25730): blocks of {config.block_frames} frames become tokens that the
frozen host attends to in their place, {compressor.tokens_covered} times fewer. Used by the token policy `packforcing`.
It compresses frames like those that it was trained on, for this host alone.

- Host: {host.name}, weights {host.weights_hash}. Branches: {config.branches}; {parameters:,} parameters, float16.
- Data: {config.clips} train clips of {workload.name}, seed {config.seed}.
- Training: {config.steps:,} steps of {config.batch_size} histories {goal}, {minutes:.0f} minutes
  in {joined("dtype")} on {joined("machine")}, torch {version}, {time.strftime("%Y-%m")},
  commit {joined("commit")}.
- Command: `{joined("command")}`; training.yaml has all settings.

## Measured

The loss on {config.validation_clips} validation clips, with true histories of 1 to {config.max_blocks} blocks between the
first and the newest frames; lower is better.

| between first and newest frames | loss |
|---|---|
| all frames at full resolution | {losses["full"]:.4f} |
| compressed blocks | {losses["compressed"]:.4f} |
| nothing | {losses["none"]:.4f} |

Compressed blocks recover {recovered:.0%} of what the middle is worth to the loss.
"""
