"""Rollouts with CUDA graphs: the engine uses one where a history stays as long, and generates what it does without.

On a CPU a pass is repeated as a graph repeats it: from inputs and into an output that stay in place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.clips.clip import Clip
from far_env.clips.worlds import WORLDS
from far_env.contract import NewestFrames
from far_env.host.cuda_graphs import CudaGraphs
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from tests.conftest import TINY_FAR, randomise, repeated_in_place
from tests.rollout.test_engine import Drops


class Counting:
    """Makes graphs, and notes the (rows, kept frames) of each time one is repeated."""

    def __init__(self):
        self.made, self.repeated = 0, []

    def __call__(self, compute):
        repeat, inputs = repeated_in_place(compute), compute.__self__._kept
        self.made += 1

        def noted():
            self.repeated.append(tuple(inputs.shape[:2]))
            return repeat()

        return noted


class NamedClips:
    """Clips of a world with random actions and a label."""

    name, size = "named", 64

    def clip(self, split, clip_id):
        rng = np.random.default_rng(clip_id)
        return Clip(clip_id, WORLDS["pan"].clip(split, clip_id).frames, rng.integers(0, 3, 16), label=int(rng.integers(0, 5)))


@pytest.fixture(scope="session")
def label_host(tiny_host) -> FARHost:
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": 5})
    randomise(transformer, 5)
    return replace(tiny_host, name="tiny_label", transformer=transformer.eval().requires_grad_(False))


@pytest.fixture
def hosts(tiny_hosts, label_host):
    return tiny_hosts | {"labels": label_host}


def with_graphs(workload: Workload, **options) -> tuple[Workload, Counting]:
    """The same workload on a host with graphs, as on a GPU."""
    host, capture = replace(workload.host), Counting()
    vars(host)["cuda_graphs"] = CudaGraphs(host.transformer, capture, **options)  # in place of what a CPU has
    return replace(workload, host=host), capture


def steered(host: FARHost, kind: str, guidance: float) -> Workload:
    options = {"labels": kind == "labels", "actions": kind in ("actions", "long"), "guidance": guidance}
    return Workload("named", NamedClips(), host, num_context=5, num_predict=11, num_steps=2, **options)


@pytest.mark.parametrize(
    ("kind", "guidance", "budget"),
    [("plain", 1.0, 4), ("labels", 2.0, 4), ("actions", 1.0, 4), ("actions", 1.5, 4), ("long", 1.0, 8), ("long", 1.5, 8)],
)
def test_rollouts_equal_those_without_graphs_to_the_bit(hosts, kind, guidance, budget):
    """The newest frames are kept, so that every history is other than before, and the engine encodes all of it, too."""
    workload = steered(hosts[kind], kind, guidance)
    clips, seeds = [workload.clips.clip("test", i) for i in range(3)], [1, 2, 3]
    plain, _ = play(workload, clips, seeds, NewestFrames(), budget)
    fast, capture = with_graphs(workload)
    batch, _ = play(fast, clips, seeds, NewestFrames(), budget)
    # budget 4: frame 0 follows five, 1 the first four, 2 as many again, 3 for the second time. Budget 8: frame 3 follows eight
    assert capture.made == 1 and capture.repeated == [(3, budget)] * (8 if budget == 4 else 6)
    assert torch.equal(batch.generated(range(3)), plain.generated(range(3)))
    again, _ = play(fast, clips, seeds, NewestFrames(), budget)
    assert capture.made == 1 and torch.equal(again.generated(range(3)), plain.generated(range(3)))


def test_other_kept_frames_are_other_inputs(tiny_workload):
    """Which frames go changes from frame to frame and from row to row; the engine keeps what it knows, a graph does not."""
    clips, workload = [tiny_workload.clips.clip("test", i) for i in range(3)], replace(tiny_workload, num_steps=2)
    fast, capture = with_graphs(workload)
    batch = RolloutBatch(fast, 3)
    batch.begin(range(3), clips, [1, 2, 3])
    plain = RolloutBatch(workload, 3)
    plain.begin(range(3), clips, [1, 2, 3])
    rng = np.random.default_rng(0)
    for _ in range(11):
        for one in (batch, plain):
            one.advance(range(3))
        for row in range(3):
            kept = sorted(rng.permutation(batch.history_length(row))[:4].tolist())
            for one in (batch, plain):
                one.retain(row, kept)
    assert capture.repeated == [(3, 4)] * 8
    torch.testing.assert_close(batch.generated(range(3)), plain.generated(range(3)), atol=1e-4, rtol=0)
    assert batch.frame_numbers(0) != batch.frame_numbers(1)


def test_a_batch_that_shrinks_uses_the_larger_graph_and_then_a_smaller_one(tiny_workload):
    clips, workload = [tiny_workload.clips.clip("test", i) for i in range(4)], replace(tiny_workload, num_steps=2)
    fast, capture = with_graphs(workload)
    batches = [RolloutBatch(one, 4) for one in (workload, fast)]
    lengths = (11, 8, 11, 6)
    for batch in batches:
        for row, num_predict in enumerate(lengths):
            batch.begin([row], [clips[row]], [row], num_context=5, num_predict=num_predict)
        while active := [row for row in range(4) if not batch.finished(row)]:
            batch.advance(active)
            for row in active:
                if batch.history_length(row) > 4:
                    batch.retain(row, range(batch.history_length(row) - 4, batch.history_length(row)))
    # four rows at frames 3 to 5, three at 6 and 7, then two: once without a graph, then with their own
    assert capture.repeated == [(4, 4)] * 5 + [(2, 4)] * 2 and capture.made == 2
    for row, num_predict in enumerate(lengths):
        plain, latents = (batch.generated([row], 0, num_predict) for batch in batches)
        assert torch.equal(latents, plain)


def test_rows_of_several_lengths_have_their_graphs_and_the_others_none(tiny_workload):
    clips, workload = [tiny_workload.clips.clip("test", i) for i in range(3)], replace(tiny_workload, num_steps=2)
    fast, capture = with_graphs(workload)
    batch = RolloutBatch(fast, 3)
    batch.begin(range(3), clips, [0, 1, 2])
    budgets = (2, 4, 9999)
    while not batch.finished(0):
        batch.advance(range(3))  # all lengths in one call, as on a GPU
        for row, budget in enumerate(budgets):
            if (n := batch.history_length(row)) > budget:
                batch.retain(row, range(n - budget, n))
    assert capture.repeated == [(1, 2), (1, 4)] * 8
    for row, (clip, budget) in enumerate(zip(clips, budgets, strict=True)):
        expected = reference_rollout(workload, clip, NewestFrames(), budget, row).latents
        torch.testing.assert_close(batch.generated([row])[0], expected, atol=1e-4, rtol=0)


def test_without_a_steady_history_with_signals_or_from_a_memo_nothing_is_repeated(tiny_workload):
    clips, workload = [tiny_workload.clips.clip("test", i) for i in range(2)], replace(tiny_workload, num_steps=1)
    fast, capture = with_graphs(workload)
    for _ in range(2):
        play(fast, clips, [1, 2], None, 9999)
    signals = RolloutBatch(fast, 2, signals=("attn_mass",))
    signals.begin(range(2), clips, [1, 2])
    for _ in range(5):
        signals.advance(range(2))
        for row in range(2):
            signals.retain(row, range(signals.history_length(row) - 4, signals.history_length(row)))
    assert capture.made == 0
    memo = FrameMemo()
    first, _ = play(fast, clips, [1, 2], Drops(0), 4, memo=memo)
    count = len(capture.repeated)
    assert count == 8
    again, _ = play(fast, clips, [1, 2], Drops(0), 4, memo=memo)
    assert len(capture.repeated) == count and torch.equal(first.generated(range(2)), again.generated(range(2)))


def test_a_rollout_goes_on_without_its_graph(tiny_workload):
    """What a graph has encoded is not known outside it: after it, a history that grows again is encoded from its start."""
    clip, workload = tiny_workload.clips.clip("test", 0), replace(tiny_workload, num_steps=2)
    fast, capture = with_graphs(workload)
    batches = [RolloutBatch(one, 1) for one in (workload, fast)]
    for batch in batches:
        batch.begin([0], [clip], [1])
        for step in range(11):
            batch.advance([0])
            if step < 6:
                batch.retain(0, [0, 2, 3, 5] if step == 0 else [0, 1, 2, 4])
    assert capture.repeated == [(1, 4)] * 4
    torch.testing.assert_close(batches[1].generated([0]), batches[0].generated([0]), atol=1e-4, rtol=0)


def test_a_graph_that_does_not_fit_leaves_the_engine_as_it_was(tiny_workload):
    def full(compute):
        raise torch.OutOfMemoryError

    workload = replace(tiny_workload, num_steps=1)
    fast, _ = with_graphs(workload)
    vars(fast.host)["cuda_graphs"] = CudaGraphs(fast.host.transformer, full)
    clips = [workload.clips.clip("test", i) for i in range(2)]
    latents = [play(one, clips, [1, 2], NewestFrames(), 4)[0].generated(range(2)) for one in (fast, workload)]
    assert torch.equal(*latents)


def test_hosts_on_a_cpu_have_no_graphs_and_other_weights_have_other_ones(tiny_workload):
    assert tiny_workload.host.cuda_graphs is None
    fast, _ = with_graphs(tiny_workload)
    assert fast.host.cuda_graphs is not None and replace(fast.host).cuda_graphs is None
