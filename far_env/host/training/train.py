"""Train a host on any clips: first the autoencoder, then the transformer. The result is a host folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC

from far_env.config import from_dict, save_yaml
from far_env.device import denormals_flushed, resolve_device
from far_env.errors import unknown_name
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.host.far_long import FARLong, make_transformer
from far_env.host.precision import resolve_precision
from far_env.host.training.autoencoder import train_autoencoder
from far_env.host.training.config import HostTraining
from far_env.host.training.episodes import Episodes, find_episodes
from far_env.host.training.latent_cache import EncodedEpisodes, check_first_classes, encode_episodes, open_encoded
from far_env.host.training.next_frame import NextFrameTest
from far_env.host.training.processes import Processes
from far_env.host.training.transformer import train_transformer
from far_env.host.weights import SHIPPED, load_host, save_host
from far_env.host.zoo import RELEASED, load_released
from far_env.io import locked, make_run_dir, read_json, write_json
from far_env.provenance import run_facts, save_facts, session_precision


@dataclass(frozen=True)
class Start:
    """What training begins with: an autoencoder that is used unchanged, and a transformer's weights; None is trained anew."""

    autoencoder: Autoencoder | None = None
    transformer: FAR | None = None


@denormals_flushed()
def train_models(config: HostTraining) -> FARHost:
    """Train (or finish training) both models, write them to ``config.output_dir``, and return the host loaded from there.

    Of several processes that were launched together, the first one writes.

    Raises:
        TrainingStopped: after Ctrl-C, with the progress saved.
        ValueError: on a source that is neither a world nor a folder of videos, actions outside the host's classes, a folder
            that cannot be written, or a run folder that holds a run with other settings.
    """
    if config.autoencoder_of is not None and config.autoencoder_of not in SHIPPED:
        raise ValueError(unknown_name("shipped host", config.autoencoder_of, list(SHIPPED)))
    processes = Processes(resolve_device(config.device))
    processes.rows(config.transformer.batch_size, config.transformer.gradient_accumulation)
    start = load_start(config, processes.device)
    check_models(config, start)
    episodes = all_episodes(config)
    if start.autoencoder is None and any(item.holds_latents for item in episodes):
        raise ValueError("a source holds latents, so their autoencoder cannot be trained; name it with autoencoder_from")
    check_first_classes(episodes, _transformer_without_memory(config))
    run_dir = make_run_dir(config.run_dir)
    dtype = resolve_precision(session_precision(run_dir, config.precision), processes.device, training=True)
    with locked(run_dir) if processes.first else nullcontext():
        if processes.first:
            _check_same_run(config, run_dir)
            save_facts(run_dir, run_facts(processes.device, dtype))
        processes.wait()
        _train(config, episodes, start, run_dir, processes, dtype)
    processes.wait()
    return load_host(config.output_dir, str(processes.device))


def all_episodes(config: HostTraining) -> list[Episodes]:
    """The sources of a training. Raises ValueError as `find_episodes` does."""
    return [find_episodes(source, config.frame_size, config.transformer.clips_per_world) for source in config.sources]


def load_start(config: HostTraining, device: torch.device) -> Start:
    """The models that a training begins with, in float32 on a device.

    Raises:
        WeightsError: if they cannot be loaded.
        ValueError: if both ``start_from`` and ``autoencoder_from`` are given, or the host works on frames of another size.
    """
    if config.start_from is not None and config.autoencoder_from is not None:
        raise ValueError("start_from comes with its autoencoder; leave autoencoder_from out")
    name = config.autoencoder_from
    if name in RELEASED and RELEASED[name].kind == "Autoencoder":
        return Start(load_released(name).to(device))
    if name is None and config.start_from is None:
        return Start()
    host = load_host(name or config.start_from, str(device))
    if config.start_from is not None and host.frame_size != config.frame_size:
        raise ValueError(
            f"frame_size is {config.frame_size}, but the host {config.start_from} works on frames of {host.frame_size}²; set "
            f"frame_size: {host.frame_size} or leave start_from out"
        )
    return Start(host.autoencoder, None if config.start_from is None else host.transformer)


def encode_all(
    config: HostTraining, episodes: Sequence[Episodes], autoencoder: Autoencoder, processes: Processes
) -> list[EncodedEpisodes]:
    """Encode all sources, each process a part, and open them. Raises ValueError as `encode_episodes` does."""
    folder = make_run_dir(config.latents_dir or Path(config.run_dir) / "latents")
    model = _transformer_without_memory(config)
    share = slice(processes.index, None, processes.count)
    for item in episodes:
        encode_episodes(item, autoencoder, folder, model, share)
    processes.wait()
    return [open_encoded(item, autoencoder, folder) for item in episodes]


def encode_sources(config: HostTraining) -> list[EncodedEpisodes]:
    """Encode what a training would encode, before it. Several processes share the work.

    Raises:
        ValueError: if the autoencoder is trained in that training, or as `train_models` does.
    """
    processes = Processes(resolve_device(config.device))
    start = load_start(config, processes.device)
    if start.autoencoder is None:
        raise ValueError("the autoencoder does not exist before the training; name one with autoencoder_from or start_from")
    check_models(config, start)
    return encode_all(config, all_episodes(config), start.autoencoder, processes)


def _train(
    config: HostTraining, episodes: Sequence[Episodes], start: Start, run_dir: Path, processes: Processes, dtype: torch.dtype
) -> None:
    """Train both models, or the transformer alone if there is an autoencoder, and write them to ``config.output_dir``."""
    shares = [source.share for source in config.sources]
    common = {"seed": config.seed, "dtype": dtype, "checkpoint_every": config.checkpoint_every}
    autoencoder = start.autoencoder
    if autoencoder is None:
        # The first process alone: the decoder's batch statistics, and so the result, would depend on the number of processes.
        if not processes.first:
            processes.wait()
        autoencoder = train_autoencoder(config.autoencoder, episodes, shares, run_dir, device=processes.device, **common)
        if processes.first:
            processes.wait()
    encoded = encode_all(config, episodes, autoencoder, processes)
    test = None
    if config.validation.every and processes.first:
        test = NextFrameTest(config.validation, episodes, autoencoder, config.seed)
    options = {"start_from": start.transformer, "test": test, "processes": processes, **common}
    transformer = train_transformer(config.transformer, encoded, shares, run_dir, **options)
    if not processes.first:
        return
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


def _transformer_without_memory(config: HostTraining) -> FAR:
    """The transformer on torch's meta device, for what follows from its settings."""
    with torch.device("meta"):
        return make_transformer(config.transformer.model)


def check_models(config: HostTraining, start: Start) -> None:
    """Build both models without memory, so that settings that do not fit are reported before hours of training.

    Raises:
        ValueError: on an unknown argument (the nearest one is suggested), a wrong one, or sizes that do not match.
    """
    encoding = config.autoencoder.model if start.autoencoder is None else start.autoencoder.settings
    parts: dict[str, tuple[Callable, list[type], dict]] = {
        "autoencoder": (lambda settings: AutoencoderDC(**settings), [AutoencoderDC], encoding),
        "transformer": (make_transformer, [FARLong, FAR], config.transformer.model),
    }
    models = {}
    for part, (build, classes, arguments) in parts.items():
        parameters = [name for cls in classes for name in inspect.signature(cls).parameters]
        for key in arguments:
            if key not in parameters:
                raise ValueError(f"{part}: model: {unknown_name('key', key, parameters)}")
        try:
            with torch.device("meta"):
                models[part] = build(arguments)
        except Exception as error:
            raise ValueError(f"{part}: model: these settings do not fit: {error}") from error
    latent_channels = encoding.get("latent_channels", 32)
    for key in ("in_channels", "out_channels"):
        if config.transformer.model.get(key, 32) != latent_channels:
            raise ValueError(f"transformer: model: {key} must equal the autoencoder's latent_channels {latent_channels}")
    transformer, compression = models["transformer"], models["autoencoder"].spatial_compression_ratio
    multiple = compression * getattr(transformer, "context_patch_size", transformer.patch_size)
    if config.frame_size % multiple:
        raise ValueError(
            f"frame_size {config.frame_size} must be a multiple of {multiple}: the autoencoder's compression {compression} "
            "times the transformer's largest patch"
        )


def _plain(config: HostTraining) -> dict[str, Any]:
    """The settings as they are read from a JSON file."""
    return json.loads(json.dumps(asdict(config)))


def _check_same_run(config: HostTraining, run_dir: Path) -> None:
    """Save the settings, or refuse to resume a run whose settings that determine the weights differ."""
    path = run_dir / "training.json"
    determining = ("autoencoder", "transformer", "sources", "frame_size", "start_from", "autoencoder_from", "seed")
    settings = {key: value for key, value in _plain(config).items() if key in determining}
    if path.exists():
        stored = read_json(path, "choose another run_dir or delete it")
        try:
            # Options that a newer version has added have defaults that change nothing.
            before = _plain(from_dict(HostTraining, stored, path.name))
        except ValueError:
            before = {}
        if any(before.get(key) != value for key, value in settings.items()):
            raise ValueError(
                f"{run_dir} holds a run with other settings (see {path.name}); choose another run_dir or delete it"
            )
    write_json(path, settings)
    save_yaml(config, run_dir / "config.yaml")
