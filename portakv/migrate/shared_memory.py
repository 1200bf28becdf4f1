# SPDX-License-Identifier: Apache-2.0
"""Share memory with another process of this host, without a copy.

`share` and `open_shared` serve any tensor; `export` and events serve `Owner` and `Reader`.

Host memory crosses as the descriptor of its file, which the other process opens under ``/proc``. No
name remains, and the memory lives as long as a process has it mapped. Device memory crosses by
torch's own functions, ``_share_cuda_`` and the vendors' functions of similar names. The other
process can read and write the whole allocation, and the device reports its size without a check:
both processes must trust each other.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from msgspec import Meta, structs

from portakv.arguments import instance, invalid, whole
from portakv.errors import PeerError, Unsupported
from portakv.host.shared import Process, process_here, process_space, started, unnamed
from portakv.migrate.messages import (
    Bytes,
    Handle,
    Kind,
    Message,
    Name,
    Text,
    carried,
    prepare,
    sealed,
    unsealed,
)
from portakv.runtime import devices
from portakv.runtime.resources import NONE_FREE, reason

_OPEN = "Opening another process's memory"
_IN_MEMORY = ("/dev/shm/", "/memfd:")  # what the kernel calls files that are memory
_FILE = struct.Struct("<3Q")  # the handle of host memory: descriptor, file system, file
_Number = Annotated[int, Meta(ge=0)]
_NOT_SHARED = (
    "it does not lie in shared memory; take it from `shared_empty`, or call its share_memory_() "
    "before any view holds its address"
)


class _Shared(Message, frozen=True):
    """A tensor or an event.

    Fields: the host; the process (its namespace, number and start time); the type of device;
    torch's handle, bytes, offset, counter of openings with its place, event and flag; the tensor's
    kind and its offset in elements. A tensor without elements has no bytes.
    """

    host: Text
    process: tuple[_Number, _Number, _Number]
    device: Name
    words: tuple[Handle, Bytes, Bytes, Handle, Bytes, Handle, bool]
    kind: Kind
    offset: Bytes


@dataclass(eq=False)
class Held:
    """An allocation, uint8 ``[nbytes]``, which others open by ``handle`` until `close`."""

    handle: bytes
    tensor: torch.Tensor | None

    def close(self) -> None:
        """Release the allocation. Processes that know it may still open host memory.

        A second call does nothing.
        """
        message: _Shared | None = unsealed(self.handle, _Shared)
        if self.tensor is not None and message is not None and message.process == process_here():
            _release(message)
        self.tensor = None


def _release(message: _Shared) -> None:
    """Count an opening of memory that this process has shared, and no process has opened.

    Otherwise torch would retain memory of a device for a process that never opened it, or died.
    """
    if message.device != "cpu":
        name = f"_release_ipc_counter_{message.device}"
        getattr(torch.UntypedStorage, name, lambda *_: None)(*message.words[3:5])


def share(tensor: torch.Tensor, files: SharedFiles | None = None) -> bytes:
    """Return the bytes by which another process of this host opens a tensor with `open_shared`.

    Keep the tensor until it was opened, and on a device as long as it is used. On a device each
    call counts for one opening, and torch never frees a share that no process opens: share pools,
    not temporary tensors. ``files``: one object for many tensors of one call.

    Raises `Unsupported` if the tensor cannot be shared. The tensor is never moved to shared memory,
    because views hold its address.
    """
    instance("tensor", tensor, torch.Tensor)
    files = SharedFiles() if files is None else instance("files", files, SharedFiles)
    return sealed(_shared(tensor, files))


def _shared(tensor: torch.Tensor, files: SharedFiles) -> _Shared:
    """Return the message of a tensor; raise as `share`."""
    what = "Sharing a tensor with other processes"
    where = tensor.device
    odd = tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided
    if odd or tensor.is_conj() or tensor.is_neg():
        raise Unsupported(what, "it is not a plain tensor of numbers and strides; share its parts")
    words: Any = b"", 0, 0, b"", 0, b"", False
    if tensor.numel():
        storage = tensor.untyped_storage()
        if where.type == "cpu":
            words = *files.handle(what, storage.data_ptr(), storage.nbytes()), *words[3:]
        else:
            with _by_torch(what, where):
                words = getattr(storage, f"_share_{where.type}_")()[1:]
    kind = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride()
    return _Shared(*files.here, where.type, words, kind, int(tensor.storage_offset()))


def open_shared(data: bytes, device: torch.device | str | int | None = None) -> torch.Tensor:
    """Return the tensor that another process shared: the same memory, dtype and strides.

    Host memory outlives the process that shared it. ``device``: the device of this process that
    reads a device's memory; None: the current device.

    Raises `InvalidTerms` for another type than bytes, `PeerError` for bytes of another kind, or if
    the memory or its process is gone, and `Unsupported` if the memory cannot be opened here.
    """
    return Opener(device).open(carried("data", data, "Pass what `share` returned."))


class Opener:
    """Opens memory of other processes, and looks at each process once.

    Args:
        device: the device of this process that reads a device's memory; None: the current device.
        descriptors: host memory that is opened costs a descriptor, so this process can share it.
    """

    def __init__(
        self, device: torch.device | str | int | None = None, descriptors: bool = True
    ) -> None:
        self._device = device
        self._map = _mapped if descriptors else _mapped_only
        self._host, self._process = _here()
        self._alive = set[Process]()  # processes that were seen to run

    def open(self, data: bytes) -> torch.Tensor:
        """Return the tensor of these bytes; see `open_shared`."""
        message, where = self.read(data)
        (name, shape, strides) = message.kind
        nbytes = message.words[1]
        dtype = getattr(torch, name, None)
        empty = 0 in shape
        if not isinstance(dtype, torch.dtype) or name[0] == "q" or len(shape) != len(strides):
            raise _changed()
        count = nbytes // dtype.itemsize
        last = message.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if empty != (nbytes == 0) or (last >= count and not empty) or math.prod(shape) >> 62:
            raise _changed()
        with torch.inference_mode(False):
            if empty:
                return torch.empty_strided(shape, strides, dtype=dtype, device=where)
            if message.device == "cpu":
                flat = self._map(message)
            else:
                with _by_torch(_OPEN, where):
                    new = getattr(torch.UntypedStorage, f"_new_shared_{where.type}")
                    # With this process's number, so that torch treats it as local.
                    storage = new(where.index, *message.words)
                    flat = torch.empty(0, dtype=torch.uint8, device=where).set_(storage)
            elements = flat[: count * dtype.itemsize].view(dtype)
            return elements.as_strided(shape, strides, message.offset)

    def read(self, data: bytes) -> tuple[_Shared, torch.device]:
        """Return the message in these bytes, and the device of this process that reads the
        memory."""
        message: _Shared | None = unsealed(data, _Shared)
        if message is None:
            raise _changed()
        (space, pid, began) = message.process
        if message.host != self._host:
            why = "it is another host's, or a container's with separate shared memory"
            raise Unsupported(_OPEN, f"{why} (docker: --ipc); use a transport")
        if message.process == self._process and message.device != "cpu":
            why = "it is this process's own, and torch opens only other processes'; use the tensor"
            raise Unsupported(_OPEN, why)
        if message.process not in self._alive:
            if space == self._process[0] and started(pid) != began:
                raise PeerError(
                    f"Expected shared memory of process {pid}, got a process that has ended. Share "
                    f"the memory of its successor."
                )
            self._alive.add(message.process)
        device = self._device
        try:
            usual = torch.device("cpu") if message.device == "cpu" else devices.usual_device()
            where = usual if device is None else devices.indexed(device)
        except devices.DeviceAbsent as error:
            raise Unsupported(_OPEN, f"device={device} is not here: {error}") from None
        if where.type != message.device:
            why = f"it is of type {message.device}, and device={where} is not"
            raise Unsupported(_OPEN, why)
        return message, where


def why_not(tensor: torch.Tensor) -> str | None:
    """Return why the tensor cannot be shared; None if it can."""
    try:
        Held(share(tensor), tensor).close()
    except Unsupported as error:
        return error.why
    return None


def export(storage: torch.UntypedStorage, files: SharedFiles | None = None) -> Held:
    """Return a whole allocation, whose handle any number of processes pass to `open_shared`.

    Raises `Unsupported` as `share` does.
    """
    flat = flat_bytes(storage)
    return Held(share(flat, files), flat)


def export_all(
    tensors: Mapping[str, torch.Tensor], what: str
) -> tuple[list[Held], dict[str, tuple[int, int] | None]]:
    """Return the memory of tensors as few regions, and the place of each tensor in them.

    A file, or an allocation of a device, is one region however many tensors it contains. A place is
    the number of a region and the byte offset of the first element; None: a tensor without
    elements. Keep the tensors until all regions are closed.

    Raises `Unsupported`, which names ``what[name]``, for memory that cannot be shared.
    """
    files = SharedFiles()
    allocations = dict[tuple[torch.device, int, int], tuple[_Shared, torch.UntypedStorage]]()
    try:
        for name, tensor in tensors.items():  # noqa: B007 - the error names it
            if tensor.numel() and (memory := _memory_of(tensor)) not in allocations:
                storage = tensor.untyped_storage()
                allocations[memory] = _shared(flat_bytes(storage), files), storage
    except Unsupported as error:
        for message, _ in allocations.values():
            _release(message)
        raise Unsupported(f"{what}[{name!r}]", error.why) from error

    # A file, or an allocation of a device, is a region up to the last byte of its tensors.
    spans = defaultdict[tuple[str, bytes], list[tuple[_Shared, torch.UntypedStorage]]](list)
    for message, storage in allocations.values():
        spans[f"{storage.device}", message.words[0]].append((message, storage))
    regions = list[Held]()
    for parts in spans.values():
        for other, _ in parts[1:]:  # one opening of the region serves for all parts
            _release(other)
        message, storage = parts[0]
        nbytes = max(part.words[2] + part.words[1] for part, _ in parts)
        words: Any = message.words[0], nbytes, 0, *message.words[3:]
        kind = "uint8", (nbytes,), (1,)
        message = structs.replace(message, words=words, kind=kind, offset=0)
        regions.append(Held(sealed(message), flat_bytes(storage)))

    numbers = {key: number for number, key in enumerate(spans)}
    places = dict[str, tuple[int, int] | None]()
    for name, tensor in tensors.items():
        places[name] = None
        if tensor.numel():
            message, storage = allocations[_memory_of(tensor)]
            number = numbers[f"{storage.device}", message.words[0]]
            offset = tensor.data_ptr() - storage.data_ptr()
            places[name] = number, message.words[2] + offset
    return regions, places


def _memory_of(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Return the allocation of a tensor: its device, address and bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def flat_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a whole allocation as a flat uint8 tensor."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def export_event(event: torch.Event) -> bytes:
    """Return the bytes by which another process opens an event with `open_event`.

    Keep the event while another process uses it. Raises `Unsupported` unless the event was made
    with ``interprocess=True``.
    """
    with _by_torch("Sharing an event with other processes", None, "make it with interprocess=True"):
        words = event.ipc_handle(), 0, 0, b"", 0, b"", False
        return sealed(_Shared(*_here(), event.device.type, words, ("event", (), ()), 0))


def open_event(data: bytes, device: torch.device | str | int) -> torch.Event:
    """Return another process's event, for streams of ``device``, a device of this process.

    Raises the same errors as `open_shared`.
    """
    message, where = Opener(device).read(data)
    with _by_torch("Opening another process's event", where, "wait for it there"):
        module = torch.get_device_module(where)
        event: torch.Event = module.Event.from_ipc_handle(where, message.words[0])
        return event


def shared_empty(shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a host tensor that can be shared, and has no name.

    The memory goes when the last process that has it ends. Its pages are present and zero. Raises
    `HostMemoryError` if there is not enough memory.
    """
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
    """Return the identity of the running machine and of the shared memory of this process.

    Processes with equal identities can share memory, whatever their addresses and containers.

    Raises `PeerError` if the system does not say it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise PeerError(f"Expected the identity of this host, but {reason(error)}.") from None
    device = 0
    with suppress(FileNotFoundError):  # a container without it
        device = os.stat("/dev/shm").st_dev
    return f"{boot}/{device}"


def identity(device: torch.device) -> str:
    """Return the identity of a device, whatever its number here: its UUID; of the host, `host_id`.

    A device without a UUID equals no device of another process.
    """
    if device.type == "cpu":
        return host_id()
    ask = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)
    return str(getattr(ask(device), "uuid", f"{_here()}/{device}"))


class _Mapping(NamedTuple):
    """A range of this process's addresses that maps a file in memory."""

    first: int
    past: int
    file: tuple[int, int]  # file system and number
    shift: int  # bytes from an address to its place in the file
    named: bool  # other processes find it by a name, or did so before the name was removed


class SharedFiles:
    """The files in memory that this process has mapped, and their descriptors.

    Reads ``/proc/self`` once, which takes milliseconds: make one object for all tensors of a call,
    and do not retain it.
    """

    def __init__(self) -> None:
        self._mappings = list[_Mapping]()
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, mode, start, where, number, *path = line.split(maxsplit=5)
            name = "".join(path)
            if mode[3] != "s" or not name.startswith(_IN_MEMORY):
                continue
            first, past = (int(x, 16) for x in span.split("-"))
            device = os.makedev(*(int(x, 16) for x in where.split(":")))
            file = device, int(number)
            shift = int(start, 16) - first
            named = not name.endswith("(deleted)")
            if self._mappings:
                last = self._mappings[-1]
                if last == _Mapping(last.first, first, file, shift, named):  # both are one
                    first = self._mappings.pop().first
            self._mappings.append(_Mapping(first, past, file, shift, named))
        self._firsts = [mapping.first for mapping in self._mappings]
        self._descriptors: dict[tuple[int, int], int] | None = None
        self.here = _here()

    def handle(self, what: str, address: int, nbytes: int) -> tuple[bytes, int, int]:
        """Return the handle of host memory, its bytes, and its place in the file. Raise
        `Unsupported` if the memory is not one stretch of a file that is open here."""
        start = self._mapping_of(address)
        if start is None or start.past < address + nbytes:
            raise Unsupported(what, _NOT_SHARED)
        descriptor = self._opened().get(start.file)
        if descriptor is None:
            why = "its file is not open here; have torch's sharing strategy 'file_descriptor'"
            raise Unsupported(what, why)
        return _FILE.pack(descriptor, *start.file), nbytes, address + start.shift

    def has_name(self, address: int) -> bool:
        """Return True if other processes open the file of host memory by a name, so that they may
        write it after this process has died."""
        mapping = self._mapping_of(address)
        return mapping is not None and mapping.named

    def _mapping_of(self, address: int) -> _Mapping | None:
        """Return the mapping that contains an address; None if there is none."""
        index = bisect_right(self._firsts, address) - 1
        if index < 0 or address >= self._mappings[index].past:
            return None
        return self._mappings[index]

    def _opened(self) -> dict[tuple[int, int], int]:
        if self._descriptors is None:
            self._descriptors = {}
            for name in os.listdir("/proc/self/fd"):
                with suppress(OSError):  # it was closed meanwhile
                    status = os.stat(int(name))
                    self._descriptors.setdefault((status.st_dev, status.st_ino), int(name))
        return self._descriptors


def _mapped(message: _Shared) -> torch.Tensor:
    """Map another process's host memory; the mapping has a descriptor."""
    (_, nbytes, offset, *_) = message.words
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    with _file(message) as descriptor:
        mapping = mmap.mmap(descriptor, skipped + nbytes, offset=offset - skipped)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=skipped, count=nbytes)


def _mapped_only(message: _Shared) -> torch.Tensor:
    """Map another process's host memory; no descriptor stays open."""
    (_, nbytes, offset, *_) = message.words
    with _file(message) as descriptor:
        path = f"/proc/self/fd/{descriptor}"
        try:
            # The file has these bytes, so torch does not make it longer.
            storage: Any = torch.UntypedStorage.from_file(path, True, offset + nbytes)
        except RuntimeError as error:
            raise OSError(errno.ENOMEM, str(error).partition("\n")[0].rstrip(".")) from None
    flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    return flat[offset : offset + nbytes]


class NoDescriptor(PeerError):
    """This process may map shared memory, and has no free descriptor for it now."""


@contextmanager
def _file(message: _Shared) -> Iterator[int]:
    """Open the file of another process's host memory, and yield the descriptor.

    Opens only files that are in memory. Reports errors of the system, of the block too.
    """
    (space, pid, _) = message.process
    (handle, nbytes, offset, *_) = message.words
    if len(handle) != _FILE.size:
        raise _changed()
    if space != process_space():
        raise Unsupported(_OPEN, "its container has a separate process namespace (docker: --pid)")
    descriptor, *file = _FILE.unpack(handle)
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        if not os.readlink(path).startswith(_IN_MEMORY):
            raise OSError(errno.ESTALE, "its descriptor has another file")
        with open(path, "r+b", buffering=0) as memory:
            status = os.stat(memory.fileno())
            if [status.st_dev, status.st_ino] != file or status.st_size < offset + nbytes:
                raise OSError(errno.ESTALE, "its descriptor has another file")
            yield memory.fileno()
    except OSError as error:
        if error.errno in NONE_FREE:
            raise NoDescriptor(
                f"Expected a descriptor for shared memory, but {reason(error)}."
            ) from None
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ESTALE):
            why = f"this process may not open process {pid}'s ({error.strerror})"
            raise Unsupported(_OPEN, f"{why}; run both as one user") from None
        raise PeerError(
            f"Expected shared memory of process {pid}, got none any more ({error.strerror}). Keep "
            f"the tensor until it was opened, and share it again."
        ) from None


def _here() -> tuple[str, Process]:
    return host_id(), process_here()


def _changed() -> PeerError:
    return PeerError(
        "Expected data that another process's `share` or `export` returned, got other bytes. "
        "Carry them unchanged."
    )


@contextmanager
def _by_torch(
    what: str, device: torch.device | None, do: str = "use a transport"
) -> Iterator[None]:
    """Report torch's errors as `Unsupported`, with ``device`` as the current device.

    torch crashes on an event of a device that the process has not used.
    """
    try:
        with devices.inside(device):
            yield
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        where = f" for {device}" if device else ""
        raise Unsupported(what, f"torch rejects it{where} ({why}); {do}") from error


def where(device: torch.device) -> str:
    """Return a device's name for the other side: its type and its identity, whatever its number."""
    return f"{device.type} {identity(device)}"


def proof(epoch: bytes, device: torch.device) -> torch.Tensor:
    """Return bytes that readers map as they map rows, and compare with `proof_of`."""
    message = proof_of(epoch)
    if device.type != "cpu":
        return message.to(device)
    return shared_empty(message.numel(), torch.uint8).copy_(message)


def proof_of(epoch: bytes) -> torch.Tensor:
    """Return the bytes of an owner's proof, in memory of this process."""
    return torch.frombuffer(bytearray(blake2b(epoch).digest()), dtype=torch.uint8)


prepare(globals())
