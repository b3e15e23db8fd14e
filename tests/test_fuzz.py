"""Random input for the readers of plans, records, configurations, lists, arrays and videos: valid, or one sentence.

The examples are the same in every run. ``FAR_ENV_FUZZ=N`` draws N other ones for each reader.
"""

from __future__ import annotations

import io
import json
import os
import string

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from far_env.agents.config import AgentTraining
from far_env.cli.options import split_list, whole_number
from far_env.clips.arrays import read_actions
from far_env.clips.recordings import read_list
from far_env.clips.video import count_frames, read_frames
from far_env.config import load_yaml
from far_env.contract import ACTIONS, ChunkDecision, RolloutState, TemporalCachePlan, ask_policy
from far_env.errors import PolicyError
from far_env.evaluation.results_folder import load
from tests.clips.test_video import write_video
from tests.damage import assert_sentence
from tests.results_folders import MadeUp, make_results

EXAMPLES = int(os.environ.get("FAR_ENV_FUZZ", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NUM_FRAMES, BUDGET = 9, 4
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 12), st.floats(), st.text(), st.sampled_from([10**400, -(10**30)])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def refused(path, function, *args):
    """The result of ``function(*args)``, or None if it refuses the file in one sentence."""
    try:
        return function(*args)
    except ValueError as error:
        assert_sentence(error, path)
        return None


@FUZZ
@given(
    st.lists(
        st.builds(
            ChunkDecision,
            st.integers(-1, NUM_FRAMES) | VALUES,
            st.sampled_from(ACTIONS) | VALUES,
            st.floats() | VALUES,
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_plans(decisions, strict):
    class Policy:
        def build_temporal_cache_plan(self, *arguments):
            return TemporalCachePlan(decisions)

    try:
        answer = ask_policy(
            Policy(), [None] * NUM_FRAMES, RolloutState(6, 0.1, 11), {"max_frames": BUDGET}, clip=17, strict=strict
        )
    except PolicyError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
    else:
        kept = sorted(answer.kept)
        assert set(kept) <= set(range(NUM_FRAMES)) and len(kept) <= BUDGET and NUM_FRAMES - 1 in kept


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    make_results(folder, MadeUp(workloads={"pan": (3, 6)}, policies={"random": 0.0}, clips=1, show_clips=0, seeds=(42,)))
    return folder, (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()


@FUZZ
@given(st.data())
def test_records(results, data):
    folder, lines = results
    path, record = folder / "records.jsonl", json.loads(lines[0])
    key = data.draw(st.sampled_from([*record, "extra"]))
    entry = st.fixed_dictionaries({"step": SCALARS, "kept": st.lists(SCALARS), "demoted": st.lists(SCALARS)})
    changed = record | {key: data.draw(st.lists(entry, max_size=3) if key == "plan" and data.draw(st.booleans()) else VALUES)}
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n", encoding="utf-8")
    found = refused(path, load, folder)
    if found is not None:
        first = found.records[0]
        assert len(found.records) == len(lines) and first.workload == "pan" and len(first.psnr_per_frame) == 6
        assert all(type(frame) is int and 0 <= frame < 9 for entry in first.plan for frame in entry["kept"])


@FUZZ
@given(st.data())
def test_configurations(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    names = st.sampled_from(["seed", "budget", "table", "ppo", "network", "imitation", "host", "resume", "rounds", "stand_in"])
    inner = st.dictionaries(st.sampled_from(["rounds", "learning_rate", "width", "signals", "num_envs"]) | st.text(), VALUES)
    text = data.draw(
        st.dictionaries(names | st.text(max_size=3), VALUES | inner, max_size=4).map(yaml.safe_dump)
        | st.text(alphabet=string.printable + "é\ufeff\0")
    )
    path.write_bytes(text.encode() + data.draw(st.binary(max_size=2)))
    config = refused(path, load_yaml, AgentTraining, path)
    if config is not None:
        assert type(config.seed) is int and all(type(name) is str for name in config.table) and config.ppo.num_envs > 0


@FUZZ
@given(st.text(alphabet="ab,\"' \n\r\0é", max_size=20) | st.text() | st.integers(0, 4).map(lambda n: "a," * 10**n))
def test_lists_of_options(text):
    try:
        parts = split_list(text, "policies", "policy")
    except ValueError as error:
        assert str(error).startswith("--policies ") and "\n" not in str(error)
    else:
        assert parts and len(set(parts)) == len(parts) and all(part.strip() == part != "" for part in parts)


@FUZZ
@given(st.text() | st.text(alphabet=string.digits) | st.just("9" * 5000))
def test_whole_numbers(text):
    try:
        assert whole_number(text, "seeds") == int(text)
    except ValueError as error:
        assert str(error).startswith("--seeds takes whole numbers from 0 on") and len(str(error)) < 400


@FUZZ
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["video_path", "latent_path", "action_path", "label"]), VALUES | st.text()), max_size=3
    )
    | VALUES
)
def test_lists_of_clips(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "train.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    found = refused(path, read_list, path)
    assert found is None or len(found) <= len(entries)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Content of a sound file by its suffix."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "a.mp4", 16)
    arrays = io.BytesIO()
    np.savez(arrays, video=np.zeros((16, 8, 8, 3), dtype=np.uint8), actions=np.arange(16) % 4)
    return folder, {".mp4": (folder / "a.mp4").read_bytes(), ".npz": arrays.getvalue()}


@pytest.mark.parametrize("suffix", [".mp4", ".npz"])
@FUZZ
@given(data=st.data())
def test_videos_and_arrays(files, suffix, data):
    folder, contents = files
    content, path = bytearray(contents[suffix]), folder / f"fuzz{suffix}"
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)):
        content[at] = value
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))] + data.draw(st.binary(max_size=8))
    )
    count = refused(path, count_frames, path)
    frames = refused(path, read_frames, path, 2, 10)
    assert count is None or count >= 0
    assert frames is None or (len(frames) == 10 and all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames))
    if suffix == ".npz":
        actions = refused(path, read_actions, path, 4)
        assert actions is None or (actions.min() >= 0 and actions.max() < 4)
