"""Damaged weights, policies and checkpoints are loaded correctly or refused in one sentence; nothing in them is executed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from far_env.errors import WeightsError
from far_env.host import zoo
from far_env.host.far_host import FARHost
from far_env.host.weights import load_host
from far_env.tensor_files import file_hash, load_tensors, load_weights, save_tensors, save_weights
from tests.conftest import TINY_FAR
from tests.damage import assert_sentence, damaged, write_code

POLICY = Path(__file__).parents[2] / "agents" / "pretrained" / "general" / "policy.safetensors"


class Holder(nn.Module):
    """Any state dict as a module."""

    def __init__(self, state):
        super().__init__()
        self.state = dict(state)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def count_refusals(path, content, load, expected, seeds=range(100)):
    """Damage ``content`` once per seed; each must be refused or be loaded as ``expected``. Returns how many were refused."""
    refused = 0
    for seed in seeds:
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        try:
            loaded = load(path)
        except ValueError as error:
            assert_sentence(error, path)
            refused += 1
        else:
            assert equal(loaded, expected), f"seed {seed}: loaded with other values"
    return refused


@pytest.fixture(scope="module", params=["policy", "transformer"])
def state(request, tiny_host):
    return load_file(POLICY) if request.param == "policy" else dict(tiny_host.transformer.state_dict())


def test_a_hundred_damaged_weight_files(state, tmp_path):
    path = tmp_path / "policy.safetensors"
    save_weights(state, path)
    content = path.read_bytes()
    assert equal(load_weights(Holder(state), path).state, state)
    assert count_refusals(path, content, lambda path: load_weights(Holder(state), path).state, state) > 90


def test_weight_files_without_a_checksum_are_refused_unless_they_fit(state, tmp_path):
    """As the files of other programs and of earlier versions: wrong values that are numbers cannot be noticed."""
    path = tmp_path / "policy.safetensors"
    save_file(state, path)
    content = path.read_bytes()
    for seed in range(100):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        try:
            loaded = load_weights(Holder(state), path).state
        except WeightsError as error:
            assert_sentence(error, path)
        else:
            assert {key: value.shape for key, value in loaded.items()} == {key: value.shape for key, value in state.items()}
            assert all(value.isfinite().all() for value in loaded.values())


def test_a_hundred_damaged_checkpoints(tmp_path):
    path = tmp_path / "stage.ckpt"
    model = nn.Linear(20, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(20)).sum().backward()
    optimizer.step()
    content = {"step": 3, "seconds": 1.5, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_tensors(path, content)
    good = load_tensors(path)

    def flat(saved):
        moments = {
            f"{index}.{key}": value for index, part in saved["optimizer"]["state"].items() for key, value in part.items()
        }
        return {**saved["model"], **moments, "step": torch.tensor(saved["step"]), "seconds": torch.tensor(saved["seconds"])}

    assert count_refusals(path, path.read_bytes(), lambda path: flat(load_tensors(path)), flat(good)) > 80


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_files_with_code_are_refused_and_nothing_is_executed(tmp_path, kind, tiny_host, monkeypatch):
    executed = tmp_path / "executed"
    for name, load in (("a.ckpt", load_tensors), ("a.safetensors", lambda path: load_weights(Holder({}), path))):
        write_code(tmp_path / name, executed, kind)
        with pytest.raises(ValueError) as error:
            load(tmp_path / name)
        assert_sentence(error.value, tmp_path / name)
    monkeypatch.setenv("FAR_WEIGHTS_DIR", str(tmp_path))
    name = f"far-{file_hash(tmp_path / 'a.ckpt')[:8]}.pth"
    shutil.copy(tmp_path / "a.ckpt", tmp_path / name)
    monkeypatch.setitem(zoo.RELEASED, "far_b_ucf101", replace(zoo.RELEASED["far_b_ucf101"], file=name, config=TINY_FAR))
    with pytest.raises(WeightsError) as error:
        zoo.load_released("far_b_ucf101")
    assert_sentence(error.value, tmp_path / name)
    assert not executed.exists()


def test_a_hundred_damaged_hosts(tiny_host_folder, tmp_path):
    """Damage to weights is always detected; damage to config.json may change values without making them invalid."""
    folder = tmp_path / "host"
    shutil.copytree(tiny_host_folder, folder)
    names = ["config.json", "transformer.safetensors", "autoencoder.safetensors"]
    for seed in range(100):
        path = folder / names[seed % 3]
        content = path.read_bytes()
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        changed = path.read_bytes() != content
        try:
            host = load_host(folder, "cpu")
        except WeightsError as error:
            assert_sentence(error, folder)
        else:
            assert isinstance(host, FARHost) and (path.name == "config.json" or not changed)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("latent_shape", ["4", None, [4, 8], [4, 8, "8"], [0, 8, 8], [4.0, 8, 8], [4, 16, 16], {}, True]),
        ("frame_size", [None, "64", 0, -64, 64.0, [64], True, 128]),
        ("num_steps", [None, "3", 0, -1, 2.5, [], False]),
        ("sha256", [None, [], "abc", {"transformer": 7}, {"transformer": "ab"}]),
        ("transformer", [None, [], "FAR", {"num_layers": "two"}, {"num_layer": 2}, {"axes_dims_rope": 7}, {"patch_size": 0}]),
        ("autoencoder", [None, 3, {"latent_channels": "four"}, {"encoder_block_types": []}, {"attention_head_dim": 0}]),
        ("autoencoder_of", [7, ["embedded"], "nobody", {}]),
    ],
)
def test_a_wrong_value_in_a_hosts_configuration_is_refused(tiny_host_folder, tmp_path, key, values):
    folder = tmp_path / "host"
    shutil.copytree(tiny_host_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for value in values:
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(WeightsError) as error:
            load_host(folder, "cpu")
        assert_sentence(error.value, folder)


def test_a_configuration_that_is_no_text_or_nested_without_end_is_refused(tiny_host_folder, tmp_path):
    folder = tmp_path / "host"
    shutil.copytree(tiny_host_folder, folder)
    for content in (b"\xff\xfe{", b"[" * 100_000, b"", b"null", b"[]", b"{}"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(WeightsError) as error:
            load_host(folder, "cpu")
        assert_sentence(error.value, folder)
