"""Pictures of episodes: their content, their one size, and Gymnasium's and SB3's wrappers that rely on it."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import AddRenderObservation, HumanRendering, RecordVideo, RenderCollection

import far_env  # noqa: F401  (registers the ids)
from far_env.envs.rendering import MAX_WIDTH, render_workload_episode
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.sb3 import SB3VecEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv

needs_pygame = pytest.mark.skipif(importlib.util.find_spec("pygame") is None, reason="pygame is not installed")
needs_moviepy = pytest.mark.skipif(importlib.util.find_spec("moviepy") is None, reason="moviepy is not installed")

GREEN, GREY, EMPTY = (80, 200, 120), (70, 70, 70), (24, 24, 24)


@pytest.fixture
def make(tiny_workload):
    return lambda **options: FrameRetentionEnv(tiny_workload, **{"render_mode": "rgb_array", **options})


@pytest.fixture
def make_vector(tiny_workload):
    return lambda n, **options: FrameRetentionVectorEnv(n, tiny_workload, **{"render_mode": "rgb_array", **options})


@pytest.fixture
def no_screen(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def play_episode(env):
    """Step until the episode ends, keeping everything; returns how many decisions that took."""
    env.reset(seed=0)
    decisions, done = 0, False
    while not done:
        _, _, terminated, truncated, _ = env.step(np.ones(6, dtype=np.int8))
        decisions, done = decisions + 1, terminated or truncated
    return decisions


def test_the_picture_shows_truth_prediction_and_kept_frames(make):
    env = make()
    env.reset(seed=0)
    first = env.render()
    env.step(np.array([0, 1, 0, 1, 0, 1]))
    second = env.render()
    assert first.dtype == second.dtype == np.uint8
    clip, predicted = env.episodes.clips[0].frames, env.episodes.predicted([0])[0].numpy()
    for column, frame in enumerate(clip):
        left = column * 68
        np.testing.assert_array_equal(first[:64, left : left + 64], np.rint(frame.transpose(1, 2, 0) * 255).astype(np.uint8))
    np.testing.assert_array_equal(second[68:132, :64], first[:64, :64], err_msg="the context comes first in the second row")
    newest = np.rint(predicted[1].transpose(1, 2, 0) * 255).astype(np.uint8)
    np.testing.assert_array_equal(second[68:132, 6 * 68 : 6 * 68 + 64], newest)
    marks = [tuple(second[139, column * 68 + 10].tolist()) for column in range(16)]
    assert marks == [GREY, GREEN] * 3 + [EMPTY] * 10
    assert (second[142:] == 24).all() and (first[136:] == 24).all(), "lines of decisions to come are empty"


def test_all_pictures_of_an_environment_have_one_size(make):
    env = RenderCollection(make())
    assert play_episode(env) == 10
    pictures = env.render()
    # Two rows of frames, two gaps, and a line for each of the ten frames after which there may be a decision.
    assert [picture.shape for picture in pictures] == [(2 * 64 + 2 * 4 + 10 * 6, 16 * 68 - 4, 3)] * 11
    lines = [[bool((picture[139 + 6 * line] != 24).any()) for line in range(10)].count(True) for picture in pictures]
    assert lines == list(range(11)), "every decision adds a line"


@pytest.mark.parametrize(("size", "num_frames"), [(256, 16), (64, 72), (64, 300)])
def test_long_and_large_clips_are_shrunk_to_an_even_size_that_encoders_take(tiny_workload, size, num_frames):
    workload = replace(tiny_workload, num_predict=num_frames - 5)
    clip = np.full((num_frames, 3, size, size), 0.5, dtype=np.float32)
    shapes = {render_workload_episode(workload, clip, clip[:count], []).shape for count in (0, 1, num_frames - 5)}
    assert len(shapes) == 1
    (height, width, _) = shapes.pop()
    assert width <= MAX_WIDTH and width % 2 == height % 2 == 0
    assert (render_workload_episode(workload, clip, clip[:0], [])[:2, :2] == 128).all()


def test_the_space_of_rendered_observations_is_what_is_rendered(make):
    env = AddRenderObservation(make(), render_only=True)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    for _ in range(3):
        observation, *_ = env.step(np.ones(6, dtype=np.int8))
        assert observation in env.observation_space


@needs_moviepy
def test_gymnasium_records_videos(make, tmp_path):
    import av

    env = RecordVideo(make(), str(tmp_path), disable_logger=True)
    decisions = play_episode(env)
    env.close()
    (path,) = tmp_path.glob("*.mp4")
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == decisions + 1 and frames[0].shape == (196, 1084, 3)


@needs_moviepy
def test_gymnasium_saves_videos(make, tmp_path):
    from gymnasium.utils.save_video import save_video

    env = RenderCollection(make())
    play_episode(env)
    save_video(env.render(), str(tmp_path), fps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["rl-video-episode-0.mp4"]


@needs_pygame
def test_the_human_mode_shows_every_step_in_a_window(make, tiny_host_folder, no_screen):
    import pygame

    options = {"host": str(tiny_host_folder), "device": "cpu"}
    env = gym.make("far_env/Pan-v0", render_mode="human", **options)
    reference = gym.make("far_env/Pan-v0", render_mode="rgb_array", **options)
    env.metadata["render_fps"] = 1000
    for each in (env, reference):
        each.reset(seed=0)
        each.step(np.array([0, 1, 0, 1, 0, 1]))
        each.step(np.array([1, 1, 0, 1, 0, 1]))
    pixels = pygame.surfarray.array3d(pygame.display.get_surface()).transpose(1, 0, 2)
    np.testing.assert_array_equal(pixels, reference.render())
    env.close()
    window = HumanRendering(make())
    window.metadata["render_fps"] = 1000
    assert play_episode(window) == 10
    window.close()


def test_the_human_mode_without_pygame_says_what_to_install(tiny_host_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = gym.make("far_env/Pan-v0", render_mode="human", host=str(tiny_host_folder), device="cpu")
    with pytest.raises(gym.error.DependencyNotInstalled, match="pygame is not installed, run `pip install"):
        env.reset()


def test_gymnasiums_checker_passes_on_a_registered_environment(tiny_host_folder):
    """With its specification, by which the checker makes the environment again in every render mode."""
    env = gym.make("far_env/Pan-v0", render_mode="rgb_array", host=str(tiny_host_folder), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # That frames are a matrix is meant.
        warnings.filterwarnings("ignore", message=".*neither an image, nor a 1D vector.*")
        check_env(env.unwrapped)


def test_the_vector_environment_renders_a_tuple_of_one_picture_per_row(make, make_vector):
    vector, singles = make_vector(2), [make(), make()]
    with pytest.raises(gym.error.ResetNeeded, match="before render"):
        vector.render()
    vector.reset(seed=3)
    action = np.array([0, 1, 0, 1, 0, 1])
    vector.step(np.stack([action, action]))
    pictures = vector.render()
    assert isinstance(pictures, tuple) and len(pictures) == 2
    for row, env in enumerate(singles):
        env.reset(seed=3 + row)
        env.step(action)
        # Batched sums differ in their last bits, which may move a rounded pixel by one.
        assert np.abs(pictures[row].astype(int) - env.render()).max() <= 1
    with pytest.raises(ValueError, match="no render_mode 'human'; use 'rgb_array'"):
        make_vector(2, render_mode="human")


def test_registered_ids_render_in_both_forms(tiny_host_folder):
    options = {"host": str(tiny_host_folder), "device": "cpu", "render_mode": "rgb_array"}
    single = gym.make("far_env/Pan-v0", **options)
    vector = gym.make_vec("far_env/Pan-v0", num_envs=2, **options)
    shapes = set()
    for env in (single, vector):
        env.reset(seed=0)
        pictures = env.render()
        shapes |= {picture.shape for picture in (pictures if isinstance(pictures, tuple) else (pictures,))}
    assert shapes == {(196, 1084, 3)}


def test_sb3_gets_the_pictures_of_all_rows(make_vector):
    env = SB3VecEnv(make_vector(2, autoreset_mode="SAME_STEP"))
    env.reset()
    assert env.render_mode == "rgb_array"
    images = env.get_images()
    assert [image.shape for image in images] == [(196, 1084, 3)] * 2
    tiled = env.render()
    assert tiled.ndim == 3 and tiled.shape[0] * tiled.shape[1] >= 2 * 196 * 1084
    blind = SB3VecEnv(make_vector(2, autoreset_mode="SAME_STEP", render_mode=None))
    assert blind.get_images() == [None, None]
