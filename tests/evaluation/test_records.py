"""The results folder: the content of a record, and a stopped evaluation resumes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from far_env import baselines
from far_env.clips.clip import Clip
from far_env.clips.worlds import WORLDS
from far_env.contract import TemporalCachePlan
from far_env.errors import PolicyError
from far_env.evaluation import batches
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.evaluate import evaluate, evaluate_grid
from far_env.evaluation.plans import histories
from far_env.evaluation.results_folder import Recorder, load, session_precision
from far_env.host.weights import load_host
from far_env.metrics import psnr
from far_env.policies import FULL_HISTORY
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout

NAMES = ("recent_fill", "packcache", "random")


def policies(*names):
    return {name: None if name == FULL_HISTORY else baselines.make(name) for name in names}


@pytest.fixture(scope="module")
def workloads(tiny_workload):
    return [replace(tiny_workload, name="pan"), replace(tiny_workload, name="cuts", clips=WORLDS["cuts"])]


def run(folder, workloads, names=(*NAMES, FULL_HISTORY), budgets=(2, 4), clips=3, **options):
    options = {"metrics": ("psnr", "ssim"), "batch_size": 2, "progress": False, "show_clips": 1} | options
    return evaluate_grid(workloads, budgets, policies(*names), range(clips), out=folder, **options)


@pytest.fixture(scope="module")
def finished(workloads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "all"
    return run(folder, workloads, seeds=(42, 50))


def lines(folder):
    """Records without what may differ from run to run, in order."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("decision_ms", "commit")} for record in records]


def by_key(folder):
    return {(r["workload"], r["budget"], r["policy"], r["clip"], r["seed"]): r for r in lines(folder)}


def check_same(actual, expected):
    """Equal to the last bit of the latents; pixels are decoded in batches of other sizes, and may differ in the last digit."""
    assert actual.keys() == expected.keys()
    for key, record in expected.items():
        differing = {name for name, value in record.items() if actual[key][name] != value}
        assert differing <= {"metrics", "psnr_per_frame"}
        assert actual[key]["psnr_per_frame"] == pytest.approx(record["psnr_per_frame"], abs=1e-4)
        assert actual[key]["metrics"] == pytest.approx(record["metrics"], abs=1e-4)


@pytest.fixture
def played(monkeypatch):
    """The policies of every call of `play` in an evaluation: (workload, policy, budget, noise seeds)."""
    calls = []

    def watching(workload, clips, seeds, policies, budget, **options):
        names = [getattr(policy, "name", None) for policy in policies]
        for name in dict.fromkeys(names):
            of_policy = tuple(seed for seed, other in zip(seeds, names, strict=True) if other == name)
            calls.append((workload.name, name, budget, of_policy))
        return play(workload, clips, seeds, policies, budget, **options)

    monkeypatch.setattr(batches, "play", watching)
    return calls


def test_a_record_is_an_episode_of_the_specification(finished, workloads):
    chosen = [r for r in finished.records if (r.workload, r.clip, r.seed) == ("cuts", 2, 50)]
    assert len(chosen) == 2 * len(NAMES) + 1
    clip = workloads[1].clips.clip("test", 2)
    truth = torch.from_numpy(clip.frames[5:])
    for record in chosen:
        policy = policies(record.policy)[record.policy]
        if hasattr(policy, "begin_clip"):
            policy.begin_clip(52)
        expected = reference_rollout(workloads[1], clip, policy, record.budget, 52)
        assert record.metrics["psnr"] == pytest.approx(psnr(expected.frames, truth).item(), abs=1e-3)
        frame_psnr = [-10 * np.log10(((a - b) ** 2).mean().item()) for a, b in zip(expected.frames, truth, strict=True)]
        assert record.psnr_per_frame == pytest.approx(frame_psnr, abs=1e-2)
        kept = [(step, numbers) for step, numbers in expected.kept if step < 10]
        assert list(histories(record, 5, 11).items()) == kept
        assert (record.decision_ms is None) == (record.policy == FULL_HISTORY)
        assert record.facts["weights"] == workloads[1].host.weights_hash and record.facts["ode_steps"] == 3
    assert {r.budget for r in chosen if r.policy == FULL_HISTORY} == {9999}


def test_demoted_frames_are_told_apart(workloads):
    class Demotes:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            plan = baselines.make("recent_fill").build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)
            next(d for d in plan.chunk_decisions if d.action == "keep").action = "demote_to_long_term"
            return plan

    results = evaluate_grid(workloads[:1], [4], {"demotes": Demotes()}, [0], metrics=["psnr"], progress=False)
    assert results.records[0].plan[:2] == [
        {"step": 0, "kept": [3, 4, 5], "demoted": [2]},
        {"step": 1, "kept": [4, 5, 6], "demoted": [3]},
    ]


def test_latents_do_not_depend_on_the_batch_or_on_who_else_plays(finished, workloads, tmp_path):
    run(tmp_path, workloads[:1], names=("random",), budgets=(4,), clips=3, batch_size=64, memo_bytes=0)
    alone, together = by_key(tmp_path), by_key(finished.folder)
    assert len(alone) == 3
    check_same(alone, {key: together[key] for key in alone})


def test_full_history_is_played_once_per_workload_and_seed(workloads, played, tmp_path):
    run(tmp_path, workloads, seeds=(1, 2), clips=2)
    full = [call for call in played if call[1] is None]
    assert full == [(name, None, 9999, (seed, seed + 1)) for name in ("pan", "cuts") for seed in (1, 2)]
    assert len(played) == 4 + 4 * 2 * len(NAMES)


class Stop:
    """Ctrl-C after so many generated frames."""

    def __init__(self, frames):
        self.left = frames

    def __call__(self, workload, *args, on_frame, **options):
        def counting(number):
            on_frame(number)
            self.left -= number
            if self.left < 0:
                raise KeyboardInterrupt

        return play(workload, *args, on_frame=counting, **options)


def test_a_stopped_evaluation_goes_on_where_it_was(finished, workloads, tmp_path, monkeypatch, played):
    with monkeypatch.context() as patch:
        patch.setattr(batches, "play", Stop(400))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, workloads, seeds=(42, 50))
    before = (tmp_path / "records.jsonl").read_text()
    assert 0 < len(before.splitlines()) < len(finished.records)
    torn = before[: before.rindex("\n", 0, -1) + 40]  # as if killed while writing the last line
    (tmp_path / "records.jsonl").write_text(torn)
    results = run(tmp_path, workloads, seeds=(42, 50))
    check_same(by_key(tmp_path), by_key(finished.folder))
    assert len(lines(tmp_path)) == len(finished.records) == len(results.records)
    assert (tmp_path / "records.jsonl").read_text().startswith(torn[: torn.rindex("\n") + 1])
    played.clear()
    run(tmp_path, workloads, seeds=(42, 50))
    assert not played, "a finished evaluation plays nothing"
    for picture in finished.folder.rglob("*.png"):
        assert (tmp_path / picture.relative_to(finished.folder)).read_bytes() == picture.read_bytes()


def test_what_is_added_is_played_and_nothing_else(workloads, tmp_path, played):
    run(tmp_path, workloads[:1], names=("recent_fill",), budgets=(4,), clips=2)
    for more, expected in [
        ({"names": ("packcache",)}, [("pan", "packcache", 4, (42, 43))]),
        ({"budgets": (4, 2), "names": ("recent_fill",)}, [("pan", "recent_fill", 2, (42, 43))]),
        ({"clips": 3, "budgets": (4,), "names": ("packcache",)}, [("pan", "packcache", 4, (44,))]),
        ({"seeds": (7,), "names": ("recent_fill",), "budgets": (2,)}, [("pan", "recent_fill", 2, (7, 8))]),
    ]:
        played.clear()
        run(tmp_path, workloads[:1], **({"clips": 2, "budgets": (4,)} | more))
        assert played == expected
    played.clear()
    results = run(tmp_path, workloads, names=("recent_fill",), budgets=(4,), clips=2)
    assert played == [("cuts", "recent_fill", 4, (42, 43))]
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    assert (settings["workloads"], settings["budgets"], settings["seeds"]) == (["pan", "cuts"], [2, 4], [7, 42])
    assert settings["clips"] == [0, 1, 2] and list(settings["policies"]) == ["recent_fill", "packcache"]
    table = tabulate(results, "pan", 4, range(2), [42])
    assert set(table.scores) == {"recent_fill", "packcache"} and table.scores["packcache"]["psnr"].shape == (2, 1)
    assert set(tabulate(results, "pan", 4, [2], [42]).scores) == {"packcache"}, "the other has not played clip 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "holds an evaluation with split test, not validation"),
        ({"metrics": ("psnr",)}, "metrics"),
        ({"show_clips": 2}, "show_clips 1, not 2"),
        ({"clip_options": {"protocol": "far"}}, "clip_options of pan"),
        ({"policy_facts": {"recent_fill": {"sha256": "other"}}}, "the content of policy recent_fill"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(workloads, tmp_path, change, message):
    change = dict(change)
    run(tmp_path, workloads[:1], names=("recent_fill",), clips=1, policy_facts={"recent_fill": {"sha256": "this"}})
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    changed = replace(workloads[0], clip_options=change.pop("clip_options", {}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, [changed], names=("recent_fill",), clips=2, **change)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_another_host_or_other_data_in_the_same_folder_are_refused(workloads, tmp_path):
    run(tmp_path, workloads[:1], names=("recent_fill",), clips=1)
    other = replace(workloads[0], host=replace(workloads[0].host, weights_hash="00000000"))
    with pytest.raises(ValueError, match=r"weights of pan .*, not 00000000"):
        run(tmp_path, [other], names=("recent_fill",), clips=2)

    class Shifted(type(WORLDS["pan"])):
        def clip(self, split, clip_id):
            return Clip(clip_id, super().clip(split, clip_id + 1).frames)

    with pytest.raises(ValueError, match=r"clip 0 of pan differs from .*, which was made with other data"):
        run(tmp_path, [replace(workloads[0], clips=Shifted())], names=("packcache",), clips=1)


def test_two_evaluations_do_not_write_one_folder_at_once(workloads, tmp_path):
    results = run(tmp_path, workloads[:1], names=("recent_fill",), clips=1)
    first = Recorder(tmp_path, results.settings)
    with pytest.raises(ValueError, match="another evaluation is writing"):
        run(tmp_path, workloads[:1], names=("recent_fill",), clips=1)
    first.close()
    run(tmp_path, workloads[:1], names=("recent_fill",), clips=1)


def test_pictures_show_the_frames(finished, workloads):
    clip = workloads[0].clips.clip("test", 0)
    record = next(r for r in finished.records if (r.policy, r.budget, r.workload, r.clip) == ("packcache", 2, "pan", 0))
    batch, _ = play(workloads[0], [clip], [42], baselines.make("packcache"), 2)
    for path, frames in (
        (finished.truth_picture("pan", 0), clip.frames),
        (finished.picture(record), batch.decode([0])[0].numpy()),
    ):
        picture = np.asarray(Image.open(path)) / 255
        assert picture.shape == (64, 64 * len(frames), 3)
        np.testing.assert_allclose(picture, np.concatenate(list(frames.transpose(0, 2, 3, 1)), axis=1), atol=0.5 / 255 + 1e-6)
    pictures = {path.relative_to(finished.folder / "frames").as_posix() for path in finished.folder.rglob("*.png")}
    assert "pan/b9999/full_history/s50_c0.png" in pictures and "cuts/b4/random/s42_c0.png" in pictures
    assert len(pictures) == 2 * (1 + 2 * (1 + 2 * len(NAMES))) and not any("_c1" in name for name in pictures)


@pytest.mark.parametrize("name", ["../../policy.py", "..", ".", "runs/my run"])
def test_pictures_stay_in_the_folder_whatever_a_policy_is_called(finished, name):
    record = replace(finished.records[0], policy=name)
    folder = finished.folder / "frames" / record.workload / f"b{record.budget}"
    path = finished.picture(record).resolve()
    assert path.parent.parent == folder.resolve() and path.parent != folder.resolve()


def test_what_was_written_is_read_back(finished):
    loaded = load(finished.folder)
    assert loaded.settings == finished.settings and loaded.folder == finished.folder
    assert [r.key for r in loaded.records] == [r.key for r in finished.records]
    for reloaded, other in zip(loaded.records, finished.records, strict=True):
        assert dataclasses.asdict(reloaded) == dataclasses.asdict(other)


def test_an_infinite_psnr_survives(finished, tmp_path):
    record = replace(finished.records[0], metrics={"psnr": float("inf"), "ssim": 1.0})
    recorder = Recorder(tmp_path, finished.settings)
    recorder.add([record])
    recorder.close()
    assert load(tmp_path).records == [record]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "is no JSON object"),
        ({"clip": "0"}, "has no valid 'clip'"),
        ({"clip": True}, "has no valid 'clip'"),
        ({"policy": "magic"}, "has the policy 'magic', which is not in evaluation.json"),
        ({"metrics": {"psnr": 1.0}}, "has the metrics psnr; evaluation.json has psnr, ssim"),
        ({"psnr_per_frame": [1.0]}, "11 of them in psnr_per_frame"),
        ({"plan": [{"step": 0, "kept": [5, 77], "demoted": []}]}, r"keeps \[5, 77\] of \[0, 1, 2, 3, 4, 5\] at step 0"),
        ({"plan": []}, "keeps"),
        ({"plan": [{"kept": []}]}, "lacks step, kept or demoted frames"),
        ({"weights": None}, "lacks weights"),
        ({}, "repeats an episode of an earlier line"),
    ],
)
def test_damaged_records_are_named_by_line(finished, tmp_path, change, message):
    source = (finished.folder / "records.jsonl").read_text().splitlines()
    good = json.loads(next(line for line in source if json.loads(line)["policy"] == "packcache"))
    changed = change if isinstance(change, str) else json.dumps({k: v for k, v in {**good, **change}.items() if v is not None})
    (tmp_path / "evaluation.json").write_text((finished.folder / "evaluation.json").read_text())
    (tmp_path / "records.jsonl").write_text(json.dumps(good) + "\n" + changed + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "records.jsonl, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_no_results_are_told(tmp_path, finished):
    with pytest.raises(ValueError, match=r"cannot read .*evaluation\.json: No such file"):
        load(tmp_path)
    for text, message in [("{", "is damaged"), ('{"format": 9}', "not of format 1"), ('{"format": 1}', "settings")]:
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    settings = json.loads((finished.folder / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**settings, "num_context": {}}))
    with pytest.raises(ValueError, match="lacks the sizes of a workload"):
        load(tmp_path)


class Refuses:
    """A policy that cannot run at small budgets."""

    name = "refuses"

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        if budget_state["max_frames"] < 4:
            raise RuntimeError("needs 4 frames")
        return baselines.make("recent_fill").build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)


def test_an_optional_policy_is_left_out_where_it_cannot_run(workloads, capsys):
    everyone = {"refuses": Refuses(), **policies("recent_fill")}
    common = {"metrics": ["psnr"], "progress": False}
    results = evaluate_grid(workloads[:1], [2, 4], everyone, range(2), optional={"refuses"}, **common)
    assert {(r.policy, r.budget) for r in results.records} == {("recent_fill", 2), ("recent_fill", 4), ("refuses", 4)}
    stderr = capsys.readouterr().err
    assert "left out refuses on pan under budget 2" in stderr and "needs 4 frames" in stderr
    with pytest.raises(PolicyError, match="needs 4 frames"):
        evaluate_grid(workloads[:1], [2, 4], everyone, range(2), **common)


def test_one_workload_and_budget_is_the_same_evaluation(finished, workloads):
    table = evaluate(workloads[0], 4, policies(*NAMES, FULL_HISTORY), [2, 0], metrics=["psnr"], progress=False)
    recorded = tabulate(finished, "pan", 4, [2, 0], [42])
    assert list(table.scores) == list(recorded.scores)
    for name, columns in table.scores.items():
        np.testing.assert_array_equal(columns["psnr"], recorded.scores[name]["psnr"])
        assert columns["psnr"].shape == (2, 1)
    assert recorded.provenance["noise_seed"] == "42 + clip id" and recorded.provenance["budget"] == 4


def test_a_policy_without_answer_keeps_only_the_newest(workloads):
    class Nothing:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            return TemporalCachePlan()

    results = evaluate_grid(workloads[:1], [4], {"nothing": Nothing()}, [0], metrics=["psnr"], progress=False)
    plan = results.records[0].plan
    assert [entry["kept"] for entry in plan] == [[entry["step"] + 5] for entry in plan]
    assert [entry["step"] for entry in plan] == [0, 4, 8], "asked again only when the history is over budget again"


def test_a_measured_precision_stays_what_it_was_at_first(workloads, tiny_host_folder, tmp_path):
    assert session_precision(None, "auto") == session_precision(tmp_path, "auto") == "auto"
    half = replace(workloads[0], host=load_host(tiny_host_folder, "cpu", torch.bfloat16))
    run(tmp_path, [half], names=("random",), budgets=(4,), clips=1)
    assert session_precision(tmp_path, "auto") == "bfloat16" and session_precision(tmp_path, "float32") == "float32"


def test_records_that_do_not_fit_on_the_disk_leave_no_part_of_a_line(finished, tmp_path):
    resource = pytest.importorskip("resource")
    recorder = Recorder(tmp_path, finished.settings)
    first, second = finished.records[:2]
    recorder.add([first])
    size, before = (tmp_path / "records.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*records\.jsonl: File too large"):
            recorder.add([second])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "records.jsonl").stat().st_size == size and load(tmp_path).records == [first]
    recorder.add([second])
    recorder.close()
    assert load(tmp_path).records == [first, second]
