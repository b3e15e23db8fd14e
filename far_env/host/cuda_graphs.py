"""The next frame as one CUDA graph: kept frames are encoded and the ODE is solved by one launch instead of thousands.

A graph repeats the same kernels on the same addresses. It is therefore made for one number of kept frames and of rows, reads
its inputs from tensors that stay in place, and contains neither uploads nor decisions that depend on values.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from far_env.host.far import FAR
from far_env.host.sampler import FrameSampler

MAX_GRAPHS = 32
WARM_UPS = 2
"""Passes before a capture, in which libraries choose kernels and reserve their working memory."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a pass without arguments to one that repeats it: on what the same inputs hold then, into the same output."""


class FrameShape(NamedTuple):
    """What a graph is made for, besides the number of rows.

    Attributes:
        num_kept: clean frames before the new one.
        latent_shape: (C, h, w).
        dtype: of latents and weights.
        num_steps: ODE steps.
        guidance: see `far_env.host.sampler.FrameSampler`.
        classes: "action", "label" or None for the null class.
    """

    num_kept: int
    latent_shape: tuple[int, int, int]
    dtype: torch.dtype
    num_steps: int
    guidance: float = 1.0
    classes: str | None = None


class CapturedFrame:
    """One graph with its inputs.

    Args:
        model: whose weights the graph reads where they are.
        shape: of the frames.
        num_rows: the most rows that a call may have.
        capture: makes the graph.
    """

    def __init__(self, model: FAR, shape: FrameShape, num_rows: int, capture: Capture) -> None:
        device = next(model.parameters()).device
        self.num_rows = num_rows
        self._kind = shape.classes
        # The graph reads what the sampler holds, so it must live as long.
        self._sampler = FrameSampler(model, shape.num_steps, shape.guidance)
        self._kept = torch.zeros(num_rows, shape.num_kept, *shape.latent_shape, device=device, dtype=shape.dtype)
        self._noise = torch.zeros(num_rows, 1, *shape.latent_shape, device=device, dtype=shape.dtype)
        self._positions = torch.arange(shape.num_kept + 1, device=device)
        of_classes = {"action": (num_rows, shape.num_kept + 1), "label": (num_rows,)}
        size = of_classes.get(shape.classes)
        self._classes = None if size is None else torch.zeros(size, dtype=torch.int64, device=device)
        self._repeat = capture(self.compute)

    def compute(self) -> Tensor:
        """The pass that is captured: the next latents (num_rows, 1, C, h, w) of what the inputs hold."""
        classes = {} if self._kind is None else {self._kind: self._classes}
        return self._sampler.after(self._kept, self._noise, self._positions, **classes)

    def __call__(self, kept: Tensor, noise: Tensor, positions: Tensor, classes: Tensor | None = None) -> Tensor:
        """The next frame of at most ``num_rows`` rows; the graph computes the others too, from what they held before.

        Args:
            kept: clean latents (B, K, C, h, w).
            noise: (B, 1, C, h, w).
            positions: ascending time positions (K+1,).
            classes: labels (B,) or actions (B, K+1), if the graph takes them.

        Returns:
            Latents (B, 1, C, h, w), which later calls do not change.
        """
        rows = len(noise)
        self._kept[:rows].copy_(kept)
        self._noise[:rows].copy_(noise)
        self._positions.copy_(positions)
        if self._classes is not None:
            self._classes[:rows].copy_(classes)
        return self._repeat()[:rows].clone()


class CudaGraphs:
    """The graphs of one model. The one that was used least recently is dropped for a new one.

    Args:
        model: a frozen FAR transformer.
        capture: makes a graph, see `CudaCapture`.
        max_graphs: how many are kept.
    """

    def __init__(self, model: FAR, capture: Capture, max_graphs: int = MAX_GRAPHS) -> None:
        self.max_graphs = max_graphs
        self._model, self._capture = model, capture
        self._graphs: OrderedDict[tuple[FrameShape, int], CapturedFrame] = OrderedDict()
        self._asked: set[tuple[FrameShape, int]] = set()
        self._too_large: set[tuple[FrameShape, int]] = set()
        self._failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, shape: FrameShape, num_rows: int) -> CapturedFrame | None:
        """A graph for at least ``num_rows`` and less than twice as many rows, or None.

        It is made when it is asked for the second time, since making it takes longer than a frame; so is a dropped one.
        One that does not fit into memory is not tried again, and none is after any other error in making one.
        """
        key = (shape, num_rows)
        fitting = [rows for other, rows in self._graphs if other == shape and num_rows <= rows < 2 * num_rows]
        if fitting:
            key = (shape, min(fitting))
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key in self._too_large or self._failed:
            return None
        if key not in self._asked:
            self._asked.add(key)
            return None
        try:
            # Tensors of torch.inference_mode could not be written to in a later call without it.
            with torch.inference_mode(False), torch.no_grad():
                self._graphs[key] = CapturedFrame(self._model, shape, num_rows, self._capture)
        except torch.OutOfMemoryError:
            self._too_large.add(key)
            self._graphs.clear()
            return None
        except RuntimeError as error:
            self._failed = True
            self._graphs.clear()
            reason = str(error).partition("\n")[0]
            warnings.warn(f"frames are computed without CUDA graphs, because making one failed: {reason}", stacklevel=2)
            return None
        if len(self._graphs) > self.max_graphs:
            self._asked.discard(self._graphs.popitem(last=False)[0])
        return self._graphs[key]


class CudaCapture:
    """Captures passes as CUDA graphs. They share memory, so what one returns must be copied before another is repeated.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The pass as a graph. Raises `torch.OutOfMemoryError` if it needs more memory than is free."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    compute()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Only this thread's calls may disturb the capture; others may use the GPU meanwhile.
                with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                    output = compute()
            finally:
                torch.cuda.set_stream(current)  # which torch leaves out where the capture fails at its end

        def repeat() -> Tensor:
            graph.replay()
            return output

        return repeat
