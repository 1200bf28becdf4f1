# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory for users and integrations: allocated to the byte, or registered in place.

Memory lives as long as anything made from it: the handle, its tensor, any view or array of these.
Before it is unregistered the host waits for the devices, so that no running copy loses it. If
nothing can be pinned, the same calls return pageable memory, and warn once if there is a device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.compiler import is_compiling

from portakv.arguments import flag
from portakv.errors import HostMemoryError, Unsupported
from portakv.host import _registration
from portakv.host._registration import (
    HugePages,
    Registration,
    available,
    boundaries,
    options_of,
    whole,
)
from portakv.runtime.eager import eagerly

__all__ = [
    "Adopted",
    "HostMemoryError",
    "PinnedMemory",
    "adopt",
    "allocate",
    "available",
    "boundaries",
    "empty",
    "register",
    "register_address",
    "registered",
    "unregister",
    "why_not",
    "why_not_register",
]

_open: list[PinnedMemory] = []  # the results of `register` that are open


class PinnedMemory:
    """Host memory and its registration. A context manager; `close` may be called again.

    Attributes:
        nbytes: exactly the requested bytes.
        address: of the first byte, as the host sees it.
        pinned: False if it is pageable after all.
        boundaries: offsets in bytes between two registrations; a copy across one fails or is slow.
        notes: deviations from the request, a sentence each.
    """

    def __init__(
        self, base: torch.Tensor, registration: Registration | None, notes: Sequence[str]
    ) -> None:
        self.nbytes = base.numel()
        self.address = base.data_ptr()
        self.notes = tuple(notes)
        self._base: torch.Tensor | None = base
        self._registered_by = registration  # None: torch's allocator made it
        self.pinned = base.is_pinned() if registration is None else bool(registration.registered)
        self.boundaries = tuple(
            at - self.address for at, _ in (registration.pieces[1:] if registration else [])
        )

    @property
    def tensor(self) -> torch.Tensor:
        """Return all of it, uint8 ``[nbytes]``. The tensor retains the memory, as do all tensors
        made from it."""
        if self._base is None:
            raise HostMemoryError(
                f"Expected open host memory, got {self.nbytes} bytes that were closed. Take the "
                f"tensor before, which retains the memory."
            )
        return self._base

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """Return all of it, uint8 ``[nbytes]``. The array retains the memory."""
        array: npt.NDArray[np.uint8] = self.tensor.numpy()
        if self._registered_by is not None and self._registered_by.flags & _registration.READ_ONLY:
            array.flags.writeable = False
        return array

    @property
    def pieces(self) -> list[torch.Tensor]:
        """Return the tensor, cut at the boundaries of registrations."""
        return [self.tensor[at : at + nbytes] for at, nbytes in self.parts(0, self.nbytes)]

    def parts(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Return a range as (offset, bytes) that cross no boundary of registrations, in order.

        Raises:
            HostMemoryError: some of the range is not in this memory.
        """
        end = whole("offset", offset) + whole("nbytes", nbytes)
        if end > self.nbytes:
            raise HostMemoryError(
                f"Expected a range within {self.nbytes} bytes, got {nbytes} bytes from {offset} "
                "on. Pass a shorter range."
            )
        cuts = [cut for cut in self.boundaries if offset < cut < offset + nbytes]
        return [(a, b - a) for a, b in pairwise([offset, *cuts, offset + nbytes])]

    def view(self, dtype: torch.dtype, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return all of it as another dtype and shape, without a copy."""
        tensor = self.tensor
        dtype = _dtype(dtype)
        try:
            with torch.inference_mode(False):  # else nothing could write to it outside of that mode
                typed = tensor.view(dtype)
                return typed if shape is None else typed.view(tuple(shape))
        except (TypeError, RuntimeError):
            raise HostMemoryError(
                f"Expected a shape of {self.nbytes} bytes of {dtype}, got {shape!r}. Pass a "
                "shape of as many bytes, or None."
            ) from None

    def device_address(self, offset: int = 0) -> int:
        """Return the address of a byte for a kernel on the current device; on ROCm it differs from
        the host's.

        Raises:
            Unsupported: the memory is not registered with a CUDA or HIP runtime, or not mapped.
        """
        address = 0
        why = "it is not registered with a CUDA or HIP runtime; copy instead"
        if self._registered_by is not None and self._registered_by.registered:
            address, why = self._registered_by.device_address(self.address + offset)
        if why:
            raise Unsupported(f"The device's address of host memory at {self.address:#x}", why)
        return address

    @property
    def closed(self) -> bool:
        """Return True after `close`; earlier tensors still retain the memory."""
        return self._base is None

    def close(self) -> None:
        """Release it: immediately, or when the last tensor made from it dies. Calling it again does
        nothing."""
        if self in _open:
            _open.remove(self)
        self._base = None

    def __enter__(self) -> PinnedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "pinned" if self.pinned else "pageable"
        state = ", closed" if self.closed else ""
        return f"<{self.nbytes} bytes of {kind} host memory at {self.address:#x}{state}>"


def allocate(
    nbytes: int,
    *,
    huge_pages: HugePages = "auto",
    numa: int | Sequence[int] | None = None,
    threads: int | None = None,
    **options: Any,
) -> PinnedMemory:
    """Return pinned memory of exactly ``nbytes``, on a page, touched by several threads.

    On devices other than CUDA's and ROCm's it comes from torch's own allocator.

    Args:
        nbytes: one or more; the kernel rounds up only the last page.
        huge_pages: ``auto`` requests transparent pages and ignores a refusal; ``transparent`` and
            ``reserved`` (hugetlbfs) note a refusal; ``never`` requests none.
        numa: the node or nodes that its pages come from.
        threads: how many threads touch the pages; None: one a core, at most 16.
        options: the registration. ``portable=True``: pinned for every device, not only the current
            one. ``mapped=True``: kernels may read and write it. ``largest=511 << 30``: bytes of one
            registration; more are cut into `PinnedMemory.pieces`. ``unit=1``: cut only at multiples
            of as many bytes. ``fallback=True``: pageable memory and one warning if it cannot be
            pinned; False: an error.

    Raises:
        HostMemoryError: no bytes, more than is available, or a wrong argument.
        Unsupported: a NUMA node that cannot be bound.
    """
    known = get_args(HugePages)
    if str(huge_pages) not in known:
        raise HostMemoryError(
            f"Expected huge_pages to be one of {', '.join(known)}, got {huge_pages!r}. Pass one of "
            f"these, or leave it out for auto."
        )
    if threads is not None:
        whole("threads", threads, 1, "pass None for one a core, at most 16")
    registration = options_of(options)
    nbytes = whole("nbytes", nbytes, 1)
    if _registration.through_torch():
        if numa is not None:
            raise Unsupported(
                f"Binding {nbytes} bytes of pinned memory to NUMA node {numa}",
                "on this device it comes from torch's allocator, which does not report the node; "
                "start the process under numactl --membind",
            )
        notes = ["it comes from torch's allocator, which may take more than was requested"]
        if huge_pages in ("transparent", "reserved"):
            notes.append("torch's allocator takes no request for huge pages")
        # RuntimeError: torch cannot pin so many bytes.
        with suppress(RuntimeError), torch.inference_mode(False):
            base = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            return PinnedMemory(base, None, notes)
    mapping, notes = _registration.map_private(nbytes, huge_pages)
    address = _registration.address_of(mapping)
    if numa is not None:
        _registration.bind(address, len(mapping), numa)
    _registration.touch(address, len(mapping), threads)
    return _pinned(mapping, Registration(address, nbytes, registration), notes)


def empty(
    shape: int | Sequence[int],
    dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return an uninitialised pinned tensor, to the byte; its last view frees the memory.

    A tensor without elements is a plain tensor. Without ``dtype`` it is float32, whatever torch's
    default is. Options and errors as of `allocate`; a size that is not a whole number is a
    `HostMemoryError`.
    """
    each: Any = shape if np.iterable(shape) else (shape,)
    sizes = tuple(whole("size", size, do="name each dimension's size") for size in each)
    dtype = _dtype(torch.float32 if dtype is None else dtype)
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype, device="cpu")
    return allocate(math.prod(sizes) * dtype.itemsize, **options).view(dtype, sizes)


def register(memory: Any, *, read_only: bool = False, **options: Any) -> PinnedMemory:
    """Pin existing memory in place, until `unregister`, `PinnedMemory.close` or the end of the
    process.

    It need not begin on a page. But a page is pinned only once, so memory that shares a page with
    registered memory is rejected. The memory is retained until then: an mmap or shared memory
    cannot be closed.

    Args:
        memory: a CPU tensor, a numpy array, an mmap, shared memory, or another buffer.
        read_only: allow memory that cannot be written, only for copies to a device.
        options: the registration, as in `allocate`.

    Raises:
        HostMemoryError: registered already, freed, read-only without ``read_only``, or empty.
        DeviceMismatch: a tensor that is not on the host.
    """
    address, nbytes, fixed, owner = _registration.buffer_of(memory)
    why = ""
    if isinstance(memory, torch.Tensor) and memory.is_pinned():
        why = "are pinned already, here or by torch. Use them as they are"
    elif fixed and not read_only:
        why = "can only be read. Pass read_only=True to copy from them alone"
    if why:
        raise HostMemoryError(
            f"Expected memory to register, got {nbytes} bytes at {address:#x} that {why}."
        )
    return register_address(address, nbytes, owner=owner, read_only=read_only, **options)


def register_address(
    address: int, nbytes: int, *, owner: object = None, read_only: bool = False, **options: object
) -> PinnedMemory:
    """Register bytes at an address as `register` does. ``owner``, which owns the memory, is
    retained until it is unregistered."""
    flag("read_only", read_only)
    address = whole("address", address)
    nbytes = whole("nbytes", nbytes, 1)
    if not _registration.is_mapped(address, nbytes):
        raise HostMemoryError(
            f"Expected memory of this process to register, got {nbytes} bytes at address "
            f"{address:#x}, some of which are not mapped. Register memory before it is freed."
        )
    registration = Registration(address, nbytes, options_of(options), read_only)
    memory = _pinned(owner, registration)
    _open.append(memory)
    return memory


class Adopted:
    """Memory that other code registered, in pieces, while this object lives. A context manager;
    `close` may be called again."""

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self.pieces = tuple(sorted(pieces))
        _registration.count_pieces(self.pieces, 1)
        forget = partial(_registration.count_pieces, self.pieces, -1)
        self._dropped = weakref.finalize(self, _registration.dropped.append, forget)
        self._dropped.atexit = False

    def close(self) -> None:
        """Forget the pieces, as after they were unregistered."""
        self._dropped()  # once, whatever other threads do

    def __enter__(self) -> Adopted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def adopt(pieces: Iterable[tuple[int, int]]) -> Adopted:
    """Record host memory that other code registered in several pieces, such as an engine that
    shares one mapping among workers.

    A copy across two registrations fails in the driver, so transfers are cut where two pieces
    touch, recorded by one call or by several. Nothing is registered or retained. Keep the result:
    the pieces are forgotten with it.

    Args:
        pieces: for each registration its address and bytes.

    Raises:
        HostMemoryError: pieces that are not whole numbers, are empty, or overlap.
    """
    if is_compiling():  # as in `_pinned`
        return eagerly(adopt, pieces)
    parts = []
    do = "pass (address, bytes) of each registration"
    for piece in pieces:
        if not (isinstance(piece, (tuple, list)) and len(piece) == 2):
            raise HostMemoryError(f"Expected pieces of host memory, got {piece!r}: {do}.")
        parts.append((whole("address", piece[0], 1, do), whole("nbytes", piece[1], 1, do)))
    for (a, nbytes), (b, _) in pairwise(sorted(parts)):
        if a + nbytes > b:
            raise HostMemoryError(
                f"Expected separate pieces of host memory, got {nbytes} bytes at {a:#x} and a "
                f"piece at {b:#x}, which overlap. Memory is registered once: {do}."
            )
    return Adopted(parts)


def unregister(memory: Any) -> None:
    """Undo `register`, by the same memory or by its result.

    Raises:
        HostMemoryError: `register` did not register it.
    """
    is_handle = isinstance(memory, PinnedMemory)
    at = memory.address if is_handle else _registration.buffer_of(memory)[0]
    opened = next(
        (one for one in _open if one is memory or (one.address == at and not is_handle)), None
    )
    if opened is None:
        raise HostMemoryError(
            f"Expected memory that register() returned or pinned, got memory at {at:#x}. Pass "
            f"registered memory, once."
        )
    opened.close()


def registered() -> list[PinnedMemory]:
    """Return the results of `register` that were not closed yet."""
    return list(_open)


def why_not() -> str | None:
    """Return why host memory stays pageable in this process; None if it can be pinned."""
    return None if _registration.through_torch() else _registration.why_not()


def why_not_register() -> str | None:
    """Return why existing memory stays pageable in this process; None if `register` pins it."""
    return _registration.why_not()


def _pinned(owner: object, registration: Registration, notes: Sequence[str] = ()) -> PinnedMemory:
    """Return registered memory that every tensor made from it retains, with its owner."""
    if is_compiling():  # torch's compiler fails where it traces `weakref.finalize`
        return eagerly(_pinned, owner, registration, notes)
    (first, _) = registration.pieces[0]
    (last, nbytes) = registration.pieces[-1]
    buffer = _registration.bytes_at(first, last + nbytes - first)
    with torch.inference_mode(False):  # as in `PinnedMemory.view`
        base = torch.frombuffer(buffer, dtype=torch.uint8)
    weakref.finalize(buffer, registration.undo, owner).atexit = False  # at exit it stays mapped
    return PinnedMemory(base, registration, notes)


def _dtype(dtype: object) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    raise HostMemoryError(f"Expected a torch.dtype, got {dtype!r}. Pass one such as torch.uint8.")
