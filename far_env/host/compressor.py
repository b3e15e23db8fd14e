"""A trained compressor for a token memory: a block of frames becomes a few tokens, as in PackForcing (arXiv 2603.25730, §3.2).

Two branches are added. The high-resolution one embeds the block's latents by patches of space and time, and convolves them; the
low-resolution one decodes them, averages the frames and their pixels, encodes the one small picture again with the frozen
autoencoder, and embeds it. The sum is a grid of tokens of the transformer's width, half as many along each axis as of a frame,
from which the frozen transformer computes keys and values like from any other tokens. With four frames in a block these are 16
times fewer tokens. Training begins with the tokens that are in their places in the block's last frame, which the transformer
knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.errors import WeightsError, first_line, unknown_name
from far_env.host.autoencoder import Autoencoder
from far_env.host.blocks import Modulation, patchify, rotary_table
from far_env.host.far import FAR, Modulations
from far_env.host.far_host import FARHost
from far_env.io import read_json, write_json
from far_env.tensor_files import file_hash, load_weights, save_weights

BRANCHES = ("both", "high", "low")
BLOCKS = (1, 2, 4, 8)
"""Lengths of a block in frames."""
SPACING = 2
"""Tokens of a frame, along each axis, that one compressed token covers."""
SHIPPED = "shipped"
"""The name of the compressor that ships for a host."""
_SHIPPED_FOLDER = Path(__file__).parent.parent / "assets" / "compressors"
_REMEDY = "restore the file or train the compressor again"


class Compressor(nn.Module):
    """Turns blocks of latents into tokens.

    Args:
        in_channels, patch_size, width: of the transformer's latents and tokens.
        block_frames: frames of a block, one of `BLOCKS`.
        channels: of the convolutions.
        branches: both, or one of them alone.

    Raises:
        ValueError: on another block length or branch, or a patch size that is no power of two.
    """

    def __init__(
        self, in_channels: int, patch_size: int, width: int, block_frames: int = 4, channels: int = 96, branches: str = "both"
    ) -> None:
        super().__init__()
        if block_frames not in BLOCKS:
            raise ValueError(f"block_frames must be one of {', '.join(map(str, BLOCKS))}, got {block_frames!r}")
        if branches not in BRANCHES:
            raise ValueError(unknown_name("branch", branches, BRANCHES))
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise ValueError(f"a compressor needs a transformer whose patch size is a power of two, got {patch_size}")
        self.settings = {"block_frames": block_frames, "channels": channels, "branches": branches}
        self.patch_size, self.block_frames = patch_size, block_frames
        self.patches = self.high = self.low = None
        if branches != "low":
            size = (block_frames, patch_size * SPACING, patch_size * SPACING)
            self.patches = nn.Conv3d(in_channels, width, size, size)
            self.high = _convolutions(in_channels, channels, width, patch_size * SPACING, block_frames)
        if branches != "high":
            self.low = nn.Linear(in_channels * patch_size**2, width)

    @staticmethod
    def of(model: FAR, **settings: Any) -> Compressor:
        """A new compressor for a transformer; its tokens are those of the block's last frame, or of the small picture.

        Of a frame these are the upper left of each 2×2. What else is added is zero before training.
        """
        compressor = Compressor(model.in_channels, model.patch_size, model.x_embedder.out_features, **settings)
        zeroed: list[nn.Module] = []
        if compressor.patches is None:
            compressor.low.load_state_dict(model.x_embedder.state_dict())
        else:
            side, weight = model.patch_size, torch.zeros_like(compressor.patches.weight)
            weight[:, :, -1, :side, :side] = model.x_embedder.weight.detach().unflatten(1, (-1, side, side))
            compressor.patches.load_state_dict({"weight": weight, "bias": model.x_embedder.bias.detach()})
            zeroed = [compressor.high[-1], *([] if compressor.low is None else [compressor.low])]
        for parameter in (parameter for module in zeroed for parameter in module.parameters()):
            nn.init.zeros_(parameter)
        return compressor

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens for a block of latents (…, h, w). Raises ValueError on sizes that do not fit."""
        height, width = latents.shape[-2:]
        side = self.patch_size * SPACING
        if height % side or width % side:
            raise ValueError(f"latents of {height}×{width} cannot be compressed to tokens of {side}×{side}")
        return height // side, width // side

    def table(self, latents: Tensor, model: FAR) -> Tensor:
        """Rotary table (1, S, 1, d / 2) of a block at time position 0: a token is where its upper left token was."""
        time = torch.zeros(1, 1, device=latents.device)
        return rotary_table(time, *self.grid(latents), model.axes_dims_rope, SPACING)

    @property
    def tokens_covered(self) -> int:
        """Tokens that one compressed token stands for."""
        return SPACING**2 * self.block_frames

    def forward(self, latents: Tensor, small: Tensor) -> Tensor:
        """Tokens (B, 1, S, D) of blocks.

        Args:
            latents: clean (B, block_frames, C, h, w).
            small: of the same blocks (B, C, h / 2, w / 2), see `small_latents`.
        """
        tokens = 0
        if self.high is not None:
            of_block = latents.transpose(1, 2)
            high = self.patches(of_block) + self.high(of_block)
            tokens = tokens + high[:, :, 0].flatten(2).transpose(1, 2)
        if self.low is not None:
            tokens = tokens + self.low(patchify(small[:, None], self.patch_size)[:, 0])
        return tokens[:, None]


def _convolutions(in_channels: int, channels: int, width: int, side: int, block_frames: int) -> nn.Sequential:
    """Convolutions from (B, C, F, h, w) to (B, width, 1, h / side, w / side); each halves what is left, time included."""
    layers: list[nn.Module] = []
    while side > 1:
        stride = (1 if block_frames == 1 else 2, 2, 2)
        layers += [nn.Conv3d(in_channels, channels, 3, stride, padding=1), nn.SiLU()]
        in_channels, side, block_frames = channels, side // 2, block_frames // stride[0]
    return nn.Sequential(*layers, nn.Conv3d(in_channels, width, (block_frames, 1, 1)))


@torch.no_grad()
def small_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """The low-resolution branch's pictures of blocks (B, F, C, h, w): latents (B, C, h / 2, w / 2).

    The frames are decoded, averaged over the block and over 2×2 pixels, and encoded.
    """
    return encode_small(autoencoder, small_pictures(autoencoder, latents).mean(dim=1))


@torch.no_grad()
def small_pictures(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decoded frames (B, F, 3, H / 2, W / 2) of latents (B, F, C, h, w), averaged over 2×2 pixels."""
    return F.avg_pool2d(autoencoder.decode(latents).flatten(0, 1), SPACING).unflatten(0, latents.shape[:2])


@torch.no_grad()
def encode_small(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    """Latents (B, C, h / 2, w / 2) of pictures (B, 3, H / 2, W / 2)."""
    return autoencoder.encode(pictures[:, None])[:, 0]


def block_modulations(modulations: Modulations, block_frames: int) -> Modulations:
    """Modulations of blocks, the means of those of their frames (B, blocks · block_frames, 1, D).

    Those that apply to all frames stay as they are.
    """

    def means(parts: Modulation) -> Modulation:
        return tuple(x if x.shape[1] == 1 else x.unflatten(1, (-1, block_frames)).mean(dim=2) for x in parts)

    return Modulations([means(parts) for parts in modulations.blocks], means(modulations.final))


def save_compressor(folder: Path, compressor: Compressor, host: FARHost) -> None:
    """Write a compressor in float16: compressor.safetensors, and config.json with its hash and the host's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compressor.safetensors"
    save_weights({key: value.half() for key, value in compressor.state_dict().items()}, path)
    config = {"host": host.name, "host_weights": host.weights_hash, "sha256": file_hash(path), **compressor.settings}
    write_json(folder / "config.json", config)


def load_compressor(name: str, host: FARHost) -> Compressor:
    """The compressor that ships for a host (`SHIPPED`), or one from a folder, on the host's device and in its dtype.

    Raises:
        ValueError: if none ships for the host.
        WeightsError: if the folder has none, it is of another host, or its files are damaged.
    """
    folder = shipped_folder(host) if name == SHIPPED else Path(name)
    path, config_path = folder / "compressor.safetensors", folder / "config.json"
    try:
        config = read_json(config_path, _REMEDY)
    except ValueError as error:
        raise WeightsError(f"no compressor in {folder}: {error}") from error
    keys = ("host", "host_weights", "sha256", "block_frames", "channels", "branches")
    if not isinstance(config, dict) or set(config) != set(keys):
        raise WeightsError(f"{config_path} must have the keys {', '.join(keys)}; {_REMEDY}")
    if config["host_weights"] != host.weights_hash:
        raise WeightsError(
            f"the compressor in {folder} was trained for the host {config['host']} with weights {config['host_weights']}, not "
            f"for {host.name} with {host.weights_hash}; train one with far-env train-compressor"
        )
    if (found := file_hash(path)) != config["sha256"]:
        raise WeightsError(
            f"{path} has SHA-256 {found[:8]}…, config.json expects {str(config['sha256'])[:8]}…; restore the file"
        )
    try:
        compressor = Compressor.of(host.transformer, **{key: config[key] for key in keys[3:]})
    except Exception as error:  # torch raises many kinds of them
        raise WeightsError(f"{config_path}: the settings do not fit: {first_line(error)}") from error
    return load_weights(compressor, path).to(host.device, host.dtype)


def shipped_folder(host: FARHost) -> Path:
    """The folder of the compressor that ships for a host. Raises ValueError if there is none."""
    for path in sorted(_SHIPPED_FOLDER.glob("*/config.json")):
        if json.loads(path.read_text(encoding="utf-8"))["host_weights"] == host.weights_hash:
            return path.parent
    raise ValueError(
        f"no compressor ships for the host {host.name}; train one with far-env train-compressor, and name its folder: "
        "packforcing:compressor=FOLDER"
    )
