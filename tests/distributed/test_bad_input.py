"""What is wrong with a cluster is said in one sentence, soon."""

from __future__ import annotations

import socket
import sys
import time

import pytest

from far_env.cli import main
from far_env.distributed import cluster
from far_env.distributed.cluster import ActorSettings, check_resources
from far_env.distributed.pool import check_same

EVALUATE = ["evaluate", "--policies", "recent_fill", "--clips", "1", "--metrics", "psnr"]


def error(capsys, *args):
    start = time.monotonic()
    assert main([*EVALUATE, *args]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("far-env: error: ")
    return sentence, time.monotonic() - start


def test_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'far-env[ray]'" in error(capsys, "--ray")[0]


def test_a_ray_that_does_not_start(monkeypatch, capsys):
    ray = pytest.importorskip("ray", reason="ray (extra ray) is not installed")

    def init(*args, **options):
        raise Exception("The current node timed out during startup.\nMore lines.")

    monkeypatch.setattr(ray, "init", init)
    sentence, _ = error(capsys, "--ray")
    assert sentence.endswith("Ray does not start on this machine: The current node timed out during startup.")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--actors", "2"], "--actors is used with --ray"),
        (["--ray", "--actors", "0"], "--actors must be at least 1"),
        (["--ray", "--gpus-per-actor", "2"], "must be between 0 and 1, got 2"),
        (["--ray", "--device", "cuda"], "use --gpus-per-actor"),
        (["--ray", "--metrics", "fvd,psnr"], "evaluate it without --ray"),
        (["--ray", "--memory", "tokens", "--policies", "recent_fill"], "evaluate it without --ray"),
        (["--ray", "--gpus-per-actor", "1", "--precision", "auto"], "float32 or bfloat16"),
    ],
)
def test_options_that_do_not_go_together(capsys, args, words):
    assert words in error(capsys, *args)[0]


def test_an_address_without_a_cluster(capsys, monkeypatch):
    pytest.importorskip("ray", reason="ray (extra ray) is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sentence, seconds = error(capsys, "--ray", "--address", f"127.0.0.1:{port}")
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in sentence and "ray start --head" in sentence
    assert "neither auto nor HOST:PORT" in error(capsys, "--ray", "--address", "ray://somewhere:10001")[0]
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        port = silent.getsockname()[1]
        sentence, with_start = error(capsys, "--ray", "--address", f"127.0.0.1:{port}")
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in sentence
    assert with_start - seconds < 10


@pytest.mark.parametrize(
    ("settings", "nodes", "words"),
    [
        (ActorSettings(1, gpus_per_actor=1), [{"CPU": 4}], "gpus-per-actor is 1, but the cluster has 1 machine with 4 CPU"),
        (ActorSettings(3, gpus_per_actor=1), [{"CPU": 4, "GPU": 1}] * 2, "3 actors with 1 CPU core and 1 GPUs each do not fit"),
        (ActorSettings(3, gpus_per_actor=0.6), [{"CPU": 4, "GPU": 2}], "enough for 2"),
        (ActorSettings(5, cpus_per_actor=2), [{"CPU": 4}, {"CPU": 5}], "enough for 4"),
    ],
)
def test_actors_that_do_not_fit(settings, nodes, words):
    with pytest.raises(ValueError, match="the cluster has") as caught:
        check_resources(settings, nodes)
    assert words in str(caught.value)


def test_actors_that_fit():
    check_resources(ActorSettings(4, gpus_per_actor=0.5), [{"CPU": 4, "GPU": 2}])
    check_resources(ActorSettings(6, gpus_per_actor=1 / 3), [{"CPU": 9, "GPU": 2}])


@pytest.mark.parametrize(
    ("kind", "words"),
    [("versions", "version of torch"), ("weights", "host of torch"), ("policies", "content of policy torch")],
)
def test_machines_that_differ(kind, words):
    here, there = ({"machine": "b", kind: {"torch": value, "same": "1"}} for value in ("1.0", "2.0"))
    check_same(here, here)
    with pytest.raises(ValueError, match=f"the machine b has another {words} than this one \\(2.0, not 1.0\\)"):
        check_same(here, there)
