"""The compressor: its branches, its files, and its training against the transformer's own pass over the same history."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from far_env.config import load_yaml
from far_env.errors import TrainingStopped, WeightsError
from far_env.evaluation.compressor_training import train
from far_env.host.compressor import (
    Compressor,
    block_modulations,
    load_compressor,
    save_compressor,
    shipped_folder,
    small_latents,
)
from far_env.host.far import Modulations
from far_env.host.training import compressor as training
from far_env.host.training.compressor import (
    draw_history,
    draw_lengths,
    history_loss,
    history_velocity,
    taught,
    validation_losses,
)
from far_env.host.training.compressor_clips import encode_clips
from far_env.host.training.compressor_config import CompressorTraining
from far_env.workloads import make_workload
from tests.conftest import randomise
from tests.rollout.test_actions import Steered

TINY = CompressorTraining(
    clips=3, validation_clips=2, batch_size=2, steps=6, block_frames=2, channels=8, max_blocks=3, max_recent=4, predicted=2
)


def random_compressor(host, seed=0, **settings):
    compressor = Compressor.of(host.transformer, **{"block_frames": 2, "channels": 8, **settings})
    randomise(compressor, seed)
    return compressor.eval().requires_grad_(False)


def some_clips(host, folder, count=3):
    actions = host.transformer.condition == "action"
    return encode_clips(Steered(14), "train", count, 14, TINY.block_frames, host, actions, folder)


@pytest.mark.parametrize(("block_frames", "branches"), [(1, "both"), (2, "high"), (4, "both"), (8, "low")])
def test_a_block_becomes_a_quarter_of_a_frames_tokens(tiny_host, block_frames, branches):
    compressor = random_compressor(tiny_host, block_frames=block_frames, branches=branches)
    latents = torch.randn(3, block_frames, *tiny_host.latent_shape)
    tokens = compressor(latents, small_latents(tiny_host.autoencoder, latents))
    assert tokens.shape == (3, 1, 4, 32)
    assert compressor.tokens_covered == 4 * block_frames
    assert compressor.table(latents, tiny_host.transformer).shape == (1, 4, 1, 8)


def test_training_begins_with_the_upper_left_tokens_of_the_last_frame(tiny_host):
    compressor = Compressor.of(tiny_host.transformer, block_frames=2)
    latents = torch.randn(1, 2, *tiny_host.latent_shape)
    patches = [latents[0, 1, :, y : y + 2, x : x + 2].reshape(-1) for y in (0, 4) for x in (0, 4)]
    expected = tiny_host.transformer.x_embedder(torch.stack(patches))
    assert torch.allclose(compressor(latents, small_latents(tiny_host.autoencoder, latents))[0, 0], expected, atol=1e-5)


def test_the_low_resolution_branch_alone_begins_as_the_host_sees_the_small_mean_picture(tiny_host):
    compressor = Compressor.of(tiny_host.transformer, block_frames=2, branches="low")
    latents = torch.randn(1, 2, *tiny_host.latent_shape)
    pictures = tiny_host.autoencoder.decode(latents)[0].mean(dim=0)
    halves = torch.stack([pictures[:, y::2, x::2] for y in range(2) for x in range(2)]).mean(dim=0)
    small = tiny_host.autoencoder.encode(halves[None, None])[0, 0]
    assert torch.allclose(small_latents(tiny_host.autoencoder, latents)[0], small, atol=1e-5)
    embedder = tiny_host.transformer.x_embedder
    patches = [small[:, y : y + 2, x : x + 2].reshape(-1) for y in (0, 2) for x in (0, 2)]
    assert torch.allclose(compressor(latents, small[None])[0, 0], embedder(torch.stack(patches)), atol=1e-5)


def test_the_teacher_is_the_host_with_all_frames(tiny_host, tmp_path):
    batch = draw_history(TINY, some_clips(tiny_host, tmp_path), (0, 1, 2), tiny_host.device)
    compressor = random_compressor(tiny_host)
    learned = taught(tiny_host.transformer, compressor, batch)
    assert history_loss(tiny_host.transformer, compressor, learned, "full") == 0
    assert torch.equal(learned.velocities, history_velocity(tiny_host.transformer, compressor, batch, "full"))
    assert torch.equal(learned.noisy, batch.noisy)


def test_the_modulation_of_a_block_is_the_mean_of_its_frames():
    parts = tuple(torch.randn(2, 6, 1, 5) for _ in range(6))
    blocks = block_modulations(Modulations([parts], parts[:2]), 3)
    assert torch.allclose(blocks.blocks[0][4][:, 1], (parts[4][:, 3] + parts[4][:, 4] + parts[4][:, 5]) / 3, atol=1e-6)
    shared = tuple(torch.randn(1, 1, 1, 5) for _ in range(6))
    assert block_modulations(Modulations([shared], shared), 3).blocks[0] == shared


@pytest.mark.parametrize("kind", ["plain", "actions", "long"])
def test_with_all_frames_in_the_middle_it_is_the_transformers_own_pass(tiny_hosts, kind, tmp_path):
    host = tiny_hosts[kind]
    clips = some_clips(host, tmp_path)
    batch = draw_history(replace(TINY, predicted=1), clips, (0, 1, 5), host.device)
    velocity = history_velocity(host.transformer, random_compressor(host), batch, "full")
    frames = torch.cat([batch.sink, batch.middle, batch.recent, batch.noisy], dim=1)
    times = torch.full(frames.shape[:2], -1.0)
    times[:, -1:] = batch.times
    count = frames.shape[1]
    visible = torch.ones(count, count, dtype=torch.bool).tril()
    conditions = {} if batch.actions is None else {"action": batch.actions}
    expected = host.transformer.velocity(frames, times, torch.arange(count), visible, **conditions)[:, -1:]
    assert torch.allclose(velocity, expected, atol=1e-5)
    with_none = history_velocity(host.transformer, random_compressor(host), batch, "none")
    kept = [*range(batch.sink.shape[1]), *range(count - batch.recent.shape[1] - 1, count)]
    conditions = {name: value[:, kept] for name, value in conditions.items()}
    positions = torch.arange(len(kept))
    expected = host.transformer.velocity(frames[:, kept], times[:, kept], positions, visible[kept][:, kept], **conditions)
    assert torch.allclose(with_none, expected[:, -1:], atol=1e-5)


def test_each_predicted_frame_follows_its_true_predecessor_and_sees_no_later_one(tiny_host, tmp_path):
    clips = some_clips(tiny_host, tmp_path)
    batch = draw_history(replace(TINY, min_recent=4), clips, (0, 1, 3), tiny_host.device)
    assert batch.noisy.shape[1] == 2 and batch.recent.shape[1] == 4
    compressor = random_compressor(tiny_host)
    both = history_velocity(tiny_host.transformer, compressor, batch)
    first = replace(batch, recent=batch.recent[:, :3], noisy=batch.noisy[:, :1], times=batch.times[:, :1])
    assert torch.allclose(both[:, :1], history_velocity(tiny_host.transformer, compressor, first), atol=1e-5)
    last = replace(batch, noisy=batch.noisy[:, 1:], times=batch.times[:, 1:])
    assert torch.allclose(both[:, 1:], history_velocity(tiny_host.transformer, compressor, last), atol=1e-5)


def test_histories_depend_on_the_key_alone_and_hold_consecutive_true_frames(tiny_host, tmp_path):
    clips = some_clips(tiny_host, tmp_path)
    config = replace(TINY, context_noise=0.0, pure_noise_share=1.0)
    batch, again = (draw_history(config, clips, (7, 1, 4), tiny_host.device) for _ in range(2))
    assert torch.equal(batch.noisy, again.noisy) and torch.equal(batch.recent, again.recent)
    target = batch.noisy - batch.velocities  # with pure noise, noise − (noise − clean)
    for row in range(2):
        window = torch.cat([batch.middle[row], batch.recent[row], target[row, -1:]])
        same = [(clip, start) for clip in range(3) for start in range(14) if _starts(clips.latents[clip], start, window)]
        assert len(same) == 1
        (clip, start), length = same[0], config.block_frames
        blocks = [clips.small[clip, start + length * i].float() for i in range(batch.small.shape[1])]
        assert torch.equal(batch.small[row], torch.stack(blocks))
        assert start >= batch.sink.shape[1]
        assert torch.equal(batch.sink[row], clips.latents[clip, : batch.sink.shape[1]].float())


def _starts(latents, start, window):
    piece = latents[start : start + len(window)].float()
    return len(piece) == len(window) and torch.allclose(piece, window, atol=1e-5)


def test_lengths_fit_into_clips_or_an_error_says_how_long_they_must_be():
    class Generator:
        def integers(self, bound):
            return bound - 1

    assert draw_lengths(CompressorTraining(), Generator(), 32) == (2, 6, 5)  # 2 + 6 · 4 + 5 + 1
    assert draw_lengths(CompressorTraining(), Generator(), 72) == (2, 8, 10)
    with pytest.raises(ValueError, match="clips of 6 frames are too short for a block and the newest frames; 7 are needed"):
        draw_lengths(CompressorTraining(), Generator(), 6)


def test_training_lowers_the_loss_and_changes_the_compressor_alone(tiny_host, tmp_path):
    clips = some_clips(tiny_host, tmp_path)
    config = replace(TINY, steps=40, learning_rate=3e-3, warmup=5, validate_every=0, teacher=False)
    before = {key: value.clone() for key, value in tiny_host.transformer.state_dict().items()}
    start = Compressor.of(tiny_host.transformer, block_frames=2, channels=8)
    untrained = validation_losses(config, tiny_host, start, clips)["compressed"]
    both = {"train": clips, "validation": clips}
    compressor = training.train_compressor(config, tiny_host, both, tmp_path / "run", torch.float32)
    assert validation_losses(config, tiny_host, compressor, clips)["compressed"] < untrained
    assert all(torch.equal(before[key], value) for key, value in tiny_host.transformer.state_dict().items())


def test_the_command_resumes_to_the_same_weights_and_writes_a_card(tiny_host_folder, tmp_path, monkeypatch):
    def config(name):
        run, out = str(tmp_path / name), str(tmp_path / name / "out")
        return replace(
            TINY, workload="pan", host=str(tiny_host_folder), run_dir=run, output_dir=out, device="cpu", precision="float32"
        )

    whole = train(config("whole"))
    step, calls = training.history_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(training, "history_loss", interrupted)
    with pytest.raises(TrainingStopped, match="compressor stopped at step 3 of 6; run the same command to resume"):
        train(config("stopped"))
    monkeypatch.undo()
    resumed = train(config("stopped"))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    card = (tmp_path / "stopped" / "out" / "README.md").read_text(encoding="utf-8")
    assert "6 steps of 2 histories" in card and "| compressed blocks |" in card
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(replace(config("whole"), learning_rate=0.5))


def test_files_are_checked(tiny_host, tiny_long_host, tmp_path):
    compressor = random_compressor(tiny_host)
    save_compressor(tmp_path, compressor, tiny_host)
    loaded = load_compressor(str(tmp_path), tiny_host)
    assert all(torch.equal(value.half().float(), loaded.state_dict()[key]) for key, value in compressor.state_dict().items())
    other = replace(tiny_long_host, weights_hash="01234567")
    with pytest.raises(WeightsError, match=r"was trained for the host .* not for tiny_long with 01234567"):
        load_compressor(str(tmp_path), other)
    with pytest.raises(ValueError, match="no compressor ships for the host"):
        load_compressor("shipped", other)
    with pytest.raises(WeightsError, match="no compressor in"):
        load_compressor(str(tmp_path / "missing"), tiny_host)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "block_frames": 3}))
    with pytest.raises(WeightsError, match="the settings do not fit: block_frames must be one of 1, 2, 4, 8, got 3"):
        load_compressor(str(tmp_path), tiny_host)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "channels"}))
    with pytest.raises(WeightsError, match="must have the keys"):
        load_compressor(str(tmp_path), tiny_host)
    path.write_text(json.dumps(config))
    (tmp_path / "compressor.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError, match=r"config.json expects .*; restore the file"):
        load_compressor(str(tmp_path), tiny_host)


def test_settings_that_cannot_be_are_refused(tiny_host):
    for settings, message in (
        ({"block_frames": 3}, "block_frames must be one of 1, 2, 4, 8, got 3"),
        ({"branches": "hihg"}, "did you mean 'high'"),
    ):
        with pytest.raises(ValueError, match=message):
            Compressor.of(tiny_host.transformer, **settings)
    for settings, message in (
        ({"steps": 0}, "steps must be above 0"),
        ({"min_recent": 5, "max_recent": 4}, "max_recent must be at least min_recent 5, got 4"),
        ({"max_sink": -1}, "max_sink must be 0 or above"),
        ({"pure_noise_share": 2.0}, "pure_noise_share must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CompressorTraining(**settings)
    odd = torch.zeros(1, 2, 4, 6, 8)
    with pytest.raises(ValueError, match="latents of 6×8 cannot be compressed"):
        random_compressor(tiny_host).grid(odd)
    assert F.pad(odd, (0, 0, 0, 2)).shape[-2] == 8 and random_compressor(tiny_host).grid(F.pad(odd, (0, 0, 0, 2))) == (2, 2)


def test_no_compressor_ships_for_a_host_that_has_none(tiny_host):
    with pytest.raises(ValueError, match="train one with far-env train-compressor"):
        shipped_folder(tiny_host)


class LaterClips:
    """The validation clips after those of the shipped compressor's card."""

    def __init__(self, clips) -> None:
        self.clips, self.name = clips, clips.name

    def num_clips(self, split):
        return self.clips.num_clips(split) - 32

    def clip(self, split, number):
        return self.clips.clip(split, number + 32)


def test_blocks_of_the_shipped_compressor_are_worth_more_to_the_host_than_nothing(tmp_path):
    workload = make_workload("maze_retrieval", device="cpu")
    host, folder = workload.host, shipped_folder(workload.host)
    assert folder.name == workload.name
    settings = load_yaml(CompressorTraining, folder / "training.yaml")
    clips = encode_clips(
        LaterClips(workload.clips), "validation", 8, workload.num_frames, settings.block_frames, host, True, tmp_path
    )
    few = replace(settings, validation_clips=8, seed=1)
    losses = validation_losses(few, host, load_compressor("shipped", host), clips)
    assert losses["full"] < losses["compressed"] < losses["none"], losses
