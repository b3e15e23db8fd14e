"""A model of one's own as a host: found by its entry point, and used by evaluation, environment and training unchanged."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from far_env import plugins
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.agents.dry_run import estimate
from far_env.agents.trainer import Run, checked, train
from far_env.cli import main
from far_env.clips.worlds import WORLDS
from far_env.errors import PolicyError
from far_env.evaluation.results_folder import load as load_results
from far_env.host import weights
from far_env.host.protocol import Host, Unit, as_wide_latent, join_units, split_units
from far_env.host.weights import load_host
from far_env.policies import load_policy
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.intervention import Intervention
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.rollout.signals import column_gaps, latent_cosines
from far_env.workload import Workload
from far_env.workloads import make_workload
from tests.rollout.test_rollout import Sloppy, specified

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "far-env-example" / "far_env_example" / "hosts.py"
MODULE = "example_of_hosts"


@pytest.fixture(autouse=True)
def nearest_frame(monkeypatch):
    """The host of the documentation's example, as if its distribution were installed."""
    spec = importlib.util.spec_from_file_location(MODULE, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)
    spec.loader.exec_module(module)
    declare(monkeypatch, "nearest_frame", f"{MODULE}:NearestFrame")
    return module.NearestFrame(torch.device("cpu"), torch.float32)


def declare(monkeypatch, name: str, value: str) -> None:
    entry = EntryPoint(name, value, plugins.HOSTS)
    vars(entry)["dist"] = type("Distribution", (), {"name": "example", "version": "1"})
    groups = (plugins.POLICIES, plugins.TOKEN_POLICIES, plugins.HOSTS, plugins.WORKLOADS, plugins.COMMANDS)
    found = plugins._all_entry_points()
    declared = EntryPoints([*(point for group in groups for point in found.select(group=group)), entry])
    monkeypatch.setattr(plugins, "_all_entry_points", lambda: declared)
    weights._registered_host.cache_clear()


@pytest.fixture
def workload(nearest_frame):
    return Workload("copied_orbit", WORLDS["orbit"], nearest_frame, 12, 9, num_steps=1)


def copied(frames: np.ndarray, policy, num_predict: int, budget: int) -> np.ndarray:
    """What the host answers, in NumPy, where the policy keeps the newest frames."""
    kept, predicted = list(frames), []
    for _ in range(num_predict):
        distances = [((frame - kept[-1]) ** 2).mean() for frame in kept[:-1]]
        predicted.append(kept[int(np.argmin(distances)) + 1])
        kept = [*kept, predicted[-1]][-budget:]
    return np.stack(predicted)


def test_a_class_of_twenty_lines_is_a_host(nearest_frame):
    source = EXAMPLE.read_text()
    body = source[source.index("class NearestFrame") : source.index("def load_two_steps")].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 20
    assert load_host("nearest_frame", "cpu").name == "nearest_frame"
    assert (nearest_frame.num_steps, nearest_frame.condition, nearest_frame.precision) == (1, None, "float32")
    assert nearest_frame.units(3) == (Unit(1, 1),) * 3 and len(nearest_frame.weights_hash) == 8


def test_both_rollouts_are_what_the_host_answers(workload):
    clip = workload.clips.clip("test", 0)
    expected = copied(clip.frames[:12], None, 9, 5)
    slow = reference_rollout(workload, clip, load_policy("recent_fill"), 5, 42)
    np.testing.assert_array_equal(slow.frames.numpy(), expected)
    batch, _ = play(workload, [clip], [42], load_policy("recent_fill"), 5)
    np.testing.assert_array_equal(batch.decode([0])[0].numpy(), expected)


@pytest.mark.parametrize("feedback", ["generated", "true"])
def test_a_batch_equals_the_specification_row_by_row(nearest_frame, feedback):
    workload = Workload("copied_orbit", WORLDS["orbit"], nearest_frame, 12, 9, 1, feedback=feedback)
    clips, budgets, seeds = [workload.clips.clip("test", i) for i in range(3)], [2, 4, 9999], [7, 8, 9]
    batch, decisions = play(workload, clips, seeds, Sloppy(), budgets)
    for row, (clip, seed, budget) in enumerate(zip(clips, seeds, budgets, strict=True)):
        expected = specified(workload, clip, Sloppy(), budget, seed)
        assert torch.equal(batch.generated([row])[0], expected.latents)
        made = [(decision.step, list(decision.kept)) for decision in decisions[row]]
        assert made == [(step, kept) for step, kept in expected.kept if step < 8]


def test_a_saved_state_goes_on_as_before(workload):
    clip = workload.clips.clip("test", 1)
    batch = RolloutBatch(workload, 1)
    batch.begin([0], [clip], [3])
    for _ in range(4):
        batch.advance([0])
    batch.retain(0, [0, 3, 5, 15])
    restored = RolloutBatch(workload, 1)
    restored.load_state_dict(batch.state_dict())
    for of in (batch, restored):
        while not of.finished(0):
            of.advance([0])
    assert torch.equal(batch.generated([0]), restored.generated([0]))


def test_it_is_evaluated_with_unchanged_policies_records_and_report(tmp_path):
    out = tmp_path / "results"
    args = ["--workload", "orbit", "--host", "nearest_frame", "--budget", "8", "--clips", "3", "--device", "cpu"]
    args += ["--policies", "recent_fill,sink_recent,pretrained/general,full_history", "--metrics", "psnr"]
    assert main(["evaluate", *args, "--out", str(out)]) == 0
    results = load_results(out)
    means = {
        name: np.mean([r.metrics["psnr"] for r in results.records if r.policy == name]) for name in results.settings.policies
    }
    assert means["full_history"] > means["recent_fill"] + 1, "what was dropped cannot be copied"
    assert results.records[0].facts["host"] == "nearest_frame"
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "nearest_frame" in (tmp_path / "page.html").read_text()
    assert main(["validate", str(out), "--host", "nearest_frame", "--device", "cpu"]) == 0


def test_the_environment_plays_it(workload):
    env = gym.make("far_env/Orbit-v0", budget=8, host="nearest_frame", device="cpu", signals=("lat_cos",))
    observation, _ = env.reset(seed=0, options={"clip_id": 0})
    total, terminated = 0.0, False
    while not terminated:
        keep = np.zeros(env.action_space.shape, dtype=np.int8)
        keep[-8:] = 1
        observation, reward, terminated, _, _ = env.step(keep)
        total += reward
    clip = WORLDS["orbit"].clip("train", 0)
    expected = copied(clip.frames[:36], None, 36, 8)
    mse = ((expected - clip.frames[36:72]) ** 2).mean()
    assert total == pytest.approx(-10 * np.log10(mse), abs=1e-4)
    assert observation["lat_cos"].shape == (37, 37)


def test_an_agent_is_trained_with_it(tmp_path, capsys):
    config = AgentTraining(
        workload="pan",
        host="nearest_frame",
        imitation=ImitationSettings(true_clips=4, rounds=("rollouts 2",), epochs=1, round_epochs=1),
        surrogate=PPOSettings(total_timesteps=32, num_envs=4, n_steps=8, batch_size=16, n_epochs=1),
        ppo=PPOSettings(total_timesteps=32, num_envs=4, n_steps=8, batch_size=16, n_epochs=1),
        network=NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2),
        device="cpu",
        run_dir=str(tmp_path / "run"),
        train_clips=8,
        validation_clips=2,
        test_clips=2,
        table=("recent_fill",),
    )
    train(config)
    (table,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    assert table["host"] == "nearest_frame" and set(table["policies"]) == {"learned", "recent_fill"}
    with pytest.raises(ValueError, match="needs a FAR or FAR-Long host, and nearest_frame is another one"):
        estimate(Run(*checked(config), tmp_path, {}))


def test_signals_of_latents_are_recorded_and_others_are_refused(workload):
    clip = workload.clips.clip("test", 0)
    batch = RolloutBatch(workload, 1, signals=("lat_cos", "column_gap"))
    batch.begin([0], [clip], [1])
    batch.advance([0])
    (signals,) = batch.signals([0])
    history = torch.cat([workload.host.encode(torch.from_numpy(clip.frames[:12])), batch.generated([0])[0, :1]])[None]
    np.testing.assert_allclose(signals["lat_cos"], latent_cosines(history)[0], atol=1e-6)
    np.testing.assert_allclose(signals["column_gap"], column_gaps(history)[0], atol=1e-6)
    with pytest.raises(PolicyError, match="host nearest_frame has no signal attn_mass, which only FAR has"):
        RolloutBatch(workload, 1, signals=("attn_mass",))


class Chunks(Host):
    """Units of one, then two frames whose latents are pixels; a new one is the mean of the kept frames plus noise / 100."""

    name, latent_shape, frame_size, chunked = "chunks", (3, 64, 64), 64, True

    def encode(self, frames):
        return frames

    def decode(self, latents):
        return latents.clamp(0, 1)

    def generate(self, kept, noise, conditions):
        return torch.cat(list(kept)).mean(dim=0) + noise / 100

    def units(self, num_frames):
        if num_frames % 2 == 0:
            raise ValueError(f"chunks has clips of an odd number of frames, not {num_frames}")
        return (Unit(), *(Unit(2, 2),) * (num_frames // 2))


@pytest.fixture
def chunks():
    return Chunks(torch.device("cpu"), torch.float32)


@pytest.fixture
def chunked(chunks):
    return Workload("chunked_pan", WORLDS["pan"], chunks, 5, 10, num_steps=1)


def test_chunks_are_kept_and_dropped_whole(chunked):
    assert (chunked.context_units, chunked.predict_units, chunked.num_units) == (3, 5, 8)
    assert [chunked.predicted_frames(steps) for steps in range(6)] == [0, 2, 4, 6, 8, 10]
    seen = []

    class Watching:
        def build_temporal_cache_plan(self, metas, state, budget):
            seen.append((metas, state, budget))
            return load_policy("recent_fill").build_temporal_cache_plan(metas, state, budget)

    clip = chunked.clips.clip("test", 0)
    rollout = reference_rollout(chunked, clip, Watching(), 3, 1)
    assert rollout.kept[0] == (0, [1, 2, 3]) and rollout.latents.shape == (10, 3, 64, 64)
    metas, state, budget = seen[0]
    assert (state.step, state.total_steps, budget["max_frames"]) == (0, 5, 3)
    latent_mb = 3 * 64 * 64 * 4 / 2**20
    assert [meta.size_mb for meta in metas] == pytest.approx([latent_mb] + [2 * latent_mb] * 3)
    # The benchmark's formulas of the flattened chunks; the single frame counts twice.
    first, second, third = (clip.frames[[0, 0]].ravel(), clip.frames[[1, 2]].ravel(), clip.frames[[3, 4]].ravel())
    assert metas[1].motion_strength == pytest.approx(np.abs(second - first).mean(), rel=1e-4)
    cosine = third @ second / np.linalg.norm(third) / np.linalg.norm(second)
    assert metas[2].temporal_similarity == pytest.approx(cosine, rel=1e-4)
    assert metas[2].feature_drift == pytest.approx(min(1, np.linalg.norm(third - first) / np.linalg.norm(first)), rel=1e-4)


@pytest.mark.parametrize("feedback", ["generated", "true"])
def test_a_batch_of_chunks_equals_the_specification(chunks, feedback):
    workload = Workload("chunked_pan", WORLDS["pan"], chunks, 5, 10, 1, feedback=feedback)
    clips, budgets, seeds = [workload.clips.clip("test", i) for i in range(3)], [1, 2, 9999], [7, 8, 9]
    batch, _ = play(workload, clips, seeds, Sloppy(), budgets)
    for row, (clip, seed, budget) in enumerate(zip(clips, seeds, budgets, strict=True)):
        expected = specified(workload, clip, Sloppy(), budget, seed)
        torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=1e-6, rtol=0)
        torch.testing.assert_close(batch.decode([row])[0], expected.frames, atol=1e-6, rtol=0)
        torch.testing.assert_close(batch.decode([row], 1, 3)[0], expected.frames[2:6], atol=1e-6, rtol=0)
    state = batch.state_dict()
    restored = RolloutBatch(workload, 3)
    restored.load_state_dict(state)
    assert torch.equal(restored.generated([0, 1, 2]), batch.generated([0, 1, 2]))


def test_budgets_may_count_frames(chunks):
    workload = Workload("chunked_pan", WORLDS["pan"], chunks, 5, 10, 1, budget_counts="frames")
    assert [workload.max_units(budget) for budget in (2, 3, 4, 7, 9999)] == [1, 1, 2, 3, 9999]
    _, (decisions,) = play(workload, [workload.clips.clip("test", 0)], [1], load_policy("recent_fill"), 5)
    assert {len(decision.kept) for decision in decisions} == {2}
    with pytest.raises(ValueError, match="a budget of 1 frames does not hold a chunk of chunked_pan, which has 2 frames"):
        workload.max_units(1)


def test_chunks_are_evaluated_and_their_records_validated(monkeypatch, tmp_path):
    declare(monkeypatch, "chunks", f"{__name__}:Chunks")
    from far_env import workloads

    spec = workloads.WorkloadSpec(workloads._world("pan"), 5, 10, "chunks", 1)
    monkeypatch.setattr(workloads._Registry, "__getitem__", lambda self, name: spec)
    out = tmp_path / "results"
    args = ["--workload", "pan", "--budget", "2", "--clips", "2", "--device", "cpu", "--metrics", "psnr", "--show-clips", "1"]
    assert main(["evaluate", *args, "--policies", "recent_fill,uniform,full_history", "--out", str(out)]) == 0
    results = load_results(out)
    assert results.settings.units == {"pan": [3, 5, 1]}
    assert all(len(record.psnr_per_frame) == 10 for record in results.records)
    assert [entry["step"] for entry in results.records[0].plan] in ([], [0, 1, 2, 3])
    assert main(["validate", str(out), "--device", "cpu"]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    env = gym.make("far_env/Pan-v0", budget=2, device="cpu", render_mode="rgb_array", reward="psnr")
    observation, info = env.reset(seed=0)
    assert observation["mask"].shape == (4,) and info["total_steps"] == 5
    steps, terminated = 0, False
    while not terminated:
        observation, _, terminated, _, info = env.step(np.ones(4, dtype=np.int8))
        steps += 1
    assert steps == 4 and "psnr" in info and env.render().shape[1] == 8 * 68 - 4
    with pytest.raises(ValueError, match="interventions replace single frames, and host chunks keeps chunks"):
        Intervention("noise", make_workload("pan", device="cpu"), 1)


def test_a_wide_latent_repeats_a_shorter_chunk():
    unit = torch.arange(2.0)[:, None, None, None].expand(2, 1, 1, 1)
    assert as_wide_latent(unit, 3).flatten().tolist() == [0, 0, 1]
    assert as_wide_latent(unit, 2).flatten().tolist() == [0, 1]
    assert as_wide_latent(torch.zeros(3, 4, 5), 2).shape == (3, 4, 5)


def test_units_are_split_and_joined(chunks):
    latents = torch.randn(5, 3, 64, 64)
    parts = split_units(chunks, latents, chunks.units(5))
    assert [len(part) for part in parts] == [1, 2, 2] and torch.equal(join_units(chunks, parts), latents)


class Incomplete(Host):
    name, latent_shape = "incomplete", (3, 64, 64)

    def encode(self, frames):
        return frames


class WrongShape(Chunks):
    def generate(self, kept, noise, conditions):
        return noise[:, :1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_host("incomplete", "cpu"), "Incomplete lacks frame_size, decode, generate; make it a subclass of"),
        (lambda: Workload("w", None, Chunks("cpu", torch.float32), 4, 11, 1), "the 4 given frames of w end within a chunk"),
        (lambda: Workload("w", None, Chunks("cpu", torch.float32), 5, 11, 1), "an odd number of frames, not 16"),
        (
            lambda: Workload("w", None, Chunks("cpu", torch.float32), 5, 10, 1, prompts=True),
            "conditions its host on prompts, which host chunks does not take",
        ),
        (
            lambda: Workload("w", None, Chunks("cpu", torch.float32), 5, 10, 1, budget_counts="pixels"),
            "unknown budget_counts 'pixels'",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(monkeypatch, make, message):
    declare(monkeypatch, "incomplete", f"{__name__}:Incomplete")
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_unit_of_another_shape_is_one_sentence():
    workload = Workload("w", WORLDS["pan"], WrongShape(torch.device("cpu"), torch.float32), 5, 10, 1)
    with pytest.raises(ValueError, match=r"host chunks generated \(2, 1, 64, 64\) where a unit has the shape \(2, 3, 64, 64\)"):
        play(workload, [workload.clips.clip("test", 0)], [1], None, 9999)


def test_a_memory_of_tokens_needs_a_far(capsys):
    args = ["--workload", "pan", "--host", "nearest_frame", "--budget", "40", "--memory", "tokens", "--clips", "1"]
    assert main(["evaluate", *args, "--policies", "streaming_llm", "--device", "cpu"]) == 2
    assert "a memory of tokens needs a FAR or FAR-Long host, and nearest_frame is another one" in capsys.readouterr().err
