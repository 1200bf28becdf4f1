# SPDX-License-Identifier: Apache-2.0
"""Plain copies without a device: what is copied, what is refused, and rows at a pitch."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.fake_libcuda import FakeLibrary
from support.guarded_memory import filled, refused, same

from portakv import DeviceMismatch, LayoutError, PortaKVError, TransferError
from portakv.host import memcpy
from portakv.host.memcpy import Pitched, copy_, copy_d2d, copy_d2h, copy_h2d
from portakv.runtime import cuda
from portakv.runtime.devices import inside

BYTES = torch.uint8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, BYTES])
def test_a_host_copy(dtype: torch.dtype) -> None:
    src = filled((3, 5, 4), dtype)
    dst = filled((3, 5, 4), dtype)
    dst.requires_grad_(dtype.is_floating_point)  # a leaf that learns
    copied = copy_(dst, src)
    assert same(dst, src)
    assert (copied.direction, copied.method, copied.waited) == ("h2h", "torch", True)
    assert (copied.nbytes, copied.why) == (60 * dtype.itemsize, "both tensors are on the host")
    assert copied.done()
    copied.wait()
    copied.synchronize()


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((6, 8), (0, 1)), ((6, 8), (1, 0)), ((6, 8), (0, 0)), ((6, 8), (1, 1)), ((6, 8), (3, 1)),
        ((2, 3, 8), (0, 8, 1)), ((2, 3, 8), (8, 0, 1)), ((6, 512), (0, 1)), ((6, 512), (1, 1)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["to it", "from it", "inside"])
def test_a_source_whose_elements_share_addresses(
    device: torch.device,
    method: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    non_blocking: bool,
) -> None:
    host = torch.device("cpu")
    ends = {"to it": (device, host), "from it": (host, device), "inside": (device, device)}[method]
    for pinned in {False, device.type != "cpu"}:
        memory = filled((1024,), torch.int32).clone()
        memory = memory.pin_memory() if pinned else memory
        src = memory.to(ends[1]).as_strided(shape, strides, 3)
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=torch.int32, device=ends[0])
        for dst in (torch.zeros(shape, dtype=torch.int32, device=ends[0]), wide[..., shape[-1] :]):
            copy_(dst, src, non_blocking).synchronize()
            assert torch.equal(dst.cpu(), memory.as_strided(shape, strides, 3))
        assert not wide[..., : shape[-1]].any()


def test_nothing_to_copy() -> None:
    copied = copy_(torch.zeros(3, 0), torch.zeros(3, 0), non_blocking=True)
    assert (copied.method, copied.nbytes, copied.waited, copied.done()) == (
        "nothing",
        0,
        True,
        True,
    )
    with refused(LayoutError, "[0, 3]", "[3, 0]"):
        copy_(torch.zeros(3, 0), torch.zeros(0, 3))
    memory = filled((64,), torch.int32)
    with refused(LayoutError, "at one address", "[1, 1]", watch=memory):
        copy_(memory.as_strided((3, 4), (1, 1)), filled((3, 4), torch.int32))


def test_tensors_that_differ(device: torch.device) -> None:
    dst = filled((4, 4), torch.int32, device=device)
    plain = torch.zeros(4, 4, dtype=torch.int32)
    wrong: list[tuple[type[PortaKVError], Any, tuple[str, ...]]] = [
        (LayoutError, torch.zeros(4, 4), ("torch.float32", "torch.int32", "neither converts")),
        (LayoutError, torch.zeros(4, 8, dtype=torch.int16), ("int16", "int32")),
        (LayoutError, plain.numpy(), ("ndarray", "source")),
        (LayoutError, plain.to_sparse(), ("sparse", "source")),
        (LayoutError, torch.nested.nested_tensor([plain]), ("nested", "source")),
        (DeviceMismatch, plain.to("meta"), ("meta", str(dst.device))),
    ]
    for shape in ((4,), (4, 1), (1, 4, 4), (2, 8), ()):
        other = torch.zeros(shape, dtype=torch.int32)
        wrong.append((LayoutError, other, (str(list(shape)), "[4, 4]")))
    for error, src, names in wrong:
        with refused(error, *names, watch=dst):
            copy_(dst, src)
    with refused(LayoutError, "torch.vmap", watch=dst):
        torch.vmap(lambda one: copy_(dst, one))(plain[None])


def test_a_direction_that_was_not_asked() -> None:
    src = torch.zeros(2)
    dst = torch.ones(2)
    for call, wanted in ((copy_h2d, "h2d"), (copy_d2h, "d2h"), (copy_d2d, "d2d or peer")):
        with refused(DeviceMismatch, wanted, "cpu", "copy_", watch=dst):
            call(dst, src)


def test_two_kinds_of_device() -> None:
    def on(device: str) -> Any:
        return SimpleNamespace(device=torch.device(device))

    with refused(DeviceMismatch, "xla:0", "cuda:1"):
        memcpy.direction_of(on("cuda:1"), on("xla:0"))
    pairs = {
        ("cpu", "cuda:0"): "h2d",
        ("cuda:1", "cpu"): "d2h",
        ("cuda:0", "cuda:0"): "d2d",
        ("cuda:0", "cuda:1"): "peer",
        ("cpu", "cpu"): "h2h",
    }
    assert {(src, dst): memcpy.direction_of(on(dst), on(src)) for src, dst in pairs} == pairs


@pytest.mark.parametrize(
    ("cut", "other"),
    [
        (np.s_[:, :8], np.s_[:, 8:]), (np.s_[:, 3:5], np.s_[:, 5:7]), (np.s_[::2], np.s_[1::2]),
        (np.s_[:, ::2], np.s_[:, 1::2]), (np.s_[::2, ::2], np.s_[1::2, ::2]),
        (np.s_[::2, 4:12], np.s_[1::2, 4:12]), (np.s_[:4, :8], np.s_[4:, :8]),
        (np.s_[:, 0], np.s_[:, 1]), (np.s_[0], np.s_[1]), (np.s_[0, 0], np.s_[0, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_parts_of_one_tensor(device: torch.device, cut: Any, other: Any) -> None:
    """Return slices of one cache: columns, rows, every second one. A copy through
    `.contiguous()` would report success and write nothing."""
    memory = filled((8, 16), torch.int16, device=device)
    for dst, src in ((cut, other), (other, cut)):
        wanted = memory[src].clone()
        copy_(memory[dst], memory[src])
        assert torch.equal(memory[dst], wanted)
        copy_(
            memory.t()[dst[::-1]] if isinstance(dst, tuple) else memory.t()[:, dst], memory[src].t()
        )
    flat = memory.view(torch.uint8).view(-1)
    with refused(LayoutError, "share bytes", watch=memory):
        copy_(flat[7:15], flat[:8])
    again = memory if device.type != "cpu" else torch.from_numpy(memory.numpy())
    for dst in (memory, again):  # through another storage over the same memory, too
        with refused(LayoutError, "share bytes", "through a buffer", watch=memory):
            copy_(dst[:, 1::2], memory[:, 1:9])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=3),
    st.integers(0, 40),
)
@example([(3, 2), (2, 3)], [], 0)  # woven: strides do not show that no two are at one address
def test_no_overlap(one: list[tuple[int, int]], other: list[tuple[int, int]], shift: int) -> None:
    """Against every address, written out; of what shares no byte the nested strides pass alone."""
    memory = torch.zeros(128, dtype=torch.int16)
    dst = _strided(memory, one, 0)
    src = _strided(memory, other, shift)
    places = torch.arange(128)
    written = _strided(places, one, 0).reshape(-1).tolist()
    read = _strided(places, other, shift).reshape(-1).tolist()
    bad = len(set(written)) < len(written) or bool(set(written) & set(read))
    try:
        memcpy.check_disjoint(dst, src)
    except LayoutError:
        apart = max(written) < min(read) or max(read) < min(written)
        assert bad or not (_nested(one) and apart)
    else:
        assert not bad


def _nested(dims: list[tuple[int, int]]) -> bool:
    """Each stride steps over all that lies inside it."""
    reach = 1
    for stride, extent in sorted((stride, extent) for extent, stride in dims if extent > 1):
        if stride < reach:
            return False
        reach += stride * (extent - 1)
    return True


def _strided(memory: torch.Tensor, dims: list[tuple[int, int]], offset: int) -> torch.Tensor:
    return memory.as_strided([n for n, _ in dims], [stride for _, stride in dims], offset)


@pytest.mark.parametrize(
    ("dst", "src", "rows"),
    [
        (lambda m: m[:4, :8], lambda m: m[4:, 8:], Pitched(32, 4, 128, 128)),
        (lambda m: m[:4, :8], lambda m: m.view(-1)[:32].view(4, 8), Pitched(32, 4, 32, 128)),
        (lambda m: m.view(-1)[:32].view(4, 8), lambda m: m[:4, :8], Pitched(32, 4, 128, 32)),
        (lambda m: m.t()[:8, :4], lambda m: m.t()[8:16, 4:], Pitched(32, 4, 128, 128)),
        (lambda m: m, lambda m: m, Pitched(1024, 1, 1024, 1024)),
        (lambda m: m.t(), lambda m: m.t(), Pitched(1024, 1, 1024, 1024)),
        (lambda m: m.view(2, 4, 32)[:, :2, :16], lambda m: m[:4, :16].reshape(2, 2, 16).clone(),
         "2 loops"),
        (lambda m: m[:, ::2], lambda m: m[:, 1::2], Pitched(4, 128, 8, 8)),
        (lambda m: m[:4, :8], lambda m: m[0, :8].expand(4, 8), "lie 0 and 128"),
        (lambda m: m[:8, :8], lambda m: m[:8, :8].t(), "2 loops"),
        (lambda m: torch.empty_strided((2, 256), (2**31, 1), dtype=BYTES, device="meta"),
         lambda m: torch.empty(2, 256, dtype=BYTES, device="meta"), str(memcpy.MAX_PITCH)),
    ],
)  # fmt: skip
def test_rows_at_a_pitch(dst: Any, src: Any, rows: Pitched | str) -> None:
    memory = filled((8, 32), torch.int32)
    other = filled((8, 32), torch.int32)
    result = memcpy.pitched(dst(memory), src(other))
    assert rows in result if isinstance(rows, str) else rows == result


@given(st.data())
def test_rows_are_the_copy(data: Any) -> None:
    """Whatever the strides: if rows are found, moving them is what copy_ does."""
    extents = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    tensors = []
    for _ in range(2):
        padded = [n + data.draw(st.integers(0, 2)) for n in extents]
        order = data.draw(st.permutations(range(len(extents))))
        memory = filled([padded[at] for at in order], torch.int16)
        back = [order.index(at) for at in range(len(order))]
        whole = memory.permute(back)
        tensors.append(whole[tuple(slice(0, n) for n in extents)])
    dst, src = tensors
    rows = memcpy.pitched(dst, src)
    if isinstance(rows, str):
        assert "loops around a run" in rows
        return
    assert rows.width * rows.height == src.nbytes
    for row in range(rows.height):
        at = dst.data_ptr() + row * rows.dst_pitch
        ctypes.memmove(at, src.data_ptr() + row * rows.src_pitch, rows.width)
    assert torch.equal(dst, src)


@pytest.mark.parametrize("to_device", [True, False])
def test_the_structure_says_what_is_meant(
    to_device: bool, libcuda: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    libcuda.forget()
    monkeypatch.setattr(cuda, "library", lambda: libcuda.library)
    monkeypatch.setattr(cuda, "adopt", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: inside(None))
    monkeypatch.setattr(cuda, "raw", lambda stream, index: 7 if stream is None else 0)
    memory = filled((6, 64), torch.int32)
    other = filled((6, 80), torch.int32)
    dst = memory[1:5, :20]
    src = other[:4, 60:]
    rows = memcpy.pitched(dst, src)
    assert isinstance(rows, Pitched)
    before = memory.clone()
    wanted = src.clone()
    places = dst.data_ptr(), src.data_ptr(), to_device, rows, torch.device("cuda", 0)
    default: Any = object()  # stream 0 is a stream, not the lack of one
    for stream in (None, default):
        cuda.copy_pitched(*places, stream)
    assert torch.equal(dst, wanted)
    assert torch.equal(memory[:, 20:], before[:, 20:])
    assert [(call.kind, call.copies, call.stream) for call in libcuda.calls] == [
        ("r", 4, 7),
        ("r", 4, 0),
    ]
    libcuda.forget(refuse_at=0)
    with refused(TransferError, "4 rows of 80 bytes", "CUDA_ERROR_INVALID_VALUE", watch=dst):
        cuda.copy_pitched(*places, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so() -> None:
    assert not any(map(memcpy.is_available, (None, "cpu", "xpu", "nonsense")))
    why = cuda.why_not(torch.device("cuda", 0))
    assert why == "torch finds no usable CUDA device here"
