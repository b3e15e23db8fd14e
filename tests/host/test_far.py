"""FAR against the published model's numbers, with and without the context cache."""

from __future__ import annotations

import pytest
import torch

from far_env.host.far import FAR
from tests.conftest import cached_velocity

CASES = [f"far_tiny_{name}.npz" for name in ("base", "patch2", "label", "action", "slope", "eps")]
ATOL = 2e-5


def conditions(fixture, frames: slice = slice(None)) -> dict[str, torch.Tensor]:
    arguments = {}
    if "in.label" in fixture:
        arguments["label"] = fixture["in.label"]
    if "in.action" in fixture:
        arguments["action"] = fixture["in.action"][:, frames]
    return arguments


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("times", ["timesteps", "timesteps_mixed"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_returns_every_frame_as_the_published_model_does(golden, case, times, train):
    fixture = golden(case)
    model = fixture.far().train(train)
    velocity = model(fixture["in.latents"], fixture[f"in.{times}"], **conditions(fixture))
    expected = fixture["out.train_all" if times == "timesteps" else "out.train_all_mixed"]
    torch.testing.assert_close(velocity, expected, atol=ATOL, rtol=0)
    last = fixture["out.eval_last" if times == "timesteps" else "out.eval_last_mixed"]
    torch.testing.assert_close(velocity[:, -1:], last, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_single_frame_needs_no_context(golden, case):
    fixture = golden(case)
    last = slice(-1, None)
    velocity = fixture.far()(fixture["in.latents"][:, last], fixture["in.timesteps"][:, last], **conditions(fixture, last))
    torch.testing.assert_close(velocity, fixture["out.eval_single"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("call", ["a", "b"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_and_uncached_frames_agree_with_both_paths_of_the_published_model(golden, case, call):
    fixture = golden(case)
    model, latents = fixture.far(), fixture["in.latents"]
    for k in range(latents.shape[1]):
        noisy, time = fixture[f"in.noise_{call}"][:, k : k + 1], fixture[f"in.t_{call}"][:, k : k + 1]
        times = torch.cat([torch.full((len(latents), k), -1.0), time], dim=1)
        uncached = model(torch.cat([latents[:, :k], noisy], dim=1), times, **conditions(fixture, slice(k + 1)))[:, -1]
        context_conditions, frame_conditions = conditions(fixture, slice(k)), conditions(fixture, slice(k, k + 1))
        cached = cached_velocity(model, latents[:, :k], noisy, time, context_conditions, frame_conditions)[:, 0]
        for path in ("cached", "nocache"):
            expected = fixture[f"out.incr_{path}_{call}"][:, k]
            torch.testing.assert_close(uncached, expected, atol=ATOL, rtol=0)
            torch.testing.assert_close(cached, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_context_encoded_piece_by_piece_is_the_context_encoded_at_once(golden):
    for case in ("far_tiny_base.npz", "far_tiny_patch2.npz", "far_tiny_slope.npz"):
        fixture = golden(case)
        model, frames = fixture.far(), fixture["in.latents"][:, :3]
        whole = model.encode_context(frames)
        one = model.encode_context(frames[:, :1])
        later = model.encode_context(frames[:, 1:], one, 1)
        torch.testing.assert_close(torch.cat([one, later], dim=3), whole, atol=ATOL, rtol=0)


@torch.no_grad()
def test_shorter_contexts_share_a_batch_with_longer_ones(golden):
    for case in ("far_tiny_base.npz", "far_tiny_slope.npz"):
        fixture = golden(case)
        model, latents = fixture.far(), fixture["in.latents"]
        noisy, time = fixture["in.noise_a"][:, -1:], torch.full((2, 1), 400.0)
        alone = [
            cached_velocity(model, latents[row : row + 1, :length], noisy[row : row + 1], time[:1])
            for row, length in enumerate((1, 3))
        ]
        padded = latents[:, :3].clone()
        padded[0, 1:] = 1e3
        together = cached_velocity(model, padded, noisy, time, lengths=[1, 3])
        torch.testing.assert_close(together, torch.cat(alone), atol=ATOL, rtol=0)


def test_a_time_per_clip_stands_for_all_its_frames(golden):
    fixture = golden("far_tiny_base.npz")
    model, latents = fixture.far(), fixture["in.latents"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(latents, torch.tensor([5.0, 900.0])), model(latents, torch.tensor([[5.0] * 3, [900.0] * 3]))
        )


def test_state_dicts_load_strictly(golden):
    fixture = golden("far_tiny_base.npz")
    weights = fixture.weights
    weights["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="surplus"):
        FAR(**fixture.config).load_state_dict(weights)


def test_a_fresh_model_predicts_zero_and_its_class_dropout_acts_in_training_only():
    torch.manual_seed(0)
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = FAR(**config, axes_dims_rope=(4, 6, 6), condition_cfg={"type": "action", "num_action_classes": 4})
    action = torch.zeros(400, 5, dtype=torch.int64)
    assert model(torch.randn(1, 5, 4, 4, 4), torch.ones(1, 5), action=action[:1]).abs().max() == 0
    null = model.action_embedder.embedding_table.weight[4]
    dropped = (model.train().action_embedder(action) == null).all(dim=-1).float()
    assert 0.05 < dropped.mean() < 0.15
    assert 0 < dropped.mean(dim=1).max() < 1, "actions are dropped frame by frame"
    assert not (model.eval().action_embedder(action) == null).all(dim=-1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"axes_dims_rope": (4, 4, 4)}, "sum to attention_head_dim"), ({"condition_cfg": {"type": "text"}}, "'text' is unknown")],
)
def test_configurations_that_do_not_fit_are_refused(golden, change, message):
    with pytest.raises(ValueError, match=message):
        FAR(**{**golden("far_tiny_base.npz").config, **change})


def test_a_missing_condition_is_named(golden):
    fixture = golden("far_tiny_action.npz")
    with pytest.raises(ValueError, match="pass action"):
        fixture.far()(fixture["in.latents"], fixture["in.timesteps"])
