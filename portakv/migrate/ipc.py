# SPDX-License-Identifier: Apache-2.0
"""Memory that another process of this host opens without a copy: tensors for anybody, allocations
and events for `Owner` and `Reader`.

Host memory crosses as the descriptor of its file, which the other one opens under ``/proc``: no
name is left behind, and it lives as long as anybody has it mapped. Device memory crosses by torch's
own words, ``_share_cuda_`` and what vendors named after it. All of an allocation is handed over, to
be read and written, and of a device its size is believed: both ends must trust each other.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from msgspec import Meta

from portakv.arguments import instance, invalid, whole
from portakv.errors import PeerError, Unsupported
from portakv.host.shared import process_space, started, unnamed
from portakv.migrate.messages import Bytes, Handle, Kind, Message, Name, Text, sealed, unsealed
from portakv.runtime import devices

_OPEN = "Opening another process's memory"
_IN_MEMORY = ("/dev/shm/", "/memfd:")  # what the kernel calls files that are memory
_FILE = struct.Struct("<3Q")  # the handle of host memory: descriptor, file system, file
_Number = Annotated[int, Meta(ge=0)]
_NOT_SHARED = (
    "it does not lie in shared memory; take it from `shared_empty` or a SharedPool, or call its "
    "share_memory_() before any view holds its address"
)


class _Shared(Message, frozen=True):
    """A tensor or an event: the host, the process (numbering, number, begin), the type of device;
    torch's handle, bytes, offset, counter of openings and its place, event, flag; the tensor's kind
    and its offset in elements. Without elements it has no bytes."""

    host: Text
    process: tuple[_Number, _Number, _Number]
    device: Name
    words: tuple[Handle, Bytes, Bytes, Handle, Bytes, Handle, bool]
    kind: Kind
    offset: Bytes


@dataclass(eq=False)
class Held:
    """An allocation, uint8 ``[nbytes]``, that others open by ``handle``: until `close`."""

    handle: bytes
    tensor: torch.Tensor | None

    def close(self) -> None:
        """Let go of it: nobody will begin to use it any more. Again: nothing."""
        told: _Shared | None = unsealed(self.handle, _Shared)
        if self.tensor is not None and told and told.process == _here()[1] and told.device != "cpu":
            # Else torch would keep it for ever, for one who never opened it, or died.
            name = f"_release_ipc_counter_{told.device}"
            getattr(torch.UntypedStorage, name, lambda *_: None)(*told.words[3:5])
        self.tensor = None


def share(tensor: torch.Tensor, files: SharedFiles | None = None) -> bytes:
    """What another process of this host gives `open_shared`. Keep the tensor until it was opened,
    on a device for as long as it is used; there each call counts for one opening, and what nobody
    opens is never freed: share pools, not temporaries. Raises `Unsupported` if it cannot be shared;
    it is never moved to where it could be, since views hold its address. ``files``: for many
    tensors of one call."""
    instance("tensor", tensor, torch.Tensor)
    what = "Sharing a tensor with other processes"
    where = tensor.device
    files = SharedFiles() if files is None else instance("files", files, SharedFiles)
    odd = tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided
    if odd or tensor.is_conj() or tensor.is_neg():
        raise Unsupported(what, "it is no plain tensor of numbers and strides; share its parts")
    words: Any = b"", 0, 0, b"", 0, b"", False
    if tensor.numel():
        storage = tensor.untyped_storage()
        if where.type == "cpu":
            words = *files.handle(what, storage.data_ptr(), storage.nbytes()), *words[3:]
        else:
            with _by_torch(what, where):
                words = getattr(storage, f"_share_{where.type}_")()[1:]
    kind = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride()
    return sealed(_Shared(*files.here, where.type, words, kind, int(tensor.storage_offset())))


def open_shared(data: bytes, device: torch.device | str | int | None = None) -> torch.Tensor:
    """The tensor that another process shared: the same memory, dtype and strides. Host memory
    outlives its owner. ``device``: the one of this process that is to read a device's memory; None:
    the current one. Raises `PeerError` if these are no such bytes, or the memory or its process is
    gone, `Unsupported` if it cannot be opened here."""
    told, where = _read(data, device)
    (name, shape, strides) = told.kind
    nbytes = told.words[1]
    dtype = getattr(torch, name, None)
    empty = 0 in shape
    if not isinstance(dtype, torch.dtype) or name[0] == "q" or len(shape) != len(strides):
        raise _changed()
    count = nbytes // dtype.itemsize
    last = told.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if empty != (nbytes == 0) or (last >= count and not empty) or math.prod(shape) >> 62:
        raise _changed()
    with torch.inference_mode(False):
        if empty:
            return torch.empty_strided(shape, strides, dtype=dtype, device=where)
        if told.device == "cpu":
            flat = _mapped(told)
        else:
            with _by_torch(_OPEN, where):
                new = getattr(torch.UntypedStorage, f"_new_shared_{where.type}")
                storage = new(where.index, *told.words)  # its number here: so it counts as local
                flat = torch.empty(0, dtype=torch.uint8, device=where).set_(storage)
        return flat[: count * dtype.itemsize].view(dtype).as_strided(shape, strides, told.offset)


def why_not(tensor: torch.Tensor) -> str | None:
    """Why the tensor cannot be shared; None if it can."""
    try:
        Held(share(tensor), tensor).close()
    except Unsupported as error:
        return error.why
    return None


def export(storage: torch.UntypedStorage, files: SharedFiles | None = None) -> Held:
    """A whole allocation for any number of others, which give its handle `open_shared`; raises
    `Unsupported` as `share` does."""
    with torch.inference_mode(False):
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return Held(share(flat, files), flat)


def export_event(event: Any) -> bytes:
    """What another process gives `open_event`; keep the event while it is used there. Raises
    `Unsupported` unless it was made with ``interprocess=True``."""
    with _by_torch("Sharing an event with other processes", None, "make it with interprocess=True"):
        words = event.ipc_handle(), 0, 0, b"", 0, b"", False
        return sealed(_Shared(*_here(), event.device.type, words, ("event", (), ()), 0))


def open_event(data: bytes, device: torch.device | str | int) -> Any:
    """Another process's event, for streams of ``device``, which is this process's. Raises as
    `open_shared`."""
    told, where = _read(data, device)
    with _by_torch("Opening another process's event", where, "wait for it there"):
        return torch.get_device_module(where).Event.from_ipc_handle(where, told.words[0])


def shared_empty(shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A host tensor that can be shared, without a name: nothing is left of it when the last process
    that has it ends. Its pages are there, all zero; `HostMemoryError` if there is no room."""
    instance("dtype", dtype, torch.dtype, "Pass one such as torch.float16.")
    if not isinstance(shape, int | Sequence) or isinstance(shape, str | bytes):
        raise invalid("shape", "whole numbers", shape, "Pass the extent of each axis.")
    extents = [shape] if isinstance(shape, int) else [*shape]
    shape = tuple(whole("shape", extent) for extent in extents)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >> 62:
        raise invalid("shape", "one of less than 2^62 bytes", extents, "Pass a smaller one.")
    mapping = unnamed(max(1, nbytes))
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes].view(dtype).view(shape)


def host_id() -> str:
    """The machine since its start, and the shared memory that this process sees: those that tell
    the same can share, whatever their addresses and containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/dev/shm').st_dev}"


def identity(device: torch.device) -> str:
    """The device itself, whatever its number here: its UUID; of the host, `host_id`. One without a
    UUID is like none of another process."""
    if device.type == "cpu":
        return host_id()
    ask = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)
    return str(getattr(ask(device), "uuid", f"{_here()}/{device}"))


class _Mapping(NamedTuple):
    """A stretch of this process's addresses that shows a file in memory."""

    first: int
    past: int
    file: tuple[int, int]  # file system and number
    offset: int  # in the file, of the first byte


class SharedFiles:
    """The files in memory that this process has mapped, and their descriptors.

    Reads ``/proc/self`` once, which takes milliseconds: make one for all tensors of a call, and
    none for longer.
    """

    def __init__(self) -> None:
        self._mappings = list[_Mapping]()
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, mode, start, where, number, *path = line.split(maxsplit=5)
            if mode[3] != "s" or not "".join(path).startswith(_IN_MEMORY):
                continue
            first, past = (int(x, 16) for x in span.split("-"))
            device = os.makedev(*(int(x, 16) for x in where.split(":")))
            self._mappings.append(_Mapping(first, past, (device, int(number)), int(start, 16)))
        self._firsts = [mapping.first for mapping in self._mappings]
        self._descriptors: dict[tuple[int, int], int] | None = None
        self.here = _here()

    def handle(self, what: str, address: int, nbytes: int) -> tuple[bytes, int, int]:
        """Return the handle of host memory, its bytes, and its place in the file. Raise
        `Unsupported` if the memory is not one stretch of a file that is open here."""
        mappings = self._mappings
        index = bisect_right(self._firsts, address) - 1
        if index < 0 or address >= mappings[index].past:
            raise Unsupported(what, _NOT_SHARED)
        start = mappings[index]
        while mappings[index].past < address + nbytes:
            before = mappings[index]
            index += 1
            follows = _Mapping(
                before.past, 0, start.file, before.offset + before.past - before.first
            )
            if index == len(mappings) or mappings[index]._replace(past=0) != follows:
                raise Unsupported(what, _NOT_SHARED)
        descriptor = self._opened().get(start.file)
        if descriptor is None:
            why = "its file is not open here; have torch's sharing strategy 'file_descriptor'"
            raise Unsupported(what, why)
        return _FILE.pack(descriptor, *start.file), nbytes, address - start.first + start.offset

    def _opened(self) -> dict[tuple[int, int], int]:
        if self._descriptors is None:
            self._descriptors = {}
            for name in os.listdir("/proc/self/fd"):
                with suppress(OSError):
                    found = os.stat(int(name))
                    self._descriptors.setdefault((found.st_dev, found.st_ino), int(name))
        return self._descriptors


def _mapped(told: _Shared) -> torch.Tensor:
    """Another process's host memory. No file but one in memory is opened."""
    (space, pid, _) = told.process
    (handle, nbytes, offset, *_) = told.words
    if len(handle) != _FILE.size:
        raise _changed()
    if space != process_space():
        raise Unsupported(_OPEN, "its container has own numbers of processes (docker: --pid)")
    descriptor, *file = _FILE.unpack(handle)
    path = f"/proc/{pid}/fd/{descriptor}"
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    try:
        if not os.readlink(path).startswith(_IN_MEMORY):
            raise OSError(errno.ESTALE, "its descriptor has another file")
        with open(path, "r+b", buffering=0) as memory:
            found = os.stat(memory.fileno())
            if [found.st_dev, found.st_ino] != file or found.st_size < offset + nbytes:
                raise OSError(errno.ESTALE, "its descriptor has another file")
            mapping = mmap.mmap(memory.fileno(), skipped + nbytes, offset=offset - skipped)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ESTALE):
            why = f"process {pid}'s is not to be had ({error.strerror}); be one user, and have"
            raise Unsupported(_OPEN, f"{why} descriptors left (ulimit -n)") from None
        raise PeerError(
            f"Memory of process {pid} was to be opened, and it is not there any more "
            f"({error.strerror}); its owner keeps a tensor until it was opened. Share it again."
        ) from None
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=skipped, count=nbytes)


def _here() -> tuple[str, tuple[int, int, int]]:
    pid = os.getpid()
    return host_id(), (process_space(), pid, started(pid) or 0)


def _read(data: bytes, device: torch.device | str | int | None) -> tuple[_Shared, torch.device]:
    """What these bytes tell of, and the device of this process that is to read it; if it can be."""
    told: _Shared | None = unsealed(data, _Shared)
    if told is None:
        raise _changed()
    (host, mine) = _here()
    (space, pid, began) = told.process
    if told.host != host:
        why = "it is another host's, or of a container with its own shared memory (docker: --ipc)"
        raise Unsupported(_OPEN, f"{why}; use a transport")
    if told.process == mine and told.device != "cpu":
        raise Unsupported(_OPEN, "it is this process's, and torch opens only others'; use that")
    if space == mine[0] and started(pid) != began:
        raise PeerError(
            f"Memory of process {pid} was to be opened, and that process has ended, whoever has "
            f"its number now; ask its successor for what it shares."
        )
    try:
        usual = torch.device("cpu") if told.device == "cpu" else devices.usual_device()
        where = usual if device is None else devices.indexed(device)
    except devices.DeviceAbsent as error:
        raise Unsupported(_OPEN, f"it was to be read by {device}: {error}") from None
    if where.type != told.device:
        raise Unsupported(_OPEN, f"it is of type {told.device}, and was to be read by {where}")
    return told, where


def _changed() -> PeerError:
    return PeerError(
        "Expected data to be what another process's `share` or `export` returned, got bytes that "
        "describe none. Carry them unchanged."
    )


@contextmanager
def _by_torch(
    what: str, device: torch.device | None, do: str = "use a transport"
) -> Iterator[None]:
    """Torch's refusal as a sentence. The device is the current one: torch crashes on an event of a
    device that the process has not used."""
    try:
        with devices.inside(device):
            yield
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        where = f" for {device}" if device else ""
        raise Unsupported(what, f"torch refuses it{where} ({why}); {do}") from error


def where(device: torch.device) -> str:
    """A device as both sides tell it: its type, and which one it is, whatever its number."""
    return f"{device.type} {identity(device)}"


def proof(epoch: bytes, device: torch.device) -> torch.Tensor:
    """Bytes of an owner that its readers know: they map them as they map rows, and compare."""
    told = proof_of(epoch)
    if device.type != "cpu":
        return told.to(device)
    return shared_empty(told.numel(), torch.uint8).copy_(told)


def proof_of(epoch: bytes) -> torch.Tensor:
    """Return the bytes of an owner's proof, in memory of this process."""
    return torch.frombuffer(bytearray(blake2b(epoch).digest()), dtype=torch.uint8)
