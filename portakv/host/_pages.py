# SPDX-License-Identifier: Apache-2.0
"""Pages of host memory, for `pinned` and the pools: mapped, touched, bound to NUMA nodes, and
registered with the CUDA or HIP runtime, each once, and never let go under a copy.

What is registered is exact to the byte, though a page is pinned as a whole and only once. With
whole pages registered, a neighbour's copy that begins behind ours in our last page, and reaches
beyond it, would fail: CUDA refuses a copy that begins in registered memory and ends outside.

A call that fails leaves its error in the runtime, where the next kernel launch finds it
(vLLM #51081), so each failure here is cleared at once. The library is the one that torch has
loaded: each copy of the runtime, as the one inside ``cuda.bindings``, has an error of its own.
Nodes are bound by the kernel's own call, so that no libnuma is needed.
"""

from __future__ import annotations

import atexit
import bisect
import ctypes
import errno
import itertools
import math
import mmap
import operator
import os
import platform
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from portakv.errors import DeviceMismatch, HostMemoryError, Unsupported
from portakv.runtime.devices import this_process

PAGE = mmap.PAGESIZE
HugePages = Literal["auto", "transparent", "reserved", "never"]
_HUGE = 2 << 20  # what x86 and most arm64 kernels call huge
MAP_HUGETLB, _MS_ASYNC, _MPOL_BIND = 0x40000, 1, 2
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_load = cache(ctypes.CDLL)
SLICE = 64 << 20  # bytes one thread touches at a time; whole huge pages

# Numbers of the system call, from the kernel's tables of each architecture.
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "loongarch64": 235, "ppc64le": 259}
_WHY = {
    errno.EPERM: "the kernel forbids it; give the container CAP_SYS_NICE, or use numactl --membind",
    errno.ENOSYS: "this kernel was built without NUMA; leave numa=None",
    errno.EINVAL: "the process may not use that node (cpuset); ask for one that it may",
}

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30
# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID, ALREADY, UNKNOWN = 1, 712, 713

_by_pages = operator.attrgetter("_pages")
_lock = threading.RLock()  # a finalizer may run wherever its own thread holds it
live: list[Registration] = []  # by their pages; no two overlap
_seams: set[int] = set()  # of all these
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
warned: set[str] = set()
_ONLY_TORCH = "torch registers no memory that exists for this device; take some of `allocate`"


def bytes_at(address: int, nbytes: int) -> Any:
    """The bytes at an address as a buffer, which arrays and tensors made from it hold."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def whole(number: Any, least: int, asked: str, do: str) -> int:
    """A number that must be whole and no less; raises `HostMemoryError`, which begins with what was
    asked and ends with what to do."""
    with suppress(TypeError):
        if operator.index(number) >= least:
            return operator.index(number)
    raise HostMemoryError(f"{asked}; expected a whole number, {least} or more: {do}.")


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
    return libc("msync", start, to_pages(address + nbytes) - start, _MS_ASYNC) == 0


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
    rooms, root = [int(kib) * 1024], Path("/sys/fs/cgroup")
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
        with suppress(TypeError):
            asked = asked or [operator.index(node) for node in listed]
    number, known = _MBIND.get(platform.machine()), nodes()
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


# --- registration with the runtime ----------------------------------------------------------------


def call(name: str, *arguments: Any) -> tuple[int, str]:
    """Call a function of the runtime, by its name without ``cuda`` or ``hip``, if `why_not` is
    None: its error, which is cleared, and the runtime's words for that; 0 and none."""
    library, prefix = device_runtime()
    code = int(getattr(library, f"{prefix}{name}")(*arguments))
    if code == 0:
        return 0, ""
    getattr(library, f"{prefix}GetLastError")()
    return code, f"{getattr(library, f'{prefix}GetErrorString')(code).decode()} ({code})"


def why_not() -> str | None:
    """What keeps host memory from being registered in this process; None: nothing."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None if _library() else "this torch loads no runtime library; take an official wheel"
    return _ONLY_TORCH if torch.accelerator.is_available() else "there is no CUDA or ROCm device"


def through_torch() -> bool:
    """True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def device_runtime() -> tuple[Any, str]:
    # Until torch has begun with the device torch takes no memory for pinned, even if it is.
    torch.cuda.init()
    library, prefix = ctypes.CDLL(_library()), "cuda" if torch.version.hip is None else "hip"
    # Addresses are wider than C's int.
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    getattr(library, f"{prefix}HostRegister").argtypes = (pointer, size, flags)
    getattr(library, f"{prefix}HostUnregister").argtypes = (pointer,)
    getattr(library, f"{prefix}HostGetDevicePointer").argtypes = (pointer, pointer, flags)
    getattr(library, f"{prefix}GetErrorString").restype = ctypes.c_char_p
    return library, prefix


@cache
def _library() -> str | None:
    stem = "libcudart" if torch.version.hip is None else "libamdhip64"
    version = (torch.version.cuda or "").split(".")[0]
    return loaded_library(Path("/proc/self/maps").read_text(), stem, version)


def loaded_library(maps: str, stem: str, version: str) -> str | None:
    """The file of a library that a process has loaded, from its map, of a major version if there
    are several and one is named; ``stem``: how its name begins, up to ``.so``."""
    found = re.findall(rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$", maps)
    return max(found, key=lambda path: bool(version) and f".so.{version}" in path, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory any more. One
    that has failed does neither: its error is left to its next user."""
    others, inside = through_torch(), cast(Any, torch._C)
    if not others and not torch.cuda.is_initialized():
        return
    module: Any = torch.accelerator if others else torch.cuda
    for index in range(module.device_count()):
        if others or inside._cuda_hasPrimaryContext(index):  # waiting must not make a context
            with suppress(RuntimeError):
                module.synchronize(index)


def capturing() -> bool:
    """True while waiting for a device, or unregistering, would break a graph's capture."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


#: Flags, bytes of one of several pieces, and whether the memory may stay pageable.
Terms = tuple[int, int, bool]


def terms(*, portable: bool = True, mapped: bool = True, read_only: bool = False,
          largest: int = LARGEST, unit: int = 1, fallback: bool = True,
          ) -> Terms:  # fmt: skip
    """The terms of a `Registration` by its options. Raises `HostMemoryError` for bad ones."""
    asked = f"Pieces of at most {largest!r} bytes were asked for, and a page has {PAGE}"
    most = whole(largest, PAGE, asked, "ask for whole pages")
    asked = f"Pieces cut at multiples of {unit!r} bytes were asked for"
    step = math.lcm(whole(unit, 1, asked, "pass 1 to have them cut at any page"), PAGE)
    flags = PORTABLE * portable | MAPPED * mapped | READ_ONLY * read_only
    return flags, most // step * step or most // PAGE * PAGE, fallback


class Registration:
    """Memory that is registered, on `terms`; or if it cannot be, and may stay pageable, merely
    claimed. Raises `HostMemoryError` otherwise. ``pieces``: (address, bytes) of each, in order;
    ``registered``: addresses of those that the runtime has, none if the memory is pageable."""

    def __init__(self, address: int, nbytes: int, on: Terms) -> None:
        self.flags, step, self._pageable = on
        start, end = address // PAGE * PAGE, address + nbytes
        edges = [address, *range(start + step, end, step), end]  # between pages
        self._pages = start, to_pages(end)
        self.pieces: list[tuple[int, int]] = [(a, b - a) for a, b in itertools.pairwise(edges)]
        self._process = this_process()
        self.registered: list[int] = []
        settle()
        self._claim(*self._pages)
        _watch_exit()
        try:
            self._register()
        except BaseException:
            self.undo()
            raise

    def _claim(self, start: int, end: int) -> None:
        with _lock:
            at = bisect.bisect_left(live, self._pages, key=_by_pages)
            for taken, until in map(_by_pages, live[max(0, at - 1) : at + 1]):
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Pages {start:#x} - {end:#x} were asked to be registered, and {taken:#x} "
                        f"- {until:#x} are already; a page can be registered once. Register both "
                        f"as one range, unregister the first, or keep memory that shares a page "
                        f"apart."
                    )
            # Looked up again: a finalizer may have taken one out meanwhile.
            bisect.insort(live, self, key=_by_pages)
            _seams.update(at for at, _ in self.pieces[1:])

    def _register(self) -> None:
        code, why = 0, why_not()
        for piece, nbytes in [] if why else self.pieces:
            code, words = call("HostRegister", piece, nbytes, self.flags)
            if code:
                self._unregister()
                why = f"the runtime refused to register it, {words}"
                break
            self.registered.append(piece)
        if code in (ALREADY, INVALID):
            raise HostMemoryError(
                f"Memory at {piece:#x} was asked to be registered, and {why}: other code "
                f"registered some of its pages, or it is memory that cannot be pinned. Unregister "
                f"it there, or copy it to memory of `allocate`."
            )
        if why and not self._pageable:
            raise HostMemoryError(
                f"Pinned host memory was asked for, and {why}. Pass fallback=True to go on with "
                f"pageable memory."
            )
        if why:
            warn_once(why)

    def _unregister(self) -> None:
        pieces, self.registered = self.registered, []
        if not pieces or self._process.forked:
            return
        quiesce()
        for piece in pieces:
            code, words = call("HostUnregister", piece)
            # After a reset of the device nothing is registered; a finalizer cannot raise.
            if code not in (0, UNKNOWN):
                warn_once(f"unregistering it failed before, {words}")

    def device_address(self, address: int) -> tuple[int, str]:
        """Where the current device finds a byte, on HIP perhaps elsewhere, and why it does not."""
        if not self.flags & MAPPED:
            return 0, "it was registered with mapped=False; register it mapped"
        found, piece = ctypes.c_void_p(), max(at for at in self.registered if at <= address)
        _, words = call("HostGetDevicePointer", ctypes.byref(found), piece, 0)
        return (found.value or 0) + address - piece, words and f"the runtime refused it, {words}"

    def undo(self, owner: Any = None) -> None:
        """Unregister, once no device works any more, and give up the claim; later, if a graph's
        capture forbids it: the owner is held until then. Again: nothing."""
        if self.registered and capturing():
            _postponed.append((self, owner))
            return
        self._unregister()
        with suppress(ValueError):
            live.remove(self)
            _seams.difference_update(at for at, _ in self.pieces[1:])


def seams() -> tuple[int, ...]:
    """Addresses, in order, between two registrations of one memory: no copy may reach across."""
    return tuple(sorted(_seams)) if _seams else ()


def settle() -> None:
    """End what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, _owner = _postponed.pop()
            registration.undo()  # before the owner gives the memory back


@cache
def _watch_exit() -> None:
    """At exit unregister what is left; called when first needed, as an import has no effects.
    Nothing is unmapped: tensors may outlive the interpreter."""

    @atexit.register
    def undo_all() -> None:
        settle()
        for registration in [*live]:
            registration.undo()


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    if why in warned:
        return
    warned.add(why)
    frame, level = sys._getframe(), 1
    # The first line up the stack that is not PortaKV's own is the one to point to.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame, level = frame.f_back, level + 1
    told = f"Host memory was asked to be pinned and stays pageable: {why}. Results are the same; "
    warnings.warn(f"{told}copies are slower, and block the host.", RuntimeWarning, level)


def buffer_of(memory: Any) -> tuple[int, int, bool, Any]:
    """Which bytes a tensor, an array or another buffer covers: their address and number from the
    first to the last, whether they can only be read, and what holds them. Raises `HostMemoryError`
    if it is freed, empty or no memory at all, `DeviceMismatch` for a tensor on a device."""
    kind, tensor = type(memory).__name__, isinstance(memory, torch.Tensor)
    if tensor and memory.device.type != "cpu":
        raise DeviceMismatch(
            f"A {kind} on {memory.device} was asked to be registered; expected memory of the host. "
            f"Copy it there first."
        )
    freed = why = "was freed before ({}); register memory before it is closed"
    try:
        if tensor and memory.layout == torch.strided:
            size, fixed, address = memory.element_size(), False, memory.data_ptr()
            shape, steps = memory.shape, [size * step for step in memory.stride()]
        else:
            if not isinstance(memory, np.ndarray):
                buffer = memory.buf if isinstance(memory, SharedMemory) else memory
                if buffer is None:
                    raise ValueError("it is closed")
                memory = memoryview(buffer)  # which cannot be closed while the view is held
                why = "has elements that numpy does not know ({}); pass np.frombuffer(it, np.uint8)"
            array = np.asarray(memory)
            size, fixed, address = array.itemsize, not array.flags.writeable, array.ctypes.data
            shape, steps = array.shape, list(array.strides)
    except ValueError as error:
        why = why.format(error)
    except TypeError:
        why = "is no strided tensor, array, mmap, shared memory or other buffer; pass one of these"
    else:
        reach = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
        low, high = sum(min(step, 0) for step in reach), sum(max(step, 0) for step in reach) + size
        if math.prod(shape) * size == 0:
            why = "has 0 bytes, of which nothing can be pinned; leave it out"
        elif tensor and memory.untyped_storage().nbytes() < memory.storage_offset() * size + high:
            why = freed.format("its storage is smaller")
        else:
            return address + low, high - low, fixed, memory
    raise HostMemoryError(f"A {kind} was asked to be registered, which {why}.")
