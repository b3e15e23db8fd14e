"""What a number was made with: host, clips, machine and versions, and hashes of clips and latents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.evaluation.batches import TokenMemory
from far_env.evaluation.records import TOKENS
from far_env.provenance import git_commit, machine, versions
from far_env.workload import Workload


def record_facts(workload: Workload, memory: TokenMemory | None = None) -> dict[str, object]:
    """Which host, weights, dtype, device, machine, commit and versions a number is made with."""
    host = workload.host
    options = {name: value for name, value in _clip_options(workload).items() if name != "data_dir"}
    return {
        "host": host.name,
        "weights": host.weights_hash,
        "ode_steps": workload.num_steps,
        "guidance": workload.guidance,
        "actions": workload.actions,
        "feedback": workload.feedback,
        "noise": workload.noise,
        **({"clip_options": options} if options else {}),
        **({} if memory is None else {"memory": TOKENS, "max_gap": memory.max_gap}),
        "dtype": host.precision,
        "device": str(host.device),
        "machine": machine(host.device),
        "commit": git_commit(),
        "versions": versions(),
    }


def made_with(workload: Workload, memory: TokenMemory | None) -> dict[str, object]:
    """What shapes a workload's numbers wherever they are made; folders mean the same from any working directory."""
    host, options = workload.host, _clip_options(workload)
    if options.get("data_dir") is not None:
        options["data_dir"] = str(Path(options["data_dir"]).resolve())
    return {
        "weights": host.weights_hash,
        "ode_steps": workload.num_steps,
        "dtype": host.precision,
        "feedback": workload.feedback,
        "clip_options": options,
        **({} if memory is None else {"max_gap": memory.max_gap}),
    }


def clip_hash(workload: Workload, clip: Clip) -> str:
    """First 16 hex digits of the SHA-256 of the clip's true frames, and of its prompt where it has one."""
    prompt = b"" if clip.prompt is None else clip.prompt.encode()
    return _digest(np.ascontiguousarray(clip.frames[: workload.num_frames]).tobytes() + prompt)


def latents_hash(latents: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of one rollout's generated latents (n_predict, C, h, w)."""
    return _digest(latents.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _clip_options(workload: Workload) -> dict[str, Any]:
    """The options of the workload's clips as they are read back from JSON."""
    return json.loads(json.dumps(dict(workload.clip_options), default=str))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
