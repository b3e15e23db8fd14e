"""Policy files in evaluations: the same answers as in this process, a copy for each clip, and files that do harm."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time

import pytest

from far_env import cli
from far_env.contract import RolloutState, copy_for_clip
from far_env.errors import PolicyError
from far_env.policies import load_policy
from far_env.policy_file import policy_from_file
from far_env.policy_process import IsolatedPolicy, PolicyProcess
from far_env.rollout.play import play
from tests.cli.test_benchmark_command import ended

WITH_MEMORY = """
import random

class Remembers:
    signals = ("lat_cos", "attn_mass")

    def __init__(self):
        self.calls, self.seed = 0, None

    def begin_clip(self, seed):
        self.seed = seed

    def build_temporal_cache_plan(self, metas, state, budget):
        self.calls += 1
        cosines, mass = state.signals["lat_cos"], state.signals["attn_mass"]
        assert cosines.shape == (len(metas), len(metas)) and cosines.dtype == "float32" and mass.shape == (len(metas),)
        noise = [1e-3 * ((i * 7 + self.calls * 5 + self.seed) % 11) for i in range(len(metas))]
        scores = [float(mass[i]) + noise[i] - float(cosines[i, 0]) for i in range(len(metas))]
        kept = sorted(range(len(metas) - 1), key=scores.__getitem__)[: budget["max_frames"] - 1]
        return TemporalCachePlan((ChunkDecision(i, "keep" if i in kept else "drop") for i in range(len(metas))))
"""
HOSTILE = """
class Hostile:
    def __init__(self):
        {init}
    def build_temporal_cache_plan(self, metas, state, budget):
        {body}
        return TemporalCachePlan([ChunkDecision(m.chunk_id, "keep") for m in metas])
"""


def write(folder, text, name="policy.py"):
    path = folder / name
    path.write_text(text)
    return path


def hostile(folder, body, init="pass"):
    return write(folder, HOSTILE.format(body=body.replace("\n", "\n        "), init=init))


def kept(workload, policy, clip_ids):
    clips = [workload.clips.clip("test", clip_id) for clip_id in clip_ids]
    return [[decision.kept for decision in row] for row in play(workload, clips, [7 + i for i in clip_ids], policy, 3)[1]]


def test_a_file_decides_in_its_process_as_in_this_one_whatever_the_batch(tiny_workload, tmp_path):
    path = write(tmp_path, WITH_MEMORY)
    policy = load_policy(str(path))
    assert isinstance(policy, IsolatedPolicy) and policy.signals == ("lat_cos", "attn_mass") and policy.name == str(path)
    expected = kept(tiny_workload, policy_from_file(path), [0, 1, 2])
    assert kept(tiny_workload, policy, [0, 1, 2]) == expected
    assert [kept(tiny_workload, policy, [i])[0] for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    assert len({tuple(row) for row in expected}) > 1


def test_what_a_file_draws_depends_on_the_clip_alone(tiny_workload, tmp_path):
    body = "import random\nkeep = random.sample(range(len(metas) - 1), budget['max_frames'] - 1)\n"
    body += "return TemporalCachePlan([ChunkDecision(i, 'keep') for i in keep])"
    policy = load_policy(str(hostile(tmp_path, body)))
    together = kept(tiny_workload, policy, [0, 1])
    assert together == [kept(tiny_workload, policy, [i])[0] for i in (0, 1)] and together[0] != together[1]


def test_an_error_says_in_which_line_of_the_file_it_was_raised(tiny_workload, tmp_path):
    text = "def find(metas):\n    return metas['ages']\n\nclass Policy:\n"
    text += "    def build_temporal_cache_plan(self, metas, state, budget):\n        return find(metas)\n"
    path = write(tmp_path, text)
    with pytest.raises(PolicyError, match=r"raised TypeError: list indices must be .* \(line 2\)$"):
        kept(tiny_workload, load_policy(str(path)), [0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", "took longer than 1 s"),
        ("import os; os._exit(3)", "ended its process with status 3"),
        ("import sys; sys.exit('enough')", "raised SystemExit: enough"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("x = bytearray(40 * 2**30)", "raised MemoryError"),
        ("f = lambda: f()\nf()", "raised RecursionError"),
        (
            "import sys; print('x' * 10**7); print('y' * 10**7, file=sys.stderr); raise ValueError('flooded')",
            "flooded",
        ),
        (
            "import os; os.write(WRITE, b'nonsense\\n')",
            "over its answers",
        ),
        ("import os; os.write(WRITE, b'x' * 2**25)", "answered more than 16 MiB"),
        ("import os; os.closerange(3, 99)", "ended its process with status 1"),
        ("return 3", "returned int, not a TemporalCachePlan"),
        ("import itertools; return TemporalCachePlan(ChunkDecision(0, 'keep') for _ in itertools.count())", "twice"),
        ("return TemporalCachePlan([ChunkDecision(0, 'stay')])", "unknown action 'stay'"),
    ],
)
def test_a_hostile_file_ends_an_evaluation_in_one_sentence(tiny_host_folder, tmp_path, capsys, body, message):
    if "WRITE" in body:  # the descriptor of the answers is the worker's second number
        body = "import sys\n" + body.replace("WRITE", "int(sys.argv[3])")
    path = hostile(tmp_path, body)
    arguments = ["--workload", "pan", "--host", str(tiny_host_folder), "--device", "cpu", "--clips", "1", "--metrics", "psnr"]
    start = time.monotonic()
    status = cli.main(["evaluate", "--policies", f"recent_fill,{path}", *arguments, "--policy-seconds", "1"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1 and message in lines[0] and str(path) in lines[0]
    assert time.monotonic() - start < 60


def test_a_child_that_leaves_the_process_group_is_ended_too(tmp_path):
    body = "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    body += "return TemporalCachePlan([ChunkDecision(child.pid, 'keep')])"

    with PolicyProcess(hostile(tmp_path, body)) as policy:
        plan = policy.build_temporal_cache_plan([], RolloutState(1, 0.1, 4), {"max_frames": 3, "capacity_mb": 0.1})
        pid = plan.chunk_decisions[0].chunk_id
        os.kill(pid, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not ended(pid):
        time.sleep(0.01)
    assert ended(pid)


def test_a_looping_policy_ends_soon_after_its_evaluation_was_killed(tmp_path):
    told = tmp_path / "pid"
    path = hostile(tmp_path, f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(str(os.getpid()))\nwhile True: pass")
    code = (
        "import sys; from pathlib import Path; from far_env.contract import RolloutState\n"
        "from far_env.policy_process import PolicyProcess\n"
        "policy = PolicyProcess(Path(sys.argv[1]), call_seconds=600)\n"
        "policy.build_temporal_cache_plan([], RolloutState(1, 0.1, 4), {'max_frames': 3, 'capacity_mb': 0.1})"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as evaluation:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (told.exists() and told.read_text()):
            time.sleep(0.05)
        pid = int(told.read_text())
        assert not ended(pid)
        evaluation.kill()
    assert_ends(pid)


def assert_ends(pid, seconds=20):
    """The process ends by itself within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not ended(pid):
        time.sleep(0.02)
    assert ended(pid)


def test_a_closed_process_says_so(tmp_path):

    policy = PolicyProcess(hostile(tmp_path, "pass"))
    policy.close()
    policy.close()
    with pytest.raises(PolicyError, match="has been ended"):
        policy.build_temporal_cache_plan([], RolloutState(1, 0.1, 4), {"max_frames": 3, "capacity_mb": 0.1})


def test_the_process_keeps_the_copies_of_clips_that_are_played_and_no_others(tmp_path):
    path = hostile(
        tmp_path,
        "raise ValueError(f'{len(Hostile.alive)} copies')",
        "import weakref; vars(Hostile).get('alive') or setattr(Hostile, 'alive', weakref.WeakSet()); Hostile.alive.add(self)",
    )
    path.write_text(path.read_text() + "\n    def __deepcopy__(self, memo):\n        return Hostile()\n")
    policy = load_policy(str(path))

    def count_copies(copied):
        """How many objects of the class the process holds after a call of this one."""
        with pytest.raises(PolicyError) as caught:
            copied.build_temporal_cache_plan([], RolloutState(1, 0.1, 4), {"max_frames": 3, "capacity_mb": 0.1})
        count = int(re.search(r"(\d+) copies", str(caught.value))[1])
        del caught  # its traceback holds the copy
        return count

    playing = [copy_for_clip(policy, seed) for seed in range(3)]
    counts = [count_copies(copied) for copied in playing]
    for seed in range(3, 8):
        counts.append(count_copies(copy_for_clip(policy, seed)))
        gc.collect()
    assert counts[:3] == [2, 3, 4] and max(counts[3:]) <= 6, "the policy itself, those of three clips, and two of the others"
