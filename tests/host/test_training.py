"""Training the host: FAR's training loss, the histories, and stopping and resuming."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from far_env.config import load_yaml
from far_env.errors import TrainingStopped
from far_env.evaluation.host_training import train_host
from far_env.host import precision
from far_env.host.far import FAR
from far_env.host.far_long import FARLong, initialise_from
from far_env.host.training import autoencoder as ta
from far_env.host.training import histories, loop
from far_env.host.training import transformer as tt
from far_env.host.training.config import AutoencoderTraining, HostTraining, TransformerTraining
from far_env.host.training.histories import Batch
from far_env.host.training.loop import run_steps, step_generator
from far_env.host.training.objectives import add_noise, far_noise, velocity_loss
from far_env.host.weights import load_host, save_host
from far_env.provenance import load_facts
from far_env.tensor_files import load_tensors
from tests.conftest import TINY_DCAE, TINY_FAR, randomise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", ["train_loss_far.npz", "train_loss_far_long.npz"])
def test_fars_training_loss_and_gradients_equal_the_published_ones(golden, case):
    fixture = golden(case)
    model = fixture.far().train()
    latents = fixture["in.latents_raw"] * fixture["in.scaling_factor"]
    clean = fixture["in.context_mask"].bool()
    inputs = far_noise(
        model,
        latents,
        fixture["in.noise"],
        fixture["in.u"].reshape(2, -1),
        clean,
        fixture.arrays.get("in.action"),
    )
    for name, value in (("timesteps", inputs.times), ("noisy_latents", inputs.latents)):
        torch.testing.assert_close(value, fixture[f"mid.{name}"], rtol=0, atol=1e-6)
    window = slice(-model.short_term_ctx_winsize, None)
    torch.testing.assert_close(inputs.velocities, fixture["mid.target"][:, window], rtol=0, atol=1e-6)
    if inputs.classes is not None:
        model.class_embedder.dropout = 0.0
    loss = velocity_loss(model, inputs)
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], fixture["out.loss"], rtol=1e-5, atol=0)
    norms = {}
    for name, parameter in model.named_parameters():
        norms[name] = parameter.grad.norm()
        torch.testing.assert_close(norms[name][None], fixture[f"out.grad_l2.{name}"], rtol=1e-4, atol=1e-7)
        if f"out.grad.{name}" in fixture:
            torch.testing.assert_close(parameter.grad, fixture[f"out.grad.{name}"], rtol=0, atol=1e-5)
    total = torch.stack(list(norms.values())).norm()
    torch.testing.assert_close(total[None], fixture["out.grad_norm"], rtol=1e-4, atol=0)


def test_histories_are_older_frames_in_order_and_a_contiguous_tail():
    rng = np.random.default_rng(0)
    older_drawn, ends = set(), set()
    for _ in range(2000):
        older, tail = int(rng.integers(0, 7)), int(rng.integers(2, 7))
        frames = histories.draw_frames(rng, 16, older, tail)
        assert len(frames) == older + tail and (np.diff(frames) > 0).all() and frames[0] >= 0 and frames[-1] < 16
        assert (np.diff(frames[older:]) == 1).all()
        older_drawn |= set(frames[:older].tolist())
        ends.add(int(frames[-1]))
    assert {0, 7, 13} <= older_drawn and {4, 15} <= ends


@torch.no_grad()
def test_the_one_pass_loss_equals_predicting_each_frame_from_its_history():
    torch.manual_seed(0)
    model = FAR(**TINY_FAR)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    config = TransformerTraining(noisy_copies=2, context_noise=0.0)
    frames, predicted = torch.randn(3, 5, 4, 8, 8), torch.tensor([2, 3, 4])
    calls = []

    class Recorder:
        def velocity(self, latents, times, positions, visible):
            calls.append((latents, times, positions))
            return model.velocity(latents, times, positions, visible)

    inputs = add_noise(model, Batch(frames, predicted), config, step_generator(0, 1))
    loss = velocity_loss(Recorder(), inputs)
    ((latents, times, positions),) = calls
    torch.testing.assert_close(latents[:, :4], frames[:, :4])
    assert positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 3, 4]
    errors = []
    for index in range(4, 10):
        k = int(positions[index])
        sequence = torch.cat([frames[:, :k], latents[:, index : index + 1]], dim=1)
        velocity = model(sequence, torch.cat([torch.full((3, k), -1.0), times[:, index : index + 1]], dim=1))[:, -1]
        sigma = (times[:, index] / 1000)[:, None, None, None]
        # noisy = sigma·noise + (1 − sigma)·clean, so noise − clean = (noisy − clean) / sigma
        target = (latents[:, index] - frames[:, k]) / sigma
        errors.append((velocity - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_one_pass_loss_of_a_long_history_equals_predicting_its_last_frame_with_a_coarse_past():
    torch.manual_seed(0)
    model = FARLong(**{**TINY_FAR, "short_term_ctx_winsize": 4, "context_patch_size": 4})
    randomise(model, 5)
    config = TransformerTraining(noisy_copies=1, context_noise=0.0)
    frames = torch.randn(2, 7, 4, 8, 8)
    captured = {}
    velocity = model.velocity

    def recorder(latents, times, *arguments, **options):
        captured.update(latents=latents, times=times, **options)
        return velocity(latents, times, *arguments, **options)

    model.velocity = recorder
    loss = velocity_loss(model, add_noise(model, Batch(frames, torch.tensor([6])), config, step_generator(0, 1)))
    del model.velocity
    assert captured["num_coarse"] == 3, "of seven frames, a window of four leaves three coarse"
    alone = model(captured["latents"], captured["times"])[:, -1]
    sigma = (captured["times"][:, -1] / 1000)[:, None, None, None]
    target = (captured["latents"][:, -1] - frames[:, -1]) / sigma
    torch.testing.assert_close(loss, (alone - target).square().mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["action", "label"])
def test_the_one_pass_loss_gives_every_frame_its_own_class(kind):
    classes = {"action": {"num_action_classes": 5}, "label": {"num_classes": 5}}[kind]
    model = FAR(**TINY_FAR, condition_cfg={"type": kind, **classes})
    randomise(model, 6)
    model.eval()
    given = torch.tensor([[0, 3, 1, 4, 2], [2, 2, 0, 1, 3]]) if kind == "action" else torch.tensor([4, 1])
    batch = Batch(torch.randn(2, 5, 4, 8, 8), torch.tensor([2, 4]), given)
    config = TransformerTraining(noisy_copies=1, context_noise=0.0, class_dropout=0.0)
    inputs = add_noise(model, batch, config, step_generator(0, 1))
    errors = []
    for index, k in enumerate((2, 4)):
        times = torch.cat([torch.full((2, k), -1.0), inputs.times[:, 4 + index : 5 + index]], dim=1)
        sequence = torch.cat([batch.frames[:, :k], inputs.latents[:, 4 + index : 5 + index]], dim=1)
        condition = {"action": given[:, : k + 1]} if kind == "action" else {"label": given}
        errors.append((model(sequence, times, **condition)[:, -1] - inputs.velocities[:, index]).square().mean())
    torch.testing.assert_close(velocity_loss(model, inputs), torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)
    dropped = add_noise(model, batch, TransformerTraining(class_dropout=0.999999), step_generator(0, 1)).classes
    assert (dropped == 5).all(), "the null class"


def test_a_long_transformer_is_initialised_from_a_short_one():
    short, long = FAR(**TINY_FAR), FARLong(**TINY_FAR, context_patch_size=4)
    randomise(short, 1)
    initialise_from(long, short)
    latents, times = torch.randn(1, 3, 4, 8, 8), torch.tensor([[-1.0, -1.0, 500.0]])
    torch.testing.assert_close(long(latents, times), short(latents, times))
    block, origin = long.transformer_blocks[0].attn, short.transformer_blocks[0].attn
    assert torch.equal(block.add_k_proj.weight, origin.to_k.weight) and torch.equal(
        block.to_add_out.bias, origin.to_out[0].bias
    )
    with pytest.raises(ValueError, match=r"x_embedder.weight has shape \(32, 16\), in the transformer to start from"):
        initialise_from(long, FAR(**{**TINY_FAR, "in_channels": 8, "out_channels": 8}))


class Counter:
    """A stateful thing whose value depends on every step and its randomness."""

    def __init__(self):
        self.value = torch.zeros(())

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def step(self, step):
        self.value = 0.5 * self.value + torch.randn((), generator=step_generator(7, step))
        return {"value": self.value.item()}


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    whole, interrupted, resumed = Counter(), Counter(), Counter()
    (tmp_path / "whole").mkdir()
    run_steps("stage", tmp_path / "whole", 9, {"counter": whole}, whole.step)

    def stop_at_five(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return interrupted.step(step)

    with pytest.raises(TrainingStopped, match="stage stopped at step 6 of 9; run the same command to resume"):
        run_steps("stage", tmp_path, 9, {"counter": interrupted}, stop_at_five)
    run_steps("stage", tmp_path, 9, {"counter": resumed}, resumed.step)
    assert resumed.value == whole.value
    assert load_tensors(tmp_path / "stage.ckpt")["step"] == 9
    assert list((tmp_path / "tensorboard" / "stage").glob("events*"))


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "stage.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"stage\.ckpt cannot be read .*; delete it"):
        run_steps("stage", tmp_path, 9, {}, lambda step: {})


@pytest.fixture
def tiny_training(tmp_path) -> HostTraining:
    shipped = load_yaml(HostTraining, ROOT / "configs" / "host_embedded.yaml")
    return dataclasses.replace(
        shipped,
        run_dir=str(tmp_path / "run"),
        output_dir=str(tmp_path / "host"),
        device="cpu",
        precision="float32",
        quality_clips=2,
        autoencoder=dataclasses.replace(shipped.autoencoder, model=TINY_DCAE, steps=3, batch_size=8, warmup=1),
        transformer=dataclasses.replace(
            shipped.transformer, model=TINY_FAR, steps=6, clips_per_world=4, batch_size=4, warmup=1
        ),
    )


def test_train_host_leaves_a_host_with_a_card(tiny_training, tmp_path):
    host = train_host(tiny_training)
    assert host.num_steps == 4 and host.latent_shape == (4, 8, 8)
    assert load_host(tmp_path / "host", "cpu").weights_hash == host.weights_hash
    card = (tmp_path / "host" / "README.md").read_text()
    assert host.weights_hash in card and "| pan |" in card and "| cuts |" in card
    assert host.transformer.proj_out.weight.abs().max() > 0, "something was learned"
    again = train_host(tiny_training)
    assert again.weights_hash == host.weights_hash, "a finished run is not trained again"
    other = dataclasses.replace(tiny_training, seed=1)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_host(other)


def test_a_host_whose_training_was_resumed_has_the_same_weights(tiny_training, tmp_path, monkeypatch):
    whole = dataclasses.replace(tiny_training, quality_clips=0, checkpoint_every=100)
    expected = train_host(whole).weights_hash
    for module, stage in ((ta, "train_autoencoder"), (tt, "train_transformer")):
        config = dataclasses.replace(whole, run_dir=str(tmp_path / stage), output_dir=str(tmp_path / stage / "host"))
        original = module.set_learning_rate
        calls = []

        def stop_at_the_second_step(optimizer, factor, original=original, calls=calls):
            calls.append(factor)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            original(optimizer, factor)

        monkeypatch.setattr(module, "set_learning_rate", stop_at_the_second_step)
        with pytest.raises(TrainingStopped):
            train_host(config)
        assert train_host(config).weights_hash == expected
        monkeypatch.setattr(module, "set_learning_rate", original)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"num_layer": 5}, "transformer: model: unknown key 'num_layer'; did you mean 'num_layers'"),
        ("transformer", {"axes_dims_rope": [4, 4, 4]}, "transformer: model: these settings do not fit: axes_dims_rope"),
        ("transformer", {"in_channels": 8}, "in_channels must equal the autoencoder's latent_channels 4"),
        ("autoencoder", {"latent_chanels": 8}, "did you mean 'latent_channels'"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_training(tiny_training, tmp_path, part, change, message):
    stage = getattr(tiny_training, part)
    config = dataclasses.replace(tiny_training, **{part: dataclasses.replace(stage, model={**stage.model, **change})})
    with pytest.raises(ValueError, match=message):
        train_host(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (HostTraining, {"checkpoint_every": 0}, "checkpoint_every must be above 0, got 0"),
        (TransformerTraining, {"contiguous_every": 0}, "contiguous_every must be above 0"),
        (TransformerTraining, {"max_tail": 1}, "max_tail must be at least 2"),
        (AutoencoderTraining, {"batch_size": 30}, "must be a multiple of frames_per_clip"),
    ],
)
def test_numbers_out_of_range_are_named(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_the_same_seed_trains_the_same_host(tiny_training, tmp_path):
    hashes = []
    for name in ("a", "b"):
        config = dataclasses.replace(
            tiny_training, run_dir=str(tmp_path / name), output_dir=str(tmp_path / name / "host"), quality_clips=0
        )
        hashes.append(train_host(config).weights_hash)
    assert hashes[0] == hashes[1]
    config = json.loads((tmp_path / "a" / "host" / "config.json").read_text())
    assert config["transformer"] == TINY_FAR and config["num_steps"] == 4


def test_a_host_may_share_the_autoencoder_of_a_shipped_one(tiny_host, tmp_path):
    shipped = load_host("embedded", "cpu")
    transformer = FAR(**{**TINY_FAR, "in_channels": 16, "out_channels": 16})
    configs = {
        "autoencoder": shipped.autoencoder.settings,
        "transformer": {**TINY_FAR, "in_channels": 16, "out_channels": 16},
    }
    options = {"frame_size": 64, "num_steps": 4, "autoencoder_of": "embedded"}
    save_host(tmp_path / "host", transformer, shipped.autoencoder, configs, **options)
    assert {path.name for path in (tmp_path / "host").iterdir()} == {"config.json", "transformer.safetensors"}
    loaded = load_host(tmp_path / "host", "cpu")
    frames = torch.rand(1, 2, 3, 64, 64)
    assert torch.equal(loaded.autoencoder.encode(frames), shipped.autoencoder.encode(frames))
    with pytest.raises(ValueError, match="is not that of the host embedded"):
        save_host(tmp_path / "other", transformer, tiny_host.autoencoder, configs, **options)


def test_tensorboard_shows_every_step_of_both_stages_once_after_a_resume_with_the_clock_set_back(
    tiny_training, tmp_path, monkeypatch
):
    config = dataclasses.replace(tiny_training, quality_clips=0, checkpoint_every=2)
    original, now = loop.save_tensors, time.time

    def save_then_stop(path, content):
        original(path, content)
        if path.name == "transformer.ckpt" and content["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_tensors", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train_host(config)
    monkeypatch.setattr(loop, "save_tensors", original)
    monkeypatch.setattr(time, "time", lambda: now() - 1e6)
    train_host(config)
    steps = {}
    for stage in ("autoencoder", "transformer"):
        events = EventAccumulator(str(Path(config.run_dir) / "tensorboard" / stage)).Reload()
        for tag in events.Tags()["scalars"]:
            steps.setdefault(stage, []).extend(event.step for event in events.Scalars(tag))
    assert set(steps["autoencoder"]) == {config.autoencoder.steps}, "logged at the last step"
    assert sorted(steps["transformer"]) == list(range(1, config.transformer.steps + 1))


def test_a_resumed_training_keeps_the_precision_that_its_first_session_measured(tiny_training, monkeypatch):
    config = dataclasses.replace(tiny_training, precision="auto", quality_clips=0)
    for bfloat16_seconds in (0.1, 1.0):
        seconds = {(torch.float32, True): 1.0, (torch.bfloat16, True): bfloat16_seconds}
        monkeypatch.setattr(precision, "_layer_seconds", lambda *key, seconds=seconds: seconds[key])
        train_host(config)
    assert [session["dtype"] for session in load_facts(Path(config.run_dir))] == ["bfloat16", "bfloat16"]
