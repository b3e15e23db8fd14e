"""The memory of a streaming rollout: keys and values of tokens, one entry each, that are never computed again.

Every layer and every head has entries of its own. Keys are kept as the host's norm leaves them, before rotation, so that an
entry's position in time may change whenever it is used (incremental rotary positions, arXiv 2603.25730): the frame to come is
at time 0, the newest kept frame at −1, and so on backwards. Slots are sorted by frame; empty ones come first.

All tensors of entries have the shape (layers, rows, heads, slots), where a row is one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from far_env.host.blocks import rotary_table, rotate
from far_env.host.compressor import SPACING, Compressor
from far_env.host.far import FAR, NextFrame
from far_env.host.far_long import FARLong
from far_env.rollout.attention_probe import QueryMoments

EMPTY, FULL, COARSE, MERGED, COMPRESSED = range(5)
"""Kinds of entries: none, a token of a frame at full resolution, a coarse token of FAR-Long, several tokens averaged, a token
of a compressed block of frames."""
NO_FRAME = -1
STATISTICS = ("accumulated", "received")


@dataclass(frozen=True)
class CacheView:
    """What a policy over entries is shown. Statistics are None unless the policy asks for them.

    Attributes:
        frame: true number of each entry's frame (context frames come first), of a block the first one, −1 where the slot is
            empty; int64.
        cell: place in the frame's grid, row by row; places of coarse and compressed tokens follow those of the full; int64.
        kind: one of EMPTY, FULL, COARSE, MERGED, COMPRESSED; int64.
        weight: how many tokens the entry stands for; float32.
        position: in time relative to the frame to come, −1 for the newest frame; int64.
        key, value: (layers, rows, heads, slots, d), keys before rotation; with guidance those of the conditional side.
        rotated_key: the keys as the frame to come will meet them, float32.
        accumulated: softmax attention that the entry has received, summed over the queries of all frames since its own, its own
            included; float32.
        received: (frames, layers, rows, heads, slots): the same of each of the newest frames alone, the newest last.
        queries: moments, (layers, rows, heads, d), of the queries before rotation of all frames so far.
        mean_rotation: complex (d / 2,): mean rotation over the tokens of the frame to come.
        newest: number of the newest frame.
        budget: entries that may stay in each head.
        tokens_per_frame, tokens_per_coarse_frame: entries of one frame; the latter None for hosts without coarse frames.
        tokens_per_row: tokens of a frame side by side; ``cell // tokens_per_row`` is a full token's row.
    """

    frame: Tensor
    cell: Tensor
    kind: Tensor
    weight: Tensor
    position: Tensor
    key: Tensor
    value: Tensor
    rotated_key: Tensor
    accumulated: Tensor | None
    received: Tensor | None
    queries: QueryMoments | None
    mean_rotation: Tensor
    newest: int
    budget: int
    tokens_per_frame: int
    tokens_per_coarse_frame: int | None
    tokens_per_row: int

    def quarters(self, group: Tensor) -> Tensor:
        """The slot that stands for the 2×2 full tokens around each entry: the oldest upper left one of its group.

        Args:
            group: int64 (layers, rows, heads, slots), such as the frame, or the block of frames. All layers and heads of a row
                have the same entries.
        """
        cell = self.cell[0, :, 0]
        down, across = cell // self.tokens_per_row, cell % self.tokens_per_row
        corner = down // SPACING * SPACING * self.tokens_per_row + across // SPACING * SPACING
        place = group[0, :, 0] * self.tokens_per_frame + corner
        stands = (place[:, :, None] == place[:, None, :]) & (cell == corner)[:, None, :]
        return stands.int().argmax(dim=-1)[None, :, None].expand_as(group)


class TokenCache:
    """The entries of a batch of rollouts.

    Clean frames are written by the transformer over the last tokens of a `NextFrame` that `prepare` makes, and then kept by
    `append` or, in the place of full ones, as coarse tokens by `coarsen` and as blocks by `compress`.

    Args:
        model: the transformer.
        like: a latent (C, h, w).
        num_rows, num_branches: rollouts, and 2 with guidance (the null class first), else 1.
        max_gap: the largest distance in time between neighbouring kept frames, and between the newest and the frame to come;
            1 numbers the kept frames without gaps, as the benchmark does, None keeps true distances.
        attention_frames: for how many of the newest frames received attention is kept apart; 0 for no attention statistics.
        query_moments: whether moments of queries are kept.
        compressor: makes the tokens of blocks; None for none.

    Raises:
        ValueError: on a max_gap below 1.
    """

    def __init__(
        self,
        model: FAR,
        like: Tensor,
        num_rows: int,
        num_branches: int = 1,
        *,
        max_gap: int | None = 1,
        attention_frames: int = 0,
        query_moments: bool = False,
        compressor: Compressor | None = None,
    ) -> None:
        if max_gap is not None and max_gap < 1:
            raise ValueError(
                f"the largest gap between kept frames must be at least 1, or None for true distances, got {max_gap}"
            )
        self.model, self.max_gap = model, max_gap
        self.num_rows, self.num_branches = num_rows, num_branches
        self.attention_frames, self.query_moments = attention_frames, query_moments
        self.tokens_per_frame = model.tokens_per_frame(like)
        self.tokens_per_row = like.shape[-1] // model.patch_size
        tables = {FULL: model.frame_table(like)}
        self._covering: dict[int, Tensor] = {}
        self.tokens_per_coarse_frame = None
        if isinstance(model, FARLong):
            tables[COARSE] = model.frame_table(like, coarse=True)
            self.tokens_per_coarse_frame = tables[COARSE].shape[1]
            self._covering[COARSE] = _covering(like, model, model.context_patch_size // model.patch_size)
        self.compressor = compressor
        if compressor is not None:
            tables[COMPRESSED] = compressor.table(like, model)
            self._covering[COMPRESSED] = _covering(like, model, SPACING)
        self._cells = torch.cat(list(tables.values()), dim=1)[0, :, 0]
        starts = torch.tensor([0, *(table.shape[1] for table in tables.values())]).cumsum(dim=0).tolist()
        self._first_cell = dict(zip(tables, starts, strict=False))
        self._tables = tables
        num_layers = len(model.transformer_blocks)
        _, _, heads, dim = model.layer_shape(1, 1)
        shape = (num_layers, num_rows, heads, 0)
        whole = {"dtype": torch.int64, "device": like.device}
        self.frame = torch.empty(shape, **whole)
        self.cell = torch.empty(shape, **whole)
        self.kind = torch.empty(shape, **whole)
        self.weight = torch.empty(shape, device=like.device)
        self.accumulated = torch.empty(shape, device=like.device)
        self.received = torch.empty((attention_frames, *shape), device=like.device)
        self.key = like.new_empty((num_branches, *shape, dim))
        self.value = like.new_empty((num_branches, *shape, dim))
        self.queries: QueryMoments | None = None

    @property
    def num_slots(self) -> int:
        """Slots of every head; each new frame attends to as many entries or fewer."""
        return self.frame.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that hold entries."""
        held = (self.frame, self.cell, self.kind, self.weight, self.accumulated, self.received, self.key, self.value)
        return sum(tensor.nbytes for tensor in held)

    def counts(self) -> Tensor:
        """Entries of every head (layers, rows, heads)."""
        return (self.kind != EMPTY).sum(dim=-1)

    def kept_frames(self, row: int, kind: int | None = None) -> list[int]:
        """Numbers of the frames of which a row has entries (of this kind) in any layer or head, ascending."""
        chosen = self.kind[:, row] != EMPTY if kind is None else self.kind[:, row] == kind
        return self.frame[:, row][chosen].unique().tolist()

    def positions(self, query: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Positions in time (layers, R, heads, slots) relative to frames of these numbers (R,); 0 for later entries.

        The distance of neighbouring kept frames of a head counts as at most ``max_gap``.
        """
        reference = query[None, :, None, None]
        frames = torch.minimum(self.frame[:, rows], reference)
        following = torch.cat([frames[..., 1:], reference.expand(*frames.shape[:3], 1)], dim=-1)
        gaps = following - frames
        if self.max_gap is not None:
            gaps = gaps.clamp(max=self.max_gap)
        # Empty slots come first, so that what is between them and the oldest entry reaches no other.
        return -gaps.flip(-1).cumsum(dim=-1).flip(-1)

    def prepare(self, query: Tensor, rows: Tensor | slice = slice(None), kind: int = FULL) -> NextFrame:
        """The frame of number ``query`` (R,) of these rows, about to attend to the entries of earlier frames.

        Args:
            kind: of its tokens, FULL, COARSE, which attend to coarse ones alone, or COMPRESSED, where it is a block's first.
        """
        positions, kinds, weight = self.positions(query, rows), self.kind[:, rows], self.weight[:, rows]
        table = self._tables[kind]
        num_new = table.shape[1]
        keys = self._rotated(self.key[:, :, rows], positions, self.cell[:, rows])
        shape = self.model.layer_shape(self.num_branches * kinds.shape[1], self.num_slots + num_new)
        memory = keys.new_empty((len(kinds), 2, *shape))
        for part, entries in enumerate((keys, self.value[:, :, rows])):
            memory[:, part, :, : self.num_slots] = entries.permute(1, 0, 2, 4, 3, 5).flatten(1, 2)
        hidden = kinds != COARSE if kind == COARSE else kinds == EMPTY
        hidden = hidden | (self.frame[:, rows] >= query[None, :, None, None])
        logits = weight.clamp(min=1).log() + self.model.slope_scale * positions
        if self.model.slope_scale == 0 and not bool((hidden | (weight != 1)).any()):
            return NextFrame(memory, table, [None] * len(memory))
        logits = logits.masked_fill(hidden, float("-inf"))
        masks = torch.nn.functional.pad(_branched(logits, self.num_branches), (0, num_new))[..., None, :]
        return NextFrame(memory, table, masks.to(memory.dtype))

    def append(self, number: int, written: NextFrame, received: Tensor | None = None, queries: Tensor | None = None) -> None:
        """Keep the tokens of a full frame of this number that were written over the last tokens of what was prepared.

        Args:
            received: attention (layers, rows, heads, slots + S) that its queries paid to the entries and to its own tokens.
            queries: its queries before rotation (layers, rows, S, heads, d).
        """
        key, value = self._written(written, FULL)
        cells = torch.arange(self.tokens_per_frame, device=key.device)
        shape = key.shape[1:5]
        self._extend(key, value, torch.full(shape, number, device=key.device), cells, FULL)
        if received is not None:
            self.accumulated += received
            self.received = torch.cat([self.received, received[None]])[-self.attention_frames :]
        if queries is not None:
            self.queries = QueryMoments.of(queries.float()).merged(self.queries)

    def coarsen(self, numbers: Sequence[int], rows: Tensor, written: NextFrame) -> None:
        """Replace full tokens of one frame of each of these rows by coarse ones, where a token that they cover was left.

        Args:
            numbers: of the frames, (R,).
            written: with these frames' coarse tokens at the end of its memory.
        """
        self._replace(numbers, 1, rows, written, COARSE)

    def compress(self, firsts: Sequence[int], rows: Tensor, written: NextFrame) -> None:
        """Replace the full tokens of a block of frames of each of these rows by compressed ones, as `coarsen` does.

        Args:
            firsts: first frames of the blocks (R,).
            written: with the blocks' tokens at the end of its memory.
        """
        self._replace(firsts, self.compressor.block_frames, rows, written, COMPRESSED)

    def _replace(self, firsts: Sequence[int], length: int, rows: Tensor, written: NextFrame, kind: int) -> None:
        """Replace full tokens of the frames from these first ones on by what was written, of this kind."""
        key, value = self._written(written, kind)
        num_new = key.shape[-2]
        first = torch.tensor(firsts, device=key.device)[None, :, None, None]
        frames = self.frame[:, rows]
        old = (frames >= first) & (frames < first + length) & (self.kind[:, rows] == FULL)
        covering = self._covering[kind][self.cell[:, rows].clamp(max=self.tokens_per_frame - 1)]
        present = _scattered(old.float(), covering, num_new) > 0
        statistics = {name: getattr(self, name)[..., rows, :, :] for name in STATISTICS}
        summed = {name: _scattered(values * old, covering, num_new) for name, values in statistics.items()}
        emptied = torch.zeros_like(self.kind, dtype=torch.bool)
        emptied[:, rows] = old
        self._empty(emptied)
        wide = (len(present), self.num_rows, *present.shape[2:])
        whole_key, whole_value = (x.new_zeros((self.num_branches, *wide, x.shape[-1])) for x in (key, value))
        whole_key[:, :, rows], whole_value[:, :, rows] = key, value
        frame = torch.full(wide, NO_FRAME, device=key.device)
        frame[:, rows] = torch.where(present, first, NO_FRAME)
        cells = self._first_cell[kind] + torch.arange(num_new, device=key.device)
        start = self.num_slots
        self._extend(whole_key, whole_value, frame, cells, kind)
        for name, values in summed.items():
            getattr(self, name)[..., rows, :, start:] = values
        self._compact()

    def regroup(self, into: Tensor) -> None:
        """Drop and merge entries.

        The value of a merged entry is the mean by weight, and so is its key as the frame to come meets it, rotated: what stays
        behind of the time and place of the others is in the key. (Entries age alike, so that this holds for later frames too.)
        Weights and statistics are added; frame and place are those of the entry that the others are merged into.

        Args:
            into: int64 (layers, rows, heads, slots): the slot into which each entry is merged, its own for one that stays as it
                is, −1 for one that is dropped. An entry that others are merged into stays.
        """
        own = torch.arange(self.num_slots, device=into.device).expand_as(into)
        moved = (into >= 0) & (into != own)
        if bool(moved.any()):
            target = torch.where(into >= 0, into, own)
            share = self.weight * (into >= 0)
            weight = torch.zeros_like(self.weight).scatter_add_(-1, target, share)
            merged = torch.zeros_like(self.kind).scatter_add_(-1, target, moved.long()) > 0
            newest = self.frame.amax(dim=(0, 2, 3))
            table = self._rotations(self.positions(newest), self.cell)
            means = []
            for values in (rotate(self.key.float(), table), self.value.float()):
                index = target[None, ..., None].expand_as(values)
                total = torch.zeros_like(values).scatter_add_(-2, index, values * share[..., None])
                means.append(total / weight.clamp(min=1)[..., None])
            means[0] = rotate(means[0], table.conj())
            for name, mean in zip(("key", "value"), means, strict=True):
                values = getattr(self, name)
                setattr(self, name, torch.where(merged[..., None], mean.to(values.dtype), values))
            for name in STATISTICS:
                values = getattr(self, name) * (into >= 0)
                setattr(self, name, torch.zeros_like(values).scatter_add_(-1, target.expand_as(values), values))
            self.weight = torch.where(merged, weight, self.weight)
            self.kind = torch.where(merged, MERGED, self.kind)
        self._empty(into != own)
        self._compact()

    def view(self, newest: int, budget: int) -> CacheView:
        """What a policy is shown after a frame of this number was kept."""
        coming = torch.full((self.num_rows,), newest + 1, device=self.frame.device)
        positions = self.positions(coming)
        return CacheView(
            frame=self.frame,
            cell=self.cell,
            kind=self.kind,
            weight=self.weight,
            position=positions,
            key=self.key[-1],
            value=self.value[-1],
            rotated_key=self._rotated(self.key[-1:].float(), positions, self.cell)[0],
            accumulated=self.accumulated if self.attention_frames else None,
            received=self.received if self.attention_frames else None,
            queries=self.queries,
            mean_rotation=self._tables[FULL].mean(dim=1)[0, 0],
            newest=newest,
            budget=budget,
            tokens_per_frame=self.tokens_per_frame,
            tokens_per_coarse_frame=self.tokens_per_coarse_frame,
            tokens_per_row=self.tokens_per_row,
        )

    def _rotated(self, keys: Tensor, positions: Tensor, cells: Tensor) -> Tensor:
        """Keys (branches, layers, R, heads, slots, d) at positions in time and places (layers, R, heads, slots)."""
        return rotate(keys, self._rotations(positions, cells))

    def _rotations(self, positions: Tensor, cells: Tensor) -> Tensor:
        """Complex numbers (layers, R, heads, slots, d / 2) by which keys are rotated."""
        farthest = int(-positions.min()) if positions.numel() else 0
        times = -torch.arange(farthest + 1, device=positions.device, dtype=torch.float64)
        table = rotary_table(times, 1, 1, self.model.axes_dims_rope)[:, 0]
        return table[-positions] * self._cells[cells]

    def _written(self, written: NextFrame, kind: int) -> tuple[Tensor, Tensor]:
        """Keys before rotation and values (branches, layers, R, heads, S, d) of the last tokens of a memory."""
        table = self._tables[kind]
        last = written.memory[:, :, :, -table.shape[1] :]
        pair = (rotate(last[:, 0], table.conj()), last[:, 1])
        key, value = (x.unflatten(1, (self.num_branches, -1)).permute(1, 0, 2, 4, 3, 5) for x in pair)
        return key, value

    def _extend(self, key: Tensor, value: Tensor, frame: Tensor, cells: Tensor, kind: int) -> None:
        """Add slots for keys and values (branches, layers, rows, heads, n, d) of weight 1; those of no frame are empty."""
        self.key, self.value = torch.cat([self.key, key], dim=-2), torch.cat([self.value, value], dim=-2)
        self.frame = torch.cat([self.frame, frame], dim=-1)
        self.cell = torch.cat([self.cell, cells.expand_as(frame)], dim=-1)
        self.kind = torch.cat([self.kind, torch.where(frame == NO_FRAME, EMPTY, kind)], dim=-1)
        self.weight = torch.cat([self.weight, (frame != NO_FRAME).float()], dim=-1)
        for name in STATISTICS:
            setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, len(cells))))

    def _empty(self, chosen: Tensor) -> None:
        """Clear slots; the tensors of before are not changed."""
        self.kind = self.kind.masked_fill(chosen, EMPTY)
        self.frame = self.frame.masked_fill(chosen, NO_FRAME)
        self.weight = self.weight.masked_fill(chosen, 0)

    def _compact(self) -> None:
        """Sort by frame, empty slots first, and leave out as many of those as every head has."""
        most = int(self.counts().max())
        order = self.frame.sort(dim=-1, stable=True).indices[..., self.num_slots - most :]
        for name in ("frame", "cell", "kind", "weight"):
            setattr(self, name, getattr(self, name).gather(-1, order))
        for name in STATISTICS:
            values = getattr(self, name)
            setattr(self, name, values.gather(-1, order.expand(*values.shape[:-1], most)))
        for name in ("key", "value"):
            values = getattr(self, name)
            setattr(self, name, values.gather(-2, order[None, ..., None].expand(*values.shape[:-2], most, values.shape[-1])))


def _branched(entries: Tensor, num_branches: int) -> Tensor:
    """(layers, R, …) to (layers, branches · R, …)."""
    return entries.repeat(1, num_branches, *[1] * (entries.ndim - 2))


def _scattered(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums (…, size) of values (…, n) by ``index``, of the shape of the last axes of values."""
    out = torch.zeros((*values.shape[:-1], size), device=values.device)
    return out.scatter_add_(-1, index.expand_as(values), values.float())


def _covering(like: Tensor, model: FAR, ratio: int) -> Tensor:
    """For each full token of a latent (C, h, w), row by row, the one of ``ratio`` times fewer per axis that covers it; (S,)."""
    height, width = (side // model.patch_size for side in like.shape[-2:])
    down, across = torch.arange(height) // ratio, torch.arange(width) // ratio
    return (down[:, None] * (width // ratio) + across[None, :]).flatten().to(like.device)
