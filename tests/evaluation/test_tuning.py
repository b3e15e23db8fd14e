"""Tuning on validation clips: the best of a grid, what it cost, resuming, and the tuned form as a policy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from far_env import baselines, cli
from far_env.evaluation import tuning
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.results_folder import load
from far_env.evaluation.table import markdown_table
from far_env.evaluation.tuning import clips_within, most_rollouts, rungs, tune
from far_env.policies import load_policy, load_tuned_form, policy_facts


@pytest.fixture
def workload(tiny_workload):
    return replace(tiny_workload, num_predict=5)


def scores(workload, forms, clips):
    """Mean PSNR of each form on validation clips, played without a folder."""
    played = evaluate(
        workload, 3, {form: load_policy(form) for form in forms}, range(clips), split="validation", metrics=["psnr"]
    )
    return {form: values["psnr"].mean() for form, values in played.scores.items()}


def test_every_round_halves_the_forms_and_doubles_the_clips():
    assert rungs(34, 32, 2) == [(34, 8), (17, 16), (9, 32)]
    assert rungs(3, 5, 1) == [(3, 3), (2, 5)]
    assert rungs(7, 4, 0) == [(7, 4)]
    for halvings, clips in ((-1, 8), (3, 7)):
        with pytest.raises(ValueError, match="halvings need"):
            rungs(4, clips, halvings)


@pytest.mark.parametrize(("variants", "rollouts", "seeds"), [(34, 500, 1), (7, 28, 1), (8, 200, 3), (3, 17, 1)])
def test_as_many_clips_as_rollouts_allow(variants, rollouts, seeds):
    def cost(clips):  # every form on the first clips, the better half and the default on the clips that are added, …
        (_, first), (half, second), (quarter, last) = rungs(variants, clips, 2)
        return seeds * (variants * first + (half + 1) * (second - first) + (quarter + 1) * (last - second))

    clips = clips_within(variants, rollouts, 2, seeds)
    assert cost(clips) <= rollouts < cost(clips + 1)
    assert cost(clips) == seeds * most_rollouts(rungs(variants, clips, 2))
    with pytest.raises(ValueError, match=f"tuned by {cost(4)} rollouts or more, got {cost(4) - 1}"):
        clips_within(variants, cost(4) - 1, 2, seeds)


def test_without_halvings_the_best_of_all_forms_is_found(workload, tmp_path):
    forms = baselines.variants("random_mid", 3)
    expected = scores(workload, forms, 3)
    tuned = tune(workload, 3, "random_mid", tmp_path / "t", clips=3, halvings=0, progress=False)
    assert tuned.policy == max(forms, key=expected.get) and tuned.value == pytest.approx(expected[tuned.policy])
    assert tuned.default_value == pytest.approx(expected["random_mid"])
    assert (tuned.num_variants, tuned.validation_rollouts) == (len(forms), 3 * len(forms))
    assert load(tmp_path / "t").settings.split == "validation"


def test_with_halvings_the_better_half_and_the_default_play_on(workload, tmp_path):
    forms = baselines.variants("random_mid", 3)
    first = scores(workload, forms, 2)
    best = sorted(forms, key=lambda form: -first[form])[: rungs(len(forms), 4, 1)[1][0]]
    second = scores(workload, [form for form in forms if form in best or form == "random_mid"], 4)
    tuned = tune(workload, 3, "random_mid", tmp_path / "t", clips=4, halvings=1, progress=False)
    assert tuned.policy == max(second, key=second.get)
    played = {(record.policy, record.clip) for record in load(tmp_path / "t").records}
    assert played == {(form, clip) for form in forms for clip in range(2)} | {(f, c) for f in second for c in range(4)}
    assert tuned.validation_rollouts == len(played)


def test_a_stopped_search_continues_and_a_finished_one_plays_nothing(workload, tmp_path, monkeypatch):
    whole = tune(workload, 3, "sink_recent", tmp_path / "whole", clips=4, halvings=1, progress=False)
    grid, calls = tuning.evaluate_grid, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return grid(*args, **kwargs)

    monkeypatch.setattr(tuning, "evaluate_grid", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(workload, 3, "sink_recent", tmp_path / "parts", clips=4, halvings=1, progress=False)
    monkeypatch.setattr(tuning, "evaluate_grid", grid)
    assert tune(workload, 3, "sink_recent", tmp_path / "parts", clips=4, halvings=1, progress=False) == whole
    monkeypatch.setattr("far_env.evaluation.batches.play", None)
    assert tune(workload, 3, "sink_recent", tmp_path / "parts", clips=4, halvings=1, progress=False) == whole


def run(capsys, *args):
    status = cli.main(list(args))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_a_form_that_evaluate_plays_beside_the_default(tiny_host_folder, tmp_path, capsys):
    host = ("--host", str(tiny_host_folder), "--device", "cpu")
    out = tmp_path / "tuned"
    args = ("tune", "sink_recent,uniform", "--budget", "4", "--clips", "2", "--halvings", "1", "--out", str(out), *host)
    status, text, _ = run(capsys, *args)
    path = out / "sink_recent_pan_4.json"
    form = load_tuned_form(str(path))
    assert status == 0 and f"{form.num_variants} forms, {form.validation_rollouts} rollouts" in text
    assert form.num_variants == 4 and (out / "uniform_pan_4.json").exists()
    policy = load_policy(str(path))
    assert policy.name == "sink_recent" and vars(policy).keys() == vars(load_policy(form.policy)).keys()
    assert policy.sink == load_policy(form.policy).sink
    facts = policy_facts(str(path))
    assert facts["validation_rollouts"] == str(form.validation_rollouts) and facts["label"] == "sink_recent tuned on pan 4"
    names = f"recent_fill,sink_recent,{path}"
    status, text, _ = run(capsys, "evaluate", "--policies", names, "--clips", "2", "--metrics", "psnr", *host)
    assert status == 0 and "validation rollouts" in text.splitlines()[0]
    rows = [line for line in text.splitlines() if "sink_recent" in line]
    assert any("sink_recent tuned on pan 4" in row and str(form.validation_rollouts) in row for row in rows)
    assert f"sink_recent tuned on pan 4 is {path}: {form.parameters}" in text
    status, text, _ = run(capsys, "evaluate", "--policies", "sink_recent", "--clips", "2", "--metrics", "psnr", *host)
    assert "validation rollouts" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("recent_fill",), "recent_fill has no parameters that are tuned"),
        (("pretrained/general",), "pretrained/general has no parameters that are tuned"),
        (("sink_recnt",), "no policy 'sink_recnt'"),
        (("uniform", "--clips", "3"), "at least 4 clips"),
        (("uniform", "--budget", "15"), "leaves nothing to decide"),
        (("uniform", "--metric", "psnrr"), "psnr"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_sentence(args, message, tiny_host_folder, tmp_path, capsys):
    status, _, err = run(
        capsys, "tune", *args, "--out", str(tmp_path / "t"), "--host", str(tiny_host_folder), "--device", "cpu"
    )
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_damaged_form_is_refused(tmp_path, capsys):
    path = tmp_path / "form.json"
    for content in (
        "{",
        "[]",
        "{}",
        json.dumps({"format": 1, "policy": str(path)}),
        json.dumps({"format": 1, "policy": "uniform"}),
    ):
        path.write_text(content)
        status, _, err = run(capsys, "evaluate", "--policies", str(path), "--clips", "1")
        assert status == 2 and str(path) in err and "Traceback" not in err


def test_tables_in_markdown_have_the_rollouts_of_tuned_policies_alone():
    scores = {metric: {"mean": 30.0, "low": 29.0, "high": 31.0, "n": 3} for metric in ("psnr", "ssim")}
    summary = {"workload": "pan", "budget": 4, "policies": {"uniform": scores, "t.json": scores}}
    facts = {"t.json": {"label": "uniform tuned on pan 4", "validation_rollouts": "77"}, "uniform": {}}
    plain = markdown_table([summary]).splitlines()
    head, _, default, tuned = markdown_table([summary | {"policy_facts": facts}]).splitlines()
    assert "validation rollouts" not in plain[0] and head.endswith("| validation rollouts |")
    swapped = scores | {"psnr_swap": scores["psnr"] | {"mean": 12.0}}
    with_swap = markdown_table([summary | {"policies": {"uniform": scores, "t.json": swapped}}]).splitlines()
    assert with_swap[0].endswith("| PSNR swap dB [95 %] |") and with_swap[2].endswith("|  |")
    assert with_swap[3].endswith("| 12.00 [29.00, 31.00] |")
    learned = summary | {"policy_facts": facts | {"uniform": {"family": "learned"}}}
    assert markdown_table([learned]).splitlines()[2].endswith("| trained |")
    assert default.endswith("| 0 |") and tuned.endswith("| 77 |") and "| uniform tuned on pan 4 |" in tuned
