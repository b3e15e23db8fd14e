"""Expert data that actors collect are those of one process, and a stopped collection goes on."""

from __future__ import annotations

import pytest
import torch

from far_env.agents.collection import BATCH_SIZE, collect, play_here
from far_env.agents.config import AgentTraining, NetworkConfig
from far_env.agents.expert_actors import ActorBatchPlayer
from far_env.device import denormals_flushed
from far_env.distributed.cluster import ActorSettings
from far_env.workloads import make_workload
from tests.agents.test_network import random_network

NETWORK = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
CLIPS, BUDGETS = [3, 1, 4, 1, 5, 9, 2], [4, 2, 4, 6, 2, 4, 4]


@pytest.fixture(scope="module")
def workload(tiny_host_folder):
    return make_workload("pan", host=str(tiny_host_folder), device="cpu")


@denormals_flushed()
def gather(workload, actor, **options):
    true_frames = actor is None
    common = {"config": NETWORK, "true_frames": true_frames, "seed": 3, "batch_size": 2, "progress": False}
    return collect(workload, CLIPS, BUDGETS, actor=actor, **common, **options)


def check_equal(data, expected):
    for name, values in vars(expected).items():
        assert torch.equal(getattr(data, name), values), name


def test_actors_collect_what_one_process_collects(second_node, workload, tiny_host_folder):
    config = AgentTraining(host=str(tiny_host_folder), ray=ActorSettings(2, second_node.address))
    with ActorBatchPlayer(config) as player:
        for actor in (None, random_network(NETWORK)):
            data = gather(workload, actor, player=player)
            assert len(data) > 20
            check_equal(data, gather(workload, actor))


def test_a_stopped_collection_goes_on(workload, tmp_path):
    played = []

    def stops(workload, batches, actor):
        for number, (batch, data) in enumerate(play_here(workload, batches, actor)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch, data

    def counts(workload, batches, actor):
        played.extend(batches)
        return play_here(workload, batches, actor)

    with pytest.raises(KeyboardInterrupt):
        gather(workload, None, player=stops, parts=tmp_path / "parts")
    data = gather(workload, None, player=counts, parts=tmp_path / "parts")
    assert [batch.first for batch in played] == [4, 6] and BATCH_SIZE > 2
    check_equal(data, gather(workload, None))
