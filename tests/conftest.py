"""Shared fixtures: golden arrays, and a tiny host with random weights on which everything but quality can be tested fast."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from far_env.clips.worlds import WORLDS
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.host.far_long import FARLong
from far_env.host.weights import load_host, save_host
from far_env.host.zoo import RELEASED
from far_env.workload import Workload

DATA = Path(__file__).parent / "fixtures"
INDEX = json.loads((DATA / "index.json").read_text())["files"]

TINY_FAR = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
}
TINY_DCAE = {
    "in_channels": 3,
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 8, 8, 16],
    "decoder_block_out_channels": [8, 8, 8, 16],
    "encoder_layers_per_block": [0, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], []],
    "decoder_norm_types": "batch_norm",
    "decoder_act_fns": "silu",
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither read nor write the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_ENV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def floats_stay_as_they_were():
    """What a test calls must not leave denormal floats flushed to zero, which changes the tests after it."""
    yield
    assert sys.float_info.min / 2 > 0, "denormal floats are still flushed to zero"


@pytest.fixture
def float32_on_gpu(monkeypatch):
    """What is float32 is multiplied in float32 on a GPU, not in TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Golden:
    """One fixture file: its arrays as tensors, its configuration, and the model it describes."""

    def __init__(self, name: str) -> None:
        self.config = INDEX[name]["config"]
        self.arrays = {key: torch.from_numpy(value) for key, value in np.load(DATA / name).items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        prefix = "weights."
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def far(self) -> FAR:
        """The fixture's FAR or FARLong in eval mode, class dropout off."""
        model = (FARLong if "context_patch_size" in self.config else FAR)(**self.config)
        model.load_state_dict(self.weights, strict=True)
        for module in model.modules():
            if hasattr(module, "embedding_table"):
                module.dropout = 0.0
        return model.eval()


def cached_velocity(model, context, noisy, time, context_conditions=None, frame_conditions=None, lengths=None) -> torch.Tensor:
    """Velocity of one noisy frame per row after context frames that are encoded first."""
    k = context.shape[1]
    num_tokens = sum(model.token_counts(k, noisy))
    memory = model.new_memory(len(noisy), num_tokens + model.tokens_per_frame(noisy), noisy)
    if k:
        memory[:, :, :, :num_tokens] = model.encode_context(context, **(context_conditions or {}))
    modulations = model.modulate(time, **(frame_conditions or {}), dtype=noisy.dtype)
    return model.denoise(noisy, modulations, model.next_frame(memory, noisy, lengths or [k] * len(noisy)))


@pytest.fixture(scope="session")
def golden():
    return Golden


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Seeded normal parameters: a fresh FAR is zero by construction and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def tiny_host_folder(tmp_path_factory) -> Path:
    transformer, autoencoder = FAR(**TINY_FAR), Autoencoder(**TINY_DCAE, scaling_factor=0.8)
    randomise(transformer, 1)
    randomise(autoencoder, 2)
    folder = tmp_path_factory.mktemp("tiny_host")
    configs = {"transformer": TINY_FAR, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(folder, transformer, autoencoder, configs, frame_size=64, num_steps=3)
    return folder


@pytest.fixture(scope="session")
def tiny_host(tiny_host_folder):
    return load_host(tiny_host_folder, "cpu")


TINY_FAR_LONG = {
    **TINY_FAR,
    "short_term_ctx_winsize": 6,
    "context_patch_size": 4,
    "condition_cfg": {"type": "action", "num_action_classes": 3},
}


@pytest.fixture(scope="session")
def tiny_long_host(tiny_host) -> FARHost:
    """The tiny host with a FAR-Long whose window is six frames."""
    transformer = FARLong(**TINY_FAR_LONG)
    randomise(transformer, 3)
    return replace(tiny_host, name="tiny_long", transformer=transformer.eval().requires_grad_(False))


@pytest.fixture(scope="session")
def tiny_action_host(tiny_host) -> FARHost:
    """The tiny host with a FAR that takes three actions."""
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "action", "num_action_classes": 3})
    randomise(transformer, 4)
    return replace(tiny_host, name="tiny_action", transformer=transformer.eval().requires_grad_(False))


@pytest.fixture(scope="session")
def tiny_hosts(tiny_host, tiny_action_host, tiny_long_host) -> dict[str, FARHost]:
    """One host of every kind."""
    return {"plain": tiny_host, "actions": tiny_action_host, "long": tiny_long_host}


@pytest.fixture(scope="session")
def tiny_long_workload(tiny_long_host) -> Workload:
    """The pan world on the tiny long host: 5 + 11 frames, 3 ODE steps."""
    return Workload("tiny_long_pan", WORLDS["pan"], tiny_long_host, num_context=5, num_predict=11, num_steps=3)


@pytest.fixture(scope="session")
def tiny_workload(tiny_host) -> Workload:
    """The pan world on the tiny host: 5 + 11 frames, 3 ODE steps."""
    return Workload("tiny_pan", WORLDS["pan"], tiny_host, num_context=5, num_predict=11, num_steps=3)


@pytest.fixture
def small_released(monkeypatch):
    """The benchmark's hosts under their names, but tiny."""
    for transformer, config in (("far_b_ucf101", TINY_FAR), ("far_b_long_dmlab", TINY_FAR_LONG)):
        released = replace(RELEASED[transformer], config=config)
        monkeypatch.setitem(RELEASED, transformer, released)
        autoencoder = replace(RELEASED[released.autoencoder], config={**TINY_DCAE, "scaling_factor": 0.8})
        monkeypatch.setitem(RELEASED, released.autoencoder, autoencoder)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of real sample clips, which are not part of the repository."""
    places = [os.environ.get("FAR_ENV_SAMPLES"), Path(__file__).parents[2] / "shared" / "samples"]
    for place in places:
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no sample clips: set FAR_ENV_SAMPLES to a folder that holds them")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub on the loopback address, with nothing in it; no token is in use, and the cache is empty."""
    from huggingface_hub import constants, file_download

    from far_env import hub as far_hub
    from tests.loopback_hub import serve

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FAR_ENV_DATA_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAR_ENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the loopback hub speaks plain HTTP
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    far_hub.snapshot.cache_clear()
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # huggingface_hub reads the variable once, when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield server
    far_hub.snapshot.cache_clear()


@pytest.fixture
def random_alexnet(monkeypatch, tmp_path):
    """An AlexNet with random weights, which LPIPS finds in the place of ImageNet's."""
    from torchvision.models import alexnet

    from far_env.perceptual import alexnet_path, perceptual_network

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    torch.manual_seed(0)
    model = alexnet(weights=None)
    alexnet_path().parent.mkdir(parents=True)
    torch.save(model.state_dict(), alexnet_path())
    yield model
    perceptual_network.cache_clear()


def repeated_in_place(compute):
    """Repeats a pass as a CUDA graph does, see `far_env.host.cuda_graphs.Capture`: into one output, whatever it held."""
    output = compute()

    def repeat() -> torch.Tensor:
        output.copy_(compute())
        return output

    return repeat
