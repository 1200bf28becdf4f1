# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory for users and engines: allocated to the byte, or registered where it is.

Memory lives as long as anything made from it: the handle, its tensor, any view or array of these.
Before it is unregistered the host waits for the devices, so that no copy in flight loses it.
If nothing can be pinned the same calls give pageable memory, and warn once if there is a device.
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

from portakv.errors import HostMemoryError, Unsupported
from portakv.host import _pages, _registration
from portakv.host._pages import HugePages, available, whole
from portakv.host._registration import Registration, options_of, seams

__all__ = [
    "Adopted",
    "HostMemoryError",
    "PinnedMemory",
    "adopt",
    "allocate",
    "available",
    "empty",
    "register",
    "register_address",
    "registered",
    "seams",
    "unregister",
    "why_not",
]

_open: list[PinnedMemory] = []  # what `register` returned, until it is closed


class PinnedMemory:
    """Host memory and how it is held. A context manager; `close` may be called again.

    Attributes:
        nbytes: exactly what was asked.
        address: of the first byte, as the host sees it.
        pinned: False if it is pageable after all.
        seams: offsets in bytes between two registrations; a copy across fails or is slow.
        notes: what was done otherwise than asked, a sentence each.
    """

    def __init__(self, base: torch.Tensor, how: Registration | None, notes: Sequence[str]) -> None:
        self.nbytes = base.numel()
        self.address = base.data_ptr()
        self.notes = tuple(notes)
        self._base: torch.Tensor | None = base
        self._how = how  # None: by torch's allocator
        self.pinned = base.is_pinned() if how is None else bool(how.registered)
        self.seams = tuple(at - self.address for at, _ in (how.pieces[1:] if how else []))

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, uint8 ``[nbytes]``. Holds the memory, as do all tensors made from it."""
        if self._base is None:
            raise HostMemoryError(
                f"{self.nbytes} bytes of host memory were asked for after they had been closed; "
                f"take the tensor before, which holds the memory."
            )
        return self._base

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All of it, uint8 ``[nbytes]``. Holds the memory."""
        found: npt.NDArray[np.uint8] = self.tensor.numpy()
        if self._how is not None and self._how.flags & _registration.READ_ONLY:
            found.flags.writeable = False
        return found

    @property
    def pieces(self) -> list[torch.Tensor]:
        """The tensor, cut at the seams."""
        return [self.tensor[at : at + nbytes] for at, nbytes in self.parts(0, self.nbytes)]

    def parts(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """A range as (offset, bytes) that cross no seam, in order. Raises `HostMemoryError` if some
        of it is not in this memory."""
        end = whole("offset", offset) + whole("nbytes", nbytes)
        if end > self.nbytes:
            raise HostMemoryError(
                f"{nbytes} bytes from {offset} on were asked of {self.nbytes} bytes; expected a "
                f"range that ends with the memory or before. Ask for a shorter one."
            )
        cuts = [seam for seam in self.seams if offset < seam < offset + nbytes]
        return [(a, b - a) for a, b in pairwise([offset, *cuts, offset + nbytes])]

    def view(self, dtype: torch.dtype, shape: Sequence[int] | None = None) -> torch.Tensor:
        """All of it as another dtype and shape, without a copy."""
        tensor = self.tensor
        dtype = _dtype(dtype)
        try:
            with torch.inference_mode(False):  # else nothing could write to it outside of that mode
                typed = tensor.view(dtype)
                return typed if shape is None else typed.view(tuple(shape))
        except (TypeError, RuntimeError):
            raise HostMemoryError(
                f"{self.nbytes} bytes were asked for as {dtype}, shape {shape!r}; expected a shape "
                f"that takes as many bytes. Pass one, or none."
            ) from None

    def device_address(self, offset: int = 0) -> int:
        """The address of a byte for a kernel on the current device; on ROCm not the host's. Raises
        `Unsupported` if it is not registered with a CUDA or HIP runtime, or not mapped."""
        found = 0
        why = "it is not registered with a CUDA or HIP runtime; copy instead"
        if self._how is not None and self._how.registered:
            found, why = self._how.device_address(self.address + offset)
        if why:
            raise Unsupported(f"The device's address of host memory at {self.address:#x}", why)
        return found

    @property
    def closed(self) -> bool:
        """True once `close` was called; tensors made before still hold the memory."""
        return self._base is None

    def close(self) -> None:
        """Let go of it: at once, or when the last tensor made from it dies. Again: nothing."""
        if self in _open:
            _open.remove(self)
        self._base = None

    def __enter__(self) -> PinnedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        how = "pinned" if self.pinned else "pageable"
        state = ", closed" if self.closed else ""
        return f"<{self.nbytes} bytes of {how} host memory at {self.address:#x}{state}>"


def allocate(
    nbytes: int,
    *,
    huge_pages: HugePages = "auto",
    numa: int | Sequence[int] | None = None,
    threads: int | None = None,
    **options: Any,
) -> PinnedMemory:
    """Pinned memory of exactly so many bytes, on a page, touched by several threads at once; on
    devices other than CUDA's and ROCm's from torch's own allocator.

    Args:
        nbytes: one or more; only the last page is rounded up, by the kernel.
        huge_pages: ``auto`` asks for transparent ones and does not mind a refusal;
            ``transparent`` and ``reserved`` (hugetlbfs) note one; ``never`` asks for none.
        numa: the node or nodes that its pages come from.
        threads: how many touch the pages; None: one a core, at most 16.
        options: how it is registered. ``portable=True``: pinned for every device, not only the
            current one. ``mapped=True``: kernels may read and write it. ``largest=511 << 30``:
            bytes of one registration; more are cut into `PinnedMemory.pieces`. ``unit=1``: cut only
            at multiples of so many bytes. ``fallback=True``: pageable memory and one warning if it
            cannot be pinned; False: an error.

    Raises:
        HostMemoryError: no bytes, more than there is room for, or an argument not as above.
        Unsupported: a NUMA node that cannot be bound.
    """
    if str(huge_pages) not in (known := get_args(HugePages)):
        raise HostMemoryError(
            f"Host memory was asked for with huge_pages={huge_pages!r}; expected one of "
            f"{', '.join(known)}: pass one of these, or leave it out for auto."
        )
    if threads is not None:
        whole("threads", threads, 1, "pass None for one a core, at most 16")
    how = options_of(options)
    nbytes = whole("nbytes", nbytes, 1)
    if _registration.through_torch() and (given := _from_torch(nbytes, huge_pages, numa)):
        return given
    mapping, notes = _pages.map_private(nbytes, huge_pages)
    address = _pages.address_of(mapping)
    if numa is not None:
        _pages.bind(address, len(mapping), numa)
    _pages.touch(address, len(mapping), threads)
    return _pinned(mapping, Registration(address, nbytes, how), notes)


def empty(
    shape: int | Sequence[int],
    dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    """An uninitialised pinned tensor, to the byte; its last view gives the memory back. One of no
    elements is a plain tensor. Without ``dtype`` it is float32, whatever torch's default is.
    Options and errors as of `allocate`; a size that is no whole number is a `HostMemoryError`."""
    each: Any = shape if np.iterable(shape) else (shape,)
    sizes = tuple(whole("size", size, do="name each dimension's size") for size in each)
    dtype = _dtype(torch.float32 if dtype is None else dtype)
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype, device="cpu")
    return allocate(math.prod(sizes) * dtype.itemsize, **options).view(dtype, sizes)


def register(memory: Any, *, read_only: bool = False, **options: Any) -> PinnedMemory:
    """Pin memory that exists, where it is, until `unregister`, `PinnedMemory.close` or the end.

    It need not begin on a page; but a page is pinned only once, so memory that shares one with
    registered memory is refused. It is held until then: an mmap or shared memory cannot be closed.

    Args:
        memory: a CPU tensor, a numpy array, an mmap, shared memory, anything with a buffer.
        read_only: allow memory that cannot be written, for copies to a device alone.
        options: how it is registered, as in `allocate`.

    Raises:
        HostMemoryError: registered already, freed, read-only without ``read_only``, or empty.
        DeviceMismatch: a tensor that is not on the host.
    """
    address, nbytes, fixed, owner = _registration.buffer_of(memory)
    why = ""
    if isinstance(memory, torch.Tensor) and memory.is_pinned():
        why = "are pinned already, here or by torch; use them as they are"
    elif fixed and not read_only:
        why = "can only be read; pass read_only=True to copy from them alone"
    if why:
        asked = f"{nbytes} bytes at {address:#x} were asked to be registered"
        raise HostMemoryError(f"{asked}, and they {why}.")
    return register_address(address, nbytes, held=owner, read_only=read_only, **options)


def register_address(
    address: int, nbytes: int, *, held: object = None, read_only: bool = False, **options: Any
) -> PinnedMemory:
    """As `register`, with its options, of bytes at an address; ``held``, which owns the memory, is
    kept until it is unregistered."""
    address = whole("address", address)
    nbytes = whole("nbytes", nbytes, 1)
    if not _pages.is_mapped(address, nbytes):
        raise HostMemoryError(
            f"{nbytes} bytes at address {address:#x} were asked to be registered, and some of them "
            f"belong to no memory of this process; register memory before it is freed."
        )
    how = Registration(address, nbytes, options_of(options), read_only)
    memory = _pinned(held, how)
    _open.append(memory)
    return memory


class Adopted:
    """Memory that others registered, in pieces, for as long as this is held. A context manager;
    `close` may be called again."""

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self.pieces = tuple(sorted(pieces))
        _registration.adopt(self.pieces)
        forget = partial(_registration.disown, self.pieces)
        self._dropped = weakref.finalize(self, _registration.dropped.append, forget)
        self._dropped.atexit = False

    def close(self) -> None:
        """Forget it, as when it was unregistered."""
        self._dropped()  # once, whatever other threads do

    def __enter__(self) -> Adopted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def adopt(pieces: Iterable[tuple[int, int]]) -> Adopted:
    """Tell of host memory that others registered in several pieces, such as an engine that shares
    one mapping among workers: a copy over the seam between two registrations fails in the driver,
    so that engines cut theirs there: where two pieces touch, told of in one call or in several. It
    registers and holds nothing. What it returns must be held: the pieces are forgotten with it.

    Args:
        pieces: for each registration its address and bytes.

    Raises:
        HostMemoryError: pieces that are no whole numbers, hold nothing, or overlap.
    """
    found = []
    do = "pass (address, bytes) of each registration"
    for piece in pieces:
        if not (isinstance(piece, (tuple, list)) and len(piece) == 2):
            raise HostMemoryError(f"Host memory was adopted with the piece {piece!r}; {do}.")
        found.append((whole("address", piece[0], 1, do), whole("nbytes", piece[1], 1, do)))
    for (a, nbytes), (b, _) in pairwise(sorted(found)):
        if a + nbytes > b:
            raise HostMemoryError(
                f"Host memory was adopted with {nbytes} bytes at {a:#x} and a piece at {b:#x}, "
                f"which overlap; memory is registered once: {do}, as they were registered."
            )
    return Adopted(found)


def unregister(memory: Any) -> None:
    """Undo `register`: of the same memory, or of what it returned. Raises `HostMemoryError` for
    memory that it did not register."""
    held = isinstance(memory, PinnedMemory)
    at = memory.address if held else _registration.buffer_of(memory)[0]
    found = next((one for one in _open if one is memory or (one.address == at and not held)), None)
    if found is None:
        raise HostMemoryError(
            f"Memory at {at:#x} was asked to be unregistered, and register() has none that begins "
            f"there; pass what was registered, once."
        )
    found.close()


def registered() -> list[PinnedMemory]:
    """What `register` returned and was not closed yet."""
    return list(_open)


def why_not() -> str | None:
    """Why host memory stays pageable in this process; None if it can be pinned."""
    return None if _registration.through_torch() else _registration.why_not()


def _pinned(owner: object, how: Registration, notes: Sequence[str] = ()) -> PinnedMemory:
    """Registered memory that every tensor made from it holds, with its owner."""
    (first, _) = how.pieces[0]
    (last, nbytes) = how.pieces[-1]
    buffer = _pages.bytes_at(first, last + nbytes - first)
    with torch.inference_mode(False):  # as in `PinnedMemory.view`
        base = torch.frombuffer(buffer, dtype=torch.uint8)
    weakref.finalize(buffer, how.undo, owner).atexit = False  # then it stays mapped
    return PinnedMemory(base, how, notes)


def _dtype(asked: Any) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    raise HostMemoryError(f"Host memory was asked for as {asked!r}; expected a torch.dtype.")


def _from_torch(nbytes: int, huge_pages: HugePages, numa: Any) -> PinnedMemory | None:
    """Memory of torch's allocator for the accelerator that is there; None if it has none."""
    if numa is not None:
        raise Unsupported(
            f"Binding {nbytes} bytes of pinned memory to NUMA node {numa}",
            "on this device it comes from torch's allocator, which does not say where from; "
            "start the process under numactl --membind",
        )
    notes = ["it comes from torch's allocator, which may take more than was asked"]
    if huge_pages in ("transparent", "reserved"):
        notes.append("torch's allocator was not told of huge pages")
    with suppress(RuntimeError), torch.inference_mode(False):
        base = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        return PinnedMemory(base, None, notes)
    return None
