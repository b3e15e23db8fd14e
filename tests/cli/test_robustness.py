"""Terminals without Unicode, closed pipes, damaged clips, names with commas: nothing is lost, nothing is a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from far_env import baselines, cli
from far_env.cli.console import accept_any_text
from far_env.cli.options import split_list
from far_env.errors import VideoError
from far_env.evaluation.evaluate import evaluate, evaluate_grid
from far_env.evaluation.results_folder import load
from far_env.workloads import make_workload
from tests.clips.test_video import write_video

KEEP = """
class Policy:
    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        return TemporalCachePlan([ChunkDecision(m.chunk_id, "keep") for m in chunk_meta_list])
"""


def far_env_command(*args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "far_env.cli", *map(str, args)], capture_output=True, env=os.environ | environment, timeout=300
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_table_is_printed_on_a_terminal_that_cannot_encode_it(encoding, tiny_host_folder, tmp_path):
    args = [
        "--policies",
        "recent_fill,random",
        "--clips",
        "2",
        "--device",
        "cpu",
        "--metrics",
        "psnr",
        "--host",
        tiny_host_folder,
    ]
    result = far_env_command("evaluate", *args, "--out", tmp_path / "results", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr.decode(encoding)
    lines = result.stdout.decode(encoding).splitlines()
    assert "PSNR - recent_fill [95 %]" in lines[0] or "PSNR − recent_fill [95 %]" in lines[0]
    assert set(lines[1]) <= {"-", "─"} and len(lines[1]) == len(lines[0])
    assert len(load(tmp_path / "results").records) == 4


@pytest.mark.parametrize("args", [["baselines"], ["weights", "list"], ["evaluate", "--help"], ["--help"]], ids=" ".join)
def test_lists_and_help_are_printed_as_ascii(args):
    result = far_env_command(*args, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and not result.stderr
    assert len(result.stdout.decode("ascii")) > 200 and "\\u" not in result.stdout.decode("ascii")


def test_an_error_about_a_name_that_the_terminal_cannot_encode_is_printed():
    result = far_env_command("evaluate", "--policies", "политика", PYTHONIOENCODING="ascii")
    assert result.returncode == 2 and b"no policy '????????'" in result.stderr


def test_characters_are_replaced_only_where_they_must_be(monkeypatch):
    written = {}
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline=""))
        accept_any_text()
        print("a − b ─ 64² é \udcff", end="", flush=True)
        written[encoding] = raw.getvalue()
    assert written == {
        "ascii": b"a - b - 64^2 ? \xff",
        "cp1252": b"a - b - 64\xb2 \xe9 \xff",
        "utf-8": "a − b ─ 64² é ".encode() + b"\xff",
    }


def test_a_reader_that_stops_reading_ends_the_command_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "far_env.cli", "baselines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("args", ["baselines", "evaluate --help", "--help"])
def test_an_output_that_is_closed_or_full_is_no_traceback(args):
    command = f"{sys.executable} -m far_env.cli {args}"
    closed = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, b"")
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    full = subprocess.run(["sh", "-c", f"{command} > /dev/full"], capture_output=True, timeout=60)
    assert full.returncode == 2
    assert full.stderr.startswith(b"far-env: error: ") and full.stderr.count(b"\n") == 1 and b"No space left" in full.stderr


def test_json_is_ascii_whatever_the_names_are(capsys, tiny_host_folder, tmp_path):
    path = tmp_path / "политика.py"
    path.write_text(KEEP)
    args = ["--policies", str(path), "--clips", "1", "--device", "cpu", "--metrics", "psnr", "--json", "-"]
    assert cli.main(["evaluate", "--host", str(tiny_host_folder), *args]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and list(json.loads(out)["policies"]) == [str(path)]


def test_a_list_is_split_at_commas_outside_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.py").touch()
    assert split_list("x, y,,x", "policies", "policy") == ["x", "y"]
    assert split_list('x,"runs/a,b", y', "policies", "policy") == ["x", "runs/a,b", "y"]
    assert split_list("a,b.py", "policies", "policy") == ["a,b.py"], "a file of this name exists"
    assert split_list("c,d.py", "policies", "policy") == ["c", "d.py"]
    with pytest.raises(ValueError, match="--policies names no policy"):
        split_list(' , ""', "policies", "policy")


def test_a_policy_whose_path_holds_a_comma_is_evaluated_and_reported(capsys, tiny_host_folder, tmp_path):
    path, results = tmp_path / "a,b.py", tmp_path / "results"
    path.write_text(KEEP)
    args = ["--clips", "1", "--device", "cpu", "--metrics", "psnr", "--json", "-", "--out", str(results)]
    for names, expected in ((str(path), [str(path)]), (f'"{path}",recent_fill', [str(path), "recent_fill"])):
        assert cli.main(["evaluate", "--host", str(tiny_host_folder), "--policies", names, *args]) == 0
        assert list(json.loads(capsys.readouterr().out)["policies"]) == expected
    page = tmp_path / "report.html"
    assert cli.main(["report", str(results), "--policies", f'"{path}"', "--out", str(page)]) == 0
    assert "a,b.py" in page.read_text(encoding="utf-8")


@pytest.fixture
def videos(tmp_path, tiny_host_folder):
    """Videos, three of them test clips of FAR's protocol; the second test clip is damaged after its header."""
    for i in range(21):
        write_video(tmp_path / "videos" / f"{i:02d}.avi", 16)
    folder = str(tmp_path / "videos")
    workload = make_workload("ucf101_short_prediction", host=tiny_host_folder, device="cpu", data_dir=folder, protocol="far")
    damaged = workload.clips.path("test", 1)
    sound = damaged.read_bytes()
    content = bytearray(sound)
    for place in range(len(content) // 5, len(content) * 9 // 10, 11):
        content[place] ^= 0xFF
    damaged.write_bytes(content)
    return tmp_path / "videos", damaged, sound


def test_a_damaged_clip_is_left_out_and_added_once_it_is_restored(capsys, videos, tiny_host_folder, tmp_path):
    folder, damaged, sound = videos
    args = ["--workload", "ucf101_short_prediction", "--data-dir", str(folder), "--host", str(tiny_host_folder), "--clips", "3"]
    args += ["--protocol", "far"]
    args += ["--policies", "recent_fill,random,full_history", "--device", "cpu", "--metrics", "psnr", "--show-clips", "0"]
    out = ["--out", str(tmp_path / "results")]
    assert cli.main(["evaluate", *args, *out]) == 1
    captured = capsys.readouterr()
    assert "2 test clips" in captured.out and "without the clips 1, whose files are damaged" in captured.out
    assert f"left out clip 1 of ucf101_short_prediction: {damaged} " in captured.err
    assert captured.err.strip().endswith("restore the files and run the same command to add the missing episodes")
    kept = load(tmp_path / "results").records
    assert sorted({record.clip for record in kept}) == [0, 2] and len(kept) == 6

    damaged.write_bytes(sound)
    assert cli.main(["evaluate", *args, *out, "--json", str(tmp_path / "resumed.json")]) == 0
    assert load(tmp_path / "results").records[:6] == kept and len(load(tmp_path / "results").records) == 9
    assert cli.main(["evaluate", *args, "--json", str(tmp_path / "whole.json")]) == 0
    resumed, whole = (json.loads((tmp_path / f"{name}.json").read_text())["policies"] for name in ("resumed", "whole"))
    for name, scores in whole.items():
        assert resumed[name]["psnr"]["n"] == 3
        assert resumed[name]["psnr"]["mean"] == pytest.approx(scores["psnr"]["mean"], abs=1e-3)


def test_validation_names_the_clip_that_cannot_be_read_and_plays_the_others(capsys, videos, tiny_host_folder, tmp_path):
    folder, damaged, sound = videos
    broken = damaged.read_bytes()
    damaged.write_bytes(sound)
    args = ["--workload", "ucf101_short_prediction", "--data-dir", str(folder), "--host", str(tiny_host_folder), "--clips", "3"]
    args += ["--protocol", "far"]
    args += ["--policies", "random", "--device", "cpu", "--metrics", "psnr", "--out", str(tmp_path / "results")]
    assert cli.main(["evaluate", *args]) == 0
    damaged.write_bytes(broken)
    capsys.readouterr()
    assert cli.main(["validate", str(tmp_path / "results"), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"clip 1, noise seed 42: its clip cannot be read: {damaged}" in out
    assert "3 of 3 records played again: 2 match" in out and "1 differ" in out


def test_numbers_without_a_damaged_clip_are_those_of_the_other_clips(videos, tiny_host_folder):
    folder, damaged, _ = videos
    workload = make_workload(
        "ucf101_short_prediction", host=tiny_host_folder, device="cpu", data_dir=str(folder), protocol="far"
    )
    policies = {name: baselines.make(name) for name in ("recent_fill", "random")}
    options = {"metrics": ["psnr"], "progress": False}
    evaluation = evaluate(workload, 4, policies, [0, 1, 2], **options)
    expected = evaluate(workload, 4, policies, [0, 2], **options)
    assert evaluation.clip_ids == [0, 2] and evaluation.provenance["damaged_clips"] == [1]
    for name in policies:
        np.testing.assert_allclose(evaluation.scores[name]["psnr"], expected.scores[name]["psnr"], atol=1e-4)
    assert list(evaluate_grid([workload], [4], policies, [0, 1], **options).unreadable) == [("ucf101_short_prediction", 1)]
    with pytest.raises(VideoError, match=damaged.name):
        evaluate(workload, 4, policies, [1], **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "far_env.cli", "baselines"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr == "far-env: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["train", "--ppo.learning-rate", "fast"], ["--ppo.learning-rate", "'fast'", "FLOAT"]),
        (["train", "--config", "pan_tight", "--ppo.n-steps", "1.5"], ["--ppo.n-steps", "'1.5'", "INT"]),
        (["train", "--ppo.learning-rat", "3"], ["--ppo.learning-rat,", "did you mean --ppo.learning-rate FLOAT;"]),
        (["evaluate", "--clipz", "3"], ["missing: --policies STR", "unknown option --clipz"]),
        (["evaluate", "--device"], ["--device", "Missing value"]),
        (["reproduce", "--no-such"], ["--no-such"]),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_sentence(arguments, fragments, capsys):
    assert cli.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("far-env") and error.count("\n") == 1 and not set(error) & set("│╭╮╰╯─")
    assert all(fragment in error for fragment in fragments), error
    assert error.rstrip().endswith(f"far-env {arguments[0]} --help describes the options")
