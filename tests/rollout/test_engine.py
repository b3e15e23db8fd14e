"""What makes the engine fast must not change what it computes: prefixes that outlive evictions, the memo, forks."""

from __future__ import annotations

import copy
import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.contract import make_plan
from far_env.evaluation.evaluate import evaluate
from far_env.host.weights import load_host
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import ENTRY_BYTES, FrameMemo, content_key
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout

ATOL = 1e-4


class Drops:
    """Drops the frame at one place of the history whenever it is over budget."""

    def __init__(self, place: int):
        self.place = place

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        n, surplus = len(chunk_meta_list), len(chunk_meta_list) - budget_state["max_frames"]
        first = min(self.place, n - 1 - surplus)
        return make_plan([i for i in range(n) if not first <= i < first + surplus], n)


@pytest.fixture
def encoded(tiny_workload, monkeypatch):
    """(rows, frames) of every context encoding."""
    calls, model = [], tiny_workload.host.transformer
    original = type(model).encode_context
    monkeypatch.setattr(
        type(model),
        "encode_context",
        lambda self, frames, *args, **kwargs: calls.append(tuple(frames.shape[:2])) or original(self, frames, *args, **kwargs),
    )
    return calls


@pytest.mark.parametrize(("place", "frames_per_step"), [(0, 4), (1, 3), (3, 1)])
def test_only_frames_after_the_first_dropped_one_are_encoded_again(tiny_workload, encoded, place, frames_per_step):
    clip = tiny_workload.clips.clip("test", 0)
    batch, _ = play(tiny_workload, [clip], [7], Drops(place), 4)
    # five context frames, then a history of four in which everything from the dropped place on is new
    assert encoded == [(1, 5)] + [(1, frames_per_step)] * 10
    expected = reference_rollout(tiny_workload, clip, Drops(place), 4, 7)
    torch.testing.assert_close(batch.generated([0])[0], expected.latents, atol=ATOL, rtol=0)


def test_rows_with_different_prefixes_share_a_batch(tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(4)]
    batch = RolloutBatch(tiny_workload, 4)
    batch.begin(range(4), clips, [0, 1, 2, 3])
    kept = {0: [[1, 2, 4]], 1: [[0, 1, 2, 3, 5]], 2: [[5]], 3: [[0, 5]]}
    for step in range(4):
        batch.advance(range(4))
        for row in range(4):
            if step < len(kept[row]):
                batch.retain(row, kept[row][step])
    for row, clip in enumerate(clips):
        alone = RolloutBatch(tiny_workload, 1)
        alone.begin([0], [clip], [row])
        for step in range(4):
            alone.advance([0])
            if step < len(kept[row]):
                alone.retain(0, kept[row][step])
        torch.testing.assert_close(batch.generated([row]), alone.generated([0]), atol=ATOL, rtol=0)


def test_rows_of_different_lengths_and_budgets_share_a_batch(tiny_workload, tiny_long_workload):
    for workload in (tiny_workload, tiny_long_workload):
        clips = [workload.clips.clip("test", i) for i in range(3)]
        lengths = [(5, 11), (2, 6), (9, 4)]
        batch = RolloutBatch(workload, 3)
        for row, (clip, (num_given, predicted)) in enumerate(zip(clips, lengths, strict=True)):
            batch.begin([row], [clip], [row], num_context=num_given, num_predict=predicted)
        while active := [row for row in range(3) if not batch.finished(row)]:
            batch.advance(active)
        latents = batch.generated([0, 1, 2])
        assert latents.shape[1] == 11
        for row, (clip, (num_given, predicted)) in enumerate(zip(clips, lengths, strict=True)):
            row_workload = replace(workload, num_context=num_given, num_predict=predicted)
            expected = reference_rollout(row_workload, clip, None, 9999, row).latents
            torch.testing.assert_close(latents[row, :predicted], expected, atol=ATOL, rtol=0)
            assert not latents[row, predicted:].any()
        budgets = [1, 4, 9999]
        mixed, _ = play(workload, clips, [0, 1, 2], Drops(1), budgets)
        for row, (clip, budget) in enumerate(zip(clips, budgets, strict=True)):
            expected = reference_rollout(workload, clip, Drops(1), budget, row).latents
            torch.testing.assert_close(mixed.generated([row])[0], expected, atol=ATOL, rtol=0)


def test_the_memo_answers_what_was_computed_before(tiny_workload, encoded):
    clips = [tiny_workload.clips.clip("test", i) for i in range(3)]
    memo = FrameMemo()
    plain, _ = play(tiny_workload, clips, [1, 2, 3], Drops(1), 4)
    first, _ = play(tiny_workload, clips, [1, 2, 3], Drops(1), 4, memo=memo)
    assert memo.statistics.hits == 0 and memo.statistics.misses == 3 * 12 and len(memo) == 3 * 12
    encoded.clear()
    again, _ = play(tiny_workload, clips, [1, 2, 3], Drops(1), 4, memo=memo)
    assert memo.statistics.hits == 3 * 12 and not encoded
    assert torch.equal(first.generated(range(3)), again.generated(range(3)))
    torch.testing.assert_close(first.generated(range(3)), plain.generated(range(3)), atol=ATOL, rtol=0)
    # another policy shares the contexts and what comes before its first other decision, and is right from there on
    other, _ = play(tiny_workload, clips, [1, 2, 3], Drops(2), 8, memo=memo)
    assert memo.statistics.hits == 3 * 12 + 3 * 2
    alone, _ = play(tiny_workload, clips, [1, 2, 3], Drops(2), 8)
    torch.testing.assert_close(other.generated(range(3)), alone.generated(range(3)), atol=ATOL, rtol=0)
    assert not torch.equal(other.generated(range(3)), first.generated(range(3)))


def test_pixels_are_remembered_like_latents(tiny_workload, monkeypatch):
    clips = [tiny_workload.clips.clip("test", i) for i in range(2)]
    decoded, autoencoder = [], tiny_workload.host.autoencoder
    original = type(autoencoder).decode
    monkeypatch.setattr(
        type(autoencoder), "decode", lambda self, latents: decoded.append(latents.shape[:2].numel()) or original(self, latents)
    )
    memo, lengths = FrameMemo(), {"num_context": 5, "num_predict": 4}
    batches = [RolloutBatch(tiny_workload, 2, one_memo) for one_memo in (None, memo, memo)]
    for batch in batches:
        batch.begin([0], clips[:1], [1], num_context=5, num_predict=7)
        batch.begin([1], clips[1:], [2], **lengths)
        for _ in range(4):
            batch.advance([0, 1])
    plain, first, second = (batch.decode([0, 1]) for batch in batches)
    assert decoded == [14, 9], "eight frames and one that represents all missing ones; then none"
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=0)
    assert torch.equal(first, second)
    torch.testing.assert_close(batches[2].decode([1, 0], 1, 3), plain[[1, 0], 1:3], atol=1e-5, rtol=0)
    assert decoded == [14, 9]


def test_another_seed_or_clip_is_another_frame(tiny_workload):
    memo = FrameMemo()
    play(tiny_workload, [tiny_workload.clips.clip("test", 0)], [1], None, 9999, memo=memo)
    play(tiny_workload, [tiny_workload.clips.clip("test", 0)], [2], None, 9999, memo=memo)
    assert memo.statistics.hits == 1, "the context"
    play(tiny_workload, [tiny_workload.clips.clip("test", 1)], [1], None, 9999, memo=memo)
    assert memo.statistics.hits == 1


def test_another_host_is_another_frame_even_if_its_hash_is_not(tiny_workload, tiny_long_workload):
    assert tiny_workload.host.weights_hash == tiny_long_workload.host.weights_hash
    memo, clip = FrameMemo(), tiny_workload.clips.clip("test", 0)
    for workload in (tiny_workload, tiny_long_workload):
        shared, _ = play(workload, [clip], [1], None, 9999, memo=memo)
        alone, _ = play(workload, [clip], [1], None, 9999)
        torch.testing.assert_close(shared.generated([0]), alone.generated([0]), atol=ATOL, rtol=0)


def test_rows_that_agree_are_computed_once(tiny_workload, encoded):
    clip = tiny_workload.clips.clip("test", 0)
    batch, _ = play(tiny_workload, [clip] * 3, [7, 7, 8], Drops(1), 4)
    assert {rows for rows, _ in encoded} == {2}
    expected = reference_rollout(tiny_workload, clip, Drops(1), 4, 7)
    for row in (0, 1):
        torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=ATOL, rtol=0)
    assert not torch.equal(batch.generated([2]), batch.generated([0]))


def test_states_are_restored_mid_rollout_and_only_where_they_belong(tiny_workload, tiny_long_workload):
    for workload in (tiny_workload, tiny_long_workload):
        clips = [workload.clips.clip("test", i) for i in range(2)]
        batch = RolloutBatch(workload, 3)
        batch.begin([0], clips[:1], [1])
        batch.begin([2], clips[1:], [2], num_context=3, num_predict=6)
        for _ in range(3):
            batch.advance([0, 2])
        batch.retain(0, [1, 4, 7])
        other = RolloutBatch(workload, 3)
        other.load_state_dict(batch.state_dict())
        assert other.finished(1) and other.frame_numbers(0) == [1, 4, 7] and other.step(2) == 3
        for one_batch in (batch, other):
            for _ in range(3):
                one_batch.advance([0, 2])
        torch.testing.assert_close(other.generated([0, 2]), batch.generated([0, 2]), atol=ATOL, rtol=0)
        with pytest.raises(ValueError, match=r"3 rows of host .*, this batch 2 of"):
            RolloutBatch(workload, 2).load_state_dict(batch.state_dict())


def test_what_cannot_be_played_is_refused(tiny_workload):
    with pytest.raises(ValueError, match="2 clips, 1 noise seeds, 2 policies and 2 budgets"):
        play(tiny_workload, [tiny_workload.clips.clip("test", i) for i in range(2)], [1], None, 4)
    with pytest.raises(ValueError, match="num_context of tiny_pan must be at least 0, got -1"):
        replace(tiny_workload, num_context=-1)
    budget = np.int64(4)
    play(tiny_workload, [tiny_workload.clips.clip("test", 0)], [1], None, budget)


def test_the_memo_keeps_its_budget_and_forgets_the_least_recently_used():
    memo = FrameMemo(max_bytes=3 * (40 + ENTRY_BYTES))
    for name in "abc":
        memo.put(name, torch.full((10,), 1.0))
    assert memo.get("a") is not None
    memo.put("d", torch.zeros(10))
    assert memo.get("b") is None and memo.get("a") is not None and memo.get("d") is not None
    assert memo.num_bytes == 120 + 3 * ENTRY_BYTES and len(memo) == 3 and memo.statistics.evictions == 1
    memo.put("a", torch.zeros(5))
    assert memo.num_bytes == 100 + 3 * ENTRY_BYTES
    memo.put("b", torch.zeros(40)[:10])
    assert len(memo) == 2, "the view keeps all forty numbers"
    memo.put("too large", torch.zeros(32 + 3 * ENTRY_BYTES // 4))
    assert memo.get("too large") is None and len(memo) == 2


def test_the_memos_budget_is_what_the_process_grows_by():
    memo = FrameMemo()
    tracemalloc.start()
    for number in range(2000):
        memo.put(content_key(number), torch.zeros(4))
    held, _ = tracemalloc.get_traced_memory()  # Python's part: torch's numbers and objects are not traced
    tracemalloc.stop()
    assert held < memo.num_bytes < 10 * held and memo.num_bytes == 2000 * (16 + ENTRY_BYTES)


def test_content_keys_tell_parts_apart():
    keys = {content_key("ab", "c"), content_key("a", "bc"), content_key("abc"), content_key(b"ab", "c"), content_key(1, 2)}
    assert len(keys) == 5 and content_key("a", 1) == content_key("a", 1)


def test_frames_own_their_memory_and_a_finished_rollout_keeps_nothing_else(tiny_workload):
    """A view would keep the batch it was computed in alive."""
    clips = [tiny_workload.clips.clip("test", i) for i in range(3)]
    memo = FrameMemo()
    batch = RolloutBatch(tiny_workload, 3, memo)
    batch.begin(range(3), clips, [1, 2, 3])
    for _ in range(4):
        batch.advance(range(3))
    rows = batch._rows
    held = [tensor for row in rows for tensor in [*row.frames[5:], *row.prefix]] + list(memo._entries.values())
    assert len(held) == 3 * (4 + 8) + 3 * 5
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    while not batch.finished(0):
        batch.advance(range(3))
    assert not any(row.prefix for row in rows)


def test_memory_of_finished_episodes_is_given_back(tiny_workload):
    memo = FrameMemo(max_bytes=64 * 1024)
    batch = RolloutBatch(tiny_workload, 2, memo)

    def live_bytes():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    held = []
    for episode in range(40):
        clips = [tiny_workload.clips.clip("train", 2 * episode + i) for i in range(2)]
        batch.begin([0, 1], clips, [2 * episode, 2 * episode + 1])
        while not batch.finished(0):
            batch.advance([0, 1])
            if len(batch.frame_numbers(0)) > 4:
                for row in (0, 1):
                    batch.retain(row, [0, 1, 2, len(batch.frame_numbers(row)) - 1])
        if episode in (9, 39):
            held.append(live_bytes())
    assert memo.num_bytes <= 64 * 1024 and memo.statistics.evictions > 100
    assert held[1] <= held[0] + 64 * 1024


def test_a_fork_goes_on_as_the_rollout_would_have_and_shares_its_frames(tiny_workload, encoded):
    clip = tiny_workload.clips.clip("test", 0)
    batch = RolloutBatch(tiny_workload, 3)
    batch.begin([0], [clip], [5])
    for _ in range(3):
        batch.advance([0])
    before = len(encoded)
    batch.fork(0, [1, 2])
    assert len(encoded) == before
    for row in (1, 2):
        assert all(a is b for a, b in zip(batch._rows[0].frames, batch._rows[row].frames, strict=True))
    batch.retain(1, [0, 3, 7])
    assert batch.frame_numbers(0) == batch.frame_numbers(2) == list(range(8)) and batch.frame_numbers(1) == [0, 3, 7]
    for _ in range(3):
        batch.advance([0, 1, 2])
    whole = RolloutBatch(tiny_workload, 2)
    whole.begin([0, 1], [clip, clip], [5, 5])
    for step in range(6):
        whole.advance([0, 1])
        if step == 2:
            whole.retain(1, [0, 3, 7])
    torch.testing.assert_close(batch.generated([0, 1, 2]), whole.generated([0, 1, 0]), atol=ATOL, rtol=0)


def test_policies_that_agree_share_frames_in_an_evaluation(tiny_workload):
    policies = {"a": Drops(0), "b": Drops(0), "c": Drops(2), "full": None}
    shared = evaluate(tiny_workload, 4, policies, range(3), metrics=("psnr",), progress=False)
    alone = evaluate(tiny_workload, 4, policies, range(3), metrics=("psnr",), memo_bytes=0, progress=False)
    for name in policies:
        assert shared.scores[name]["psnr"] == pytest.approx(alone.scores[name]["psnr"], abs=1e-3)
    assert (shared.scores["a"]["psnr"] == shared.scores["b"]["psnr"]).all()


def test_bfloat16_stays_close(tiny_host_folder, tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(2)]
    half = replace(tiny_workload, host=load_host(tiny_host_folder, "cpu", torch.bfloat16))
    exact, _ = play(tiny_workload, clips, [1, 2], Drops(1), 4)
    rounded, _ = play(half, clips, [1, 2], Drops(1), 4)
    latents = rounded.generated(range(2))
    assert latents.dtype == torch.bfloat16
    exact = exact.generated(range(2))
    assert (latents.float() - exact).norm() / exact.norm() < 0.1
    for row, (clip, seed) in enumerate(zip(clips, (1, 2), strict=True)):
        expected = reference_rollout(half, clip, Drops(1), 4, seed).latents
        assert (latents[row].float() - expected.float()).norm() / expected.float().norm() < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_cpu_does(tiny_workload, tiny_long_workload, precision, float32_on_gpu):
    for workload in (tiny_workload, tiny_long_workload):
        clips = [workload.clips.clip("test", i) for i in range(3)]
        exact, _ = play(workload, clips, [1, 2, 3], Drops(1), [1, 4, 9999])
        parts = {
            name: copy.deepcopy(getattr(workload.host, name)).to("cuda", precision) for name in ("transformer", "autoencoder")
        }
        there = replace(workload, host=replace(workload.host, **parts))
        latents, _ = play(there, clips, [1, 2, 3], Drops(1), [1, 4, 9999])
        error = latents.generated(range(3)).float().cpu() - exact.generated(range(3))
        bound = 1e-3 if precision == torch.float32 else 0.1 * float(exact.generated(range(3)).abs().max())
        assert error.abs().max() < bound
