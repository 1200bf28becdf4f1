# SPDX-License-Identifier: Apache-2.0
"""Pinned memory without a GPU: a stand-in for the runtime, and the pageable way."""

from __future__ import annotations

import gc
import mmap
import platform
import re
import warnings
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pinned_runtime import absent, claimed, installed

from portakv.errors import DeviceMismatch, PortaKVError, Unsupported
from portakv.host import _pages, _registrations, pinned
from portakv.host.pinned import HostMemoryError

PAGE = mmap.PAGESIZE
ODD = 3 * 1024 * 1024 + 4096
HERE = Path(__file__).parent


@pytest.fixture(params=["runtime", "none"], autouse=True)
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test holds with a runtime and without any device; and leaves nothing claimed."""
    if request.param == "runtime":
        installed(monkeypatch)
    else:
        absent(monkeypatch)
    before = claimed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    if claimed() != before:
        gc.collect()  # a caught exception holds the frames that it passed
    assert claimed() == before


def private(nbytes: int = 4 * PAGE) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 100, PAGE, PAGE + 1, ODD])
def test_so_many_bytes_and_no_more(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = mmap.mmap

    def recorded(fd: int, length: int, **options: Any) -> mmap.mmap:
        made.append(length)
        return plain(fd, length, **options)

    monkeypatch.setattr(mmap, "mmap", recorded)
    with pinned.allocate(nbytes) as memory:
        assert made == [nbytes]
        assert memory.nbytes == nbytes == memory.tensor.numel() == memory.array.nbytes
        assert memory.address % PAGE == 0
        assert memory.seams == ()
        memory.tensor.fill_(7)
        assert memory.array.sum() == 7 * nbytes


def test_the_kernel_gave_every_page_before_anybody_wrote() -> None:
    with pinned.allocate(ODD, huge_pages="never", threads=3) as memory:
        assert resident(memory.address, ODD)


def resident(address: int, nbytes: int) -> bool:
    """From the kernel's page map: bit 63 of a page's word is whether it is there."""
    with open("/proc/self/pagemap", "rb") as words:
        words.seek(address // PAGE * 8)
        found = np.frombuffer(words.read(8 * -(-nbytes // PAGE)), np.uint64)
    return bool((found >> np.uint64(63)).all())


def test_without_populate_pages_are_written_and_keep_what_they_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = private(8 * PAGE)
    memory[0:1] = b"\x05"
    address = _pages.address_of(memory)
    assert not resident(address, 8 * PAGE)
    monkeypatch.setattr(_pages, "_call", lambda *_: 22)
    _pages.touch(address, 8 * PAGE)
    assert resident(address, 8 * PAGE)
    assert memory[0:1] == b"\x05"


def test_many_slices_are_touched_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(_pages, "_SLICE", 4 * PAGE)
    monkeypatch.setattr(_pages, "_touch_slice", lambda *each: seen.append(each))
    _pages.touch(3 * PAGE, 14 * PAGE, threads=3)
    assert sorted(seen) == [(3 * PAGE, PAGE), (4 * PAGE, 4 * PAGE), (8 * PAGE, 4 * PAGE),
                            (12 * PAGE, 4 * PAGE), (16 * PAGE, PAGE)]  # fmt: skip


def test_no_pages_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pages, "_call", lambda *_: 12)
    with pytest.raises(HostMemoryError, match="no pages for them"):
        pinned.allocate(ODD)


def test_a_tensor_of_any_shape_and_of_none() -> None:
    tensor = pinned.empty((3, 5), torch.bfloat16)
    assert (tensor.shape, tensor.dtype) == ((3, 5), torch.bfloat16)
    assert tensor.untyped_storage().nbytes() == 30
    assert pinned.empty(7).shape == (7,)
    assert pinned.empty((0, 4), torch.int8).shape == (0, 4)


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, "4"])
def test_no_number_of_bytes(nbytes: Any) -> None:
    with pytest.raises(HostMemoryError, match="1 or more"):
        pinned.allocate(nbytes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": 0}, "multiples of 0 bytes .* 1 or more: pass 1"),
        ({"unit": -4096}, "multiples of -4096 bytes"),
        ({"unit": "x"}, "multiples of 'x' bytes"),
        ({"largest": "x"}, "at most 'x' bytes"),
        ({"huge_pages": "sometimes"}, "huge_pages='sometimes'; expected one of auto, .*pass one"),
        ({"threads": -3}, "-3 threads .* 1 or more: pass None"),
        ({"threads": 1.5}, "1.5 threads"),
    ],
)
def test_what_nobody_can_allocate_by(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pages, "map_private", lambda *_: pytest.fail("memory was taken first"))
    with pytest.raises(HostMemoryError, match=words):
        pinned.allocate(PAGE, **options)


@pytest.mark.parametrize("unit", [0, -4096, 1.5])
def test_a_unit_of_memory_that_exists(unit: Any) -> None:
    with pytest.raises(HostMemoryError, match="1 or more: pass 1"):
        pinned.register(torch.zeros(5000), unit=unit)


@pytest.mark.parametrize("shape", [(-2, -4), (-2, 4), (0, -1), -1, 1.5, "x", (3, "4"), None])
def test_no_shape(shape: Any) -> None:
    with pytest.raises(HostMemoryError, match=r"of shape .* expected a whole number, 0 or more"):
        pinned.empty(shape, torch.uint8)


def test_parts_lie_inside() -> None:
    with pinned.allocate(PAGE) as memory:
        assert memory.parts(0, PAGE) == [(0, PAGE)]
        assert memory.parts(PAGE, 0) == [(PAGE, 0)]
        outside: list[tuple[Any, Any]] = [
            (0, 99999), (-5, 10), (PAGE, 1), (PAGE + 1, 0), (8, -1), (0, 1.5), ("x", 1),
        ]  # fmt: skip
        for offset, nbytes in outside:
            with pytest.raises(HostMemoryError, match=f"were asked of {PAGE} bytes; expected"):
                memory.parts(offset, nbytes)


def test_more_than_the_machine_has_is_refused_before_the_kernel_kills() -> None:
    with pytest.raises(HostMemoryError, match="available to this process"):
        pinned.allocate(1 << 50)


def test_a_cgroup_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 500\nshmem 100\n")
    monkeypatch.setattr(_pages, "Path", lambda _: tmp_path)
    assert list(_pages._cgroups()) == [1000 - 700 + 400]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(_pages._cgroups()) == []


# --- lifetime ----------------------------------------------------------------------------------


def test_memory_is_unmapped_behind_its_last_tensor() -> None:
    tensor = pinned.empty(PAGE * 64, torch.uint8)
    address = tensor.data_ptr()
    assert _pages.is_mapped(address, PAGE)
    del tensor
    assert not _pages.is_mapped(address, PAGE)


# --- memory that exists ------------------------------------------------------------------------


def test_shared_memory_cannot_be_closed_meanwhile() -> None:
    shared = SharedMemory(create=True, size=3 * PAGE)
    try:
        held = pinned.register(shared)
        assert held.nbytes >= 3 * PAGE
        with pytest.raises(BufferError):
            shared.close()
        pinned.unregister(held)
        del held
    finally:
        shared.close()
        shared.unlink()


def test_unregister_by_the_memory_itself() -> None:
    tensor = torch.zeros(50000)
    held = pinned.register(tensor)
    pinned.unregister(tensor)
    with pytest.raises(HostMemoryError, match="asked to be unregistered"):
        pinned.unregister(tensor)
    with pytest.raises(HostMemoryError, match="asked to be unregistered"):
        pinned.unregister(held)


def test_registered_already() -> None:
    tensor = torch.zeros(50000)
    with pinned.register(tensor):
        for again in (tensor, tensor[10000:10001], tensor.numpy()):
            with pytest.raises(HostMemoryError, match="already"):
                pinned.register(again)
    with pinned.register(tensor):
        pass
    with pinned.allocate(PAGE) as memory, pytest.raises(HostMemoryError, match="already"):
        pinned.register(memory.tensor)


def test_two_arrays_that_share_a_page() -> None:
    with private() as mapping:
        address = _pages.address_of(mapping)
        with pinned.register_address(address, PAGE + 100):
            with pytest.raises(HostMemoryError, match="shares a page"):
                pinned.register_address(address + PAGE + 200, 100)
            with pinned.register_address(address + 2 * PAGE, PAGE):
                pass


def test_freed() -> None:
    gone = private()
    address = _pages.address_of(gone)
    gone.close()
    tensor = torch.zeros(5000)
    tensor.untyped_storage().resize_(0)
    shared = SharedMemory(create=True, size=PAGE)
    shared.close()
    shared.unlink()
    released = memoryview(bytearray(9))
    released.release()
    for memory in (gone, tensor, shared, released):
        with pytest.raises(HostMemoryError, match="freed before"):
            pinned.register(memory)
    for start in (address, 0):
        with pytest.raises(HostMemoryError, match="before it is freed"):
            pinned.register_address(start, PAGE)


def test_what_is_no_host_memory() -> None:
    with pytest.raises(DeviceMismatch, match="on meta"):
        pinned.register(torch.zeros(4, device="meta"))
    with pytest.raises(HostMemoryError, match="strided"):
        pinned.register(torch.zeros(4).to_sparse())
    with pytest.raises(HostMemoryError, match="expected a tensor"):
        pinned.register([1, 2])
    for memory in (torch.zeros(0), np.zeros((3, 0)), bytearray()):
        with pytest.raises(HostMemoryError, match="0 bytes"):
            pinned.register(memory)


# --- huge pages, nodes, warnings ---------------------------------------------------------------


def test_reserved_huge_pages_or_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mmap.mmap

    def without(fd: int, length: int, flags: int) -> mmap.mmap:
        if flags & 0x40000:
            raise OSError(12, "Cannot allocate memory")
        return plain(fd, length, flags=flags)

    monkeypatch.setattr(mmap, "mmap", without)
    with pinned.allocate(ODD, huge_pages="reserved") as memory:
        assert "no reserved huge pages" in memory.notes[0]
        assert "transparent huge pages were" in memory.notes[1]
    with pinned.allocate(ODD) as memory:
        assert memory.notes == ()


def test_a_node_that_exists_and_one_that_does_not() -> None:
    known = _pages.nodes()
    if not known:
        pytest.skip("this kernel tells of no NUMA nodes")
    try:
        memory = pinned.allocate(ODD, numa=known[-1])
    except Unsupported as refused:
        pytest.skip(str(refused))
    with memory:
        maps = Path("/proc/self/numa_maps").read_text()
        assert re.search(rf"^{memory.address:x} bind:{known[-1]}\b", maps, re.MULTILINE)
    for wanted in (known[-1] + 1, [known[0], 4096]):
        with pytest.raises(Unsupported, match="this machine has the nodes"):
            pinned.allocate(PAGE, numa=wanted)


def test_no_node_at_all() -> None:
    with pytest.raises(Unsupported, match=r"an empty list of NUMA nodes(?s:.*)leave numa=None"):
        pinned.allocate(PAGE, numa=[])


@pytest.mark.parametrize(
    ("code", "why"), [(1, "CAP_SYS_NICE"), (38, "without NUMA"), (5, "refused")]
)
def test_why_a_node_cannot_be_bound(code: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pages, "_call", lambda name, *_: code if name == "syscall" else 0)
    monkeypatch.setattr(_pages, "nodes", lambda: [0])
    with pytest.raises(Unsupported, match=why):
        pinned.allocate(PAGE, numa=0)
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(Unsupported, match="not known on vax"):
        pinned.allocate(PAGE, numa=0)


def test_lists_of_nodes() -> None:
    assert _pages._listed("0-2,5\n") == [0, 1, 2, 5]


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registrations, "_told", set())
    absent(monkeypatch)
    monkeypatch.setattr(_registrations, "why_not", lambda: "of the test")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            with pinned.allocate(PAGE) as memory:
                assert not memory.pinned
                assert "pageable" in repr(memory)
        with pytest.raises(HostMemoryError, match="of the test"):
            pinned.allocate(PAGE, fallback=False)
    assert [str(one.message).count("of the test") for one in seen] == [1]


def test_every_error_is_one_of_the_tree() -> None:
    assert issubclass(HostMemoryError, PortaKVError)


@pytest.mark.parametrize("node", [1.5, "0", [0, "1"], np.array(0.0), None.__class__])
def test_a_node_that_is_no_number(node: Any) -> None:
    with pytest.raises(Unsupported, match="nodes have whole numbers"):
        pinned.allocate(ODD, numa=node)


@pytest.mark.parametrize(
    "node", [np.int64(4096), [np.int32(4096)], np.array(4096), np.array([4096])]
)
def test_a_node_of_numpys(node: Any) -> None:
    with pytest.raises(Unsupported, match="node 4096"):
        pinned.allocate(ODD, numa=node)
