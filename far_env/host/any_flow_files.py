"""Load AnyFlow-FAR from a folder in diffusers' format: its kind, its parts and the memory they need are checked first."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from far_env.device import free_bytes, torch_defaults
from far_env.errors import WeightsError, first_line
from far_env.host.any_flow import AnyFlowFAR
from far_env.hub import snapshot
from far_env.tensor_files import file_hash

INDEX = "model_index.json"
KIND = "AnyFlowFARPipeline"
RELEASED = "hub:nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers"
"""The checkpoint that the name any_flow_far means, see diffusers' documentation of the pipeline."""
PARTS = {
    "transformer": "AnyFlowFARTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "scheduler": "FlowMapEulerDiscreteScheduler",
    "text_encoder": "UMT5EncoderModel",
    "tokenizer": None,
}
"""Folder of each part → its class; the tokenizer may have any."""
NEEDED_FILES = (INDEX,)
ALSO_FILES = ("*/*.json", "*/*.safetensors", "*/*.model")
WORKING_SHARE = 0.1
"""What activations and keys and values need beside the weights, at least, as a share of these."""


def load_any_flow_far(device: torch.device, dtype: torch.dtype) -> AnyFlowFAR:
    """The released AnyFlow-FAR with 1.3 billion parameters, from the Hugging Face hub."""
    kept = snapshot(RELEASED, NEEDED_FILES, ALSO_FILES)
    return load_pipeline(kept.name, kept.folder, device, dtype)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is in the format of diffusers' pipelines."""
    return (folder / INDEX).is_file()


@torch_defaults()
def load_pipeline(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> AnyFlowFAR:
    """The host of a folder in diffusers' format. Hosts are kept in memory. No code of the folder runs, and no pickle is read.

    Raises:
        WeightsError: if the folder holds a pipeline of another kind or lacks a part, if a file is damaged, if there is not
            enough memory, or without the extra far-env[anyflow].
    """
    folder = folder.resolve()
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != KIND:
        raise WeightsError(
            f"{folder} holds a pipeline of the kind {str(index.get('_class_name'))[:60]!r}; far-env plays {KIND}, and hosts of "
            "its own"
        )
    for part, expected in PARTS.items():
        found = index.get(part)
        if found is None or found == [None, None]:
            if part in ("text_encoder", "tokenizer"):
                continue
            raise WeightsError(f"{folder / INDEX} names no {part}; fetch the whole pipeline again")
        if expected is not None and (not isinstance(found, list) or found[-1] != expected):
            raise WeightsError(f"{folder / INDEX} names {found} as {part}; {expected} is needed")
    missing = [package for package in ("transformers", "ftfy") if importlib.util.find_spec(package) is None]
    if missing or not hasattr(diffusers, KIND):
        wanted = ", ".join(missing) or f"a version of diffusers with {KIND}"
        raise WeightsError(f"{name} needs {wanted}; install it with pip install 'far-env[anyflow]'")
    _check_config(folder / "transformer" / "config.json")
    check_memory(folder, device, dtype)
    return _load(name, folder, _state_of(folder), device, dtype)


def weight_bytes(folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """Part → bytes that its weights take in a dtype, from the headers of the files.

    Raises:
        WeightsError: if a part has no weights, or a file's header cannot be read.
    """
    sizes, wide = {}, torch.finfo(dtype).bits // 8
    index = _read_json(folder / INDEX)
    for part in ("transformer", "vae", "text_encoder"):
        if index.get(part) in (None, [None, None]):
            continue
        files = sorted((folder / part).glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{folder / part} holds no .safetensors; fetch the whole pipeline again")
        sizes[part] = sum(_count(path) * wide for path in files)
    return sizes


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Raise WeightsError if the weights and a tenth more do not fit into the memory that is free on a device."""
    sizes = weight_bytes(folder, dtype)
    needed, free = int(sum(sizes.values()) * (1 + WORKING_SHARE)), free_bytes(device)
    if free is not None and needed > free:
        precision = str(dtype).removeprefix("torch.")
        parts = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in sizes.items())
        raise WeightsError(
            f"{folder} needs at least {needed / 2**30:.1f} GiB on {device} in {precision} ({parts}), and "
            f"{free / 2**30:.1f} GiB are free; use bfloat16 or a device with more memory"
        )


def _count(path: Path) -> int:
    """Elements of all tensors of a .safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); fetch it again") from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files, so that another content is not taken for the one in memory."""
    files = sorted(path for pattern in (*NEEDED_FILES, *ALSO_FILES) for path in folder.glob(pattern))
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=2)
def _load(name: str, folder: Path, state: tuple, device: torch.device, dtype: torch.dtype) -> AnyFlowFAR:
    from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, AutoencoderKLWan, FlowMapEulerDiscreteScheduler
    from transformers import AutoTokenizer, UMT5EncoderModel

    index = _read_json(folder / INDEX)
    local = {"local_files_only": True, "use_safetensors": True}
    given = [part for part in PARTS if index.get(part) not in (None, [None, None])]
    parts: dict[str, Any] = dict.fromkeys(PARTS)
    part = ""
    try:
        for part in given:
            place = str(folder / part)
            if part == "scheduler":
                parts[part] = FlowMapEulerDiscreteScheduler.from_pretrained(place, local_files_only=True)
            elif part == "tokenizer":
                parts[part] = AutoTokenizer.from_pretrained(place, local_files_only=True)
            elif part == "text_encoder":
                parts[part] = UMT5EncoderModel.from_pretrained(place, dtype=dtype, **local)
            else:
                cls = AnyFlowFARTransformer3DModel if part == "transformer" else AutoencoderKLWan
                parts[part] = cls.from_pretrained(place, torch_dtype=dtype, **local)
        for part in ("transformer", "vae", "text_encoder"):
            if parts[part] is not None:
                parts[part] = parts[part].to(device).eval().requires_grad_(False)
    except Exception as error:  # diffusers, transformers, tokenizers and safetensors raise many kinds of them
        raise WeightsError(f"the {part} in {folder} cannot be loaded: {first_line(error)}") from error
    return AnyFlowFAR(name, AnyFlowFARPipeline(**parts), _hash([path for path, _, _ in state], folder))


def _hash(paths: list[str], folder: Path) -> str:
    """First eight hex digits of the SHA-256 of the names and hashes of a folder's files."""
    hashes = {Path(path).relative_to(folder).as_posix(): file_hash(Path(path)) for path in paths}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:8]


def _check_config(path: Path) -> None:
    """Raise WeightsError unless the transformer keeps at least one clean chunk at full resolution."""
    limit = _read_json(path).get("full_chunk_limit", 3)
    if not isinstance(limit, int) or limit < 2:
        raise WeightsError(f"{path} has full_chunk_limit {limit!r}; at least 2 is needed, the new chunk and one before it")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({first_line(error)}); fetch the whole pipeline again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object; fetch the whole pipeline again")
    return content
