"""Imitation: the loss, what is learned, and resuming where it was stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from far_env.agents import imitation
from far_env.agents.checkpoints import save_scorer
from far_env.agents.collection import collect
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.agents.expert_data import load_expert_data
from far_env.agents.graph_decisions import GraphDecisions
from far_env.agents.imitation import ImitationStage, fit, imitate, imitation_loss, mean_regret
from far_env.agents.network import RetentionNetwork
from far_env.agents.ppo import PPOStage
from far_env.agents.trainer import Run, stages
from far_env.clips.worlds import WORLDS
from far_env.workload import Workload
from tests.agents.test_network import random_network

NETWORK = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
SETTINGS = ImitationSettings(
    true_clips=3, rounds=("true 2", "rollouts 2"), epochs=2, round_epochs=1, batch_size=16, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def decisions(tiny_workload) -> GraphDecisions:
    ids = [0, 1, 2, 3]
    data = collect(tiny_workload, ids, [4, 2, 4, 6], actor=None, config=NETWORK, true_frames=True, progress=False)
    return GraphDecisions(data, NETWORK)


def test_the_loss_is_that_of_each_decision_by_its_formula(decisions):
    network = random_network(NETWORK)
    settings = ImitationSettings(temperature=0.07, expected_cost_weight=0.5, similarity_weight=3.0)
    batch = decisions.batch(np.arange(0, len(decisions.calls), 2))
    with torch.no_grad():
        loss = imitation_loss(network, batch, settings)
        x, e = network.encode(batch.nodes, batch.edges, batch.mask)
        decided = zip(batch.call.tolist(), batch.remaining, strict=True)
        scores = torch.cat([network.score(x[[call]], e[[call]], stays[None]) for call, stays in decided]).double()
        guesses = network.similarity(e)[..., 0].double()
    of_decisions, squares, regrets = [], [], []
    for row in range(len(scores)):
        allowed = [i for i in range(scores.shape[1]) if not batch.costs[row, i].isinf()]
        costs = np.array([float(batch.costs[row, i]) for i in allowed]) / 0.07
        target = np.exp(costs.min() - costs) / np.exp(costs.min() - costs).sum()
        drop = np.exp([-float(scores[row, i]) for i in allowed])
        drop /= drop.sum()
        of_decisions.append(-(target * np.log(drop)).sum() + 0.5 * (drop * (costs - costs.min())).sum())
        regrets.append(0.07 * (costs[drop.argmax()] - costs.min()))
    for call in range(len(x)):
        count = int(batch.mask[call].sum())
        squares += ((guesses[call, :count, :count] - batch.similarity[call, :count, :count]) ** 2).flatten().tolist()
    assert len(batch) == len(scores) > len(x)
    assert float(loss) == pytest.approx(np.mean(of_decisions) + 3.0 * np.mean(squares), rel=1e-4)
    assert mean_regret(network, batch) == pytest.approx(np.mean(regrets), rel=1e-4)


def test_a_few_decisions_are_learned_exactly(decisions):
    network = fit([decisions], NETWORK, ImitationSettings(epochs=80, batch_size=8, learning_rate=1e-2), seed=0)
    torch.manual_seed(0)
    everything = decisions.batch(np.arange(len(decisions.calls)))
    before, after = (mean_regret(one, everything) for one in (RetentionNetwork(NETWORK).eval(), network))
    assert before > 0.03 and after < 0.15 * before


@pytest.mark.parametrize("stop_after", ["a pass", "a batch of the second pass"])
def test_a_fit_that_was_stopped_ends_as_the_whole_one_bit_for_bit(decisions, tmp_path, monkeypatch, stop_after):
    settings = dataclasses.replace(SETTINGS, epochs=3, batch_size=4)  # four batches a pass
    start = random_network(NETWORK).state_dict()
    for begin in (None, start):
        settings = dataclasses.replace(settings, round_epochs=3)
        whole = fit([decisions], NETWORK, settings, 5, begin).state_dict()
        calls, path = [], tmp_path / f"learning{begin is None}.ckpt"
        name = "save_tensors" if stop_after == "a pass" else "imitation_loss"
        original = getattr(imitation, name)

        def stopping(*arguments, original=original, calls=calls, name=name):
            result = original(*arguments)
            calls.append(1)
            if len(calls) == (1 if name == "save_tensors" else 5):
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(imitation, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                fit([decisions], NETWORK, settings, 5, begin, path)
        assert path.exists()
        resumed = fit([decisions], NETWORK, settings, 5, begin, path).state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in resumed.items())
        other = fit([decisions], NETWORK, settings, 6, begin).state_dict()
        assert not all(torch.equal(value, whole[key]) for key, value in other.items())


def run(folder, workloads, settings=SETTINGS, budgets=(2, 4), **options):
    return imitate(settings, NETWORK, workloads, budgets, folder, **{"seed": 0, "num_clips": 20, **options}).state_dict()


@pytest.fixture
def collections(monkeypatch):
    """Notes the arguments of every collection."""
    noted, original = [], imitation.collect

    def collecting(workload, clip_ids, budgets, *, actor, true_frames, **options):
        noted.append((workload.name, true_frames, actor is not None, list(clip_ids), list(budgets)))
        return original(workload, clip_ids, budgets, actor=actor, true_frames=true_frames, **options)

    monkeypatch.setattr(imitation, "collect", collecting)
    return noted


def test_expert_true_rounds_and_rollouts_follow_one_another_and_are_not_made_again(tiny_workload, tmp_path, collections):
    whole = run(tmp_path / "whole", [tiny_workload])
    assert [noted[:3] for noted in collections] == [
        ("tiny_pan", True, False),
        ("tiny_pan", True, True),
        ("tiny_pan", False, True),
    ]
    clips = [clip for noted in collections for clip in noted[3]]
    assert set(Counter(clips).values()) == {2} and len(set(clips)) == 7, "each under two budgets, and no clip twice"
    again = run(tmp_path / "whole", [tiny_workload])
    assert len(collections) == 3 and all(torch.equal(value, again[key]) for key, value in whole.items())
    parts = ["00_expert_tiny_pan", "01_true_tiny_pan", "02_rollouts_tiny_pan"]
    names = {"index.json", *(f"{part}.safetensors" for part in parts), *(f"scorer_{number:02d}.ckpt" for number in range(3))}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == names


@pytest.mark.parametrize("stop", ["save_weights", "save_tensors"])
def test_a_stage_stopped_anywhere_ends_with_the_same_scorer(tiny_workload, tmp_path, monkeypatch, stop):
    whole = run(tmp_path / "whole", [tiny_workload])
    original, stops = getattr(imitation, stop), 0
    for number in range(1, 4):

        def stopping(*arguments, left=[number]):  # noqa: B006  (counts)
            original(*arguments)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(imitation, stop, stopping)
            try:
                resumed = run(tmp_path / "stopped", [tiny_workload])
            except KeyboardInterrupt:
                stops += 1
    resumed = run(tmp_path / "stopped", [tiny_workload])
    assert stops >= 2 and all(torch.equal(value, whole[key]) for key, value in resumed.items())


@pytest.mark.parametrize(("budgets", "repeats"), [((2, 3, 4), 2), ((2, 3, 4, 5, 6, 8), 2), ((2, 4), 1), ((2, 3, 4, 5), 3)])
def test_every_budget_is_played_about_as_often_as_any_other(tiny_workload, tmp_path, monkeypatch, budgets, repeats):
    def stopped(workload, clip_ids, played, **_):
        assert Counter(clip_ids) == Counter({clip: repeats for clip in clip_ids})
        counts = Counter(played)
        assert set(counts) == set(budgets) and max(counts.values()) - min(counts.values()) <= 1
        raise KeyboardInterrupt

    monkeypatch.setattr(imitation, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        settings = dataclasses.replace(SETTINGS, true_clips=13, budgets_per_clip=repeats)
        run(tmp_path, [tiny_workload], settings, budgets)


def test_workloads_get_clips_of_equally_many_frames_in_all(tiny_workload, tiny_host, tmp_path, collections):
    longer = Workload("longer", WORLDS["orbit"], tiny_host, num_context=5, num_predict=27, num_steps=3)
    settings = dataclasses.replace(SETTINGS, true_clips=9, rounds=(), epochs=1)
    run(tmp_path, [tiny_workload, longer], settings, budgets=(4, 20))
    assert [(noted[0], len(set(noted[3])), sorted(set(noted[4]))) for noted in collections] == [
        ("tiny_pan", 6, [4]),
        ("longer", 3, [4, 20]),
    ], "its clips are twice as long; and a budget that decides nothing in a workload is left out there"
    assert not set(collections[0][3]) & set(collections[1][3])


def test_decisions_of_other_settings_and_damaged_ones_are_refused(tiny_workload, tmp_path):
    settings = dataclasses.replace(SETTINGS, rounds=(), epochs=1)
    run(tmp_path / "run", [tiny_workload], settings)
    for change in (
        {"settings": dataclasses.replace(settings, temperature=1.0)},
        {"budgets": (2, 6)},
        {"seed": 1},
        {"num_clips": 21},
        {"workloads": [dataclasses.replace(tiny_workload, feedback="true")]},
        {"workloads": [dataclasses.replace(tiny_workload, name="another")]},
    ):
        options = {"workloads": [tiny_workload], "settings": settings, **change}
        with pytest.raises(ValueError, match="contains decisions made with other settings"):
            run(tmp_path / "run", **options)
    with pytest.raises(ValueError, match="contains decisions made with other settings"):
        imitate(
            settings,
            dataclasses.replace(NETWORK, scaled=False),
            [tiny_workload],
            (2, 4),
            tmp_path / "run",
            seed=0,
            num_clips=20,
        )
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    (tmp_path / "damaged" / "scorer_00.ckpt").unlink()
    (tmp_path / "damaged" / "00_expert_tiny_pan.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"00_expert_tiny_pan\.safetensors cannot be read .*; delete it to collect it again"):
        run(tmp_path / "damaged", [tiny_workload], settings)


def test_a_stage_gives_the_scorer_of_its_settings(tiny_workload, tmp_path):
    settings = dataclasses.replace(SETTINGS, rounds=())
    config = AgentTraining(
        imitation=settings, network=NETWORK, ppo=PPOSettings(total_timesteps=0), train_clips=20, seed=0, budget="2,4"
    )
    weights = ImitationStage(config, [tiny_workload], (2, 4), tmp_path / "stage").run(None)
    expected = run(tmp_path / "own", [tiny_workload], settings)
    assert weights.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in weights.items())


def test_a_trained_scorer_may_decide_from_the_first_round_on(tiny_workload, tmp_path, collections):
    start = random_network(NETWORK)
    save_scorer(start, NETWORK, {}, tmp_path)
    settings = dataclasses.replace(SETTINGS, start=str(tmp_path), true_clips=0, rounds=("true 2",))
    for _ in range(2):  # the second finds all in place
        made = run(tmp_path / "stage", [tiny_workload], settings)
    assert [noted[1:3] for noted in collections] == [(True, True)]
    data = load_expert_data(tmp_path / "stage" / "01_true_tiny_pan.safetensors")
    again = collect(
        tiny_workload,
        collections[0][3],
        collections[0][4],
        actor=start.eval(),
        config=NETWORK,
        true_frames=True,
        progress=False,
        seed=int(np.random.default_rng((0, 1, 6)).integers(2**31)),
    )
    assert torch.equal(data.kept, again.kept), "it decided"
    expected = fit([GraphDecisions(data, NETWORK)], NETWORK, settings, 0, start.state_dict()).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in made.items())


def test_ppo_may_begin_with_a_trained_scorer_and_no_imitation(tiny_workload, tmp_path):
    start = random_network(NETWORK)
    save_scorer(start, NETWORK, {}, tmp_path)
    config = AgentTraining(imitation=ImitationSettings(start=str(tmp_path)), network=NETWORK, budget="2,4")
    planned = Run(config, [tiny_workload], (2, 4), tmp_path / "run", {})
    first, ppo = stages(planned)
    weights = first.run(None)
    assert isinstance(ppo, PPOStage) and all(torch.equal(weights[key], value) for key, value in start.state_dict().items())


def test_a_training_may_begin_with_a_scorer_of_fewer_layers_but_not_of_more(tmp_path):
    save_scorer(random_network(NETWORK), NETWORK, {}, tmp_path)
    two_layers = dataclasses.replace(NETWORK, num_layers=2)
    weights, own = imitation.starting_weights(str(tmp_path), two_layers), random_network(NETWORK).state_dict()
    assert weights.keys() == RetentionNetwork(two_layers).state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in own.items())
    (tmp_path / "two").mkdir()
    save_scorer(random_network(two_layers), two_layers, {}, tmp_path / "two")
    for config in (NETWORK, dataclasses.replace(two_layers, width=32)):
        with pytest.raises(ValueError, match="the same settings, with as many layers or more"):
            imitation.starting_weights(str(tmp_path / "two"), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": ("true 1",)}, "the scorer must have learned before it decides: set true_clips above 0, or start"),
        ({"true_clips": -1}, "true_clips cannot be negative, got -1"),
        ({"expected_cost_weight": -1.0}, "expected_cost_weight and similarity_weight cannot be negative, got -1.0 and 1.0"),
        ({"true_clips": 1, "rounds": ("true 1", "other 5")}, "such as 'true 500', got 'other 5'"),
        ({"true_clips": 1, "rounds": ("true 0",)}, "such as 'true 500', got 'true 0'"),
        ({"true_clips": 1, "rounds": ("rollouts",)}, "such as 'true 500', got 'rollouts'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImitationSettings(**options)
