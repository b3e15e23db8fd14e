"""Environments in child processes: they neither hang after a fork nor slow one another down.

Every script runs in a fresh interpreter without OMP_NUM_THREADS, whose torch has used several threads before it starts
children: the state in which OpenMP cannot be used after a fork.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv

import far_env

HOST, LIBRARY, METHOD = sys.argv[1:]
OPTIONS = {"budget": 4, "host": HOST, "device": "cpu"}


class Threads(gym.Wrapper):
    def num_threads(self):
        return torch.get_num_threads()


def make():
    import far_env

    return Threads(gym.make("far_env/Pan-v0", **OPTIONS))


def play_gymnasium(env):
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())


def play_sb3(env):
    env.reset()
    for _ in range(3):
        env.step(np.stack([env.action_space.sample()] * 2))


if __name__ == "__main__":
    torch.set_num_threads(4)
    torch.ones(10_000_000).add(1).sum()
    torch.randn(500, 500) @ torch.randn(500, 500)
    if METHOD == "default":
        env = gym.make_vec("far_env/Pan-v0", num_envs=2, vectorization_mode="async", **OPTIONS)
        play_gymnasium(env)
    else:
        if LIBRARY == "gymnasium":
            env = AsyncVectorEnv([make, make], context=METHOD)
            play_gymnasium(env)
            print("threads", *env.call("num_threads"))
        else:
            from stable_baselines3.common.vec_env import SubprocVecEnv

            env = SubprocVecEnv([make, make], start_method=METHOD)
            play_sb3(env)
            print("threads", *env.env_method("num_threads"))
    env.close()
    print("parent", torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
@pytest.mark.parametrize(
    ("library", "method", "variable"),
    [
        ("gymnasium", "default", {}),
        ("gymnasium", "fork", {}),
        ("gymnasium", "spawn", {}),
        ("sb3", "fork", {"OMP_NUM_THREADS": "4"}),
        ("sb3", "forkserver", {}),
    ],
)
def test_environments_in_child_processes_work_out_of_the_box_with_one_thread_each(
    library, method, variable, tiny_host_folder, tmp_path
):
    script = tmp_path / "play.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= variable
    command = [sys.executable, "-W", "error::RuntimeWarning", str(script), str(tiny_host_folder), library, method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [] if method == "default" else ["threads 1 1"]
    assert done.stdout.split("\n") == [*expected, "parent 4", ""]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
def test_a_forked_process_can_evaluate(tiny_host_folder, tmp_path):
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, sys, torch\n"
        "from far_env.contract import NewestFrames\n"
        "from far_env.rollout.play import play\n"
        "from far_env.workloads import make_workload\n"
        "torch.set_num_threads(4)\n"
        "torch.ones(10_000_000).add(1).sum()\n"
        "workload = make_workload('pan', host=sys.argv[1], device='cpu')\n"
        "clip = workload.clips.clip('test', 0)\n"
        "run = lambda: play(workload, [clip], [42], NewestFrames(), 4)[0].generated([0])\n"
        "expected = run()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = torch.allclose(run(), expected, atol=1e-4)\n"
        "    os._exit(0 if same and torch.get_num_threads() == 1 else 7)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, str(script), str(tiny_host_folder)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
