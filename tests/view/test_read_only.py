# SPDX-License-Identifier: Apache-2.0
"""Destinations in memory that the host may not write are refused; a write would end the process."""

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

from portakv import AdaptiveConnector, KVView, LayoutError, copy_blocks, copy_rows, copy_runs
from portakv.core.view import writable
from portakv.host import memcpy
from portakv.view.view import check_writable

PAGE = mmap.PAGESIZE
READ_ONLY = "writable destination, got .*: its memory is mapped for reading only"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked about its memory"),
    pytest.mark.filterwarnings("ignore:The given (buffer|NumPy array) is not writable"),
]


def mapped(folder: Path, protection: int, pages: int = 2, private: bool = False) -> torch.Tensor:
    """Return the bytes of a new file, which count from 0 to 255 again and again."""
    file = folder / "rows"
    file.write_bytes(bytes(range(256)) * (pages * PAGE // 256))
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    with file.open("r+b") as handle:
        memory = mmap.mmap(handle.fileno(), pages * PAGE, flags=flags, prot=protection)
    return torch.frombuffer(memory, dtype=torch.uint8)


def test_the_kernel_says_what_may_be_written_and_no_byte_changes(tmp_path: Path) -> None:
    tensor = mapped(tmp_path, mmap.PROT_READ | mmap.PROT_WRITE)
    before = tensor.clone()
    first = tensor.data_ptr()
    assert all(writable(first + at, first + 2 * PAGE) for at in (0, 1, 2, 3, PAGE, 2 * PAGE - 1))
    assert torch.equal(tensor, before)
    private = mapped(tmp_path, mmap.PROT_READ | mmap.PROT_WRITE, private=True)
    assert writable(private.data_ptr(), private.data_ptr() + 1)
    read_only = mapped(tmp_path, mmap.PROT_READ).data_ptr()
    assert not any(writable(read_only + at, read_only + at + 1) for at in (0, 1, 2 * PAGE - 1))
    assert writable(read_only, read_only)  # no byte of it is written
    assert not writable(PAGE, PAGE + 1)  # no process has the first pages


def test_a_page_past_the_end_of_a_file_may_not_be_written(tmp_path: Path) -> None:
    tensor = mapped(tmp_path, mmap.PROT_READ | mmap.PROT_WRITE)
    view = KVView(tensor.view(-1, 64), "token dim")
    os.truncate(tmp_path / "rows", PAGE)
    first = tensor.data_ptr()
    assert writable(first, first + PAGE)
    assert not writable(first, first + 2 * PAGE)
    with pytest.raises(LayoutError, match=READ_ONLY):
        check_writable(view)


def test_every_kind_of_copy_refuses_it(tmp_path: Path) -> None:
    tensor = mapped(tmp_path, mmap.PROT_READ).view(-1, 4, 8)
    before = tensor.clone()
    blocks = KVView(tensor, "block token dim")
    src = KVView(torch.zeros_like(tensor), "block token dim")
    with pytest.raises(LayoutError, match=READ_ONLY):
        copy_blocks(src, blocks, [0], [1])
    with pytest.raises(LayoutError, match=READ_ONLY):
        copy_rows(src, blocks)
    for address in (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() - 8):
        with pytest.raises(LayoutError, match=READ_ONLY):
            copy_runs([src.origins[0]], [address], 8, src_device="cpu", dst_device="cpu")
    connector = AdaptiveConnector("cpu", kv_layout="block token dim", chunk_layout="token dim")
    connector.register_kv_caches(src.tensors)
    with pytest.raises(LayoutError, match=READ_ONLY):
        connector.from_gpu(tensor[0], slot_mapping=[0, 1, 2, 3])
    with pytest.raises(LayoutError, match=READ_ONLY):
        connector.batched_from_gpu([tensor[0], tensor[1]], None, [0, 1, 2, 3, 4], [0, 4], [4, 5])
    connector.register_kv_caches(tensor)
    with pytest.raises(LayoutError, match=READ_ONLY):
        connector.to_gpu(torch.zeros(4, 8, dtype=torch.uint8), slot_mapping=[0, 1, 2, 3])
    with pytest.raises(LayoutError, match="writable destination"):
        memcpy.copy_(tensor, src.tensors)
    assert torch.equal(tensor, before)
    copy_blocks(blocks, src, [0], [1]).synchronize()  # it may be read
    assert torch.equal(src.tensors[1], before[0])


def test_an_array_that_numpy_maps_for_reading_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(64, dtype=np.int16).reshape(8, 8))
    array = np.load(tmp_path / "rows.npy", mmap_mode="r")
    view = KVView(torch.from_numpy(array), "token dim")
    with pytest.raises(LayoutError, match=READ_ONLY):
        copy_rows(KVView(torch.zeros(8, 8, dtype=torch.int16), "token dim"), view)


def test_a_refusal_ends_with_its_mapping(tmp_path: Path) -> None:
    """The answer belongs to the memory, not to an address: it is asked again."""
    tensor = mapped(tmp_path, mmap.PROT_READ)
    view = KVView(tensor.view(-1, 8), "token dim")
    src = KVView(torch.ones(2 * PAGE // 8, 8, dtype=torch.uint8), "token dim")
    with pytest.raises(LayoutError, match=READ_ONLY):
        copy_rows(src, view)
    _map_again(tensor)
    copy_rows(src, view).synchronize()
    assert bool((tensor == 1).all())


def _map_again(tensor: torch.Tensor) -> None:
    """Map writable memory in place of a tensor's."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fixed = 0x10
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = ctypes.c_void_p(tensor.data_ptr())
    size = ctypes.c_size_t(tensor.numel())
    assert libc.mmap(address, size, protection, flags, -1, ctypes.c_long(0)) == tensor.data_ptr()


_PROGRAM = """
import mmap, sys, torch
from portakv import KVView, copy_blocks
file = open(sys.argv[1], "rb")
memory = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
dst = KVView(torch.frombuffer(memory, dtype=torch.uint8).view(4, 16, 64), "block token dim")
src = KVView(torch.ones(4, 16, 64, dtype=torch.uint8), "block token dim")
try:
    copy_blocks(src, dst, [0], [1])
except Exception as error:
    print(type(error).__name__)
"""


def test_a_process_survives_it(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(4096))
    command: list[Any] = [sys.executable, "-W", "ignore", "-c", _PROGRAM, tmp_path / "rows"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "LayoutError\n"), done.stderr
