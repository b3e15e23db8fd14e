"""Learning curves: which points a run's logs hold, and what is refused."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from far_env.agents import training_callbacks
from far_env.agents.config import AgentTraining, RewardSettings
from far_env.agents.learning_curves import curve, draw
from far_env.agents.options import LearningCurveOptions
from far_env.agents.trainer import train
from far_env.config import save_yaml
from tests.agents.test_agents import config  # noqa: F401  (a fixture)


def test_a_resumed_run_has_one_curve_and_its_last_point_is_the_last_validation(config, tmp_path, monkeypatch):  # noqa: F811
    original, validations, stops = training_callbacks.validation_scores, [], [2]

    def noted(*args):
        if len(validations) in stops:
            stops.clear()
            raise KeyboardInterrupt
        validations.append(original(*args))
        return validations[-1]

    monkeypatch.setattr(training_callbacks, "validation_scores", noted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(dataclasses.replace(config, resume=True))
    metric, points = curve(tmp_path / "run")
    assert metric == "psnr" and [decisions for decisions, _ in points] == [0, 32, 64, 96]
    # validated before each update of 32 decisions, once more by the resumed session, and at the end
    scores = [next(iter(scores_by_name.values())) for scores_by_name in validations]
    assert len(scores) == 5 and [score for _, score in points] == pytest.approx([scores[0], *scores[-3:]])
    draw(LearningCurveOptions((str(tmp_path / "run"),), str(tmp_path / "curves.svg")))
    text = (tmp_path / "curves.svg").read_text()
    assert "decisions learned from" in text and "validation PSNR (dB)" in text and ">run<" in text


def test_what_cannot_be_drawn_is_refused(tmp_path):
    runs = []
    for name in ("psnr", "ssim"):
        (tmp_path / name).mkdir()
        save_yaml(AgentTraining(reward=RewardSettings(metric=name)), tmp_path / name / "config.yaml")
        runs.append(str(tmp_path / name))
    with pytest.raises(ValueError, match="contains no validations"):
        curve(tmp_path / "psnr")
    for name in ("psnr", "ssim"):
        with (tmp_path / name / "progress_00000000.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["time/total_timesteps", f"validation/{name}"], [1280, 20.0], ["", 30.0]])
    assert curve(tmp_path / "psnr") == ("psnr", [(0, 20.0), (80_000, 30.0)])
    with pytest.raises(ValueError, match="need one metric, got psnr, ssim"):
        draw(LearningCurveOptions(tuple(runs)))
    with pytest.raises(ValueError, match=r"\.png or \.svg file, not curves\.jpg"):
        draw(LearningCurveOptions((runs[0],), "curves.jpg"))
    with pytest.raises(ValueError, match="cannot read the configuration"):
        curve(tmp_path / "nothing")


def test_runs_whose_folders_have_the_same_name_each_have_a_curve(tmp_path):
    runs = [tmp_path / "one" / "pan", tmp_path / "two" / "pan", tmp_path / "two" / "cuts"]
    for run in runs:
        run.mkdir(parents=True)
        save_yaml(AgentTraining(), run / "config.yaml")
        (run / "progress_00000000.csv").write_text("time/total_timesteps,validation/psnr\n1280,20.0\n,30.0\n")
    draw(LearningCurveOptions(tuple(map(str, runs)), str(tmp_path / "curves.svg")))
    text = (tmp_path / "curves.svg").read_text()
    assert [text.count(f">{label}<") for label in (runs[0], runs[1], "cuts", "pan", runs[2])] == [1, 1, 1, 0, 0]
