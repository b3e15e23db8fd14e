"""What histories take against the tensors of a rollout, and the refusal of what cannot fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from far_env.host.far_host import FARHost
from far_env.host.far_long import make_transformer
from far_env.host.zoo import RELEASED
from far_env.rollout import history_memory
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.history_memory import history_bytes
from far_env.rollout.play import play


def test_it_is_what_a_rollout_holds_and_what_is_put_together_for_a_frame(tiny_workload, monkeypatch):
    batch, made = RolloutBatch(tiny_workload, 1), []
    model = tiny_workload.host.transformer
    batch.begin([0], [tiny_workload.clips.clip("test", 0)], [1])
    batch.advance([0])
    new_memory = model.new_memory
    monkeypatch.setattr(model, "new_memory", lambda *args: made.append(new_memory(*args)) or made[-1])
    kept = batch.history_length(0)
    batch.advance([0])
    assert history_bytes(tiny_workload, kept) == batch.cache_bytes(0) + made[-1].nbytes


def test_three_hundred_frames_of_far_b_by_hand(tiny_workload):
    with torch.device("meta"):
        model = make_transformer(RELEASED["far_b_ucf101"].config)
    host = FARHost("FAR-B", model, None, "", (32, 8, 8), 64, 20)
    workload = replace(tiny_workload, host=host)
    layers, tokens, width = 12, 64, 768
    assert history_bytes(workload, 300) == 2 * layers * width * 4 * tokens * (2 * 300 + 1)


def test_what_cannot_fit_is_refused_before_the_first_frame(tiny_workload, monkeypatch):
    clips = [tiny_workload.clips.clip("test", i) for i in range(2)]
    needed = 2 * history_bytes(tiny_workload, tiny_workload.num_frames - 1)
    monkeypatch.setattr(history_memory, "free_bytes", lambda device: needed)
    play(replace(tiny_workload, num_steps=1), clips, [1, 2], None, 4)
    monkeypatch.setattr(history_memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"of all 2 rollouts .* GiB are free: use a smaller batch"):
        play(tiny_workload, clips, [1, 2], None, 4)
