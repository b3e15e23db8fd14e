"""Streaming rollouts: the memory is entries of tokens, which are computed once and never again. Not the benchmark.

Every frame, given or generated, enters the same way: its clean tokens are encoded once against the entries as they are, and
appended; where a head then has more entries than the budget, the policy says which stay and which are merged. Time and memory
per frame are bounded by the budget, for frame 10 as for frame 1,000.

What equals `far_env.rollout.reference`:

- On a FAR, everything as long as nothing was ever dropped (with ``max_gap`` 1 or None).
- On a FAR-Long, the same as long as no frame has left the window. A frame that leaves it is replaced by its coarse tokens,
  which are encoded then; they attend to coarse entries alone and equal those of the reference as long as nothing was ever
  dropped. The full entries of the window stay as they were encoded, when that frame was still at full resolution, whereas the
  reference encodes the whole window again for each new frame.
- After a drop, entries remember what was dropped: the keys and values of later frames were computed while it was there. The
  difference to encoding the kept frames again is what `far_env.rollout.reencoding` measures.

Which frames of a FAR-Long are coarse is the policy's choice; by default those outside the window of the kept frames. With a
compressor (`far_env.host.compressor`), a policy also chooses blocks of frames that become a few tokens each, on any host.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import policy_name
from far_env.device import torch_defaults
from far_env.errors import PolicyError, first_line
from far_env.host.blocks import rotate
from far_env.host.compressor import Compressor, block_modulations, load_compressor, small_latents
from far_env.host.far import CLEAN_TIME, COARSE_TIME_FACTOR, Modulations
from far_env.host.far_host import require_far
from far_env.host.far_long import FARLong
from far_env.host.protocol import Host
from far_env.host.sampler import FrameSampler, with_null_class
from far_env.rollout.block_selection import BlockSelection
from far_env.rollout.context import context_latents
from far_env.rollout.noise import workload_noise
from far_env.rollout.token_cache import COARSE, COMPRESSED, FULL, MERGED, TokenCache
from far_env.rollout.token_policy import TokenPolicy, TokenSizes, check_answer
from far_env.workload import Workload


@dataclass(frozen=True)
class TokenDecision:
    """One answer of a policy for one row, in true frame numbers.

    Attributes:
        step: the frame generated last; negative while given frames enter, −1 for the last of them.
        full: frames that have entries at full resolution, single or merged, in any layer or head.
        coarse: frames that have coarse entries alone, or are in a compressed block.
        tokens: entries of a head, mean over layers and heads.
        seconds: how long the policy took, for all rows of the batch together.
    """

    step: int
    full: tuple[int, ...]
    coarse: tuple[int, ...]
    tokens: float
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class StreamingRollout:
    """The result of a finished rollout.

    Attributes:
        latents: generated latents (n_predict, C, h, w).
        tokens: entries that each generated frame attended to, mean over layers and heads.
        decisions: in the order they were made.
    """

    latents: Tensor
    tokens: list[float]
    decisions: list[TokenDecision]


def check_token_budget(host: Host, budget: int) -> None:
    """Raise ValueError unless the budget is a whole number of entries that holds the newest frame."""
    needed = require_far(host, "a memory of tokens").tokens_per_frame
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < needed:
        raise ValueError(
            f"the token budget must be a whole number and hold the newest frame, which has {needed} tokens on host "
            f"{host.name}; got {budget!r}"
        )


class StreamingBatch:
    """Rollouts of some clips in lock-step; the given frames are in the memory from the start.

    Args:
        workload: what is rolled out.
        clips, noise_seeds: one for each row.
        policy: None keeps everything.
        budget: entries that each head may keep; None for all.
        max_gap: see `far_env.rollout.token_cache.TokenCache`.
        enter: whether the given frames enter at once; else `enter` is called for each, before any is generated.

    Attributes:
        step: number of frames generated.
        entered: number of given frames in the memory.
        cache: the entries.
        decisions: of every row, so far.
        given: true latents (R, n, C, h, w), those of the context first.
        noise: (R, n_predict, C, h, w).

    Raises:
        ValueError: if clips and seeds differ in number, the budget does not hold a frame, or a clip lacks frames or classes.
        PolicyError: if the policy fails or its answer is not valid.
    """

    @torch_defaults()
    @torch.no_grad()
    def __init__(
        self,
        workload: Workload,
        clips: Sequence[Clip],
        noise_seeds: Sequence[int],
        policy: TokenPolicy | None,
        budget: int | None,
        *,
        max_gap: int | None = 1,
        enter: bool = True,
    ) -> None:
        host = require_far(workload.host, "a memory of tokens")
        if (policy is None) != (budget is None):
            raise ValueError("a token budget and a policy belong together; give both, or neither to keep everything")
        if budget is not None:
            check_token_budget(host, budget)
        if len(clips) != len(noise_seeds):
            raise ValueError(
                f"a rollout needs a noise seed for every clip, got {len(clips)} clips and {len(noise_seeds)} noise seeds"
            )
        self.workload, self.budget = workload, budget
        self.policy = copy.deepcopy(policy)
        self.step = self.entered = 0
        self.decisions: list[list[TokenDecision]] = [[] for _ in clips]
        self._model = host.transformer
        self._sampler = FrameSampler(host.transformer, workload.num_steps, workload.guidance)
        self._actions, self._labels = self._classes(clips)
        num_given = workload.num_frames if workload.true_feedback else workload.num_context
        self.given = context_latents(host, clips, num_given)
        self.noise = torch.stack([torch.stack(workload_noise(workload, seed)) for seed in noise_seeds])
        self._full_latents: list[dict[int, Tensor]] = [{} for _ in clips]
        compressor = _compressor_of(policy, host)
        like = torch.empty(host.latent_shape, device=host.device, dtype=host.dtype)
        self._top_blocks = getattr(policy, "top_blocks", None)
        self.cache = TokenCache(
            host.transformer,
            like,
            len(clips),
            2 if self._sampler.guided else 1,
            max_gap=max_gap,
            attention_frames=getattr(policy, "attention_frames", 0),
            query_moments=getattr(policy, "query_moments", False),
            compressor=compressor,
        )
        block = (None, None) if compressor is None else (math.prod(compressor.grid(like)), compressor.block_frames)
        full, coarse = self.cache.tokens_per_frame, self.cache.tokens_per_coarse_frame
        self._sizes = TokenSizes(budget, full, coarse, host.transformer.short_term_ctx_winsize - 1, *block)
        while enter and self.entered < workload.num_context:
            self.enter()

    @torch_defaults()
    @torch.no_grad()
    def enter(self) -> None:
        """Encode the next given frame."""
        self._remember(self.entered, self.given[:, self.entered])
        self.entered += 1

    @torch_defaults()
    @torch.no_grad()
    def advance(self) -> Tensor:
        """Generate the next frame of every row (R, C, h, w), and remember it unless it is the last one."""
        number = self.workload.num_context + self.step
        noise = self.noise[:, self.step, None]
        action = None if self._actions is None else self._actions[:, number, None]
        prepared, selection = self.cache.prepare(self._numbers(number)), None
        if self._top_blocks is not None:
            selection = BlockSelection(self.cache, prepared, self._top_blocks)
            prepared = selection.frame
        frame = self._sampler.solve(prepared, noise, label=self._labels, action=action, probe=selection)[:, 0]
        self.step += 1
        if self.step < self.workload.num_predict:
            self._remember(number, self.given[:, number] if self.workload.true_feedback else frame)
        return frame

    def tokens(self) -> list[float]:
        """Entries of a head, mean over layers and heads, of every row."""
        return self.cache.counts().float().mean(dim=(0, 2)).tolist()

    def _classes(self, clips: Sequence[Clip]) -> tuple[Tensor | None, Tensor | None]:
        """Actions of all frames (R, F) and labels (R,), where the host is conditioned on them."""
        workload, device = self.workload, self.workload.host.device
        actions = labels = None
        if workload.actions:
            actions = torch.tensor([workload.actions_of(clip, workload.num_frames) for clip in clips], device=device)
        if workload.labels:
            labels = torch.tensor([workload.label_of(clip) for clip in clips], device=device)
        return actions, labels

    def _numbers(self, number: int) -> Tensor:
        return torch.full((self.cache.num_rows,), number, device=self.workload.host.device)

    def _remember(self, number: int, latents: Tensor) -> None:
        """Encode clean frames (R, C, h, w) of this number, and hold the budget."""
        if (enter := getattr(self.policy, "enter", None)) is not None:
            enter(number - self.workload.num_context, self.workload.num_predict, latents)
        if isinstance(self._model, FARLong) or self.cache.compressor is not None:
            self._demote(number, latents)
        prepared = self.cache.prepare(self._numbers(number))
        record = _AttentionRecord(self.cache) if self.cache.attention_frames or self.cache.query_moments else None
        self._model.write_clean(
            self._branched(latents)[:, None],
            self._clean_modulations(slice(None), [number] * len(latents)),
            prepared,
            on_attention=record,
        )
        statistics = {} if record is None else record.statistics()
        self.cache.append(number, prepared, **statistics)
        if self.budget is not None and (self.cache.num_slots > self.budget or getattr(self.policy, "every_frame", False)):
            self._decide(number)

    def _branched(self, latents: Tensor) -> Tensor:
        return torch.cat([latents, latents]) if self._sampler.guided else latents

    def _clean_modulations(
        self, rows: Tensor | slice, numbers: Sequence[int], coarse: bool = False, length: int = 1
    ) -> Modulations:
        """Modulations of ``length`` clean frames of each of these rows, from these numbers on."""
        clean = CLEAN_TIME * (COARSE_TIME_FACTOR if coarse else 1)
        if self._actions is None and self._labels is None:
            return self._sampler.shared_modulations(clean)
        classes: dict[str, Any] = {}
        if self._labels is not None:
            classes["label"] = self._labels[rows]
        else:
            actions = self._actions[rows]
            frames = torch.tensor(numbers, device=actions.device)[:, None] + torch.arange(length, device=actions.device)
            classes["action"] = actions.gather(1, frames)
        if self._sampler.guided:
            classes = {kind: with_null_class(self._model, values) for kind, values in classes.items()}
        (values,) = classes.values()
        times = torch.full((len(values), length), clean, device=values.device)
        return self._model.modulate(times, **classes, dtype=self.workload.host.dtype)

    def _demote(self, newest: int, latents: Tensor) -> None:
        """Make frames coarse or compress them before the newest, whose latents (R, C, h, w) these are, is encoded."""
        coarse, blocks = [], []
        for row, held in enumerate(self._full_latents):
            full = self.cache.kept_frames(row, FULL)
            for gone in held.keys() - set(full):
                del held[gone]
            held[newest] = latents[row]
            frames = [*full, newest]
            coarse.append([number for number in self._coarse_frames(row, frames) if number in held and number != newest])
            blocks.append(self._blocks([number for number in frames if number not in coarse[-1]]))
        for rows, numbers in _one_per_row(coarse):
            self._make_coarse(rows, numbers)
        for rows, numbers in _one_per_row(blocks):
            self._compress(rows, numbers)

    def _make_coarse(self, rows: list[int], numbers: list[int]) -> None:
        """Replace one frame of each of these rows by its coarse tokens."""
        frames = torch.stack([self._full_latents[row].pop(number) for row, number in zip(rows, numbers, strict=True)])
        index = torch.tensor(rows, device=frames.device)
        prepared = self.cache.prepare(torch.tensor(numbers, device=frames.device), index, COARSE)
        modulations = self._clean_modulations(index, numbers, coarse=True)
        self._model.write_clean(self._branched(frames)[:, None], modulations, prepared, coarse=True)
        self.cache.coarsen(numbers, index, prepared)

    def _compress(self, rows: list[int], firsts: list[int]) -> None:
        """Replace one block of frames of each of these rows by its compressed tokens."""
        length = self._sizes.block_frames
        blocks = [
            torch.stack([self._full_latents[row].pop(first + i) for i in range(length)])
            for row, first in zip(rows, firsts, strict=True)
        ]
        latents = torch.stack(blocks)
        index = torch.tensor(rows, device=latents.device)
        prepared = self.cache.prepare(torch.tensor(firsts, device=latents.device), index, COMPRESSED)
        modulations = block_modulations(self._clean_modulations(index, firsts, length=length), length)
        tokens = self.cache.compressor(latents, small_latents(self.workload.host.autoencoder, latents))
        self._model.write_tokens(self._branched(tokens), modulations, prepared)
        self.cache.compress(firsts, index, prepared)

    def _coarse_frames(self, row: int, frames: list[int]) -> list[int]:
        """Those of a row's full frames that become coarse."""
        if not isinstance(self._model, FARLong):
            return []
        choose = getattr(self.policy, "coarse_frames", None)
        if choose is not None:
            return sorted(choose(frames, self._sizes))
        kept = sorted({*frames, *self.cache.kept_frames(row)})
        # The window holds the frame to come as well.
        return kept[: self._model.num_coarse(len(kept) + 1)]

    def _blocks(self, frames: list[int]) -> list[int]:
        """First frames of the blocks that the policy compresses."""
        if self.cache.compressor is None:
            return []
        where, length = f"token policy {policy_name(self.policy)}", self._sizes.block_frames
        try:
            firsts = list(self.policy.compressed_blocks(frames, self._sizes))
        except Exception as error:
            raise PolicyError(f"{where}: {first_line(error)}") from error
        wanted = [first + i for first in firsts for i in range(length)]
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(frames[:-1]):
            raise PolicyError(
                f"{where}: compresses blocks of {length} frames from {firsts} on; they must be "
                f"apart, and of the frames that are at full resolution and not the newest, {frames[:-1]}"
            )
        return firsts

    def _decide(self, newest: int) -> None:
        """Ask the policy, and check and apply its answer."""
        view = self.cache.view(newest, self.budget)
        where = f"token policy {policy_name(self.policy)}, step {newest - self.workload.num_context}"
        start = time.perf_counter()
        try:
            into = self.policy.retain(view)
        except Exception as error:
            raise PolicyError(f"{where}: raised {type(error).__name__}: {first_line(error)}") from error
        seconds = time.perf_counter() - start
        try:
            check_answer(into, view)
        except ValueError as error:
            raise PolicyError(f"{where}: {error}") from error
        self.cache.regroup(into)
        tokens, step = self.tokens(), newest - self.workload.num_context
        for row, decisions in enumerate(self.decisions):
            full = {*self.cache.kept_frames(row, FULL), *self.cache.kept_frames(row, MERGED)}
            coarse = set(self.cache.kept_frames(row)) - full
            for first in self.cache.kept_frames(row, COMPRESSED):
                coarse.update(range(first, first + self._sizes.block_frames))
            decisions.append(TokenDecision(step, tuple(sorted(full)), tuple(sorted(coarse)), tokens[row], seconds))


def _compressor_of(policy: TokenPolicy | None, host: Host) -> Compressor | None:
    """The compressor that a policy names. Raises PolicyError if it cannot be loaded."""
    name = getattr(policy, "compressor", None)
    try:
        return None if name is None else load_compressor(name, host)
    except ValueError as error:
        raise PolicyError(f"token policy {policy_name(policy)}: {error}") from error


def _one_per_row(pending: list[list[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """The numbers of all rows, in turn one of each row that has any left: rows and their numbers."""
    for turn in range(max(map(len, pending), default=0)):
        rows = [row for row, numbers in enumerate(pending) if len(numbers) > turn]
        yield rows, [pending[row][turn] for row in rows]


class _AttentionRecord:
    """Statistics of one clean frame's queries, from every block in order."""

    def __init__(self, cache: TokenCache) -> None:
        self._cache = cache
        self._received: list[Tensor] = []
        self._queries: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, table: Tensor, mask: Tensor | None) -> None:
        rows = self._cache.num_rows
        query, key = query[-rows:], key[-rows:]
        if self._cache.query_moments:
            self._queries.append(rotate(query.float(), table.conj()))
        if self._cache.attention_frames:
            logits = torch.einsum("rshd,rthd->rhst", query.float(), key.float()) / query.shape[-1] ** 0.5
            if mask is not None:
                logits = logits + mask[-rows:].float()
            self._received.append(logits.softmax(dim=-1).sum(dim=2))

    def statistics(self) -> dict[str, Tensor]:
        """Arguments of `TokenCache.append`."""
        found = {"received": self._received, "queries": self._queries}
        return {name: torch.stack(layers) for name, layers in found.items() if layers}


def play_streaming(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policy: TokenPolicy | None = None,
    budget: int | None = None,
    *,
    max_gap: int | None = 1,
    on_frame: Callable[[int], None] | None = None,
) -> list[StreamingRollout]:
    """Roll every clip out, all in one batch; see `StreamingBatch` for the arguments and errors.

    Args:
        on_frame: called with the number of frames generated by each batched step.
    """
    batch = StreamingBatch(workload, clips, noise_seeds, policy, budget, max_gap=max_gap)
    frames: list[Tensor] = []
    tokens: list[list[float]] = []
    while batch.step < workload.num_predict:
        tokens.append(batch.tokens())
        frames.append(batch.advance())
        if on_frame is not None:
            on_frame(len(clips))
    latents = torch.stack(frames, dim=1)
    rows = zip(latents, zip(*tokens, strict=True), batch.decisions, strict=True)
    return [StreamingRollout(frames.clone(), list(counts), decisions) for frames, counts, decisions in rows]
