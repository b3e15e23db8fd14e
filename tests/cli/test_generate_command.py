"""The command ``far-env generate``: its files against rollouts, what is made again and what is not, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from far_env import cli
from far_env.agents import checkpoints
from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.clips.blank import Blank
from far_env.clips.video import read_frames
from far_env.clips.video_writing import is_whole, write_gif, write_mp4
from far_env.evaluation import generation
from far_env.host.far import FAR
from far_env.host.weights import load_host, save_host
from far_env.policies import load_policy
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from far_env.workloads import make_workload
from tests.clips.test_video import write_video
from tests.conftest import TINY_DCAE, TINY_FAR, randomise

LABELS = {**TINY_FAR, "condition_cfg": {"type": "label", "num_classes": 5}}


@pytest.fixture(scope="module")
def label_host(tmp_path_factory, tiny_host):
    transformer = FAR(**LABELS)
    randomise(transformer, 5)
    folder = tmp_path_factory.mktemp("tiny_label")
    configs = {"transformer": LABELS, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(folder, transformer, tiny_host.autoencoder, configs, frame_size=64, num_steps=2)
    return folder


def generate(capsys, host, out, *args):
    status = cli.main(["generate", "--host", str(host), "--device", "cpu", "--out", str(out), *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".mp4", ".gif")}


def gif_frames(path):
    with Image.open(path) as picture:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])


def uint8(frames):
    """(T, 3, H, W) in [0, 1] as (T, H, W, 3)."""
    return np.rint(255 * np.asarray(frames).transpose(0, 2, 3, 1)).astype(np.uint8)


def grey(frames):
    """Brightness (T, H, W): an mp4 has it of every pixel, and colour of every fourth, which matters in frames like noise."""
    return np.asarray(frames) @ [0.299, 0.587, 0.114]


def test_a_video_is_the_rollout_beside_the_truth(capsys, tiny_host_folder, tmp_path):
    args = ("--workload", "pan", "--policies", "recent_fill", "--clips", "2", "--trajectories", "2", "--seeds", "7")
    status, out, _ = generate(capsys, tiny_host_folder, tmp_path, *args, "--formats", "mp4,gif", "--truth", "--scale", "2")
    assert status == 0 and "4 rollouts in" in out and "noise seed 7 (2 trajectories) + clip id" in out
    names = {f"clip{clip}_seed7_trajectory{t}.{kind}" for clip in (0, 1) for t in (0, 1) for kind in ("mp4", "gif")}
    assert files(tmp_path) == {f"recent_fill_budget4/{name}" for name in names}
    workload = make_workload("pan", host=tiny_host_folder, device="cpu")
    clip = workload.clips.clip("test", 1)
    rollout = reference_rollout(workload, clip, load_policy("recent_fill"), 4, 1_000_008)
    expected = np.concatenate([uint8(clip.frames), uint8(np.concatenate([clip.frames[:5], rollout.frames.numpy()]))], axis=2)
    expected = expected.repeat(2, axis=1).repeat(2, axis=2)
    for kind, tolerance in (("mp4", 4), ("gif", 8)):
        path = tmp_path / "recent_fill_budget4" / f"clip1_seed7_trajectory1.{kind}"
        frames = np.stack(read_frames(path, 0, 16)) if kind == "mp4" else gif_frames(path)
        assert frames.shape == (16, 128, 256, 3)
        difference = np.abs(grey(frames) - grey(expected)).mean(axis=(1, 2))
        assert difference.max() < tolerance, kind
        shuffled = np.abs(grey(frames) - grey(expected[::-1])).mean()
        assert shuffled > 2 * difference.max(), "other frames are far from these"


def test_policies_and_budgets_have_folders_of_their_own_and_share_the_batch(capsys, tiny_host_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path / "shipped")
    (tmp_path / "shipped" / "general").mkdir(parents=True)
    network = RetentionNetwork(NetworkConfig(width=16, num_layers=1))
    checkpoints.save_scorer(network, network.config, {"trained_on": "nothing"}, tmp_path / "shipped" / "general")
    tmp_path = tmp_path / "videos"
    args = ("--workload", "pan", "--policies", "pretrained/general,full_history", "--budget", "4,6", "--clips", "1")
    assert generate(capsys, tiny_host_folder, tmp_path, *args)[0] == 0
    folders = ("full_history", "pretrained%2Fgeneral_budget4", "pretrained%2Fgeneral_budget6")
    assert files(tmp_path) == {f"{folder}/clip0_seed42_trajectory0.mp4" for folder in folders}
    status, out, _ = generate(capsys, tiny_host_folder, tmp_path, *args[:3], "recent_fill", "--clips", "1")
    assert status == 0 and "(1 new)" in out and len(files(tmp_path)) == 4, "more can be added"


def test_only_what_is_missing_or_not_whole_is_made_again(capsys, tiny_host_folder, tmp_path):
    args = ("--workload", "pan", "--clips", "4", "--formats", "mp4,gif")
    assert generate(capsys, tiny_host_folder, tmp_path, *args)[0] == 0
    folder = tmp_path / "full_history"
    cut, gone = folder / "clip1_seed42_trajectory0.mp4", folder / "clip2_seed42_trajectory0.gif"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if "clip0" in path.name or "clip3" in path.name}
    status, out, _ = generate(capsys, tiny_host_folder, tmp_path, *args, "--batch-size", "1")
    assert status == 0 and "4 rollouts in" in out and "(2 new)" in out
    assert cut.read_bytes() == whole and is_whole(gone, 16, 8)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    status, out, error = generate(capsys, tiny_host_folder, tmp_path, *args)
    assert status == 0 and "(0 new)" in out and "frames/s" not in error
    assert len(json.loads((tmp_path / "run.json").read_text())) == 3


def test_a_stopped_command_keeps_its_videos_and_tells_how_to_go_on(capsys, tiny_host_folder, tmp_path, monkeypatch):
    args = ("--workload", "pan", "--clips", "3", "--batch-size", "1")
    calls = []

    def stopping(*call, **options):
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return play(*call, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "play", stopping)
        status, _, error = generate(capsys, tiny_host_folder, tmp_path, *args)
    assert status == 130 and "the videos finished so far are in" in error and len(files(tmp_path)) == 2
    assert "(1 new)" in generate(capsys, tiny_host_folder, tmp_path, *args)[1]


def test_a_clip_that_cannot_be_read_is_left_out(capsys, tiny_host_folder, tmp_path):
    for split in ("train", "validation", "test"):
        for i in range(2):
            write_video(tmp_path / "data" / split / f"{i}.avi", 16)
    damaged = tmp_path / "data" / "test" / "0.avi"
    sound = damaged.read_bytes()
    content = bytearray(sound)
    for place in range(len(content) // 5, len(content) * 9 // 10, 11):  # after its header
        content[place] ^= 0xFF
    damaged.write_bytes(content)
    args = ("--workload", "recorded", "--data-dir", str(tmp_path / "data"), "--num-context", "8", "--num-predict", "8")
    args = (*args, "--clips", "2")
    status, out, error = generate(capsys, tiny_host_folder, tmp_path / "videos", *args)
    assert status == 1 and "left out clip 0" in error and "1 rollouts in" in out
    assert files(tmp_path / "videos") == {"full_history/clip1_seed42_trajectory0.mp4"}
    damaged.write_bytes(sound)
    status, out, _ = generate(capsys, tiny_host_folder, tmp_path / "videos", *args)
    assert status == 0 and "2 rollouts in" in out and "(1 new)" in out


def test_from_nothing_each_video_has_its_label(capsys, label_host, tmp_path):
    args = ("--labels", "3,1", "--clips", "3", "--num-predict", "4", "--ode-steps", "2", "--seeds", "0,2")
    status, out, _ = generate(capsys, label_host, tmp_path, *args)
    assert status == 0 and "generation, 0 + 4 frames" in out and "guidance 2.0" in out and len(files(tmp_path)) == 6
    host = load_host(label_host, "cpu")
    workload = Workload("x", Blank(64, (3, 1)), host, 0, 4, 2, 2.0, labels=True)
    clips = [workload.clips.clip("test", i) for i in range(3)]
    assert [clip.label for clip in clips] == [3, 1, 3]
    frames = [reference_rollout(workload, clip, None, 9999, 2 + i).frames.numpy() for i, clip in enumerate(clips)]
    for i, expected in enumerate(frames):
        video = np.stack(read_frames(tmp_path / "full_history" / f"clip{i}_seed2_trajectory0.mp4", 0, 4))
        assert np.abs(grey(video) - grey(uint8(expected))).mean() < 4
    status, out, _ = generate(capsys, label_host, tmp_path / "plain", *args[:-2], "--guidance", "1")
    assert status == 0 and "guidance 1.0" in out
    assert "4 + 0" not in out and len(files(tmp_path / "plain")) == 3


def test_a_policy_decides_what_a_video_from_nothing_forgets(capsys, tiny_host_folder, tmp_path, monkeypatch):
    videos = {}
    monkeypatch.setitem(generation.WRITERS, "mp4", lambda path, video, fps: videos.update({path.parent.name: video}))
    args = ("--num-predict", "6", "--ode-steps", "2", "--clips", "1", "--policies", "recent_fill,full_history", "--budget", "2")
    assert generate(capsys, tiny_host_folder, tmp_path, *args)[0] == 0
    equal = (videos["full_history"] == videos["recent_fill_budget2"]).reshape(6, -1).all(axis=1)
    assert equal.tolist() == [True] * 3 + [False] * 3, "the first decision is after three frames"


def test_a_gif_of_equal_frames_is_whole_and_a_shorter_one_is_not(tmp_path):
    frames = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    frames[3:] = 255
    for kind, write in (("gif", write_gif), ("mp4", write_mp4)):
        path = tmp_path / f"a.{kind}"
        write(path, frames, 8)
        assert is_whole(path, 5, 8) and not is_whole(path, 6, 8) and not is_whole(tmp_path / f"b.{kind}", 5, 8)
        path.write_bytes(b"")
        assert not is_whole(path, 5, 8)
    with pytest.raises(ValueError, match="needs even sides, got 7 × 8"):
        write_mp4(tmp_path / "odd.mp4", frames[:, :, :7], 8)
    assert not (tmp_path / "odd.mp4").exists()


def test_other_settings_in_the_same_folder_are_refused(capsys, tiny_host_folder, tmp_path):
    policy = tmp_path / "policy.py"
    code = "class Policy:\n    def build_temporal_cache_plan(self, metas, state, budget):\n        raise SystemExit\n"
    policy.write_text(code)
    out, args = tmp_path / "videos", ("--workload", "pan", "--clips", "1")
    assert generate(capsys, tiny_host_folder, out, *args, "--policies", f"full_history,{policy}")[0] == 2, "the policy fails"
    for change, name in ((("--truth",), "truth False, not True"), (("--ode-steps", "1"), "ode_steps 3, not 1")):
        status, _, error = generate(capsys, tiny_host_folder, out, *args, *change)
        assert status == 2 and f"holds videos made with {name}" in error
    policy.write_text(code.replace("SystemExit", "ValueError"))
    status, _, error = generate(capsys, tiny_host_folder, out, *args, "--policies", str(policy))
    assert status == 2 and "another content of policy" in error


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--workload", "pan", "--formats", "avi"), "unknown format 'avi'"),
        (("--workload", "pan", "--fps", "99"), "--fps takes 1 to 50"),
        (("--workload", "pan", "--policies", "recent_fill", "--budget", "9999"), "give a budget for recent_fill"),
        (("--workload", "pan", "--labels", "1"), "the clips of a workload have their own"),
        (("--workload", "pan", "--guidance", "2"), "guidance 2.0 without actions, labels or prompts"),
        (("--workload", "pan", "--clips", "99999"), "clip id 99998 is out of range"),
        (("--truth",), "--truth needs clips"),
        (("--labels", "1"), "takes no labels"),
        (("--num-predict", "0"), "num_predict must be above 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, tiny_host_folder, tmp_path, args, sentence):
    status, _, error = generate(capsys, tiny_host_folder, tmp_path / "out", *args)
    assert status == 2 and sentence in error and "Traceback" not in error and not files(tmp_path)


def test_a_host_with_labels_needs_those_that_it_has(capsys, label_host, tmp_path):
    for labels in ("", "5"):
        status, _, error = generate(capsys, label_host, tmp_path, *(("--labels", labels) if labels else ()))
        assert status == 2 and "give --labels from 0 to 4, or all" in error
    args = ("--labels", "all", "--clips", "5", "--num-predict", "1", "--ode-steps", "1")
    assert generate(capsys, label_host, tmp_path, *args)[0] == 0
    assert json.loads((tmp_path / "videos.json").read_text())["settings"]["clip_options"] == {"labels": [0, 1, 2, 3, 4]}
    assert cli.main(["generate", "--out", str(tmp_path)]) == 2 and "give a workload" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_refused(capsys, tiny_host_folder, tmp_path, monkeypatch):
    def broken(*call, **options):
        batch, decisions = play(*call, **options)
        monkeypatch.setattr(batch, "decode", lambda rows: torch.full((len(rows), 11, 3, 64, 64), torch.nan))
        return batch, decisions

    monkeypatch.setattr(generation, "play", broken)
    status, _, error = generate(capsys, tiny_host_folder, tmp_path, "--workload", "pan")
    assert status == 2 and "generated values that are not numbers" in error and not files(tmp_path)
