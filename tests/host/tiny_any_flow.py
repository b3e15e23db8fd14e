"""A tiny AnyFlow-FAR with random weights in diffusers' format, tokenizer and text encoder included."""

from __future__ import annotations

from pathlib import Path

import torch

CHUNKS = (1, 2, 2, 2, 2)
WORDS = ["a", "red", "cat", "dog", "walks", "over", "the", "lawn", "at", "night"]


def make_pipeline(**changes):
    """diffusers' pipeline of two layers with two heads of 12; changes to the transformer's configuration."""
    from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, AutoencoderKLWan, FlowMapEulerDiscreteScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 64,
        "chunk_partition": list(CHUNKS),
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = AnyFlowFARTransformer3DModel(**config).eval()
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
        ).eval()
        text = UMT5Config(
            vocab_size=len(WORDS) + 2, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
        )
        text_encoder = UMT5EncoderModel(text).eval()
        for module in (transformer, text_encoder):
            for parameter in module.parameters():
                parameter.data = 0.2 * torch.randn(parameter.shape)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    pipeline = AnyFlowFARPipeline(fast, text_encoder, transformer, vae, FlowMapEulerDiscreteScheduler(shift=5.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, **changes) -> Path:
    """Write such a pipeline, and return the folder."""
    make_pipeline(**changes).save_pretrained(folder, safe_serialization=True)
    return folder
