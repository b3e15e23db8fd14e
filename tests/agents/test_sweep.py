"""Sweeps: what is searched, that a stopped one ends as a whole one, and what is refused."""

from __future__ import annotations

import dataclasses
import sys

import optuna
import pytest

from far_env.agents import sweep as module
from far_env.agents.config import AgentTraining
from far_env.agents.options import Sweep
from far_env.agents.sweep import changed, sweep
from far_env.config import load_yaml, save_yaml
from tests.agents.test_agents import config  # noqa: F401  (a fixture)

SEARCH = {
    "ppo.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "ppo.n_epochs": {"low": 1, "high": 2},
    "network.width": {"choices": [8, 16]},
}


@pytest.fixture
def options(config, tmp_path):  # noqa: F811
    save_yaml(dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, total_timesteps=32)), tmp_path / "base.yaml")
    return Sweep(base=str(tmp_path / "base.yaml"), run_dir=str(tmp_path / "sweep"), trials=3, search=SEARCH)


def trials(options):
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{options.run_dir}/study.db")
    return [(trial.params, trial.value) for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]


def test_a_stopped_sweep_ends_as_the_whole_one_and_names_the_best(options, tmp_path, monkeypatch, capsys):
    whole = dataclasses.replace(options, run_dir=str(tmp_path / "whole"))
    sweep(whole)
    assert "best of 3" in capsys.readouterr().out
    original, calls = module._score, []

    def stop_in_the_second(trial_config):
        calls.append(trial_config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(trial_config)

    monkeypatch.setattr(module, "_score", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        sweep(options)
    assert len(trials(options)) == 1
    sweep(options)
    assert calls[2] == calls[1], "the trial that was stopped is tried again, in the same folder"
    assert trials(options) == trials(whole)
    params, _ = max(trials(whole), key=lambda trial: trial[1])
    best = load_yaml(AgentTraining, tmp_path / "sweep" / "best.yaml")
    assert best.ppo.learning_rate == params["ppo.learning_rate"] and best.network.width == params["network.width"]
    assert best.run_dir.endswith("best") and best.train_clips == 8
    for params, _ in trials(whole):
        assert 1e-4 <= params["ppo.learning_rate"] <= 1e-2 and params["network.width"] in (8, 16)
    assert len({params["ppo.learning_rate"] for params, _ in trials(whole)}) == 3
    with pytest.raises(ValueError, match="contains another sweep"):
        sweep(dataclasses.replace(options, seed=1))


def test_what_cannot_be_searched_is_refused(options, monkeypatch):
    for search, message in (
        ({}, "needs something to search"),
        ({"ppo.gamma": {"low": 0.5}}, "either low and high, or choices"),
        ({"ppo.gamma": {"low": 0.5, "high": 1.0, "choices": [1]}}, "either low and high, or choices"),
        ({"ppo.gamma": {"choices": [1.0], "lof": True}}, "unknown key 'lof'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(options, search=search)
    with pytest.raises(ValueError, match=r"search: ppo.gama: unknown setting 'gama'; did you mean 'gamma'"):
        sweep(dataclasses.replace(options, search={"ppo.gama": {"choices": [1.0]}}))
    with pytest.raises(ValueError, match="expected int"):
        changed(AgentTraining(), {"ppo.n_epochs": "many"})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"needs Optuna; install it with pip install"):
        sweep(options)


def test_the_shipped_configuration_can_be_read():
    settings = load_yaml(Sweep, "configs/sweep.yaml")
    for name, search_range in settings.search.items():
        value = search_range["choices"][0] if "choices" in search_range else search_range["low"]
        changed(load_yaml(AgentTraining, settings.base), {name: value})
