# SPDX-License-Identifier: Apache-2.0
"""Pages of host memory: mapped, touched by several threads, bound to NUMA nodes without libnuma."""

from __future__ import annotations

import ctypes
import errno
import mmap
import operator
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np

from portakv.arguments import as_whole
from portakv.errors import HostMemoryError, Unsupported
from portakv.runtime.linux import require_linux

PAGE = mmap.PAGESIZE
HugePages = Literal["auto", "transparent", "reserved", "never"]
_HUGE = 2 << 20  # what x86 and most arm64 kernels call huge
MAP_HUGETLB = 0x40000
_MS_ASYNC = 1
_MPOL_BIND = 2
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_load = cache(ctypes.CDLL)
SLICE = 64 << 20  # bytes one thread touches at a time; whole huge pages
#: Seconds in which one piece of shared memory gets huge pages; what no thread has begun then has
#: small ones. Two cores brought 0.6 - 10 GiB in a second (benchmarks/notes/stores.md).
HUGE_SECONDS = 5.0

# Numbers of the system call, from the kernel's tables of each architecture.
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "loongarch64": 235, "ppc64le": 259}
_WHY = {
    errno.EPERM: "the kernel forbids it; give the container CAP_SYS_NICE, or use numactl --membind",
    errno.ENOSYS: "this kernel was built without NUMA; leave numa=None",
    errno.EINVAL: "the process may not use that node (cpuset); pass one that it may use",
}


def bytes_at(address: int, nbytes: int) -> Any:
    """Return the bytes at an address as a buffer, which arrays and tensors made from it retain."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def whole(name: str, number: Any, least: int = 0, do: str = "pass one") -> int:
    """Return a whole number of at least ``least``; raise `HostMemoryError`, which ends with what to
    do."""
    value = as_whole(number)
    if value is not None and value >= least:
        return value
    raise HostMemoryError(
        f"Expected {name} to be a whole number, {least} or more, got {number!r}: {do}."
    )


def address_of(mapping: mmap.mmap) -> int:
    """Return the address of a mapping."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def to_pages(nbytes: int, page: int = PAGE) -> int:
    """Return ``nbytes``, rounded up to whole pages."""
    return -(-nbytes // page) * page


def map_private(nbytes: int, huge_pages: str) -> tuple[mmap.mmap, list[str]]:
    """Return a private mapping of exactly ``nbytes`` (the kernel ends it with its page), and notes
    on huge pages; ``auto`` gives no notes.

    Raises:
        HostMemoryError: the kernel has no space for it.
    """
    require_linux("host memory of PortaKV")
    notes: list[str] = []
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if huge_pages == "reserved":
        length = to_pages(nbytes, _HUGE)
        with suppress(OSError):  # no reserved pages are free, or the kernel has none
            mapping = mmap.mmap(-1, length, flags=flags | MAP_HUGETLB)
            return mapping, [f"it lies in reserved huge pages, {length} bytes"]
        notes.append(
            "no reserved huge pages are free (vm.nr_hugepages); requested transparent pages"
        )
    try:
        free = available()
        if nbytes > free:
            raise OSError(errno.ENOMEM, f"{free} are available to this process; more would kill it")
        mapping = mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        raise HostMemoryError(
            f"Expected to map {nbytes} bytes of host memory, got an error ({error.strerror}). "
            f"Request less, or raise the limit (cgroup, ulimit -v, overcommit)."
        ) from None
    if huge_pages != "never":  # of "auto" nothing is promised: small pages serve as well
        code = libc("madvise", address_of(mapping), nbytes, _MADV_HUGEPAGE)
        if huge_pages != "auto":
            answer = f"refused ({os.strerror(code)})" if code else "advised"
            notes.append(f"transparent huge pages were {answer}")
    return mapping, notes


def use_huge_pages(descriptor: int, nbytes: int) -> int:
    """Have the kernel put a new file of shared memory into huge pages; return how many bytes are.

    Shared memory has small pages by default, into which a disk reads at two thirds of the rate.
    This call needs no setting of the machine. It brings fewer bytes than ``nbytes``, which is no
    error, if the kernel is older than 6.1, forbids huge pages, lacks memory without gaps, or takes
    longer than `HUGE_SECONDS`. Of a part that the kernel refuses, one small page for each huge page
    may be allocated. Raises `OSError` if there is no space.
    """
    size = nbytes // _HUGE * _HUGE
    # The kernel takes only mappings whose addresses are, as the file is, at whole huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        reserved = mmap.mmap(-1, size + _HUGE, flags=flags, prot=mmap.PROT_READ)
    except OSError:  # a limit of addresses
        return 0
    with reserved:
        start = to_pages(address_of(reserved), _HUGE)
        # Map the file there, in place of the other mapping.
        place = _load(None, use_errno=True).mmap
        place.restype = ctypes.c_void_p
        both = mmap.PROT_READ | mmap.PROT_WRITE
        words = start, size, both, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0
        if not size or place(*map(ctypes.c_ulong, words)) != start:
            return 0
        last = monotonic() + HUGE_SECONDS

        def bring(at: int) -> int:
            if monotonic() > last:
                return 0
            end = min(at + SLICE, size)
            for page in range(at, end, _HUGE):
                os.pwrite(descriptor, b"\0", page)  # the kernel leaves out what has no page at all
            refused = libc("madvise", start + at, end - at, _MADV_COLLAPSE)
            return 0 if refused else end - at

        # If the kernel refuses the first, it would refuse the others too.
        brought = bring(0)
        if brought and size > SLICE:
            with suppress(RuntimeError), ThreadPoolExecutor(_threads()) as pool:  # no more threads
                brought += sum(pool.map(bring, range(SLICE, size, SLICE)))
        return brought


def is_mapped(address: int, nbytes: int) -> bool:
    """Return True if every page of the range belongs to the process; read none of them."""
    start = address // PAGE * PAGE
    end = to_pages(address + nbytes)
    return end < 1 << 64 and libc("msync", start, end - start, _MS_ASYNC) == 0


def touch(address: int, nbytes: int, threads: int | None = None) -> None:
    """Have the kernel allocate every page, from several threads; the contents of pages stay.

    ``threads`` None: one for each core that the process may use, at most 16.

    Raises:
        HostMemoryError: the kernel has no pages left, or none on the requested node.
    """
    end = address + nbytes
    # Cut at multiples of a slice, so that two threads share no huge page.
    edges = [address, *range((address // SLICE + 1) * SLICE, end, SLICE), end]
    if len(edges) == 2:
        _touch_slice(address, end)
        return
    with ThreadPoolExecutor(threads or _threads()) as pool:
        list(pool.map(_touch_slice, edges, edges[1:]))


def _threads() -> int:
    """Return one thread for each core that the process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def _touch_slice(start: int, end: int) -> None:
    code = libc("madvise", start, end - start, _MADV_POPULATE_WRITE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
        # A kernel without this call: write the contents back, since the page may be shared.
        np.frombuffer(bytes_at(start, end - start), np.uint8)[::PAGE] |= 0  # without the GIL
    elif code:
        raise HostMemoryError(
            f"Expected pages for {end - start} bytes of mapped host memory, got none from the "
            f"kernel ({os.strerror(code)}). Request less memory, or another NUMA node."
        )


def available() -> int:
    """Return the bytes that can be touched before the kernel starts to kill: the machine's and the
    cgroup's."""
    (kib,) = re.findall(r"(?m)^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    limits = [int(kib) * 1024]
    root = Path("/sys/fs/cgroup")
    second = "memory.max", "memory.current", "memory.stat"
    first = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    for names in (second, first):
        with suppress(OSError, ValueError):  # no such cgroup, or its limit is "max"
            limit, used, stat = ((root / name).read_text() for name in names)
            counts = dict(re.findall(r"(?m)^(file|cache|shmem) (\d+)$", stat))
            # The kernel drops the page cache first, but not shared memory.
            files = int(counts.get("file") or counts.get("cache", 0)) - int(counts.get("shmem", 0))
            limits.append(max(0, int(limit) - int(used) + max(0, files)))
    return min(limits)


def libc(name: str, *arguments: object) -> int:
    """Call a function of the C library, numbers as words; return its errno, or 0."""
    words = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    failed = getattr(_load(None, use_errno=True), name)(*words)
    return (ctypes.get_errno() or errno.EINVAL) if failed else 0


def nodes() -> list[int]:
    """Return the nodes of this machine that have memory; empty if the kernel reports none."""
    with suppress(OSError, ValueError):  # 0-1,4
        text = Path("/sys/devices/system/node", "has_memory").read_text()
        ranges = [part.partition("-") for part in text.split(",")]
        return [node for a, _, b in ranges for node in range(int(a), int(b or a) + 1)]
    return []


def bind(address: int, nbytes: int, wanted: Any) -> None:
    """Have pages of the range that are not allocated yet come only from these nodes.

    Raises:
        Unsupported: no node, or one that does not exist; or the kernel cannot or may not bind.
    """
    requested: list[int] = []
    for listed in ([wanted], wanted):
        # It is not a list, or its elements are not whole numbers; tensors raise either class.
        with suppress(TypeError, NotImplementedError):
            found = [operator.index(node) for node in listed if not isinstance(node, bool)]
            requested = requested or found
    number = _MBIND.get(platform.machine())
    known = nodes()
    if not requested:
        why = "nodes have whole numbers; name one or more, or leave numa=None"
    elif number is None:
        why = f"the system call is not known on {platform.machine()}"
    elif not known:
        why = "this kernel reports no NUMA nodes; leave numa=None"
    elif not set(requested) <= set(known):
        why = f"this machine has the nodes {known}; pass some of these"
    else:
        bits = sum(1 << node for node in set(requested))
        mask = bits.to_bytes(8 * (max(requested) // 64 + 1), "little")
        code = libc("syscall", number, address, nbytes, _MPOL_BIND, mask, 8 * len(mask) + 1, 0)
        if code == 0:
            return
        why = _WHY.get(code, f"the kernel refused it ({os.strerror(code)})")
    named = ", ".join(map(str, requested)) or repr(wanted)
    raise Unsupported(f"Binding {nbytes} bytes of host memory to NUMA node {named}", why)
