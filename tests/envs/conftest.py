"""Environments of the small workload."""

from __future__ import annotations

import pytest

from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv


@pytest.fixture
def make(tiny_workload):
    return lambda **options: FrameRetentionEnv(tiny_workload, **options)


@pytest.fixture
def make_vector(tiny_workload):
    return lambda n, **options: FrameRetentionVectorEnv(n, tiny_workload, **options)
