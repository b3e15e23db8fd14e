"""What the benchmark's own program did with a tiny host, against this package: calls, kept frames, scores, noise and pixels.

How the numbers were made is in tests/fixtures/harness/README.md.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from far_env.clips.clip import Clip
from far_env.contract import FrameMeta, TemporalCachePlan, apply_plan
from far_env.evaluation.benchmark import run_benchmark
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.metrics import psnr, ssim
from far_env.policies import load_policy
from far_env.policy_file import policy_from_file
from far_env.rollout.noise import rollout_noise
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from tests.conftest import DATA

FOLDER = DATA / "harness"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@dataclass(frozen=True)
class GivenClips:
    """The clips that the harness was given, as test clips."""

    frames: np.ndarray
    name: str = "given"
    size: int = 64

    def num_clips(self, split: str) -> int:
        return len(self.frames)

    def clip(self, split: str, clip_id: int) -> Clip:
        return Clip(clip_id, np.ascontiguousarray(self.frames[clip_id].transpose(0, 3, 1, 2), dtype=np.float32) / 255)


def part(weights, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(weights[key]).float() for key in weights.files if key.startswith(prefix)}


@pytest.fixture(scope="module")
def workload() -> Workload:
    with np.load(FOLDER / "host.npz") as weights:
        config = {key: value for key, value in EXPECTED["far_config"].items() if value is not None}
        transformer, autoencoder = FAR(**config), Autoencoder(**EXPECTED["dcae_config"])
        transformer.load_state_dict(part(weights, "far."))
        autoencoder.dcae.load_state_dict(part(weights, "dcae_ucf."))
    models = {"transformer": transformer, "autoencoder": autoencoder}
    for model in models.values():
        model.eval().requires_grad_(False)
    host = FARHost("harness", **models, weights_hash="fixture", latent_shape=(32, 8, 8))
    clips = GivenClips(np.load(FOLDER / "clips_ucf.npz")["clips"])
    return Workload("ucf101_short_prediction", clips, host, 5, 11, EXPECTED["ode_steps"])


class Recording:
    """Passes calls on, and notes the step and the places that the harness keeps, clip by clip."""

    def __init__(self, policy) -> None:
        self.policy, self.steps, self.kept, self.metas = policy, [], [], []

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state) -> TemporalCachePlan:
        if not self.steps or rollout_state.step <= self.steps[-1][-1]:
            self.steps.append([])
            self.kept.append([])
        plan = self.policy.build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)
        self.steps[-1].append(rollout_state.step)
        self.kept[-1].append(apply_plan(plan, len(chunk_meta_list), budget_state["max_frames"]))
        self.metas.append(chunk_meta_list)
        return plan


@pytest.mark.parametrize("run", EXPECTED["runs"], ids=lambda run: f"{run['policy']}-{run['max_frames']}")
def test_whole_runs_make_the_harness_calls_keep_its_frames_and_score_as_it_does(workload, run, tmp_path):
    pasted = tmp_path / "pan_tight.py"
    pasted.write_bytes(gzip.decompress((FOLDER / "pan_tight.py.gz").read_bytes()))
    policy = policy_from_file(pasted) if run["policy"] == "pan-tight" else load_policy(run["policy"])
    recording = Recording(policy)
    num_clips, tolerance = len(run["psnr"]), EXPECTED["tolerances"]
    played = None if policy is None else recording
    score = run_benchmark(workload, run["max_frames"], played, num_clips, metrics=("psnr", "ssim"), progress=False)
    if policy is not None:
        assert recording.steps == run["steps"]
        assert recording.kept == run["kept"]
    for metric in ("psnr", "ssim"):
        scores = [clip[metric] for clip in score.by_clip]
        np.testing.assert_allclose(scores, run[metric], atol=tolerance[metric], rtol=0)
        assert score.values[metric] == pytest.approx(np.mean(run[metric]), abs=tolerance[metric])


def test_every_meta_has_the_fields_of_the_harness(workload):
    """Sums that the harness states: ages are places, sizes are float32, and the features lie where it clips them."""
    recording = Recording(load_policy("causalcache_vdm"))
    run_benchmark(workload, 8, recording, 1, metrics=("psnr",), progress=False)
    assert recording.metas and {len(metas) for metas in recording.metas} == {9}
    steps = [step for clip in recording.steps for step in clip]
    for step, metas in zip(steps, recording.metas, strict=True):
        for place, meta in enumerate(metas):
            assert isinstance(meta, FrameMeta)
            assert (meta.chunk_id, meta.age, meta.dynamic_age) == (place, 8 - place, 8 - place)
            assert meta.recentness == 1 / (9 - place) and meta.size_mb == 32 * 8 * 8 * 4 / 2**20
            assert (meta.access_count, meta.recent_hit_count, meta.last_access_step) == (1, 1, step)
            assert (meta.long_term_resident, meta.compression_state) == (False, "none")
            assert 0 <= meta.boundary_score <= 1 and 0 <= meta.feature_drift <= 1 and 0 <= meta.temporal_similarity <= 1
            assert meta.keyframe_score == meta.motion_strength
        assert (metas[0].boundary_score, metas[0].feature_drift, metas[0].temporal_similarity) == (0, 0, 1)


def test_the_first_numbers_of_every_steps_noise_are_the_harness(workload):
    noise = rollout_noise(EXPECTED["seed"], 11, (32, 8, 8))
    np.testing.assert_array_equal(noise.flatten(1)[:, :6], np.float32(EXPECTED["noise_clip0"]["values"]))


def test_the_specification_draws_the_harness_pixels(workload):
    """The slow rollout, frame by frame: pixels and their scores, without the engine."""
    clip = workload.clips.clip("test", 0)
    rollout = reference_rollout(workload, clip, load_policy("recent_window"), 4, EXPECTED["seed"])
    np.testing.assert_allclose(rollout.frames[..., ::16, ::16], EXPECTED["pixels_clip0"]["values"], atol=1e-4)
    (run,) = [run for run in EXPECTED["runs"] if (run["policy"], run["max_frames"]) == ("recent_window", 4)]
    truth = torch.from_numpy(clip.frames[5:])
    assert psnr(rollout.frames, truth).item() == pytest.approx(run["psnr"][0], abs=1e-4)
    assert ssim(rollout.frames, truth) == pytest.approx(run["ssim"][0], abs=1e-4)
