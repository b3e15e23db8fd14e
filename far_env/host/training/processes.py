"""The processes that train one host together, started by ``accelerate launch`` or ``torchrun``; usually there is one.

Every process computes its rows of each batch; gradients are averaged, so that all hold the same weights. The first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn

PATIENCE = timedelta(days=7)
"""How long processes wait for the first one, which trains the autoencoder alone."""


def is_first_process() -> bool:
    """Whether this process writes files: the only one, or the first of those that were launched together."""
    return int(os.environ.get("RANK", 0)) == 0


class Processes:
    """This process and those that were launched with it.

    Args:
        device: where this process computes if it is alone; of several, each gets its GPU, unless this is the CPU.

    Attributes:
        count: number of processes.
        index: of this one, 0 for the first.
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = None
        self.count, self.index, self.device = 1, 0, device
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs

            # Precision is set by torch.autocast in both cases, whatever the launcher's configuration says.
            options = {"mixed_precision": "no", "kwargs_handlers": [InitProcessGroupKwargs(timeout=PATIENCE)]}
            self._accelerator = Accelerator(cpu=device.type == "cpu", **options)
            self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index
            self.device = self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def rows(self, batch_size: int, parts: int) -> list[slice]:
        """The rows of a batch that this process computes, in ``parts`` of one size.

        Raises:
            ValueError: if the batch cannot be divided so.
        """
        size, rest = divmod(batch_size, self.count * parts)
        if rest or not size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of {self.count * parts}: {self.count} processes times "
                f"gradient_accumulation {parts}"
            )
        starts = range(self.index * parts * size, (self.index + 1) * parts * size, size)
        return [slice(start, start + size) for start in starts]

    def distributed(self, module: nn.Module, find_unused: bool) -> nn.Module:
        """The module, whose gradients are averaged over all processes.

        Args:
            find_unused: whether some parameters take no part in some steps.
        """
        if self._accelerator is None:
            return module
        from accelerate.utils import DistributedDataParallelKwargs

        self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
        return self._accelerator.prepare(module)

    @contextmanager
    def local_gradients(self, module: nn.Module, local: bool) -> Iterator[None]:
        """In the block, gradients are only added up in this process if ``local``."""
        with self._accelerator.no_sync(module) if self._accelerator is not None and local else nullcontext():
            yield

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        return value if self._accelerator is None else self._accelerator.reduce(value, "mean")

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process."""
        if self._accelerator is None:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
