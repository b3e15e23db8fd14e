"""Recordings of environments that others made, Minari data sets, and recorded folders as clip sources and workloads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from far_env.cli import main
from far_env.clips.check import check_data
from far_env.clips.copying import copying_psnr
from far_env.clips.datasets import Doom, RecordedFolder
from far_env.clips.recorder.doom import DoomWalk
from far_env.clips.recorder.run import record
from far_env.clips.recorder.settings import RecordSettings
from far_env.clips.video_folder import VideoFolder
from far_env.config import config_path, load_yaml
from far_env.workloads import make_workload
from tests.clips.recorded_environments import MAPS, NUMBERS


def recorded(folder: Path, env: str, **values) -> dict:
    defaults = {"train_episodes": 2, "validation_episodes": 1, "test_episodes": 2, "frames": 12, "size": 64}
    return record(RecordSettings(**{"out": str(folder), "env": env, **defaults, **values})).facts


def episode(folder: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(folder / name))


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walks")
    recorded(folder, MAPS, behaviours="scan", excursion=6)
    return folder


def test_cartpole_ends_where_gymnasium_ends_it(tmp_path):
    pytest.importorskip("pygame", reason="pygame, which draws CartPole, is not installed")
    facts = recorded(tmp_path, "CartPole-v1", frames=40, size=32)
    for number in range(2):
        found = episode(tmp_path, f"test/{number:06}.npz")
        env = gym.make("CartPole-v1")
        env.reset(seed=facts["splits"]["test"]["seeds"][0] + number)
        steps, ended = 0, False
        while steps < 39 and not ended:
            steps += 1
            _, _, terminated, truncated, _ = env.step(int(found["actions"][steps]))
            ended = terminated or truncated
        assert found["padded"] == 39 - steps and len(np.unique(found["video"], axis=0)) > 3
    counted = sum(facts["splits"][split]["padded_episodes"] for split in ("train", "validation", "test"))
    assert counted > 0 and f"{counted} episodes ended early" in (tmp_path / "README.md").read_text()
    assert facts["source"]["package"] == "gymnasium" and facts["source"]["licence"] == "MIT License"


def test_minigrid_is_recorded_as_it_is_drawn(tmp_path):
    pytest.importorskip("minigrid", reason="minigrid (extra record) is not installed")
    facts = recorded(
        tmp_path, "minigrid:MiniGrid-Empty-8x8-v0", behaviours="scan", moves=("left=0", "right=1", "forward=2"), size=256
    )
    found = episode(tmp_path, "test/000001.npz")
    env = gym.make("MiniGrid-Empty-8x8-v0", render_mode="rgb_array")
    env.reset(seed=facts["splits"]["test"]["seeds"][1])
    assert set(found["actions"]) <= {0, 1, 2} and env.render().shape == (256, 256, 3)
    frames = [env.render()]
    for action in found["actions"][1:]:
        env.step(int(action))
        frames.append(env.render())
    assert (found["video"] == np.stack(frames)).all()


def test_doom_is_repeatable_and_leaves_no_file_behind(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="vizdoom (extra record) is not installed")
    monkeypatch.chdir(tmp_path)
    values = {"behaviours": "scan", "maps": ("test=E4M1",), "train_episodes": 0, "validation_episodes": 0, "test_episodes": 3}
    facts = recorded(tmp_path / "one", "far_env/DoomWalk-v0", **values)
    assert facts["repeatable"] and facts["source"]["package"] == "vizdoom" and facts["source"]["moves"]["backward"] == 3
    recorded(tmp_path / "two", "far_env/DoomWalk-v0", **values, processes=2)
    names = [f"test/{number:06}.npz" for number in range(3)]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    first, second = (episode(tmp_path / "one", name)["video"][0] for name in names[:2])
    assert not (first == second).all(), "episodes begin at different places"
    source = Doom(tmp_path / "one", num_frames=12)
    assert source.num_clips("test") == 3 and source.num_actions == 4
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_splits_of_doom_share_no_map():
    names = [name for names in DoomWalk.map_splits.values() for name in names]
    assert len(names) == len(set(names)) == 36 + 32 and set(DoomWalk.map_splits["test"]) == {f"E4M{n}" for n in range(1, 10)}
    with pytest.raises(ValueError, match="unknown map 'E5M1'; Freedoom has E1M1 to E4M9 and MAP01 to MAP32"):
        DoomWalk(map="E5M1")


def test_doom_returns_to_views_that_it_left():
    pytest.importorskip("vizdoom", reason="vizdoom (extra record) is not installed")
    env = gym.make("far_env/DoomWalk-v0", map="E1M1", render_mode="rgb_array")
    env.reset(seed=1)
    first = env.render()
    turned = [env.step(0)[0] for _ in range(12)]
    far, back = (np.abs(turned[number].astype(int) - first).mean() for number in (5, 11))
    assert back < 3 and far > 12, "twelve turns of 30° are a full one"
    env.close()


def test_vizdooms_own_environments_are_recorded(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="vizdoom (extra record) is not installed")
    monkeypatch.chdir(tmp_path)  # where the engine writes its settings
    env = "vizdoom.gymnasium_wrapper:VizdoomMyWayHome-v1"
    facts = recorded(tmp_path / "out", env, train_episodes=1, validation_episodes=0, test_episodes=0, frame_skip=4)
    assert len(np.unique(episode(tmp_path / "out", "train/000000.npz")["video"], axis=0)) > 2
    assert facts["source"]["package"] == "vizdoom" and facts["drawn"] == "uint8 (240, 320, 3)"


def minari_data(monkeypatch, root: Path, lengths: list[int], observation_space: gym.Space, observe, actions) -> str:
    """A data set of Minari's own making; ``observe(episode, step)`` gives its observations."""
    minari = pytest.importorskip("minari", reason="minari (extra record) is not installed")
    pytest.importorskip("h5py", reason="h5py (extra record) is not installed")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    buffers = []
    for number, length in enumerate(lengths):
        seen = [observe(number, step) for step in range(length)]
        if isinstance(observation_space, gym.spaces.Dict):
            seen = {key: [entry[key] for entry in seen] for key in observation_space.spaces}
        ends = [False] * (length - 2) + [True]
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=seen,
                actions=[actions(number, step) for step in range(length - 1)],
                rewards=[0.0] * (length - 1),
                terminations=ends,
                truncations=[False] * (length - 1),
            )
        )
    minari.create_dataset_from_buffers(
        "tests/pixels-v0",
        buffers,
        action_space=gym.spaces.Discrete(200),
        observation_space=observation_space,
        author="the tests",
        data_format="hdf5",
        jpeg_encoding=False,
    )
    return "tests/pixels-v0"


def solid(episode: int, step: int) -> np.ndarray:
    return np.full((30, 40, 3), (episode, step, 7), dtype=np.uint8)


PIXELS = gym.spaces.Box(0, 255, (30, 40, 3), np.uint8)


def convert(name: str, folder: Path, **values) -> int:
    extra = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return main(["record", "--minari", name, "--out", str(folder), "--frames", "5", "--size", "16", *extra])


def test_a_minari_data_set_is_cut_into_pieces(tmp_path, monkeypatch, capsys):
    lengths = [12, 5, 4, 11, 5, 5, 5, 5, 5, 5, 6]
    name = minari_data(monkeypatch, tmp_path / "data", lengths, PIXELS, solid, lambda episode, step: 10 * episode + step)
    out = tmp_path / "out"
    assert convert(name, out) == 0
    card = capsys.readouterr().out
    assert "`tests/pixels-v0`, read with minari" in card and "Authors: the tests." in card
    assert "8 frames at their ends" in card  # 12 − 10, 4, 11 − 10 and 6 − 5
    pieces = {(path.parent.name, int(path.stem)): dict(np.load(path)) for path in out.rglob("*.npz")}
    places = {"test": [(0, 0), (0, 5), (10, 0)], "validation": [(1, 0)]}
    places["train"] = [(3, 0), (3, 5), *((number, 0) for number in range(4, 10))]
    assert set(pieces) == {(split, n) for split, starts in places.items() for n in range(len(starts))}
    for split, starts in places.items():
        for n, (number, start) in enumerate(starts):
            arrays = pieces[split, n]
            assert (arrays["video"] == [[[(number, start + step, 7)]] for step in range(5)]).all()
            assert list(arrays["actions"]) == [0, *(10 * number + start + step for step in range(4))]
    (out / "train/000001.npz").unlink()
    assert convert(name, out) == 0
    assert (np.load(out / "train/000001.npz")["video"] == pieces["train", 1]["video"]).all()
    source = RecordedFolder(out, num_frames=5)
    assert source.size == 16 and source.clip("train", 7).frames.shape == (5, 3, 16, 16)
    assert [source.num_clips(split) for split in ("train", "validation", "test")] == [8, 1, 3] and source.num_actions == 200


def test_minari_observations_with_several_entries_need_a_choice(tmp_path, monkeypatch, capsys):
    space = gym.spaces.Dict({"near": PIXELS, "far": PIXELS, "pose": gym.spaces.Box(-1, 1, (3,), np.float64)})

    def observe(number, step):
        return {"near": solid(number, step), "far": solid(number, step + 100), "pose": np.zeros(3)}

    name = minari_data(monkeypatch, tmp_path / "data", [5, 5], space, observe, lambda episode, step: 1)
    assert convert(name, tmp_path / "out") == 2
    assert "hold several images (near, far); choose one with pixels" in capsys.readouterr().err.replace(
        "far, near", "near, far"
    )
    assert convert(name, tmp_path / "out", pixels="pose") == 2
    assert "unknown entry with pixels 'pose'" in capsys.readouterr().err
    assert convert(name, tmp_path / "out", pixels="far") == 0
    assert (np.load(tmp_path / "out/test/000000.npz")["video"][:, 0, 0, 1] == range(100, 105)).all()


def test_minari_data_sets_that_cannot_be_read_are_one_sentence(tmp_path, monkeypatch, capsys):
    space = gym.spaces.Box(-1, 1, (3,), np.float64)
    name = minari_data(monkeypatch, tmp_path / "data", [5, 5], space, lambda number, step: np.zeros(3), lambda number, step: 1)
    assert convert(name, tmp_path / "out") == 2
    assert "the observations of tests/pixels-v0 hold no pixels: they are Box" in capsys.readouterr().err
    assert convert("tests/pixel-v0", tmp_path / "out") == 2
    assert "unknown local Minari data set 'tests/pixel-v0'; did you mean 'tests/pixels-v0'?" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    name = minari_data(monkeypatch, tmp_path / "data", [4], PIXELS, solid, lambda number, step: 1)
    assert convert(name, tmp_path / "out") == 2
    assert "no episode of tests/pixels-v0 has 5 frames; the longest has 4" in capsys.readouterr().err


def test_the_splits_of_a_recording_are_those_of_its_clips(walks):
    source = RecordedFolder(walks, num_frames=10)
    assert {split: source.num_clips(split) for split in ("train", "validation", "test")} == {
        "train": 2,
        "validation": 1,
        "test": 2,
    }
    assert source.num_actions == 4
    for split, numbers in {"train": (11, 12), "validation": (21,), "test": (31, 32)}.items():
        for clip_id, number in enumerate(numbers):
            clip, stored = source.clip(split, clip_id), episode(walks, f"{split}/{clip_id:06}.npz")
            assert (clip.frames == stored["video"][:10].transpose(0, 3, 1, 2).astype(np.float32) / 255).all()
            assert (clip.actions == stored["actions"][:10]).all()
            assert (stored["video"][..., 2] == number).all()


def test_any_videos_in_folders_of_splits_are_read(walks, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(walks / split, tmp_path / split)
    source = RecordedFolder(tmp_path, num_frames=12)
    assert source.num_clips("validation") == 0 and source.num_clips("test") == 2 and source.num_actions is None
    assert (source.clip("test", 1).actions == episode(walks, "test/000001.npz")["actions"]).all()


def test_recordings_that_cannot_be_used_are_one_sentence(walks, tmp_path):
    with pytest.raises(
        ValueError, match=r"recorded needs a folder of videos: give data_dir.*far-env record makes such folders"
    ):
        RecordedFolder(num_frames=4)
    with pytest.raises(ValueError, match=r"gone does not exist; far-env record makes"):
        RecordedFolder(tmp_path / "gone", num_frames=4)
    with pytest.raises(ValueError, match="has none of the subfolders train, validation and test"):
        RecordedFolder(tmp_path, num_frames=4)
    with pytest.raises(ValueError, match=r"the episodes in .* have 12 frames, clips of 13 were asked for"):
        RecordedFolder(walks, num_frames=13)
    with pytest.raises(
        ValueError, match=r"holds clips of .*Maps-v0, not of far_env/DoomWalk-v0; make the clips with far-env record"
    ):
        Doom(walks, num_frames=4)
    shutil.copytree(walks, tmp_path / "half")
    (tmp_path / "half" / "recording.json").write_text('{"settings": {"frames": 12, "size": "64"}, "source": {}}')
    with pytest.raises(ValueError, match=r"recording.json is damaged \(size is '64'\)"):
        RecordedFolder(tmp_path / "half", num_frames=4)
    facts = json.loads((walks / "recording.json").read_text()) | {"complete": False}
    (tmp_path / "half" / "recording.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is not finished"):
        RecordedFolder(tmp_path / "half", num_frames=4)


def test_data_check_knows_a_recording(walks):
    report = check_data(walks, num_frames=12)
    assert report.dataset == "recorded" and report.clips["far"] == {"train": 2, "validation": 1, "test": 2}
    assert report.problem is None and "actions: with 5 files" in report.text()


def test_a_recording_is_a_workload_of_the_lengths_that_are_asked_for(walks, tiny_host_folder, tmp_path, capsys):
    args = ["evaluate", "--workload", "recorded", "--data-dir", str(walks), "--num-context", "5", "--num-predict", "4"]
    args += [
        "--host",
        str(tiny_host_folder),
        "--policies",
        "recent_fill",
        "--clips",
        "2",
        "--metrics",
        "psnr",
        "--device",
        "cpu",
    ]
    assert main([*args, "--out", str(tmp_path / "results")]) == 0
    assert "recorded, budget 4, 2 test clips" in capsys.readouterr().out
    assert main(["validate", str(tmp_path / "results"), "--device", "cpu"]) == 0
    workload = make_workload("recorded", host=tiny_host_folder, data_dir=walks, num_context=3, num_predict=2, device="cpu")
    assert (workload.num_context, workload.num_predict, workload.actions) == (3, 2, False)


def test_workloads_of_recordings_name_what_is_missing(walks, tiny_host_folder, capsys):
    for name in ("recorded", "doom"):
        assert main(["evaluate", "--workload", name, "--policies", "recent_fill", "--data-dir", str(walks)]) == 2
        assert f"the workload {name} has no host: give one (--host), such as a folder" in capsys.readouterr().err
    args = ["evaluate", "--policies", "recent_fill", "--host", str(tiny_host_folder), "--device", "cpu"]
    assert main([*args, "--workload", "doom"]) == 2
    assert "make the clips with far-env record --config record_doom" in capsys.readouterr().err
    assert main([*args, "--workload", "pan", "--num-context", "3"]) == 2
    assert "the workload pan always has 5 + 11 frames" in capsys.readouterr().err
    assert main([*args, "--workload", "recorded", "--data-dir", str(walks), "--num-context", "0"]) == 2
    assert "num_context and num_predict must be at least 1, got 0 and 16" in capsys.readouterr().err


def test_the_host_decides_whether_a_recording_s_actions_are_used(walks, tiny_host, tiny_long_host, tmp_path, monkeypatch):
    hosts = {"plain": tiny_host, "acting": tiny_long_host}
    monkeypatch.setattr("far_env.workloads.load_host", lambda name, device, dtype: hosts[name])
    lengths = {"num_context": 5, "num_predict": 3}
    for name, used in (("plain", False), ("acting", True)):
        assert make_workload("recorded", host=name, data_dir=walks, device="cpu", **lengths).actions is used
    workload = make_workload("recorded", host="acting", data_dir=walks, device="cpu", **lengths)
    clips = [workload.clips.clip("train", clip_id) for clip_id in range(2)]
    beyond = next(clip for clip in clips if clip.actions[:8].max() == 3)  # the host knows 0 to 2
    with pytest.raises(ValueError, match=r"has int64 actions from 0 to 3; the host accepts the whole numbers 0 to 2"):
        workload.actions_of(beyond, 8)
    recorded(tmp_path, NUMBERS)
    without = make_workload("recorded", host="acting", data_dir=tmp_path, device="cpu", **lengths)
    with pytest.raises(ValueError, match="has none; use data that comes with actions"):
        without.actions_of(without.clips.clip("test", 0), 8)


def test_the_shipped_configuration_records_what_the_workload_reads():
    settings = load_yaml(RecordSettings, config_path("record_doom"))
    assert settings.env == Doom.environment and settings.frames == 20 + 20


def test_other_folders_of_videos_are_split_as_before(walks):
    assert [VideoFolder(walks, num_frames=12).num_clips(split) for split in ("train", "validation", "test")] == [3, 1, 1]


def test_copying_is_the_best_of_the_frames_that_may_be_copied(walks):
    video = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    video[6] = video[1]
    for newest in (1, 3, None):
        errors = []
        for frame in range(4, 9):
            first = 0 if newest is None else frame - newest
            errors.append(min(((video[frame] / 255 - video[old] / 255) ** 2).mean() for old in range(first, frame)))
        assert copying_psnr(video, 4, [newest])[0] == pytest.approx(-10 * np.log10(np.mean(errors)), abs=1e-4)
    still = np.zeros((5, 2, 2, 3), np.uint8)
    assert copying_psnr(still, 2, (2, None)) == [100.0, 100.0]
    facts = json.loads((walks / "recording.json").read_text())["copying"]
    videos = [episode(walks, f"test/{number:06}.npz")["video"] for number in range(2)]
    assert facts["psnr"]["8"] == pytest.approx(np.mean([copying_psnr(one, 6, (8,)) for one in videos]))
    with pytest.raises(ValueError, match="num_context must be in 1 to 4, got 5"):
        copying_psnr(still, 5, (1,))
