"""The host that ships with the package: it predicts its worlds, it needs its history, and its model card is right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from far_env import baselines
from far_env.contract import NewestFrames
from far_env.evaluation.evaluate import evaluate
from far_env.host.weights import SHIPPED, load_host
from far_env.metrics import psnr
from far_env.workloads import make_workload

WORLDS = {
    "pan": ("embedded", 4, 24),
    "cuts": ("embedded", 4, 24),
    "orbit": ("embedded_long", 8, 4),
    "maze_retrieval": ("embedded_maze", 8, 8),
}
"""World: its host, the budget of the card, and how many clips are played here."""
RECONSTRUCTION = {"pan": 38, "cuts": 38, "orbit": 38, "maze_retrieval": 29}
"""The least PSNR of the autoencoder, dB."""


@pytest.fixture(scope="module", params=WORLDS)
def workload(request):
    return make_workload(request.param, device="cpu")


def card_row(world: str) -> list[float]:
    """Reconstruction, full history and recency from the model card."""
    card = (SHIPPED[WORLDS[world][0]] / "README.md").read_text().partition("## Next frame")[0]
    (row,) = re.findall(rf"^\| {world} \|(.*)\|$", card, re.MULTILINE)
    return [float(cell) for cell in row.split("|")]


@pytest.mark.parametrize(("name", "megabytes"), [("embedded", 12), ("embedded_long", 9), ("embedded_maze", 12)])
def test_shipped_files_are_small_and_described(name, megabytes):
    sizes = {path.name: path.stat().st_size for path in SHIPPED[name].iterdir()}
    autoencoder = set() if name == "embedded_long" else {"autoencoder.safetensors"}
    assert set(sizes) == {"config.json", "transformer.safetensors", "README.md", "training.yaml"} | autoencoder
    assert sum(sizes.values()) <= megabytes * 1e6
    host = load_host(name, "cpu")
    assert f"hash {host.weights_hash};" in (SHIPPED[name] / "README.md").read_text()
    assert host.num_steps == 4
    if name == "embedded_long":
        assert load_host("embedded", "cpu").autoencoder.settings == host.autoencoder.settings


def test_the_quality_on_the_cards_meets_the_targets():
    """From the cards: the smallest full-history PSNR, and how much of it recency loses."""
    for world, wanted, lost in (("pan", 32.5, 10), ("cuts", 28.0, 10), ("orbit", 16.0, 4), ("maze_retrieval", 19.0, 2)):
        reconstruction, full, recent = card_row(world)
        assert reconstruction >= RECONSTRUCTION[world] and full >= wanted and full - recent >= lost


def test_the_autoencoder_reconstructs(workload):
    frames = torch.stack([torch.from_numpy(workload.clips.clip("test", i).frames) for i in range(8)])
    autoencoder = workload.host.autoencoder
    latents = autoencoder.encode(frames)
    assert psnr(autoencoder.decode(latents), frames).mean() >= RECONSTRUCTION[workload.name]
    assert 0.8 <= latents.std() <= 1.25, "flow matching mixes latents with noise of unit variance"


def test_the_loss_from_dropping_frames_is_the_one_on_the_card(workload):
    """Means of few clips against the card's means of many: within three standard errors."""
    _, budget, count = WORLDS[workload.name]
    policies = {"full_history": None, "recent_fill": NewestFrames()}
    result = evaluate(workload, budget, policies, range(count), metrics=("psnr",), progress=False)
    for policy, stated in zip(policies, card_row(workload.name)[1:], strict=True):
        scores = result.scores[policy]["psnr"]
        assert abs(scores.mean() - stated) <= 3 * scores.std(ddof=1) / np.sqrt(len(scores)) + 0.1
    if count >= 24:
        assert result.difference("full_history", "recent_fill").mean() >= 7


def test_choosing_well_matters_most_where_the_history_is_long():
    """On orbit the frames that cover the panorama, all within the window, beat both recency and everything at once."""
    workload = make_workload("orbit", device="cpu")
    policies = {"full_history": None, "recent_fill": NewestFrames(), "least_novel": baselines.make("least_novel")}
    result = evaluate(workload, 8, policies, range(2), metrics=("psnr",), progress=False)
    scores = {name: float(columns["psnr"].mean()) for name, columns in result.scores.items()}
    assert scores["least_novel"] > scores["full_history"] + 5 > scores["recent_fill"] + 5
