"""AnyFlow-FAR (arXiv 2605.13724) as diffusers has it: a text-to-video model that continues FAR with chunks of latent frames.

The transformer is `diffusers.AnyFlowFARTransformer3DModel`, the autoencoder that of Wan 2.1 (four frames per latent, but for
the first), the text encoder UMT5. What diffusers' `AnyFlowFARPipeline` generates when everything is kept is generated here to
the last bit. Needs the extra ``far-env[anyflow]``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from far_env.device import torch_defaults
from far_env.host.protocol import Conditions, Host, Unit

if TYPE_CHECKING:
    from diffusers import AnyFlowFARPipeline

NUM_STEPS = 4
"""Flow-map steps of a chunk by default; the model is trained for any number."""
FRAME_SIZE = 480
"""Side of frames in pixels by default. The released checkpoints were trained on frames of 832×480."""
PIXEL_MULTIPLE = 16
"""Sides of frames are multiples of this, as the pipeline requires."""
MAX_TEXT_TOKENS = 512


class AnyFlowFAR(Host):
    """A chunk of latents from the kept chunks, a prompt and noise.

    Clean chunks are encoded in one pass, at positions from 0 on, whenever a chunk is generated: those that stay are encoded as
    if an evicted one had never been. Of the chunks that the model sees, the new one and those before it, the newest
    ``full_chunk_limit`` (3 in the released models) have their full resolution, and older ones enter through a coarse patch
    embedding, with a quarter of the tokens. This rule of diffusers counts kept chunks: when a policy drops a chunk, older ones
    move up, and a coarse one may be full again. Under a budget below the limit no chunk is ever coarse.

    Args:
        name: of the model, for records.
        pipeline: in eval mode; its tokenizer and text encoder may be missing where ``embeddings`` has every prompt.
        weights_hash: of its files.
        frame_size: side of square frames.
        embeddings: prompt → text embedding (1, tokens, width); "" is the negative prompt of guidance.

    Raises:
        ValueError: if the frame size is no multiple of 16 pixels.
    """

    chunked = True
    condition = "prompt"
    num_steps = NUM_STEPS

    def __init__(
        self,
        name: str,
        pipeline: AnyFlowFARPipeline,
        weights_hash: str,
        frame_size: int = FRAME_SIZE,
        embeddings: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameter = next(pipeline.transformer.parameters())
        super().__init__(parameter.device, pipeline.transformer.dtype)
        self.name, self.weights_hash, self.pipeline = name, weights_hash, pipeline
        self.embeddings = dict(embeddings or {})
        self._set_frame_size(frame_size)

    def with_frame_size(self, frame_size: int) -> AnyFlowFAR:
        """The same models for frames of another size. Raises ValueError if it is no multiple of 16 pixels."""
        host = copy.copy(self)
        host._set_frame_size(frame_size)
        return host

    def _set_frame_size(self, frame_size: int) -> None:
        if frame_size < PIXEL_MULTIPLE or frame_size % PIXEL_MULTIPLE:
            raise ValueError(f"{self.name} takes frames whose side is a multiple of {PIXEL_MULTIPLE} pixels, not {frame_size}")
        side = frame_size // self.pipeline.vae_scale_factor_spatial
        self.frame_size = frame_size
        self.latent_shape = (self.pipeline.transformer.config.in_channels, side, side)

    def units(self, num_frames: int) -> tuple[Unit, ...]:
        """The chunks of a clip of so many frames: those of the configuration, or as many of their regular size as it takes.

        Raises:
            ValueError: if the number of frames is not 4n + 1, or if the configured partition neither sums up nor is regular.
        """
        stride = self.pipeline.vae_scale_factor_temporal
        if num_frames < 1 or (num_frames - 1) % stride:
            raise ValueError(f"{self.name} generates clips of {stride}n + 1 frames, not of {num_frames}")
        sizes = chunk_sizes(self.pipeline.transformer.config.chunk_partition, 1 + (num_frames - 1) // stride, self.name)
        ends = [1 + stride * (end - 1) for end in accumulate(sizes)]
        return tuple(Unit(end - start, size) for start, end, size in zip([0, *ends], ends, sizes, strict=False))

    @torch_defaults()
    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [0, 1], F = 4n + 1, to normalised latents (B, n + 1, C, h, w): the means, nothing drawn."""
        if frames.shape[1] == 0:
            return torch.zeros((len(frames), 0, *self.latent_shape), device=self.device, dtype=self.dtype)
        size = self.frame_size
        return self.pipeline.encode_video(frames, height=size, width=size).to(self.dtype)

    @torch_defaults()
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, L, C, h, w) from the first of a clip on to frames (B, 4·L − 3, 3, H, W) in [0, 1]."""
        vae = self.pipeline.vae
        latents = latents.permute(0, 2, 1, 3, 4).to(vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
        frames = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
        return (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)

    @torch_defaults()
    @torch.no_grad()
    def generate(self, kept: Sequence[Tensor], noise: Tensor, conditions: Conditions) -> Tensor:
        """The chunk (n, C, h, w) after the kept ones; with guidance above 1 away from the empty prompt."""
        transformer, scheduler = self.pipeline.transformer, self.pipeline.scheduler
        guided = conditions.guidance > 1
        text = self.embedding(conditions.prompt)
        if guided:
            text = torch.cat([self.embedding(""), text])
        partition = [*map(len, kept), len(noise)]
        cache = self._encoded(kept, text)
        chunk = noise[None]
        scheduler.set_timesteps(conditions.num_steps, device=self.device)
        for step, time in enumerate(scheduler.timesteps):
            target = scheduler.sigmas[step + 1] * scheduler.config.num_train_timesteps
            if time == target:
                continue
            inputs = torch.cat([chunk] * len(text))
            velocity, _ = transformer(
                hidden_states=inputs,
                timestep=time.expand(inputs.shape[:2]),
                r_timestep=target.expand(inputs.shape[:2]),
                encoder_hidden_states=text,
                chunk_partition=partition,
                kv_cache=cache,
                kv_cache_flag={"num_cached_chunks": len(kept), "is_cache_step": False},
                return_dict=False,
            )
            if guided:
                unconditional, velocity = velocity.chunk(2)
                velocity = unconditional + conditions.guidance * (velocity - unconditional)
            chunk = scheduler.step(velocity, time, chunk, return_dict=False)[0]
        return chunk[0]

    @torch.no_grad()
    def embedding(self, prompt: str | None) -> Tensor:
        """The text embedding (1, tokens, width) of a prompt, computed once.

        Raises:
            ValueError: without a prompt, or if there is no text encoder that could embed it.
        """
        if prompt is None:
            raise ValueError(f"the host {self.name} needs a prompt for every clip; use a workload with prompts")
        if prompt not in self.embeddings:
            if self.pipeline.text_encoder is None or self.pipeline.tokenizer is None:
                raise ValueError(f"the host {self.name} has no text encoder, so it cannot embed the prompt {prompt[:60]!r}")
            options = {"do_classifier_free_guidance": False, "max_sequence_length": MAX_TEXT_TOKENS, "device": self.device}
            self.embeddings[prompt] = self.pipeline.encode_prompt(prompt, **options)[0]
        return self.embeddings[prompt].to(self.device, self.dtype)

    def _encoded(self, kept: Sequence[Tensor], text: Tensor) -> dict[int, dict[str, Tensor]]:
        """Keys and values of the kept chunks, all encoded in one pass, at positions from 0 on."""
        transformer = self.pipeline.transformer
        config = transformer.config
        partition = [*map(len, kept)]
        num_coarse = max(0, len(kept) - (config.full_chunk_limit - 1))
        tokens = {
            "full_cache": sum(partition[num_coarse:]) * self._tokens(config.patch_size),
            "compressed_cache": sum(partition[:num_coarse]) * self._tokens(config.compressed_patch_size),
        }
        shape = (2, len(text), config.num_attention_heads)
        options = {"device": self.device, "dtype": self.dtype}
        cache = {
            layer: {name: torch.zeros((*shape, count, config.attention_head_dim), **options) for name, count in tokens.items()}
            for layer in range(config.num_layers)
        }
        if not kept:
            return cache
        latents = torch.cat([torch.cat(list(kept))[None]] * len(text)).to(self.dtype)
        clean = torch.zeros(latents.shape[:2], dtype=torch.int64, device=self.device)
        height, width = latents.shape[-2:]
        mask = transformer.build_attention_mask(
            chunk_partition=partition, height=height, width=width, device=self.device, mode="cache"
        )
        transformer(
            hidden_states=latents,
            timestep=clean,
            r_timestep=clean,
            encoder_hidden_states=text,
            chunk_partition=partition,
            attention_mask=mask,
            kv_cache=cache,
            kv_cache_flag={"num_cached_chunks": len(kept) - 1, "is_cache_step": True},
            return_dict=False,
        )
        return cache

    def _tokens(self, patch_size: Sequence[int]) -> int:
        """Tokens of one latent."""
        return (self.latent_shape[1] // patch_size[1]) * (self.latent_shape[2] // patch_size[2])


def chunk_sizes(partition: Sequence[int], num_latents: int, name: str) -> tuple[int, ...]:
    """Latents of each chunk of a clip.

    A configured partition that sums to the clip's latents is taken as it is. A regular one, whose chunks after the first have
    one size but for a smaller last one, is continued or cut: 1 + 3 + 3 + 2 stands for 1, then 3 at a time.

    Raises:
        ValueError: on a partition that is not of whole numbers above 0, or does not sum up and is not regular.
    """
    sizes = tuple(partition)
    shown = " + ".join(map(str, sizes))
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"the chunk_partition of {name} must be whole numbers above 0, got {list(sizes)}")
    if sum(sizes) == num_latents:
        return sizes
    regular = len(sizes) > 1 and all(size == sizes[1] for size in sizes[1:-1]) and sizes[-1] <= sizes[1]
    if not regular or num_latents < sizes[0]:
        raise ValueError(
            f"the chunk_partition of {name}, {shown}, sums to {sum(sizes)} latents, and the clips have {num_latents}; use "
            f"clips of {sum(sizes)} latents, or a partition that sums up"
        )
    whole, rest = divmod(num_latents - sizes[0], sizes[1])
    return (sizes[0], *[sizes[1]] * whole, *([rest] if rest else []))


@dataclass(frozen=True)
class ChunkCost:
    """What a chunk takes when so many are kept.

    Attributes:
        cache_bytes: keys and values of the kept chunks.
        score_bytes: the largest matrix of attention scores, float32, which attention without a compiled kernel holds.
        encode_flops: to encode the kept chunks; step_flops: of one flow-map step.
    """

    cache_bytes: int
    score_bytes: int
    encode_flops: int
    step_flops: int

    def seconds(self, num_steps: int, tflops: float) -> float:
        """Seconds of a chunk at this rate of 10¹² operations per second."""
        return (self.encode_flops + num_steps * self.step_flops) / tflops / 1e12


def on_meta(config: Mapping[str, Any]) -> torch.nn.Module:
    """The transformer of a configuration without weights, on torch's meta device."""
    from diffusers import AnyFlowFARTransformer3DModel

    with torch.device("meta"):
        return AnyFlowFARTransformer3DModel.from_config(dict(config))


def chunk_cost(
    transformer: torch.nn.Module, kept: Sequence[int], new: int, latent_size: tuple[int, int], dtype: torch.dtype
) -> ChunkCost:
    """Count what a chunk takes, from a transformer that may be on the meta device.

    A matrix product of (m, k) and (k, n) counts 2·m·k·n operations; norms, softmax and embeddings are left out.

    Args:
        kept: latents of each kept chunk, oldest first; new: of the chunk to be generated.
        latent_size: (h, w).
    """
    config = transformer.config
    per_latent = [
        (latent_size[0] // patch[1]) * (latent_size[1] // patch[2])
        for patch in (config.patch_size, config.compressed_patch_size)
    ]
    num_coarse = max(0, len(kept) - (config.full_chunk_limit - 1))
    counts = [size * per_latent[index < num_coarse] for index, size in enumerate(kept)]
    past, query = sum(counts), new * per_latent[0]
    dim, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    block = transformer.blocks[0]
    text = (block.attn2.to_k, block.attn2.to_v)
    by_token = [m for m in block.modules() if isinstance(m, torch.nn.Linear) and m not in text]
    weights = sum(linear.weight.numel() for linear in by_token)

    def flops(tokens: int, attended: int) -> int:
        """Of all blocks: linear layers, attention to so many pairs of tokens, and to the text."""
        per_block = 2 * weights * tokens + 4 * dim * (attended + tokens * MAX_TEXT_TOKENS)
        per_block += 2 * MAX_TEXT_TOKENS * sum(linear.weight.numel() for linear in text)
        return layers * per_block

    encoded = sum(count * sum(counts[: index + 1]) for index, count in enumerate(counts))
    width = torch.finfo(dtype).bits // 8
    return ChunkCost(
        cache_bytes=2 * layers * past * dim * width,
        score_bytes=4 * config.num_attention_heads * max(query * (query + past), past * past),
        encode_flops=flops(past, encoded) if kept else 0,
        step_flops=flops(query, query * (query + past)),
    )
