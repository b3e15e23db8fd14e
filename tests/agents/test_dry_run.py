"""What a run will cost, against what a run did, and against formulas."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from far_env import cli
from far_env.agents import dry_run as dry_run_module
from far_env.agents import imitation, trainer, training_callbacks
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings, RewardSettings
from far_env.agents.dry_run import estimate
from far_env.agents.network import RetentionNetwork
from far_env.agents.ppo import PPOStage
from far_env.agents.run_costs import host_costs, on_meta, rollout_costs, scorer_flops
from far_env.agents.surrogate import SurrogateRollouts, comparison_bytes
from far_env.agents.trainer import Run, checked, train
from far_env.config import save_yaml
from far_env.contract import UNLIMITED_FRAMES
from far_env.host.autoencoder import Autoencoder
from far_env.rollout.engine import RolloutBatch
from far_env.workloads import make_workload
from tests.conftest import TINY_FAR


@pytest.fixture
def config(tiny_host_folder, tmp_path) -> AgentTraining:
    """All stages, two budgets, of which one is above the context, and a clip that comes twice."""
    ppo = PPOSettings(total_timesteps=40, num_envs=3, n_steps=7, batch_size=21, n_epochs=1)
    return AgentTraining(
        imitation=ImitationSettings(true_clips=20, rounds=("true 4", "rollouts 4"), epochs=1, round_epochs=1),
        surrogate=ppo,
        ppo=dataclasses.replace(ppo, total_timesteps=60),
        workload="pan",
        budget="3,7",
        reward=RewardSettings(telescoping=True),
        host=str(tiny_host_folder),
        device="cpu",
        run_dir=str(tmp_path / "runs" / "run"),
        train_clips=12,
        validation_clips=3,
        validate_every=2,
        test_clips=2,
        table=("recent_fill", "full_history"),
    )


def run_of(config: AgentTraining) -> Run:
    config, workloads, budgets = checked(config)
    return Run(config, workloads, budgets, Path(config.run_dir), {})


@pytest.fixture
def spied(monkeypatch):
    """Counts by stage of what is called; a stage within another one counts for itself."""
    counts: dict[str, Counter] = {}
    running = ["outside"]

    @contextmanager
    def named(name):
        running.append(name)
        yield
        running.pop()

    def count(what, amount):
        counts.setdefault(running[-1], Counter())[what] += amount

    def before(owner, name, what, amount):
        original = getattr(owner, name)

        def called(self, *args, **kwargs):
            for key, number in zip(what, amount(*args), strict=True):
                count(key, number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    def stage(owner, name, label):
        original = getattr(owner, name)

        def called(*args, **kwargs):
            with named(label(*args)):
                return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    before(Autoencoder, "encode", ("clips_encoded", "frames_encoded"), lambda x: (x.shape[0], x.shape[0] * x.shape[1]))
    before(Autoencoder, "decode", ("frames_decoded",), lambda x: (x.shape[0] * x.shape[1],))
    before(RolloutBatch, "begin", ("rollouts",), lambda rows, *_: (len(rows),))
    before(SurrogateRollouts, "begin", ("rollouts",), lambda rows, *_: (len(rows),))
    before(RolloutBatch, "advance", ("frames_generated",), lambda rows: (len(rows),))
    parts = iter(["imitation, expert", "imitation, true", "imitation, rollouts"])
    stage(imitation, "collect", lambda *_: next(parts))
    stage(PPOStage, "run", lambda self, _: self.name)
    stage(training_callbacks, "validation_scores", lambda *_: f"validations, {running[-1]}")
    stage(trainer, "compare", lambda *_: "table")
    collect = imitation.collect

    def collected(*args, **kwargs):
        data = collect(*args, **kwargs)
        name = ["imitation, expert", "imitation, true", "imitation, rollouts"][collected.calls]
        counts.setdefault(name, Counter())["decisions"] += len(data)
        counts[name]["rollouts"] = len(data.max_frames)
        collected.calls += 1
        return data

    collected.calls = 0
    monkeypatch.setattr(imitation, "collect", collected)
    return counts


@pytest.mark.parametrize("options", [{}, {"feedback": "true"}, {"telescoping": False}], ids=["plain", "feedback", "terminal"])
def test_the_counts_are_those_of_the_run(config, spied, options):
    if "telescoping" in options:
        config = dataclasses.replace(config, reward=RewardSettings())
    else:
        config = dataclasses.replace(config, **options)
    counted = [stage.counts for stage in estimate(run_of(config), 1.0).stages]
    spied.clear()
    train(config)
    for place, stage in enumerate(counted):
        is_validation = "validations" in stage.name
        done = spied[f"validations, {counted[place - 1].name}" if is_validation else stage.name]
        names = ["clips_encoded", "frames_encoded", "rollouts", "frames_generated"]
        names += ["decisions"] if "imitation" in stage.name else ["frames_decoded"] if stage.name != "table" else []
        for name in names:
            assert stage.total(name) == done[name], (stage.name, name)
    table = counted[-1]
    assert table.total("frames_decoded") >= spied["table"]["frames_decoded"], "policies share frames"
    logged = [path.read_text().splitlines()[-1] for path in Path(config.run_dir).rglob("progress_*.csv")]
    assert len(logged) == 2
    assert [stage.total("decisions") for stage in counted if stage.name.startswith("PPO")] == [42, 63]


def test_a_generated_frame_takes_the_operations_of_its_matrix_products(tiny_workload):
    """By hand for a FAR: kept frames of S tokens, width d, L layers; only keys and values of the last block are needed."""
    kept, tokens = 4, (8 // 2) ** 2
    width = TINY_FAR["attention_head_dim"] * TINY_FAR["num_attention_heads"]
    layers, inputs = TINY_FAR["num_layers"], TINY_FAR["in_channels"] * TINY_FAR["patch_size"] ** 2

    def block(queries, keys):
        return 2 * queries * 12 * width**2 + 4 * queries * keys * width

    def encoded(new, total):
        new, total = new * tokens, total * tokens
        return 2 * new * inputs * width + (layers - 1) * block(new, total) + 2 * new * 2 * width**2

    def denoised(total):
        return 2 * tokens * 2 * inputs * width + layers * block(tokens, (total + 1) * tokens)

    # Modulations are computed once for each time, those of clean frames too.
    modulated = 2 * (256 * width + width**2) + layers * 2 * 2 * 3 * width**2 + 2 * 2 * width**2
    steps = tiny_workload.num_steps
    found = host_costs(on_meta(tiny_workload), [kept])
    assert found.frame[kept] == encoded(kept, kept) + steps * (denoised(kept) + modulated) + modulated
    # Full history after 5 given frames and 5 of 11: only the newest is encoded, and times were modulated before.
    assert found.frame[UNLIMITED_FRAMES] == encoded(1, 10) + steps * denoised(10)
    assert found.cache_bytes[kept] == layers * 2 * 5 * tokens * width * 4, "five context frames, before the first cut"
    weights = [*tiny_workload.host.transformer.state_dict().values(), *tiny_workload.host.autoencoder.state_dict().values()]
    assert found.weight_bytes == sum(value.nbytes for value in weights)


def test_the_operations_of_the_scorer_are_those_of_a_larger_batch():
    from torch.utils.flop_counter import FlopCounterMode

    config, nodes = NetworkConfig(), 9
    network = RetentionNetwork(config)
    arguments = torch.zeros(3, nodes, 15), torch.zeros(3, nodes, nodes, 29), torch.ones(3, nodes, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        network(*arguments, torch.ones(3, nodes, dtype=torch.bool))
    assert 3 * scorer_flops(config, nodes, learn=False) == counter.get_total_flops()
    assert 2.5 < scorer_flops(config, nodes, learn=True) / scorer_flops(config, nodes, learn=False) < 3.5


def test_files_and_memory_are_those_of_a_run(config, capsys):
    config = dataclasses.replace(config, budget=3)
    cost = estimate(run_of(config), 1.0)
    train(config)
    folder = Path(config.run_dir)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".ckpt"))
    assert cost.disk == pytest.approx(written, rel=0.15)
    rollouts = SurrogateRollouts(make_workload("pan", host=config.host, device="cpu"), 1)
    rollouts.begin([0], [rollouts.workload.clips.clip("train", 0)], [0])
    assert rollouts.memo.num_bytes == comparison_bytes(rollouts.workload)


def test_a_made_rollout_records_as_much_as_a_real_one(tiny_workload):
    settings, network = ImitationSettings(true_clips=1), NetworkConfig()
    made = rollout_costs(tiny_workload, (4,), network, settings)
    real = imitation.collect(tiny_workload, [0], [4], actor=None, config=network, true_frames=True, progress=False)
    assert made.file_bytes == sum(value.nbytes for value in vars(real).values()) and made.nodes == 16
    assert min(made.collect_seconds, made.begin_seconds, made.evict_seconds, made.learn_seconds) > 0


def arguments(config: AgentTraining, *more: str) -> list[str]:
    path = Path(config.run_dir).parents[1] / "config.yaml"
    save_yaml(config, path)
    return ["train", "--config", str(path), *more]


def test_the_command_prints_a_table_and_writes_nothing(config, capsys, tmp_path):
    command = arguments(config, "--dry-run", "--tflops", "2.5")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for words in (
        "imitation, rollouts",
        "PPO with the surrogate",
        "3 validations",
        "at 2.5 TFLOP/s (cpu, given)",
        "disk",
        "GiB free",
    ):
        assert words in out
    assert cli.main(arguments(config, "--dry-run")) == 0
    assert "(cpu, measured)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test_clips": 5000}, "test_clips is 5000, but pan/test has 4096"),
        ({"reward": RewardSettings("ssim")}, "the surrogate estimates PSNR alone: set reward.metric to psnr"),
        ({"table": ("nothing_like_it",)}, "nothing_like_it"),
        ({"budget": 15}, "leaves nothing to decide in pan"),
        ({"network": NetworkConfig(signals=("attn_mass",))}, "true frames have no signal but lat_cos"),
    ],
)
def test_what_would_stop_a_run_stops_a_dry_one(config, capsys, change, sentence):
    assert cli.main(arguments(dataclasses.replace(config, **change), "--dry-run")) == 2
    assert sentence in capsys.readouterr().err


def test_rounds_in_rollouts_alone_may_have_signals_that_true_frames_lack(config):
    network = NetworkConfig(signals=("attn_mass",))
    rounds = ImitationSettings(start="a trained scorer", rounds=("rollouts 4",), round_epochs=1)
    nothing = dataclasses.replace(config.ppo, total_timesteps=0)
    config = dataclasses.replace(config, imitation=rounds, network=network, surrogate=nothing, ppo=nothing)
    assert [cost.counts.name for cost in estimate(run_of(config), 1.0).stages] == ["imitation, rollouts", "table"]


def test_folders_that_a_run_refuses_are_refused(config, capsys, tmp_path):
    folder = Path(config.run_dir)
    folder.parent.mkdir()
    folder.write_text("a file")
    assert cli.main(arguments(config, "--dry-run")) == 2
    assert "cannot be written" in capsys.readouterr().err
    folder.unlink()
    (folder / "expert_data").mkdir(parents=True)
    (folder / "expert_data" / "index.json").write_text(json.dumps({}))
    assert cli.main(arguments(config, "--dry-run")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(arguments(config, "--tflops", "3")) == 2
    assert "tflops is for the estimate of --dry-run" in capsys.readouterr().err
    assert dry_run_module.check_folder(tmp_path / "a" / "b") == tmp_path
