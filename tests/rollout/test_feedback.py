"""Feedback of true frames: the history holds the clip's encoded frames, and each generated frame is predicted from these."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import far_env  # noqa: F401  (registers the ids)
from far_env import baselines, cli
from far_env.clips.clip import Clip
from far_env.contract import SIGNALS, make_plan
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.sb3 import SB3VecEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.benchmark import TASKS, benchmark_workload, run_benchmark
from far_env.evaluation.evaluate import evaluate, evaluate_grid
from far_env.evaluation.report import report_data
from far_env.evaluation.results_folder import load
from far_env.evaluation.table import results_table
from far_env.frame_meta import frame_features
from far_env.metrics import psnr
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.noise import rollout_noise
from far_env.rollout.play import play
from far_env.workload import BENCHMARK_WORKLOADS, Workload
from far_env.workloads import make_workload
from tests.rollout.test_actions import Steered
from tests.rollout.test_rollout import Sloppy, specified
from tests.rollout.test_signals import compare

ATOL = 1e-4
BUDGETS = [1, 2, 4, 8, 14, 9999]


@pytest.fixture(params=["far", "far_long", "far_long with actions"])
def workload(tiny_workload, tiny_long_workload, request) -> Workload:
    """5 + 11 frames, 3 ODE steps, true frames fed back; FAR-Long's window has six frames."""
    chosen = tiny_workload if request.param == "far" else tiny_long_workload
    if "actions" in request.param:
        chosen = replace(chosen, name="steered", clips=Steered(16), actions=True, guidance=1.5)
    return replace(chosen, feedback="true")


def encoded(workload: Workload, clip: Clip) -> torch.Tensor:
    """Latents (T, C, h, w) of all true frames."""
    with torch.no_grad():
        return workload.host.autoencoder.encode(torch.from_numpy(clip.frames)[None])[0]


@pytest.mark.parametrize("memo_bytes", [0, 2**24])
def test_a_ragged_batch_equals_the_specification_row_by_row(workload, memo_bytes):
    clips, seeds, memo = [workload.clips.clip("test", i) for i in range(6)], range(100, 106), FrameMemo(memo_bytes)
    for _ in range(2 if memo_bytes else 1):
        batch, decisions = play(workload, clips, seeds, Sloppy(), BUDGETS, memo=memo)
    assert memo_bytes == 0 or memo.statistics.hits == 6 * 12
    for row, (clip, seed, budget) in enumerate(zip(clips, seeds, BUDGETS, strict=True)):
        expected = specified(workload, clip, Sloppy(), budget, seed)
        torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=ATOL, rtol=0)
        torch.testing.assert_close(batch.decode([row])[0], expected.frames, atol=ATOL, rtol=0)
        assert [(d.step, list(d.kept)) for d in decisions[row]] == [kept for kept in expected.kept if kept[0] < 10]


@torch.no_grad()
def test_every_frame_is_predicted_from_the_true_frames_that_were_kept(workload):
    clip, history = workload.clips.clip("test", 3), list(range(5))
    latents, noise = encoded(workload, clip), rollout_noise(7, 11, workload.host.latent_shape)
    batch, (decisions,) = play(workload, [clip], [7], Sloppy(), 4)
    kept = {decision.step: list(decision.kept) for decision in decisions}
    for step in range(11):
        actions = clip.actions[[*history, 5 + step]].tolist() if workload.actions else []
        expected = workload.host.generate(list(latents[history]), noise[step], workload.conditions(actions))
        torch.testing.assert_close(batch.generated([0], step, step + 1)[0, 0], expected, atol=ATOL, rtol=0)
        history = kept.get(step, [*history, 5 + step])
    final = batch.history([0])[0][0]
    torch.testing.assert_close(final, latents[batch.frame_numbers(0)], atol=1e-5, rtol=0)


def test_the_protocols_agree_on_the_first_frame_alone_and_share_nothing_in_a_memo(workload):
    clip, memo, latents = workload.clips.clip("test", 0), FrameMemo(), {}
    for feedback in ("generated", "true", "generated"):
        before = memo.statistics.hits
        shared, _ = play(replace(workload, feedback=feedback), [clip], [1], None, 9999, memo=memo)
        alone, _ = play(replace(workload, feedback=feedback), [clip], [1], None, 9999)
        torch.testing.assert_close(shared.generated([0]), alone.generated([0]), atol=ATOL, rtol=0)
        assert memo.statistics.hits - before == (12 if feedback in latents else 0)
        latents[feedback] = shared.generated([0])[0]
    torch.testing.assert_close(latents["true"][0], latents["generated"][0], atol=ATOL, rtol=0)
    assert ((latents["true"] - latents["generated"])[1:].abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_a_policy_is_told_about_true_frames_with_the_numbers_of_generated_ones(tiny_workload):
    told = []

    class Watching:
        def build_temporal_cache_plan(self, metas, state, budget):
            told.append((state.step, [m.age for m in metas], [[m.boundary_score, m.feature_drift] for m in metas]))
            return make_plan(range(len(metas))[-4:], len(metas))

        def __deepcopy__(self, memo):
            return self

    workload, clip = replace(tiny_workload, feedback="true"), tiny_workload.clips.clip("test", 1)
    _, (decisions,) = play(workload, [clip], [3], Watching(), 4)
    latents, history = encoded(workload, clip), list(range(5))
    for decision, (step, ages, features) in zip(decisions, told, strict=True):
        history = [*history, 5 + step]
        assert step == decision.step and ages == list(range(len(history)))[::-1]
        expected = frame_features(latents[history][None])[0, :, :2]
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
        history = list(decision.kept)
        assert history == list(range(step + 2, step + 6))


def test_signals_equal_their_specification(workload):
    clips = [workload.clips.clip("test", i) for i in range(2)]
    received = compare(workload, clips, [3, 7], 1e-4)
    assert received and all(set(signals) == set(SIGNALS) for signals in received.values())


def test_forks_and_restored_states_go_on_and_only_under_their_protocol(workload):
    clips = [workload.clips.clip("test", i) for i in range(2)]
    batch = RolloutBatch(workload, 4)
    batch.begin([0], clips[:1], [1])
    batch.begin([2], clips[1:], [2], num_context=3, num_predict=6)
    batch.begin([3], clips[1:], [2])
    for _ in range(3):
        batch.advance([0, 2])
    batch.retain(0, [1, 4, 7])
    restored = RolloutBatch(workload, 4)
    restored.load_state_dict(batch.state_dict())
    batch.fork(0, [1])
    for _ in range(3):
        batch.advance([0, 1, 2, 3])
        restored.advance([0, 2, 3])
    assert torch.equal(batch.generated([1]), batch.generated([0]))
    torch.testing.assert_close(restored.generated([0, 2, 3]), batch.generated([0, 2, 3]), atol=ATOL, rtol=0)
    short = specified(replace(workload, num_context=3, num_predict=6), clips[1], None, 9999, 2).latents
    torch.testing.assert_close(batch.generated([2])[0, :6], short, atol=ATOL, rtol=0)
    other = RolloutBatch(replace(workload, feedback="generated"), 4)
    with pytest.raises(ValueError, match=r"the state has feedback of true frames, .* of generated ones"):
        other.load_state_dict(batch.state_dict())


def test_a_clip_that_ends_too_early_is_refused(workload):
    clip = workload.clips.clip("test", 0)
    short = replace(clip, frames=clip.frames[:15])
    for roll_out in (lambda: play(workload, [short], [1], None, 9999), lambda: specified(workload, short, None, 9999, 1)):
        with pytest.raises(ValueError, match="clip 0 has 15 frames; a rollout needs 16 true ones"):
            roll_out()


def test_both_environments_score_generated_frames_and_observe_true_ones(tiny_workload, tiny_host_folder):
    truth = replace(tiny_workload, feedback="true")
    made = gym.make("far_env/Pan-v0", host=str(tiny_host_folder), device="cpu", split="test", feedback="true").unwrapped
    given = FrameRetentionEnv(tiny_workload, 4, split="test", feedback=True)
    vector = FrameRetentionVectorEnv(2, truth, 4, split="test", autoreset_mode="DISABLED")
    stable = SB3VecEnv(FrameRetentionVectorEnv(2, tiny_workload, 4, split="test", autoreset_mode="SAME_STEP", feedback="true"))
    assert {env.episodes.workload.feedback for env in (made, given, vector, stable.env)} == {"true"}
    clip = tiny_workload.clips.clip("test", 2)
    stable.set_options({"clip_id": 2})
    first = stable.reset()
    observations, _ = vector.reset(options={"clip_id": [2, 3]})
    np.testing.assert_allclose(first["frames"][0], observations["frames"][0], atol=1e-5)
    singles = [(env, env.reset(options={"clip_id": 2})[0]) for env in (made, given)]
    expected = frame_features(encoded(truth, clip)[:6][None])[0].numpy()
    np.testing.assert_allclose(vector.episodes.info(0)["frame_features"][-6:], expected, atol=1e-5)
    for _, observation in singles:
        np.testing.assert_allclose(observation["frames"], observations["frames"][0], atol=1e-5)
    action, done = np.array([0, 0, 1, 1, 1, 1]), False
    while not done:
        observations, rewards, terminations, _, _ = vector.step(np.stack([action, action]))
        results = [env.step(action) for env, _ in singles]
        done = bool(terminations[0])
        for observation, reward, *_ in results:
            assert reward == pytest.approx(rewards[0], abs=1e-3)
            np.testing.assert_allclose(observation["frames"], observations["frames"][0], atol=1e-5)
    frames = specified(truth, clip, baselines.make("recent_fill"), 4, 44).frames
    assert rewards[0] == pytest.approx(psnr(frames, torch.from_numpy(clip.frames[5:])).item(), abs=1e-3)
    assert FrameRetentionEnv(truth, 4).episodes.workload.feedback == "true", "the workload's, where none is given"
    assert FrameRetentionEnv(truth, 4, feedback="generated").episodes.workload.feedback == "generated"


def test_a_state_is_restored_in_the_middle_of_an_episode(tiny_workload):
    options = {"split": "test", "feedback": "true", "autoreset_mode": "SAME_STEP", "reward": "psnr"}
    env, other = (FrameRetentionVectorEnv(2, tiny_workload, 4, **options) for _ in range(2))
    env.reset(seed=3)
    actions = np.tile([1, 0, 1, 1, 0, 1], (2, 1))
    for _ in range(4):
        env.step(actions)
    other.load_state_dict(env.state_dict())
    for _ in range(8):
        ours, theirs = env.step(actions), other.step(actions)
        np.testing.assert_allclose(ours[0]["frames"], theirs[0]["frames"], atol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-3)


@pytest.mark.parametrize("feedback", ["ture", 1, "True", ""])
def test_another_feedback_is_refused(tiny_workload, feedback):
    for make in (
        lambda: replace(tiny_workload, feedback=feedback),
        lambda: FrameRetentionEnv(tiny_workload, feedback=feedback),
    ):
        with pytest.raises(ValueError, match=rf"unknown feedback '{feedback}'; .*true"):
            make()


def test_records_are_made_played_again_and_reported_under_their_protocol(capsys, tiny_host_folder, tmp_path):
    place = ["--host", str(tiny_host_folder), "--device", "cpu", "--clips", "3", "--metrics", "psnr", "--budget", "3"]

    def run(command, *args):
        status = cli.main([command, *args])
        return status, *capsys.readouterr()

    folders = {name: str(tmp_path / name) for name in ("generated", "true")}
    for feedback, folder in folders.items():
        args = [*place, "--policies", "random,recent_fill", "--feedback", feedback, "--out", folder]
        status, out, _ = run("evaluate", *args)
        assert status == 0 and ("true frames fed back" in out) == (feedback == "true")
        status, out, _ = run("validate", folder, "--device", "cpu")
        assert status == 0 and "6 match (6 to the last bit" in out
        results = load(folder)
        assert {record.facts["feedback"] for record in results.records} == {feedback}
        facts = report_data(results, progress=False)["facts"]
        assert facts["pan"]["feedback"] == {feedback: 6}
    args = [*place, "--policies", "random", "--clip-options", "{step_pixels: [4, 8], objects: 2}", "--out", str(tmp_path / "c")]
    status, out, _ = run("evaluate", *args)
    assert status == 0 and "3 test clips with step_pixels [4, 8], objects 2, noise seed" in out
    assert run("evaluate", *args)[0] == 0, "the same options again"
    status, out, _ = run("validate", str(tmp_path / "c"), "--device", "cpu")
    assert status == 0 and "3 match (3 to the last bit" in out
    latents = [[record.latents_sha256 for record in load(folder).records] for folder in folders.values()]
    assert not set(latents[0]) & set(latents[1])
    status, _, err = run("evaluate", *place, "--policies", "random", "--feedback", "true", "--out", folders["generated"])
    assert status == 2 and "holds an evaluation with feedback of pan generated, not true; choose another folder" in err


def test_a_folder_from_before_there_was_a_choice_is_one_of_generated_frames(tiny_workload, tmp_path):
    def run(clips, **options):
        policies = {"recent_fill": baselines.make("recent_fill")}
        return evaluate_grid([tiny_workload], [4], policies, clips, metrics=["psnr"], progress=False, **options)

    run(range(1), out=tmp_path)
    for name in ("evaluation.json", "records.jsonl"):
        text = (tmp_path / name).read_text()
        older = text.replace('"feedback": "generated",', "").replace(', "feedback": "generated"', "")
        assert older != text
        (tmp_path / name).write_text(older)
    assert {record.facts["feedback"] for record in run(range(2), out=tmp_path).records} == {"generated"}


def test_a_table_says_which_frames_were_fed_back(tiny_workload):
    policies = {"recent_fill": baselines.make("recent_fill")}
    for feedback in ("generated", "true"):
        result = evaluate(replace(tiny_workload, feedback=feedback), 4, policies, range(2), metrics=("psnr",), progress=False)
        assert ("ODE steps, true frames fed back; host" in results_table(result)) == (feedback == "true")
        assert result.summary()["feedback"] == feedback


def test_the_benchmark_feeds_back_generated_frames_alone(tiny_workload, capsys, monkeypatch):
    for task in TASKS.values():
        monkeypatch.delenv(task.data_variable, raising=False)
    assert set(BENCHMARK_WORKLOADS) == set(TASKS)
    dry, _ = benchmark_workload("ucf101_short_prediction", "embedded", device="cpu")
    with pytest.raises(ValueError, match="ucf101_short_prediction is a workload of the benchmark, which feeds back generated"):
        replace(dry, feedback="true")
    monkeypatch.setattr("far_env.workloads.load_host", lambda *_: tiny_workload.host)
    monkeypatch.setenv("DMLAB_DATA_DIR", "nowhere")
    with pytest.raises(ValueError, match="pan was made with feedback of true ones"):
        run_benchmark(make_workload("pan", feedback="true"), 4, baselines.make("recent_fill"), 1)
    status = cli.main(["benchmark", "--host", "embedded", "--policy", "recent_fill", "--feedback", "true"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and "--feedback" in err and len(err.strip().splitlines()) == 1
