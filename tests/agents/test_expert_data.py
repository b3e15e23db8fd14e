"""Collected decisions: their costs against loops over cells, who decides, and what the seed determines."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from far_env.agents import expert, expert_data
from far_env.agents.collection import collect
from far_env.agents.config import NetworkConfig
from far_env.agents.expert_data import CALLS_PER_ROLLOUT, ExpertData
from far_env.agents.histories import TrueHistories
from far_env.agents.oracle import search
from far_env.agents.policies import AgentPolicy
from far_env.clips.clip import Clip
from far_env.frame_meta import frame_features
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.workload import Workload
from tests.agents.test_network import random_network

CONFIG = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)


def gather(workload, ids, budgets, actor=None, config=CONFIG, true_frames=True, **options) -> ExpertData:
    return collect(workload, ids, budgets, actor=actor, config=config, true_frames=true_frames, progress=False, **options)


def histories_of(data: ExpertData, workload: Workload) -> list[list[int]]:
    """True numbers of the frames in the history of every call, played again from the frames that stayed."""
    histories, call = [], 0
    for rollout in range(len(data.max_frames)):
        kept = list(range(workload.num_context))
        for step in range(workload.num_predict - 1):
            kept.append(workload.num_context + step)
            if len(kept) > int(data.max_frames[rollout]):
                assert (int(data.rollout[call]), int(data.step[call])) == (rollout, step)
                assert int(data.length[call]) == len(kept)
                histories.append(list(kept))
                kept = [number for number, stays in zip(kept, data.kept[call].tolist(), strict=False) if stays]
                call += 1
    assert call == len(data.step)
    return histories


def kept_numbers(data: ExpertData, workload: Workload) -> list[tuple[int, ...]]:
    """True numbers of the frames that stayed in every call."""
    histories = histories_of(data, workload)
    return [tuple(np.array(h)[stays[: len(h)].numpy()].tolist()) for h, stays in zip(histories, data.kept, strict=True)]


@torch.no_grad()
def true_latents(workload: Workload, clip_id: int) -> np.ndarray:
    frames = torch.from_numpy(workload.clips.clip("train", clip_id).frames[: workload.num_frames])
    return workload.host.autoencoder.encode(frames[None])[0].double().numpy()


def cells(latent: np.ndarray) -> np.ndarray:
    return latent.reshape(len(latent), -1).T


def costs_by_loops(workload, truth: np.ndarray, seen: np.ndarray, left: list[int], newest: int) -> list[float]:
    """The logarithm of the expected error after dropping each frame but the newest, cell by cell."""
    unit = truth.var(ddof=1) * truth[0].size * workload.num_predict
    result = []
    for dropped in left[:-1]:
        sources = np.concatenate([cells(seen[number]) for number in left if number != dropped])
        total, errors = 0.0, None
        for coming in range(newest + 1, workload.num_frames):
            previous, errors_before, errors = cells(truth[coming - 1]), errors, []
            for cell in cells(truth[coming]):
                error = ((sources - cell) ** 2).sum(axis=1).min()
                distances = ((previous - cell) ** 2).sum(axis=1)
                if workload.true_feedback:
                    error = min(error, distances.min())
                elif errors_before is not None:
                    error = min(error, distances.min() + errors_before[distances.argmin()])
                errors.append(error)
            total += sum(errors)
        result.append(np.log(total / unit + 0.01))
    return result


def check_costs(data: ExpertData, workload: Workload, truths: list[np.ndarray], seen: list[np.ndarray], every: int = 1) -> int:
    """Compare recorded costs with those by loops."""
    histories, checked = histories_of(data, workload), 0
    for index in range(0, len(data), every):
        call = int(data.call[index])
        rollout, numbers = int(data.rollout[call]), histories[call]
        stays = data.remaining[index].numpy()
        assert not stays[len(numbers) :].any() and stays[len(numbers) - 1] and stays.sum() > int(data.max_frames[rollout])
        left = [number for number, remains in zip(numbers, stays, strict=False) if remains]
        expected = np.full(len(stays), np.inf)
        expected[np.flatnonzero(stays)[:-1]] = costs_by_loops(workload, truths[rollout], seen[rollout], left, numbers[-1])
        np.testing.assert_allclose(data.costs[index].numpy(), expected, atol=2e-3)
        checked += 1
    return checked


IDS, BUDGETS = [2, 7, 2, 2], [2, 8, 4, 1]


@pytest.fixture(scope="module")
def collected(tiny_workload) -> ExpertData:
    return gather(tiny_workload, IDS, BUDGETS)


def test_costs_are_those_of_loops_over_cells_for_a_clip_under_several_budgets_too(collected, tiny_workload):
    truths = [true_latents(tiny_workload, clip_id) for clip_id in IDS]
    assert check_costs(collected, tiny_workload, truths, truths, every=2) >= 10
    assert collected.max_frames.tolist() == BUDGETS and collected.total_steps.tolist() == [11]
    assert collected.kept.dtype == collected.remaining.dtype == torch.bool and collected.similarity.dtype == torch.float16


@torch.no_grad()
def test_in_rollouts_costs_are_of_what_the_host_generated_and_the_actor_decides(tiny_workload):
    actor = random_network(CONFIG)
    data = gather(tiny_workload, [2, 2, 5], [2, 4, 4], actor, true_frames=False)
    clips = [tiny_workload.clips.clip("train", clip_id) for clip_id in (2, 2, 5)]
    rollouts, decisions = play(tiny_workload, clips, [BENCHMARK_SEED + i for i in (2, 2, 5)], AgentPolicy(actor), [2, 4, 4])
    truths = [true_latents(tiny_workload, clip_id) for clip_id in (2, 2, 5)]
    generated = rollouts.generated(range(3)).double().numpy()
    seen = [np.concatenate([truth[:5], own]) for truth, own in zip(truths, generated, strict=True)]
    assert check_costs(data, tiny_workload, truths, seen, every=1) >= 10
    kept = list(zip(data.rollout.tolist(), data.step.tolist(), kept_numbers(data, tiny_workload), strict=True))
    assert kept == [(row, d.step, d.kept) for row, of_row in enumerate(decisions) for d in of_row if d.step < 10]
    # the features are those of generated frames too
    first = data.features[int((data.rollout == 1).nonzero()[0]), :6]
    torch.testing.assert_close(first, frame_features(torch.from_numpy(seen[1][:6]).float()[None])[0], atol=1e-4, rtol=1e-4)


def test_the_expert_drops_what_costs_least_and_sometimes_another(tiny_workload, monkeypatch):
    def cheapest(data):
        """Whether the frame of each recorded single eviction that went was the one with the lowest cost."""
        single = [
            index
            for index in range(len(data))
            if data.remaining[index].sum() == data.max_frames[data.rollout[data.call[index]]] + 1
        ]
        for index in single:
            gone = data.remaining[index] & ~data.kept[data.call[index]]
            assert gone.sum() == 1
            yield bool(gone.nonzero()[0] == data.costs[index].argmin())

    data = gather(tiny_workload, list(range(12)), [4] * 12)
    share = np.mean(list(cheapest(data)))
    assert 0.75 < share < 0.99, "a random frame is dropped in 15 %, which may be the cheapest"
    monkeypatch.setattr(expert, "EXPLORATION_PROBABILITY", 0.0)
    data = gather(tiny_workload, [0, 1], [4, 4])
    assert all(cheapest(data))
    rollouts = search(
        dataclasses.replace(tiny_workload, feedback="true"),
        [tiny_workload.clips.clip("train", i) for i in (0, 1)],
        [0, 0],
        4,
        width=1,
        branches=1,
        progress=False,
    )
    assert [len(rollout.decisions) for rollout in rollouts] == [10, 10]
    kept = kept_numbers(data, tiny_workload)[10]
    assert len(kept) == 4 and len(set(kept) & set(rollouts[1].decisions[0].kept)) >= 3, (
        "one after the other is nearly the best set"
    )


def test_nothing_is_inherited_from_true_frames_that_are_fed_back(tiny_workload):
    workload = dataclasses.replace(tiny_workload, feedback="true")
    data = gather(workload, IDS[:2], BUDGETS[:2])
    truths = [true_latents(workload, clip_id) for clip_id in IDS[:2]]
    assert check_costs(data, workload, truths, truths) >= 8


def test_the_first_call_and_some_others_are_recorded_with_the_last_evictions_and_some_others(tiny_workload, monkeypatch):
    monkeypatch.setattr(expert, "OTHER_EVICTIONS", 1)
    # of six frames at first, budgets of 2, 4 and 1 drop four, two and five; 8 drops one in the fourth step; then one a step
    evictions, calls = np.array([4, 1, 2, 5]), np.array([10, 7, 10, 10])
    for limit in (CALLS_PER_ROLLOUT, 7, 20):
        monkeypatch.setattr(expert_data, "CALLS_PER_ROLLOUT", limit)
        data = gather(tiny_workload, IDS, BUDGETS)
        decisions = np.bincount(data.rollout[data.call].numpy(), minlength=4)
        assert decisions.tolist() == (np.minimum(evictions, 5) + np.minimum(calls, limit) - 1).tolist()
        called, first = data.call.numpy(), np.searchsorted(data.rollout.numpy(), range(4))
        assert set(first) <= set(called), "the first call of each rollout"
        sizes = data.remaining.sum(dim=1).numpy()
        for rollout, budget in enumerate(BUDGETS):
            of_first = sizes[called == first[rollout]] - budget
            assert sorted(of_first)[:4] == list(range(1, 1 + min(4, evictions[rollout]))), "down to the budget"
        assert len(data) == len({(call, stays.numpy().tobytes()) for call, stays in zip(called, data.remaining, strict=True)})
        data_order = data.rollout[data.call].tolist()
        assert data_order == sorted(data_order)


def test_early_calls_are_recorded_more_often():
    generators = [np.random.default_rng(seed) for seed in range(4000)]
    chosen = expert_data._some_calls(np.repeat(np.arange(4000), 5), generators, CALLS_PER_ROLLOUT)
    counts = np.bincount(chosen % 5, minlength=5)
    assert len(chosen) == 4 * 4000 and counts[0] == 4000
    # Three of four others are drawn one after the other, with weights of 4, 3, 2 and 1.
    weights, exact = np.array([4, 3, 2, 1]) / 10, np.zeros(4)
    for drawn in itertools.permutations(range(4), 3):
        left = 1 - np.cumsum([0, *weights[list(drawn[:2])]])
        exact[list(drawn)] += np.prod(weights[list(drawn)] / left)
    np.testing.assert_allclose(counts[1:] / 4000, exact, atol=0.03)


@pytest.mark.parametrize("true_frames", [True, False])
def test_the_seed_determines_all_whatever_the_batch_size(tiny_workload, true_frames):
    actor = None if true_frames else random_network(CONFIG)
    options = {"actor": actor, "true_frames": true_frames}
    data, *others = (gather(tiny_workload, IDS, BUDGETS, batch_size=size, **options) for size in (4, 1, 3))
    for other in others:
        for name, value in vars(data).items():
            if value.is_floating_point():
                torch.testing.assert_close(getattr(other, name), value, atol=1e-3, rtol=1e-3)
            else:
                assert torch.equal(getattr(other, name), value), name
    another = gather(tiny_workload, IDS, BUDGETS, seed=1, **options)
    assert not torch.equal(another.call, data.call) or not torch.equal(another.remaining, data.remaining)


def test_signals_and_features_are_those_of_the_histories(tiny_workload):
    config = dataclasses.replace(CONFIG, signals=("lat_cos",))
    data = gather(tiny_workload, [3], [3], config=config)
    latents = torch.from_numpy(true_latents(tiny_workload, 3)).float()
    for call, numbers in enumerate(histories_of(data, tiny_workload)):
        n = len(numbers)
        torch.testing.assert_close(data.features[call, :n], frame_features(latents[numbers][None])[0], atol=1e-5, rtol=1e-4)
        flat = latents[numbers].flatten(1)
        cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        torch.testing.assert_close(data.pair_signals[call, :n, :n], cosines[..., None], atol=1e-4, rtol=1e-3)
        assert not data.features[call, n:].any() and not data.pair_signals[call, n:].any()
    with pytest.raises(ValueError, match="no signal but lat_cos"):
        gather(tiny_workload, [0], [4], config=dataclasses.replace(CONFIG, signals=("attn_mass",)))


def test_the_similarity_of_frames_falls_with_the_distance_of_their_cells(collected, tiny_workload):
    for row, clip_id in enumerate(IDS):
        latents = true_latents(tiny_workload, clip_id)
        distances = np.array(
            [
                [np.mean([((cells(source) - c) ** 2).sum(axis=1).min() for c in cells(target)]) for source in latents]
                for target in latents
            ]
        )
        np.testing.assert_allclose(collected.similarity[row].float(), np.exp(-distances / distances.mean()), atol=2e-3)


def test_with_feedback_of_true_frames_the_engine_would_record_the_same(tiny_workload, monkeypatch):
    """Decisions are collected without a host there, unless a signal needs it."""
    workload = dataclasses.replace(tiny_workload, feedback="true")
    with monkeypatch.context() as patch:
        patch.setattr(RolloutBatch, "advance", lambda *_: pytest.fail("generates frames"))
        quick = gather(workload, [0, 1, 2], [4, 4, 2], true_frames=False)
    monkeypatch.setattr(TrueHistories, "SIGNALS", ())
    monkeypatch.setattr(TrueHistories, "advance", lambda *_: pytest.fail("generates no frames"))
    config = dataclasses.replace(CONFIG, signals=("lat_cos",))
    slow = gather(workload, [0, 1, 2], [4, 4, 2], config=config, true_frames=False)
    assert torch.equal(quick.kept, slow.kept) and torch.equal(quick.call, slow.call)
    torch.testing.assert_close(quick.costs, slow.costs, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(quick.features, slow.features, atol=1e-4, rtol=1e-4)


class Colours(torch.nn.Module):
    """An autoencoder whose cells are the mean colours of squares of eight pixels."""

    def encode(self, frames):
        return torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 8).unflatten(0, frames.shape[:2])


def zoomed(picture: torch.Tensor) -> torch.Tensor:
    return picture[:, 16:48, 8:40].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


MOVES = {
    "down": lambda picture: picture.roll(24, dims=1),
    "to the left": lambda picture: picture.roll(-16, dims=2),
    "turned by 90 degrees": lambda picture: picture.rot90(1, dims=(1, 2)),
    "turned by 180 degrees": lambda picture: picture.rot90(2, dims=(1, 2)),
    "zoomed in": zoomed,
}


class MovedPictures:
    """Clips of random pictures; frames 6, 8 and 10 are frame 1, moved."""

    name, size = "moved", 64

    def __init__(self, move) -> None:
        self.move = move

    def clip(self, split: str, clip_id: int) -> Clip:
        colours = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(clip_id))
        frames = colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        frames[[6, 8, 10]] = self.move(frames[1])
        return Clip(clip_id, frames.numpy())


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_expert_keeps_a_frame_that_comes_again_moved_zoomed_or_turned(tiny_host, move, monkeypatch):
    monkeypatch.setattr(expert, "EXPLORATION_PROBABILITY", 0.0)
    host = dataclasses.replace(tiny_host, autoencoder=Colours())
    workload = Workload("moved", MovedPictures(move), host, num_context=5, num_predict=6, num_steps=3)
    data = gather(workload, [0, 1, 2], [2, 2, 2])
    kept = kept_numbers(data, workload)
    # Frames 6 and 8 can stand for frame 1 once they have come.
    assert [kept[5 * rollout] for rollout in range(3)] == [(1, 5)] * 3
    assert all({1, 6, 8} & set(numbers) for numbers in kept)
    costs = data.costs[(data.step[data.call] == 0) & data.remaining[:, 1]]
    others = costs[:, [0, 2, 3, 4]].nan_to_num(posinf=-9.0)
    assert len(costs) >= 9 and (costs[:, 1] > others.amax(dim=1) + 0.1).all()
    similarity = data.similarity[0].float()
    assert similarity[6, 1] > 0.99 and (similarity[6, [0, 2, 3, 4, 5]] < 0.8).all()


@torch.no_grad()
def test_histories_of_true_frames_are_rollouts_of_a_perfect_host(tiny_workload):
    """Same features and signals as of rollouts whose generated frames are replaced by the true ones."""
    clips = [tiny_workload.clips.clip("train", i) for i in (0, 1)]
    latents = torch.stack([tiny_workload.host.autoencoder.encode(torch.from_numpy(clip.frames)[None])[0] for clip in clips])
    true, rolled = TrueHistories(latents, 5), RolloutBatch(tiny_workload, 2, signals=("lat_cos",))
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
