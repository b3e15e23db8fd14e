"""A Ray cluster of two machines with one CPU core each, simulated on this one."""

from __future__ import annotations

import logging
import os

import pytest


@pytest.fixture(scope="package")
def cluster():
    """The machine of the first node stays; the tests may remove the second, and `second_node` adds it again."""
    pytest.importorskip("ray", reason="ray (extra ray) is not installed")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    cluster.second = None
    yield cluster
    cluster.shutdown()


@pytest.fixture(autouse=True)
def known_to_answer(request, monkeypatch):
    """Commands in this process need not ask in a process of their own, for seconds, whether the cluster answers."""
    if "cluster" in request.fixturenames:
        monkeypatch.setattr("far_env.distributed.cluster.check_answers", lambda address: None)


@pytest.fixture
def second_node(cluster):
    """The cluster, with its second machine."""
    if cluster.second is None:
        cluster.second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    return cluster
