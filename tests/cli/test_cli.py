"""The commands: what they print, and that bad input ends in one sentence and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_agent
from far_env import baselines, cli, metrics
from far_env.agents.checkpoints import save_scorer
from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.errors import WeightsError
from far_env.host.far_long import FARLong
from far_env.host.weights import load_host, save_host
from far_env.plugins import entry_points
from tests.conftest import TINY_DCAE, TINY_FAR_LONG

POLICY = """
class Policy:
    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        {body}
"""


@pytest.fixture
def run_folder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    save_scorer(RetentionNetwork(), NetworkConfig(), {"trained_on": "nothing"}, folder)
    return folder


def evaluate(capsys, host, *args):
    status = cli.main(["evaluate", "--host", str(host), "--device", "cpu", "--clips", "3", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, status, *fragments):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert "Traceback" not in error and error.count("error:") == 1
    for fragment in fragments:
        assert fragment in error
    return error


def test_evaluate_prints_one_json_object(capsys, tiny_host_folder, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert cli.main(["export", str(run_folder), "--out", str(tmp_path / "policy.py")]) == 0
    capsys.readouterr()
    names = f"recent_fill,full_history,{tmp_path / 'policy.py'},{run_folder}"
    status, out, _ = evaluate(capsys, tiny_host_folder, "--policies", names, "--budget", "4", "--json", "-")
    assert status == 0
    result = json.loads(out)
    assert list(result["policies"]) == names.split(",")
    for name, scores in result["policies"].items():
        assert scores["psnr"]["low"] <= scores["psnr"]["mean"] <= scores["psnr"]["high"] and scores["psnr"]["n"] == 3
        assert "ssim" in scores and "lpips" not in scores
        assert ("psnr_minus_recent_fill" in scores) == (name != "recent_fill")
    assert result["policies"][names.split(",")[2]] == result["policies"][names.split(",")[3]]
    assert result["unavailable"]["lpips"] == metrics.lpips_unavailable()
    assert result["weights"] == load_host(tiny_host_folder, "cpu").weights_hash
    assert (result["workload"], result["budget"], result["split"], result["clips"]) == ("pan", 4, "test", 3)
    assert {"host", "commit", "dtype", "device", "noise_seed", "ode_steps", "versions", "seconds"} <= set(result)


def test_evaluate_prints_a_table_whose_numbers_are_the_jsons(capsys, tiny_host_folder, tmp_path):
    args = ("--policies", "random,recent_fill", "--metrics", "psnr", "--workload", "cuts", "--split", "validation")
    status, table, _ = evaluate(capsys, tiny_host_folder, *args)
    evaluate(capsys, tiny_host_folder, *args, "--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert status == 0 and "cuts, budget 4, 3 validation clips" in table
    for name in ("random", "recent_fill"):
        (row,) = [line for line in table.splitlines() if line.startswith(name)]
        assert f"{result['policies'][name]['psnr']['mean']:.2f}" in row
    difference = result["policies"]["random"]["psnr_minus_recent_fill"]
    assert f"[{difference['low']:+.2f}, {difference['high']:+.2f}]" in table


def test_metrics_can_be_chosen_and_the_impossible_is_refused_before_any_rollout(
    capsys, tiny_host_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args = ("--policies", "random,recent_fill", "--metrics")
    status, out, _ = evaluate(capsys, tiny_host_folder, *args, "ssim", "--json", "-")
    assert status == 0 and set(json.loads(out)["policies"]["random"]) == {"ssim"}
    assert "SSIM" in evaluate(capsys, tiny_host_folder, *args, "ssim")[1]
    status, _, error = evaluate(capsys, tiny_host_folder, *args, "lpips")
    assert status == 2 and "LPIPS needs AlexNet's ImageNet weights" in error and "frame/s" not in error


def test_results_do_not_depend_on_the_batch_size(capsys, tiny_host_folder):
    means = []
    for size in ("1", "2", "64"):
        _, out, _ = evaluate(
            capsys,
            tiny_host_folder,
            "--policies",
            "random,least_change_prev",
            "--metrics",
            "psnr",
            "--batch-size",
            size,
            "--json",
            "-",
        )
        means.append([scores["psnr"]["mean"] for scores in json.loads(out)["policies"].values()])
    np.testing.assert_allclose(means, [means[0]] * 3, atol=1e-3)


def test_evaluate_prints_a_table_per_workload_and_budget_and_one_of_all(capsys, tiny_host_folder, tmp_path):
    args = ("--policies", "recent_fill,random,full_history", "--workload", "pan,cuts", "--budget", "4,tight_history_budget,2")
    args += ("--seeds", "42,7", "--metrics", "psnr", "--out", str(tmp_path / "results"))
    status, text, _ = evaluate(capsys, tiny_host_folder, *args)
    assert status == 0
    titles = [line for line in text.splitlines() if "test clips, noise seed 42, 7 + clip id" in line]
    assert [title.split(", 3 test")[0] for title in titles] == [f"{w}, budget {b}" for w in ("pan", "cuts") for b in (2, 4)]
    for name in ("full_history", "recent_fill", "random"):
        assert len([line for line in text.splitlines() if line.startswith(name)]) == 5
    assert "interquartile means over pan 2, pan 4, cuts 2, cuts 4" in text
    assert f"60 records in {tmp_path / 'results'}" in text
    _, out, _ = evaluate(capsys, tiny_host_folder, *args, "--json", "-")
    result = json.loads(out)
    assert [(table["workload"], table["budget"]) for table in result["tables"]] == [
        (workload, budget) for workload in ("pan", "cuts") for budget in (2, 4)
    ]
    assert set(result["tables"][0]["decision_ms"]) == {"recent_fill", "random"}
    for name, row in result["pooled"].items():
        assert f"{row['psnr_iqm']['mean']:.2f} [{row['psnr_iqm']['low']:.2f}" in text and row["psnr_iqm"]["n"] == 6, name
    settings = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert settings["policies"]["recent_fill"]["note"].startswith("Keeps the newest frames")
    status, _, error = evaluate(capsys, tiny_host_folder, *args, "--split", "train")
    assert status == 2 and "holds an evaluation with split test, not train; choose another folder" in error


def test_all_policies_are_all_baselines(capsys, tiny_host_folder):
    args = ("--policies", "all,full_history", "--metrics", "psnr", "--clips", "1", "--json", "-")
    status, out, error = evaluate(capsys, tiny_host_folder, *args)
    left_out = re.findall(r"left out (\w+)", error)
    assert status == 0 and [*json.loads(out)["policies"], *left_out] == [*baselines.names(), *left_out, "full_history"]


def test_full_history_needs_no_budget(capsys, tiny_host_folder):
    full = ("--budget", "full_history_budget", "--metrics", "psnr", "--json", "-")
    status, out, _ = evaluate(capsys, tiny_host_folder, "--policies", "full_history", *full)
    alone = json.loads(out)
    assert (status, alone["budget"]) == (0, "full history")
    args = ("--budget", "4,9999", "--policies", "recent_fill", "--metrics", "psnr", "--json", "-")
    _, out, _ = evaluate(capsys, tiny_host_folder, *args)
    compared = json.loads(out)["policies"]["full_history"]
    assert {name: value for name, value in compared.items() if not name.endswith(("recent_fill", "_p"))} == (
        alone["policies"]["full_history"]
    )
    status, _, error = evaluate(capsys, tiny_host_folder, "--policies", "recent_fill", *full)
    assert status == 2 and "with full history no policy is asked; give a budget for recent_fill" in error


def test_a_policy_file_that_changes_is_not_mixed_with_what_it_was(capsys, tiny_host_folder, tmp_path):
    path, out = tmp_path / "own.py", str(tmp_path / "results")
    body = "return TemporalCachePlan([ChunkDecision(m.chunk_id, 'keep') for m in chunk_meta_list])"
    path.write_text(POLICY.format(body=body))
    args = ("--policies", str(path), "--metrics", "psnr", "--out", out)
    assert evaluate(capsys, tiny_host_folder, *args)[0] == 0
    assert len(list((tmp_path / "results" / "frames" / "pan" / "b4").rglob("*.png"))) == 3
    path.write_text(POLICY.format(body="return TemporalCachePlan()"))
    status, _, error = evaluate(capsys, tiny_host_folder, *args)
    assert status == 2 and "holds an evaluation with the content of policy" in error


def test_a_stopped_evaluation_tells_how_to_go_on(capsys, tiny_host_folder, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("far_env.evaluation.batches.play", stop)
    status, _, error = evaluate(capsys, tiny_host_folder, "--policies", "random", "--out", str(tmp_path / "results"))
    assert status == 130 and f"finished so far are in {tmp_path / 'results'}; the same command resumes from there" in error


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--policies", "recent_fill", "--seeds", "4.2"], ["--seeds takes whole numbers from 0 on, got '4.2'"]),
        (["--policies", "recent_fill", "--workload", " , "], ["--workload names no workload"]),
        (["--policies", "recent_fill", "--budget", "4,tigt"], ["unknown budget 'tigt'"]),
        (["--policies", "recent_fill", "--out", "/dev/null/results"], ["/dev/null/results cannot be written"]),
        (["--policies", "recent_fil"], ["no policy 'recent_fil'", "recent_fill"]),
        (["--policies", ","], ["names no policy"]),
        (["--policies", "recent_fill", "--budget", "0"], ["at least 1 frame, got 0"]),
        (["--policies", "recent_fill", "--budget", "tight"], ["unknown budget 'tight'"]),
        (
            ["--policies", "recent_fill", "--workload", "ucf101_short_prediction", "--data-dir", "/tmp", "--protocol", "fars"],
            ["did you mean 'far'"],
        ),
        (["--policies", "recent_fill", "--workload", "pans"], ["did you mean 'pan'"]),
        (["--policies", "recent_fill", "--clips", "0"], ["0 clips"]),
        (["--policies", "recent_fill", "--clips", "5000"], ["clip id 4999 is out of range"]),
        (["--policies", "recent_fill", "--batch-size", "0"], ["batch size 0"]),
        (["--policies", "recent_fill", "--json", "/dev/null/results.json"], ["/dev/null cannot be written"]),
        (["--policies", "recent_fill", "--split", "dev"], ["unknown split 'dev'"]),
        (["--policies", "recent_fill", "--metrics", "fid"], ["unknown metric 'fid'"]),
        (["--policies", "recent_fill", "--device", "tpu9"], ["device 'tpu9'"]),
        (
            ["--policies", "recent_fill", "--workload", "ucf101_short_prediction", "--data-dir", "/nowhere"],
            ["/nowhere does not exist"],
        ),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, tiny_host_folder, args, fragments):
    base = ["evaluate", "--host", str(tiny_host_folder), "--clips", "3"]
    refused(capsys, cli.main([*base, *args]), *fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("x = (", ["cannot be loaded", "SyntaxError"]),
        ("x = 1", ["must define exactly one class", "it has 0"]),
        (POLICY.format(body="raise RuntimeError('no idea')"), ["bad.py on clip 0, step 0", "no idea"]),
        (POLICY.format(body="return [0]"), ["bad.py on clip 0, step 0", "returned list"]),
    ],
)
def test_bad_policy_files_are_one_sentence(capsys, tiny_host_folder, tmp_path, text, fragments):
    path = tmp_path / "bad.py"
    path.write_text(text)
    status = cli.main(["evaluate", "--host", str(tiny_host_folder), "--clips", "1", "--policies", str(path)])
    refused(capsys, status, *fragments)


def test_unknown_commands_and_configuration_keys_get_a_near_match(capsys, tmp_path):
    refused(capsys, cli.main(["evalute"]), "did you mean 'evaluate'")
    path = tmp_path / "config.yaml"
    path.write_text("workload: pan\nppo:\n  learning_rat: 0.1\n")
    refused(
        capsys, train_agent.main(["--config", str(path)]), "config.yaml: ppo", "'learning_rat'", "did you mean 'learning_rate'"
    )
    path.write_text("budgett: 4\n")
    refused(capsys, train_agent.main(["--config", str(path)]), "did you mean 'budget'")
    path.write_text("budget: [4\n")
    refused(capsys, train_agent.main(["--config", str(path)]), "is not valid YAML")
    refused(capsys, train_agent.main(["--config", str(tmp_path / "none.yaml")]), "cannot read the configuration")
    refused(capsys, train_agent.main(["--config"]), "--config needs a file name")
    refused(capsys, cli.main(["train-host", "--config", str(tmp_path / "none.yaml")]), "cannot read the configuration")


def test_run_folders_that_cannot_be_written_are_refused_before_any_work(capsys, tmp_path, tiny_host_folder):
    (tmp_path / "file").touch()
    status = train_agent.main(["--run-dir", str(tmp_path / "file" / "run"), "--host", str(tiny_host_folder)])
    refused(capsys, status, "the folder", "run cannot be written: Not a directory; choose another one")
    refused(capsys, cli.main(["export", str(tmp_path), "--out", str(tmp_path / "p.py")]), "holds no trained policy")
    assert not (tmp_path / "p.py").exists()


def test_exports_that_cannot_be_written_are_refused(capsys, run_folder, tmp_path):
    refused(capsys, cli.main(["export", str(run_folder), "--out", str(tmp_path / "no" / "p.py")]), "cannot write")


@pytest.fixture
def broken_host(tiny_host_folder, tmp_path):
    return shutil.copytree(tiny_host_folder, tmp_path / "host")


def rewrite(folder, part, state, fix_hash=True):
    from far_env.tensor_files import file_hash

    save_file(state, folder / f"{part}.safetensors")
    if fix_hash:
        config = json.loads((folder / "config.json").read_text())
        config["sha256"][part] = file_hash(folder / f"{part}.safetensors")
        (folder / "config.json").write_text(json.dumps(config))


def test_a_host_with_a_far_long_is_saved_and_loaded(tmp_path, tiny_long_host):
    configs = {"transformer": TINY_FAR_LONG, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(tmp_path, tiny_long_host.transformer, tiny_long_host.autoencoder, configs, frame_size=64, num_steps=3)
    loaded = load_host(tmp_path, "cpu")
    assert isinstance(loaded.transformer, FARLong)
    weights = tiny_long_host.transformer.state_dict()
    assert all(torch.equal(value, weights[key].half().float()) for key, value in loaded.transformer.state_dict().items())


def test_damaged_or_foreign_weights_are_named(broken_host):
    path = broken_host / "transformer.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}  # not mapped to the file that is damaged below
    original = path.read_bytes()

    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(WeightsError, match=r"transformer\.safetensors has SHA-256 .* config\.json expects"):
        load_host(broken_host, "cpu")
    rewrite(broken_host, "transformer", {**state, "proj_out.weight": torch.zeros(3, 3)}, fix_hash=False)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_host(broken_host, "cpu")
    rewrite(broken_host, "transformer", {**state, "proj_out.weight": torch.zeros(3, 3)})
    with pytest.raises(WeightsError, match=r"'proj_out.weight' has shape \(3, 3\), the configuration needs \(16, 32\)"):
        load_host(broken_host, "cpu")
    rewrite(broken_host, "transformer", {k: v for k, v in state.items() if k != "proj_out.bias"})
    with pytest.raises(WeightsError, match=r"lacks the key 'proj_out.bias'"):
        load_host(broken_host, "cpu")
    rewrite(broken_host, "transformer", {**state, "extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"unexpected key 'extra'"):
        load_host(broken_host, "cpu")
    path.unlink()
    with pytest.raises(WeightsError, match=r"transformer\.safetensors cannot be read"):
        load_host(broken_host, "cpu")


def test_hosts_that_are_none_are_refused(capsys, broken_host, tmp_path):
    with pytest.raises(
        WeightsError, match=r"config\.json cannot be read; use embedded, embedded_long, embedded_maze, a released model"
    ):
        load_host(tmp_path / "nothing", "cpu")
    (broken_host / "config.json").write_text('{"sha256": {}}')
    with pytest.raises(WeightsError, match="lacks autoencoder, transformer"):
        load_host(broken_host, "cpu")
    (broken_host / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load_host(broken_host, "cpu")
    status = cli.main(["evaluate", "--policies", "recent_fill", "--host", str(broken_host)])
    refused(capsys, status, "config.json is not valid JSON")


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in entry_points("far_env.commands"))


def test_baselines_are_listed_and_described(capsys):
    assert cli.main(["baselines"]) == 0
    table = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in table.splitlines()) for name in baselines.names())
    assert "ca2vdm_paper has the plans of recent_fill up to a budget of 25" in table
    assert cli.main(["baselines", "h2o"]) == 0
    assert "arXiv 2306.14048" in (described := capsys.readouterr().out) and "Faithful: sums without decay" in described
    refused(capsys, cli.main(["baselines", "h20"]), "did you mean 'h2o'")
