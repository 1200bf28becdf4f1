# SPDX-License-Identifier: Apache-2.0
"""Pinned memory without a GPU: what is mapped, touched and registered, until when, and what is
refused; through a stand-in for the CUDA runtime, and pageable without any device."""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ready
from support.guarded_memory import refused
from support.pinned_runtime import FakeLibrary, absent
from support.pool_processes import Child
from support.waits import LIMIT

from portakv.errors import DeviceMismatch, HostMemoryError, Unsupported
from portakv.host import _registration, pinned

pytestmark = pytest.mark.filterwarnings("ignore:Expected pinned host memory")
PAGE = mmap.PAGESIZE
ODD = 3 * 1024 * 1024 + 4096
TESTS = Path(__file__).parents[1]

BYTES = pinned.PinnedMemory(torch.zeros(16, dtype=torch.uint8), None, ())
each_method = pytest.mark.usefixtures("either")


def private(nbytes: int = 4 * PAGE) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, ODD])
def test_so_many_bytes_and_no_more(
    nbytes: int, either: FakeLibrary | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel gave every page before anything was written."""
    monkeypatch.setattr(_registration, "SLICE", 5 * PAGE)  # which threads touch each in turn
    with pinned.allocate(nbytes, huge_pages="never", threads=3) as memory:
        assert either is None or either.registered == {memory.address: (nbytes, 3)}
        assert resident(memory.address, nbytes)
        assert memory.nbytes == nbytes == memory.tensor.numel() == memory.array.nbytes
        assert memory.address % PAGE == 0
        assert (memory.boundaries, memory.notes) == ((), ())
        assert memory.parts(0, nbytes) == [(0, nbytes)]
        assert memory.parts(nbytes, 0) == [(nbytes, 0)]
        memory.tensor.fill_(7)
        assert memory.array.sum() == 7 * nbytes


@each_method
def test_a_tensor_of_any_shape_and_of_none() -> None:
    tensor = pinned.empty((3, 5), torch.bfloat16)
    nothing = pinned.empty((0, 4), torch.int8)
    assert (tensor.shape, nothing.shape, pinned.empty(7).shape) == ((3, 5), (0, 4), (7,))
    assert (tensor.dtype, tensor.untyped_storage().nbytes()) == (torch.bfloat16, 30)


def resident(address: int, nbytes: int) -> bool:
    """Return True if all pages are there: bit 63 of each word of the kernel's page map."""
    with open("/proc/self/pagemap", "rb") as words:
        words.seek(address // PAGE * 8)
        pages = np.frombuffer(words.read(8 * -(-nbytes // PAGE)), np.uint64)
    return bool((pages >> np.uint64(63)).all())


def test_without_populate_pages_keep_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = private(8 * PAGE)
    memory[0:1] = b"\x05"
    address = _registration.address_of(memory)
    assert not resident(address, 8 * PAGE)
    monkeypatch.setattr(_registration, "libc", lambda *_: 22)
    _registration.touch(address, 8 * PAGE)
    assert resident(address, 8 * PAGE)
    assert memory[0:1] == b"\x05"


def test_what_the_kernel_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup limits what is available; nodes are listed as ranges."""
    contents = {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "has_memory": "0-2,5\n",
        "memory.stat": "anon 200\nfile 500\nshmem 100\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    replaced = {"/sys/fs/cgroup": tmp_path, "/sys/devices/system/node": tmp_path}
    monkeypatch.setattr(
        _registration, "Path", lambda at, *name: Path(replaced.get(at, Path(at)), *name)
    )
    assert _registration.available() == 1000 - 700 + 400
    assert _registration.nodes() == [0, 1, 2, 5]
    (tmp_path / "memory.max").write_text("max\n")
    assert _registration.available() > 1000


def test_reserved_huge_pages_or_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    no_kernel_has = 0x40000 | 20 << 26  # pages of 1 MB
    monkeypatch.setattr(_registration, "MAP_HUGETLB", no_kernel_has)
    with pinned.allocate(ODD, huge_pages="reserved") as memory:
        assert "no reserved huge pages" in memory.notes[0]
        assert "transparent huge pages were" in memory.notes[1]


@each_method
@pytest.mark.parametrize(
    ("call", "words"),
    [
        *((lambda n=n: pinned.allocate(n), "1 or more") for n in (0, -1, 1.5, "4")),
        (lambda: pinned.allocate(1 << 50), "available to this process"),
        (lambda: pinned.allocate(PAGE, unit=0), "unit .* 1 or more, got 0: pass 1"),
        (lambda: pinned.allocate(PAGE, unit="x"), "unit .*got 'x'"),
        (lambda: pinned.allocate(PAGE, largest="x"), "largest .*got 'x'"),
        (lambda: pinned.allocate(PAGE, largest=100), "whole pages"),
        (lambda: pinned.allocate(PAGE, huge_pages="no"), "one of auto, .*got 'no'. Pass one"),  # type: ignore
        (lambda: pinned.allocate(PAGE, threads=-3), "threads .* 1 or more, got -3: pass None"),
        (lambda: pinned.allocate(PAGE, threads=1.5), "threads .*got 1.5"),  # type: ignore
        (lambda: pinned.allocate(PAGE, huge_pages=np.zeros(3)), "huge_pages .*got array"),  # type: ignore
        *((lambda s=s: pinned.empty(s), "size to be a whole number, 0 or more")
          for s in ((-2, -4), (-2, 4), (0, -1), -1, 1.5, "x", (3, "4"), None, np.array(-3))),
        *((lambda d=d: pinned.empty(3, d), "Expected a torch.dtype")  # type: ignore
          for d in ("float32", [], 0, np.float32, torch.zeros(2))),
        (lambda: BYTES.view("int8"), "Expected a torch.dtype, got 'int8'"),  # type: ignore
        *((lambda s=s: BYTES.view(torch.int16, s), "16 bytes of torch.int16, got .*as many bytes")
          for s in ((9,), (-2, 4), [], 8, 1.5, "x", [None], (1 << 70,), np.zeros(3))),
        (lambda: pinned.register(torch.nested.nested_tensor([torch.zeros(2)])), "is not a strided"),
        (lambda: pinned.register(torch.zeros(5000), unit=-4096), "1 or more, got -4096: pass 1"),
        *((lambda a=a, n=n: pinned.register_address(a, n), "Expected (address|nbytes)|not mapped")
          for a, n in (("x", 64), (-1, 64), (PAGE, None), (PAGE, 1 << 70), (1 << 70, PAGE))),
        (lambda: pinned.register(torch.zeros(4).to_sparse()), "strided"),
        (lambda: pinned.register([1, 2]), "is not a strided tensor"),
        *((lambda m=m: pinned.register(m), "0 bytes")
          for m in (torch.zeros(0), np.zeros((3, 0)), bytearray())),
        (lambda: pinned.register((ctypes.c_void_p * 9)()), "numpy does not know .*frombuffer"),
        (lambda: pinned.register(torch.zeros(4, device="meta")), "on meta"),
        *((lambda n=n: pinned.allocate(ODD, numa=n), "nodes have whole numbers")
          for n in (1.5, "0", [0, "1"], np.array(0.0), int, [])),
        *((lambda n=n: pinned.allocate(ODD, numa=n), "node 4096")
          for n in (np.int64(4096), [np.int32(4096)], np.array([4096]))),
    ],
)  # fmt: skip
def test_no_memory(call: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"node": Unsupported, "meta": DeviceMismatch}
    error = next((other[word] for word in other if word in words), HostMemoryError)
    if not re.search("available|node", words):
        monkeypatch.setattr(
            _registration, "map_private", lambda *_: pytest.fail("memory was taken first")
        )
    with refused(error) as caught:
        call()
    assert re.search(words, str(caught.value))


@each_method
def test_memory_is_not_freed_while_registered_nor_registered_once_freed() -> None:
    gone = private()
    released = memoryview(bytearray(9))
    tensor = torch.zeros(5000)
    cut = torch.zeros(50, 100).t()
    byte = torch.zeros(1).bool()
    shared = SharedMemory(create=True, size=3 * PAGE)
    shared.unlink()
    registration = pinned.register(shared)
    assert registration.nbytes >= 3 * PAGE
    with pytest.raises(BufferError):
        shared.close()
    pinned.unregister(registration)
    del registration
    address = _registration.address_of(gone)
    gone.close()
    shared.close()
    released.release()
    tensor.untyped_storage().resize_(0)
    byte.untyped_storage().resize_(0)
    cut.untyped_storage().resize_(19999)
    for memory in (gone, tensor, cut, byte, shared, released):
        with pytest.raises(HostMemoryError, match="freed before"):
            pinned.register(memory)
    for start in (address, 0):
        with pytest.raises(HostMemoryError, match="before it is freed"):
            pinned.register_address(start, PAGE)


@each_method
def test_registered_already(monkeypatch: pytest.MonkeyPatch) -> None:
    again: Any
    tensor = torch.zeros(50000)
    with pinned.register(tensor), pinned.allocate(PAGE) as memory:
        for again in (tensor, tensor[10000:10001], tensor.numpy(), memory.tensor):
            with pytest.raises(HostMemoryError, match="already"):
                pinned.register(again)
    registration = pinned.register(tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)  # as a device's runtime says
    with pytest.raises(HostMemoryError, match="pinned already"):
        pinned.register(tensor)
    pinned.unregister(tensor)
    for again in (tensor, registration):
        with pytest.raises(HostMemoryError, match="Pass registered memory"):
            pinned.unregister(again)


def test_a_node_that_exists_and_one_that_does_not() -> None:
    known = _registration.nodes()
    if not known:
        pytest.skip("this kernel reports no NUMA nodes")
    nodes: list[Any] = [known[-1], [known[-1]], {known[-1]}, np.int64(known[-1])]
    for wanted in nodes:
        try:
            memory = pinned.allocate(ODD, numa=wanted)
        except Unsupported as error:
            if "nodes have whole numbers" in str(error):
                raise
            pytest.skip(str(error))
        with memory:
            maps = Path("/proc/self/numa_maps").read_text()
            assert re.search(rf"^{memory.address:x} bind:{known[-1]}\b", maps, re.MULTILINE)
    for wanted in (known[-1] + 1, [known[0], 4096]):
        with pytest.raises(Unsupported, match="this machine has the nodes"):
            pinned.allocate(PAGE, numa=wanted)


@pytest.mark.parametrize(
    ("call", "code", "error", "why"),
    [
        ("syscall", 1, Unsupported, "CAP_SYS_NICE"), ("syscall", 38, Unsupported, "without NUMA"),
        ("syscall", 5, Unsupported, "refused"),
        ("madvise", 12, HostMemoryError, "got none from the kernel"),
    ],
)  # fmt: skip
def test_what_the_kernel_refuses(
    call: str, code: int, error: type[Exception], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registration, "libc", lambda name, *_: code if name == call else 0)
    monkeypatch.setattr(_registration, "nodes", lambda: [0])
    with pytest.raises(error, match=why):
        pinned.allocate(PAGE, numa=0)
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(Unsupported, match="not known on vax"):
        pinned.allocate(PAGE, numa=0)


def test_tensors_and_arrays_hold_what_was_closed(cuda: FakeLibrary) -> None:
    memory = pinned.allocate(ODD)
    address = memory.address
    assert memory.pinned
    part = memory.tensor[8:16].view(torch.int32)
    array = memory.array[100:]
    memory.close()
    memory.close()
    assert memory.closed
    part.fill_(3)
    array[:] = 4
    del part
    assert cuda.registered
    assert _registration.is_mapped(address, PAGE)
    del array
    assert not _registration.is_mapped(address, PAGE)
    assert cuda.log == ["register", "quiesce", "unregister"]
    with pytest.raises(HostMemoryError, match="closed"):
        _ = memory.tensor
    handlers = atexit._ncallbacks()
    pinned.allocate(PAGE).close()
    assert atexit._ncallbacks() == handlers


def test_a_capture_unregisters_nothing(cuda: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = pinned.empty(PAGE, torch.uint8)
    address = tensor.data_ptr()
    monkeypatch.setattr(_registration, "capturing", lambda: True)
    del tensor
    assert cuda.registered
    assert _registration.is_mapped(address, PAGE)
    monkeypatch.setattr(_registration, "capturing", lambda: False)
    pinned.allocate(PAGE).close()
    assert not cuda.registered
    assert not _registration.is_mapped(address, PAGE)


def test_a_forked_child_leaves_the_registration_alone(cuda: FakeLibrary) -> None:
    memory = pinned.allocate(PAGE)
    memory.tensor.fill_(9)

    def work(_: object) -> None:
        assert bool(memory.tensor[5] == 9)
        memory.close()
        assert "unregister" not in cuda.log

    assert Child(work).end() == 0
    memory.close()


KINDS: dict[str, Any] = {
    "numpy": np.zeros(50000, np.int16),
    "torch": torch.zeros(100, 500),
    "mmap": private(),
    "bytearray": bytearray(70000),
    "transposed": torch.zeros(300, 200).t(),
    "backwards": np.zeros(30000)[::-3],
    "in the middle": torch.zeros(100000)[333:40333],
}


@pytest.mark.parametrize("memory", KINDS.values(), ids=KINDS)
def test_memory_that_exists_where_it_is(memory: Any, cuda: FakeLibrary) -> None:
    with pinned.register(memory, mapped=False) as registration:
        assert cuda.registered == {registration.address: (registration.nbytes, 1)}
        registration.tensor.fill_(1)
        assert pinned.registered() == [registration]
    assert not cuda.registered
    assert pinned.registered() == []
    whole = np.ascontiguousarray(np.asarray(memory)).view(np.uint8)
    assert (whole == 1).all()


def test_read_only(cuda: FakeLibrary) -> None:
    array = np.zeros(50000)
    array.flags.writeable = False
    for memory in (array, b"0" * 50000):
        with pytest.raises(HostMemoryError, match="read_only=True"):
            pinned.register(memory)
        with pinned.register(memory, read_only=True) as registration:
            assert not registration.array.flags.writeable
            assert [flags for _, flags in cuda.registered.values()] == [3 + 8]


def test_somebody_else_registered_it_or_has_let_go_of_it(cuda: FakeLibrary) -> None:
    with private() as mapping:
        cuda.registered[_registration.address_of(mapping)] = PAGE, 0
        with pytest.raises(HostMemoryError, match="other code registered"):
            pinned.register(mapping)
        assert cuda.sticky == 0
        cuda.registered.clear()
        with pinned.register(mapping):
            assert cuda.registered
            cuda.registered.clear()  # a device that was reset has forgotten it
    assert cuda.sticky == 0


@pytest.mark.parametrize("code", [2, 304, 800, 801])
def test_a_refusal_leaves_it_pageable_and_no_error_behind(code: int, cuda: FakeLibrary) -> None:
    """Also of a later piece, which undoes the earlier."""
    cuda.refuse = {0: code, 3: code, 4: code}
    array = np.arange(50000)
    with pinned.register(array) as registration:
        assert not registration.pinned
        assert (registration.view(torch.int64).numpy() == array).all()
    with pinned.allocate(4 * PAGE, largest=PAGE) as memory:
        assert not memory.pinned
        assert cuda.log.count("register") == cuda.log.count("unregister") == 2
        assert not cuda.registered
        assert memory.tensor.fill_(1).sum() == 4 * PAGE
        assert "pageable" in repr(memory)
        with pytest.raises(Unsupported, match="not registered"):
            memory.device_address()
    assert cuda.sticky == 0
    with pytest.raises(HostMemoryError, match="fallback=True"):
        pinned.allocate(ODD, fallback=False)


def test_pieces(cuda: FakeLibrary) -> None:
    with pinned.allocate(10 * PAGE + 5, largest=4 * PAGE) as memory:
        assert memory.boundaries == (4 * PAGE, 8 * PAGE)
        assert [piece.numel() for piece in memory.pieces] == [4 * PAGE, 4 * PAGE, 2 * PAGE + 5]
        assert memory.pieces[1].data_ptr() == memory.address + 4 * PAGE
        assert sorted(cuda.registered) == [
            memory.address + boundary for boundary in (0, *memory.boundaries)
        ]
        assert memory.parts(PAGE, PAGE) == [(PAGE, PAGE)]
        assert memory.parts(3 * PAGE, 5 * PAGE) == [(3 * PAGE, PAGE), (4 * PAGE, 4 * PAGE)]
        assert memory.parts(0, 9 * PAGE)[-1] == (8 * PAGE, PAGE)
        end = memory.nbytes
        outside = f"within {memory.nbytes} bytes|a whole number"
        for each in ((0, end + 1), (-5, 9), (end, 1), (end + 1, 0), (8, -1), (0, 1.5), ("x", 1)):
            with pytest.raises(HostMemoryError, match=outside):
                memory.parts(*each)
        # The address of each piece is requested separately.
        assert memory.device_address(9 * PAGE + 1) == memory.address + 9 * PAGE + 1 + (1 << 40)
    for unit in (3 * PAGE, 3 * PAGE // 2):
        with pinned.allocate(12 * PAGE, largest=4 * PAGE, unit=unit) as memory:
            assert memory.boundaries == (3 * PAGE, 6 * PAGE, 9 * PAGE)
    with pytest.raises(Unsupported, match="mapped=False"):
        pinned.allocate(PAGE, mapped=False).device_address()


def test_what_is_registered_is_exact_and_its_neighbours_are_left_alone(cuda: FakeLibrary) -> None:
    mapping = private(8 * PAGE)
    address = _registration.address_of(mapping) + 100
    with pinned.register_address(address, 2 * PAGE, owner=mapping) as memory:
        assert cuda.registered == {address: (2 * PAGE, 3)}
        assert memory.boundaries == ()
        for offset in (2 * PAGE + 8, -50):
            with pytest.raises(HostMemoryError, match="registered once"):
                pinned.register_address(address + offset, 40, owner=mapping)
        pinned.register_address(address + 3 * PAGE, PAGE, owner=mapping).close()
    with pinned.register_address(address, 3 * PAGE, owner=mapping, largest=PAGE) as memory:
        assert memory.boundaries == tuple(at * PAGE - 100 for at in (1, 2, 3))
        lengths = [cuda.registered[address + at][0] for at in (0, *memory.boundaries)]
        assert lengths == [PAGE - 100, PAGE, PAGE, 100]
        assert memory.device_address(PAGE) == address + PAGE + (1 << 40)
    assert not cuda.registered


def test_the_library_that_torch_loaded() -> None:
    paths = [
        "/a/libcudart.so.12",
        "/b c/libcudart.so.13.0.96",
        "/d/libcudart_static.so",
        "/e/libcudart-1a2b.so.11.0",
    ]
    maps = "".join(f"7f00-7f01 r-xp 00000000 00:00 1      {path}\n" for path in (*paths, ""))
    for version, path in (("13", paths[1]), ("12", paths[0]), ("11", paths[3]), ("", paths[0])):
        assert _registration.loaded_library(maps, "libcudart", version) == path
    assert _registration.loaded_library(maps, "libamdhip64", "6") is None
    maps += " /torch/libamdhip64.so\n /opt/rocm/lib/libamdhip64.so.6\n"
    assert _registration.loaded_library(maps, "libamdhip64", "") == "/torch/libamdhip64.so"


def test_cuda_s_devices_are_waited_for_beside_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.accelerator."""
    waited: list[int] = []
    monkeypatch.setattr(_registration, "why_not", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda at: at != 1, raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, stand_in in (
        ("is_initialized", lambda: True),
        ("device_count", lambda: 3),
        ("synchronize", waited.append),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    _registration.quiesce()
    assert waited == [0, 2]


SCRIPT = """
import atexit, pytest, sys
atexit.register(lambda: tensor.fill_(1))  # the last thing of all
from support.pinned_runtime import absent, installed
from portakv.host import pinned
patch = pytest.MonkeyPatch()
absent(patch)
for turn in range(2):
    pinned.allocate(4096)
    patch.setattr(pinned._registration, "why_not", lambda: "of the test")
pinned.empty((4, 4))
pinned._registration.warned.clear()
pinned.register(bytearray(9))
library = installed(patch)
class Logged(list):
    def append(self, what):
        print(what, flush=True)
library.log = Logged()
registration = pinned.allocate(4096)
tensor = registration.tensor
closed = pinned.allocate(4096)
closed.close()
atexit.register(print, "workers", flush=True)
memory = pinned.register(bytearray(50000))
print("end", flush=True)
"""


def test_a_process_that_ends(tmp_path: Path) -> None:
    """Warn of each reason once, at the line of the caller; unregister the rest once,
    below no worker that was started after the first registration."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-W", "always", str(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    printed = done.stdout.split("end\n")
    assert printed[0].split() == ["register"] * 2 + ["quiesce", "unregister", "register"]
    assert printed[1].split() == ["workers"] + ["quiesce", "unregister"] * 2
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    wanted = [(9, "the test has taken"), (9, "of the test"), (13, "of the test")]
    for line, (at, why) in zip(warned, wanted, strict=True):
        assert line.startswith(f"{script}:{at}: ")
        assert why in line


def test_an_option_that_there_is_not() -> None:
    with refused(HostMemoryError, "Expected options among", "largest", "Leave huge out"):
        pinned.allocate(4096, huge=1)
    with refused(HostMemoryError, "nbytes", "got True"):
        pinned.allocate(True)


def test_a_machine_without_a_device_is_not_warned_of_pageable_memory() -> None:
    """The user could do nothing about it, and nothing is copied to a device."""
    script = """if True:
        import torch, warnings
        warnings.simplefilter("error", RuntimeWarning)
        torch.cuda.is_available = torch.accelerator.is_available = lambda: False
        from portakv.host import pinned
        assert not pinned.allocate(4096).pinned
        assert not pinned.register(bytearray(8192)).pinned
    """
    done = ready.run("-c", script, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def allocated(x: torch.Tensor) -> torch.Tensor:
    return x + pinned.empty(3).fill_(2)


def registered_in_place(x: torch.Tensor) -> torch.Tensor:
    total = x + 2
    pinned.register(total).close()
    return total


def adopted(x: torch.Tensor) -> torch.Tensor:
    with pinned.adopt([(4096, 4096)]):
        return x + 2


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", [allocated, registered_in_place, adopted])
def test_calls_of_compiled_functions(
    call: Callable[[torch.Tensor], torch.Tensor], compiler: str
) -> None:
    """The compiler cannot trace finalizers of memory, so the graph breaks there."""
    torch.compiler.reset()
    compiled = torch.compile(call, backend=compiler)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    torch.compiler.reset()
