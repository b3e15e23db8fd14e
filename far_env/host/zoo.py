"""The released FAR models (Gu et al., arXiv 2503.19325): files, configurations, data and loading.

Facts from the Hugging Face repository guyuchao/FAR_Models; the eight hex digits in a file's name begin its SHA-256. Listing the
models imports no torch; building and loading one does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_env.errors import WeightsError, first_line, unknown_name
from far_env.io import cache_dir
from far_env.text import text_table

if TYPE_CHECKING:
    from torch import nn

REPOSITORY = "guyuchao/FAR_Models"
CITATION = "FAR: Gu et al., arXiv 2503.19325; DCAE: Chen et al., arXiv 2410.10733"
DIRECTORY_VARIABLE = "FAR_WEIGHTS_DIR"
BENCHMARK_DIRECTORY = Path("/data/far_weights")


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    Attributes:
        file: path in the repository, and below the weights folder.
        data: the data set that it was trained on.
        frame_size: side of its frames in pixels.
        config: constructor arguments of the model.
        million_parameters: size of the model, rounded to one decimal.
        kind: "FAR", "FARLong" or "Autoencoder".
        autoencoder: name of the autoencoder of a transformer's latents; None for autoencoders.
    """

    file: str
    data: str
    frame_size: int
    config: dict[str, Any] = field(repr=False)
    million_parameters: float
    kind: str = "FAR"
    autoencoder: str | None = None

    @property
    def hash_prefix(self) -> str:
        """First eight hex digits of the file's SHA-256."""
        return Path(self.file).stem.rsplit("-", 1)[1]

    @property
    def path(self) -> Path:
        """The path of the file on this machine, whether it exists or not."""
        return weights_dir() / self.file

    def build(self) -> nn.Module:
        """The model, not initialised, on torch's meta device."""
        import torch

        with torch.device("meta"):
            return self.model_class(**self.config)

    @property
    def model_class(self) -> type[nn.Module]:
        """The class that ``kind`` names."""
        from far_env.host.autoencoder import Autoencoder
        from far_env.host.far import FAR
        from far_env.host.far_long import FARLong

        return {"FAR": FAR, "FARLong": FARLong, "Autoencoder": Autoencoder}[self.kind]


def _far(num_layers: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    return {"num_layers": num_layers, "num_attention_heads": num_heads, **changes}


def _dcae(num_coarse_stages: int) -> dict[str, Any]:
    """Configuration of the autoencoder with compression 8, 16 or 32: one, two or three EfficientViT stages."""
    widths = [128, 256, 512, 512] + [1024] * (num_coarse_stages - 1)
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * num_coarse_stages
    multiscales: list[list[int]] = [[] for _ in blocks]
    return {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": [0, 4, 8] + [2] * num_coarse_stages,
        "decoder_layers_per_block": [0, 5, 10] + [2] * num_coarse_stages,
        "encoder_qkv_multiscales": multiscales,
        "decoder_qkv_multiscales": multiscales,
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * num_coarse_stages,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * num_coarse_stages,
        "scaling_factor": 0.2889,
    }


_ACTIONS = {"condition_cfg": {"type": "action", "num_action_classes": 4}}
_LABELS = {"condition_cfg": {"type": "label", "num_classes": 101}}
_SHORT, _LONG, _VIDEO = "short_video_prediction", "long_video_prediction", "video_generation"

RELEASED: dict[str, Released] = {
    "far_b_ucf101": Released(
        f"{_SHORT}/FAR_B_UCF101_Uncond64-381d295f.pth", "UCF-101", 64, _far(12, 12), 129.6, "FAR", "dcae_ucf101_64"
    ),
    "far_b_bair": Released(
        f"{_SHORT}/FAR_B_BAIR_Uncond64-1983191b.pth",
        "BAIR",
        64,
        _far(12, 12, short_term_ctx_winsize=30),
        129.6,
        "FAR",
        "dcae_bair_64",
    ),
    "far_b_long_dmlab": Released(
        f"{_LONG}/FAR_B_Long_DMLab_Action64-c09441dc.pth",
        "DMLab",
        64,
        _far(12, 12, **_ACTIONS),
        158.1,
        "FARLong",
        "dcae_dmlab_64",
    ),
    "far_m_long_minecraft": Released(
        f"{_LONG}/FAR_M_Long_Minecraft_Action128-4c041561.pth",
        "Minecraft",
        128,
        _far(12, 16, **_ACTIONS),
        280.5,
        "FARLong",
        "dcae_minecraft_128",
    ),
    "far_l_ucf101_128": Released(
        f"{_VIDEO}/FAR_L_UCF101_Uncond128-c19abd2c.pth", "UCF-101", 128, _far(24, 16), 456.8, "FAR", "dcae_ucf101_128"
    ),
    "far_l_ucf101_128_label": Released(
        f"{_VIDEO}/FAR_L_UCF101_Cond128-c6f798bf.pth", "UCF-101", 128, _far(24, 16, **_LABELS), 456.9, "FAR", "dcae_ucf101_128"
    ),
    "far_l_ucf101_256": Released(
        f"{_VIDEO}/FAR_L_UCF101_Uncond256-adea51e9.pth", "UCF-101", 256, _far(24, 16), 456.8, "FAR", "dcae_ucf101_256"
    ),
    "far_l_ucf101_256_label": Released(
        f"{_VIDEO}/FAR_L_UCF101_Cond256-41c6033f.pth", "UCF-101", 256, _far(24, 16, **_LABELS), 456.9, "FAR", "dcae_ucf101_256"
    ),
    "far_xl_ucf101_256": Released(
        f"{_VIDEO}/FAR_XL_UCF101_Uncond256-3594ce6b.pth", "UCF-101", 256, _far(28, 18), 673.7, "FAR", "dcae_ucf101_256"
    ),
    "far_xl_ucf101_256_label": Released(
        f"{_VIDEO}/FAR_XL_UCF101_Cond256-28a88f56.pth", "UCF-101", 256, _far(28, 18, **_LABELS), 673.8, "FAR", "dcae_ucf101_256"
    ),
    "dcae_ucf101_64": Released("dcae/DCAE_UCF101_Res64-9da18dcf.pth", "UCF-101", 64, _dcae(1), 127.9, "Autoencoder"),
    "dcae_bair_64": Released("dcae/DCAE_BAIR_Res64-1a8547fb.pth", "BAIR", 64, _dcae(1), 127.9, "Autoencoder"),
    "dcae_dmlab_64": Released("dcae/DCAE_DMLab_Res64-17035ae5.pth", "DMLab", 64, _dcae(1), 127.9, "Autoencoder"),
    "dcae_minecraft_128": Released("dcae/DCAE_Minecraft_Res128-a5677f66.pth", "Minecraft", 128, _dcae(2), 215.8, "Autoencoder"),
    "dcae_ucf101_128": Released("dcae/DCAE_UCF101_Res128-bb9d1258.pth", "UCF-101", 128, _dcae(2), 215.8, "Autoencoder"),
    "dcae_ucf101_256": Released("dcae/DCAE_UCF101_Res256-9c4355c8.pth", "UCF-101", 256, _dcae(3), 323.4, "Autoencoder"),
}


def find_released(name: str) -> Released:
    """The released checkpoint of this name. Raises ValueError, with the nearest name, if there is none."""
    if name not in RELEASED:
        raise ValueError(unknown_name("released model", name, list(RELEASED)))
    return RELEASED[name]


def weights_dir() -> Path:
    """The folder of the environment variable FAR_WEIGHTS_DIR, else the benchmark's if it exists, else one in the cache."""
    configured = os.environ.get(DIRECTORY_VARIABLE)
    if configured:
        return Path(configured).expanduser()
    return BENCHMARK_DIRECTORY if BENCHMARK_DIRECTORY.is_dir() else cache_dir() / "weights"


def listing(names: Sequence[str]) -> str:
    """A table of released models: name, parameters, data, frame size, file, and whether it is on this machine."""
    rows = []
    for name in names:
        released = find_released(name)
        here = "yes" if released.path.exists() else "no"
        size = f"{released.million_parameters:.1f} M"
        rows.append((name, size, released.data, f"{released.frame_size}²", here, released.file))
    table = text_table(("name", "parameters", "data", "frames", "here", "file"), rows, numbers=False)
    return "\n".join([table, "", f"from {REPOSITORY} on Hugging Face, to {weights_dir()}", CITATION])


def verify(name: str) -> Path:
    """The checkpoint's file, after comparing its hash with its name.

    Raises:
        WeightsError: if the file is missing or its hash is another.
    """
    from far_env.tensor_files import file_hash

    released = find_released(name)
    path = released.path
    if not path.exists():
        raise WeightsError(
            f"the released weights {name} are not at {path}; far-env weights download {name} fetches them, or set "
            f"{DIRECTORY_VARIABLE} to the folder that holds {released.file}"
        )
    digest = file_hash(path)
    if not digest.startswith(released.hash_prefix):
        raise WeightsError(
            f"{path} has SHA-256 {digest[:8]}…, {released.hash_prefix}… is expected: it is damaged or incomplete; delete it "
            f"and fetch it again with far-env weights download {name}"
        )
    return path


def download(name: str) -> Path:
    """Fetch the checkpoint from Hugging Face, with progress and resume, unless its file exists already; then verify it.

    Raises:
        WeightsError: if it cannot be fetched, or its hash is not the one in its name; the fetched file is then removed.
    """
    from far_env.hub import HubError, fetch, list_files

    released = find_released(name)
    if released.path.exists():
        return verify(name)
    try:
        fetch(list_files(REPOSITORY), released.file, released.path)
    except HubError as error:
        raise WeightsError(f"{name}: {error}; or put the file at {released.path}") from error
    try:
        return verify(name)
    except WeightsError:
        released.path.unlink(missing_ok=True)
        raise


def load_released(name: str) -> nn.Module:
    """The released model in eval mode, float32, on the CPU, without gradients.

    Raises:
        WeightsError: if the file is missing, its hash or its tensors do not match, or it holds anything but tensors.
    """
    import torch

    from far_env.host.autoencoder import Autoencoder
    from far_env.tensor_files import check_state

    released, path = find_released(name), verify(name)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise WeightsError(f"{path} is no plain state dict of tensors and is not loaded: {first_line(error)}") from error
    model = released.build()
    # The release contains a diffusers autoencoder, which `Autoencoder` wraps.
    target = model.dcae if isinstance(model, Autoencoder) else model
    check_state(state, target.state_dict(), path)
    target.load_state_dict(state, assign=True)
    if isinstance(model, Autoencoder):
        model.to(memory_format=torch.channels_last)  # loaded tensors keep the layout of the file
    return model.float().eval().requires_grad_(False)
