"""Load and save hosts: folders with config.json and two safetensors files, or released models by name."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from far_env.device import resolve_device, torch_defaults
from far_env.errors import WeightsError, first_line
from far_env.host.any_flow_files import ALSO_FILES, INDEX, NEEDED_FILES, is_pipeline, load_pipeline
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.host.far_long import make_transformer
from far_env.host.protocol import Host, check_host
from far_env.host.zoo import RELEASED, load_released
from far_env.hub import is_hub_name, snapshot
from far_env.io import write_json
from far_env.plugins import HOSTS, distribution_name, entry_points, load
from far_env.tensor_files import file_hash, load_weights, save_weights

_ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {
    "embedded": _ASSETS / "embedded_host",
    "embedded_long": _ASSETS / "embedded_long_host",
    "embedded_maze": _ASSETS / "embedded_maze_host",
}
"""The hosts that come with the package: a FAR for pan and cuts, a FAR-Long for orbit, a FAR with actions for the mazes."""
_PARTS = ("autoencoder", "transformer")


@torch_defaults()
def load_host(name: str | os.PathLike = "embedded", device: str = "auto", dtype: torch.dtype = torch.float32) -> Host:
    """Load a shipped host, a plugin's host or a released transformer by name, or a folder written by `save_host`.

    A folder in diffusers' format is loaded as `far_env.host.any_flow.AnyFlowFAR`. Either folder may be a repository of the
    Hugging Face hub, hub:user/name[@revision]; the host's name then has the commit.
    Hosts are kept in memory, once per device and dtype. A plugin's host is an entry point of ``far_env.hosts``: a subclass
    of `far_env.host.protocol.Host`, or a function ``load(device: torch.device, dtype: torch.dtype)`` that returns a host.

    Raises:
        WeightsError: if a file is missing or damaged, its hash is not the expected one, or keys or shapes do not fit.
        HubError: if the repository cannot be used.
        ValueError: if a plugin cannot be imported or does not return a host.
    """
    name, torch_device = str(name), resolve_device(str(device))
    if name in RELEASED:
        return _released_host(name, torch_device, dtype)
    if name in entry_points(HOSTS):
        return _registered_host(name, torch_device, dtype)
    if is_hub_name(name):
        if is_pipeline(snapshot(name, (), (INDEX,)).folder):
            kept = snapshot(name, NEEDED_FILES, ALSO_FILES)
            return load_pipeline(kept.name, kept.folder, torch_device, dtype)
        kept = snapshot(name, ("config.json", "transformer.safetensors"), ("autoencoder.safetensors",))
        return _folder_host(kept.name, kept.folder, torch_device, dtype)
    if is_pipeline(Path(name)):
        return load_pipeline(name, Path(name), torch_device, dtype)
    return _folder_host(name, Path(name), torch_device, dtype)


def load_embedded(device: torch.device, dtype: torch.dtype) -> FARHost:
    """The shipped FAR for the worlds pan and cuts."""
    return _folder_host("embedded", SHIPPED["embedded"], device, dtype)


def load_embedded_long(device: torch.device, dtype: torch.dtype) -> FARHost:
    """The shipped FAR-Long for the world orbit."""
    return _folder_host("embedded_long", SHIPPED["embedded_long"], device, dtype)


def load_embedded_maze(device: torch.device, dtype: torch.dtype) -> FARHost:
    """The shipped FAR, conditioned on actions, for the mazes."""
    return _folder_host("embedded_maze", SHIPPED["embedded_maze"], device, dtype)


@lru_cache(maxsize=4)
def _registered_host(name: str, device: torch.device, dtype: torch.dtype) -> Host:
    """The host of an entry point, far-env's or a plugin's."""
    entry = entry_points(HOSTS)[name]
    origin = f"the host {name} of the distribution {distribution_name(entry)}"
    try:
        host = load(entry)(device, dtype)
    except ValueError:
        raise
    except Exception as error:  # a plugin's own code
        raise ValueError(f"{origin} cannot be made: {type(error).__name__}: {first_line(error)}") from error
    return check_host(host, origin)


def _folder_host(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> FARHost:
    return _load_host(name, folder.resolve(), _read_config(folder), device, dtype)


@lru_cache(maxsize=4)
def _load_host(name: str, folder: Path, config_text: str, device: torch.device, dtype: torch.dtype) -> FARHost:
    # The text contains the weights' hashes, so a host that was trained again does not hit the cache.
    config = _check_config(folder, config_text)
    modules: dict[str, nn.Module] = {}
    sources = {
        "autoencoder": (SHIPPED.get(config.get("autoencoder_of"), folder), lambda settings: Autoencoder(**settings)),
        "transformer": (folder, make_transformer),
    }
    for part, (place, build) in sources.items():
        path = place / f"{part}.safetensors"
        content_hash, expected = file_hash(path), config["sha256"][part]
        if content_hash != expected:
            raise WeightsError(f"{path} has SHA-256 {content_hash[:8]}…, config.json expects {expected[:8]}…; restore the file")
        try:
            model = build(config[part])
        except Exception as error:  # diffusers and torch raise many kinds of them
            raise WeightsError(f"{folder / 'config.json'}: the {part} settings do not fit: {first_line(error)}") from error
        modules[part] = load_weights(model, path).to(device, dtype)
    side = config["frame_size"] // modules["autoencoder"].compression
    if config["latent_shape"] != [modules["transformer"].in_channels, side, side]:
        raise WeightsError(f"{folder / 'config.json'}: latent_shape does not fit the models; restore the file")
    return FARHost(
        name=name,
        weights_hash=hashlib.sha256(config_text.encode()).hexdigest()[:8],
        latent_shape=tuple(config["latent_shape"]),
        frame_size=config["frame_size"],
        num_steps=config["num_steps"],
        **modules,
    )


@lru_cache(maxsize=1)
def _released_host(name: str, device: torch.device, dtype: torch.dtype) -> FARHost:
    released = RELEASED[name]
    if released.autoencoder is None:
        raise WeightsError(f"{name} is an autoencoder; name a transformer, whose autoencoder is included")
    autoencoder = load_released(released.autoencoder).to(device, dtype)
    side = released.frame_size // autoencoder.compression
    return FARHost(
        name=name,
        transformer=load_released(name).to(device, dtype),
        autoencoder=autoencoder,
        weights_hash=released.hash_prefix,
        latent_shape=(released.config.get("in_channels", 32), side, side),
        frame_size=released.frame_size,
    )


def save_host(
    folder: Path,
    transformer: FAR,
    autoencoder: Autoencoder,
    configs: dict[str, dict],
    *,
    frame_size: int,
    num_steps: int,
    autoencoder_of: str | None = None,
) -> None:
    """Write a host in float16: two safetensors files and config.json, which contains their hashes.

    Args:
        configs: constructor arguments under "transformer" and "autoencoder". With a context_patch_size it is a FARLong.
        autoencoder_of: the shipped host that has this autoencoder; its file is not written again.

    Raises:
        ValueError: if that host has another autoencoder, or if weights are beyond the range of float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for part, module in (("autoencoder", autoencoder), ("transformer", transformer)):
        half = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
        for key, value in half.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"the {part} cannot be saved in float16: {key!r} holds values above 65504, or none at all")
        if part == "autoencoder" and autoencoder_of is not None:
            path = SHIPPED[autoencoder_of] / f"{part}.safetensors"
            shared = load_file(path)
            if shared.keys() != half.keys() or not all(torch.equal(shared[key], value.cpu()) for key, value in half.items()):
                raise ValueError(f"the autoencoder is not that of the host {autoencoder_of}; leave autoencoder_of out")
            hashes[part] = file_hash(path)
            continue
        path = folder / f"{part}.safetensors"
        save_weights(half, path)
        hashes[part] = file_hash(path)
    side = frame_size // autoencoder.compression
    config = {
        "frame_size": frame_size,
        "latent_shape": [transformer.in_channels, side, side],
        "num_steps": num_steps,
        "sha256": hashes,
        **configs,
    }
    if autoencoder_of is not None:
        config["autoencoder_of"] = autoencoder_of
    write_json(folder / "config.json", config)


def _read_config(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WeightsError(
            f"no host in {folder}: config.json cannot be read; use {', '.join(SHIPPED)}, a released model of far-env weights "
            "list, or a folder made by train-host"
        ) from error
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}); restore the file") from error


def _check_config(folder: Path, text: str) -> dict:
    """The content of config.json. Raises WeightsError, naming the file and the key, unless its values can be used."""
    path = folder / "config.json"
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object; restore the file")
    missing = [key for key in (*_PARTS, "sha256", "latent_shape", "frame_size", "num_steps") if key not in config]
    if missing:
        raise WeightsError(f"{path} lacks {', '.join(missing)}; restore the file")

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    hashes, shape = config["sha256"], config["latent_shape"]
    fits = {
        **{part: isinstance(config[part], dict) for part in _PARTS},
        "sha256": isinstance(hashes, dict) and all(isinstance(hashes.get(part), str) for part in _PARTS),
        "latent_shape": isinstance(shape, list) and len(shape) == 3 and all(map(is_count, shape)),
        "frame_size": is_count(config["frame_size"]),
        "num_steps": is_count(config["num_steps"]),
    }
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise WeightsError(f"{path}: {wrong[0]} has a value that cannot be used; restore the file")
    source = config.get("autoencoder_of", "embedded")
    if not isinstance(source, str) or source not in SHIPPED:
        raise WeightsError(f"{path}: autoencoder_of must be one of {', '.join(SHIPPED)}; restore the file")
    return config
