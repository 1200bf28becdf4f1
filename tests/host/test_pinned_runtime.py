# SPDX-License-Identifier: Apache-2.0
"""Pinned memory through a stand-in for the CUDA runtime: what is registered, and until when."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pinned_runtime import FakeLibrary, installed

from portakv.errors import Unsupported
from portakv.host import _pages, _registrations, pinned
from portakv.host.pinned import HostMemoryError

pytestmark = pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned")
PAGE = mmap.PAGESIZE
ODD = 3 * 1024 * 1024 + 4096
HERE = Path(__file__).parent


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def private(nbytes: int = 4 * PAGE) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_tensors_and_arrays_hold_what_was_closed(cuda: FakeLibrary) -> None:
    memory = pinned.allocate(ODD)
    assert cuda.registered == {memory.address: (ODD, 3)}
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
    del array
    assert not cuda.registered
    assert cuda.log == ["register", "quiesce", "unregister"]
    with pytest.raises(HostMemoryError, match="closed"):
        _ = memory.tensor


def test_nothing_is_unregistered_during_a_capture(
    cuda: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = pinned.empty(PAGE, torch.uint8)
    address = tensor.data_ptr()
    monkeypatch.setattr(_registrations, "capturing", lambda: True)
    del tensor
    assert cuda.registered
    assert _pages.is_mapped(address, PAGE)
    monkeypatch.setattr(_registrations, "capturing", lambda: False)
    _registrations.settle()
    assert not cuda.registered
    assert not _pages.is_mapped(address, PAGE)


def test_a_forked_child_leaves_the_registration_alone(cuda: FakeLibrary) -> None:
    memory = pinned.allocate(PAGE)
    memory.tensor.fill_(9)
    child = os.fork()
    if child == 0:
        right = bool(memory.tensor[5] == 9)
        memory.close()
        os._exit(0 if right and "unregister" not in cuda.log else 1)
    assert os.waitpid(child, 0)[1] == 0
    memory.close()


AT_EXIT = """
import pytest
from support.pinned_runtime import installed
from portakv.host import pinned
patch = pytest.MonkeyPatch()
library = installed(patch)
class Told(list):
    def append(self, what):
        print(what, flush=True)
library.log = Told()
held = pinned.allocate(4096)
tensor = held.tensor
closed = pinned.allocate(4096)
closed.close()
mine = pinned.register(bytearray(50000))
print("end", flush=True)
"""


def test_at_exit_what_is_left_is_unregistered_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said = done.stdout.split("end\n")
    assert said[0].split() == ["register"] * 2 + ["quiesce", "unregister", "register"]
    assert sorted(said[1].split()) == ["quiesce"] * 2 + ["unregister"] * 2
    assert done.stderr == ""


def kinds() -> dict[str, Any]:
    return {
        "numpy": np.zeros(50000, np.int16),
        "torch": torch.zeros(100, 500),
        "mmap": private(),
        "bytearray": bytearray(70000),
        "transposed": torch.zeros(300, 200).t(),
        "backwards": np.zeros(30000)[::-3],
        "in the middle": torch.zeros(100000)[333:40333],
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_memory_that_exists_where_it_is(kind: str, cuda: FakeLibrary) -> None:
    memory = kinds()[kind]
    with pinned.register(memory, mapped=False) as held:
        ((start, (length, flags)),) = cuda.registered.items()
        assert flags == 1
        assert (start, length) == (held.address, held.nbytes)
        held.tensor.fill_(1)
        assert pinned.registered() == [held]
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
        with pinned.register(memory, read_only=True) as held:
            assert not held.array.flags.writeable
            assert [flags for _, flags in cuda.registered.values()] == [3 + 8]


def test_somebody_else_registered_it(cuda: FakeLibrary) -> None:
    with private() as mapping:
        cuda.registered[_pages.address_of(mapping)] = PAGE, 0
        with pytest.raises(HostMemoryError, match="somebody else"):
            pinned.register(mapping)
        assert cuda.sticky == 0
        cuda.registered.clear()
        with pinned.register(mapping):
            assert cuda.registered


@pytest.mark.parametrize("code", [2, 304, 800, 801])
def test_a_refusal_leaves_it_pageable_and_no_error_behind(code: int, cuda: FakeLibrary) -> None:
    cuda.refuse = {0: code, 1: code, 2: code}
    array = np.arange(50000)
    with pinned.register(array) as held:
        assert not held.pinned
        assert (held.view(torch.int64).numpy() == array).all()
    with pinned.allocate(ODD) as memory:
        assert not memory.pinned
        assert memory.tensor.fill_(1).sum() == ODD
    assert cuda.sticky == 0
    with pytest.raises(HostMemoryError, match="fallback=True"):
        pinned.allocate(ODD, fallback=False)


def test_a_later_piece_that_fails_undoes_the_earlier(cuda: FakeLibrary) -> None:
    cuda.refuse = {2: 2}
    with pinned.allocate(4 * PAGE, largest=PAGE) as memory:
        assert not memory.pinned
        assert cuda.log.count("register") == cuda.log.count("unregister") == 2
        assert not cuda.registered
        assert cuda.sticky == 0


def test_a_device_that_was_reset_has_forgotten_the_memory(cuda: FakeLibrary) -> None:
    memory = pinned.allocate(PAGE)
    cuda.registered.clear()
    memory.close()
    assert cuda.sticky == 0


def test_pieces(cuda: FakeLibrary) -> None:
    with pinned.allocate(10 * PAGE + 5, largest=4 * PAGE) as memory:
        assert memory.seams == (4 * PAGE, 8 * PAGE)
        assert [piece.numel() for piece in memory.pieces] == [4 * PAGE, 4 * PAGE, 2 * PAGE + 5]
        assert memory.pieces[1].data_ptr() == memory.address + 4 * PAGE
        assert sorted(cuda.registered) == [memory.address + seam for seam in (0, *memory.seams)]
        assert memory.parts(PAGE, PAGE) == [(PAGE, PAGE)]
        assert memory.parts(3 * PAGE, 5 * PAGE) == [(3 * PAGE, PAGE), (4 * PAGE, 4 * PAGE)]
        assert memory.parts(0, 9 * PAGE)[-1] == (8 * PAGE, PAGE)
        # The address of each piece is asked for by itself.
        assert memory.device_address(9 * PAGE + 1) == memory.address + 9 * PAGE + 1 + (1 << 40)
    with pinned.allocate(12 * PAGE, largest=4 * PAGE, unit=3 * PAGE) as memory:
        assert memory.seams == (3 * PAGE, 6 * PAGE, 9 * PAGE)
    with pytest.raises(HostMemoryError, match="whole pages"):
        pinned.allocate(PAGE, largest=100)


def test_what_is_registered_is_exact_and_its_neighbours_are_left_alone(cuda: FakeLibrary) -> None:
    mapping = private(8 * PAGE)
    address = _pages.address_of(mapping) + 100
    with pinned.register_address(address, 2 * PAGE, held=mapping) as memory:
        assert cuda.registered == {address: (2 * PAGE, 3)}
        assert memory.seams == ()
        with pytest.raises(HostMemoryError, match="a page can be registered once"):
            pinned.register_address(address + 2 * PAGE + 8, PAGE, held=mapping)
        pinned.register_address(address + 3 * PAGE, PAGE, held=mapping).close()
    with pinned.register_address(address, 3 * PAGE, held=mapping, largest=PAGE) as memory:
        assert memory.seams == tuple(at * PAGE - 100 for at in (1, 2, 3))
        lengths = [cuda.registered[address + at][0] for at in (0, *memory.seams)]
        assert lengths == [PAGE - 100, PAGE, PAGE, 100]
        assert memory.device_address(PAGE) == address + PAGE + (1 << 40)
    assert not cuda.registered


def test_device_addresses_of_memory_that_has_none(cuda: FakeLibrary) -> None:
    with pinned.allocate(PAGE, mapped=False) as memory, pytest.raises(Unsupported, match="mapped"):
        memory.device_address()
    cuda.refuse = {1: 2}
    with pinned.allocate(PAGE) as memory, pytest.raises(Unsupported, match="not registered"):
        memory.device_address()


def test_the_library_that_torch_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 00:00 1      {}\n"
    paths = ["/a/libcudart.so.12", "/b c/libcudart.so.13.0.96", "/d/libcudart_static.so",
             "/e/libcudart-1a2b.so.11.0"]  # fmt: skip
    maps.write_text("".join(line.format(path) for path in paths) + "7f00-7f01 rw-p 0 00:00 0\n")
    for version, found in (("13", paths[1]), ("12", paths[0]), ("11", paths[3]), ("", paths[0])):
        assert _registrations.loaded_library("libcudart", version, str(maps)) == found
    assert _registrations.loaded_library("libamdhip64", "6", str(maps)) is None
    assert _registrations.loaded_library("libcudart", "13", str(tmp_path / "none")) is None
