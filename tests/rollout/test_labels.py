"""Rollouts whose host is conditioned on the clip's label, with and without guidance, from given frames or from nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from far_env.clips.clip import Clip
from far_env.clips.worlds import WORLDS
from far_env.errors import PolicyError
from far_env.host.far import FAR
from far_env.host.sampler import sample_next_frame
from far_env.host.zoo import RELEASED
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.noise import rollout_noise
from far_env.rollout.play import play
from far_env.workload import Workload, check_decides
from far_env.workloads import WORKLOADS, make_workload
from tests.clips.test_video import write_video
from tests.conftest import TINY_FAR, randomise
from tests.rollout.test_rollout import Sloppy, specified

NUM_CLASSES = 5
CLASSES = [0, 3, 3, 4, 1]


@pytest.fixture(scope="module")
def label_host(tiny_host):
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": NUM_CLASSES})
    randomise(transformer, 5)
    return replace(tiny_host, name="tiny_label", transformer=transformer.eval().requires_grad_(False))


@pytest.fixture(params=[(0, 1.0), (0, 2.0), (3, 2.0)], ids=str)
def workload(label_host, request):
    num_context, guidance = request.param
    return Workload("labelled", None, label_host, num_context, 6, num_steps=3, guidance=guidance, labels=True)


def labelled_clips(num_context):
    pan = [WORLDS["pan"].clip("test", 0 if num_context == 0 else i).frames for i in range(len(CLASSES))]
    return [Clip(i, frames, label=label) for i, (frames, label) in enumerate(zip(pan, CLASSES, strict=True))]


@pytest.mark.parametrize("memo_bytes", [0, 2**24])
def test_a_ragged_batch_equals_the_specification_row_by_row(workload, memo_bytes):
    clips, memo = labelled_clips(workload.num_context), FrameMemo(memo_bytes)
    budgets, seeds = [1, 2, 4, 9999, 9999], [7, 7, 8, 9, 9]
    for _ in range(2 if memo_bytes else 1):
        batch, _ = play(workload, clips, seeds, Sloppy(), budgets, memo=memo)
    assert memo_bytes == 0 or memo.statistics.hits
    for row, (clip, seed, budget) in enumerate(zip(clips, seeds, budgets, strict=True)):
        expected = specified(workload, clip, Sloppy(), budget, seed)
        torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.decode([row])[0], expected.frames, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_from_nothing_frames_are_those_of_the_sampler(label_host, guidance):
    workload = Workload("labelled", None, label_host, 0, 3, num_steps=3, guidance=guidance, labels=True)
    batch, _ = play(workload, labelled_clips(0)[:2], [5, 5], None, 9999)
    noise, frames = rollout_noise(5, 3, label_host.latent_shape), None
    options = {"num_steps": 3, "guidance_scale": guidance, "label": torch.tensor(CLASSES[:2])}
    for step in range(3):
        new = sample_next_frame(label_host.transformer, frames, noise[step].expand(2, 1, -1, -1, -1), **options)
        frames = new if frames is None else torch.cat([frames, new], dim=1)
    torch.testing.assert_close(batch.generated([0, 1]), frames, atol=1e-4, rtol=0)
    assert (frames[0] - frames[1]).abs().max() > 0.01, "the label makes a difference"


def test_without_labels_a_host_that_takes_them_gets_the_null_class(label_host):
    workload = Workload("unlabelled", None, label_host, 0, 2, num_steps=3)
    nulled = Workload("labelled", None, label_host, 0, 2, num_steps=3, labels=True)
    null = replace(nulled, name="null")
    object.__setattr__(null, "label_of", lambda clip: NUM_CLASSES)
    latents = [play(one, labelled_clips(0)[1:2], [5], None, 9999)[0].generated([0]) for one in (workload, null, nulled)]
    torch.testing.assert_close(latents[0], latents[1], atol=1e-6, rtol=0)
    assert (latents[0] - latents[2]).abs().max() > 0.01


def test_a_saved_batch_goes_on_with_its_labels(workload):
    clips = labelled_clips(workload.num_context)[:2]
    expected = play(workload, clips, [1, 2], None, 9999)[0].generated([0, 1])
    batch = RolloutBatch(workload, 2)
    batch.begin([0, 1], clips, [1, 2])
    for _ in range(3):
        batch.advance([0, 1])
    other = RolloutBatch(workload, 2)
    other.load_state_dict(batch.state_dict())
    while not other.finished(0):
        other.advance([0, 1])
    torch.testing.assert_close(other.generated([0, 1]), expected, atol=1e-4, rtol=0)


class Signals:
    signals = ("lat_cos",)

    def build_temporal_cache_plan(self, metas, state, budget):
        raise AssertionError("not asked")


def test_what_cannot_be_is_refused(label_host, tiny_host):
    make = {"num_context": 0, "num_predict": 2, "num_steps": 3}
    with pytest.raises(ValueError, match=r"labels, which host .* does not take"):
        Workload("x", None, tiny_host, **make, labels=True)
    with pytest.raises(ValueError, match=r"guidance 2\.0 without actions, labels or prompts"):
        Workload("x", None, label_host, **make, guidance=2.0)
    with pytest.raises(ValueError, match="num_context of x must be at least 1, got 0"):
        Workload("x", None, label_host, **make, feedback="true")
    workload = Workload("x", None, label_host, **make, labels=True)
    with pytest.raises(ValueError, match="generates videos from nothing"):
        check_decides(workload, 1)
    for label, reason in ((None, "none"), (NUM_CLASSES, "5")):
        with pytest.raises(ValueError, match=f"accepts 0 to 4; the clip has {reason}"):
            workload.label_of(Clip(0, np.zeros((0, 3, 64, 64), dtype=np.float32), label=label))
    with pytest.raises(PolicyError, match="signals are not recorded in x"):
        play(workload, labelled_clips(0)[:1], [1], Signals(), 1)


@pytest.mark.parametrize("size", [128, 256])
def test_fars_generation_gives_labels_and_guidance_to_hosts_that_take_them(label_host, tiny_host, tmp_path, monkeypatch, size):
    entries = []
    for i, label in enumerate((0, 0, 1)):
        write_video(tmp_path / f"{i}.mp4", 46)
        entries.append({"video_path": f"datasets/ucf101/{i}.mp4", "label": label})
    (tmp_path / "trainval.json").write_text(json.dumps(entries))
    name = f"ucf101_c0p16_{size}"
    assert WORKLOADS[name].host == f"far_l_ucf101_{size}_label" and WORKLOADS[name].num_steps == 50
    released = RELEASED[WORKLOADS[name].host]
    assert (released.frame_size, released.build().null_class) == (size, 101)
    for host, labels, guidance in ((label_host, True, 2.0), (tiny_host, False, 1.0)):
        monkeypatch.setattr("far_env.workloads.load_host", lambda *_, host=host: replace(host, frame_size=size))
        workload = make_workload(name, data_dir=tmp_path)
        assert (workload.labels, workload.guidance, workload.num_context, workload.num_predict) == (labels, guidance, 0, 16)
    clips = [workload.clips.clip("test", i) for i in range(3)]
    assert [clip.label for clip in clips] == [0, 1, 0] and clips[0].frames.shape == (16, 3, size, size)
    assert gym.envs.registry.get(f"far_env/Ucf101C0p16{size}-v0") is None, "there is nothing to reward"
