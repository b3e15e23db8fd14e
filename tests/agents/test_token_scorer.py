"""A scorer of token memories: what reductions cost, and one choice in training, environment and streaming rollouts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecMonitor

from far_env.agents.checkpoints import save_scorer
from far_env.agents.collection import collect
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.agents.dry_run import dry_run
from far_env.agents.eviction_policy import EvictionPolicy
from far_env.agents.graph_decisions import GraphDecisions
from far_env.agents.imitation import fit, mean_regret, starting_weights
from far_env.agents.network import make_network, network_with_weights, token_weights
from far_env.agents.policies import numpy_scorer
from far_env.agents.token_env import ReductionVecEnv
from far_env.agents.token_expert import TokenExpert, TrueTokenMemory, compressed_latents
from far_env.agents.token_policy import LearnedTokenPolicy
from far_env.agents.token_reductions import REDUCTIONS, Reductions
from far_env.agents.trainer import train
from far_env.cli import main
from far_env.envs.token_env import TokenRetentionEnv
from far_env.frame_meta import frame_features
from far_env.host.blocks import patchify
from far_env.metrics import clip_metrics
from far_env.policies import load_policy, load_token_policy, token_policy_facts, token_policy_names
from far_env.rollout.context import true_units
from far_env.rollout.frame_actions import COMPRESS, DROP, KEEP, granted
from far_env.rollout.streaming import play_streaming
from far_env.tensor_files import load_tensors, save_tensors
from tests.agents.stopping import stopped_after_checkpoints

NETWORK = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2, memory="tokens")
FULL, SMALL, BUDGET = 16, 4, 60
"""Tokens of a frame and of a compressed one; a budget in which both are needed."""


@pytest.fixture(scope="module")
def network():
    """A scorer with random weights that chooses dropping and compressing about as often."""
    torch.manual_seed(4)
    network = make_network(NETWORK).eval()
    for name, parameter in network.named_parameters():
        if name.startswith(("head", "embed_share")):
            torch.nn.init.normal_(parameter)
    return network


def test_compressed_latents_are_embedded_as_the_mean_of_2x2_tokens(tiny_host):
    model, latents = tiny_host.transformer, torch.randn(3, *tiny_host.latent_shape)
    tokens = model.x_embedder(patchify(latents[:, None], model.patch_size)[:, 0]).unflatten(1, (2, 2, 2, 2))
    small = compressed_latents(latents, model.patch_size)
    found = model.x_embedder(patchify(small[:, None], model.patch_size)[:, 0])
    assert torch.allclose(found, tokens.mean(dim=(2, 4)).flatten(1, 2), atol=1e-5)


def test_reductions_fit_and_are_granted_as_they_are():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = [*rng.choice([FULL, SMALL], 7).tolist(), FULL]
        reductions = Reductions(sizes, FULL, 40)
        while not reductions.done:
            allowed, freed, before = reductions.allowed(), reductions.freed(), reductions.sizes.sum()
            index, reduction = rng.choice(np.argwhere(allowed))
            reductions.reduce(index, REDUCTIONS[reduction])
            assert before - reductions.sizes.sum() == freed[index, reduction] > 0
        actions = reductions.actions()
        assert actions[-1] == KEEP and granted(actions, sizes, FULL, 40) == actions
        held = [(0, SMALL, FULL)[action] for action in actions]
        assert held == reductions.sizes.tolist() and all(h in (0, min(s, h)) for h, s in zip(held, sizes, strict=True))


@pytest.mark.parametrize("feedback", [False, True])
def test_what_a_reduction_costs_is_how_much_it_raises_the_error_per_frame_that_it_frees(feedback):
    """Against loops over cells, with another way to compress."""
    torch.manual_seed(0)
    latents, context = torch.randn(9, 3, 4, 4), 5
    expert = TokenExpert(latents, context, patch_size=1, feedback=feedback)

    def cells(latent):
        return latent.flatten(1).T

    def nearest(cell, sources):
        distances = (sources - cell).square().sum(dim=1)
        return float(distances.min()), int(distances.argmin())

    def log_error(held, newest):
        total, before = 0.0, None
        for number in range(max(context, newest + 1), 9):
            errors = []
            for cell in cells(latents[number]):
                own = min(nearest(cell, source)[0] for source in held)
                previous, place = nearest(cell, cells(latents[number - 1]))
                inherited = 0.0 if feedback else None if before is None else before[place]
                errors.append(own if inherited is None else min(own, previous + inherited))
            before, total = errors, total + sum(errors)
        unit = float(latents.var()) * latents[context:].numel()
        return np.log(total / unit + 0.01)

    for numbers, sizes in (([0, 1, 2, 3], [16, 4, 16, 16]), ([0, 2, 4, 5, 6], [4, 16, 16, 16, 16])):
        for number in numbers:
            expert.see(number, latents[number])
        newest, small = numbers[-1], {n: latents[n].reshape(3, 2, 2, 2, 2).mean(dim=(2, 4)) for n in numbers}
        to_come = [cells(latents[n]) for n in range(newest + 1, context)]

        def held(kinds, numbers=numbers, to_come=to_come, small=small):
            present = [(n, kind) for n, kind in zip(numbers, kinds, strict=True) if kind]
            return [*(cells(latents[n] if kind == FULL else small[n]) for n, kind in present), *to_come]

        costs, now = expert.costs(numbers, Reductions(sizes, FULL, 20)), log_error(held(sizes), newest)
        for index, (column, left) in itertools.product(range(len(numbers)), enumerate((0, SMALL))):
            if index == len(numbers) - 1 or sizes[index] <= left:
                assert np.isinf(costs[index, column])
                continue
            after = log_error(held([*sizes[:index], left, *sizes[index + 1 :]]), newest)
            assert costs[index, column] == pytest.approx((after - now) * FULL / (sizes[index] - left), rel=1e-3, abs=1e-5)


def test_a_memory_of_true_frames_is_that_of_an_episode_with_true_frames_fed_back(tiny_workload):
    workload = replace(tiny_workload, feedback="true")
    env = TokenRetentionEnv(workload, BUDGET)
    env.reset(options={"clip_id": 3})
    latents = true_units(workload, [workload.clips.clip("train", 3)])[0]
    memory, rng = TrueTokenMemory(latents, FULL, BUDGET), np.random.default_rng(1)
    memory.run()
    while not memory.ended:
        episode = env.episode
        assert (memory.frames(), memory.sizes(), memory.newest) == (episode.frames(), episode.sizes(), episode.newest)
        np.testing.assert_allclose(memory.features(), episode.features(), atol=1e-5)
        reductions = Reductions(memory.sizes(), FULL, BUDGET)
        while not reductions.done:
            index, reduction = rng.choice(np.argwhere(reductions.allowed()))
            reductions.reduce(index, REDUCTIONS[reduction])
        action = np.array([DROP] * (episode.num_slots - len(reductions.sizes)) + reductions.actions())
        memory.retain(action)
        memory.run()
        env.step(action)
    assert env.episode.ended


def collected(workload, network=None, true_frames=True, batch_size=2):
    options = {"actor": network, "config": NETWORK, "true_frames": true_frames, "progress": False}
    return collect(workload, [0, 1, 2], [BUDGET, 32, 100], batch_size=batch_size, **options)


@pytest.mark.parametrize("true_frames", [True, False])
def test_decisions_are_collected_whatever_the_batches(tiny_workload, network, true_frames):
    for actor in (None, network):
        data, again = (collected(tiny_workload, actor, true_frames, size) for size in (2, 3))
        assert all(torch.equal(value, getattr(again, name)) for name, value in vars(data).items())
        assert data.costs.shape == (*data.remaining.shape, 2) and {0, 0.25, 1} == set(data.remaining.unique().tolist())
        assert data.max_frames.tolist() == [60 / 16, 2, 100 / 16]


def test_the_experts_choices_are_learned(tiny_workload):
    data = GraphDecisions(collected(tiny_workload), NETWORK)
    settings = ImitationSettings(epochs=60, batch_size=8, learning_rate=1e-2)
    torch.manual_seed(0)
    everything = data.batch(np.arange(len(data.calls)))
    before, after = (mean_regret(one, everything) for one in (make_network(NETWORK).eval(), fit([data], NETWORK, settings, 0)))
    assert before > 0.01 and after < 0.4 * before


def vec_env(workload, rows=2, **options):
    options = {"split": "test", "num_clips": 3, "telescoping": True, **options}
    return ReductionVecEnv([TokenRetentionEnv(workload, [36, BUDGET], **options) for _ in range(rows)], NETWORK)


def test_reset_options_hold_for_the_rows_that_they_are_set_for_and_once(tiny_workload):
    env = vec_env(tiny_workload)
    env.seed(0)
    env.set_options([{"clip_id": 2, "noise_seed": 7}, {"budget": 36}])
    env.reset()
    first, second = env.reset_infos
    assert (first["clip_id"], first["noise_seed"], second["token_budget"]) == (2, 7, 36)
    env.seed(0)
    env.reset()
    assert env.reset_infos[0]["noise_seed"] != 7


def test_a_clip_without_content_has_costs(tiny_workload):
    """All its frames are the same, so that dropping one costs nothing."""
    expert = TokenExpert(torch.ones(6, *tiny_workload.host.latent_shape), 3, 1, feedback=False)
    costs = expert.costs([0, 1, 2], Reductions([16, 16, 16], 16, 32))
    assert (costs[:2] == 0).all() and np.isinf(costs[2]).all()


@pytest.mark.parametrize("kind", ["plain", "long"])
def test_ppos_policy_acts_in_the_environment_as_in_a_streaming_rollout(tiny_workload, tiny_hosts, network, kind):
    workload = replace(tiny_workload, host=tiny_hosts[kind])
    env = vec_env(workload)
    model = MaskablePPO(EvictionPolicy, VecMonitor(env), policy_kwargs={"network": NETWORK}, n_steps=4, batch_size=4)
    model.policy.scorer.load_state_dict(network.state_dict())
    env.seed(0)
    observations, returns, ended, used = env.reset(), np.zeros(2), [False, False], set()
    first = [(each.episode.clip.clip_id, each.episode.noise_seed, each.episode.budget) for each in env.envs]
    decisions = [[], []]
    while not all(ended):
        masks = env.action_masks()
        actions, _ = model.predict(observations, deterministic=True, action_masks=masks)
        assert masks[np.arange(2), actions].all()
        for row in range(2):
            if not ended[row]:
                decisions[row] = list(env.envs[row].episode.decisions)
                used.update(REDUCTIONS[action % 2] for action in [actions[row]])
        observations, rewards, dones, infos = env.step(actions)
        for row in np.flatnonzero(dones):
            if not ended[row]:
                ended[row], returns[row] = True, returns[row] + rewards[row]
                assert returns[row] == pytest.approx(infos[row]["psnr"], abs=1e-3)
        returns += np.where(ended, 0, rewards)
    assert used == {DROP, COMPRESS}
    for row, (clip_id, noise_seed, budget) in enumerate(first):
        clip = workload.clips.clip("test", clip_id)
        (rollout,) = play_streaming(workload, [clip], [noise_seed], LearnedTokenPolicy(network), budget)
        kept = [(decision.step, list(decision.full)) for decision in rollout.decisions]
        # The last decision of an episode is made in the step that ends it.
        assert decisions[row] == kept[: len(decisions[row])] and len(kept) - len(decisions[row]) in (0, 1)
        (metrics,) = clip_metrics(
            workload.host.autoencoder.decode(rollout.latents[None]), torch.from_numpy(clip.frames[5:])[None], ["psnr"]
        )
        assert returns[row] == pytest.approx(metrics["psnr"], abs=1e-3)


def test_a_learned_policy_plays_a_clip_alone_as_among_others(tiny_workload, network):
    clips = [tiny_workload.clips.clip("test", i) for i in range(3)]
    together = play_streaming(tiny_workload, clips, [1, 2, 3], LearnedTokenPolicy(network), BUDGET)
    for clip, seed, rollout in zip(clips, [1, 2, 3], together, strict=True):
        (alone,) = play_streaming(tiny_workload, [clip], [seed], LearnedTokenPolicy(network), BUDGET)
        kept = [set(decision.full) for decision in alone.decisions]
        assert kept == [set(decision.full) for decision in rollout.decisions]
        assert torch.allclose(alone.latents, rollout.latents, atol=1e-4)


def test_a_scorer_of_whole_frames_begins_as_it_drops(tiny_workload, tmp_path):
    """Against the decisions of the scorer in NumPy, as the benchmark's policies make them."""
    frames = replace(NETWORK, memory="frames")
    torch.manual_seed(1)
    scorer = make_network(frames)
    torch.nn.init.normal_(scorer.head.weight, std=0.1)
    policy = LearnedTokenPolicy(network_with_weights(NETWORK, token_weights(scorer, NETWORK)))
    clip = tiny_workload.clips.clip("test", 0)
    (rollout,) = play_streaming(tiny_workload, [clip], [1], policy, 3 * FULL)
    given = true_units(tiny_workload, [clip])[0, :5]
    latents, kept, runtime = torch.cat([given, rollout.latents]), [0, 1, 2], numpy_scorer(scorer)
    for decision in rollout.decisions:
        kept.append(5 + decision.step)
        features = frame_features(latents[kept][None])[0].numpy()
        kept = [kept[i] for i in runtime.choose(features, decision.step, 11, 3)]
        assert decision.full == tuple(kept) and decision.coarse == ()
    assert kept != [13, 14, 15] and len(rollout.decisions) == 12
    with pytest.raises(ValueError, match="the network of pretrained/general is not that of this run"):
        starting_weights("pretrained/general", NETWORK)
    started, shipped = starting_weights("pretrained/general", NetworkConfig(memory="tokens")), "pretrained/general"
    assert shipped in token_policy_names()
    assert all(torch.equal(value, started[key]) for key, value in load_token_policy(shipped).network.state_dict().items())
    with_signals = replace(frames, signals=("lat_cos",))
    save_scorer(make_network(with_signals), with_signals, {}, tmp_path)
    with pytest.raises(ValueError, match="reads lat_cos, which a token memory does not have"):
        load_token_policy(str(tmp_path))


def test_environments_return_to_a_state(tiny_workload, tmp_path):
    env, rng = vec_env(tiny_workload, split="train"), np.random.default_rng(0)
    env.seed(5)
    env.reset()

    def actions(masks):
        return np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])

    for _ in range(9):
        env.step(actions(env.action_masks()))
    save_tensors(tmp_path / "state.ckpt", {"envs": env.env_states(), "graphs": env.state_dict()})
    other, saved = vec_env(tiny_workload, split="train"), load_tensors(tmp_path / "state.ckpt")
    other.load_env_states(saved["envs"])
    other.load_state_dict(saved["graphs"])
    for _ in range(25):  # past the end of an episode, whose next clip is drawn
        masks = env.action_masks()
        assert np.array_equal(masks, other.action_masks())
        chosen = actions(masks)
        one, two = env.step(chosen), other.step(chosen)
        assert all(np.array_equal(value, two[0][name]) for name, value in one[0].items())
        assert np.array_equal(one[1], two[1]) and np.array_equal(one[2], two[2])


def config(host, folder, **changes):
    small = {"num_envs": 2, "n_steps": 8, "batch_size": 8, "n_epochs": 1}
    return AgentTraining(
        imitation=ImitationSettings(true_clips=2, rounds=("true 2", "rollouts 2"), epochs=1, round_epochs=1),
        ppo=PPOSettings(total_timesteps=48, **small),
        network=NETWORK,
        workload="pan",
        budget="48,100",
        host=str(host),
        device="cpu",
        run_dir=str(folder),
        train_clips=8,
        validation_clips=2,
        validate_every=2,
        test_clips=2,
        table=("recent_fill", "full_history"),
        resume=True,
        **changes,
    )


def test_a_training_is_resumed_loaded_and_played(tiny_host_folder, tmp_path, capsys):
    train(config(tiny_host_folder, tmp_path / "whole"))
    output = capsys.readouterr().out
    assert "budget 48 tokens" in output and "learned" in output and "--memory tokens" in output
    with stopped_after_checkpoints(2), pytest.raises(KeyboardInterrupt):
        train(config(tiny_host_folder, tmp_path / "stopped"))
    train(config(tiny_host_folder, tmp_path / "stopped"))
    before, after = (load_tensors(tmp_path / name / "checkpoint.ckpt") for name in ("whole", "stopped"))
    assert all(torch.equal(value, after["policy"][name]) for name, value in before["policy"].items())

    name = str(tmp_path / "whole")
    assert isinstance(load_token_policy(name), LearnedTokenPolicy)
    assert token_policy_facts(name)["family"] == "learned"
    with pytest.raises(ValueError, match="was trained for a token memory: play it with --memory tokens"):
        load_policy(name)
    out, options = tmp_path / "results", ["--device", "cpu", "--host", str(tiny_host_folder), "--workload", "pan"]
    played = ["--memory", "tokens", "--budget", "48", "--policies", f"recent_fill,{name}", "--clips", "2", "--out", str(out)]
    assert main(["evaluate", *options, *played]) == 0
    assert main(["validate", str(out), "--sample", "4"]) == 0
    assert main(["export", name, "--out", str(tmp_path / "policy.py")]) == 2


def test_settings_that_a_token_memory_does_not_have_are_refused(tiny_host_folder, tmp_path):
    for changes, message in (
        ({"surrogate": PPOSettings(total_timesteps=8)}, "surrogate.total_timesteps is 8, which a training for a token memory"),
        ({"network": {"signals": ("lat_cos",)}}, "a scorer of a token memory reads no signals"),
        ({"network": {"memory": "pages"}}, "unknown memory 'pages'"),
    ):
        with pytest.raises(ValueError, match=message):
            if "network" in changes:
                replace(NETWORK, **changes["network"])
            else:
                config(tiny_host_folder, tmp_path, **changes)
    with pytest.raises(ValueError, match="leaves nothing to decide in pan"):
        train(replace(config(tiny_host_folder, tmp_path / "run"), budget="300"))
    with pytest.raises(ValueError, match="the cost of a training for a token memory is not estimated"):
        dry_run(config(tiny_host_folder, tmp_path / "run"))
