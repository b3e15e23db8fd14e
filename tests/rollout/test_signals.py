"""Signals that a rollout gives to policies that request them: equal to the specification, and without effect on frames."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env import baselines, cli
from far_env.baselines.filling import FillingPolicy
from far_env.clips.clip import Clip
from far_env.contract import OF_LATENTS, SIGNALS, RolloutState, make_plan
from far_env.errors import PolicyError
from far_env.host.far_host import FARHost
from far_env.host.sampler import FrameSampler
from far_env.host.weights import load_host
from far_env.rollout.attention_probe import AttentionProbe, QueryMoments
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.rollout.signals import column_gaps
from far_env.workload import Workload
from tests.reference_signals import ReferenceSignals

ALL = tuple(SIGNALS)
PROBED = tuple(name for name in ALL if name not in OF_LATENTS)


class Asks:
    """Drops the frame at one place whenever it is over budget, and notes the signals it received; copies share the notes."""

    def __init__(self, signals=ALL, place=1):
        self.signals, self.place, self.received = signals, place, {}
        self.seed = None

    def __deepcopy__(self, memo):
        return copy.copy(self)

    def begin_clip(self, noise_seed):
        self.seed = noise_seed

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        self.received[self.seed, rollout_state.step] = getattr(rollout_state, "signals", None)
        n, surplus = len(chunk_meta_list), len(chunk_meta_list) - budget_state["max_frames"]
        first = min(self.place, n - 1 - surplus)
        return make_plan([i for i in range(n) if not first <= i < first + surplus], n)


class Identity(torch.nn.Module):
    """In place of an autoencoder where a fixture gives latents instead of pixels."""

    def encode(self, frames):
        return frames

    decode = encode


def fixture_workload(golden, name, guidance=1.0, actions=False):
    """A published tiny network with random latents as clips: 5 + 4 frames, 4 ODE steps."""
    fixture = golden(name)
    key = next(key for key in ("in.context", "in.latents", "in.above.latents") if key in fixture)
    latents = fixture[key]
    host = FARHost("fixture", fixture.far(), Identity(), "", tuple(latents.shape[2:]), 4, 4)
    generator = torch.Generator().manual_seed(3)
    clips = []
    for i in range(2):
        frames = torch.randn(5, *latents.shape[2:], generator=generator).numpy()
        clips.append(Clip(i, frames, np.random.default_rng(i).integers(0, 3, 9)))
    return Workload("fixture", None, host, 5, 4, num_steps=4, guidance=guidance, actions=actions), clips


def compare(workload, clips, budgets, atol):
    """Play all clips in one batch, and each by the specification; returns the signals that the batch gave."""
    batched = Asks()
    seeds = [7 + i for i in range(len(clips))]
    play(workload, clips, seeds, batched, budgets)
    plain = Asks()
    for clip, seed, budget in zip(clips, seeds, budgets, strict=True):
        plain.begin_clip(seed)
        reference_rollout(workload, clip, plain, budget, seed, ReferenceSignals)
    last = workload.num_predict - 1
    assert {key for key in plain.received if key[1] < last} == set(batched.received)
    for key, received in batched.received.items():
        assert tuple(received) == ALL
        for name, array in received.items():
            assert array.dtype == np.float32, name
            # Eigenvectors of float32 covariances are only so well known.
            tolerance = 10 * atol if name == "expected_cos" else atol
            np.testing.assert_allclose(array, plain.received[key][name], atol=tolerance, rtol=1e-4, err_msg=f"{name} {key}")
    return batched.received


@pytest.mark.parametrize(
    "name", ["rollout_far.npz", "far_tiny_slope.npz", "far_tiny_label.npz", "rollout_far_long.npz", "far_long_tiny_slope.npz"]
)
def test_signals_equal_the_specification_on_the_published_networks(golden, name):
    """FAR-Long's window is four frames there: of a history of six or more, two or more are coarse."""
    workload, clips = fixture_workload(golden, name)
    received = compare(workload, clips, [5, 3], atol=5e-6)
    coarse = workload.host.transformer.num_coarse(6)
    assert (coarse > 0) == ("long" in name)
    for signals in received.values():
        n = len(signals["attn_mass"])
        assert signals["attn_mass"].sum() == pytest.approx(1, abs=1e-5)
        assert np.isnan(signals["key_cos"][-1]).all() and np.isfinite(signals["key_cos"][:-1, :-1]).all()
        np.testing.assert_allclose(np.linalg.norm(signals["key_proto"], axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(np.diag(signals["lat_cos"]), 1, atol=1e-5)
        assert {k: v.shape[0] for k, v in signals.items()} == dict.fromkeys(ALL, n)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("name", ["sampling_far_action.npz", "far_long_tiny_slope.npz"])
def test_signals_equal_the_specification_with_actions_and_guidance(golden, name, guidance):
    workload, clips = fixture_workload(golden, name, guidance, actions=True)
    received = compare(workload, clips, [5, 3], atol=5e-6)
    others, _ = fixture_workload(golden, name)
    blind = Asks(("key_proto", "denoise_gap"))
    play(others, clips, [7, 8], blind, [5, 3])
    for signal in blind.signals:
        assert np.abs(received[7, 0][signal] - blind.received[7, 0][signal]).max() > 1e-3, "actions make a difference"


def test_signals_equal_the_specification_in_a_ragged_batch(tiny_workload, tiny_long_workload):
    for workload in (tiny_workload, tiny_long_workload):
        workload = replace(workload, num_predict=4)
        compare(workload, [workload.clips.clip("test", i) for i in range(3)], [2, 4, 7], atol=1e-4)


class Silent(Asks):
    """Requests no signals, as in the benchmark."""

    def __init__(self, place=1):
        super().__init__((), place)


def test_recording_changes_no_bit_of_a_rollout_and_who_does_not_ask_gets_the_benchmarks_state(tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(3)]
    states = []

    class Noting(Silent):
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            states.append(rollout_state)
            return super().build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)

    plain, decisions = play(tiny_workload, clips, [1, 2, 3], Noting(), 4)
    recorded, same = play(tiny_workload, clips, [1, 2, 3], Asks(), 4)
    assert torch.equal(plain.generated(range(3)), recorded.generated(range(3))) and decisions == same
    assert states and all(type(state) is RolloutState for state in states)


def test_frames_are_not_probed_for_who_asks_for_nothing_or_drops_nothing(tiny_workload, monkeypatch):
    made = []
    monkeypatch.setattr("far_env.rollout.signals.AttentionProbe", lambda *args: made.append(args) or AttentionProbe(*args))
    clip = tiny_workload.clips.clip("test", 0)
    play(tiny_workload, [clip], [1], Silent(), 4)
    play(tiny_workload, [clip], [1], Asks(OF_LATENTS), 4)
    play(tiny_workload, [clip], [1], Asks(), 9999)
    assert not made
    play(tiny_workload, [clip], [1], Asks(("attn_mass",)), 4)
    assert len(made) == 11


def test_the_memo_hides_no_signals(tiny_workload):
    clips, memo = [tiny_workload.clips.clip("test", i) for i in range(2)], FrameMemo()
    alone = Asks(PROBED)
    play(tiny_workload, clips, [1, 2], alone, 4)
    play(tiny_workload, clips, [1, 2], Silent(), 4, memo=memo)
    received = Asks(PROBED)
    play(tiny_workload, clips, [1, 2], received, 4, memo=memo)
    assert received.received.keys() == alone.received.keys()
    for key, signals in received.received.items():
        for name, array in signals.items():
            np.testing.assert_array_equal(array, alone.received[key][name])
    # what is read off latents needs no frame twice
    hits = memo.statistics.hits
    play(tiny_workload, clips, [1, 2], Asks(OF_LATENTS), 4, memo=memo)
    assert memo.statistics.hits == hits + 2 * 12


def test_rows_of_one_batch_that_agree_get_equal_signals_and_forks_are_independent(tiny_workload):
    clip = tiny_workload.clips.clip("test", 0)
    batch = RolloutBatch(tiny_workload, 3, signals=PROBED)
    batch.begin([0, 1], [clip, clip], [5, 5])
    for _ in range(2):
        batch.advance([0, 1])
    batch.fork(0, [2])
    batch.retain(2, [0, 3, 6])
    batch.advance([0, 1, 2])
    one, other, forked = batch.signals([0, 1, 2])
    for name in PROBED:
        np.testing.assert_array_equal(one[name], other[name])
        assert len(forked[name]) == 4 and len(one[name]) == 8
    np.testing.assert_array_equal(forked["denoise_gap"][:3], one["denoise_gap"][[0, 3, 6]])
    alone = RolloutBatch(tiny_workload, 1, signals=PROBED)
    alone.begin([0], [clip], [5])
    for step in range(3):
        alone.advance([0])
        if step == 1:
            alone.retain(0, [0, 3, 6])
    for name, array in alone.signals([0])[0].items():
        np.testing.assert_allclose(array, forked[name], atol=1e-3 if name == "expected_cos" else 1e-5)


def test_signals_that_are_not_available_are_refused(tiny_workload):
    clip = tiny_workload.clips.clip("test", 0)
    batch = RolloutBatch(tiny_workload, 1, signals=("attn_mass",))
    batch.begin([0], [clip], [5])
    with pytest.raises(ValueError, match="after a frame was generated and before others are dropped"):
        batch.signals([0])
    batch.advance([0])
    batch.retain(0, [1, 5])
    with pytest.raises(ValueError, match="before others are dropped"):
        batch.signals([0])
    for rollout in (play, lambda *args: reference_rollout(args[0], clip, args[3], 4, 1)):
        with pytest.raises(PolicyError, match=r"policy Asks requests an unknown signal 'attn_mas'; did you mean 'attn_mass'"):
            rollout(tiny_workload, [clip], [1], Asks(("attn_mas",)), 4)


@torch.no_grad()
def test_with_guidance_the_conditional_rows_are_probed(golden):
    fixture = golden("sampling_far_action.npz")
    model, context, noise, action = (fixture.far(), *(fixture[f"in.{key}"] for key in ("context", "noise", "action")))
    signals_by_batch = []
    for scale in (1.0, 1.5):
        sampler, rows = FrameSampler(model, 1, scale), len(noise)
        count = context.shape[1]
        room, frame_tokens = sum(model.token_counts(count, noise)), model.tokens_per_frame(noise)
        memory = model.new_memory(rows * (1 + sampler.guided), room + frame_tokens, noise)
        memory.zero_()
        memory[:, :, -rows:, :room] = model.encode_context(context, action=action[:, :-1])
        tokens = [model.token_counts(count, noise)] * rows
        probe = AttentionProbe(("attn_mass", "qk_first"), tokens, (room, frame_tokens), (0, 1.0), noise.device)
        sampler(memory, noise, [count] * rows, action=action[:, -1:], probe=probe)
        signals_by_batch.append([probe.frame_signals(row) for row in range(rows)])
    for one, other in zip(*signals_by_batch, strict=True):
        for name in ("attn_mass", "qk_first"):
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_moments_merged_piece_by_piece_are_those_of_everything():
    rng = np.random.default_rng(0)
    pieces = [torch.from_numpy(rng.standard_normal((2, n, 3, 4)) + n).float() for n in (1, 5, 16)]
    joined = None
    for piece in pieces:
        moments = QueryMoments.of(piece)
        joined = moments if joined is None else joined.merged(moments)
    everything = torch.cat(pieces, dim=1).double().numpy()
    for layer in range(2):
        for head in range(3):
            sample = everything[layer, :, head]
            np.testing.assert_allclose(joined.mean[layer, head], sample.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(joined.covariance[layer, head], np.cov(sample.T, bias=True), rtol=1e-4, atol=1e-4)


def test_a_column_seen_elsewhere_has_no_gap():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(2, 3, 4, generator=generator)
    gaps = column_gaps(torch.stack([frame, frame.roll(1, dims=-1), torch.randn(2, 3, 4, generator=generator)])[None])[0]
    assert gaps.shape == (3, 3, 4) and not gaps[0, 1].any() and not gaps[1, 0].any()
    assert (gaps[0, 2] > 0.1).all()


ASKING = [name for name in baselines.names() if isinstance(p := baselines.make(name), FillingPolicy) and p.signals]


@pytest.mark.parametrize("name", ASKING)
def test_baselines_decide_alike_in_the_engine_and_in_the_specification(name, tiny_workload):
    workload = replace(tiny_workload, num_predict=6)
    clips = [workload.clips.clip("test", i) for i in range(2)]
    _, decisions = play(workload, clips, [3, 4], baselines.make(name), 4)
    for row, clip in enumerate(clips):
        policy = baselines.make(name)
        policy.begin_clip(3 + row)
        expected = reference_rollout(workload, clip, policy, 4, 3 + row, ReferenceSignals).kept
        assert [(d.step, list(d.kept)) for d in decisions[row]] == expected[:-1]


def test_evaluate_plays_policies_of_every_tier_side_by_side(tiny_host_folder, capsys):
    names = ["recent_fill", "sink_recent", "context_match", "h2o"]
    args = ("--host", str(tiny_host_folder), "--device", "cpu", "--clips", "2", "--metrics", "psnr")
    assert cli.main(["evaluate", "--policies", ",".join(names), *args]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in names)


def test_bfloat16_hosts_are_probed_too(tiny_host_folder, tiny_workload):
    clip = tiny_workload.clips.clip("test", 0)
    half = replace(tiny_workload, host=load_host(tiny_host_folder, "cpu", torch.bfloat16), num_predict=2)
    exact, rounded = Asks(), Asks()
    play(replace(tiny_workload, num_predict=2), [clip], [1], exact, 4)
    play(half, [clip], [1], rounded, 4)
    (key,) = rounded.received
    for name in ("lat_cos", "key_proto", "attn_mass", "denoise_gap"):
        array = rounded.received[key][name]
        assert array.dtype == np.float32
        assert np.linalg.norm(array - exact.received[key][name]) < 0.1 * np.linalg.norm(array), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_a_gpu_gives_the_signals_of_the_cpu(tiny_workload, tiny_long_workload, float32_on_gpu):
    for workload in (tiny_workload, tiny_long_workload):
        clip = workload.clips.clip("test", 0)
        received = []
        for device in ("cpu", "cuda"):
            host = workload.host
            parts = {"transformer": host.transformer, "autoencoder": host.autoencoder}
            moved = {name: copy.deepcopy(module).to(device) for name, module in parts.items()}
            policy = Asks()
            play(replace(workload, num_predict=2, host=replace(host, **moved)), [clip], [1], policy, 4)
            received.append(policy.received[1, 0])
        for name in ALL:
            np.testing.assert_allclose(received[0][name], received[1][name], atol=1e-2, err_msg=name)
