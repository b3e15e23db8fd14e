"""The released models: what they are, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from far_env import cli
from far_env.clips.worlds import WORLDS
from far_env.errors import WeightsError
from far_env.host import zoo
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.weights import load_host
from far_env.hub import CONNECTION_SECONDS
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.tensor_files import file_hash
from far_env.workload import Workload
from tests.conftest import DATA, TINY_DCAE, TINY_FAR, randomise

MANIFESTS = {
    "far_b_ucf101": "FAR_B",
    "far_b_bair": "FAR_B",
    "far_b_long_dmlab": "FAR_B_Long_action4",
    "far_m_long_minecraft": "FAR_M_Long_action4",
    "far_l_ucf101_128": "FAR_L",
    "far_l_ucf101_128_label": "FAR_L_label101",
    "far_l_ucf101_256": "FAR_L",
    "far_l_ucf101_256_label": "FAR_L_label101",
    "far_xl_ucf101_256": "FAR_XL",
    "dcae_ucf101_64": "DCAE_8x",
    "dcae_bair_64": "DCAE_8x",
    "dcae_dmlab_64": "DCAE_8x",
    "dcae_minecraft_128": "DCAE_16x",
    "dcae_ucf101_128": "DCAE_16x",
    "dcae_ucf101_256": "DCAE_32x",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_keys_shapes_and_counts_are_the_published_ones(name):
    manifest = json.loads((DATA / f"manifest_{MANIFESTS[name]}.json").read_text())
    model = zoo.RELEASED[name].build()
    module = model.dcae if isinstance(model, Autoencoder) else model
    expected = {key: tuple(entry["shape"]) for key, entry in manifest["state_dict"].items()}
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in module.parameters()) == manifest["num_parameters"]


def test_sizes_without_a_manifest_follow_from_similar_models():
    labelled, plain = (zoo.RELEASED[f"far_xl_ucf101_256{suffix}"].build() for suffix in ("_label", ""))
    extra = set(labelled.state_dict()) - set(plain.state_dict())
    assert extra == {"label_embedder.embedding_table.weight"}
    assert labelled.state_dict()[extra.pop()].shape == (102, 18 * 64)
    assert zoo.RELEASED["far_b_bair"].build().short_term_ctx_winsize == 30


def test_every_transformer_has_an_autoencoder_of_its_size_and_data():
    for released in zoo.RELEASED.values():
        if released.autoencoder is not None:
            autoencoder = zoo.RELEASED[released.autoencoder]
            assert (autoencoder.data, autoencoder.frame_size) == (released.data, released.frame_size)
            assert released.frame_size // autoencoder.build().compression == 8
        assert len(released.hash_prefix) == 8 and int(released.hash_prefix, 16) >= 0


def test_the_listed_sizes_are_those_of_the_models():
    for released in zoo.RELEASED.values():
        count = sum(parameter.numel() for parameter in released.build().parameters())
        assert released.million_parameters == round(count / 1e6, 1)


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A tiny transformer and autoencoder, released under names that hold their true hashes."""
    monkeypatch.setenv("FAR_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    entries = {}
    dcae = {**TINY_DCAE, "scaling_factor": 0.8}
    for name, kind, config in (("small_dcae", Autoencoder, dcae), ("small_far", FAR, TINY_FAR)):
        model = kind(**config)
        randomise(model, 1)
        state = (model.dcae if kind is Autoencoder else model).state_dict()
        torch.save(state, tmp_path / "new.pth")
        file = f"{name}-{file_hash(tmp_path / 'new.pth')[:8]}.pth"
        (tmp_path / "new.pth").rename(tmp_path / file)
        entries[name] = zoo.Released(file, "nothing", 64, config, 0.0, kind.__name__, "small_dcae" if kind is FAR else None)
    monkeypatch.setattr(zoo, "RELEASED", entries)
    monkeypatch.setattr("far_env.host.weights.RELEASED", entries)
    return entries


def rewritten(entries, name, content) -> str:
    """Replace a released file by other content under a name with its true hash; returns the new path."""
    folder = zoo.weights_dir()
    torch.save(content, folder / "new.pth")
    file = f"{name}-{file_hash(folder / 'new.pth')[:8]}.pth"
    (folder / "new.pth").rename(folder / file)
    entries[name] = replace(entries[name], file=file)
    return file


def test_a_released_model_is_a_host_by_name(small_zoo):
    host = load_host("small_far", "cpu")
    assert (host.name, host.latent_shape, host.num_steps) == ("small_far", (4, 8, 8), 20)
    assert host.weights_hash == small_zoo["small_far"].hash_prefix
    workload = Workload("pan", WORLDS["pan"], host, num_context=5, num_predict=2, num_steps=2)
    clip = workload.clips.clip("test", 0)
    batch, _ = play(workload, [clip], [1], None, 9999)
    expected = reference_rollout(workload, clip, None, 9999, 1)
    torch.testing.assert_close(batch.generated([0])[0], expected.latents, atol=1e-4, rtol=0)
    convolution = next(module for module in host.autoencoder.modules() if isinstance(module, torch.nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(WeightsError, match="is an autoencoder"):
        load_host("small_dcae", "cpu")


def test_a_truncated_or_other_file_is_refused(small_zoo):
    path = small_zoo["small_far"].path
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(WeightsError, match=r"small_far-.*is expected: it is damaged or incomplete"):
        zoo.load_released("small_far")
    path.unlink()
    with pytest.raises(WeightsError, match=r"far-env weights download small_far fetches them, or set FAR_WEIGHTS_DIR"):
        zoo.load_released("small_far")
    with pytest.raises(ValueError, match="did you mean 'small_far'"):
        zoo.load_released("smal_far")


def test_tensors_that_do_not_fit_are_named(small_zoo):
    state = zoo.load_released("small_far").state_dict()
    lacking = {key: value for key, value in state.items() if key != "proj_out.bias"}
    for content, message in (
        (lacking, "lacks the key 'proj_out.bias'"),
        ({**state, "surplus": torch.zeros(1)}, "unexpected key 'surplus'"),
        ({**state, "proj_out.bias": torch.zeros(3)}, r"'proj_out.bias' has shape \(3,\), the configuration needs \(16,\)"),
        ({"state_dict": state}, "no plain state dict of tensors"),
    ):
        rewritten(small_zoo, "small_far", content)
        with pytest.raises(WeightsError, match=message):
            zoo.load_released("small_far")


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_it_is_not_executed(small_zoo, tmp_path):
    rewritten(small_zoo, "small_far", {"x_embedder.weight": Malicious(tmp_path / "executed")})
    with pytest.raises(WeightsError, match="no plain state dict of tensors and is not loaded"):
        zoo.load_released("small_far")
    assert not (tmp_path / "executed").exists()


def test_download_fetches_missing_files_and_keeps_only_correct_ones(small_zoo, hub, monkeypatch):
    released = small_zoo["small_far"]
    good = released.path.read_bytes()
    assert zoo.download("small_far") == released.path and not hub.requests, "it is there already"
    released.path.unlink()
    with pytest.raises(WeightsError, match=r"small_far: guyuchao/FAR_Models is not on .*; or put the file at"):
        zoo.download("small_far")
    hub.add("guyuchao/FAR_Models", {"other.pth": b""})
    with pytest.raises(WeightsError, match=f"small_far: guyuchao/FAR_Models holds no file {released.file}"):
        zoo.download("small_far")
    hub.add("guyuchao/FAR_Models", {released.file: good[:-1]})
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        zoo.download("small_far")
    assert not released.path.exists()
    hub.add("guyuchao/FAR_Models", {released.file: good})
    assert zoo.download("small_far") == released.path and released.path.read_bytes() == good


@pytest.mark.parametrize("reachable", [False, True])
def test_a_download_without_a_network_fails_within_seconds(tmp_path, reachable):
    """The hub refuses the connection, or accepts it and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not reachable:
            server.close()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "FAR_WEIGHTS_DIR": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }
        script = (
            "import time, huggingface_hub\nfrom far_env.host import zoo\nstart = time.monotonic()\n"
            "try:\n    zoo.download('far_b_ucf101')\nexcept zoo.WeightsError as error:\n"
            "    print(time.monotonic() - start, error)"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=100)
    seconds, message = result.stdout.split(" ", 1)
    assert float(seconds) < 4 * CONNECTION_SECONDS, "the hub's client alone takes most of a minute"
    assert message.startswith("far_b_ucf101: guyuchao/FAR_Models cannot be fetched from http://127.0.0.1")


def test_the_command_lists_verifies_and_refuses(small_zoo, capsys):
    assert cli.main(["weights", "list"]) == 0
    listing = capsys.readouterr().out
    assert "small_far" in listing and "yes" in listing and "guyuchao/FAR_Models" in listing
    assert cli.main(["weights", "verify", "small_far"]) == 0
    assert capsys.readouterr().out.count("is complete") == 2, "the autoencoder is checked with its transformer"
    assert cli.main(["weights", "verify"]) == 0
    capsys.readouterr()
    refusals = {
        "needs the names": ["download"],
        "unknown weights 'far_c'": ["verify", "far_c"],
        "unknown weights 'lpipss'; did you mean 'lpips'": ["download", "lpipss"],
    }
    for message, args in refusals.items():
        assert cli.main(["weights", *args]) == 2
        assert message in capsys.readouterr().err
    for released in small_zoo.values():
        released.path.write_bytes(b"")
    assert cli.main(["weights", "verify"]) == 2
    assert capsys.readouterr().err.count("damaged or incomplete") == 2, "every damaged file is named"
    for released in small_zoo.values():
        released.path.unlink()
    assert cli.main(["weights", "verify"]) == 2
    assert "no released weights in" in capsys.readouterr().err
