"""Train a host on any clips: first the autoencoder, then the transformer. The result is a host folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderDC

from far_env.config import save_yaml
from far_env.device import denormals_flushed, resolve_device, resolve_precision
from far_env.errors import unknown_name
from far_env.host.far import FAR
from far_env.host.far_long import FARLong, make_transformer
from far_env.host.training.autoencoder import train_autoencoder
from far_env.host.training.config import HostTraining
from far_env.host.training.episodes import Episodes, find_episodes
from far_env.host.training.latent_cache import encode_episodes
from far_env.host.training.next_frame import NextFrameTest
from far_env.host.training.transformer import train_transformer
from far_env.host.weights import SHIPPED, Host, load_host, save_host
from far_env.io import locked, make_run_dir, read_json, write_json
from far_env.provenance import run_facts, save_facts, session_precision


@denormals_flushed()
def train_models(config: HostTraining) -> Host:
    """Train (or finish training) both models, write them to ``config.output_dir``, and return the host loaded from there.

    Raises:
        TrainingStopped: after Ctrl-C, with the progress saved.
        ValueError: on a source that is neither a world nor a folder of videos, actions outside the host's classes, a folder
            that cannot be written, or a run folder that holds a run with other settings.
    """
    if config.autoencoder_of is not None and config.autoencoder_of not in SHIPPED:
        raise ValueError(unknown_name("shipped host", config.autoencoder_of, list(SHIPPED)))
    device = resolve_device(config.device)
    source = None if config.start_from is None else load_host(config.start_from, str(device))
    check_models(config, source)
    episodes = [find_episodes(item, config.frame_size, config.transformer.clips_per_world) for item in config.sources]
    run_dir = make_run_dir(config.run_dir)
    dtype = resolve_precision(session_precision(run_dir, config.precision), device)
    with locked(run_dir):
        _check_same_run(config, run_dir)
        save_facts(run_dir, run_facts(device, dtype))
        _train(config, episodes, source, run_dir, device, dtype)
    return load_host(config.output_dir, config.device)


def _train(
    config: HostTraining,
    episodes: Sequence[Episodes],
    source: Host | None,
    run_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Train both models, or the transformer alone if there is a source, and write them to ``config.output_dir``."""
    shares = [item.share for item in config.sources]
    common = {"seed": config.seed, "device": device, "dtype": dtype, "checkpoint_every": config.checkpoint_every}
    if source is None:
        autoencoder, start = train_autoencoder(config.autoencoder, episodes, shares, run_dir, **common), None
    else:
        autoencoder, start = source.autoencoder, source.transformer
    folder = make_run_dir(config.latents_dir or run_dir / "latents")
    with torch.device("meta"):
        model = make_transformer(config.transformer.model)
    encoded = [encode_episodes(item, autoencoder, folder, model) for item in episodes]
    test = None
    if config.validation.every:
        test = NextFrameTest(config.validation, episodes, autoencoder, config.seed)
    transformer = train_transformer(config.transformer, encoded, shares, run_dir, start_from=start, test=test, **common)
    output_dir = make_run_dir(config.output_dir)
    save_host(
        output_dir,
        transformer,
        autoencoder,
        {"autoencoder": autoencoder.settings, "transformer": config.transformer.model},
        frame_size=config.frame_size,
        num_steps=config.num_steps,
        autoencoder_of=config.autoencoder_of,
    )
    save_yaml(config, output_dir / "training.yaml")


def check_models(config: HostTraining, source: Host | None) -> None:
    """Build both models without memory, so that settings that do not fit are reported before hours of training.

    Args:
        source: the host that training starts from, if any; its autoencoder is reused instead of trained.

    Raises:
        ValueError: on an unknown argument (the nearest one is suggested), a wrong one, or channels that do not match.
    """
    encoding = config.autoencoder.model if source is None else source.autoencoder.settings
    parts: dict[str, tuple[Callable, list[type], dict]] = {
        "autoencoder": (lambda settings: AutoencoderDC(**settings), [AutoencoderDC], encoding),
        "transformer": (make_transformer, [FARLong, FAR], config.transformer.model),
    }
    for part, (build, classes, arguments) in parts.items():
        parameters = [name for cls in classes for name in inspect.signature(cls).parameters]
        for key in arguments:
            if key not in parameters:
                raise ValueError(f"{part}: model: {unknown_name('key', key, parameters)}")
        try:
            with torch.device("meta"):
                build(arguments)
        except Exception as error:
            raise ValueError(f"{part}: model: these settings do not fit: {error}") from error
    if source is not None and source.frame_size != config.frame_size:
        raise ValueError(
            f"frame_size is {config.frame_size}, but the host {config.start_from} works on frames of {source.frame_size}²; set "
            f"frame_size: {source.frame_size} or leave start_from out"
        )
    latent_channels = encoding.get("latent_channels", 32)
    for key in ("in_channels", "out_channels"):
        if config.transformer.model.get(key, 32) != latent_channels:
            raise ValueError(f"transformer: model: {key} must equal the autoencoder's latent_channels {latent_channels}")


def _check_same_run(config: HostTraining, run_dir: Path) -> None:
    """Save the settings, or refuse to resume a run whose settings that determine the weights differ."""
    path = run_dir / "training.json"
    determining = ("autoencoder", "transformer", "sources", "frame_size", "start_from", "seed")
    settings = json.loads(json.dumps({key: value for key, value in asdict(config).items() if key in determining}))
    if path.exists():
        before = read_json(path, "choose another run_dir or delete it")
        if before != settings:
            raise ValueError(
                f"{run_dir} holds a run with other settings (see {path.name}); choose another run_dir or delete it"
            )
    write_json(path, settings)
    save_yaml(config, run_dir / "config.yaml")
