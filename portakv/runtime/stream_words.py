# SPDX-License-Identifier: Apache-2.0
"""Words that say how far rows are there, for which a stream waits; also inside a CUDA graph.

A wait for an event cannot be captured for a copy of a later replay. These waits can: each reads
words whose addresses stay, and compares them with the number of the step that the stream computes.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch

from portakv.errors import Unsupported
from portakv.runtime import cuda
from portakv.runtime.devices import inside

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
