# SPDX-License-Identifier: Apache-2.0
"""Create private streams, order work between streams and by words that they wait for, and retain
host memory that copies use.

Torch has 32 streams of a priority, and hands them out in turns. A stream of torch's pool can
therefore be a caller's stream, which would then wait for every transfer. It can also be handed out
twice, so that both directions of the link wait for each other. On an NVIDIA device the library
creates its streams through the driver, and reuses a stream when its last owner is gone.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch

from portakv.errors import DeviceMismatch, Unsupported
from portakv.runtime import cuda
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.resources import one_thread
from portakv.runtime.transfer import Completion, StatusWord, Transfer, event_pool, hold_memory

# Handles without an owner. The handle released last is reused first, since staging buffers are
# cached for it. No lock: the garbage collector may release a handle at any moment.
free_handles: defaultdict[tuple[torch.device, int], list[int]] = defaultdict(list)


def own_stream(device: torch.device, priority: int = 0) -> Any:
    """Return a stream that has no other owner while the returned object lives.

    The device must have its index; a priority is as torch takes it. Returns a stream of torch's if
    the CUDA driver does not serve the device, or cannot be used.

    Raises:
        TransferError: the driver creates no more streams.
    """
    if cuda.no_cuda(device) is not None or cuda.stream_maker() is None:
        make = getattr(torch.get_device_module(device), "Stream", torch.Stream)
        return make(device, priority=priority) if priority else make(device)
    free = free_handles[device, priority]
    try:
        handle = free.pop()
    except IndexError:
        handle = cuda.make_stream(device, priority)
    stream = OwnStream(handle, device=device)  # type: ignore[no-untyped-call]
    stream.lent = free, handle
    return stream


class OwnStream(torch.cuda.ExternalStream):
    """A stream that releases its handle when it is destroyed.

    It does so in `__del__`: torch 2.11's streams do not clear weak references when they are
    destroyed, and the interpreter crashes.
    """

    lent: tuple[list[int], int]

    def __del__(self) -> None:
        free, handle = self.lent
        free.append(handle)


# The key is a caller's stream and two places. A dropped stream may get another owner, whose work
# then follows the remaining work: more is ordered than is needed, never less.
_side_streams: Bounded[tuple[torch.device, int, str, str], torch.Stream] = Bounded(
    "side streams of callers' streams", 64
)


def side_stream(stream: torch.Stream, src: str, dst: str) -> torch.Stream:
    """Return the stream of transfers between two places that start after ``stream``.

    ``stream`` does not wait for these transfers. Each direction and each caller's stream has a
    separate side stream, so that no transfer waits for an unrelated one.
    """
    key = stream.device, stream.stream_id, src, dst
    return _side_streams.get_or_make(key, lambda: own_stream(stream.device))


def ignore_captures_elsewhere(device: torch.device) -> None:
    """Let this thread work while another thread captures a graph, until this thread ends.

    CUDA forbids many calls in other threads, such as `torch.cuda.Event.query`: such a call ends the
    capture. No such switch is known for other devices.
    """
    _exchange_capture_mode(device, _THIS_THREAD)


@contextmanager
def ignoring_captures(device: torch.device) -> Iterator[None]:
    """Ignore captures of other threads, as `ignore_captures_elsewhere`, for a moment."""
    before = _exchange_capture_mode(device, _THIS_THREAD)
    try:
        yield
    finally:
        _exchange_capture_mode(device, before)


_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def _exchange_capture_mode(device: torch.device, mode: int | None) -> int | None:
    """Set this thread's mode towards captures, and return the mode before; None: there is none."""
    if mode is None or device.type == "cpu" or cuda.not_served(device) is not None:
        return None
    try:
        exchange = cuda.library().cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    value = ctypes.c_int(mode)
    exchange(ctypes.byref(value))
    return value.value


def synchronize_current(devices: Iterable[torch.device]) -> None:
    """Wait for the work of the current stream of each device; the host has none."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.current_stream(device.index).synchronize()


def on_stream(stream: torch.Stream | None) -> AbstractContextManager[object]:
    """Make a stream and its device current for this thread, as `inside`; on a CUDA device by a call
    of torch for each step, where `torch.cuda.stream` takes 5 us more of the host."""
    if stream is None or stream.device.type != "cuda":
        return inside(stream)
    return _OnStream(stream)


class _OnStream:
    """Makes a CUDA stream and its device current.

    Streams are named as torch's core names them: number, device and type of device.
    """

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream.stream_id, stream.device_index, stream.device_type
        self._before: list[tuple[int, int, int]] = []

    def __enter__(self) -> None:
        device = self._stream[1]
        current = torch._C._cuda_getDevice()
        self._before = [torch._C._cuda_getCurrentStream(current)]
        if device != current:
            self._before.insert(0, torch._C._cuda_getCurrentStream(device))
        self._set(self._stream)

    def __exit__(self, *_: object) -> None:
        for stream in self._before:  # the last one's device is current afterwards
            self._set(stream)

    def _set(self, stream: tuple[int, int, int]) -> None:
        number, device, kind = stream
        torch._C._cuda_setStream(stream_id=number, device_index=device, device_type=kind)


def check_stream(stream: torch.Stream | None, *devices: torch.device) -> None:
    """Raise `DeviceMismatch` unless ``stream`` is None or belongs to one of the devices."""
    place: object = getattr(stream, "device", None) if hasattr(stream, "stream_id") else None
    if stream is None or place in devices:
        return
    names = dict.fromkeys(map(str, devices))
    expected = f"a stream of {' or '.join(names)}"
    got = f"a stream of {place}"
    how = ""
    if place is None:
        expected = "a stream of torch"
        got = f"stream={stream!r}"
        how = " (torch.cuda.ExternalStream holds a handle)"
    raise DeviceMismatch(
        f"Expected {expected} for a copy on {' and '.join(names)}, got {got}. Pass such a "
        f"stream{how}, or None for the current stream."
    )


def follow_current(stream: torch.Stream | None, *tensors: torch.Tensor) -> None:
    """Make ``stream`` wait for the current stream of its device.

    Also record in the allocator that ``stream`` uses the tensors that lie on its device.
    """
    if stream is None:
        return
    stream.wait_stream(torch.accelerator.current_stream(stream.device.index))
    for tensor in tensors:
        if tensor.device == stream.device:
            tensor.record_stream(stream)


def completion(
    device: torch.device,
    stream: torch.Stream | None,
    *retained: object,
) -> Completion:
    """Return the end of all current work on ``stream``; retains objects, such as host memory, until
    then, also if the handle is dropped."""
    ended = Completion.after(device, stream, retained=retained or None)
    if retained:
        hold_memory(ended)
    return ended


def captured(
    device: torch.device,
    stream: torch.Stream | None,
    retained: object,
    words: Sequence[tuple[StatusWord, int]] = (),
    *carried: tuple[str, str],
) -> Transfer:
    """Return the handle of a captured copy; with ``stream``, `Transfer.wait` joins the fork."""
    event = None if stream is None else torch.Event(device)
    if event is not None:
        event.record(stream)
    completion = Completion(event, words=words)
    completion.standing = True
    return Transfer((completion,), retained, *carried)


@contextmanager
def on_one_core(device: torch.device) -> Iterator[None]:
    """Have a worker's copy occupy one core of the host, and none while a device works.

    Inside, torch's calls use this thread alone. At the end the thread sleeps until the present work
    of the current stream has ended: on CUDA and ROCm the events of the pool would occupy the core.
    They end sooner, so callers wait by them. On other devices nothing is waited for.
    """
    with one_thread():
        yield
        if device.type == "cuda":
            SleepingEnd(device).wait()


class SleepingEnd:
    """The end of the present work of the current stream of a CUDA or ROCm device, as a `Pending`.

    A thread that waits for it sleeps, and wakes later than one that waits for an event of the pool,
    which occupies a core.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        """Return True once the work has ended; never block."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Sleep until the work has ended."""
        self._event.synchronize()


def awaited_asleep(transfer: Transfer, device: torch.device) -> Transfer:
    """Return a transfer that was issued on the current stream, whose `synchronize` occupies no core
    while a CUDA or ROCm device works. On other devices return it as it is."""
    if device.type != "cuda":
        return transfer
    asleep = Completion(pendings=(SleepingEnd(device),))
    return Transfer((asleep, *transfer.completions), transfer, transfer.carried)


_own = threading.local()  # the streams of each thread, by device


class StreamFence:
    """A fence after the current work of a device's current stream, for workers that continue there.

    On the host it orders nothing.

    Args:
        device: the device.
        event: an event that was recorded after the work; None: the fence records one.
    """

    def __init__(self, device: torch.device, event: torch.Event | None = None) -> None:
        self._device = device
        if event is None and device.type != "cpu":
            event = event_pool(device).recorded(None)
        self._event = event

    def inside(
        self, shared: dict[str, torch.Stream] | None = None
    ) -> AbstractContextManager[object]:
        """Make a private stream of this thread current, ordered after the fence.

        Args:
            shared: the streams, by device, of several threads that work in turn; one of these takes
                the place of the thread's.
        """
        if self._event is None:
            return nullcontext()
        streams: dict[str, torch.Stream] = _own.__dict__ if shared is None else shared
        stream = streams.get(str(self._device))
        if stream is None or shared is not None:  # perhaps another thread has made it
            ignore_captures_elsewhere(self._device)
        if stream is None:
            stream = streams[str(self._device)] = own_stream(self._device)
        return self.on(stream)

    def on(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Make a stream of the device current, ordered after the fence."""
        assert self._event is not None
        self._event.wait(stream)
        return on_stream(stream)


# ------------------------------------------------------------------------------------------------
# Words that say how far rows are there, for which a stream waits; also inside a CUDA graph.
#
# A wait for an event cannot be captured for a copy of a later replay. These waits can: each reads
# words whose addresses stay, and compares them with the number of the step that the stream
# computes.

#: The numbers of words, which only rise; after the last comes 1.
Word = np.uint32
LAST = (1 << 32) - 1
_HALF = 1 << 31
#: The driver reads from it how many queues the streams of a device share, when it starts.
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
#: The driver's own number. With 1 and with 2, copies did not overtake a wait; with 8 all of 37
#: streams did (benchmarks/notes/engines.md).
FEWEST_CONNECTIONS = 8
PAUSE = 5e-5  # seconds between two looks of a host that waits

#: ``needed`` is 0 if the step has no load. ``copied`` is written by streams after copies, and
#: ``raised`` by the host. The wait has a limit, so it also ends if the host's threads hang. It
#: looks at the host's memory only when the copies are there.
TEXT = r"""
struct Wait {
  const volatile unsigned* needed;
  const volatile unsigned* copied;
  const volatile unsigned* raised;
  volatile unsigned* expired;
  long long limit;
};

static bool is_before(unsigned word, unsigned needed) { return int(needed - word) > 0; }

static long long now() {
  long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

static void pause() { asm volatile("nanosleep.u32 200;"); }

static bool is_missing(Wait w, unsigned needed) {
  return is_before(*w.copied, needed) || is_before(*w.raised, needed);
}

extern "C" __global__ void portakv_wait(Wait w) {
  const unsigned needed = *w.needed;
  if (needed == 0) return;
  if (is_missing(w, needed) && *w.expired != needed) {
    const long long begin = now();
    while (is_missing(w, needed)) {
      // Signed: after a time slice another multiprocessor's timer may be behind `begin`.
      if (now() - begin > w.limit) {
        *w.expired = needed;
        break;
      }
      pause();
    }
  }
  __threadfence_system();
}
"""
_ARGUMENTS = struct.Struct("<5Q")


def is_before(word: int, number: int) -> bool:
    """Return whether a word has not reached a number."""
    return 0 < (number - word) % (LAST + 1) < _HALF


class HostWords:
    """The words of the host, whose threads wait.

    Args:
        layers: the number of layers.
        limit: seconds after which a wait ends.

    Attributes:
        raised: uint32 ``[layers]``, which the host writes.
        expired: the number of the latest step in which a wait reached its limit; 0: none did.
    """

    def __init__(self, layers: int, limit: float) -> None:
        self.raised = np.zeros(layers, Word)
        self._copied = np.zeros(layers, Word)
        self._needed = 0
        self._limit = limit
        self.expired = 0

    def need(self, number: int) -> None:
        """Have waits after the current stream's work wait for words of this number; 0: for none."""
        self._needed = number

    def write(self, first: int, count: int, number: int, stream: torch.Stream | None) -> None:
        """Note, after the work of a stream, that layers were copied in a step of this number."""
        self._copied[first : first + count] = number

    def lacks(self, layer: int) -> bool:
        """Return whether a wait for a layer would block."""
        needed = self._needed
        if not needed:
            return False
        words = self._copied, self.raised
        return self.expired != needed and any(is_before(int(each[layer]), needed) for each in words)

    def wait(self, layer: int) -> None:
        """Block until a layer is there."""
        until = time.monotonic() + self._limit
        while self.lacks(layer):
            if time.monotonic() > until:
                self.expired = self._needed
                return
            time.sleep(PAUSE)


#: Words of devices, never freed: a graph that was captured has their addresses.
_retained: list[object] = []


class CudaWords:
    """The words of a CUDA device: what streams write lies there, what the host writes in pinned
    memory.

    Args:
        device: the device.
        layers: the number of layers.
        limit: seconds after which a wait ends.

    Raises:
        Unsupported: no kernel can be compiled for the device.
    """

    def __init__(self, device: torch.device, layers: int, limit: float) -> None:
        why = why_not(device)
        if why is not None:
            raise Unsupported(f"A wait inside a graph on {device}", why)
        with torch.inference_mode(False), inside(device):
            host = torch.zeros(layers + 1, dtype=torch.int32, device="cpu").pin_memory()
            there = torch.zeros(layers + 1, dtype=torch.int32, device=device)
            torch.accelerator.current_stream(device.index).synchronize()
        _retained.append((host, there))
        words = host.numpy().view(Word)
        self.raised = words[:layers]
        self._expired = words[layers:]
        self._layers = layers
        self._limit = round(limit * 1e9)
        self._there = there.data_ptr()
        self._host = host.data_ptr()
        self._driver = cuda.CudaDriver(device)
        self._kernel = self._driver.load(TEXT, ["portakv_wait"])["portakv_wait"]
        library = cuda.library()
        one = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint
        many = ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
        self._write_one = cuda.function(library, "cuStreamWriteValue32_v2", *one)
        self._write_many = cuda.function(library, "cuMemsetD32Async", *many)

    @property
    def expired(self) -> int:
        """Return the same as `HostWords.expired`."""
        return int(self._expired[0])

    def need(self, number: int) -> None:
        """Have waits after the current stream's work wait for words of this number; 0: for none."""
        self._set(self._layers, 1, number, None)

    def write(self, first: int, count: int, number: int, stream: torch.Stream | None) -> None:
        """Note, after the work of a stream, that layers were copied in a step of this number."""
        self._set(first, count, number, stream)

    def wait(self, layer: int) -> None:
        """Have the current stream wait for a layer; a graph that is captured gets the wait."""
        there = self._there
        needed = there + 4 * self._layers
        expired = self._host + 4 * self._layers
        words = needed, there + 4 * layer, self._host + 4 * layer, expired
        parameter = _ARGUMENTS.pack(*words, self._limit)
        self._driver.launch(self._kernel, 1, 1, parameter, what="A launch")

    def _set(self, first: int, count: int, number: int, stream: torch.Stream | None) -> None:
        """Write words of the device after the work of a stream; None: of the current one."""
        address = self._there + 4 * first

        def write(handle: int) -> int:
            if count == 1:  # no multiprocessor has to be free for it
                return self._write_one(handle, address, number, 0)
            return self._write_many(address, number, count, handle)

        error = self._driver.order(stream, write)
        if error:
            name = cuda.error_name(error, cuda.library())
            raise cuda.refused(name, "A write of words by a stream")


#: The words of the layers of a device.
StreamWords: TypeAlias = HostWords | CudaWords


def why_not(device: torch.device) -> str | None:
    """Return why no graph of a device can wait for words, as a phrase; None if it can."""
    return cuda.why_not(device) or cuda.device_too_old(device) or few_queues(os.environ)


def few_queues(environment: Mapping[str, str]) -> str | None:
    """Return why copies could not overtake a wait of a graph, as a phrase; None if they can."""
    many = environment.get(CONNECTIONS, "")
    if many.isdigit() and int(many) < FEWEST_CONNECTIONS:
        return (
            f"with {CONNECTIONS}={many} copies wait for the work that waits for them; leave it out"
        )
    return None


def words_of(device: torch.device, layers: int, limit: float) -> StreamWords:
    """Return words for the layers of a device or of the host.

    Raises:
        Unsupported: no kernel can be compiled for the device.
    """
    if device.type == "cpu":
        return HostWords(layers, limit)
    return CudaWords(device, layers, limit)
