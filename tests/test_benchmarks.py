"""The benchmarks measure the quantities that they print; their values are not asserted here."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import command, growth, host, parts, rollout, streaming
from far_env.cli import run_guarded
from far_env.contract import SIGNALS


def run(module, monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *args])
    return run_guarded(module.__name__, module.run)


def test_the_rollout_benchmark_prints_one_json_object(tiny_host_folder, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "BATCHES", {1: (1, 1), 2: (2, 2)})
    monkeypatch.setattr(rollout, "matmul_rate", lambda *_: 1e9)
    assert run(rollout, monkeypatch, "--quick", "--json", "-", "--host", str(tiny_host_folder), "--device", "cpu") == 0
    result = json.loads(capsys.readouterr().out)
    keys = {f"float32_batch{batch}_steps{steps}" for batch in (1, 2) for steps in (4, 20)}
    assert set(result["speedup"]) == set(result["engine"]) == keys
    for timing in result["engine"].values():
        assert sum(timing["shares"].values()) == pytest.approx(1) and timing["gflop"] > 0
    assert {"weights", "commit", "versions", "machine", "policy", "budget", "peak_memory_mib"} <= set(result)


def test_transformer_operations_are_counted_without_the_autoencoders(tiny_workload):
    model, frames = tiny_workload.host.transformer, torch.randn(2, 3, 4, 8, 8)

    def linear_flops(tokens):
        dim, layers = 32, 2
        embed, key_value, after_attention = 2 * tokens * 16 * dim, 4 * tokens * dim**2, 2 * tokens * (2 + 8) * dim**2
        return embed + layers * key_value + (layers - 1) * after_attention

    def work():
        model.encode_context(frames)
        tiny_workload.host.autoencoder.decode(frames)

    counted = rollout.transformer_flops(tiny_workload.host, work)
    tokens = 2 * 3 * 16
    # besides the linear layers: attention (one layer of scores and values) and the modulation of two layers
    assert linear_flops(tokens) < counted < 1.5 * linear_flops(tokens)


def test_the_parts_benchmark_times_worlds_policies_and_recording(tiny_host_folder, monkeypatch, capsys):
    host = ("--host", str(tiny_host_folder), "--device", "cpu", "--rollouts", "1")
    assert run(parts, monkeypatch, "--clips", "2", "--calls", "3", "--policies", "recent_fill", *host) == 0
    out = capsys.readouterr().out
    assert "pan" in out and "frames/s" in out and "recent_fill" in out and "x recent_window" in out
    for name in (*SIGNALS, "all"):
        assert any(line.split()[0] == name and float(line.split()[1]) > 0 for line in out.splitlines() if line)


@pytest.fixture
def slow_product(monkeypatch):
    monkeypatch.setattr(host, "matmul_rate", lambda dtype, device, size: 1e9)


def test_the_host_benchmark_compares_with_the_plain_loop(small_released, slow_product, monkeypatch, capsys):
    assert run(host, monkeypatch, "--json", "-", "--device", "cpu") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reduced"] and result["dtype"] == "float32" and result["budget"] == 8
    assert {name: entry["context"] for name, entry in result["hosts"].items()} == {"far_b_ucf101": 5, "far_b_long_dmlab": 36}
    for entry in result["hosts"].values():
        assert list(entry["batches"]) == ["1", "2"] and entry["ode_steps"] == 2
        assert list(entry["plain_frame_seconds"]) == ["float32"] and len(entry["plain_psnr_db"]) == 1
        for row in entry["batches"].values():
            assert min(row["frame_seconds"], row["context_seconds"], row["peak_memory_mib"]) > 0
            assert row["speedup"] == pytest.approx(entry["plain_frame_seconds"]["float32"] / row["frame_seconds"])
            assert row["share_of_product"] == pytest.approx(entry["frame_flops"] / row["frame_seconds"] / 1e9)
            assert abs(row["psnr_change_db"]) < 1e-3, "in float32 the engine is the reference"


def test_the_host_benchmark_states_what_bfloat16_changes(small_released, slow_product, monkeypatch, capsys):
    monkeypatch.setattr(host, "NAMES", ("ucf101_short_prediction",))
    assert run(host, monkeypatch, "--json", "-", "--device", "cpu", "--precision", "bfloat16") == 0
    (entry,) = json.loads(capsys.readouterr().out)["hosts"].values()
    assert list(entry["plain_frame_seconds"]) == ["float32", "bfloat16"]
    assert all(0 < abs(row["psnr_change_db"]) < 1 for row in entry["batches"].values())


def test_operations_of_a_frame_are_those_of_its_layers(tiny_workload):
    """The last two of three frames: from six kept ones, of which five are known, and from seven, of which six are known."""
    counted = host.frame_flops(replace(tiny_workload, num_predict=3, num_steps=1))
    tokens, dim, layers, features = 16, 32, 2, 16
    ends, key_value, rest = 2 * tokens * features * dim, 4 * tokens * dim**2, 2 * tokens * (2 + 8) * dim**2
    attended = 4 * tokens * tokens * dim  # to the tokens of one frame: scores and values
    encoded = ends + layers * key_value + (layers - 1) * (rest + 6.5 * attended)
    sampled = 2 * ends + layers * (key_value + rest + 7.5 * attended)
    assert counted == encoded + sampled, "modulations were computed before"


def test_the_host_benchmark_says_what_does_not_fit(small_released, slow_product, monkeypatch, capsys):
    def full(workload, size, expected):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(host, "time_batch", full)
    assert run(host, monkeypatch, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.count("out of memory") == 4 and "on a CPU: batches of 1 and 2 only, 2 ODE steps" in out


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (rollout, ("--host", "/nowhere"), "no host in /nowhere"),
        (rollout, ("--json", "file"), "takes only '-'"),
        (host, ("--json", "file"), "takes only '-'"),
        (host, ("--precision", "half"), "unknown precision 'half'"),
        (growth, ("--repeats", "0"), "--repeats must be at least 1, got 0"),
        (growth, ("--plot", "growth.txt"), "--plot must end in .png or .svg"),
        (parts, ("--policies", "nope"), "nope"),
        (
            parts,
            ("--policies", "full_history", "--clips", "1", "--calls", "1"),
            "full_history makes no calls that could be timed",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(monkeypatch, capsys, module, args, message):
    assert run(module, monkeypatch, *args) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_streaming_benchmark_measures_every_frame_and_draws_it(tiny_host_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(streaming, "GAP_FRAMES", 2)
    place = ("--host", str(tiny_host_folder), "--device", "cpu", "--clips", "1", "--out", str(tmp_path), "--json", "-")
    assert run(streaming, monkeypatch, "--frames", "51", "--budget", "64", "--policies", "recent_fill,h2o", *place) == 0
    result = json.loads(capsys.readouterr().out)
    for stream in result["streams"].values():
        assert [len(stream[name]) for name in ("seconds", "entries", "memory_bytes", "psnr", "contrast")] == [51] * 5
        assert set(stream["entries"]) == {64} and len(set(stream["memory_bytes"])) == 1
    assert list(result["reencoding_gap"]) == ["recent_fill"] and result["reencoding_gap"]["recent_fill"]["relative"] > 0
    assert (
        json.loads((tmp_path / "streaming.json").read_text()) == result and (tmp_path / "streaming.png").stat().st_size > 1000
    )


def test_the_growth_benchmark_finds_how_operations_grow(tiny_host_folder, monkeypatch, capsys, tmp_path):
    """With operations as the clock, everything is known: per frame they grow with the kept frames and with nothing else."""
    monkeypatch.setattr(growth, "KEPT", (1, 2, 4, 8))
    monkeypatch.setattr(growth, "LENGTHS", (4, 8, 12))
    monkeypatch.setattr(growth, "BATCHES", (1, 4))
    monkeypatch.setattr(growth, "NUM_POLICIES", (1, 3))
    monkeypatch.setattr(growth, "DONE", (0, 4, 8))
    plot = tmp_path / "growth.svg"
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(growth, "clock", lambda device: counter.get_total_flops)
        place = ("--host", str(tiny_host_folder), "--device", "cpu", "--repeats", "1")
        assert run(growth, monkeypatch, "--json", "-", "--plot", str(plot), *place) == 0
    result = json.loads(capsys.readouterr().out)
    curves = {axis: list(curve.values()) for axis, curve in result["milliseconds"].items()}
    assert list(curves) == list(growth.AXES) and [len(curve) for curve in curves.values()] == [4, 3, 2, 2, 3]
    one, two, four, eight = curves["kept"]
    per_frame = two - one
    assert per_frame > 0 and four - two == pytest.approx(2 * per_frame, rel=0.1)
    assert eight - four == pytest.approx(4 * per_frame, rel=0.2), "attention among the kept frames is beside the line"
    assert result["kept_line"]["slope"] == pytest.approx(per_frame, rel=0.2)
    short, middle, long = (length * per for length, per in zip(growth.LENGTHS, curves["length"], strict=True))
    assert long - middle == pytest.approx(middle - short, rel=1e-6), "later frames cost the same; the context is encoded once"
    assert curves["batch"][1] == pytest.approx(curves["batch"][0], rel=0.05)
    assert curves["policies"][1] < curves["policies"][0], "the memo shares the context and equal frames"
    assert len(set(curves["done"])) == 1
    drawn = plot.read_text()
    assert all(label in drawn for label in growth.AXES.values())


@pytest.mark.parametrize(("threads", "counted"), [(1, False), (2, True)])
def test_waiting_counts_only_where_several_threads_are_timed(monkeypatch, threads, counted):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    now = command.clock(torch.device("cpu"))
    start = now()
    time.sleep(0.2)
    assert (now() - start >= 0.2) == counted
