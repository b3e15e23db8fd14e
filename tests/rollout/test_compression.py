"""Compressed blocks in a streaming rollout: against the pass that a compressor is trained with, and the choice of blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.errors import PolicyError
from far_env.host.compressor import Compressor, load_compressor, save_compressor, small_latents
from far_env.host.far import NextFrame
from far_env.host.sampler import make_scheduler
from far_env.host.training.compressor import CompressedHistory, history_velocity
from far_env.rollout.block_selection import BlockSelection
from far_env.rollout.context import context_latents
from far_env.rollout.noise import rollout_noise
from far_env.rollout.streaming import StreamingBatch, play_streaming
from far_env.rollout.token_cache import COMPRESSED, EMPTY, FULL
from tests.conftest import randomise
from tests.rollout.test_actions import Steered

LENGTH = 2


class Eager:
    """Makes a block of every two frames after the first ``num_sink`` as soon as another frame comes, and keeps everything."""

    coarse_frames = staticmethod(lambda frames, sizes: [])

    def __init__(self, folder, num_sink=0, top_blocks=None):
        self.compressor, self.num_sink, self.top_blocks = str(folder), num_sink, top_blocks

    def compressed_blocks(self, frames, sizes):
        assert (sizes.block, sizes.block_frames) == (4, LENGTH)
        old = [number for number in frames[:-1] if number >= self.num_sink]
        return old[: len(old) // LENGTH * LENGTH : LENGTH]

    def retain(self, view):
        raise AssertionError("the budget is never exceeded")


@pytest.fixture
def folders(tiny_hosts, tmp_path):
    for name, host in tiny_hosts.items():
        compressor = Compressor.of(host.transformer, block_frames=LENGTH, channels=8)
        randomise(compressor, 5)
        save_compressor(tmp_path / name, compressor, host)
    return tmp_path


def workload_of(workload, host, guidance=1.0):
    actions = host.transformer.condition == "action"
    return replace(workload, clips=Steered(10), host=host, actions=actions, guidance=guidance, num_context=6, num_predict=4)


@pytest.mark.parametrize(
    ("kind", "num_sink", "guidance"), [("plain", 1, 1.0), ("actions", 0, 1.0), ("actions", 2, 1.7), ("long", 1, 1.0)]
)
def test_frames_are_those_of_the_pass_that_the_compressor_is_trained_with(
    tiny_workload,
    tiny_hosts,
    folders,
    kind,
    num_sink,
    guidance,
):
    host = tiny_hosts[kind]
    workload = workload_of(tiny_workload, host, guidance)
    clips = [workload.clips.clip("test", i) for i in range(2)]
    rollouts = play_streaming(workload, clips, [100, 101], Eager(folders / kind, num_sink), 1000)
    for clip, seed, rollout in zip(clips, [100, 101], rollouts, strict=True):
        expected = trained_with(workload, clip, seed, load_compressor(str(folders / kind), host), num_sink)
        assert torch.allclose(rollout.latents, expected, atol=1e-4)


def trained_with(workload, clip, seed, compressor, num_sink):
    """Each frame from sinks, blocks and newest frames, all encoded anew; as all are made at once, nothing else is in them."""
    host = workload.host
    history = list(context_latents(host, [clip], workload.num_context)[0])
    noise = rollout_noise(seed, workload.num_predict, host.latent_shape)
    for step in range(workload.num_predict):
        number = len(history)
        num_blocks = (number - 1 - num_sink) // LENGTH
        end = num_sink + LENGTH * num_blocks
        sink, middle, recent = (
            torch.stack(part)[None] if part else torch.empty(1, 0, *host.latent_shape)
            for part in (history[:num_sink], history[num_sink:end], history[end:])
        )
        blocks = middle[0].unflatten(0, (num_blocks, LENGTH))
        actions = null = None
        if workload.actions:
            actions = torch.tensor([workload.actions_of(clip, workload.num_frames)[: number + 1]])
            null = torch.full_like(actions, host.transformer.null_class)
        elif host.transformer.condition == "action":
            actions = torch.full((1, number + 1), host.transformer.null_class)
        frame = noise[step][None, None]
        scheduler = make_scheduler(workload.num_steps)
        for time in scheduler.timesteps:
            small = small_latents(host.autoencoder, blocks)[None]
            batch = CompressedHistory(sink, middle, recent, small, frame, frame, time.reshape(1, 1), actions)
            velocity = history_velocity(host.transformer, compressor, batch)
            if workload.guidance > 1:
                without = history_velocity(host.transformer, compressor, replace(batch, actions=null))
                velocity = without + workload.guidance * (velocity - without)
            frame = scheduler.step(velocity, time, frame).prev_sample
        history.append(frame[0, 0])
    return torch.stack(history[workload.num_context :])


def test_decisions_and_entries_name_the_frames_of_a_block(tiny_workload, tiny_hosts, folders):
    workload = workload_of(tiny_workload, tiny_hosts["plain"])
    clip = workload.clips.clip("test", 0)
    batch = StreamingBatch(workload, [clip], [100], Eager(folders / "plain", 1), 1000)
    cache = batch.cache
    assert cache.kept_frames(0, FULL) == [0, 5] and cache.kept_frames(0, COMPRESSED) == [1, 3]
    compressed = cache.kind == COMPRESSED
    assert cache.weight[compressed].unique().tolist() == [1.0]
    assert cache.tokens_per_frame == 16 and bool((cache.counts() == 2 * 16 + 2 * 4).all())
    assert cache.cell[compressed].unique().tolist() == [16, 17, 18, 19]
    assert cache.positions(torch.tensor([6]))[0, 0, 0].unique().tolist() == [-4, -3, -2, -1]

    class Asked(Eager):
        every_frame = True

        def retain(self, view):
            return torch.where(view.frame >= 0, torch.arange(view.frame.shape[-1]).expand_as(view.frame), -1)

    (rollout,) = play_streaming(workload, [clip], [100], Asked(folders / "plain", 1), 1000)
    last = rollout.decisions[-1]
    assert (last.step, last.full, last.coarse) == (2, (0, 7, 8), (1, 2, 3, 4, 5, 6))


def test_a_policy_that_names_no_blocks_of_full_frames_is_told(tiny_workload, tiny_hosts, folders):
    workload = workload_of(tiny_workload, tiny_hosts["plain"])
    clip = workload.clips.clip("test", 0)
    for firsts in ([0, 1], [4], [-1]):
        policy = Eager(folders / "plain")
        policy.compressed_blocks = lambda frames, sizes, firsts=firsts: firsts if frames[-1] == 5 else []
        with pytest.raises(
            PolicyError, match=r"compresses blocks of 2 frames from .* on; they must be apart, and of the frames"
        ):
            StreamingBatch(workload, [clip], [100], policy, 1000)


def test_each_layer_attends_to_the_blocks_of_the_largest_mean_product(tiny_workload, tiny_hosts, folders):
    workload = workload_of(tiny_workload, tiny_hosts["plain"])
    clips = [workload.clips.clip("test", i) for i in range(2)]
    cache = StreamingBatch(workload, clips, [100, 101], Eager(folders / "plain"), 1000).cache
    prepared = cache.prepare(torch.tensor([6, 6]))
    assert all(mask is None for mask in prepared.masks), "every token attends to all"
    generator = torch.Generator().manual_seed(0)
    num_layers, _, heads, slots = cache.kind.shape
    selection = BlockSelection(cache, prepared, 1)
    chosen = set()
    for layer in range(2 * num_layers):  # the second ODE step must change nothing
        query = torch.randn(2, 16, heads, 16, generator=generator)
        key = torch.randn(2, slots + 16, heads, 16, generator=generator)
        selection.attention(query, key, prepared.table, None)
        if layer >= num_layers:
            continue
        for row in range(2):
            means = {}
            for first in (0, 2):
                entries = [s for s in range(slots) if cache.frame[layer, row, 0, s] == first]
                products = [
                    float(query[row, s, h] @ key[row, t, h]) / 4 for s in range(16) for h in range(heads) for t in entries
                ]
                means[first] = np.mean(products)
            best = max(means, key=means.get)
            chosen.add(best)
            expected = torch.zeros(heads, 1, slots + 16)
            expected[:, 0, :slots][(cache.frame[layer, row] == 2 - best) & (cache.kind[layer, row] == COMPRESSED)] = -torch.inf
            assert torch.equal(selection.frame.masks[layer][row], expected)
    assert chosen == {0, 2}, "both happen"
    assert all(mask is None for mask in prepared.masks), "what was prepared stays as it was"


def test_with_as_many_blocks_as_there_are_nothing_changes(tiny_workload, tiny_hosts, folders):
    workload = workload_of(tiny_workload, tiny_hosts["actions"], 1.7)
    clip = workload.clips.clip("test", 0)
    plain, all_blocks, one = (
        play_streaming(workload, [clip], [100], Eager(folders / "actions", 1, number), 1000)[0].latents
        for number in (None, 9, 1)
    )
    assert torch.equal(plain, all_blocks)
    assert not torch.allclose(plain, one, atol=1e-4)


def test_a_memory_without_blocks_is_left_as_it_is(tiny_workload):
    batch = StreamingBatch(tiny_workload, [tiny_workload.clips.clip("test", 0)], [1], None, None)
    prepared = batch.cache.prepare(torch.tensor([5]))
    selection = BlockSelection(batch.cache, prepared, 1)
    assert isinstance(selection.frame, NextFrame) and all(mask is None for mask in selection.frame.masks)
    selection.attention(torch.zeros(1, 16, 2, 16), torch.zeros(1, 96, 2, 16), prepared.table, None)
    assert bool((batch.cache.kind != EMPTY).all())
