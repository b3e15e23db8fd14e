"""What a host is trained on: worlds, videos, episodes with actions and latents, in shares, encoded once and mapped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from far_env.cli import main
from far_env.clips.worlds import WORLDS
from far_env.config import from_dict, load_yaml, save_yaml
from far_env.errors import TrainingStopped
from far_env.evaluation.host_training import train_host
from far_env.host.far import FAR
from far_env.host.far_long import FARLong
from far_env.host.training import latent_cache, loop
from far_env.host.training.config import AutoencoderTraining, HostTraining, Source, TransformerTraining
from far_env.host.training.episodes import find_episodes
from far_env.host.training.histories import read_batch
from far_env.host.training.latent_cache import EncodedEpisodes, encode_episodes, open_encoded
from far_env.host.training.train import encode_sources
from tests.clips.test_video import write_video
from tests.conftest import TINY_DCAE, TINY_FAR, TINY_FAR_LONG

ACTIONS = {"condition_cfg": {"type": "action", "num_action_classes": 3}}


@pytest.fixture
def videos(tmp_path):
    """Twelve videos of 20 to 31 frames in two folders; of the list, numbers 0 and 10 are test, 1 and 11 validation."""
    for number in range(12):
        write_video(tmp_path / "videos" / f"class_{number // 6}" / f"v_{number:02d}.mp4", 20 + number)
    return tmp_path / "videos"


@pytest.fixture
def episodes(tmp_path):
    """Twelve episodes of 18 to 29 random frames with actions 0 … 2; that of frame t is t mod 3."""
    rng = np.random.default_rng(0)
    (tmp_path / "episodes").mkdir()
    for number in range(12):
        video = rng.integers(0, 256, (18 + number, 64, 64, 3), dtype=np.uint8)
        actions = np.arange(18 + number) % 3
        np.savez(tmp_path / "episodes" / f"e_{number:02d}.npz", video=video, actions=actions)
    return tmp_path / "episodes"


def training(tmp_path, *sources, model=None, **changes) -> HostTraining:
    """A training of seconds: a tiny autoencoder, then a tiny transformer."""
    transformer = {"model": {**TINY_FAR, **(model or {})}, "steps": 4, "clips_per_world": 6, "batch_size": 4, "warmup": 1}
    return HostTraining(
        sources=tuple(sources),
        run_dir=str(tmp_path / "run"),
        output_dir=str(tmp_path / "host"),
        device="cpu",
        precision="float32",
        quality_clips=0,
        autoencoder=AutoencoderTraining(model=TINY_DCAE, steps=2, batch_size=8, warmup=1),
        transformer=TransformerTraining(**{**transformer, **changes.pop("transformer", {})}),
        **changes,
    )


def encoded(source: Source, autoencoder, folder, model=None, clips_per_world=6, size=64) -> EncodedEpisodes:
    found = find_episodes(source, size, clips_per_world)
    encode_episodes(found, autoencoder, folder, model or FAR(**TINY_FAR))
    return open_encoded(found, autoencoder, folder)


def test_a_host_is_trained_from_a_folder_of_videos_of_another_size(videos, tmp_path):
    config = training(tmp_path, Source(str(videos), frames=18), frame_size=32)
    host = train_host(config)
    assert host.frame_size == 32 and host.latent_shape == (4, 4, 4)
    assert host.transformer.proj_out.weight.abs().max() > 0, "something was learned"
    card = (tmp_path / "host" / "README.md").read_text()
    assert "videos" in card and "32×32" in card and "Not measured." in card


def test_videos_and_worlds_of_different_lengths_train_one_host_with_actions(episodes, tmp_path):
    sources = (Source(str(episodes), 2.0, frames=12), Source("orbit", frames=40), Source("pan", classes=False))
    config = training(tmp_path, *sources, model={**TINY_FAR_LONG}, validation={"every": 2, "clips": 2, "targets": 2})
    config = dataclasses.replace(config, validation=from_dict(type(HostTraining().validation), config.validation, "test"))
    host = train_host(config)
    assert isinstance(host.transformer, FARLong) and host.transformer.null_class == 3
    assert sorted(path.name[:4] for path in (tmp_path / "run" / "latents").iterdir()) == ["epis", "orbi", "pan_"]
    card = (tmp_path / "host" / "README.md").read_text()
    assert re.search(r"^\| episodes( \| (\d+\.\d\d|–)){6} \| \d+% \|$", card, re.MULTILINE)
    assert "it takes actions, 3 classes" in card and "orbit (25%)" in card


def test_the_cache_holds_the_latents_and_the_actions_of_every_train_episode(episodes, autoencoder, tmp_path):
    source = encoded(Source(str(episodes), frames=12), autoencoder, tmp_path / "latents")
    train = [number for number in range(12) if number % 10 > 1]
    assert len(source) == len(train)
    for index, number in enumerate(train):
        arrays = np.load(episodes / f"e_{number:02d}.npz")
        frames = np.array([0, 5, 7, 17])
        history = source.read(index, frames)
        pixels = torch.from_numpy(arrays["video"][frames]).permute(0, 3, 1, 2)[None] / 255
        torch.testing.assert_close(
            torch.from_numpy(history.latents).float(), autoencoder.encode(pixels)[0], rtol=2e-3, atol=2e-3
        )
        assert history.actions.tolist() == arrays["actions"][frames].tolist()
        assert source.length(index) == 18 + number


def test_reading_maps_files_in_place_of_loading_them(autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "CHUNK_FRAMES", 40)
    source = encoded(Source("pan"), autoencoder, tmp_path / "latents")
    files = sorted(tmp_path.glob("latents/pan_*/latents_*.npy"))
    assert [np.load(path).shape[0] for path in files] == [48, 48], "a chunk ends with a whole episode"
    assert isinstance(latent_cache._mapped(files[0]), np.memmap)
    frames = torch.from_numpy(WORLDS["pan"].clip("train", 4).frames)[None]
    actual = torch.from_numpy(source.read(4, np.arange(16)).latents).float()
    torch.testing.assert_close(actual, autoencoder.encode(frames)[0], rtol=2e-3, atol=2e-3)


def test_mirrored_videos_are_other_episodes(videos, autoencoder, tmp_path):
    found = find_episodes(Source(str(videos), frames=18, flip=True), 64, 0)
    assert found.count() == 16 and found.length(3) == found.length(11)
    plain, mirrored = (np.concatenate(list(found.blocks(index))) for index in (3, 11))
    np.testing.assert_array_equal(mirrored, plain[..., ::-1])
    assert not np.array_equal(mirrored, plain)


def test_fars_lists_give_labels_and_latents_which_are_scaled_but_not_encoded(autoencoder, tmp_path):
    rng = np.random.default_rng(1)
    stored = [torch.from_numpy(rng.normal(size=(9, 4, 8, 8)).astype(np.float32)) for _ in range(12)]
    for number, latents in enumerate(stored):
        torch.save(latents, tmp_path / f"{number}.pt")
    entries = [{"latent_path": f"{number}.pt", "label": number % 5} for number in range(12)]
    (tmp_path / "some_train.json").write_text(json.dumps(entries))
    model = FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": 5})
    source = encoded(Source(str(tmp_path), frames=6), autoencoder, tmp_path / "latents", model)
    train = [number for number in range(12) if number % 10 != 1]
    assert [source.read(index, np.arange(2)).label for index in range(len(source))] == [number % 5 for number in train]
    expected = 0.8 * stored[train[3]][2:5]
    torch.testing.assert_close(
        torch.from_numpy(source.read(3, np.arange(2, 5)).latents).float(), expected, rtol=1e-3, atol=1e-3
    )
    batch = read_batch([(source, 3, np.arange(3))], np.array([1]), model)
    assert batch.classes.tolist() == [train[3] % 5]
    with pytest.raises(ValueError, match="labels from 0 to 4, the host has 3 classes, 0 to 2"):
        encoded(
            Source(str(tmp_path), frames=6),
            autoencoder,
            tmp_path / "latents",
            FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": 3}),
        )
    with pytest.raises(ValueError, match="a source holds latents, so their autoencoder cannot be trained; name it with"):
        train_host(training(tmp_path, Source(str(tmp_path), frames=6)))


def test_folders_are_the_classes_of_videos_without_a_list(videos):
    found = find_episodes(Source(str(videos), frames=18), 64, 0)
    assert [found.classes(index).label for index in range(found.count())] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (Source("pna"), {}, "unknown source 'pna'; did you mean 'pan'.*no folder of that name"),
        (Source("EMPTY"), {}, "empty holds no .mp4, .avi or .npz file"),
        (Source("EPISODES", dataset="ucf10"), {}, "unknown data set 'ucf10'; did you mean 'ucf101'"),
        (Source("EPISODES", protocol="fra"), {}, "unknown protocol 'fra'; did you mean 'far'"),
        (Source("EPISODES", frames=40), {}, "no usable video in .*all 12 are damaged or shorter than 40 frames"),
        (Source("pan", frames=17), {}, "the source pan has clips of 16 frames; its frames cannot be 17"),
        (Source("pan", flip=True), {}, "pan is a world, which takes no interval, flip"),
        (Source("pan"), {"frame_size": 128}, "the source pan draws frames of 64², the host works on 128²"),
        (Source("EPISODES"), {"frame_size": 24}, "frame_size 24 must be a multiple of 16: the autoencoder's compression 8"),
        (Source("EPISODES"), {"frame_size": 32, "start_from": "embedded"}, "the host embedded works on frames of 64²; set"),
        (Source("EPISODES"), {"autoencoder_from": "a", "start_from": "b"}, "leave autoencoder_from out"),
        (Source("pan"), {"transformer": {"batch_size": 6, "gradient_accumulation": 4}}, "batch_size 6 must be a multiple of 4"),
    ],
)
def test_sources_that_do_not_fit_are_named_in_one_sentence(episodes, tmp_path, source, changes, message):
    (tmp_path / "empty").mkdir()
    places = {"EPISODES": str(episodes), "EMPTY": str(tmp_path / "empty")}
    source = dataclasses.replace(source, clips=places.get(source.clips, source.clips))
    model = {"in_channels": 16, "out_channels": 16} if "start_from" in changes else {}
    with pytest.raises(ValueError, match=message) as caught:
        train_host(training(tmp_path, source, model=model, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_actions_outside_the_classes_of_the_host_and_missing_ones_are_named(episodes, videos, tmp_path, capsys):
    two = {"condition_cfg": {"type": "action", "num_action_classes": 2}}
    path = tmp_path / "two.yaml"
    save_yaml(training(tmp_path, Source(str(episodes), frames=12), model=two), path)
    assert main(["train-host", "--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "found before the autoencoder is trained"
    assert "the source episodes has actions from 0 to 2, the host has 2 classes, 0 to 1; set the number" in message
    with pytest.raises(
        ValueError, match="the source videos has no actions, on which the host is conditioned; set classes: false"
    ):
        train_host(training(tmp_path / "other", Source(str(videos), frames=12), model=ACTIONS))


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["pan", "cuts=2"], (Source("pan"), Source("cuts", 2.0))),
        ({"pan": 2, "videos/mine": 1}, (Source("pan", 2.0), Source("videos/mine"))),
        (["pan", {"clips": "x", "frames": 4}], (Source("pan"), Source("x", frames=4))),
    ],
)
def test_sources_are_a_list_of_names_a_mapping_to_shares_or_mappings_of_settings(tmp_path, sources, expected):
    config = from_dict(HostTraining, {"sources": sources}, "file")
    assert config.sources == expected
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_yaml(HostTraining, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "sources is empty"),
        (["pan", 3], "entry 2 must be a name or a mapping"),
        (["pan=x"], "the share of pan must be a number above 0, got 'x'"),
        (["pan=0"], "the share of pan must be a number above 0, got '0'"),
        ({"pan": -1}, "share must be above 0, got -1"),
        (["pan", "pan"], "pan is named twice; give it one larger share"),
        ([{"share": 2}], "entry 1 needs clips"),
        ([{"clips": "pan", "frame": 2}], "entry 1: unknown key 'frame'; did you mean 'frames'"),
        ([{"clips": "pan", "frames": 1}], "frames must be at least 2, got 1"),
    ],
)
def test_sources_of_a_wrong_form_are_named(sources, message):
    with pytest.raises(ValueError, match=message):
        from_dict(HostTraining, {"sources": sources}, "file")


def test_the_old_key_names_the_new_one():
    with pytest.raises(ValueError, match="the key 'worlds' was renamed; use 'sources'"):
        from_dict(HostTraining, {"worlds": ["pan"]}, "file")


def test_latents_are_encoded_beforehand_by_the_command_and_then_used(episodes, tiny_host_folder, tmp_path, capsys):
    config = training(tmp_path, Source(str(episodes), frames=12), autoencoder_from=str(tiny_host_folder), model=ACTIONS)
    save_yaml(config, tmp_path / "config.yaml")
    assert main(["data", "encode", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "episodes: 8 episodes encoded" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "latents").rglob("*.np[yz]")}
    assert files
    host = train_host(config)
    assert {path: path.stat().st_mtime_ns for path in files} == files, "training did not encode again"
    other = dataclasses.replace(config, run_dir=str(tmp_path / "b"), output_dir=str(tmp_path / "b" / "host"))
    assert train_host(other).weights_hash == host.weights_hash
    with pytest.raises(ValueError, match="the autoencoder does not exist before the training; name one with"):
        encode_sources(training(tmp_path, Source(str(episodes))))


@pytest.mark.parametrize("objective", ["teacher_forcing", "far"])
def test_a_resumed_training_with_actions_has_the_weights_of_an_unbroken_one(
    episodes, tiny_host_folder, tmp_path, monkeypatch, objective
):
    sources = (Source(str(episodes), 2.0, frames=12), Source("cuts", classes=False))
    changes = {"objective": objective, "gradient_accumulation": 2, "schedule": "constant", "steps": 5}
    whole = training(
        tmp_path,
        *sources,
        model=TINY_FAR_LONG,
        transformer=changes,
        autoencoder_from=str(tiny_host_folder),
        checkpoint_every=100,
    )
    expected = train_host(whole).weights_hash
    latents = tmp_path / "run" / "latents"
    broken = dataclasses.replace(
        whole, run_dir=str(tmp_path / "b"), output_dir=str(tmp_path / "b/host"), latents_dir=str(latents)
    )

    class StopSoon(loop._InterruptFlag):
        def __enter__(self):
            super().__enter__().raised = True
            return self

    monkeypatch.setattr(loop, "_InterruptFlag", StopSoon)
    for _ in range(3):
        with pytest.raises(TrainingStopped):
            train_host(broken)
    monkeypatch.undo()
    assert train_host(broken).weights_hash == expected


def test_a_part_of_the_batch_at_a_time_gives_the_weights_of_the_whole_batch(episodes, tiny_host_folder, tmp_path):
    weights = []
    for parts in (1, 4):
        config = training(
            tmp_path / str(parts),
            Source(str(episodes), frames=12),
            model=ACTIONS,
            transformer={"gradient_accumulation": parts},
            autoencoder_from=str(tiny_host_folder),
            latents_dir=str(tmp_path / "latents"),
        )
        host = train_host(config)
        weights.append(torch.cat([parameter.flatten() for parameter in host.transformer.parameters()]))
        shutil.rmtree(tmp_path / str(parts))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-3)


def test_a_run_that_was_begun_before_an_option_existed_is_continued(tiny_host_folder, tmp_path):
    config = training(tmp_path, Source("pan"), autoencoder_from=str(tiny_host_folder))
    expected = train_host(config).weights_hash
    path = tmp_path / "run" / "training.json"
    settings = json.loads(path.read_text())
    del settings["transformer"]["class_dropout"], settings["sources"][0]["train_list"]
    path.write_text(json.dumps(settings))
    assert train_host(config).weights_hash == expected
    path.write_text(json.dumps({**settings, "worlds": ["pan"]}))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_host(config)
