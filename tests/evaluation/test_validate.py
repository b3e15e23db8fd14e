"""Validation: honest records match to the last bit, and whatever was changed in them is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from far_env import baselines, cli
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.results_folder import load
from far_env.evaluation.validate import choose, validate
from far_env.workloads import make_workload


@pytest.fixture(scope="module")
def recorded(tiny_host_folder, tmp_path_factory):
    """Made by the command: two budgets, a random policy and one whose histories have many lengths."""
    folder = tmp_path_factory.mktemp("recorded") / "results"
    args = ["--policies", "random,flowcache,full_history", "--budget", "3,6", "--clips", "3", "--metrics", "psnr,ssim"]
    place = ["--host", str(tiny_host_folder), "--device", "cpu", "--out", str(folder), "--show-clips", "0", "--batch-size", "2"]
    assert cli.main(["evaluate", *args, *place]) == 0
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "results")


def change(folder, alter, every=False):
    """Alter the first record of random at budget 3 (or every one)."""
    path = folder / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [r for r in records if (r["policy"], r["budget"]) == ("random", 3)]
    for record in records if every else chosen[:1]:
        alter(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(capsys, folder, *args):
    status = cli.main(["validate", str(folder), "--device", "cpu", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_records_are_played_again_to_the_last_bit(capsys, recorded):
    status, out, _ = run(capsys, recorded)
    expected_output = (
        "15 of 15 records played again: 15 match (15 to the last bit of the latents, 0 within 0.001 in every metric), 0 differ"
    )
    assert (status, out.strip()) == (0, expected_output)


def test_a_sample_is_drawn_by_its_seed(capsys, recorded):
    status, out, _ = run(capsys, recorded, "--sample", "4", "--batch-size", "3")
    assert status == 0 and "4 of 15 records played again: 4 match (4 to the last bit" in out
    records = load(recorded).records
    drawn = [[r.key for r in choose(records, 6, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 6
    assert choose(records, 99) == records
    for arguments in ((records, 0), ([], None)):
        with pytest.raises(ValueError, match=r"at least 1 record|no record"):
            choose(*arguments)


def swap_plan(record):
    """Other frames than those that stayed first, then the newest."""
    first = record["plan"][0]
    first["kept"] = [*sorted(set(range(6)) - set(first["kept"]))[:2], 5]
    for entry in record["plan"][1:]:
        entry["kept"] = [entry["step"] + 3, entry["step"] + 4, entry["step"] + 5]
    record["plan"][1]["kept"] = [first["kept"][1], 5, 6]


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda record: record["metrics"].update(psnr=record["metrics"]["psnr"] + 0.01), "its psnr is"),
        (lambda record: record["metrics"].update(ssim=record["metrics"]["ssim"] - 0.01), "its ssim is"),
        (lambda record: record["psnr_per_frame"].__setitem__(7, 99.0), "its PSNR of frame 7 is 99.0000"),
        (
            lambda record: record.update(latents_sha256="0" * 16),
            "its latents are different, though machine, dtype",
        ),
        (lambda record: record.update(clip_sha256="0" * 16), "its clip is a different one here"),
        (swap_plan, "its latents are different"),
    ],
)
def test_what_was_changed_is_found(capsys, folder, alter, reason):
    change(folder, alter)
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert out.startswith("pan, budget 3, random, clip 0, noise seed 42: " + reason)
    assert "14 match (14 to the last bit" in out and "1 differ" in out


def test_elsewhere_the_metrics_decide(capsys, folder):
    def elsewhere(record):
        record["versions"]["torch"] = "1.0"
        record["latents_sha256"] = "0" * 16
        record["metrics"]["psnr"] += 5e-4

    change(folder, elsewhere, every=True)
    status, out, _ = run(capsys, folder)
    assert status == 0 and "15 match (0 to the last bit of the latents, 15 within 0.001" in out
    status, out, _ = run(capsys, folder, "--tolerance", "1e-4")
    assert status == 1 and "15 differ" in out and "… and 5 more" in out


def test_plans_decide_what_is_generated(folder):
    """A changed plan is another rollout, also where only metrics differ."""
    change(folder, swap_plan)
    results = load(folder)
    record = next(r for r in results.records if (r.policy, r.budget) == ("random", 3))
    elsewhere = replace(record, facts={**record.facts, "machine": "another"})
    workload = make_workload("pan", host=record.facts["host"], device="cpu")
    (finding,) = validate(results, [elsewhere], lambda name: workload, progress=False)
    assert not finding.identical and "when played again" in finding.difference


def test_records_of_another_host_are_refused(capsys, folder, tiny_host_folder):
    status, _, error = run(capsys, folder, "--host", "embedded")
    assert status == 2 and error.strip().splitlines()[-1].startswith("far-env: error: the records of pan were made with host")
    assert "c004cbaa" in error and "Traceback" not in error and "give theirs with --host" in error
    change(folder, lambda record: record.update(weights="deadbeef"))
    status, _, error = run(capsys, folder)
    assert status == 2 and "(deadbeef); the host here is" in error
    status, _, error = run(capsys, folder.parent)
    assert status == 2 and "cannot read" in error


def test_bad_arguments_are_one_sentence(capsys, folder):
    for args, fragment in ((("--sample", "0"), "at least 1 record"), (("--batch-size", "0"), "batch size must be at least 1")):
        status, _, error = run(capsys, folder, *args)
        assert status == 2 and fragment in error


def test_steps_of_the_records_are_used(tiny_workload, tmp_path):
    """A record contains its number of ODE steps; that of the workload here does not matter."""
    longer = replace(tiny_workload, num_steps=5)
    results = evaluate_grid([longer], [4], {"random": baselines.make("random")}, [0], metrics=["psnr"], progress=False)
    (finding,) = validate(results, results.records, lambda name: tiny_workload, progress=False)
    assert finding.identical and finding.difference is None
