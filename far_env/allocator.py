"""What a process keeps in memory for its next tensors and products, and when it is returned.

The C library's allocator keeps freed memory for the next tensors, and returns it between parts of a command. By default glibc
returns the end of its heap to the system as soon as a few megabytes are free there, and every page that is taken again costs a
page fault: a tenth to a fifth of the time of small networks. On other systems these functions do nothing.

oneDNN keeps the kernels that it has compiled, up to a thousand shapes: hundreds of megabytes where batches are of many sizes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt, from malloc.h."""
_KEPT_BYTES = 2**30
_PAD_BYTES = 2**24
_LARGEST_IN_HEAP = 2**25
"""The largest that glibc accepts: tensors above it are mapped on their own, and returned when they are freed."""
_KEPT_KERNELS = 256


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


def keep_fewer_kernels() -> None:
    """Let oneDNN keep the kernels of fewer shapes; to be called before the first product.

    A rollout needs about a hundred. Another number in the environment variable of oneDNN is left as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KEPT_KERNELS))


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "gnu_get_libc_version") else None
