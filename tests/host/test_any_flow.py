"""AnyFlow-FAR as a host: equal to diffusers' pipeline to the last bit, re-encoded after an eviction, and loaded with care."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers (extra anyflow) is not installed")
pytest.importorskip("ftfy", reason="ftfy (extra anyflow) is not installed")

from diffusers import AnyFlowFARPipeline

from far_env.clips.clip import Clip
from far_env.errors import WeightsError
from far_env.host import any_flow_files
from far_env.host.any_flow import MAX_TEXT_TOKENS, chunk_cost, chunk_sizes, on_meta
from far_env.host.any_flow_files import weight_bytes
from far_env.host.protocol import Unit
from far_env.host.weights import load_host
from far_env.policies import load_policy
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import workload_noise
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from tests.host.tiny_any_flow import save_pipeline

SIZE, FRAMES, STEPS = 32, 33, 2
PROMPT = "a red cat walks over the lawn"
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("any_flow") / "tiny")


@pytest.fixture(scope="module")
def host(folder):
    return load_host(folder, "cpu").with_frame_size(SIZE)


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = AnyFlowFARPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clip():
    frames = np.random.default_rng(0).random((FRAMES, 3, SIZE, SIZE), dtype=np.float32)
    return Clip(0, frames, prompt=PROMPT)


def make(host, num_context, guidance=1.0):
    return Workload("prompted", None, host, num_context, FRAMES - num_context, STEPS, guidance, prompts=True)


def piped(pipeline, noise, **options):
    """The pipeline's latents (L, C, h, w) from noise for all latents of the clip."""
    size = {"height": SIZE, "width": SIZE, "num_frames": 1 + 4 * (len(noise) - 1)}
    call = {"latents": noise[None].permute(0, 2, 1, 3, 4), "num_inference_steps": STEPS, "output_type": "latent"}
    return pipeline(**{"prompt": PROMPT, **size, **call, **options}).frames[0].permute(1, 0, 2, 3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_keeping_everything_equals_the_pipeline_to_the_last_bit(host, pipeline, clip, guidance):
    """Five chunks, so that two of them become coarse."""
    workload = make(host, 0, guidance)
    noise = torch.cat(workload_noise(workload, 42))
    expected = piped(pipeline, noise, guidance_scale=guidance)
    slow = reference_rollout(workload, clip, None, 9999, 42)
    assert torch.equal(slow.latents, expected)
    batch, _ = play(workload, [clip], [42], None, 9999)
    assert torch.equal(batch.generated([0])[0], expected)
    shown = piped(pipeline, noise, guidance_scale=guidance, output_type="pt").permute(1, 0, 2, 3)
    assert torch.equal(batch.decode([0])[0], shown) and torch.equal(slow.frames, shown)
    assert torch.equal(batch.decode([0], 1, 3)[0], shown[1:17])


@pytest.mark.parametrize("num_context", [9, 17])
def test_continuing_a_video_equals_the_pipeline_to_the_last_bit(host, pipeline, clip, num_context):
    workload = make(host, num_context)
    rollout = reference_rollout(workload, clip, None, 9999, 7)
    noise = torch.cat([torch.zeros(1 + (num_context - 1) // 4, *host.latent_shape), *workload_noise(workload, 7)])
    video = torch.from_numpy(clip.frames[None, :num_context])
    expected = piped(pipeline, noise, video=video)
    assert torch.equal(rollout.latents, expected[-len(rollout.latents) :])
    assert torch.equal(host.encode(video)[0], expected[: -len(rollout.latents)])


def test_after_an_eviction_the_kept_chunks_are_encoded_again_at_new_positions(host, pipeline, clip):
    workload = make(host, 17)
    batch = RolloutBatch(workload, 1)
    batch.begin([0], [clip], [3])
    batch.advance([0])
    batch.retain(0, [0, 2, 3])
    kept = [latents for latents, _ in batch.keyed_history(0)]
    batch.advance([0])
    new = batch.generated([0], 1, 2)[0]
    # The pipeline continues a video of the kept chunks alone.
    noise = torch.cat([*map(torch.zeros_like, kept), workload_noise(workload, 3)[1]])
    sizes = [len(chunk) for chunk in (*kept, new)]
    assert sizes == [1, 2, 2, 2]
    expected = piped(pipeline, noise, video_latents=torch.cat(kept)[None], chunk_partition=sizes)
    assert torch.equal(new, expected[-2:])


def test_a_rollout_under_three_policies(host, clip):
    workload, found = make(host, 9), {}
    for name in ("recent_fill", "sink_recent", "pretrained/general"):
        rollout = reference_rollout(workload, clip, load_policy(name), 2, 42)
        batch, (decisions,) = play(workload, [clip], [42], load_policy(name), 2)
        assert torch.equal(batch.generated([0])[0], rollout.latents)
        assert [(decision.step, list(decision.kept)) for decision in decisions] == rollout.kept[:2]
        found[name] = rollout
    assert found["recent_fill"].kept[:2] == [(0, [1, 2]), (1, [2, 3])]
    assert found["sink_recent"].kept[:2] == [(0, [0, 2]), (1, [0, 3])]
    assert not torch.equal(found["recent_fill"].latents, found["sink_recent"].latents)
    everything = reference_rollout(workload, clip, None, 9999, 42).latents
    assert torch.equal(found["recent_fill"].latents[:2], everything[:2]), "nothing was dropped before the first new chunk"


def test_a_prompt_conditions_every_chunk(host, clip):
    workload = make(host, 9)
    other = Clip(0, clip.frames, prompt="a dog at night")
    batch, _ = play(workload, [clip, other], [5, 5], None, 9999)
    assert not torch.equal(*batch.generated([0, 1]))


def test_the_weights_are_those_of_the_files(folder, host, tmp_path):
    assert (host.name, host.latent_shape, host.num_steps, host.precision) == (str(folder), (4, 4, 4), 4, "float32")
    assert load_host(folder, "cpu").weights_hash == host.weights_hash
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    config = json.loads((changed / "scheduler" / "scheduler_config.json").read_text())
    (changed / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"shift": 1.0}))
    assert load_host(changed, "cpu").weights_hash != host.weights_hash


def test_it_is_loaded_from_the_hub(hub, folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("someone/tiny-any-flow", files)
    host = load_host("hub:someone/tiny-any-flow", "cpu")
    assert host.name.startswith("hub:someone/tiny-any-flow@") and host.chunked


def test_chunks_follow_the_configured_partition(host):
    assert [unit.frames for unit in host.units(33)] == [1, 8, 8, 8, 8]
    assert host.units(13) == (Unit(1, 1), Unit(8, 2), Unit(4, 1))
    released = (1, 3, 3, 3, 3, 3, 3, 2)
    assert chunk_sizes(released, 21, "m") == released
    assert chunk_sizes(released, 41, "m") == (1, *[3] * 13, 1)
    assert chunk_sizes((2, 1, 3), 6, "m") == (2, 1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda host: chunk_sizes((1, 3, 2, 3), 8, "m"),
            r"of m, 1 \+ 3 \+ 2 \+ 3, sums to 9 latents, and the clips have 8; use ",
        ),
        (lambda host: chunk_sizes((1, 0), 3, "m"), r"must be whole numbers above 0, got \[1, 0\]"),
        (lambda host: host.units(12), r"generates clips of 4n \+ 1 frames, not of 12"),
        (lambda host: Workload("w", None, host, 5, 28, 1, prompts=True), "the 5 given frames of w end within a chunk"),
        (lambda host: Workload("w", None, host, 9, 24, 1), "needs a prompt for every clip, which w has not"),
        (lambda host: make(host, 0).prompt_of(Clip(3, np.zeros((0, 3, 32, 32)))), "prompt of clip 3 .*, and the clip has none"),
        (lambda host: host.with_frame_size(40), "multiple of 16 pixels, not 40"),
    ],
)
def test_what_does_not_fit_is_one_sentence(host, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(host)
    assert "\n" not in str(caught.value)


@pytest.fixture
def broken(folder, tmp_path):
    copied = tmp_path / "broken"
    shutil.copytree(folder, copied)
    return copied


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_json(f / "model_index.json", _class_name="WanPipeline"), "a pipeline of the kind 'WanPipeline'"),
        (lambda f: change_json(f / "model_index.json", _class_name=["a", "b"]), "a pipeline of the kind"),
        (lambda f: change_json(f / "model_index.json", vae=[None, None]), "names no vae"),
        (
            lambda f: change_json(f / "model_index.json", transformer=["diffusers", "WanTransformer3DModel"]),
            "AnyFlowFARTransformer3DModel is needed",
        ),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda f: (f / "transformer" / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: change_json(f / "transformer" / "config.json", full_chunk_limit=1), "full_chunk_limit 1; at least 2"),
        (
            lambda f: change_json(f / "transformer" / "config.json", num_layers=3),
            "the transformer in .* cannot be loaded|missing",
        ),
        (lambda f: [path.unlink() for path in (f / "vae").glob("*.safetensors")], "holds no .safetensors"),
        (
            lambda f: [path.write_bytes(path.read_bytes()[:100]) for path in (f / "vae").glob("*.safetensors")],
            "is damaged",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_sentence(broken, damage, message):
    damage(broken)
    with pytest.raises(WeightsError, match=message) as caught:
        load_host(broken, "cpu")
    assert "\n" not in str(caught.value)


def test_memory_is_estimated_before_anything_is_loaded(folder, host, monkeypatch):
    counted = weight_bytes(folder, torch.float32)
    models = {"transformer": host.pipeline.transformer, "vae": host.pipeline.vae, "text_encoder": host.pipeline.text_encoder}
    for part, model in models.items():
        assert counted[part] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(folder, torch.bfloat16)["vae"] == counted["vae"] // 2
    monkeypatch.setattr(any_flow_files, "free_bytes", lambda device: sum(counted.values()))
    monkeypatch.setattr(any_flow_files, "_load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(
        WeightsError, match=r"needs at least 0.0 GiB on cpu in float32 \(transformer 0.0, .* GiB are free; use "
    ):
        load_host(folder, "cpu")


def test_without_the_extra_there_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(any_flow_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"needs transformers, ftfy; install it with pip install 'far-env\[anyflow\]'"):
        load_host(folder, "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(any_flow_files, "diffusers", object())  # a version before it
    with pytest.raises(WeightsError, match="needs a version of diffusers with AnyFlowFARPipeline; install it with"):
        load_host(folder, "cpu")


def test_a_prompt_without_a_text_encoder_is_one_sentence(broken, host):
    change_json(broken / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    bare = load_host(broken, "cpu").with_frame_size(SIZE)
    with pytest.raises(ValueError, match="has no text encoder, so it cannot embed the prompt 'a red cat"):
        bare.embedding(PROMPT)
    bare.embeddings[PROMPT] = host.embedding(PROMPT)
    assert bare.generate([], torch.randn(1, 4, 4, 4), make(bare, 0).conditions(prompt=PROMPT)).shape == (1, 4, 4, 4)


def test_costs_are_those_of_the_linear_layers_that_run(host):
    """The linear layers of the blocks are counted by hooks while a chunk is generated, attention by its formula."""
    transformer, counted = host.pipeline.transformer, Counter()
    phase = ["encode"]

    def count(module, inputs, output):
        counted[phase[0]] += 2 * module.weight.numel() * inputs[0].numel() // module.in_features

    def enter(module, inputs, options):
        phase[0] = "encode" if options["kv_cache_flag"]["is_cache_step"] else "step"

    linears = [m for block in transformer.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [linear.register_forward_hook(count) for linear in linears]
    hooks.append(transformer.register_forward_pre_hook(enter, with_kwargs=True))
    kept = [torch.randn(size, *host.latent_shape) for size in (1, 2, 2)]
    try:
        host.generate(kept, torch.randn(2, *host.latent_shape), make(host, 0).conditions(prompt=PROMPT))
    finally:
        for hook in hooks:
            hook.remove()
    config = dict(transformer.config)
    cost = chunk_cost(on_meta(config), [1, 2, 2], 2, (4, 4), torch.bfloat16)
    # Latents of 4×4 have 4 tokens, or 1 if coarse; the oldest of three kept chunks is coarse.
    tokens, dim, layers = [1, 8, 8], 24, 2
    pairs = sum(count * sum(tokens[: index + 1]) for index, count in enumerate(tokens))
    assert cost.encode_flops == counted["encode"] + layers * 4 * dim * (pairs + 17 * MAX_TEXT_TOKENS)
    assert cost.step_flops == counted["step"] // STEPS + layers * 4 * dim * (8 * (8 + 17) + 8 * MAX_TEXT_TOKENS)
    assert cost.cache_bytes == 2 * layers * 17 * dim * 2
    assert cost.seconds(4, 1e-6) == pytest.approx((cost.encode_flops + 4 * cost.step_flops) / 1e6)
