"""Two processes train the host that one trains, and the published configurations are those of the released models."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from far_env.config import load_yaml, save_yaml
from far_env.evaluation.host_training import train_host
from far_env.host.far_long import make_transformer
from far_env.host.training.config import HostTraining, Source
from far_env.host.training.processes import Processes
from far_env.host.weights import load_host
from far_env.host.zoo import RELEASED
from tests.conftest import TINY_FAR_LONG
from tests.host.test_training import ROOT
from tests.host.test_training_sources import training

TRANSFORMERS = [name for name, released in RELEASED.items() if released.autoencoder is not None]


def losses(run_dir: Path) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard" / "transformer")).Reload()
    return {event.step: event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_have_the_loss_curve_and_the_weights_of_one(tmp_path):
    sources = (Source("pan", 2.0), Source("orbit", frames=24))
    steps = {
        "steps": 10,
        "batch_size": 8,
        "model": {**TINY_FAR_LONG, "condition_cfg": {"type": "action", "num_action_classes": 5}},
    }
    one = training(tmp_path / "one", *sources, transformer=steps)
    train_host(one)
    two = training(tmp_path / "two", *sources, transformer={**steps, "gradient_accumulation": 2})
    save_yaml(two, tmp_path / "two.yaml")
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "far_env.cli"]
    result = subprocess.run(
        [sys.executable, "-m", *launch, "train-host", "--config", str(tmp_path / "two.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    curve = losses(Path(one.run_dir))
    assert len(curve) == 10 and losses(Path(two.run_dir)) == pytest.approx(curve, abs=1e-4)
    first, second = (flat_weights(config) for config in (one, two))
    # Muon orthogonalises in bfloat16, which enlarges differences in the last bit.
    assert (first - second).norm() < 2e-3 * first.norm()


def flat_weights(config: HostTraining) -> torch.Tensor:
    parameters = load_host(config.output_dir, "cpu").transformer.parameters()
    return torch.cat([parameter.flatten() for parameter in parameters])


def test_the_rows_of_a_batch_are_divided_among_processes_and_parts():
    processes = Processes(torch.device("cpu"))
    processes.count, rows = 3, []
    for index in range(3):
        processes.index = index
        rows += [number for part in processes.rows(12, 2) for number in range(12)[part]]
    assert rows == list(range(12))
    with pytest.raises(ValueError, match="batch_size 12 must be a multiple of 15: 3 processes times gradient_accumulation 5"):
        processes.rows(12, 5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_released_transformer_has_its_published_configuration(name):
    released, config = RELEASED[name], load_yaml(HostTraining, ROOT / "configs" / f"host_{name}.yaml")
    with torch.device("meta"):
        model, expected = make_transformer(config.transformer.model), released.build()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    for attribute in ("slope_scale", "axes_dims_rope", "short_term_ctx_winsize", "condition", "null_class"):
        assert getattr(model, attribute) == getattr(expected, attribute)
    assert (config.autoencoder_from, config.frame_size) == (released.autoencoder, released.frame_size)
    # The recipe of arXiv 2503.19325 and of the published training files.
    training = config.transformer
    assert (training.objective, training.optimizer, training.schedule, training.batch_size) == ("far", "adamw", "constant", 32)
    assert (training.adamw_learning_rate, training.weight_decay, training.ema_decay) == (1e-4, 0.0, 0.9999)
    assert training.clean_context_ratio == training.class_dropout == 0.1
    (source,) = config.sources
    frames = {"far_b_bair": 30, "far_b_long_dmlab": 300, "far_m_long_minecraft": 300}.get(name, 16)
    assert (source.frames, source.interval) == (frames, 3 if "far_l_" in name or "far_xl" in name else 1)
    steps = 200_000 if name in ("far_b_ucf101", "far_b_bair") else 1_000_000 if "long" in name else 400_000
    assert (training.steps, training.warmup) == (steps, 10_000 if "long" in name else 0)


def test_a_published_configuration_trains_when_its_models_are_small(small_released, tmp_path, monkeypatch, tiny_host_folder):
    from tests.clips.test_video import write_video

    for number in range(12):
        write_video(tmp_path / "ucf" / f"class_{number % 3}" / f"v_{number}.avi", 20)
    monkeypatch.setenv("UCF101_DATA_DIR", str(tmp_path / "ucf"))
    published = load_yaml(HostTraining, ROOT / "configs" / "host_far_b_ucf101.yaml")
    small = dataclasses.replace(
        published,
        autoencoder_from=str(tiny_host_folder),
        run_dir=str(tmp_path / "run"),
        output_dir=str(tmp_path / "host"),
        device="cpu",
        precision="float32",
        validation=dataclasses.replace(published.validation, every=2, clips=1, num_steps=1),
        transformer=dataclasses.replace(published.transformer, model=RELEASED["far_b_ucf101"].config, steps=3, batch_size=2),
    )
    host = train_host(small)
    assert host.transformer.proj_out.weight.abs().max() > 0 and losses(tmp_path / "run").keys() >= {1, 2, 3}
