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
from typing import Any, Literal

import numpy as np

from portakv.errors import HostMemoryError, Unsupported

PAGE = mmap.PAGESIZE
HugePages = Literal["auto", "transparent", "reserved", "never"]
_HUGE = 2 << 20  # what x86 and most arm64 kernels call huge
MAP_HUGETLB = 0x40000
_MS_ASYNC = 1
_MPOL_BIND = 2
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_load = cache(ctypes.CDLL)
SLICE = 64 << 20  # bytes one thread touches at a time; whole huge pages

# Numbers of the system call, from the kernel's tables of each architecture.
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "loongarch64": 235, "ppc64le": 259}
_WHY = {
    errno.EPERM: "the kernel forbids it; give the container CAP_SYS_NICE, or use numactl --membind",
    errno.ENOSYS: "this kernel was built without NUMA; leave numa=None",
    errno.EINVAL: "the process may not use that node (cpuset); ask for one that it may",
}


def bytes_at(address: int, nbytes: int) -> Any:
    """The bytes at an address as a buffer, which arrays and tensors made from it hold."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def whole(name: str, number: Any, least: int = 0, do: str = "pass one") -> int:
    """A whole number that is no less; raises `HostMemoryError`, which ends with what to do."""
    with suppress(TypeError):
        if not isinstance(number, bool) and operator.index(number) >= least:
            return operator.index(number)
    raise HostMemoryError(
        f"{name}={number!r} was asked for; expected a whole number, {least} or more: {do}."
    )


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping begins."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def to_pages(nbytes: int, page: int = PAGE) -> int:
    """So many bytes, rounded up to whole pages."""
    return -(-nbytes // page) * page


def map_private(nbytes: int, huge_pages: str) -> tuple[mmap.mmap, list[str]]:
    """A private mapping of exactly so many bytes (the kernel ends it with its page), and notes on
    huge pages; of ``auto``, none. Raises `HostMemoryError` if the kernel has no room for it."""
    notes: list[str] = []
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if huge_pages == "reserved":
        length = to_pages(nbytes, _HUGE)
        with suppress(OSError):
            mapping = mmap.mmap(-1, length, flags=flags | MAP_HUGETLB)
            return mapping, [f"reserved huge pages hold it, {length} bytes of them"]
        notes.append("no reserved huge pages are free (vm.nr_hugepages); asked for transparent")
    try:
        if nbytes > (room := available()):
            raise OSError(errno.ENOMEM, f"{room} are available to this process; more would kill it")
        mapping = mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        raise HostMemoryError(
            f"{nbytes} bytes of host memory were asked for, and could not be mapped "
            f"({error.strerror}); ask for less, or raise the limit (cgroup, ulimit -v, overcommit)."
        ) from None
    if huge_pages != "never":
        code = libc("madvise", address_of(mapping), nbytes, _MADV_HUGEPAGE)
        if huge_pages != "auto":
            found = f"refused ({os.strerror(code)})" if code else "advised"
            notes.append(f"transparent huge pages were {found}")
    return mapping, notes


def is_mapped(address: int, nbytes: int) -> bool:
    """True if every page of the range belongs to the process; reads none of them."""
    start = address // PAGE * PAGE
    end = to_pages(address + nbytes)
    return end < 1 << 64 and libc("msync", start, end - start, _MS_ASYNC) == 0


def touch(address: int, nbytes: int, threads: int | None = None) -> None:
    """Have the kernel give every page, from several threads at once (None: one for each core that
    the process may use, at most 16); what pages hold stays. Raises `HostMemoryError` if the kernel
    has no pages left, or none on the node asked for."""
    end = address + nbytes
    # Cut at multiples of a slice, so that two threads do not share a huge page.
    edges = [address, *range((address // SLICE + 1) * SLICE, end, SLICE), end]
    if len(edges) == 2:
        _touch_slice(address, end)
        return
    with ThreadPoolExecutor(threads or min(16, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(_touch_slice, edges, edges[1:]))


def _touch_slice(start: int, end: int) -> None:
    code = libc("madvise", start, end - start, _MADV_POPULATE_WRITE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
        # A kernel without it: what the page holds is written back, since it may be a shared one.
        np.frombuffer(bytes_at(start, end - start), np.uint8)[::PAGE] |= 0  # without the GIL
    elif code:
        raise HostMemoryError(
            f"{end - start} bytes of host memory were mapped, and the kernel has no pages for them "
            f"({os.strerror(code)}); ask for less memory, or for another NUMA node."
        )


def available() -> int:
    """Bytes that can be touched before the kernel starts to kill: of the machine, of the cgroup."""
    (kib,) = re.findall(r"(?m)^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    rooms = [int(kib) * 1024]
    root = Path("/sys/fs/cgroup")
    second = "memory.max", "memory.current", "memory.stat"
    first = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    for names in (second, first):
        with suppress(OSError, ValueError):
            limit, used, stat = ((root / name).read_text() for name in names)
            counts = dict(re.findall(r"(?m)^(file|cache|shmem) (\d+)$", stat))
            # The page cache is given up first; what lies in shared memory is not.
            files = int(counts.get("file") or counts.get("cache", 0)) - int(counts.get("shmem", 0))
            rooms.append(max(0, int(limit) - int(used) + max(0, files)))
    return min(rooms)


def libc(name: str, *arguments: Any) -> int:
    """A call of the C library, its numbers as words; its errno, or 0."""
    words = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    failed = getattr(_load(None, use_errno=True), name)(*words)
    return (ctypes.get_errno() or errno.EINVAL) if failed else 0


def nodes() -> list[int]:
    """The nodes of this machine that have memory; empty if the kernel tells of none."""
    with suppress(OSError, ValueError):  # 0-1,4
        told = Path("/sys/devices/system/node", "has_memory").read_text()
        ranges = [part.partition("-") for part in told.split(",")]
        return [node for a, _, b in ranges for node in range(int(a), int(b or a) + 1)]
    return []


def bind(address: int, nbytes: int, wanted: Any) -> None:
    """Have pages of the range that are not there yet come from these nodes and no other. Raises
    `Unsupported` for no node or one that is not there, and if the kernel cannot or may not bind."""
    asked: list[int] = []
    for listed in ([wanted], wanted):
        with suppress(TypeError, NotImplementedError):
            asked = asked or [operator.index(node) for node in listed]
    number = _MBIND.get(platform.machine())
    known = nodes()
    if not asked:
        why = "nodes have whole numbers; name one or more, or leave numa=None"
    elif number is None:
        why = f"the system call is not known on {platform.machine()}"
    elif not known:
        why = "this kernel tells of no NUMA nodes; leave numa=None"
    elif not set(asked) <= set(known):
        why = f"this machine has the nodes {known}; ask for some of these"
    else:
        bits = sum(1 << node for node in set(asked))
        mask = bits.to_bytes(8 * (max(asked) // 64 + 1), "little")
        code = libc("syscall", number, address, nbytes, _MPOL_BIND, mask, 8 * len(mask) + 1, 0)
        if code == 0:
            return
        why = _WHY.get(code, f"the kernel refused it ({os.strerror(code)})")
    named = ", ".join(map(str, asked)) or repr(wanted)
    raise Unsupported(f"Binding {nbytes} bytes of host memory to NUMA node {named}", why)
