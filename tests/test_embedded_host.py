"""The host that ships with the package: it predicts its worlds, memory matters to it, and its card tells the truth."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from far_env.contract import NewestFrames
from far_env.evaluation.evaluate import evaluate
from far_env.host.weights import SHIPPED, load_host
from far_env.metrics import psnr
from far_env.workloads import make_workload

CLIPS = range(24)


@pytest.fixture(scope="module", params=["pan", "cuts"])
def workload(request):
    return make_workload(request.param, device="cpu")


def test_what_ships_is_small_and_described():
    sizes = {path.name: path.stat().st_size for path in SHIPPED["embedded"].iterdir()}
    assert set(sizes) == {"config.json", "autoencoder.safetensors", "transformer.safetensors", "README.md", "training.yaml"}
    assert sum(sizes.values()) <= 12e6
    card = (SHIPPED["embedded"] / "README.md").read_text()
    assert f"hash {load_host('embedded', 'cpu').weights_hash};" in card
    assert json.loads((SHIPPED["embedded"] / "config.json").read_text())["num_steps"] == 4


def test_the_measured_quality_is_what_was_wanted():
    """Of the card, on 256 clips: the smallest full-history PSNR, and 10 dB of it that recency loses."""
    card = (SHIPPED["embedded"] / "README.md").read_text()
    for world, wanted in (("pan", 32.5), ("cuts", 28.0)):
        (row,) = re.findall(rf"^\| {world} \|(.*)\|$", card, re.MULTILINE)
        reconstruction, full, recent = (float(cell) for cell in row.split("|"))
        assert reconstruction >= 38 and full >= wanted and full - recent >= 10


def test_the_autoencoder_reconstructs(workload):
    frames = torch.stack([torch.from_numpy(workload.clips.clip("test", i).frames) for i in range(8)])
    autoencoder = workload.host.autoencoder
    latents = autoencoder.encode(frames)
    assert psnr(autoencoder.decode(latents), frames).mean() >= 38
    assert 0.8 <= latents.std() <= 1.25, "flow matching mixes latents with noise of unit variance"


def test_memory_matters_as_much_as_the_card_says(workload):
    """Means of few clips against the card's means of 256: within three standard errors."""
    policies = {"full_history": None, "recent_fill": NewestFrames()}
    result = evaluate(workload, 4, policies, CLIPS, metrics=("psnr",), progress=False)
    (row,) = re.findall(rf"^\| {workload.name} \|(.*)\|$", (SHIPPED["embedded"] / "README.md").read_text(), re.MULTILINE)
    _, *card = (float(cell) for cell in row.split("|"))
    for policy, stated in zip(policies, card, strict=True):
        scores = result.scores[policy]["psnr"]
        assert abs(scores.mean() - stated) <= 3 * scores.std() / np.sqrt(len(scores)) + 0.1
    assert result.difference("full_history", "recent_fill").mean() >= 7
