"""Episodes of known latents: the cache that holds them, and the batches that are drawn from it."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest

from far_env.config import load_yaml
from far_env.errors import VideoError
from far_env.host.far import FAR
from far_env.host.far_long import FARLong
from far_env.host.training import latent_cache
from far_env.host.training.config import HostTraining, TransformerTraining
from far_env.host.training.episodes import Classes
from far_env.host.training.histories import draw_histories, draw_windows, is_contiguous
from far_env.host.training.latent_cache import EncodedEpisodes, encode_episodes, open_encoded
from tests.conftest import TINY_FAR, TINY_FAR_LONG
from tests.host.test_training import ROOT


class Fake:
    """Episodes of known latents: episode e, frame t is filled with 100·e + t."""

    holds_latents, classes_given, interval = True, True, 1

    def __init__(self, name, lengths, frames, interval=1, broken=()):
        self.name, self.lengths, self.frames, self.interval, self.broken = name, lengths, frames, interval, broken
        self.facts = {"fake": name, "lengths": list(lengths)}
        self.read = []

    def count(self):
        return len(self.lengths)

    def length(self, index):
        return self.lengths[index]

    def classes(self, index):
        return Classes(np.arange(self.lengths[index]) % 3)

    def blocks(self, index):
        self.read.append(index)
        values = 100 * index + np.arange(self.lengths[index], dtype=np.float32)
        latents = np.broadcast_to(values[:, None, None, None], (len(values), 4, 2, 2)) / 0.8
        yield latents[:5]
        if index in self.broken:
            raise VideoError(f"{self.name}/{index} is damaged")
        yield latents[5:]


def opened(fake, autoencoder, folder) -> EncodedEpisodes:
    encode_episodes(fake, autoencoder, folder, FAR(**TINY_FAR))
    return open_encoded(fake, autoencoder, folder)


def frames_of(source, index, numbers) -> list[int]:
    return source.read(index, np.array(numbers)).latents[:, 0, 0, 0].astype(int).tolist()


def test_a_damaged_file_is_skipped_and_the_others_keep_their_places(autoencoder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        source = opened(Fake("some", [8, 9, 7, 3], 4, broken=[1]), autoencoder, tmp_path)
    assert "skipping: some/1 is damaged" in caplog.text
    assert len(source) == 2 and source.skipped == 2, "one is damaged, one too short"
    assert frames_of(source, 0, [0, 7]) == [0, 7] and frames_of(source, 1, [0, 6]) == [200, 206]
    assert source.read(1, np.arange(7)).actions.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_full_disk_leaves_what_was_encoded_and_the_same_call_goes_on(autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "CHUNK_FRAMES", 10)
    fake = Fake("some", [10, 10, 10], 4)
    append = latent_cache._GrowingArray.append

    def full(self, rows):
        if rows[0, 0, 0, 0] >= 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(latent_cache._GrowingArray, "append", full)
    with pytest.raises(ValueError, match=r"cannot write .*latents_000001\.npy: No space left on device"):
        opened(fake, autoencoder, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["chunk_000000.npz", "latents_000000.npy", "source.json"]
    monkeypatch.setattr(latent_cache._GrowingArray, "append", append)
    fake.read.clear()
    source = opened(fake, autoencoder, tmp_path)
    assert fake.read == [1, 2] and frames_of(source, 2, [9]) == [209]


def test_parts_of_several_processes_make_the_same_cache_as_one(autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "CHUNK_FRAMES", 10)
    fake, model = Fake("some", [6, 6, 6, 6, 6, 6, 6], 4), FAR(**TINY_FAR)
    opened(fake, autoencoder, tmp_path / "one")
    for index in (1, 0):
        encode_episodes(fake, autoencoder, tmp_path / "two", model, slice(index, None, 2))
    open_encoded(fake, autoencoder, tmp_path / "two")
    for path in tmp_path.glob("one/*/*.npy"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()


def test_shares_decide_how_often_a_source_is_drawn_and_lengths_how_long_a_batch_is(autoencoder, tmp_path):
    sources = [
        opened(Fake("short", [30] * 3, 8), autoencoder, tmp_path),
        opened(Fake("long", [40] * 3, 24), autoencoder, tmp_path),
        opened(Fake("also_short", [25] * 3, 8), autoencoder, tmp_path),
    ]
    config, model = TransformerTraining(batch_size=8), FAR(**TINY_FAR)
    counts, longest = dict.fromkeys(["short", "long", "also_short"], 0), dict.fromkeys(["short", "long", "also_short"], 0)
    mixed = 0
    for step in range(400):
        rows, predicted = draw_histories(config, sources, [1, 4, 3], model, 0, step)
        names = {source.name for source, _, _ in rows}
        assert names == {"long"} or "long" not in names, "a batch has windows of one length"
        mixed += len(names) == 2
        assert len({len(frames) for _, _, frames in rows}) == 1 and predicted.max() < len(rows[0][2])
        for source, episode, frames in rows:
            counts[source.name] += 1
            assert frames[0] >= 0 and frames[-1] < source.length(episode) and frames[-1] - frames[0] < source.window
            longest[source.name] = max(longest[source.name], len(frames))
    total = sum(counts.values())
    drawn = [counts[name] / total for name in ("short", "long", "also_short")]
    assert drawn == pytest.approx([1 / 8, 4 / 8, 3 / 8], abs=0.06)
    assert mixed > 100 and longest["long"] > 16 and longest["short"] == 8


def test_windows_keep_their_interval_and_reach_every_place_of_an_episode(autoencoder, tmp_path):
    source = opened(Fake("some", [12], 4, interval=3), autoencoder, tmp_path)
    config, model = TransformerTraining(batch_size=8), FAR(**TINY_FAR)
    starts = set()
    for step in range(20):
        for _, _, frames in draw_windows(config, [source], [1.0], model, 0, step):
            assert np.diff(frames).tolist() == [3, 3, 3]
            starts.add(int(frames[0]))
    assert starts == {0, 1, 2}


def test_windows_of_a_long_transformer_have_random_lengths_from_its_window_on(autoencoder, tmp_path):
    source = opened(Fake("some", [20], 12), autoencoder, tmp_path)
    config, model = TransformerTraining(batch_size=4), FARLong(**TINY_FAR_LONG)
    lengths = [{len(frames) for *_, frames in draw_windows(config, [source], [1.0], model, 0, step)} for step in range(60)]
    assert {len(each) for each in lengths} == {1} and set.union(*lengths) == set(range(6, 12)), (
        "as in FAR, not the whole window"
    )


def test_the_batches_of_the_shipped_configuration_are_those_that_the_shipped_hosts_saw(autoencoder, tmp_path):
    config = load_yaml(HostTraining, ROOT / "configs" / "host_embedded.yaml").transformer
    model, counts = FAR(**TINY_FAR), (7, 5)
    sources = [opened(Fake(f"w{n}", [16] * count, 16), autoencoder, tmp_path) for n, count in enumerate(counts)]
    for step in range(11):
        # How batches were drawn before there were sources: the same numbers in the same order.
        rng = np.random.default_rng((3, 2, step))
        if is_contiguous(config, step):
            older, tail = 0, int(rng.integers(config.min_contiguous, 17))
            expected_predicted = 1 + np.sort(rng.choice(tail - 1, config.contiguous_predicted, replace=False))
        else:
            older, tail = int(rng.integers(config.max_older + 1)), int(rng.integers(2, config.max_tail + 1))
            expected_predicted = np.arange(older + 1, older + tail)
        rows, predicted = draw_histories(config, sources, [1.0, 1.0], model, 3, step)
        assert predicted.tolist() == expected_predicted.tolist()
        for row, (source, episode, frames) in enumerate(rows):
            assert source is sources[row % 2] and episode == rng.integers(counts[row % 2])
            end = int(rng.integers(older + tail, 17))
            expected = [*np.sort(rng.choice(end - tail, size=older, replace=False)), *range(end - tail, end)]
            assert frames.tolist() == expected
