"""The C library's allocator: freed memory is kept for the next tensors, and returned between parts of a command.

By default glibc returns the end of its heap to the system as soon as a few megabytes are free there, and every page that is
taken again costs a page fault: a tenth to a fifth of the time of small networks. On other systems these functions do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt, from malloc.h."""
_KEPT_BYTES = 2**30
_PAD_BYTES = 2**24
_LARGEST_IN_HEAP = 2**25
"""The largest that glibc accepts: tensors above it are mapped on their own, and returned when they are freed."""


def keep_freed_memory() -> bool:
    """Let the process keep up to 1 GiB of freed memory; returns whether the C library can do that."""
    library = _glibc()
    if library is None:
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _PAD_BYTES))
    return all([library.mallopt(name, value) for name, value in settings])


def return_freed_memory() -> bool:
    """Give freed memory back to the system, between parts of a work that need different amounts; returns if any was."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "gnu_get_libc_version") else None
