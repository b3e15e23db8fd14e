"""Interventions on the memory: equal to the specification, without effect on the rollout, and the same in every batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from far_env import baselines, cli
from far_env.contract import copy_for_clip
from far_env.errors import VideoError
from far_env.evaluation.evaluate import evaluate_grid
from far_env.metrics import psnr
from far_env.rollout.intervention import INTERVENTIONS, IntervenedFrames, Intervention, check_interventions, partner_of
from far_env.rollout.memo import FrameMemo
from far_env.rollout.play import play, replay
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from tests.rollout.test_actions import Steered
from tests.rollout.test_rollout import Sloppy
from tests.rollout.test_signals import Asks

ATOL = 1e-4
BUDGETS = [1, 2, 4, 9999]


@pytest.fixture(params=["far", "far_long", "far_long with actions", "far with true frames"])
def workload(tiny_workload, tiny_long_workload, request) -> Workload:
    """5 + 6 frames, 3 ODE steps; FAR-Long's window has six frames."""
    chosen = replace(tiny_long_workload if "far_long" in request.param else tiny_workload, num_predict=6)
    if "actions" in request.param:
        chosen = replace(chosen, name="steered", clips=Steered(11), actions=True, guidance=1.5)
    return replace(chosen, feedback="true" if "true" in request.param else "generated")


def clips_of(workload, count=4):
    clips = [workload.clips.clip("test", i) for i in range(count)]
    return clips, [workload.clips.clip("test", partner_of(workload.clips, "test", i)) for i in range(count)]


def bare(intervention):
    """`Intervention.replace` of latents without keys."""
    return lambda kept, numbers, step: [latent for latent, _ in intervention.replace([(k, "") for k in kept], numbers, step)]


@pytest.mark.parametrize("memo_bytes", [0, 2**24])
def test_a_ragged_batch_equals_the_specification_and_leaves_the_rollout_alone(workload, memo_bytes):
    clips, partners = clips_of(workload)
    seeds, memo = range(100, 104), FrameMemo(memo_bytes)
    undisturbed, decided = play(workload, clips, seeds, Sloppy(), BUDGETS)
    for _ in range(2 if memo_bytes else 1):
        intervened = IntervenedFrames(INTERVENTIONS, workload, seeds, partners, memo)
        batch, decisions = play(workload, clips, seeds, Sloppy(), BUDGETS, memo=memo, before_frame=intervened)
    # With guidance, rollouts differ in the last bits between batches, also those that the memo shares.
    atol = ATOL if workload.guidance > 1 else 0
    torch.testing.assert_close(batch.generated(range(4)), undisturbed.generated(range(4)), atol=atol, rtol=0)
    assert decisions == decided
    for name in INTERVENTIONS:
        for row, (clip, seed, budget) in enumerate(zip(clips, seeds, BUDGETS, strict=True)):
            replaced = bare(Intervention(name, workload, seed, partners[row]))
            policy = copy_for_clip(Sloppy(), seed)
            expected = reference_rollout(workload, clip, policy, budget, seed, replaced=replaced)
            torch.testing.assert_close(intervened.latents(name)[row], expected.intervened, atol=ATOL, rtol=0)
            torch.testing.assert_close(batch.generated([row])[0], expected.latents, atol=ATOL, rtol=0)
    with torch.no_grad():
        frames = workload.host.autoencoder.decode(intervened.latents("swap"))
    assert torch.equal(intervened.decode("swap"), frames)


def test_frames_do_not_depend_on_the_batch_or_on_what_else_is_measured(workload):
    clips, partners = clips_of(workload)
    seeds = range(7, 11)
    together = IntervenedFrames(INTERVENTIONS, workload, seeds, partners)
    play(workload, clips, seeds, Asks(("lat_cos", "attn_mass")), 3, before_frame=together)
    for name in INTERVENTIONS:
        for row in range(4):
            alone = IntervenedFrames([name], workload, seeds[row : row + 1], partners[row : row + 1])
            play(workload, clips[row : row + 1], seeds[row : row + 1], Asks(("lat_cos", "attn_mass")), 3, before_frame=alone)
            atol = ATOL if workload.guidance > 1 else 0
            torch.testing.assert_close(alone.latents(name)[0], together.latents(name)[row], atol=atol, rtol=0)


def test_a_replay_intervenes_alike(workload):
    clips, partners = clips_of(workload)
    seeds = range(4)
    first = IntervenedFrames(INTERVENTIONS, workload, seeds, partners)
    _, decisions = play(workload, clips, seeds, baselines.make("uniform"), 3, before_frame=first)
    second = IntervenedFrames(INTERVENTIONS, workload, seeds, partners)
    replay(workload, clips, seeds, [{d.step: d.kept for d in row} for row in decisions], before_frame=second)
    assert all(torch.equal(first.latents(name), second.latents(name)) for name in INTERVENTIONS)


def test_only_the_frames_before_the_newest_are_replaced_and_by_what_is_said(tiny_workload):
    _, partners = clips_of(tiny_workload, 1)
    kept = [(torch.randn(tiny_workload.host.latent_shape), f"key {i}") for i in range(4)]
    numbers = [0, 3, 7, 9]

    def after(name, seed=5, step=4, kept=kept, numbers=numbers):
        return Intervention(name, tiny_workload, seed, partners[0]).replace(kept, numbers, step)

    for name in INTERVENTIONS:
        frames = after(name)
        assert len(frames) == 4 and frames[-1] is kept[-1]
        assert after(name, kept=kept[:1], numbers=[0]) == kept[:1] and after(name, kept=[], numbers=[]) == []
    with torch.no_grad():
        true = tiny_workload.host.autoencoder.encode(torch.from_numpy(partners[0].frames)[None])[0]
        grey = tiny_workload.host.autoencoder.encode(torch.full((1, 1, 3, 64, 64), 0.5))[0, 0]
    for (latent, _), number in zip(after("swap")[:-1], numbers, strict=False):
        torch.testing.assert_close(latent, true[number], atol=1e-5, rtol=0)
    assert all(torch.allclose(latent, grey, atol=1e-5) for latent, _ in after("blank")[:-1])
    one, other = after("noise"), after("noise", step=5, kept=kept[1:], numbers=numbers[1:])
    assert torch.equal(one[1][0], other[0][0]) and one[1][1] == other[0][1], "a frame's noise is the same at every step"
    assert not torch.equal(one[0][0], one[1][0]) and not torch.equal(one[0][0], after("noise", seed=6)[0][0])
    drawn = torch.stack(
        [latent for number in range(40) for latent, _ in after("noise", kept=kept[:2], numbers=[number, 99])[:1]]
    )
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1


def test_a_shuffle_is_any_order_but_the_present_one(tiny_workload):
    kept = [(torch.full((1,), float(i)), str(i)) for i in range(4)]
    shuffle = Intervention("shuffle", tiny_workload, 3)
    orders = Counter("".join(key for _, key in shuffle.replace(kept, range(4), step)) for step in range(1000))
    assert set(orders) == {"".join(order) + "3" for order in permutations("012")} - {"0123"}
    assert all(150 < count < 250 for count in orders.values())
    assert shuffle.replace(kept[:2], range(2), 0) == kept[:2], "one older frame has no other order"
    assert shuffle.replace(kept, range(4), 5) == Intervention("shuffle", tiny_workload, 3).replace(kept, range(4), 5)


def test_evaluate_measures_psnr_under_interventions_and_changes_nothing_else(tiny_workload, tmp_path):
    workload = replace(tiny_workload, num_predict=5)
    policies = {"uniform": baselines.make("uniform"), "full_history": None}
    shared = {"metrics": ["psnr"], "progress": False}
    plain = evaluate_grid([workload], [3], policies, range(2), **shared)
    results = evaluate_grid([workload], [3], policies, range(2), interventions=["noise", "swap"], out=tmp_path / "r", **shared)
    assert results.settings.metrics == ["psnr", "psnr_swap", "psnr_noise"]
    for before, record in zip(plain.records, results.records, strict=True):
        assert (before.key, before.plan, before.latents_sha256) == (record.key, record.plan, record.latents_sha256)
        assert before.metrics["psnr"] == record.metrics["psnr"]
        clip = workload.clips.clip("test", record.clip)
        partner = workload.clips.clip("test", record.clip + 1)
        replaced = bare(Intervention("swap", workload, record.seed + record.clip, partner))
        expected = reference_rollout(workload, clip, policies[record.policy], 3, record.seed + record.clip, replaced=replaced)
        with torch.no_grad():
            frames = workload.host.autoencoder.decode(expected.intervened[None])[0]
        truth = torch.from_numpy(clip.frames[5:10])
        assert record.metrics["psnr_swap"] == pytest.approx(float(psnr(frames, truth)), abs=1e-3)
    with pytest.raises(ValueError, match="holds an evaluation with metrics"):
        evaluate_grid([workload], [3], policies, range(2), interventions=["blank"], out=tmp_path / "r", **shared)


def test_the_command_has_a_column_for_each_and_validates(tiny_host_folder, tmp_path, capsys):
    args = ["evaluate", "--policies", "sink_recent", "--clips", "2", "--metrics", "psnr", "--host", str(tiny_host_folder)]
    args += ["--device", "cpu", "--out", str(tmp_path / "r")]
    assert cli.main([*args, "--intervene", "swap,shuffle"]) == 0
    assert "PSNR swap dB  PSNR shuffle dB" in capsys.readouterr().out
    assert cli.main(["validate", str(tmp_path / "r"), "--device", "cpu", "--host", str(tiny_host_folder)]) == 0
    assert "2 match (2 to the last bit" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "r"), "--out", str(tmp_path / "r.html"), "--plots", str(tmp_path / "p")]) == 0
    assert "PSNR swap" in (tmp_path / "r.html").read_text() and (tmp_path / "p" / "ranking_pan_b4_psnr_swap.png").exists()
    assert cli.main([*args, "--intervene", "swop"]) == 2
    assert "did you mean 'swap'" in capsys.readouterr().err


class OneClip(Steered):
    def num_clips(self, split):
        return 1


class Damaged(Steered):
    """The file of clip 1 is damaged."""

    def clip(self, split, clip_id):
        if clip_id == 1:
            raise VideoError("clip 1 is damaged")
        return super().clip(split, clip_id)


def test_a_swap_needs_a_second_clip_that_can_be_read(tiny_workload):
    workload = replace(tiny_workload, num_predict=3, clips=Damaged(8))
    policies = {"uniform": baselines.make("uniform")}
    shared = {"metrics": ["psnr"], "progress": False, "interventions": ["swap"]}
    results = evaluate_grid([workload], [3], policies, [0, 1, 7], **shared)
    assert [record.clip for record in results.records] == [7] and set(results.unreadable) == {("tiny_pan", 0), ("tiny_pan", 1)}
    assert partner_of(workload.clips, "test", 7) == 0
    with pytest.raises(ValueError, match="a swap needs two clips, and steered/test has 1"):
        evaluate_grid([replace(workload, clips=OneClip(8))], [3], policies, [0], **shared)
    with pytest.raises(ValueError, match="unknown intervention 'noisy'"):
        check_interventions(["noisy"])


def test_what_the_specification_is_given_decides_the_frame(tiny_workload):
    """The specification's own frame, by hand: the first one after five context frames of which four are another clip's."""
    clip, other = (tiny_workload.clips.clip("test", i) for i in (0, 1))
    rollout = reference_rollout(
        tiny_workload, clip, None, 9999, 3, replaced=bare(Intervention("swap", tiny_workload, 3, other))
    )
    with torch.no_grad():
        mine, theirs = (tiny_workload.host.autoencoder.encode(torch.from_numpy(c.frames[:5])[None])[0] for c in (clip, other))
        noise = torch.randn((1, 1, *tiny_workload.host.latent_shape), generator=torch.Generator().manual_seed(3))[0, 0]
        frame = tiny_workload.host.generate([*theirs[:4], *mine[4:]], noise, tiny_workload.conditions())
    torch.testing.assert_close(rollout.intervened[0], frame, atol=ATOL, rtol=0)
    assert not torch.allclose(rollout.intervened[0], rollout.latents[0], atol=1e-3)
