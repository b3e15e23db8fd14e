"""Tensor files: written completely or not at all, with the permissions of any other file, and checked when they are read."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from far_env.errors import WeightsError
from far_env.tensor_files import load_tensors, load_weights, save_tensors, save_weights


@pytest.fixture(params=[0o022, 0o027])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_that_the_umask_gives(tmp_path, umask):
    save_weights({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_tensors(tmp_path / "a.ckpt", {"a": torch.zeros(3)})
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a.safetensors": 0o666 & ~umask,
        "a.ckpt": 0o666 & ~umask,
    }


def test_what_is_written_is_read_back(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
    save_weights(state, tmp_path / "a.safetensors")
    save_tensors(tmp_path / "a.ckpt", state)
    for read in (load_file(tmp_path / "a.safetensors"), load_tensors(tmp_path / "a.ckpt")):
        assert read.keys() == state.keys() and all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize("save", [lambda path: save_weights({"a": torch.ones(9)}, path), lambda path: save_tensors(path, [1])])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, save, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(ValueError, match=r"cannot write .*file: No space left on device"):
        save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*/nowhere/a: No such file or directory"):
        save_tensors(tmp_path / "nowhere" / "a", {})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), "'weight' holds values that are not finite"),
        (torch.tensor([[1.0, -torch.inf]]), "'weight' holds values that are not finite"),
        (torch.tensor([[1.0, 1e300]], dtype=torch.float64), "'weight' holds values that are not finite"),
        (torch.zeros(1, 2, dtype=torch.int32), "'weight' has the type torch.int32, the configuration needs torch.float32"),
        (torch.zeros(2, 1), "'weight' has shape"),
    ],
)
def test_weights_that_no_model_can_use_are_refused(tmp_path, weight, message):
    save_weights({"weight": weight, "bias": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=rf"a\.safetensors: {message}"):
        load_weights(torch.nn.Linear(2, 1), tmp_path / "a.safetensors")


def test_a_checkpoint_that_is_no_dict_is_refused(tmp_path):
    save_tensors(tmp_path / "a.ckpt", [1, 2])
    with pytest.raises(ValueError, match=r"a\.ckpt holds no dict but list; delete it to start this stage again"):
        load_tensors(tmp_path / "a.ckpt")
