"""The true numbers of the frames in a history, inferred from a policy's calls.

A policy receives positions in the kept history, but neither when a frame was generated nor which frames of its plan stayed.
Since exactly the frames that it keeps stay, and one frame is added per prediction step, the numbers can be inferred.
Standard library only: exported policy files carry the source of this class.
"""

from __future__ import annotations


class FrameBirths:
    """The number of each frame in the history of one clip, counted from the clip's first context frame.

    At the first call for a clip nothing has been dropped, so its frames are 0, 1, … A call that cannot follow the last one (the
    step has not grown, or has grown by another number than that of the new frames) begins a clip.

    Attributes:
        births: the frames' numbers, oldest first.
        num_context: frames of the clip that are ground truth; negative where frames were dropped before the first call.
        last_step: the step of the last call.
    """

    def __init__(self) -> None:
        self.births: list[int] = []
        self.num_context = 0
        self.last_step = -1

    def observe(self, num_frames: int, step: int) -> bool:
        """Number the frames of a call; afterwards, call `keep`. Returns whether the call begins a clip."""
        grown = step - self.last_step
        begins = not self.births or grown <= 0 or num_frames != len(self.births) + grown
        if begins:
            self.births = []
            self.num_context = num_frames - step - 1
        self.last_step = step
        first_new = self.births[-1] + 1 if self.births else 0
        self.births = [*self.births, *range(first_new, first_new + num_frames - len(self.births))]
        return begins

    def keep(self, ids: list) -> None:
        """Record the positions in the last call's history of the frames that stay; the newest is always one of them."""
        self.births = [self.births[i] for i in ids]
