"""A cache of tensors under a hash of everything they are computed from: host, clip, noise and kept frames."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from far_env.host.protocol import Host

DEFAULT_BYTES = 256 * 2**20
ENTRY_BYTES = 1024
"""What an entry takes besides its numbers: the key, the tensor object and the places that refer to them."""


def content_key(*parts: object) -> str:
    """Hash of all parts, 32 hex digits; bytes enter directly, everything else by its ``repr``."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes | memoryview) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


@dataclass
class MemoStatistics:
    """Accesses that found an entry (hits) or none (misses), and entries that were removed for lack of space."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class FrameMemo:
    """Tensors by key, of at most ``max_bytes`` in total; the least recently used are removed first.

    Everything that is kept counts: the whole memory that a view belongs to, and `ENTRY_BYTES` of each entry.

    Args:
        max_bytes: 0 stores nothing.

    Attributes:
        num_bytes: bytes stored now.
        statistics: counts since the memo was made.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.statistics = MemoStatistics()
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._hosts: list[Host] = []

    def __len__(self) -> int:
        return len(self._entries)

    def host_number(self, host: Host) -> int:
        """A number that identifies this host object in keys; a hash of weights would be missing for a host without files."""
        for number, other in enumerate(self._hosts):
            if other is host:
                return number
        self._hosts.append(host)
        return len(self._hosts) - 1

    def get(self, key: str) -> Tensor | None:
        """The tensor under the key, not to be changed, or None."""
        value = self._entries.get(key)
        if value is None:
            self.statistics.misses += 1
            return None
        self.statistics.hits += 1
        self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: Tensor) -> None:
        """Remember a tensor, unless it exceeds the budget alone."""
        if entry_bytes(value) > self.max_bytes:
            return
        if (before := self._entries.pop(key, None)) is not None:
            self.num_bytes -= entry_bytes(before)
        self._entries[key] = value
        self.num_bytes += entry_bytes(value)
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= entry_bytes(oldest)
            self.statistics.evictions += 1


def entry_bytes(value: Tensor) -> int:
    """What an entry of a memo takes."""
    return value.untyped_storage().nbytes() + ENTRY_BYTES
