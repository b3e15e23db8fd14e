"""The next-frame test: which histories it compares, which evidence is old, and what it logs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from far_env.events import session_writer
from far_env.host.far import FAR
from far_env.host.sampler import sample_next_frame
from far_env.host.training.config import ValidationSettings
from far_env.host.training.episodes import Classes, Window, WorldEpisodes
from far_env.host.training.loop import step_generator
from far_env.host.training.next_frame import NextFrameTest, right_frames
from tests.conftest import TINY_FAR, randomise


class Walk:
    """A validation window of ten frames in which frame 8 shows frame 1 again and frame 9 shows frame 8 again."""

    name, frames, classes_given, holds_latents, interval = "walk", 10, True, False, 1

    def __init__(self):
        self.video = np.random.default_rng(0).random((10, 3, 64, 64), dtype=np.float32)
        self.video[8] = self.video[1]
        self.video[9] = self.video[8]

    def num_validation(self):
        return 1

    def validation(self, index):
        return Window(self.video, None, Classes(np.arange(10) % 3))


def test_the_right_frames_are_the_newest_and_those_that_cover_the_target():
    rng = torch.Generator().manual_seed(0)
    history = torch.randn(7, 2, 3, 4, generator=rng)
    target = torch.cat([history[2, :, 2:], history[4, :, :1], history[5, :, 1:2]], dim=1).flip(2)  # a row of each, moved
    assert right_frames(history, target, 4).tolist() == [2, 4, 5, 6]

    def cost(kept, target):
        places = list(itertools.product(range(3), range(4)))
        sources = [history[k, :, y, x] for k in kept for y, x in places]
        return sum(min(float((target[:, y, x] - source).square().sum()) for source in sources) for y, x in places)

    other = torch.randn(2, 3, 4, generator=rng)
    best = min((cost((k, 6), other), k) for k in range(6))[1]
    assert right_frames(history, other, 2).tolist() == [best, 6]
    assert right_frames(history, other, 20).tolist() == list(range(7))


def test_frames_are_predicted_from_the_histories_that_are_named(tiny_host):
    walk = Walk()
    model = FAR(**TINY_FAR, condition_cfg={"type": "action", "num_action_classes": 3})
    randomise(model, 4)
    model.eval()
    settings = ValidationSettings(clips=5, targets=5, budget=3, num_steps=2, rollout=2)
    measured = NextFrameTest(settings, [walk], tiny_host.autoencoder, seed=5).measure(model)["walk"]
    assert measured.old.tolist() == [False, False, False, True, False], "frame 8 alone shows what only an old frame shows"
    latents = tiny_host.autoencoder.encode(torch.from_numpy(walk.video)[None])
    histories = {"all": list(range(8)), "newest": [5, 6, 7]}
    for kind, history in histories.items():
        noise = torch.randn((1, 1, 4, 8, 8), generator=step_generator(5, 7, 0, 8))
        action = torch.tensor([[*(number % 3 for number in history), 8 % 3]])
        latent = sample_next_frame(model, latents[:, history], noise, num_steps=2, action=action)
        error = (tiny_host.autoencoder.decode(latent)[0, 0] - torch.from_numpy(walk.video[8])).square().mean()
        assert measured.psnr[kind][3] == pytest.approx(-10 * np.log10(error.item()), abs=1e-3)
    known = latents[:, :5]
    for step in range(2):
        noise = torch.randn((1, 1, 4, 8, 8), generator=step_generator(5, 8, 0, step))
        action = torch.arange(6 + step)[None] % 3
        known = torch.cat([known, sample_next_frame(model, known, noise, num_steps=2, action=action)], dim=1)
        error = (tiny_host.autoencoder.decode(known)[0, -1] - torch.from_numpy(walk.video[5 + step])).square().mean()
        assert measured.rollout[step] == pytest.approx(-10 * np.log10(error.item()), abs=1e-3)
    assert measured.scalars()["rollout_last"] == measured.rollout[1]


def test_scalars_and_pictures_are_logged_by_source(tiny_host, tmp_path):
    test = NextFrameTest(
        ValidationSettings(clips=2, targets=2, num_steps=1),
        [WorldEpisodes(SimpleNamespace(**world()), 0, None)],
        tiny_host.autoencoder,
    )
    with session_writer(tmp_path, 0) as writer:
        test.log(tiny_host.transformer, 7, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {f"validation/flat/{name}" for name in ("all", "newest", "right", "share_old")}
    assert names <= set(events.Tags()["scalars"])
    (event,) = events.Scalars("validation/flat/share_old")
    assert event.step == 7 and event.value == 0.0
    (picture,) = events.Images(events.Tags()["images"][0])
    assert (picture.width, picture.height) == (4 * 64, 4 * 64)


def world() -> dict:
    """A world whose clips are grey."""

    def clip(split, clip_id):
        return SimpleNamespace(frames=np.full((6, 3, 64, 64), 0.1 * clip_id, dtype=np.float32), actions=None)

    return {"name": "flat", "size": 64, "num_frames": 6, "num_clips": lambda split: 3, "clip": clip}
