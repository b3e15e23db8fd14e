"""Policies for extended rollouts (`far_env.rollout.extended`), in which a demoted frame stays as a few coarse tokens and the
budget counts tokens. The benchmark has neither, so they are not among the baselines that are listed.

Future Forcing (arXiv 2605.30083) merges the tokens of redundant frames into one, which a plan cannot express: it can keep,
demote or drop a frame, and the host receives frames as they were generated. The average of two latents would be a frame that no
rollout generated, at one position instead of two. The baseline ``future_forcing`` drops redundant frames instead.
"""

from __future__ import annotations

from typing import ClassVar

from far_env.baselines.filling import count, share
from far_env.baselines.partition import slots
from far_env.baselines.recency import RecentFill
from far_env.contract import FrameMeta, RetentionPolicy, RolloutState, TemporalCachePlan, make_plan
from far_env.errors import unknown_name

TOKEN_NUMBERS = ("token_budget", "tokens_per_fine_frame", "tokens_per_coarse_frame")


class TokenPartition:
    """Fine sinks, a coarse middle and fine newest frames, each with a share of the tokens.

    Args:
        sink, recent: as in `baselines.partition.slots`, of the whole fine frames that fit the token budget.
        demote: whether the tokens that sinks and newest frames leave hold the middle's newest frames, demoted. Otherwise the
            newest frames receive them, as fine frames.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    anchor_rule: ClassVar[str] = "none"

    def __init__(self, sink: int | float, recent: int | float, demote: bool) -> None:
        self.sink, self.recent, self.demote = sink, recent, demote

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Fill the token budget. Raises ValueError where there is none, as in the benchmark."""
        missing = [key for key in TOKEN_NUMBERS if key not in budget_state]
        if missing:
            raise ValueError(f"{self.name} needs a token budget, which only far-env extended gives; choose a baseline instead")
        budget, fine, coarse = (int(budget_state[key]) for key in TOKEN_NUMBERS)
        num_rows = len(chunk_meta_list)
        num_sink, places, num_recent = slots(budget // fine, self.sink, self.recent)
        if not self.demote:
            num_recent += places
        num_recent = min(num_recent, num_rows)
        num_sink = min(num_sink, num_rows - num_recent)
        num_coarse = (budget - (num_sink + num_recent) * fine) // coarse if self.demote else 0
        middle = range(num_rows)[num_sink : num_rows - num_recent]
        demoted = middle[max(0, len(middle) - num_coarse) :]
        kept = [*range(num_sink), *demoted, *range(num_rows - num_recent, num_rows)]
        return make_plan(
            kept,
            num_rows,
            anchors=demoted,
            retention_family="anchor",
            anchor_preservation_rule=self.anchor_rule,
            queue_depth=num_coarse,
            long_term_budget_fraction=num_coarse * coarse / budget,
            compression_mode="coarse" if self.demote else "none",
        )


class SinkRecentFine(TokenPartition):
    """StreamingLLM's sinks and newest frames, all fine. (The baseline sink_recent demotes its sinks: coarse here.)

    Source: StreamingLLM, arXiv 2309.17453. Parameter ``n_sink``.
    """

    name = "sink_recent_fine"
    source = "StreamingLLM, arXiv 2309.17453"
    anchor_rule = "first_frames"

    def __init__(self, n_sink: int = 1) -> None:
        super().__init__(sink=count(self.name, "n_sink", n_sink), recent=1, demote=False)


class FarCoarse(TokenPartition):
    """FAR-Long's context under a budget: the newest frames fine, those before them coarse, as far back as the tokens suffice.

    Faithful: the two resolutions in this order, the only one that the host was trained with. Adapted: the fine frames have a
    share of the tokens instead of a window of fixed length, and the coarse frames do not reach back to the beginning.

    Source: FAR, arXiv 2503.19325. Parameter ``f_recent``, the share of the token budget for fine frames.
    """

    name = "far_coarse"
    source = "FAR, arXiv 2503.19325"

    def __init__(self, f_recent: float = 0.5) -> None:
        super().__init__(sink=0, recent=share(self.name, "f_recent", f_recent), demote=True)


class PackForcingCoarse(TokenPartition):
    """PackForcing's sinks, compressed middle and newest frames, with the host's coarse tokens for the middle.

    Faithful: the three parts, the middle compressed and a queue: its oldest frame is dropped when it is full. Adapted: the
    host's coarse tokens for those of a compressor with 32 times fewer; frames for 4-frame blocks; no choice among the
    compressed frames for each new one: all are in the context. The host was trained without fine frames before coarse ones.

    Source: PackForcing, arXiv 2603.25730. Parameters ``f_sink``, ``f_recent``, shares of the token budget.
    """

    name = "packforcing_coarse"
    source = "PackForcing, arXiv 2603.25730"
    anchor_rule = "first_frames"

    def __init__(self, f_sink: float = 0.5, f_recent: float = 0.25) -> None:
        sink, recent = share(self.name, "f_sink", f_sink, some=True), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, demote=True)


EXTENDED: dict[str, type] = {cls.name: cls for cls in (RecentFill, SinkRecentFine, FarCoarse, PackForcingCoarse)}
"""Policies for token budgets, by name; recent_fill is the baseline."""


def make(name: str) -> RetentionPolicy:
    """A policy by name. Raises ValueError on an unknown one."""
    if name not in EXTENDED:
        raise ValueError(unknown_name("extended policy", name, list(EXTENDED)))
    return EXTENDED[name]()
