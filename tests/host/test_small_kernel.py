# SPDX-License-Identifier: Apache-2.0
"""The small copies' kernels on a CPU: every count, dtype, alignment and size round the limits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import filled, refused, untouched
from support.small_cases import INTEGERS, mixed_up
from support.small_on_cpu import CPU, MOST, Launcher, installed, library, why_not

from portakv import LayoutError, Unsupported
from portakv.host import _small_ways
from portakv.host._packed_ints import PackedInts
from portakv.host._small_ways import ByValue, kernels
from portakv.host.small import SmallCopy, to_device
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import nvrtc as _nvrtc

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

LIMITS = (256, 512, 1024, 2048, 4080, 4096, 8192, 16384, MOST)


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> Iterator[None]:
    with installed():
        yield


def drawn(count: int, dtype: torch.dtype) -> list[int]:
    """Integers over the whole range of a dtype."""
    least, most = (0, 1) if dtype == torch.bool else (_range(dtype))
    generator = np.random.default_rng(count)
    ends = [least, most][:count]
    return ends + [
        least + int(part * (most - least)) for part in generator.random(count - len(ends))
    ]


def _range(dtype: torch.dtype) -> tuple[int, int]:
    found = torch.iinfo(dtype)
    return found.min, found.max


def holds(tensor: torch.Tensor, values: list[int]) -> bool:
    return [int(one) for one in tensor.reshape(-1).tolist()] == values


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_count(dtype: torch.dtype) -> None:
    for count in range(301):
        values = drawn(count, dtype)
        assert holds(to_device(values, CPU, dtype), values), count


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_counts_round_the_parameter_limits(dtype: torch.dtype) -> None:
    for capacity in LIMITS:
        for count in range(capacity // dtype.itemsize - 2, capacity // dtype.itemsize + 3):
            if count * dtype.itemsize > MOST:
                continue
            out = filled((count,), dtype, poison=True)
            values = drawn(count, dtype)
            Launcher.launches = 0
            to_device(values, out=out)
            assert holds(out, values), count
            assert Launcher.launches == 1


@pytest.mark.parametrize("offset", range(1, 17))
def test_a_target_of_any_alignment(offset: int) -> None:
    """Only the elements asked for are written, by the widest vector that is allowed there."""
    for count in (0, 1, 15, 16, 17, 64, 333, 5000):
        memory = filled((5040,), torch.uint8)
        before = memory.clone()
        values = bytes(np.random.default_rng(count).integers(0, 256, count, np.uint8))
        to_device(values, out=memory[offset : offset + count])
        assert bytes(memory[offset : offset + count].tolist()) == values
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + count :], before[offset + count :])


def test_the_width_is_what_an_address_allows() -> None:
    assert [_small_ways.widest_vector(at) for at in (16, 32, 48, 8, 24, 4, 2, 6, 1, 7)] == [
        16, 16, 16, 8, 8, 4, 2, 2, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("nbytes", [1, 31, 4096, 70_001, 300_000])
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_through_mapped_memory(nbytes: int, offset: int) -> None:
    """300,000 bytes are more than one grid holds: threads go round."""
    assert 300_000 > _small_ways.MOST_BLOCKS * _small_ways.THREADS * 16
    source = torch.arange(nbytes, dtype=torch.int64).mul(2654435761).to(torch.uint8)
    target = filled((nbytes + 32,), torch.uint8)
    before = target.clone()
    out = target[16 + offset : 16 + offset + nbytes]
    packed = PackedInts(source.numpy(), nbytes, torch.uint8)
    slot = _small_ways.Slot(source, packed, source.data_ptr())
    kernels(CPU).issue(out, slot, nbytes, None)
    assert torch.equal(out, source)
    assert torch.equal(target[: 16 + offset], before[: 16 + offset])
    assert torch.equal(target[16 + offset + nbytes :], before[16 + offset + nbytes :])


def test_the_arguments_are_as_long_as_the_kernel_takes_them() -> None:
    taken = getattr(library(), f"bytes_{_small_ways.VALUES_NAME}")()
    assert taken == _small_ways.VALUES_HEAD.size + MOST
    assert getattr(library(), f"bytes_{_small_ways.MAPPED_NAME}")() == _small_ways.MAPPED.size


@pytest.mark.parametrize(
    ("driver", "capability", "limit"),
    [(12000, 90, 4096), (13000, 60, 4096), (12010, 70, 32764), (13000, 90, 32764)],
)
def test_the_kernel_takes_what_the_parameters_hold(
    driver: int, capability: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda_driver, "driver_version", lambda: driver)
    monkeypatch.setattr(_cuda_driver, "capability", lambda device: capability)
    most = _small_ways.value_bytes(CPU)
    assert most in (4080, MOST)
    assert limit - 16 < _small_ways.VALUES_HEAD.size + most <= limit
    assert f"#define PORTAKV_SMALL_VECTORS {most // 16}\n" in _small_ways.source(most)


def test_sends_again_and_again() -> None:
    sender = SmallCopy(300, torch.int32, CPU)
    assert (sender.way, sender.out.shape) == ("value", (300,))
    for count in (300, 16, 0, 1, 299, 64, 72):
        before, values = sender.out.clone(), drawn(count, torch.int32)
        landed = sender.send(values)
        assert landed.untyped_storage().data_ptr() == sender.out.data_ptr()
        assert landed.shape == (count,)
        assert holds(landed, values)
        assert torch.equal(sender.out[count:], before[count:])
    with refused(LayoutError, "301", "300", watch=sender.out):
        sender.send(range(301))
    with refused(LayoutError, "position 1", str(2**31), watch=sender.out):
        sender.send([7, 2**31])
    with refused(Unsupported, "way='mapped'"):
        sender.refill([1])


@pytest.mark.parametrize("most", [6, 9], ids=["all", "fewer"])
@pytest.mark.parametrize(
    "values",
    [
        np.arange(6), np.arange(12)[::2], np.arange(6)[::-1], np.arange(6).reshape(2, 3).T,
        np.arange(6, dtype=">i8"), np.arange(6, dtype=np.int8), np.arange(6, dtype=np.longlong),
        np.arange(6) > 2, torch.arange(6), torch.arange(6).view(3, 2).t(), torch.arange(12)[::2],
        torch.arange(6).to(torch.uint16), memoryview(b"abcdef"), b"abcdef", range(6), (1,) * 6,
    ],
    ids=lambda values: type(values).__name__,
)  # fmt: skip
def test_sends_of_every_kind(values: Any, most: int) -> None:
    sender = SmallCopy(most, torch.int64, CPU)
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    wanted = [int(one) for one in np.array(plain).reshape(-1)]
    assert to_device(values, CPU, torch.int64).reshape(-1).tolist() == wanted
    sender.out.fill_(-1)
    assert sender.send(values).tolist() == wanted
    assert sender.out.tolist() == wanted + [-1] * (most - 6)


@pytest.mark.parametrize(
    "values",
    [np.arange(10), torch.arange(10), np.array([2.0]), torch.tensor([2.0]), np.array([-1]),
     torch.tensor([256]), np.array([[1, -1]])],
    ids=str,
)  # fmt: skip
def test_what_an_array_may_not_hold(values: Any) -> None:
    sender = SmallCopy(9, torch.uint8, CPU)
    sender.send(np.arange(9, dtype=np.uint8))
    Launcher.launches = 0
    with untouched(sender.out), pytest.raises(LayoutError):
        sender.send(values)
    assert Launcher.launches == 0


def test_a_target_with_a_shape() -> None:
    out = filled((3, 4), torch.int16)
    assert SmallCopy(12, torch.int16, out=out).send(range(12)) is out
    assert out.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_threads_do_not_share_arguments() -> None:
    assert not mixed_up(ByValue(CPU, torch.int64, 100), 100)


def test_nothing_is_launched_for_nothing_or_for_a_wrong_value() -> None:
    out = filled((4,), torch.uint8)
    Launcher.launches = 0
    assert to_device([], CPU, torch.int32).shape == (0,)
    with untouched(out), pytest.raises(LayoutError):
        to_device([1, 2, 3, 256], out=out)
    assert Launcher.launches == 0


@pytest.mark.skipif(_nvrtc.missing() is not None, reason=_nvrtc.missing() or "")
def test_nvrtc_reads_parameters_where_they_lie() -> None:
    """Without a GPU: it compiles, and no thread makes a copy of 32 KB for itself."""
    code = _nvrtc._compile(_small_ways.source(MOST), "compute_80").decode()
    assert ".local" not in code
    assert f"{_small_ways.VALUES_NAME}_param_0[{MOST + 16}]" in code
    assert code.count("st.global.v4.u32") == 2
    assert ctypes.sizeof(ctypes.c_void_p) == 8
