"""Rollouts whose host is conditioned on every frame's action, with and without guidance, and FAR's evaluations."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from far_env.clips.clip import Clip
from far_env.clips.worlds import WORLDS
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.evaluate import evaluate
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.host.sampler import sample_next_frame
from far_env.host.zoo import RELEASED
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.noise import rollout_noise
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from far_env.workloads import WORKLOADS, make_workload
from tests.clips.test_video import write_video
from tests.conftest import TINY_FAR, randomise
from tests.rollout.test_rollout import Identity, Sloppy, specified

ATOL = 1e-4
NUM_CLASSES = 3


class Steered:
    """Clips of frames of a world, repeated where it is too short, with random actions of three classes."""

    name, size = "steered", 64

    def __init__(self, num_frames: int = 16, num_classes: int = NUM_CLASSES):
        self.num_frames, self.num_classes = num_frames, num_classes

    def num_clips(self, split):
        return 8

    def clip(self, split, clip_id):
        frames = WORLDS["pan"].clip(split, clip_id).frames
        frames = np.resize(frames, (self.num_frames, *frames.shape[1:]))
        actions = np.random.default_rng(clip_id).integers(0, self.num_classes, self.num_frames)
        return Clip(clip_id, frames, actions)


@pytest.fixture(scope="session")
def action_hosts(tiny_host, tiny_long_host) -> dict[str, FARHost]:
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "action", "num_action_classes": NUM_CLASSES})
    randomise(transformer, 4)
    short = replace(tiny_host, name="tiny_action", transformer=transformer.eval().requires_grad_(False))
    return {"far": short, "far_long": tiny_long_host}


@pytest.fixture(params=["far", "far_long"])
def make(action_hosts, request):
    """Makes a workload of steered clips: 5 + 11 frames, 3 ODE steps; FAR-Long's window has six frames."""

    def make_steered(guidance=1.0, actions=True, num_context=5, num_predict=11):
        source, host = Steered(num_context + num_predict), action_hosts[request.param]
        return Workload("steered", source, host, num_context, num_predict, num_steps=3, guidance=guidance, actions=actions)

    return make_steered


@pytest.fixture
def clips():
    return [Steered().clip("test", i) for i in range(6)]


@pytest.mark.parametrize("case", ["sampling_far_action.npz", "sampling_far_long.npz"])
@pytest.mark.parametrize(
    ("guidance", "actions", "name"), [(1.0, True, "final_20"), (-1.0, False, "final_20_null"), (1.5, True, "final_20_cfg1.5")]
)
def test_a_frame_equals_the_published_sampler(golden, monkeypatch, case, guidance, actions, name):
    fixture = golden(case)
    monkeypatch.setattr("far_env.rollout.noise.rollout_noise", lambda seed, *_: fixture["in.noise"][seed])
    host = FARHost("fixture", fixture.far(), Identity(), "", (4, 4, 4), 4, 20)
    workload = Workload("fixture", None, host, 5, 1, 20, guidance, actions)
    clips = [Clip(i, fixture["in.context"][i].numpy(), fixture["in.action"][i].numpy()) for i in range(2)]
    batch, _ = play(workload, clips, [0, 1], None, 9999)
    torch.testing.assert_close(batch.generated([0, 1]), fixture[f"out.{name}"], atol=5e-5, rtol=0)
    for row, clip in enumerate(clips):
        slow = reference_rollout(workload, clip, None, 9999, row).latents
        torch.testing.assert_close(slow, fixture[f"out.{name}"][row], atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", ["sampling_far_action.npz", "sampling_far_long.npz"])
def test_a_guided_rollout_equals_the_published_one(golden, monkeypatch, case):
    """Of the published rollout the first frame serves as context; FAR-Long's window of four frames is crossed."""
    fixture = golden(case)
    monkeypatch.setattr("far_env.rollout.noise.rollout_noise", lambda seed, *_: fixture["in.ar_noise"][seed, 1:])
    host = FARHost("fixture", fixture.far(), Identity(), "", (4, 4, 4), 4, 20)
    workload = Workload("fixture", None, host, 1, 11, 8, 1.5, True)
    expected = fixture["out.ar_latents_8steps"]
    clips = [Clip(i, expected[i].numpy(), fixture["in.ar_action"][i].numpy()) for i in range(2)]
    batch, _ = play(workload, clips, [0, 1], None, 9999)
    torch.testing.assert_close(batch.generated([0, 1]), expected[:, 1:], atol=5e-5, rtol=0)


@pytest.mark.parametrize("memo_bytes", [0, 2**24])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_ragged_batch_equals_the_specification_row_by_row(make, clips, guidance, memo_bytes):
    workload, memo = make(guidance), FrameMemo(memo_bytes)
    budgets, seeds = [1, 2, 4, 8, 14, 9999], range(100, 106)
    for _ in range(2 if memo_bytes else 1):
        batch, decisions = play(workload, clips, seeds, Sloppy(), budgets, memo=memo)
    assert memo_bytes == 0 or memo.statistics.hits == 6 * 12
    for row, (clip, seed, budget) in enumerate(zip(clips, seeds, budgets, strict=True)):
        expected = specified(workload, clip, Sloppy(), budget, seed)
        torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=ATOL, rtol=0)
        made = [(d.step, list(d.kept)) for d in decisions[row]]
        assert made == [kept for kept in expected.kept if kept[0] < 10]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_kept_frame_keeps_its_own_action(make, clips, guidance):
    workload, clip = make(guidance), clips[0]
    batch = RolloutBatch(workload, 1)
    batch.begin([0], [clip], [7])
    batch.advance([0])
    batch.retain(0, [0, 2, 5])
    (context,), _ = batch.history([0])
    batch.advance([0])
    noise = rollout_noise(7, 2, workload.host.latent_shape)[1]
    for numbers in ([0, 2, 5, 6], [0, 1, 2, 3]):
        action = torch.from_numpy(clip.actions[numbers])[None]
        options = {"num_steps": 3, "guidance_scale": guidance, "action": action}
        expected = sample_next_frame(workload.host.transformer, context[None], noise[None, None], **options)[0, 0]
        error = float((batch.generated([0], 1, 2)[0, 0] - expected).abs().max())
        assert error < ATOL if numbers == [0, 2, 5, 6] else error > 100 * ATOL


def test_without_actions_every_frame_has_the_null_class(make, clips):
    for workload in (make(-1.0, False), make(1.0, False)):
        steered, _ = play(workload, clips[:2], [1, 2], Sloppy(), 4)
        plain, _ = play(workload, [replace(clip, actions=None) for clip in clips[:2]], [1, 2], Sloppy(), 4)
        assert torch.equal(steered.generated([0, 1]), plain.generated([0, 1]))
        expected = specified(workload, clips[1], Sloppy(), 4, 2).latents
        torch.testing.assert_close(steered.generated([1])[0], expected, atol=ATOL, rtol=0)
    conditioned, _ = play(make(), clips[:2], [1, 2], Sloppy(), 4)
    assert (conditioned.generated([0, 1]) - plain.generated([0, 1])).abs().max() > 0.01


def test_other_actions_or_guidance_make_another_frame_in_the_same_memo(make, clips):
    memo, clip = FrameMemo(), clips[0]
    later = clip.actions.copy()
    later[10] = (later[10] + 1) % NUM_CLASSES
    played = []
    for guidance, actions in ((1.0, clip.actions), (1.0, later), (2.0, clip.actions)):
        clip_with_actions = replace(clip, actions=actions)
        batch, _ = play(make(guidance), [clip_with_actions], [1], None, 9999, memo=memo)
        alone, _ = play(make(guidance), [clip_with_actions], [1], None, 9999)
        torch.testing.assert_close(batch.generated([0]), alone.generated([0]), atol=ATOL, rtol=0)
        played.append((memo.statistics.hits, batch.generated([0])))
    # the context and the five frames before the one with another action are shared; nothing is under other guidance
    assert [hits for hits, _ in played] == [0, 6, 6]
    assert torch.equal(played[0][1][:, :5], played[1][1][:, :5])
    assert (played[0][1][:, 5] - played[1][1][:, 5]).abs().max() > 1e-3
    assert (played[0][1][:, 0] - played[2][1][:, 0]).abs().max() > 1e-3


def test_only_rows_with_the_same_actions_are_computed_once(make, clips, monkeypatch):
    workload, computed = make(1.5), []
    original = FAR.denoise
    monkeypatch.setattr(
        FAR, "denoise", lambda self, noisy, *arguments: computed.append(len(noisy)) or original(self, noisy, *arguments)
    )
    other = replace(clips[0], actions=(clips[0].actions + 1) % NUM_CLASSES)
    batch, _ = play(workload, [clips[0], clips[0], other], [7, 7, 7], Sloppy(), 4)
    assert set(computed) == {4}, "two rows, each with the null class and with its action"
    assert torch.equal(batch.generated([0]), batch.generated([1]))
    assert (batch.generated([2]) - batch.generated([0])).abs().max() > 0.01


def test_forks_and_restored_states_go_on_with_their_actions(make, clips):
    workload = make(1.5)
    batch = RolloutBatch(workload, 3)
    batch.begin([0], clips[:1], [1])
    batch.begin([2], clips[1:2], [2], num_context=3, num_predict=6)
    for _ in range(3):
        batch.advance([0, 2])
    batch.retain(0, [1, 4, 7])
    restored = RolloutBatch(workload, 3)
    restored.load_state_dict(batch.state_dict())
    batch.fork(0, [1])
    for _ in range(3):
        batch.advance([0, 1, 2])
        restored.advance([0, 2])
    assert torch.equal(batch.generated([1]), batch.generated([0]))
    torch.testing.assert_close(restored.generated([0, 2]), batch.generated([0, 2]), atol=ATOL, rtol=0)
    expected = reference_rollout(replace(workload, num_context=3, num_predict=6), clips[1], None, 9999, 2).latents
    torch.testing.assert_close(restored.generated([2])[0, :6], expected, atol=ATOL, rtol=0)
    without = RolloutBatch(make(1.0, False), 3)
    with pytest.raises(ValueError, match="row 0 of the state has 16 actions, steered needs 0"):
        without.load_state_dict(batch.state_dict())
    without.begin([0], clips[:1], [1])
    with pytest.raises(ValueError, match="row 0 of the state has 0 actions, steered needs 16"):
        restored.load_state_dict(without.state_dict())


def test_clips_whose_actions_do_not_fit_are_refused_before_anything_changes(make, clips):
    workload = make(1.5)
    batch = RolloutBatch(workload, 2)
    batch.begin([0, 1], clips[:2], [1, 2])
    for actions, message in (
        (None, "clip 2 has none; use data that comes with actions"),
        (clips[2].actions[:15], r"in the shape \(15,\); its 16 frames need one each"),
        (clips[2].actions + 1, "int64 actions from [01] to 3; the host accepts the whole numbers 0 to 2"),
        (clips[2].actions - 1, "actions from -1 to"),
        (clips[2].actions / 2, "float64 actions"),
    ):
        clip = replace(clips[2], actions=actions)
        with pytest.raises(ValueError, match=message):
            batch.begin([0, 1], [clips[3], clip], [1, 2])
        with pytest.raises(ValueError, match=message):
            reference_rollout(workload, clip, None, 4, 1)
    batch.advance([0, 1])
    fresh, _ = play(workload, clips[:2], [1, 2], None, 9999)
    torch.testing.assert_close(batch.generated([0, 1], 0, 1), fresh.generated([0, 1], 0, 1), atol=ATOL, rtol=0)


def test_settings_that_contradict_each_other_are_refused(make, tiny_workload):
    for guidance in (0.5, 0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be 1, above 1, or −1 for the null class, got"):
            make(guidance)
    with pytest.raises(
        ValueError, match=r"guidance -1\.0 with actions, labels or prompts; above 1 needs them, −1 excludes them"
    ):
        make(-1.0)
    with pytest.raises(ValueError, match=r"guidance 1\.5 without actions"):
        make(1.5, False)
    with pytest.raises(ValueError, match=r"conditions its host on actions, which host .*tiny_host.* does not take"):
        replace(tiny_workload, actions=True)


def test_environments_run_conditioned_workloads_as_any_other(make):
    workload = make(1.5)
    singles = [FrameRetentionEnv(workload, 4, split="test") for _ in range(2)]
    vector = FrameRetentionVectorEnv(2, workload, 4, split="test", autoreset_mode="DISABLED", memo_bytes=2**20)
    observations, infos = vector.reset(options={"clip_id": [2, 3]})
    for row, env in enumerate(singles):
        env.reset(options={"clip_id": 2 + row})
    rng, terminations = np.random.default_rng(0), np.zeros(2, dtype=bool)
    while not terminations.any():
        actions = rng.integers(0, 2, (2, 6))
        observations, rewards, terminations, _, infos = vector.step(actions)
        for row, env in enumerate(singles):
            obs, reward, _, _, info = env.step(actions[row])
            for key in obs:
                np.testing.assert_allclose(observations[key][row], obs[key], atol=1e-5)
            assert rewards[row] == pytest.approx(reward, abs=1e-3)
            assert infos["kept_frames"][row] == info["kept_frames"]
    assert rewards.max() > 0
    result = evaluate(workload, 4, {"sloppy": Sloppy(), "full": None}, range(2), metrics=("psnr",), progress=False)
    assert (result.provenance["guidance"], result.provenance["actions"]) == (1.5, True)
    full, _ = play(workload, [workload.clips.clip("test", 0)], [42], None, 9999)
    truth = torch.from_numpy(workload.clips.clip("test", 0).frames[5:])
    error = (full.decode([0])[0] - truth).square().mean()
    assert result.scores["full"]["psnr"][0] == pytest.approx(float(-10 * error.log10()), abs=1e-3)


def test_gymnasiums_checker_passes_on_a_conditioned_workload(make):
    env = FrameRetentionEnv(make(1.5, num_predict=3), 2, split="test")
    check_env(env, skip_render_check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_a_gpu_computes_what_the_cpu_does(make, clips, float32_on_gpu):
    workload = make(1.5)
    parts = {name: copy.deepcopy(getattr(workload.host, name)).to("cuda") for name in ("transformer", "autoencoder")}
    other_workload = replace(workload, host=replace(workload.host, **parts))
    exact, latents = (
        play(one_workload, clips[:3], [1, 2, 3], Sloppy(), [1, 4, 9999])[0] for one_workload in (workload, other_workload)
    )
    assert (latents.generated(range(3)).cpu() - exact.generated(range(3))).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["dmlab_c144p156", "dmlab_c36p264"])
def test_spaces_fit_the_long_histories(action_hosts, name):
    """The published contexts; few frames are predicted here."""
    spec = WORKLOADS[name]
    conditions = {"guidance": spec.guidance, "actions": spec.actions}
    source = Steered(spec.num_context + 3)
    workload = Workload(name, source, action_hosts["far_long"], spec.num_context, 3, num_steps=1, **conditions)
    env = FrameRetentionEnv(workload, 8, split="test")
    assert env.action_space.n == spec.num_context + 1
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs) and obs["mask"].all(), "the first decision is on the context and one frame"
    obs, _, _, _, info = env.step(np.ones(env.action_space.n, dtype=np.int8))
    assert env.observation_space.contains(obs) and obs["mask"].sum() == 9
    assert info["kept_frames"] == list(range(spec.num_context - 7, spec.num_context + 2))


PUBLISHED = {
    "ucf101_c4p12": ("UCF101C4P12", 4, 12, 1.0, False, "far_b_ucf101", None),
    "bair_c2p14": ("BAIRC2P14", 2, 14, 1.0, False, "far_b_bair", None),
    "bair_c2p28": ("BAIRC2P28", 2, 28, 1.0, False, "far_b_bair", None),
    "dmlab_c144p156": ("DMLabC144P156", 144, 156, 1.5, True, "far_b_long_dmlab", "action"),
    "dmlab_c36p264": ("DMLabC36P264", 36, 264, -1.0, False, "far_b_long_dmlab", "action"),
    "minecraft_c144p156": ("MinecraftC144P156", 144, 156, 1.5, True, "far_m_long_minecraft", "action"),
    "minecraft_c36p264": ("MinecraftC36P264", 36, 264, 1.5, True, "far_m_long_minecraft", "action"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fars_own_evaluations_are_registered(name):
    environment, num_context, num_predict, guidance, actions, host, condition = PUBLISHED[name]
    spec = WORKLOADS[name]
    assert (spec.num_context, spec.num_predict, spec.num_steps) == (num_context, num_predict, 50)
    assert (spec.guidance, spec.actions, spec.host) == (guidance, actions, host)
    assert RELEASED[host].build().condition == condition
    assert gym.spec(f"far_env/{environment}-v0").kwargs == {"workload": name}


def test_fars_evaluation_takes_every_tenth_clip_from_its_first_frame(tmp_path, monkeypatch, tiny_host, action_hosts):
    for i in range(12):
        write_video(tmp_path / f"v_{i:02d}.mp4", 20)
    monkeypatch.setattr("far_env.workloads.load_host", lambda *_: tiny_host)
    workload = make_workload("ucf101_c4p12", data_dir=tmp_path)
    assert (workload.num_steps, workload.guidance, workload.actions) == (50, 1.0, False)
    assert [workload.clips.path("test", i).name for i in range(2)] == ["v_00.mp4", "v_10.mp4"]
    grey = workload.clips.clip("test", 0).frames[:, :, :, 40:].mean(axis=(1, 2, 3)) * 255
    np.testing.assert_allclose(grey, 8 * np.arange(16), atol=4)


def test_the_registered_guidance_and_actions_reach_the_workload(tmp_path, monkeypatch, tiny_host, action_hosts):
    np.savez(tmp_path / "episode.npz", video=np.zeros((300, 64, 64, 3), np.uint8), actions=np.zeros(300, np.int64))
    monkeypatch.setattr("far_env.workloads.load_host", lambda *_: action_hosts["far_long"])
    for name, guidance, actions in (("dmlab_c144p156", 1.5, True), ("dmlab_c36p264", -1.0, False)):
        workload = make_workload(name, data_dir=tmp_path)
        assert (workload.guidance, workload.actions, workload.num_steps) == (guidance, actions, 50)
    assert make_workload("dmlab_long_prediction", data_dir=tmp_path).guidance == -1.0
    monkeypatch.setattr("far_env.workloads.load_host", lambda *_: tiny_host)
    with pytest.raises(ValueError, match="dmlab_c144p156 conditions its host on actions, which host"):
        make_workload("dmlab_c144p156", data_dir=tmp_path)
