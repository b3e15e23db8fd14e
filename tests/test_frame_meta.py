"""The FrameMeta matrix against the benchmark's formulas, written out in NumPy float64."""

from __future__ import annotations

import numpy as np
import torch

from far_env.frame_meta import frame_features, frame_meta_list, frame_size_mb


def by_the_formulas(x: np.ndarray) -> np.ndarray:
    """One history (K, …) to (K, 4)."""
    x = x.reshape(len(x), -1).astype(np.float64)
    rows = []
    for i in range(len(x)):
        drift = min(1.0, np.linalg.norm(x[i] - x[0]) / (np.linalg.norm(x[0]) + 1e-8))
        if i == 0:
            rows.append((0.0, drift, 1.0, 0.0))
            continue
        change, before = x[i] - x[i - 1], np.linalg.norm(x[i - 1])
        cosine = x[i] @ x[i - 1] / max(np.linalg.norm(x[i]) * before, 1e-8)
        rows.append((min(1.0, np.linalg.norm(change) / (before + 1e-8) / 0.5), drift, max(0.0, cosine), np.abs(change).mean()))
    return np.array(rows)


def test_features_equal_the_formulas():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(6, 9, 4, 3, 3)) * np.array([0.1, 1, 5, 1, 1, 1])[:, None, None, None, None]
    latents[1] = latents[1, :1] + 0.05 * np.arange(9)[:, None, None, None] * rng.normal(size=(9, 4, 3, 3))  # slow drift
    latents[2, 4] = latents[2, 3]  # a repeated frame
    latents[3, 2] = -latents[3, 1]  # opposite, so that the similarity is cut at zero
    latents[4, 0] = 0  # division by epsilon
    expected = np.stack([by_the_formulas(history) for history in latents])
    actual = frame_features(torch.from_numpy(latents).float())
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-6, rtol=2e-6)
    assert (expected[..., 0] == 1).any() and (expected[..., 2] == 0).any() and (expected[..., 0] < 0.5).any()


def test_padding_rows_are_zero_and_touch_nothing():
    latents = torch.randn(2, 5, 4, 2, 2)
    padded = frame_features(latents, torch.tensor([3, 5]))
    torch.testing.assert_close(padded[0, :3], frame_features(latents[:1, :3])[0])
    assert padded[0, 3:].abs().max() == 0
    torch.testing.assert_close(padded[1], frame_features(latents[1:])[0])


def test_metas_carry_plain_values_and_positions_for_ages():
    features = frame_features(torch.randn(1, 4, 32, 8, 8))[0]
    metas = frame_meta_list(features, step=6, size_mb=frame_size_mb((32, 8, 8)))
    assert [m.age for m in metas] == [m.dynamic_age for m in metas] == [3, 2, 1, 0]
    assert [m.recentness for m in metas] == [1 / 4, 1 / 3, 1 / 2, 1.0]
    assert all(m.size_mb == 32 * 8 * 8 * 4 / 2**20 for m in metas)
    for index, meta in enumerate(metas):
        assert (meta.chunk_id, meta.access_count, meta.recent_hit_count, meta.last_access_step) == (index, 1, 1, 6)
        assert meta.keyframe_score == meta.motion_strength == features[index, 3].item()
        assert (meta.boundary_score, meta.feature_drift, meta.temporal_similarity) == tuple(features[index, :3].tolist())
        assert (meta.long_term_resident, meta.compression_state) == (False, "none")
        assert all(type(value) in (int, float, bool, str) for value in vars(meta).values())
