"""Imitation: the collected decisions, the loss, what is learned, and resuming a stopped collection."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from far_env.agents import imitation
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.agents.expert_data import ExpertData, TrueHistories, collect, subset_distribution
from far_env.agents.imitation import ImitationStage, fit, imitate, imitation_loss
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.oracle import search
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED

SETTINGS = ImitationSettings(rounds=2, clips_per_round=3, candidates=4, epochs=2, batch_size=16)
NETWORK = NetworkConfig(width=16, memory=True)


@pytest.fixture(scope="module")
def collected(tiny_workload) -> ExpertData:
    return collect(
        tiny_workload, [0, 1, 2], [4, 4, 2], actor=None, spec=ObservationSpec(memory=True), candidates=4, progress=False
    )


def test_every_decision_that_matters_is_recorded_with_legal_alternatives(collected):
    assert len(collected) == 3 * 10, "from the first generated frame to the last but one"
    assert collected.frames.shape == (30, 6, 13) and collected.sets.shape == (30, 4, 6)
    assert sorted(collected.max_frames.tolist()) == [2] * 10 + [4] * 20
    valid = ~collected.costs.isinf()
    sizes = collected.sets.sum(dim=2)
    assert (sizes[valid] == collected.max_frames[:, None].expand(-1, 4)[valid]).all()
    assert collected.sets[..., -1][valid].all(), "the newest frame stays"
    assert not (collected.sets & (collected.mask[:, None] == 0)).any(), "padding is never kept"
    assert (collected.costs.diff(dim=1)[valid[:, 1:]] >= 0).all(), "the best comes first"


def test_the_expert_acts_as_the_search_of_width_one(tiny_workload, collected):
    clips = [tiny_workload.clips.clip("train", i) for i in (0, 1)]
    rollouts = search(tiny_workload, clips, [BENCHMARK_SEED, BENCHMARK_SEED + 1], 4, width=1, branches=1, progress=False)
    first = rollouts[0].decisions[0].kept
    kept_first = collected.sets[0, 0].nonzero().flatten().tolist()
    assert tuple(kept_first) == first, "six frames in six slots: places are true numbers"


def test_with_feedback_of_true_frames_the_engine_would_record_the_same(tiny_workload, monkeypatch):
    """Decisions are collected without a host there, unless a signal needs it."""
    workload = dataclasses.replace(tiny_workload, feedback="true")
    options = {"actor": None, "spec": ObservationSpec(memory=True), "candidates": 4, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(RolloutBatch, "advance", lambda *_: pytest.fail("generates frames"))
        quick = collect(workload, [0, 1, 2], [4, 4, 2], **options)
    monkeypatch.setattr(TrueHistories, "SIGNALS", ())
    monkeypatch.setattr(TrueHistories, "advance", lambda *_: pytest.fail("generates no frames"))
    options["spec"] = ObservationSpec(signals=("lat_cos",))
    slow = collect(workload, [0, 1, 2], [4, 4, 2], **options)
    assert torch.equal(quick.sets, slow.sets)
    torch.testing.assert_close(quick.costs, slow.costs)
    torch.testing.assert_close(quick.frames[..., :6], slow.frames[..., :6], atol=1e-5, rtol=0)


def test_the_loss_is_the_cross_entropy_over_all_sets(collected):
    torch.manual_seed(0)
    network = RetentionNetwork(**dataclasses.asdict(NETWORK))
    part = collected.rows(torch.arange(5))
    loss = imitation_loss(network, part, temperature=0.01)
    expected = []
    with torch.no_grad():
        logits = network(part.frames, part.mask, part.budget)
    for row in range(5):
        budget, places = int(part.max_frames[row]), part.mask[row].nonzero().flatten().tolist()
        every = [set(chosen) | {5} for size in range(budget) for chosen in itertools.combinations(places[:-1], size)]
        scores = torch.stack([logits[row, sorted(choice - {5})].sum() for choice in every]).log_softmax(dim=0)
        costs = part.costs[row]
        weights = torch.exp(-(costs - costs[0]) / 0.01)
        weights /= weights.sum()
        chosen = [set(kept.nonzero().flatten().tolist()) for kept in part.sets[row]]
        pairs = zip(weights, chosen, costs, strict=True)
        expected.append(-sum(weight * scores[every.index(choice)] for weight, choice, cost in pairs if not cost.isinf()))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_a_rule_on_the_inputs_is_learned():
    """The expert keeps the frames with the largest drift."""
    generator = torch.Generator().manual_seed(0)
    count, slots = 400, 6
    frames = torch.rand(count, slots, 6, generator=generator)
    drift = frames[..., 3].clone()
    drift[:, -1] = 2
    best = torch.zeros(count, 1, slots, dtype=torch.bool).scatter_(2, drift.topk(3).indices[:, None], True)
    ones = torch.ones(count, slots)
    budget = torch.tensor([0.5, 0.0, 1.0]).expand(count, 3)
    decisions = ExpertData(frames, ones, budget, torch.full((count,), 3), best, torch.zeros(count, 1))
    held_out = decisions.rows(torch.arange(300, count))
    training_rows = decisions.rows(torch.arange(300))
    settings = ImitationSettings(epochs=40, batch_size=50, learning_rate=5e-3)
    network = fit(training_rows, NetworkConfig(width=32), settings, seed=0)
    agreement = (subset_distribution(network, held_out).mode().bool() == held_out.sets[:, 0]).all(dim=1)
    assert agreement.float().mean() > 0.9


def test_a_stopped_collection_resumes_and_ends_with_the_same_scorer(tiny_workload, tmp_path):
    def run(name, settings=SETTINGS):
        return imitate(settings, NETWORK, [tiny_workload], [4], tmp_path / name, seed=0, num_clips=5)

    whole = run("whole")
    run("stopped", dataclasses.replace(SETTINGS, rounds=1))
    resumed = run("stopped")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"index.json", "round_000.safetensors", "round_001.safetensors"}
    with pytest.raises(ValueError, match="decisions made with other settings"):
        run("whole", dataclasses.replace(SETTINGS, temperature=1.0))
    (tmp_path / "whole" / "round_001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"round_001.safetensors cannot be read .*; delete it"):
        run("whole")


def test_a_finished_stage_returns_its_weights_without_learning_again(tiny_workload, tmp_path, monkeypatch):
    config = AgentTraining(
        imitation=dataclasses.replace(SETTINGS, rounds=1), network=NETWORK, ppo=PPOSettings(total_timesteps=0), train_clips=5
    )
    stage = ImitationStage(config, [tiny_workload], [4], tmp_path)
    weights = stage.run(None)
    monkeypatch.setattr(imitation, "imitate", lambda *_, **__: pytest.fail("imitated again"))
    for key, value in stage.run(None).items():
        assert torch.equal(value, weights[key])
    more_rounds = dataclasses.replace(stage, config=dataclasses.replace(config, imitation=SETTINGS))
    with pytest.raises(pytest.fail.Exception, match="imitated again"):
        more_rounds.run(None)


def test_the_weighted_cost_is_what_the_choice_among_the_alternatives_is_expected_to_cost():
    """By enumeration: four frames, two of the three older ones kept, so three alternatives; one of them is not recorded."""
    generator = torch.Generator().manual_seed(0)
    frames, ones = torch.rand(1, 4, 6, generator=generator), torch.ones(1, 4)
    sets = torch.tensor([[[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]], dtype=torch.bool)
    costs = torch.tensor([[2.0, 5.0, torch.inf]])
    decisions = ExpertData(frames, ones, torch.tensor([[0.75, 0.0, 1.0]]), torch.tensor([3]), sets, costs)
    network = RetentionNetwork(width=16, num_heads=2).eval()
    scores = [(network(frames, ones, decisions.budget)[0] * kept).sum().exp().item() for kept in sets[0, :2].float()]
    expected = 0.5 * 3.0 * scores[1] / sum(scores)
    without, both = (imitation.imitation_loss(network, decisions, 2.0, weight).item() for weight in (0.0, 1.0))
    assert both - without == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"imitation: expected_cost_weight cannot be negative, got -1\.0"):
        ImitationSettings(expected_cost_weight=-1.0)


@torch.no_grad()
def test_histories_of_true_frames_are_rollouts_of_a_perfect_host(tiny_workload):
    """Same features and signals as of rollouts whose generated frames are replaced by the true ones."""
    clips = [tiny_workload.clips.clip("train", i) for i in (0, 1)]
    latents = torch.stack([tiny_workload.host.autoencoder.encode(torch.from_numpy(clip.frames)[None])[0] for clip in clips])
    true, rolled = TrueHistories(latents, 5), RolloutBatch(tiny_workload, 2, signals=("lat_cos", "column_gap"))
    rolled.begin([0, 1], clips, [1, 2])
    for step in range(4):
        true.advance([0, 1])
        rolled.advance([0, 1])
        for row in (0, 1):
            rolled._rows[row].frames[-1] = latents[row, 5 + step]
            assert true.kept[row] == rolled.frame_numbers(row) and true.history_length(row) == rolled.history_length(row)
        for from_true, other in zip(true.history([0, 1]), rolled.history([0, 1]), strict=True):
            torch.testing.assert_close(from_true, other)
        np.testing.assert_allclose(true.features([0, 1]), rolled.features([0, 1]), atol=1e-6)
        for from_true, other in zip(true.signals([1, 0]), rolled.signals([1, 0]), strict=True):
            for name in from_true:
                np.testing.assert_allclose(from_true[name], other[name], atol=1e-5)
        for histories in (true, rolled):
            histories.retain(0, [0, 2, 3])
            histories.retain(1, [0, 2] if step else [1, 2, 4, 5])


def test_replay_adds_decisions_about_true_clips_to_those_of_the_rounds(tiny_workload, tmp_path, monkeypatch):
    lessons, original = [], imitation.fit

    def recorded(decisions, *arguments):
        lessons.append(decisions)
        return original(decisions, *arguments)

    monkeypatch.setattr(imitation, "fit", recorded)
    settings = dataclasses.replace(SETTINGS, true_clips=4, true_frame_replay_ratio=0.5)
    imitate(settings, NETWORK, [tiny_workload], [4], tmp_path, seed=0, num_clips=20)
    prepared, first, both = lessons
    assert [len(lesson) for lesson in lessons] == [52, 30 + 15, 60 + 30]
    prepared_rows = {row.numpy().tobytes() for row in prepared.frames}
    for lesson, count in ((first, 30), (both, 60)):
        rehearsed = [row.numpy().tobytes() for row in lesson.frames[count:]]
        assert set(rehearsed) <= prepared_rows and len(set(rehearsed)) > len(rehearsed) / 2
        assert not {row.numpy().tobytes() for row in lesson.frames[:count]} & prepared_rows
    torch.testing.assert_close(both.frames[:30], first.frames[:30])
    with pytest.raises(ValueError, match="true_frame_replay_ratio must be 0 or more, and above 0 only with true_clips above 0"):
        dataclasses.replace(SETTINGS, true_frame_replay_ratio=1.0)


def test_decisions_about_true_clips_come_first_and_are_not_collected_again(tiny_workload, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, true_clips=4)
    calls, original = [], imitation.collect

    def noted(workload, clip_ids, budgets, **options):
        calls.append((options.get("true_frames", False), options["actor"] is not None, len(clip_ids)))
        return original(workload, clip_ids, budgets, **options)

    monkeypatch.setattr(imitation, "collect", noted)
    whole = imitate(settings, NETWORK, [tiny_workload], [4], tmp_path / "whole", seed=0, num_clips=20)
    assert calls == [(True, False, 4), (False, True, 3), (False, True, 3)], "the first rollouts are decided by what was learned"
    noted_decisions = imitation._load(tmp_path / "whole" / "true_frames.safetensors")
    uncut = noted_decisions.budget[:, 1] * 11 % 3 < 1e-4  # steps 0, 3, 6 and 9: as steps of a clip, and without cuts before
    assert len(noted_decisions) == 4 * (10 + 3) and uncut.sum() == 4 * (4 + 3)
    again = imitate(settings, NETWORK, [tiny_workload], [4], tmp_path / "whole", seed=0, num_clips=20)
    assert len(calls) == 3
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    with pytest.raises(ValueError, match="true_clips prepare for rounds"):
        dataclasses.replace(settings, rounds=0)
    with pytest.raises(ValueError, match="no signals but lat_cos and column_gap"):
        collect(
            tiny_workload, [0], [4], actor=None, spec=ObservationSpec(signals=("attn_mass",)), candidates=2, true_frames=True
        )
