"""Memory of a training on the CPU."""
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep the memory of freed tensors for those of the next step; True if it will.

    By default it maps each large block anew and unmaps it when it is freed, and the kernel clears all its pages each
    time. Other allocators (an `LD_PRELOAD`) and other systems are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
