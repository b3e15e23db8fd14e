"""The self-test: what it runs, that it passes on correct code, and that it detects errors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env import cli
from far_env.contract import RolloutState, apply_plan
from far_env.evaluation import selftest
from far_env.evaluation.selftest import KeepEnds, full_size_workload, made_clip, self_test
from far_env.frame_meta import frame_meta_list
from far_env.host.autoencoder import Autoencoder
from far_env.host.random_host import random_host
from far_env.host.sampler import FrameSampler
from far_env.rollout.play import play
from tests.clips.test_video import write_episode

CPU = torch.device("cpu")


def run(capsys, *args):
    status = cli.main(["selftest", "--device", "cpu", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("name", "context", "budget"), [("ucf101_short_prediction", 5, 4), ("dmlab_long_prediction", 36, 8)])
def test_a_small_configuration_passes(small_released, capsys, name, context, budget):
    status, out, err = run(capsys, "--workload", name, "--json", "-", "--frames", "4", "--steps", "3")
    assert status == 0 and err == ""
    result = json.loads(out)
    assert result["passed"] and all(check["passed"] for check in result["checks"]) and len(result["checks"]) == 5
    facts = result["facts"]
    assert (facts["context"], facts["predict"], facts["budget"], facts["ode_steps"]) == (context, 4, budget, 3)
    assert facts["dtype"] == "float32" and facts["host"].endswith("random weights")
    assert "made 3" in result["checks"][3]["detail"], "four frames, the last decision changes nothing"
    assert all(value > 0 for value in result["seconds"].values()) and result["peak_memory_mib"] > 0


def test_text_and_file_agree(small_released, capsys, tmp_path):
    status, out, _ = run(capsys, "--frames", "1", "--precision", "bfloat16")
    assert status == 0 and "5 + 1 frames, budget 4, 2 ODE steps" in out and "bfloat16" in out
    assert out.count(" ok ") == 5 and "FAILED" not in out and "peak memory" in out
    assert run(capsys, "--frames", "1", "--json", str(tmp_path / "result.json"))[1] == ""
    assert json.loads((tmp_path / "result.json").read_text())["passed"]


def test_a_clip_of_the_users_data_is_rolled_out(small_released, tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    write_episode(tmp_path / "a.npz", 50, video=video)
    workload, clip = full_size_workload("dmlab_long_prediction", device="cpu", num_frames=2, data_dir=str(tmp_path))
    assert clip.frames.shape == (38, 3, 64, 64) and workload.clips.path("test", 0).name == "a.npz"
    assert not self_test(workload, clip).failures


def test_an_error_of_the_engine_fails_the_agreement(small_released, monkeypatch, capsys):
    sample = FrameSampler.__call__
    monkeypatch.setattr(FrameSampler, "__call__", lambda *args, **more: sample(*args, **more) * 1.001)
    status, out, err = run(capsys)
    assert status == 2 and "FAILED  agreement" in out and "ok      decisions" in out
    assert "the self-test failed; agreement: their latents differ by" in err and err.count("\n") == 1


def test_nothing_but_numbers_is_an_error(small_released, monkeypatch, capsys):
    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda *args: decode(*args) * torch.nan)
    status, out, _ = run(capsys)
    assert status == 2 and "FAILED  values      not finite" in out


def test_zero_velocities_are_noticed(small_released):
    """As with a newly built transformer: the frames are the noise."""
    workload, clip = full_size_workload("ucf101_short_prediction", device="cpu")
    for parameter in workload.host.transformer.proj_out.parameters():
        parameter.zero_()
    (failure,) = self_test(workload, clip).failures
    assert failure.startswith("movement: latents are 0 away")


@pytest.mark.parametrize("name", ["far_b_ucf101", "far_b_long_dmlab"])
def test_random_hosts_are_the_same_again_and_depend_on_their_history(small_released, name):
    state = torch.random.get_rng_state()
    host, again, other = (random_host(name, CPU, torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are not affected"
    for module in (host.transformer, host.autoencoder):
        assert all(parameter.any() for parameter in module.parameters()), "no parameter is zero as a whole"
    weights = [made.transformer.state_dict() for made in (host, again, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not torch.equal(weights[0]["proj_out.weight"], weights[2]["proj_out.weight"])
    workload, clip = full_size_workload("dmlab_long_prediction", device="cpu", num_frames=2)
    workload = replace(workload, host=host)
    cut, whole = (play(workload, [clip], [1], KeepEnds(), budget)[0].generated([0])[0] for budget in (4, 9999))
    assert torch.equal(cut[0], whole[0]) and (cut[1] - whole[1]).abs().max() > 0.01


def test_the_policy_keeps_both_ends():
    metas = frame_meta_list(torch.rand(9, 4), 0, 0.1)
    plan = KeepEnds().build_temporal_cache_plan(metas, RolloutState(0, 0.5, 3), {"max_frames": 5, "capacity_mb": 0.5})
    assert apply_plan(plan, 9, 5) == [0, 1, 6, 7, 8]


def test_a_made_clip_alternates_its_direction_at_any_size():
    clip = made_clip(150, 128)
    assert clip.frames.shape == (150, 3, 128, 128)
    np.testing.assert_array_equal(clip.frames[71 + 5], clip.frames[71 - 5])
    np.testing.assert_array_equal(clip.frames[142:], clip.frames[:8])
    np.testing.assert_array_equal(clip.frames[3, :, ::2, 1::2], made_clip(4, 64).frames[3])
    assert made_clip(6, 64, 4).actions.tolist() == [0, 1, 2, 3, 0, 1] and not clip.actions.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--workload", "pan"), "unknown workload with a released host 'pan'; known: bair_c2p14, "),
        (("--workload", "dmlab"), "unknown workload with a released host 'dmlab'"),
        (("--frames", "0"), "at least 1 frame and 1 ODE step, got 0"),
        (("--steps", "0"), "at least 1 frame and 1 ODE step, got 3 and 0"),
        (("--data-dir", "/nowhere"), "/nowhere does not exist"),
        (("--precision", "half"), "unknown precision 'half'"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, args, message):
    status, out, err = run(capsys, *args)
    assert status == 2 and not out and message in err and err.count("\n") == 1


def test_too_little_memory_is_one_sentence(capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(selftest, "random_host", full)
    status, _, err = run(capsys)
    assert status == 2 and "the memory of cpu does not suffice: CUDA out of memory." in err


def test_autoencoders_are_no_hosts():
    with pytest.raises(ValueError, match="dcae_ucf101_64 is an autoencoder"):
        random_host("dcae_ucf101_64", CPU, torch.float32)
