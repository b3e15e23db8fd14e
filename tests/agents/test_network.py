"""The scorer: blind to the order of nodes and to padding, and the same in NumPy as in torch."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from far_env.agents.config import NetworkConfig
from far_env.agents.graph_batches import Scores, network_inputs, stacked
from far_env.agents.network import RetentionNetwork, ValueNetwork, deeper
from far_env.agents.observation import FrameGraph, signal_arrays
from far_env.agents.policies import numpy_scorer
from tests.agents.made_rollouts import made_clip

SMALL = NetworkConfig(width=16, edge_width=8, num_layers=2, num_heads=2)
VARIANTS = {
    "whole": {},
    "without edges": {"edges": False},
    "without products": {"edge_updates": False},
    "without dropped frames": {"dropped_frames": False},
    "unscaled": {"scaled": False},
    "signals": {"signals": ("lat_cos", "attn_mass", "expected_mass", "key_cos")},
    "one layer, eight heads": {"num_layers": 1, "num_heads": 8},
}


def random_network(config: NetworkConfig, seed: int = 0) -> RetentionNetwork:
    """All weights are random, those too that begin at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    network = RetentionNetwork(config)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def graphs_of(config: NetworkConfig, contexts=(5, 20), step: int = 4) -> list[tuple[FrameGraph, int, int]]:
    """Graphs of made clips after a few evictions, with a budget and the frames to come."""
    situations = []
    for seed, context in enumerate(contexts):
        graph, clip = FrameGraph(config.dropped_frames), made_clip(seed, context)
        for call in clip.calls(4, seed, config.signals):
            graph.observe_frames(call.features, call.step, *signal_arrays(call.signals, config.signals))
            if call.step == step:
                break
            graph.keep(call.kept)
        situations.append((graph, 4 - seed, clip.total_steps - call.step - 1))
    return situations


def inputs_of(config: NetworkConfig, situations, size: int | None = None):
    """Nodes, edges, mask and remaining, of which a frame was dropped."""
    batch, mask = stacked([graph.arrays(left, budget) for graph, budget, left in situations], size)
    nodes, edges, valid = network_inputs(batch, mask, config)
    remaining = torch.from_numpy(batch["in_history"]).clone()
    for row, (graph, _, _) in enumerate(situations):
        remaining[row, graph.rows()[1]] = False
    return nodes, edges, valid, remaining


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_scorer_in_numpy_scores_and_drops_as_the_one_in_torch(variant):
    config = dataclasses.replace(SMALL, **variant)
    network = random_network(config)
    chosen, compared = set(), 0
    for seed, context in ((0, 5), (1, 20)):
        scorer, graph = numpy_scorer(network), FrameGraph(config.dropped_frames)
        clip, budget = made_clip(seed, context), 4
        for call in clip.calls(budget, seed, config.signals):
            signals, left = signal_arrays(call.signals, config.signals), clip.total_steps - call.step - 1
            kept = scorer.choose(call.features, call.step, clip.total_steps, budget, signals)
            graph.observe_frames(call.features, call.step, *signals)
            nodes, edges = in_numpy(network, graph, left, budget)
            remaining = np.ones(len(call.numbers), dtype=bool)
            torch_nodes, torch_edges, mask, _ = inputs_of(config, [(graph, budget, left)])
            encoded = network.encode(torch_nodes, torch_edges, mask)
            live = Scores(network, [(graph, budget, left)])
            while remaining.sum() > budget:
                of_nodes = torch.zeros(mask.shape, dtype=torch.bool)
                of_nodes[0, graph.rows()[remaining]] = True
                expected = network.score(*encoded, of_nodes)[0, graph.rows()[remaining]]
                actual = scorer.scores(nodes, edges, np.flatnonzero(remaining))
                np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4, rtol=1e-4)
                lowest = np.flatnonzero(remaining)[expected[:-1].argmin()]
                assert live.lowest([remaining]) == [lowest]
                remaining[lowest] = False
                compared += 1
            assert kept == np.flatnonzero(remaining).tolist()
            chosen.add(tuple(kept))
            call.kept = kept
            graph.keep(kept)
    assert compared > 30 and len(chosen) > 3


def in_numpy(network: RetentionNetwork, graph: FrameGraph, steps_left: int, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Representations of the frames in the history and of pairs of them."""
    scorer = numpy_scorer(network)
    scorer.graph = graph
    return scorer.encode(*scorer.inputs(steps_left, budget))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_further_layers_change_no_score_until_they_learn(variant):
    config = dataclasses.replace(SMALL, **variant)
    network = random_network(config)
    inputs = inputs_of(config, graphs_of(config))
    larger = deeper(network, config.num_layers + 2)
    assert larger.config == dataclasses.replace(config, num_layers=config.num_layers + 2)
    assert torch.equal(larger(*inputs), network(*inputs))
    torch.manual_seed(1)
    again = deeper(network, config.num_layers + 2)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in larger.state_dict().items())
    with torch.enable_grad():
        larger(*inputs)[inputs[3]].sum().backward()
    further = [layer for layers in (larger.edge_updates, larger.node_updates) for layer in layers[config.num_layers :]]
    used = [layer.down.weight.grad for layer in further if config.edges or layer in larger.node_updates]
    assert all(gradient is not None and gradient.any() for gradient in used), "and can learn"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_permuting_nodes_permutes_their_scores_and_padding_changes_nothing(variant):
    config = dataclasses.replace(SMALL, **variant)
    torch.manual_seed(1)
    for network in (random_network(config), ValueNetwork(config).eval()):
        situations = graphs_of(config)
        nodes, edges, mask, remaining = inputs_of(config, situations)
        together = network(nodes, edges, mask, remaining)
        order = torch.randperm(nodes.shape[1])
        permuted = network(nodes[:, order], edges[:, order][:, :, order], mask[:, order], remaining[:, order])
        scores = isinstance(network, RetentionNetwork)
        if scores:
            permuted, expected = permuted[remaining[:, order]], together[:, order][remaining[:, order]]
        else:
            expected = together
        torch.testing.assert_close(permuted, expected, atol=1e-4, rtol=1e-4)
        for row, situation in enumerate(situations):
            for size in (None, 40):
                *inputs, own = inputs_of(config, [situation], size)
                alone = network(*inputs, own)
                if scores:
                    alone, batched = alone[own], together[row][remaining[row]]
                else:
                    alone, batched = alone[0], together[row]
                torch.testing.assert_close(alone, batched, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_padding_contains_has_no_effect():
    network = random_network(SMALL)
    nodes, edges, mask, remaining = inputs_of(SMALL, graphs_of(SMALL), 40)
    before = network(nodes, edges, mask, remaining)[remaining]
    nodes[~mask] = 3.0
    edges[~(mask[:, :, None] & mask[:, None])] = -2.0
    torch.testing.assert_close(network(nodes, edges, mask, remaining)[remaining], before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("left_out", [None, "edges", "edge_updates", "dropped_frames", "scaled"])
def test_every_input_matters_unless_it_is_left_out(left_out):
    config = dataclasses.replace(SMALL, **({left_out: False} if left_out else {}))
    network, situations = random_network(config), graphs_of(config)
    nodes, edges, mask, remaining = inputs_of(config, situations)
    before = network(nodes, edges, mask, remaining)[remaining]

    def effect(changed_nodes, changed_edges):
        return (network(changed_nodes, changed_edges, mask, remaining)[remaining] - before).abs().max()

    in_history = torch.zeros_like(mask)
    for row, (graph, _, _) in enumerate(situations):
        in_history[row, graph.rows()] = True
    dropped_in_this_call = (in_history & ~remaining).nonzero()
    dropped_earlier = (mask & ~in_history).nonzero()
    assert len(dropped_in_this_call) == len(situations)
    assert bool(len(dropped_earlier)) == (left_out != "dropped_frames")
    for row, node in [*dropped_in_this_call[:1], *dropped_earlier[:1]]:
        for column in range(FrameGraph.NODE_INPUTS):
            changed = nodes.clone()
            changed[row, node, column] += 0.3
            assert effect(changed, edges) > 1e-5
    for column in range(FrameGraph.EDGE_INPUTS):
        changed = edges.clone()
        changed[0, 1, 2, column] += 0.3
        assert (effect(nodes, changed) > 1e-6) == (left_out != "edges")
    for graph, _, _ in situations:
        graph.total[:2] *= 2  # the mean change of the clip so far
    scaled_nodes, scaled_edges, *_ = inputs_of(config, situations)
    assert (effect(scaled_nodes, scaled_edges) > 1e-5) == (left_out != "scaled")


@torch.no_grad()
def test_the_products_over_third_frames_carry_what_two_edges_say_to_a_third():
    """Without nodes' attention, an edge learns of others through products alone."""
    for products in (True, False):
        config = dataclasses.replace(SMALL, num_layers=1, edge_updates=products)
        network = random_network(config)
        nodes, edges, mask, _ = inputs_of(config, graphs_of(config, contexts=(5,)))
        before = network.encode(nodes, edges, mask)[1]
        changed = edges.clone()
        changed[0, 3, 5] += 0.5
        difference = (network.encode(nodes, changed, mask)[1] - before).abs().amax(dim=-1)[0]
        touched = {tuple(pair) for pair in (difference > 1e-6).nonzero().tolist()}
        # first(i, k) · second(k, j): the edge is the first factor of all (3, j), the second of all (i, 5).
        count = mask.shape[1]
        expected = {(3, j) for j in range(count)} | {(i, 5) for i in range(count)} if products else {(3, 5)}
        assert touched == expected


def test_the_default_size_is_the_one_that_the_page_states():
    page = (Path(__file__).parents[2] / "docs" / "learned_policy.md").read_text(encoding="utf-8")
    stated = int(re.search(r"of about (\d+),000 weights", page)[1])
    assert round(sum(parameter.numel() for parameter in RetentionNetwork().parameters()) / 1000) == stated


def test_sizes_that_do_not_fit_are_refused():
    for options, message in (
        ({"width": 30}, "width 30 must be a multiple of num_heads 4"),
        ({"edge_width": 9}, "edge_width must be even, got 9"),
        ({"edge_width": 64}, "edge_width 64 is above the width, 48"),
        ({"num_layers": 0}, "num_layers must be above 0, got 0"),
        ({"width": 8192}, "width 8192 with num_layers 3 is too large a network"),
        ({"signals": ("key_proto",)}, "cannot read key_proto: its length depends on the host"),
        ({"signals": ("column_gap",)}, "cannot read column_gap: it ignores horizontal shifts"),
    ):
        with pytest.raises(ValueError, match=message):
            NetworkConfig(**options)


def test_a_copy_of_the_numpy_scorer_shares_weights_and_has_a_graph_of_its_own():
    scorer = numpy_scorer(random_network(dataclasses.replace(SMALL, dropped_frames=False)))
    clip = made_clip(0)
    for call in clip.calls(4, 0):
        call.kept = scorer.choose(call.features, call.step, clip.total_steps, 4)
    copied = copy.deepcopy(scorer)
    assert copied.weights is scorer.weights and copied.graph.births == scorer.graph.births
    first = next(clip.calls(4, 1))
    copied.choose(first.features, first.step, clip.total_steps, 4)
    assert copied.graph.births != scorer.graph.births and len(scorer.graph.births) == 4
