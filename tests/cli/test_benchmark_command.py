"""The benchmark's evaluation: its loop against a plain restatement, its line of metrics, and policy files of every sort."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env import baselines, cli
from far_env.clips.worlds import WORLDS
from far_env.contract import FrameMeta, RolloutState
from far_env.errors import PolicyError
from far_env.evaluation import benchmark
from far_env.evaluation.benchmark import TASKS, BenchmarkScore, benchmark_workload, run_benchmark
from far_env.frame_meta import frame_features, frame_meta_list, frame_size_mb
from far_env.metrics import psnr, ssim
from far_env.policy_file import policy_from_file
from far_env.policy_process import PolicyProcess
from far_env.rollout.noise import rollout_noise
from far_env.workloads import WORKLOADS

LINE = re.compile(r"TEST_METRICS: (\w+=\S+)( \w+=\S+)*")
NUMBER = re.compile(r"[-+]?[\d.]+(e[+-]?\d+)?")
PASTED = """
class VideoTemporalKVPolicy:
    def __init__(self):
        self.calls = 0

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        n = len(chunk_meta_list)
        {body}
"""
KEEP_NEWEST = """return TemporalCachePlan([ChunkDecision(m.chunk_id, "keep") for m in chunk_meta_list])"""


def policy_file(folder, body, name="policy.py"):
    path = folder / name
    path.write_text(PASTED.format(body=body.replace("\n", "\n        ")))
    return path


def restated(workload, policy, max_frames, num_clips):
    """The benchmark's loop in its order, without cache or batch: mean PSNR, mean SSIM and what each call kept."""
    host, scores, kept_numbers = workload.host, [], []
    capacity, size = workload.capacity_mb(max_frames), frame_size_mb(host.latent_shape)
    for clip_index in range(num_clips):
        clip = workload.clips.clip("test", clip_index)
        noise = rollout_noise(42 + clip_index, workload.num_predict, host.latent_shape)
        kept = host.autoencoder.encode(torch.from_numpy(clip.frames[None, : workload.num_context]))[0]
        numbers, predicted = list(range(workload.num_context)), []
        state = RolloutState(0, capacity, workload.num_predict)
        for step in range(workload.num_predict):
            state.step = step
            frame = host.generate(list(kept), noise[step], workload.conditions())
            predicted.append(frame)
            kept = torch.cat([kept, frame[None]])
            numbers.append(workload.num_context + step)
            if max_frames < 9999 and len(kept) > max_frames:
                metas = frame_meta_list(frame_features(kept[None])[0], step, size)
                plan = policy.build_temporal_cache_plan(metas, state, {"max_frames": max_frames, "capacity_mb": capacity})
                chosen = {d.chunk_id for d in plan.chunk_decisions if d.action in ("keep", "demote_to_long_term")}
                chosen.add(len(kept) - 1)
                ids = torch.tensor(sorted(chosen)[-max_frames:])
                kept, numbers = kept[ids], [numbers[i] for i in ids.tolist()]
                kept_numbers.append(numbers)
        pixels = host.autoencoder.decode(torch.stack(predicted)[None])[0].float()
        truth = torch.from_numpy(clip.frames[workload.num_context : workload.num_frames])
        scores.append((psnr(pixels, truth).item(), ssim(pixels, truth)))
    return np.mean(scores, axis=0), kept_numbers


QUIRKY = """
# State across clips and in the benchmark's own state object; ids that repeat, count from the end, are missing or unknown.
self.calls += 1
rollout_state.num_calls = getattr(rollout_state, "num_calls", 0) + 1
ids = [np.int64((self.calls * 5) % n), (self.calls + rollout_state.num_calls) % n, -2, -2, True]
plan = [ChunkDecision(i, "demote_to_long_term" if i == 1 else "keep") for i in ids]
plan += [ChunkDecision(ids[0], "drop"), ChunkDecision("nobody", "discard"), ChunkDecision(10**6, None)]
return TemporalCachePlan(plan if rollout_state.step != 6 else [])
"""


@pytest.mark.parametrize("max_frames", [2, 4, 9999])
@torch.no_grad()
def test_a_quirky_policy_is_played_as_the_benchmark_plays_it(tiny_workload, tmp_path, max_frames):
    path = policy_file(tmp_path, QUIRKY)
    expected, kept = restated(tiny_workload, policy_from_file(path), max_frames, 2)
    with PolicyProcess(path) as policy:
        score = run_benchmark(tiny_workload, max_frames, policy, 2, metrics=("psnr", "ssim"), progress=False)
    assert score.values["psnr"] == pytest.approx(expected[0], abs=1e-3)
    assert score.values["ssim"] == pytest.approx(expected[1], abs=1e-3)
    if max_frames == 4:
        assert any(numbers != sorted(set(numbers)) for numbers in kept), "it does keep frames twice or out of order"
        assert len({len(numbers) for numbers in kept}) > 1


def test_one_object_serves_all_clips_and_is_asked_after_the_last_frame(tiny_workload):
    calls = []

    class Watching:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            calls.append((id(self), id(rollout_state), rollout_state.step, len(chunk_meta_list), dict(budget_state)))
            states.append(rollout_state)  # so that no address is used twice
            return baselines.make("recent_fill").build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)

    states = []
    run_benchmark(tiny_workload, 8, Watching(), 2, metrics=("psnr",), progress=False)
    assert [call[2:4] for call in calls] == [(step, 9) for step in range(3, 11)] * 2
    assert len({call[0] for call in calls}) == 1 and len({call[1] for call in calls}) == 2
    assert calls[0][4] == {"max_frames": 8, "capacity_mb": 8 * 4 * 8 * 8 * 4 / 2**20}


def test_the_line_is_the_benchmarks(tiny_workload):
    score = run_benchmark(tiny_workload, 4, baselines.make("recent_fill"), 2, metrics=("psnr", "ssim"), progress=False)
    line = score.line()
    assert LINE.fullmatch(line)
    values = dict(part.split("=") for part in line.split()[1:])
    keys = "temporal_quality_main psnr ssim peak_kv_memory_mb fps n_frames_kept eval_mode n_clips elapsed_s"
    assert list(values) == keys.split()
    assert values.pop("eval_mode") == "real_rollout" and all(NUMBER.fullmatch(value) for value in values.values())
    assert float(values["temporal_quality_main"]) == pytest.approx(score.values["psnr"] / 40 * 100, abs=1e-3)
    assert values["n_frames_kept"] == "4" and values["n_clips"] == "2"
    assert float(values["peak_kv_memory_mb"]) == pytest.approx(4 * 4 * 64 * 4 / 2**20, abs=0.01)
    assert float(values["fps"]) == pytest.approx(2 * 11 / score.values["elapsed_s"], rel=1e-3)
    full = run_benchmark(tiny_workload, 9999, None, 1, metrics=("psnr",), progress=False)
    assert full.values["n_frames_kept"] == 16


def test_numbers_that_cannot_be_read_are_left_out(tiny_workload, monkeypatch):
    monkeypatch.setattr(benchmark, "clip_metrics", lambda *_: [{"psnr": math.inf, "ssim": 1.0}])
    score = run_benchmark(tiny_workload, 4, baselines.make("recent_fill"), 1, metrics=("psnr", "ssim"), progress=False)
    assert "psnr" not in score.line() and "inf" not in score.line() and "ssim=1.0000" in score.line()
    assert "psnr is inf" in score.unavailable["psnr"]
    values = {"temporal_quality_main": 57.7, "psnr": 23.1, "eval_mode": "real_rollout", "n_clips": 50, "elapsed_s": 1e4}
    assert BenchmarkScore(values, {}).line().endswith("psnr=23.1000 eval_mode=real_rollout n_clips=50 elapsed_s=10000.0")


def ask(policy, step=3, num_frames=5, max_frames=4):
    metas = frame_meta_list(torch.rand(num_frames, 4), step, 0.001)
    return policy.build_temporal_cache_plan(
        metas, RolloutState(step, 0.004, 11), {"max_frames": max_frames, "capacity_mb": 0.1}
    )


def test_a_process_is_asked_exactly_what_the_policy_would_be(tmp_path):
    path = policy_file(
        tmp_path,
        """
self.calls += 1
said = repr((chunk_meta_list, rollout_state, budget_state, type(budget_state), self.calls, os.getpid() == PARENT))
return TemporalCachePlan([ChunkDecision(ord(letter), "keep") for letter in said])
""".replace("PARENT", str(os.getpid())),
    )
    metas = frame_meta_list(torch.rand(3, 4), 2, 0.1)
    state, budget = RolloutState(2, 0.25, 11), {"max_frames": 4, "capacity_mb": 1 / 3}
    with PolicyProcess(path) as policy:
        for call in (1, 2):
            plan = policy.build_temporal_cache_plan(metas, state, budget)
            said = "".join(chr(decision.chunk_id) for decision in plan.chunk_decisions)
            assert said == repr((metas, state, budget, dict, call, False))
        assert isinstance(metas[0], FrameMeta)


def test_what_a_process_draws_can_be_repeated(tmp_path):
    path = policy_file(
        tmp_path,
        """
import random
draws = [random.randrange(1000), int(np.random.randint(1000))]
return TemporalCachePlan([ChunkDecision(draw, "keep") for draw in draws])
""",
    )
    runs = []
    for _ in range(2):
        with PolicyProcess(path) as policy:
            runs.append([[d.chunk_id for d in ask(policy, step).chunk_decisions] for step in (3, 4, 3)])
    assert runs[0] == runs[1] and len({tuple(draws) for draws in runs[0]}) == 3, "every clip draws again"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no\\nidea')", "raised RuntimeError: no idea"),
        ("sys.exit(3)", "raised SystemExit: 3"),
        ("os._exit(3)", "ended its process with status 3"),
        ("os.kill(os.getpid(), 9)", "ended its process with signal SIGKILL"),
        ("while True: pass", "took longer than 0.5 s, and was stopped"),
        ("os.read(0, 1) or time.sleep(60)", "took longer than 0.5 s, and was stopped"),
        ("return None", "answered NoneType, which is not a plan"),
        ("return TemporalCachePlan(5)", "answered TemporalCachePlan, which is not a plan (TypeError"),
        ("return TemporalCachePlan(['keep'])", "answered TemporalCachePlan, which is not a plan (AttributeError"),
        ("return TemporalCachePlan([ChunkDecision(1.5, 'keep')])", "which is not a plan (TypeError: 'float' object"),
        ("for fd in range(3, 999):\n    try: os.write(fd, b'nonsense\\n')\n    except OSError: pass", "over its answers"),
        ("os.closerange(3, 999)\ntime.sleep(60)", "closed its answers"),
    ],
)
def test_a_policy_that_fails_is_told_in_one_sentence(tmp_path, body, message):
    with PolicyProcess(policy_file(tmp_path, body), call_seconds=0.5) as policy, pytest.raises(PolicyError) as caught:
        ask(policy)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "cannot be loaded: SyntaxError"),
        ("import sys; sys.exit()", "cannot be loaded: SystemExit"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "must define exactly one class with build_temporal_cache_plan; it has 0"),
        (PASTED.format(body="pass").replace("self.calls = 0", "1 / 0"), "cannot be loaded: ZeroDivisionError"),
        ("while True: pass", "took longer than 1 s"),
        (
            PASTED
            + "\ndef generate_with_policy(): pass\ndef run_evaluation(): pass\nraise RuntimeError('Cannot find FAR repo.')",
            "policy.py is the benchmark's whole program; give a file that holds its class VideoTemporalKVPolicy alone",
        ),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "policy.py"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        PolicyProcess(path, load_seconds=1.0 if "True" in text else 60.0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_left_running(tmp_path):
    """Not even a child of the policy, which holds its pipes open."""
    body = (
        "child = __import__('subprocess').Popen(['sleep', '600'])\nreturn TemporalCachePlan([ChunkDecision(child.pid, 'keep')])"
    )
    policy = PolicyProcess(policy_file(tmp_path, body))
    child = ask(policy).chunk_decisions[0].chunk_id
    os.kill(child, 0)
    policy.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not ended(child):
        time.sleep(0.01)
    assert ended(child) and policy._supervisor.returncode == 0


def ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_file_may_be_written_for_the_benchmarks_module(tmp_path):
    path = tmp_path / "policy.py"
    path.write_text(
        "def helper(metas: List[FrameMeta]) -> Optional[float]:\n    return math.fsum(np.array([m.age for m in metas]))\n"
        "class Base:\n    def build_temporal_cache_plan(self, *args): raise NotImplementedError\n"
        "@dataclass\nclass VideoTemporalKVPolicy(Base):\n    total: float = field(default=0.0)\n"
        "    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):\n"
        "        self.total += helper(deepcopy(chunk_meta_list)) + float(F.relu(torch.ones(())))\n"
        "        return TemporalCachePlan([ChunkDecision(int(self.total), 'keep')])\n"
    )
    with PolicyProcess(path) as policy:
        assert ask(policy).chunk_decisions[0].chunk_id == 0 + 1 + 2 + 3 + 4 + 1


def command(capsys, *args):
    status = cli.main(["benchmark", "--device", "cpu", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    for task in TASKS.values():
        monkeypatch.delenv(task.data_variable, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_the_dry_run_prints_one_line_and_tells_the_rest_apart(capsys, tmp_path, no_data, monkeypatch):
    quick = replace(WORKLOADS["ucf101_short_prediction"], num_steps=1)
    monkeypatch.setattr("far_env.workloads.UCF101_SHORT_PREDICTION", quick)
    body = "print('TEST_METRICS: temporal_quality_main=100')\n" + KEEP_NEWEST
    path = policy_file(tmp_path, body)
    status, out, err = command(capsys, "--host", "embedded", "--policy", str(path), "--budget", "8", "--clips", "1")
    assert status == 0 and out.count("\n") == 1 and LINE.fullmatch(out.strip())
    assert "n_frames_kept=8 eval_mode=real_rollout n_clips=1" in out and "lpips" not in out and "100.0" not in out
    assert "a dry run: host embedded on clips of the world pan" in err
    assert "no lpips: LPIPS needs AlexNet's ImageNet weights" in err
    assert re.search(r"policy .*policy\.py printed \d+ bytes, which are not shown: 'TEST_METRICS: temporal", err)
    _, same, _ = command(
        capsys, "--host", "embedded", "--policy", "recent_fill", "--budget", "medium_history_budget", "--clips", "1"
    )
    measured = [re.sub(r"(fps|elapsed_s)=\S+", "", line) for line in (out, same)]
    assert measured[0] == measured[1]


@pytest.mark.parametrize(
    ("name", "world", "lengths"), [("ucf101_short_prediction", "pan", (5, 11)), ("dmlab_long_prediction", "orbit", (36, 36))]
)
def test_dry_runs_have_the_benchmarks_lengths_and_steps(no_data, name, world, lengths):
    workload, dry = benchmark_workload(name, "embedded", device="cpu")
    assert dry and workload.clips is WORLDS[world] and workload.name == name
    assert (workload.num_context, workload.num_predict, workload.num_steps) == (*lengths, 20)
    assert workload.host.dtype == torch.float32
    short = replace(workload, num_steps=1, num_context=5, num_predict=3)
    assert run_benchmark(short, 4, baselines.make("recent_fill"), 1, metrics=("psnr",), progress=False).values["psnr"] > 0


def test_failing_policies_and_bad_arguments_end_in_one_sentence(capsys, tmp_path, no_data):
    raising = policy_file(tmp_path, "raise KeyError('ages')")
    dry = ("--host", "embedded", "--clips", "1")
    for args, message in [
        ((*dry, "--policy", str(raising)), "policy.py on clip 0, step 0: raised KeyError: 'ages'"),
        ((*dry, "--policy", "recent_fil"), "no policy 'recent_fil'"),
        ((*dry, "--policy", "recent_fill", "--workload", "pan"), "unknown workload of the benchmark 'pan'"),
        ((*dry, "--policy", "recent_fill", "--budget", "0"), "at least 1 frame"),
        (("--host", "embedded", "--policy", "recent_fill", "--clips", "0"), "at least 1 clip"),
        (("--host", "embedded", "--policy", "recent_fill", "--clips", "9999"), "is out of range"),
        ((*dry, "--policy", str(raising), "--policy-seconds", "0"), "policy-seconds must be above 0"),
        (("--policy", "recent_fill"), "UCF101_DATA_DIR"),
    ]:
        status, out, err = command(capsys, *args)
        assert (status, out) == (2, "")
        assert message in err.strip().splitlines()[-1] and "Traceback" not in err


def test_the_worker_needs_no_torch_and_no_pickle():
    """Starts at once, and nothing that it reads or writes is executed."""
    code = (
        "import sys; import far_env.policy_worker as worker; "
        "sys.exit('torch' in sys.modules or hasattr(worker, 'pickle') or 'pickle' in open(worker.__file__).read())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
