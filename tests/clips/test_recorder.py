"""Recordings of environments: what they hold, how they are resumed, and what cannot be recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from far_env.cli import main
from far_env.clips.recorder.behaviours import Scan
from far_env.clips.recorder.player import as_rgb, resize
from far_env.clips.recorder.run import record
from far_env.clips.recorder.settings import RecordSettings
from tests.clips.recorded_environments import DARK, MAPS, NUMBERS, WALK, colour

FEW = {"train_episodes": 3, "validation_episodes": 1, "test_episodes": 2, "frames": 12, "size": 16}
SPLITS = {"train": 3, "validation": 1, "test": 2}


def settings(folder: Path, env: str = WALK, **values) -> RecordSettings:
    return RecordSettings(**{"out": str(folder), "env": env, **FEW, **values})


def episodes(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {
        path.relative_to(folder).as_posix(): dict(np.load(path, allow_pickle=False)) for path in sorted(folder.rglob("*.npz"))
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


def walked(actions: np.ndarray, start: int, times: int = 1) -> np.ndarray:
    """The colours (T, 3) that an episode with these actions shows."""
    headings = np.cumsum(times * np.select([actions == 0, actions == 1], [-1, 1]) * (np.arange(len(actions)) > 0))
    places = np.cumsum(times * np.select([actions == 2, actions == 3], [1, -1]) * (np.arange(len(actions)) > 0))
    return np.array([colour(heading, place, start) for heading, place in zip(headings, places, strict=True)])


@pytest.mark.parametrize("behaviours", ["random", "sticky", "scan", "scan,random"])
def test_every_action_leads_to_the_frame_with_its_number(tmp_path, behaviours):
    record(settings(tmp_path, behaviours=behaviours))
    found = episodes(tmp_path)
    assert list(found) == [f"{split}/{n:06}.npz" for split in sorted(SPLITS) for n in range(SPLITS[split])]
    for arrays in found.values():
        assert arrays["video"].dtype == np.uint8 and arrays["video"].shape == (12, 16, 16, 3)
        assert arrays["actions"].dtype == np.int64 and arrays["actions"][0] == 0 and arrays["padded"] == 0
        expected = walked(arrays["actions"], start=int(arrays["video"][0, 0, 0, 2]))
        assert (arrays["video"] == expected[:, None, None]).all()
    assert len({arrays["video"].tobytes() for arrays in found.values()}) == len(found), "episodes differ"


def test_a_frame_comes_after_all_steps_that_are_skipped(tmp_path):
    record(settings(tmp_path, frame_skip=3))
    for arrays in episodes(tmp_path).values():
        expected = walked(arrays["actions"], int(arrays["video"][0, 0, 0, 2]), times=3)
        assert (arrays["video"] == expected[:, None, None]).all()


def test_the_number_of_processes_changes_nothing(tmp_path):
    for count in (1, 2):
        record(settings(tmp_path / str(count), MAPS, behaviours="scan,sticky", processes=count))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    one, two = (json.loads((tmp_path / count / "recording.json").read_text()) for count in "12")
    assert one == two and one["repeatable"] and one["complete"]


def test_seeds_of_splits_and_of_recordings_never_meet(tmp_path):
    starts = {}
    for seed in (0, 1):
        facts = record(settings(tmp_path / str(seed), seed=seed)).facts
        for split, counts in facts["splits"].items():
            first, last = counts["seeds"]
            assert last - first + 1 == SPLITS[split]
            starts |= {number: (seed, split) for number in range(first, last + 1)}
    assert len(starts) == 2 * sum(SPLITS.values())
    for number, (seed, split) in starts.items():  # the seed is the one that the environment was reset with
        env = gym.make(WALK)
        env.reset(seed=number)
        first = min(other for other, place in starts.items() if place == (seed, split))
        video = episodes(tmp_path / str(seed))[f"{split}/{number - first:06}.npz"]["video"]
        assert video[0, 0, 0, 2] == env.unwrapped.start


def test_what_is_missing_or_damaged_is_played_again_and_the_rest_is_kept(tmp_path):
    record(settings(tmp_path))
    before = contents(tmp_path)
    (tmp_path / "test/000001.npz").unlink()
    (tmp_path / "train/000002.npz").write_bytes(before["train/000002.npz"][:200])
    np.savez(tmp_path / "train/000001.npz", video=np.zeros((11, 16, 16, 3), np.uint8), actions=np.zeros(11, np.int64))
    kept = (tmp_path / "train/000000.npz").stat().st_mtime_ns
    again = record(settings(tmp_path))
    assert contents(tmp_path) == before and (again.new, again.replaced) == (3, 2)
    assert (tmp_path / "train/000000.npz").stat().st_mtime_ns == kept
    card = (tmp_path / "README.md").stat().st_mtime_ns
    assert record(settings(tmp_path)).new == 0 and (tmp_path / "README.md").stat().st_mtime_ns == card


def test_a_recording_can_grow_and_is_then_that_of_a_longer_one(tmp_path):
    record(settings(tmp_path / "grown"))
    assert record(settings(tmp_path / "grown", train_episodes=5)).new == 2
    record(settings(tmp_path / "whole", train_episodes=5))
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds a recording of 5 train episodes, 3 are asked for; it can only grow"):
        record(settings(tmp_path / "grown"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"frames": 13}, "another frames: 12 there, 13 now"),
        ({"seed": 1}, "another seed: 0 there, 1 now"),
        ({"behaviours": "sticky"}, "another behaviours: 'random' there, 'sticky' now"),
        ({"env": NUMBERS}, "another env"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, named):
    record(settings(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=named):
        record(settings(tmp_path, **change))
    assert contents(tmp_path) == before


def test_a_behaviour_file_that_was_changed_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def act(self, observation):\n        return 1\n")
    record(settings(tmp_path / "out", behaviours=str(file)))
    assert all((arrays["actions"][1:] == 1).all() for arrays in episodes(tmp_path / "out").values())
    file.write_text("class Mine:\n    def act(self, observation):\n        return 2\n")
    with pytest.raises(ValueError, match="another behaviour_files"):
        record(settings(tmp_path / "out", behaviours=str(file)))


def test_an_object_of_a_file_is_copied_for_every_episode_and_seeded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "class Mine:\n"
        "    calls = 0\n"
        "    def begin_episode(self, seed):\n        self.rng = np.random.default_rng(seed)\n"
        "    def act(self, observation):\n"
        "        assert observation.shape == (2,)\n"
        "        self.calls += 1\n"
        "        return 3 if self.calls == 1 else self.rng.integers(2)\n"
    )
    record(settings(tmp_path / "out", behaviours=str(file)))
    actions = [arrays["actions"] for arrays in episodes(tmp_path / "out").values()]
    assert all(numbers[1] == 3 and set(numbers[2:]) <= {0, 1} for numbers in actions)
    assert len({numbers.tobytes() for numbers in actions}) == len(actions)


def test_episodes_that_end_early_are_padded_and_counted(tmp_path):
    facts = record(settings(tmp_path, env_options=("length=7",))).facts
    for arrays in episodes(tmp_path).values():
        assert arrays["padded"] == 4 and (arrays["video"][8:] == arrays["video"][7]).all()
        assert (arrays["actions"][8:] == arrays["actions"][7]).all()
        assert (arrays["video"][:8] == walked(arrays["actions"], arrays["video"][0, 0, 0, 2])[:8, None, None]).all()
    assert facts["splits"]["train"]["padded_episodes"] == 3 and facts["splits"]["train"]["padded_frames"] == 12
    card = (tmp_path / "README.md").read_text()
    assert "6 episodes ended early" in card and "| train | 3 | 36 | 3 | 12 | 0 to 2 |" in card


def test_continuous_actions_are_played_but_not_stored(tmp_path):
    facts = record(settings(tmp_path, NUMBERS)).facts
    found = episodes(tmp_path)
    assert all(set(arrays) == {"video", "padded"} for arrays in found.values()) and facts["source"]["num_actions"] is None
    assert len({tuple(arrays["video"][1:, 0, 0, 0]) for arrays in found.values()}) > 1
    assert "Actions: none are stored, because the action space Box" in (tmp_path / "README.md").read_text()


def test_whole_maps_belong_to_a_split(tmp_path):
    facts = record(settings(tmp_path, MAPS, train_episodes=4, test_episodes=3)).facts
    starts = {name: int(arrays["video"][0, 0, 0, 2]) for name, arrays in episodes(tmp_path).items()}
    assert [starts[f"train/{n:06}.npz"] for n in range(4)] == [11, 12, 13, 11]
    assert [starts[f"test/{n:06}.npz"] for n in range(3)] == [31, 32, 31] and starts["validation/000000.npz"] == 21
    assert facts["source"]["maps"] == {"train": ["11", "12", "13"], "validation": ["21"], "test": ["31", "32"]}
    assert "  - test: 31, 32" in (tmp_path / "README.md").read_text()


def test_maps_can_be_given(tmp_path):
    record(settings(tmp_path, MAPS, maps=("train=1,2", "validation=3", "test=4")))
    assert {int(arrays["video"][0, 0, 0, 2]) for arrays in episodes(tmp_path).values()} == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="maps: 2 appears twice; every map belongs to one split"):
        settings(tmp_path, MAPS, maps=("train=1,2", "validation=3", "test=2"))
    with pytest.raises(ValueError, match="maps: the split test has none"):
        settings(tmp_path, MAPS, maps=("train=1", "validation=3"))


@pytest.mark.parametrize("draws", ["grey", "rgba", "float", "int64", "growing"])
def test_other_pictures_are_converted(tmp_path, draws):
    record(settings(tmp_path / "plain"))
    record(settings(tmp_path / draws, env_options=(f"draws={draws}",)))
    for plain, other in zip(episodes(tmp_path / "plain").values(), episodes(tmp_path / draws).values(), strict=True):
        channels = [0, 0, 0] if draws == "grey" else [0, 1, 2]
        assert (other["video"] == plain["video"][..., channels]).all()


@pytest.mark.parametrize(
    ("draws", "sentence"),
    [
        ("nothing", r"render\(\) returned nothing; the environment does not draw rgb_array"),
        ("bright", r"render\(\) returned float32 values from 0 to \d+; frames of this type must be in 0 to 1"),
        ("bool", r"render\(\) returned bool \(40, 60, 3\); frames must be"),
        ("list", r"render\(\) returned uint8 \(2, 40, 60, 3\); frames must be"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, draws, sentence):
    with pytest.raises(ValueError, match=f"far_env_tests/Walk-v0, episode 0 of train: {sentence}"):
        record(settings(tmp_path, env_options=(f"draws={draws}",)))


def test_frames_are_resized_with_antialiasing():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    by_torch = F.interpolate(batch, (64, 64), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(resize(pixels, 64) - by_torch).max() <= 1.0
    assert resize(pixels, 64).std() < 0.6 * pixels.std(), "neighbours are averaged"
    assert (as_rgb(pixels[..., 0]) == pixels[..., :1]).all()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"env": "CartPol-v1"}, "unknown environment 'CartPol-v1'; did you mean 'CartPole-v"),
        ({"env": "no_such_module:X-v0"}, "no_such_module:X-v0 cannot be made: No module named 'no_such_module'"),
        ({"env": DARK}, r"far_env_tests/Dark-v0 cannot be recorded, because it does not render rgb_array; it offers human"),
        ({"env_options": ("depth=3",)}, "far_env_tests/Walk-v0 cannot be made: TypeError: .*depth"),
        ({"behaviours": "stiky"}, "unknown behaviour 'stiky'; did you mean 'sticky'"),
        ({"behaviours": "gone.py"}, "the behaviour file gone.py does not exist"),
        ({"env": NUMBERS, "behaviours": "scan"}, "the behaviour scan needs to know the actions that turn or walk"),
        ({"env": NUMBERS, "moves": ("left=0",)}, "moves need a Discrete action space"),
        ({"moves": ("left=0", "right=9")}, r"has the actions 0 to 3, got right=9"),
    ],
)
def test_what_cannot_be_recorded_is_one_sentence(tmp_path, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        record(settings(tmp_path / "out", **values))
    assert not (tmp_path / "out/recording.json").exists() and not list(tmp_path.rglob("*.npz"))
    assert record(settings(tmp_path / "out")).new == 6, "another try is not refused"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"env": None}, "give --env with the id of an environment, or --minari"),
        ({"minari": "a/b-v0"}, "give --env with the id of an environment, or --minari"),
        ({"env": None, "minari": "a/b-v0", "frame_skip": 2}, "frame_skip is for playing an environment"),
        ({"pixels": "rgb"}, "pixels is for Minari data sets"),
        ({"frames": 0}, "frames must be above 0"),
        ({"seed": 1000}, "seed must be in 0 to 999"),
        ({"repeat": 1.0}, "repeat must be a probability below 1"),
        ({"moves": ("up=1",)}, "unknown move 'up'"),
        ({"moves": ("left",)}, "moves takes pairs such as left=0, got 'left'"),
        ({"env_options": ("a=1", "a=2")}, "env_options: a appears twice"),
        ({"train_episodes": 0, "validation_episodes": 0, "test_episodes": 0}, "no episode is asked for"),
        ({"train_episodes": -1}, "train_episodes must be in 0 to 1,000,000"),
    ],
)
def test_settings_are_checked(tmp_path, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(tmp_path, **values)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("class Mine:\n    pass\n", "must define exactly one class with act"),
        ("class A:\n    def act(self, o): ...\nclass B(A): ...\n", "must define exactly one class with act.*it has 2"),
        ("import nothing_of_this_name\n", "cannot be loaded: ModuleNotFoundError"),
        ("class Mine:\n    def act(self, o):\n        return 4\n", "the behaviour chose 4, which is not in the action space"),
        ("class Mine:\n    def act(self, o):\n        return 1 / 0\n", "episode 0 of train failed: ZeroDivisionError"),
    ],
)
def test_behaviour_files_that_cannot_be_used_are_one_sentence(tmp_path, source, sentence):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=sentence):
        record(settings(tmp_path / "out", behaviours=str(tmp_path / "mine.py")))


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"holds files, but no recording.json: it is not a recording"):
        record(settings(tmp_path))
    (tmp_path / "recording.json").write_text("{")
    with pytest.raises(ValueError, match=r"recording.json is damaged"):
        record(settings(tmp_path))
    (tmp_path / "recording.json").write_text("[]")
    with pytest.raises(ValueError, match=r"recording.json is damaged \(it lacks settings or source\)"):
        record(settings(tmp_path))


def test_a_scan_returns_on_its_way():
    moves = {"left": 0, "right": 1, "forward": 2, "backward": 3}
    scan = Scan(moves, np.random.default_rng(0), 20)
    state, seen, again = (0, 0, 0), {(0, 0, 0)}, 0
    step = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # turns of 90°, on a grid
    for _ in range(2000):
        action = scan.act(None)
        x, y, heading = state
        along = {2: 1, 3: -1}.get(action, 0)
        heading = (heading + {0: -1, 1: 1}.get(action, 0)) % 4
        state = (x + along * step[heading][0], y + along * step[heading][1], heading)
        again += state in seen
        seen.add(state)
    assert again > 1000, "more than half of the views were seen before"
    assert len(seen) > 100, "and it gets about"


def test_a_scan_uses_only_the_moves_that_exist():
    for moves in ({"left": 4, "right": 5}, {"left": 4, "right": 5, "forward": 6}, {"forward": 1, "backward": 0}):
        scan = Scan(moves, np.random.default_rng(1), 12)
        assert {scan.act(None) for _ in range(300)} == set(moves.values())


def test_sticky_repeats_with_its_probability(tmp_path):
    record(settings(tmp_path, behaviours="sticky", repeat=0.8, frames=400, size=4))
    actions = np.stack([arrays["actions"][1:] for arrays in episodes(tmp_path).values()])
    same = (actions[:, 1:] == actions[:, :-1]).mean()
    assert abs(same - (0.8 + 0.2 / 4)) < 0.03  # a new draw may be the same action


def test_random_draws_from_the_moves_alone_where_they_are_given(tmp_path):
    record(settings(tmp_path, moves=("left=0", "right=1"), frames=60, size=4))
    assert {int(action) for arrays in episodes(tmp_path).values() for action in arrays["actions"][1:]} == {0, 1}


def test_an_environment_that_ends_its_process_is_one_sentence(tmp_path):
    # -P leaves out the working directory, as an installed script does.
    command = [sys.executable, "-P", "-m", "far_env.cli", "record", "--out", str(tmp_path / "out"), "--env", WALK]
    file = tmp_path / "mine.py"
    # The process of the command plays the first episode twice, and survives; those that it starts do not.
    file.write_text(
        "import multiprocessing, os\n"
        "class Mine:\n    def act(self, observation):\n"
        "        if multiprocessing.parent_process() is not None:\n            os._exit(9)\n"
        "        return 0\n"
    )
    command += ["--behaviours", str(file), "--processes", "2", "--frames", "5", "--size", "8"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "far-env: error: a process that records ended without a word" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="this system has no POSIX signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_what_is_stopped_keeps_what_is_finished_and_is_continued(tmp_path, stop):
    command = [sys.executable, "-m", "far_env.cli", "record", "--out", str(tmp_path), "--env", WALK, "--size", "8"]
    command += ["--frames", "12", "--env-options", "seconds=0.05", "--processes", "2", "--test-episodes", "8"]
    command += ["--train-episodes", "8", "--validation-episodes", "0"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8", cwd=root)
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=300)  # until every process has closed the stream
    finished = contents(tmp_path)
    assert process.returncode == (130 if stop == signal.SIGINT else -9) and 1 <= len(finished) < 16, errors
    assert "Traceback" not in errors and ("the same command resumes from there" in errors) == (stop == signal.SIGINT)
    time.sleep(0.5)
    assert contents(tmp_path) == finished, "no process goes on"
    subprocess.run(command, check=True, capture_output=True, cwd=root, timeout=300)
    assert len(contents(tmp_path)) == 16 and finished.items() <= contents(tmp_path).items()
    assert not list(tmp_path.rglob("*.part"))


def test_the_command_prints_the_card(tmp_path, capsys):
    args = ["record", "--env", WALK, "--out", str(tmp_path), "--frames", "5", "--size", "8", "--moves", "left=0", "right=1"]
    args += ["--train-episodes", "2", "--validation-episodes", "1", "--test-episodes", "1"]
    assert main(args) == 0
    card = capsys.readouterr().out
    assert card.startswith(f"# Clips recorded from {WALK}") and "Actions: 0 to 3 (0 left, 1 right)" in card
    assert main([*args, "--frame-skip", "2"]) == 2
    assert "holds a recording with another frame_skip: 1 there, 2 now" in capsys.readouterr().err
    assert main(["record", "--config", "record_doom", "--env", "MiniGrit-v0", "--out", str(tmp_path / "x")]) == 2
    assert "far-env: error: unknown environment 'MiniGrit-v0'" in capsys.readouterr().err
