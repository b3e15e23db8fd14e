"""The frame graph against a slow one made of dicts of pairs, and the network's inputs against scalar formulas."""

from __future__ import annotations

from math import log1p

import numpy as np
import pytest

from far_env.agents.config import NetworkConfig
from far_env.agents.graph_batches import network_inputs, stacked, trimmed
from far_env.agents.observation import FrameGraph, graph_inputs, signal_arrays
from tests.agents.made_rollouts import Call, MadeClip, made_clip

PAIR_SIGNALS, FRAME_SIGNALS = ("key_cos", "lat_cos"), ("attn_mass", "expected_mass")


class SlowGraph:
    """What a policy has received, by true frame number, from the latents: a slow `FrameGraph` in double precision."""

    def __init__(self, clip: MadeClip, max_nodes: int) -> None:
        self.clip, self.max_nodes = clip, max_nodes
        self.last_seen: dict[int, int] = {}
        self.pairs: dict[tuple[int, int], tuple[float, float]] = {}
        self.drifts: dict[tuple[int, int], float] = {}
        self.changes: dict[int, tuple[float, float]] = {}
        self.signals: dict[tuple, float] = {}

    def change(self, i: int, j: int) -> tuple[float, float]:
        one, other = (self.clip.latents[k].astype(np.float64).ravel() for k in (i, j))
        cosine = one @ other / np.sqrt((one @ one) * (other @ other))
        return 1 - max(cosine, 0.0), np.abs(one - other).mean()

    def observe(self, call: Call) -> None:
        history = call.numbers
        for number in history:
            self.last_seen[number] = history[-1]
        dropped = sorted((seen, number) for number, seen in self.last_seen.items() if number not in history)
        while len(self.last_seen) > self.max_nodes and dropped:
            del self.last_seen[dropped.pop(0)[1]]
        for position in range(1, len(history)):
            frame, before, oldest = history[position], history[position - 1], history[0]
            self.pairs[before, frame] = self.change(before, frame)
            one, other = (self.clip.latents[k].astype(np.float64) for k in (frame, oldest))
            self.drifts[oldest, frame] = min(1.0, np.linalg.norm(one - other) / np.linalg.norm(other))
            if before == frame - 1:
                self.changes[frame] = self.change(before, frame)
        for name, values in call.signals.items():
            for i, frame in enumerate(history):
                if name in FRAME_SIGNALS:
                    self.signals[name, frame] = float(values[i])
                else:
                    for j, other in enumerate(history):
                        self.signals[name, frame, other] = float(np.mean(values[i, j]))

    def inputs(self, call: Call, budget: int, names: tuple = (), scaled: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """`graph_inputs` by its docstring, one number after the other."""
        nodes, edges = [], []
        numbers, history = sorted(self.last_seen), set(call.numbers)
        newest = numbers[-1]
        scale = np.mean(list(self.changes.values()), axis=0) if scaled else np.ones(2)

        def squash(value):
            return value / (1 + abs(value))

        def signal_columns(kind, *key):
            values = [self.signals.get((name, *key), np.nan) for name in sorted(names) if name in kind]
            return [0 if np.isnan(value) else squash(value) for value in values] + [not np.isnan(value) for value in values]

        def around(frame):
            """The changes before and after a frame."""
            return [np.array(self.changes[key]) / scale if key in self.changes else None for key in (frame, frame + 1)]

        for i in numbers:
            (before, after), row = around(i), [log1p(newest - i) / 4, i >= self.clip.num_context, i in history, i == newest]
            row.append(log1p(newest - self.last_seen[i]) / 4)
            for change in (before, after):
                row += [0, 0, 0] if change is None else [*map(squash, change), 1]
            row.append(before is not None and after is not None)
            steps_left = self.clip.total_steps - call.step - 1
            row += [log1p(budget) / 3, log1p(len(history)) / 3, log1p(steps_left) / 4]
            nodes.append(row + signal_columns(FRAME_SIGNALS, i))
            for j in numbers:
                pair, drift = self.pairs.get((min(i, j), max(i, j))), self.drifts.get((min(i, j), max(i, j)))
                edge = [0, 0] if pair is None else [squash(value / unit) for value, unit in zip(pair, scale, strict=True)]
                edge += [0 if drift is None else drift, pair is not None, drift is not None]
                edge += [np.sign(i - j) * log1p(abs(i - j)) / 4, j == i - 1, j == i + 1, j == i]
                for width in (0.01, 0.03, 0.1, 0.3, 1.0):
                    for one in around(i):
                        for other in around(j):
                            known = one is not None and other is not None
                            edge.append((1 + ((one - other) ** 2).sum() / width**2) ** -2 if known else 0)
                edges.append(edge + signal_columns(PAIR_SIGNALS, i, j))
        return np.array(nodes, dtype=np.float64), np.array(edges, dtype=np.float64).reshape(len(nodes), len(nodes), -1)


def observe(graph: FrameGraph, call: Call, names: tuple = ()) -> None:
    graph.observe_frames(call.features, call.step, *signal_arrays(call.signals, names))


def inputs_of(graph: FrameGraph, clip: MadeClip, call: Call, budget: int) -> tuple[np.ndarray, np.ndarray]:
    return graph_inputs(graph.arrays(clip.total_steps - call.step - 1, budget))


CASES = {
    "one by one": (5, 11, 4, None, True, ()),
    "gaps between calls": (5, 16, 6, 2, True, ()),
    "a large cut": (20, 8, 4, None, True, ()),
    "dropped frames are forgotten": (5, 16, 6, 2, False, ()),
    "more frames than nodes": (40, 60, 8, None, True, ()),
    "more kept frames than nodes": (70, 6, 68, None, True, ()),
    "signals": (5, 11, 4, None, True, ("lat_cos", "attn_mass", "expected_mass", "key_cos")),
    "signals, dropped frames are forgotten": (5, 11, 4, 2, False, ("lat_cos", "attn_mass")),
}


@pytest.mark.parametrize(("context", "predict", "budget", "fewest", "dropped", "names"), CASES.values(), ids=CASES)
def test_inputs_are_those_of_a_slow_graph_from_the_true_latents(context, predict, budget, fewest, dropped, names):
    clip = made_clip(context + predict, context, predict)
    graph, slow = FrameGraph(dropped), SlowGraph(clip, 64 if dropped else 0)
    sizes, shares = [], []
    for number, call in enumerate(clip.calls(budget, 3, names, fewest)):
        observe(graph, call, names)
        slow.observe(call)
        assert graph.births == call.numbers and graph.numbers.tolist() == sorted(slow.last_seen)
        sizes.append(len(graph.numbers))
        shares.append(graph.known[..., 0].mean())
        if len(graph.numbers) < 40 or number % 45 == 0:  # the slow one takes its time
            nodes, edges = inputs_of(graph, clip, call, budget)
            expected_nodes, expected_edges = slow.inputs(call, budget, names)
            np.testing.assert_allclose(nodes, expected_nodes, atol=2e-4)
            np.testing.assert_allclose(edges[..., :9], expected_edges[..., :9], atol=2e-4)
            # The finest comparison magnifies rounding a hundred times.
            np.testing.assert_allclose(edges[..., 9:], expected_edges[..., 9:], atol=5e-3)
        graph.keep(call.kept)
    assert len(sizes) > 2 and min(shares) > 0 and max(shares) < 0.5


def test_the_widths_are_those_that_the_class_declares():
    clip = made_clip(0)
    names = ("lat_cos", "attn_mass", "key_cos")
    for chosen in ((), names):
        graph = FrameGraph()
        call = next(clip.calls(4, 0, chosen))
        observe(graph, call, chosen)
        nodes, edges = inputs_of(graph, clip, call, 4)
        assert nodes.shape == (6, FrameGraph.NODE_INPUTS + 2 * (len(chosen) > 0))
        assert edges.shape == (6, 6, FrameGraph.EDGE_INPUTS + 4 * (len(chosen) > 0))
        assert nodes.dtype == edges.dtype == np.float32


@pytest.mark.parametrize(("budget", "expected"), [(8, 64), (68, 69)])
def test_of_too_many_frames_those_dropped_longest_ago_are_forgotten_and_kept_ones_never(budget, expected):
    clip = made_clip(1, num_context=70, num_predict=10)
    graph = FrameGraph()
    for call in clip.calls(budget, 0):
        observe(graph, call)
        assert set(call.numbers) <= set(graph.numbers.tolist())
        assert len(graph.numbers) == max(64, len(call.numbers))
        graph.keep(call.kept)
    assert len(graph.numbers) == expected


def seen_graphs(clip: MadeClip, scale=(1.0, 1.0), **options) -> list[dict]:
    """Arrays at every call, with the changes 1 − cosine and motion multiplied."""
    graph, arrays = FrameGraph(**options), []
    for call in clip.calls(4, 5, fewest=2):
        call.features[1:, 2] = 1 - scale[0] * (1 - call.features[1:, 2])
        call.features[:, 3] *= scale[1]
        observe(graph, call)
        arrays.append(graph.arrays(clip.total_steps - call.step - 1, 4))
        graph.keep(call.kept)
    return arrays


def test_inputs_do_not_depend_on_the_units_of_changes_unless_they_are_asked_to():
    """An autoencoder with another factor on its latents changes motion alone; one with other contrasts, cosines as well."""
    clip, unscaled = made_clip(2), NetworkConfig(scaled=False)
    plain = seen_graphs(clip)
    for other in (seen_graphs(made_clip(2, scale=7.0)), seen_graphs(clip, (1.0, 3.0)), seen_graphs(clip, (0.25, 1.0))):
        for one, changed in zip(plain, other, strict=True):
            for value, expected in zip(graph_inputs(changed), graph_inputs(one), strict=True):
                np.testing.assert_allclose(value, expected, atol=2e-3)
            pair = [network_inputs(*stacked([arrays]), unscaled) for arrays in (one, changed)]
            assert all(np.abs(a.numpy() - b.numpy()).max() > 0.01 for a, b in zip(pair[0][:2], pair[1][:2], strict=True))


def test_the_scale_is_of_consecutive_frames_so_far_each_counted_once():
    clip = made_clip(3)
    graph, pairs = FrameGraph(), set()
    for call in clip.calls(4, 2):
        observe(graph, call)
        pairs |= {(i, j) for i, j in zip(call.numbers, call.numbers[1:], strict=False) if j == i + 1}
        changes = np.array([SlowGraph(clip, 64).change(*pair) for pair in pairs])
        np.testing.assert_allclose(graph.arrays(1, 4)["scale"], changes.mean(axis=0), rtol=1e-4)
        assert graph.total[2] == len(pairs)
        graph.keep(call.kept)
    assert len(pairs) == 15, "the newest frame and the one before it are always known"


def test_a_call_that_cannot_follow_begins_a_clip():
    calls = list(made_clip(4).calls(4, 0))
    again = [calls[0], calls[3], next(made_clip(5, 8).calls(4, 0))]
    graph = FrameGraph()
    for call in calls[:3]:
        observe(graph, call)
        graph.keep(call.kept)
    for call in again:
        fresh = FrameGraph()
        observe(graph, call)
        observe(fresh, call)
        one, other = graph.arrays(3, 4), fresh.arrays(3, 4)
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])
        assert graph.pairs is not fresh.pairs and graph.total.tolist() == fresh.total.tolist()
        graph.keep(call.kept)


def test_a_still_clip_and_a_history_of_one_frame_give_finite_inputs():
    still = MadeClip(np.ones((16, 3, 2, 2), dtype=np.float32), 5)
    for clip, budget in ((still, 4), (still, 1), (made_clip(0, 1, 5), 1)):
        graph = FrameGraph()
        for call in clip.calls(budget, 0):
            observe(graph, call)
            for values in inputs_of(graph, clip, call, budget):
                assert np.isfinite(values).all() and np.abs(values).max() < 3
            graph.keep(call.kept)


def test_padding_is_behind_the_nodes_and_changes_no_input():
    names = ("lat_cos", "attn_mass", "key_cos")
    graphs = []
    for seed, context in enumerate((5, 9, 20)):
        graph, clip = FrameGraph(), made_clip(seed, context, 11)
        for call in clip.calls(4, seed, names):
            observe(graph, call, names)
            arrays = graph.arrays(clip.total_steps - call.step - 1, 4)
            if call.step == 2 * seed:
                graphs.append(arrays)
            graph.keep(call.kept)
    sizes = [len(arrays["ages"]) for arrays in graphs]
    assert len(set(sizes)) == 3
    for size in (None, 40):
        batch, mask = stacked(graphs, size)
        assert mask.sum(axis=1).tolist() == sizes and mask.shape[1] == (size or max(sizes))
        nodes, edges = graph_inputs(batch)
        for row, (arrays, count) in enumerate(zip(graphs, sizes, strict=True)):
            assert mask[row, :count].all()
            alone = graph_inputs(arrays)
            np.testing.assert_allclose(nodes[row, :count], alone[0], atol=1e-6)
            np.testing.assert_allclose(edges[row, :count, :count], alone[1], atol=1e-6)
        for name, value in trimmed(batch, max(sizes)).items():
            np.testing.assert_array_equal(value, stacked(graphs)[0][name])
