# SPDX-License-Identifier: Apache-2.0
"""Pinned memory of a device: exact, asynchronous, and no error remains.

CUDA registers it; for the simulated device torch's own allocator pins."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import DEVICE, current, delay, settle
from support.simdev_cases import DEVICE as SIMDEV
from support.waits import LIMIT

from portakv import KVView, copy_blocks
from portakv.errors import HostMemoryError, Unsupported
from portakv.host import _registration, pinned
from portakv.host.pool import PinnedPool

PAGE = mmap.PAGESIZE
ODD = 3 * 1024 * 1024 + 4096
BIG = 300 * 1024 * 1024 + 4096
gpu = pytest.mark.gpu


def pattern(nbytes: int, device: torch.device = DEVICE) -> torch.Tensor:
    """Bytes on the device that repeat with no power of two."""
    return (torch.arange(nbytes, dtype=torch.int32) % 251).to(torch.uint8).to(device)


def last_error() -> int:
    """Return the last error of the runtime that torch uses, and clear it."""
    return _registration.call("GetLastError")[0]


def resident() -> int:
    """Bytes of memory that this process has; the kernel counts pages one by one here."""
    (rss,) = re.findall(r"^Rss: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    return int(rss) * 1024


def lands_later(here: torch.Tensor, device: torch.device = DEVICE) -> None:
    """A copy into it returns immediately, has not happened then, and is right in the end."""
    there = pattern(here.numel(), device)
    here.fill_(255)
    settle(device)
    delay(current(device))
    here.copy_(there, non_blocking=True)
    event = torch.Event(device)
    event.record()
    assert not event.query(), "the host waited for the copy"
    assert int(here[0]) == int(here[-1]) == 255
    event.synchronize()
    assert torch.equal(here, there.cpu())


def test_memory_is_pinned_and_lands_late_but_right(accelerator: torch.device) -> None:
    with pinned.allocate(ODD, fallback=False) as memory:
        assert memory.pinned
        assert memory.tensor.is_pinned()
        assert memory.nbytes == ODD == memory.tensor.numel()
        here = memory.tensor
    lands_later(here, accelerator)  # what was made of it outlives it
    there = here.to(accelerator)
    for _ in range(3):
        here = pinned.empty(ODD, torch.uint8, fallback=False)
        delay(current(accelerator))
        here.copy_(there, non_blocking=True)
        del here  # and is not lost while a copy is under way
    settle(accelerator)
    assert accelerator.type != "cuda" or last_error() == 0


def test_blocks_come_back_when_their_copies_have_ended(accelerator: torch.device) -> None:
    there = pattern(ODD, accelerator)
    with PinnedPool(ODD, 1, fallback=False) as pool:
        assert pool.pinned
        block = pool.acquire()
        delay(current(accelerator))
        block.tensor.copy_(there, non_blocking=True)
        event = torch.Event(accelerator)
        event.record()
        block.release(after=event)
        assert pool.free == 0
        with pool.acquire(wait=True, timeout=LIMIT) as again:
            assert event.query()
            assert torch.equal(again.tensor, there.cpu())


@pytest.mark.simdev
def test_what_torch_does_not_offer_is_said() -> None:
    assert pinned.why_not() is None
    with pytest.raises(Unsupported, match="numactl"):
        pinned.allocate(ODD, numa=0)
    with pinned.allocate(ODD, huge_pages="reserved") as memory:
        assert "torch's allocator" in memory.notes[0]
        assert "takes no request for huge pages" in memory.notes[1]
        with pytest.raises(Unsupported, match="not registered"):
            memory.device_address()
    with pytest.raises(HostMemoryError, match="cannot register existing memory"):
        pinned.register(torch.arange(50000), fallback=False)


@pytest.mark.simdev
@pytest.mark.filterwarnings("ignore:Expected pinned host memory")
def test_what_exists_is_pageable_with_the_same_results() -> None:
    with pinned.register(torch.arange(50000)) as registered:
        assert not registered.pinned
        assert registered.view(torch.int64).to(SIMDEV).cpu().sum() == 50000 * 49999 // 2
    memory = mmap.mmap(-1, 1 << 16)
    with pinned.register(memory) as mapped:
        there = torch.arange(1 << 14, dtype=torch.int32, device=SIMDEV).view(64, 4, 64)
        host = KVView(mapped.view(torch.int32, (64, 4, 64)), "block token dim")
        assert host.form.place == "pageable"
        blocks = torch.randperm(64)
        copy_blocks(KVView(there, "block token dim"), host, blocks, range(64)).synchronize()
        landed = torch.frombuffer(memory, dtype=torch.int32).view(64, 4, 64)
        assert torch.equal(landed, there.cpu()[blocks])
        back = torch.zeros_like(there)
        copy_blocks(host, KVView(back, "block token dim"), range(64), blocks).synchronize()
        assert torch.equal(back.cpu(), there.cpu())


@pytest.mark.simdev
@pytest.mark.parametrize("downward", [True, False])
def test_what_a_vendor_s_runtime_registered_is_pinned_if_the_caller_says_so(downward: bool) -> None:
    memory = mmap.mmap(-1, 1 << 16)
    here = torch.frombuffer(memory, dtype=torch.int32).view(64, 4, 64)
    here.copy_(torch.arange(1 << 14, dtype=torch.int32).view(64, 4, 64).flip(0))
    there = torch.arange(1 << 14, dtype=torch.int32, device=SIMDEV).view(64, 4, 64)
    rest: dict[str, Any] = {"shape": here.shape, "dtype": here.dtype, "device": "cpu"}
    host = KVView.at([here.data_ptr()], "block token dim", pinned=True, **rest)
    caches = KVView(there, "block token dim")
    blocks = torch.randperm(64)
    assert host.form.place == "pinned"
    sides = (caches, host, blocks, range(64)) if downward else (host, caches, range(64), blocks)
    copy_blocks(*sides).synchronize()
    assert torch.equal(there.cpu()[blocks], here)
    assert int(here.min()) == 0
    assert int(here.max()) == (1 << 14) - 1


@gpu
@pytest.mark.parametrize(
    ("nbytes", "huge_pages"),
    [(BIG, "auto"), (5, "auto"), (ODD, "never"), (ODD, "transparent"), (ODD, "reserved")],
)
def test_exactly_so_many_bytes_and_truly_asynchronous(nbytes: int, huge_pages: Any) -> None:
    torch.cuda.synchronize()
    pinned.allocate(PAGE).close()  # whatever a first registration needs
    before = resident()
    with pinned.allocate(nbytes, huge_pages=huge_pages, fallback=False) as memory:
        grown = resident() - before
        whole = -(-nbytes // PAGE) * PAGE
        assert huge_pages == "reserved" or whole <= grown + (1 << 20)
        assert grown < whole + (8 << 20)  # torch's allocator would have taken 512 MiB for BIG
        assert memory.device_address() == memory.address
        if nbytes > 5:
            lands_later(memory.tensor)


@gpu
def test_somebody_else_registered_it_and_no_error_is_left() -> None:
    tensor = torch.zeros(ODD, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()
    start = tensor.data_ptr() // PAGE * PAGE
    assert int(cudart.cudaHostRegister(start, 4 * PAGE, 0).value) == 0
    try:
        with pytest.raises(HostMemoryError, match="already"):
            pinned.register(tensor.numpy())
        assert last_error() == 0
        assert float(torch.ones(4, device="cuda").sum()) == 4
        # The library is the one whose errors torch sees.
        again = cudart.cudaHostRegister(start, 4096, 0)
        assert int(again.value) == last_error() == _registration.ALREADY
    finally:
        cudart.cudaHostUnregister(start)
    assert last_error() == 0


@gpu
@pytest.mark.parametrize(
    "memory",
    [np.zeros(ODD, np.uint8), torch.zeros(ODD, dtype=torch.uint8)[777:], mmap.mmap(-1, ODD)],
    ids=lambda memory: type(memory).__name__,
)
def test_memory_that_exists(memory: Any) -> None:
    others = pinned.registered()  # of other tests
    with pinned.register(memory, fallback=False) as registered:
        assert registered.pinned
        lands_later(registered.tensor)
        tensor = registered.tensor
    del registered
    assert tensor.is_pinned()
    del tensor
    assert not isinstance(memory, torch.Tensor) or not memory.is_pinned()
    pinned.register(memory, fallback=False)
    pinned.unregister(memory)
    assert all(each in others for each in pinned.registered())
    assert last_error() == 0


@gpu
@pytest.mark.parametrize("distance", [16, 3000])
def test_neighbours_on_the_heap_are_left_alone(distance: int) -> None:
    """A pageable copy that begins after registered memory, in its last page, and reaches far."""
    heap = torch.zeros(64 * PAGE, dtype=torch.uint8)
    first = -heap.data_ptr() % PAGE
    ours = heap[first + 100 : first + 3 * 4096 + 50]
    neighbour = heap[first + 3 * 4096 + 50 + distance :]
    with pinned.register(ours, fallback=False) as registered:
        assert registered.tensor.is_pinned()
        lands_later(registered.tensor)
        there = pattern(neighbour.numel())
        neighbour.copy_(there)
        assert torch.equal(neighbour, there.cpu())
        assert torch.equal(neighbour.to("cuda"), there)
    assert last_error() == 0


@gpu
def test_freed_and_read_only_leave_no_error() -> None:
    mapping = mmap.mmap(-1, ODD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _registration.address_of(mapping)
    mapping.close()
    with pytest.raises(HostMemoryError, match="freed"):
        pinned.register_address(address, ODD)
    fixed = mmap.mmap(-1, ODD, prot=mmap.PROT_READ)
    with pytest.raises(HostMemoryError, match="read_only"):
        pinned.register(fixed)
    with suppress(HostMemoryError):  # devices differ in whether they can
        pinned.register(fixed, read_only=True, fallback=False).close()
    assert last_error() == 0
    # After the library's own checks, the runtime's refusal is cleared as well.
    assert _registration.call("HostRegister", address, ODD, 0)[0] != 0
    assert last_error() == 0


@gpu
def test_a_tensor_that_dies_in_a_capture_does_not_break_it() -> None:
    here = pinned.empty(ODD, torch.uint8, fallback=False)
    counter = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter += 1
        del here
    graph.replay()
    torch.cuda.synchronize()
    assert float(counter) == 1
    pinned.allocate(4096).close()  # what was postponed ends here


@gpu
def test_pieces_are_registered_each_by_itself() -> None:
    there = pattern(ODD)
    with pinned.allocate(ODD, largest=1 << 20, fallback=False) as memory:
        assert memory.boundaries == (1 << 20, 2 << 20, 3 << 20)
        memory.tensor.fill_(255)
        for start, nbytes in memory.parts(100, ODD - 200):
            part = slice(start, start + nbytes)
            memory.tensor[part].copy_(there[part], non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(memory.tensor[100:-100], there[100:-100].cpu())
        assert bool((memory.tensor[:100] == 255).all())


PINNED_FIRST = """
import torch
from portakv import KVView
from portakv.host import pinned
here = pinned.empty((2, 4, 16), torch.int32)
print(pinned.why_not() is None, here.is_pinned(), KVView(here, "layer token dim").form.place)
here = pinned.empty(100 << 20, torch.uint8, fallback=False)
memory = pinned.register(bytearray(1 << 20), fallback=False)
there = torch.ones(100 << 20, dtype=torch.uint8, device="cuda")
torch.cuda._sleep(500_000_000)
here.copy_(there, non_blocking=True)
"""


@gpu
def test_pinned_before_the_device_was_used_and_in_use_when_the_process_ends() -> None:
    """Torch takes no memory for pinned until it has begun with a device."""
    command = [sys.executable, "-c", PINNED_FIRST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True pinned\n", "")


@gpu
@pytest.mark.bigmem
def test_17_gib_faster_than_torch_and_to_the_byte() -> None:
    """Run with ``-s`` to see the seconds."""
    nbytes = 17 << 30
    pinned.allocate(nbytes, fallback=False).close()  # neither pays for pages used a first time
    before = resident()
    began = time.perf_counter()
    memory = pinned.allocate(nbytes, fallback=False)
    ours = time.perf_counter() - began
    assert abs(resident() - before - nbytes) < (64 << 20)
    memory.close()
    began = time.perf_counter()
    neighbour = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    torchs = time.perf_counter() - began
    del neighbour
    print(f"\npinning 17 GiB: {ours:.2f} s here, {torchs:.2f} s by torch")
    assert ours < torchs
