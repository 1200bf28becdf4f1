# SPDX-License-Identifier: Apache-2.0
"""Host memory registered with the CUDA or HIP runtime: each page once, never unregistered during a
copy; and the pages that it is made of.

A registration is exact to the byte, though a page is pinned as a whole and only once. With whole
pages registered, a neighbour's copy that begins after ours in our last page, and reaches beyond it,
would fail: CUDA rejects a copy that begins in registered memory and ends outside.

A call that fails leaves its error in the runtime, where the next kernel launch would report it
(vLLM #51081), so each failure is cleared here. The library is the one that torch has loaded: each
copy of the runtime, such as the one inside ``cuda.bindings``, has a separate error.
"""

from __future__ import annotations

import atexit
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import as_whole, flag, kind_of
from portakv.errors import DeviceMismatch, HostMemoryError, Unsupported
from portakv.runtime import late_release
from portakv.runtime.devices import capture_question, this_process
from portakv.runtime.resources import require_linux

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30
# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE = 1
MAPPED = 2
READ_ONLY = 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID = 1
ALREADY = 712
UNKNOWN = 713

_lock = threading.RLock()  # a finalizer may run while its own thread has the lock
live: list[Registration] = []  # no two share a page
# The begins and ends of pieces: of the registrations in `live` that have several, and of memory
# that other code registered.
_begins = Counter[int]()
_ends = Counter[int]()
#: Drop pieces that are gone. A finalizer runs anywhere, also inside `count_pieces`, so it changes
#: no counts itself: `boundaries` does.
dropped: deque[Callable[[], None]] = deque()
_current: tuple[int, ...] = ()  # the result of `boundaries`
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
warned: set[str] = set()
_NO_DEVICE = "there is no CUDA or ROCm device"
_ONLY_TORCH = "torch cannot register existing memory for this device; use memory of `allocate`"


def call(name: str, *arguments: object) -> tuple[int, str]:
    """Call a function of the runtime, by its name without ``cuda`` or ``hip``, if `why_not` is
    None.

    Returns its error, which is cleared, and the runtime's description; or 0 and an empty text.
    """
    library, prefix = device_runtime()
    code = int(getattr(library, f"{prefix}{name}")(*arguments))
    if code == 0:
        return 0, ""
    getattr(library, f"{prefix}GetLastError")()
    return code, f"{getattr(library, f'{prefix}GetErrorString')(code).decode()} ({code})"


def why_not() -> str | None:
    """Return why host memory cannot be registered in this process; None: it can."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None if _library() else "this torch loads no runtime library; take an official wheel"
    return _ONLY_TORCH if torch.accelerator.is_available() else _NO_DEVICE


def through_torch() -> bool:
    """Return True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def device_runtime() -> tuple[Any, str]:
    """Return the runtime's library and the prefix of its functions."""
    # Torch reports no memory as pinned before it has initialised the device.
    torch.cuda.init()
    library = ctypes.CDLL(_library())
    prefix = "cuda" if torch.version.hip is None else "hip"
    # Addresses are wider than C's int.
    pointer = ctypes.c_void_p
    size = ctypes.c_size_t
    flags = ctypes.c_uint
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
    """Return the file of a library that a process has loaded, from its map.

    ``version``: the preferred major version, if there are several. ``stem``: the beginning of its
    name, up to ``.so``.
    """
    files = re.findall(rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$", maps)
    return max(files, key=lambda path: bool(version) and f".so.{version}" in path, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory.

    A failed device does neither: its error is left to its next user.
    """
    others = through_torch()
    inside = cast(Any, torch._C)
    if not others and not torch.cuda.is_initialized():
        return
    module: Any = torch.accelerator if others else torch.cuda
    for index in range(module.device_count()):
        if others or inside._cuda_hasPrimaryContext(index):  # waiting must not create a context
            with suppress(RuntimeError):  # of a device that failed before
                module.synchronize(index)


def capturing() -> bool:
    """Return True while a CUDA device captures a graph, which waiting or unregistering would
    break."""
    return torch.cuda.is_initialized() and capture_question(torch.device("cuda"))()


@dataclass(frozen=True)
class Options:
    """The options of a registration, as `pinned.allocate` describes; raises `HostMemoryError` as it
    does."""

    portable: bool = True
    mapped: bool = True
    largest: int = LARGEST
    unit: int = 1
    fallback: bool = True

    def __post_init__(self) -> None:
        flag("portable", self.portable)
        flag("mapped", self.mapped)
        flag("fallback", self.fallback)
        whole("largest", self.largest, PAGE, "ask for pieces of whole pages")
        whole("unit", self.unit, 1, "pass 1 to have pieces cut at any page")


def options_of(options: dict[str, Any]) -> Options:
    """Return options by their names; raise `HostMemoryError` for an unknown name."""
    known = [each.name for each in fields(Options)]
    for name in options:
        if name not in known:
            raise HostMemoryError(
                f"Expected options among {', '.join(known)}, got {name}. Leave {name} out."
            )
    return Options(**options)


class Registration:
    """Registered memory; or memory that is only claimed, if it cannot be registered and may stay
    pageable.

    Attributes:
        pieces: (address, bytes) of each piece, in order.
        registered: addresses of the pieces that the runtime has; none if the memory is pageable.

    Raises:
        HostMemoryError: the memory cannot be registered and may not stay pageable.
    """

    def __init__(
        self, address: int, nbytes: int, options: Options, read_only: bool = False
    ) -> None:
        self.flags = READ_ONLY * bool(read_only)
        self.flags |= PORTABLE * bool(options.portable) | MAPPED * bool(options.mapped)
        step = math.lcm(options.unit, PAGE)
        step = options.largest // step * step or options.largest // PAGE * PAGE
        self._pageable = options.fallback
        start = address // PAGE * PAGE
        end = address + nbytes
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
        except BaseException:  # also an interrupt: nothing may stay registered
            self.undo()
            raise

    def _claim(self, start: int, end: int) -> None:
        with _lock:
            for taken, until in (one._pages for one in live.copy()):  # finalizers remove some
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Expected pages {start:#x} - {end:#x} to be unregistered, got "
                        f"{taken:#x} - {until:#x} registered already; a page can be registered "
                        "once. Register both as one range, unregister the first, or put the "
                        "memory on separate pages."
                    )
            live.append(self)
            if len(self.pieces) > 1:
                count_pieces(self.pieces, 1)

    def _register(self) -> None:
        code = 0
        why = why_not()
        for piece, nbytes in [] if why else self.pieces:
            code, words = call("HostRegister", piece, nbytes, self.flags)
            if code:
                self._unregister()
                why = f"the runtime refused to register it, {words}"
                break
            self.registered.append(piece)
        if code in (ALREADY, INVALID):
            raise HostMemoryError(
                f"Expected to register memory at {piece:#x}, but {why}: other code registered some "
                "of its pages, or it is memory that cannot be pinned. Unregister it there, or "
                "copy it to memory of `allocate`."
            )
        if why and not self._pageable:
            raise HostMemoryError(
                f"Expected pinned host memory, but {why}. Pass fallback=True to continue with "
                f"pageable memory."
            )
        # Without a device there is nothing to copy to, and nothing that the user could fix.
        if why and why != _NO_DEVICE:
            warn_once(why)

    def _unregister(self) -> None:
        pieces = self.registered
        self.registered = []
        if not pieces or self._process.forked:
            return
        quiesce()
        for piece in pieces:
            code, words = call("HostUnregister", piece)
            # After a reset of the device nothing is registered; a finalizer cannot raise.
            if code not in (0, UNKNOWN):
                warn_once(f"unregistering it failed before, {words}")

    def device_address(self, address: int) -> tuple[int, str]:
        """Return the address of a byte for the current device, on HIP perhaps a different one; or
        why it has none."""
        if not self.flags & MAPPED:
            return 0, "it was registered with mapped=False; register it mapped"
        pointer = ctypes.c_void_p()
        piece = max(at for at in self.registered if at <= address)
        _, words = call("HostGetDevicePointer", ctypes.byref(pointer), piece, 0)
        return (pointer.value or 0) + address - piece, words and f"the runtime refused it, {words}"

    def undo(self, owner: object = None) -> None:
        """Unregister, after all devices stop, and drop the claim. Calling it again does nothing.

        If a device may wait for this process, or a graph's capture forbids it now, it is postponed,
        and the owner is retained until then.
        """
        if self.registered and not self._process.forked and late_release.is_held():
            late_release.release(partial(self.undo, owner))
            return
        if self.registered and capturing():
            _postponed.append((self, owner))
            return
        self._unregister()
        with suppress(ValueError):  # another call has removed it
            live.remove(self)
            if len(self.pieces) > 1:
                dropped.append(partial(count_pieces, self.pieces, -1))


def count_pieces(pieces: Iterable[tuple[int, int]], by: int) -> None:
    """Let no copy cross from one of several registered pieces into another; ``by`` 1 adds the
    pieces, -1 removes them."""
    global _current
    with _lock:
        for address, nbytes in pieces:
            _begins[address] += by
            _ends[address + nbytes] += by
        for counted in (_begins, _ends):
            for at in [at for at, number in counted.items() if number < 1]:
                del counted[at]
        _current = tuple(sorted(_begins.keys() & _ends.keys()))  # every copy reads it


def boundaries() -> tuple[int, ...]:
    """Return the addresses, in order, between two registrations of one memory: no copy may cross
    them."""
    while dropped:
        with suppress(IndexError):  # another thread was faster
            dropped.pop()()
    return _current


def settle() -> None:
    """Unregister what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, owner = _postponed.pop()
            registration.undo(owner)  # before the owner gives the memory back


@cache
def _watch_exit() -> None:
    """Unregister at exit what is left; the first registration calls it, as an import has no
    effects.

    Nothing is unmapped: tensors may outlive the interpreter.
    """

    @atexit.register
    def undo_all() -> None:
        settle()
        for registration in [*live]:
            registration.undo()


def warn_once(why: str) -> None:
    """Warn once in this process that host memory is pageable, and why."""
    if why in warned:
        return
    warned.add(why)
    frame = sys._getframe()
    depth = 1
    # Point to the first line up the stack that is not PortaKV's own.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame = frame.f_back
        depth = depth + 1
    text = f"Expected pinned host memory, got pageable memory: {why}. Results are the same; "
    warnings.warn(f"{text}copies are slower, and block the host.", RuntimeWarning, depth)


class Buffer(NamedTuple):
    """The bytes of a tensor, an array or another buffer.

    Attributes:
        address, nbytes: from the first byte to the last.
        read_only: the bytes can only be read.
        owner: the object that owns them.
    """

    address: int
    nbytes: int
    read_only: bool
    owner: object


_FREED = "was freed before ({}); register memory before it is closed"
_NO_MEMORY = (
    "is not a strided tensor, array, mmap, shared memory or other buffer; pass one of these"
)


def buffer_of(memory: object) -> Buffer:
    """Return the bytes that a tensor, an array or another buffer covers.

    Raises:
        HostMemoryError: it is freed, empty or not memory.
        DeviceMismatch: a tensor on a device.
    """
    kind = kind_of(memory)
    if not isinstance(memory, torch.Tensor):
        array = _array_of(memory)
        low, past = _reach(kind, array.itemsize, array.shape, array.strides)
        read_only = not array.flags.writeable
        return Buffer(array.ctypes.data + low, past - low, read_only, array)
    if memory.device.type != "cpu":
        raise DeviceMismatch(
            f"Expected memory of the host to register, got {kind} on {memory.device}. Copy it to "
            f"the host first."
        )
    if memory.layout != torch.strided or memory.is_nested:
        raise _not_registered(kind, _NO_MEMORY)
    size = memory.element_size()
    low, past = _reach(kind, size, memory.shape, [size * step for step in memory.stride()])
    if memory.untyped_storage().nbytes() < memory.storage_offset() * size + past:
        raise _not_registered(kind, _FREED.format("its storage is smaller"))
    return Buffer(memory.data_ptr() + low, past - low, False, memory)


def _array_of(memory: Any) -> npt.NDArray[np.generic]:
    """Return a buffer of Python as an array, which retains it; raise `HostMemoryError`."""
    if isinstance(memory, np.ndarray):
        return memory
    kind = kind_of(memory)
    buffer = memory.buf if isinstance(memory, SharedMemory) else memory
    if buffer is None:
        raise _not_registered(kind, _FREED.format("it is closed"))
    try:
        view = memoryview(buffer)  # the buffer cannot be closed while the view exists
    except TypeError:
        raise _not_registered(kind, _NO_MEMORY) from None
    except ValueError as error:
        raise _not_registered(kind, _FREED.format(error)) from error
    try:
        return np.asarray(view)
    except ValueError as error:
        why = f"has elements that numpy does not know ({error}); pass np.frombuffer(it, np.uint8)"
        raise _not_registered(kind, why) from error


def _reach(
    kind: str, itemsize: int, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, int]:
    """Return where elements begin and end, in bytes from the first one; strides are bytes."""
    if math.prod(shape) * itemsize == 0:
        raise _not_registered(kind, "has 0 bytes, so nothing can be pinned; leave it out")
    reach = [(count - 1) * step for count, step in zip(shape, strides, strict=True)]
    low = sum(min(step, 0) for step in reach)
    return low, sum(reach) - low + itemsize


def _not_registered(kind: str, why: str) -> HostMemoryError:
    return HostMemoryError(f"Expected memory to register, got {kind} that {why}.")


# ------------------------------------------------------------------------------------------------
# Pages of host memory: mapped, touched by several threads, bound to NUMA nodes without libnuma.

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
