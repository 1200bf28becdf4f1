# SPDX-License-Identifier: Apache-2.0
"""Test which values and targets small copies accept."""

from __future__ import annotations

import array
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import bits, filled, refused
from support.small_cases import Place, same_bits

from portakv import BackendUnavailable, DeviceMismatch, LayoutError, PortaKVError
from portakv.host.small import to_device

META = torch.device("meta")
zeros = partial(torch.zeros, dtype=torch.int64)
ONE = zeros(1)
ARRAY = np.zeros(3)
NESTED = torch.nested.nested_tensor([ONE])


@pytest.mark.parametrize(
    ("values", "dtype", "wanted"),
    [
        ([3, -1, 2**40], None, torch.tensor([3, -1, 2**40])),
        ((1, 2), torch.int8, torch.tensor([1, 2], dtype=torch.int8)),
        (range(5), torch.int32, torch.arange(5, dtype=torch.int32)),
        ([], None, torch.empty(0, dtype=torch.int64)),
        (b"\x00\xff7", None, torch.tensor([0, 255, 55], dtype=torch.uint8)),
        (bytearray(b"ab"), torch.int64, torch.tensor([97, 98])),
        (memoryview(b"abcd")[::2], None, torch.tensor([97, 99], dtype=torch.uint8)),
        (array.array("h", [5, -6]), torch.int16, torch.tensor([5, -6], dtype=torch.int16)),
        ([True, False], torch.bool, torch.tensor([True, False])),
        ([True, False], None, torch.tensor([1, 0])),
        (np.array([[1, 2], [3, 4]], np.int16), None, torch.tensor([[1, 2], [3, 4]]).short()),
        (np.array([1, 2, 3, 4], np.int64)[::2], torch.int32, torch.tensor([1, 3]).int()),
        (np.array([1, 2**31], ">u4"), None, torch.tensor([1, 2**31], dtype=torch.uint32)),
        (np.array([2**64 - 1], np.uint64), None, torch.tensor([2**64 - 1], dtype=torch.uint64)),
        (np.array(7), torch.int32, torch.tensor(7, dtype=torch.int32)),
        ([np.int64(4), torch.tensor(5)], None, torch.tensor([4, 5])),
        (torch.arange(6).view(2, 3).t(), torch.uint8, torch.arange(6).view(2, 3).t().byte()),
        (torch.arange(3).expand(2, 3), torch.int32, torch.arange(3).expand(2, 3).int()),
        (np.broadcast_to(np.array(7), (4,)), None, torch.tensor([7, 7, 7, 7])),
        ([2**63, 1], torch.uint64, torch.tensor([2**63, 1], dtype=torch.uint64)),
        ({3: "a", 4: "b"}, torch.int8, torch.tensor([3, 4], dtype=torch.int8)),
        ([np.True_, False], torch.bool, torch.tensor([True, False])),
        (torch.tensor([True]), torch.int16, torch.tensor([1], dtype=torch.int16)),
        (np.array([1, 0, 2]) > 0, torch.int64, torch.tensor([1, 0, 1])),
        (np.array([3, -1], ">i8"), torch.int64, torch.tensor([3, -1])),
        (np.array([3, -1], np.int8), torch.int64, torch.tensor([3, -1])),
        (np.array([3, -1], np.longlong), torch.int64, torch.tensor([3, -1])),
        (np.arange(6)[::-1], torch.int64, torch.arange(6).flip(0)),
        (np.arange(6).reshape(2, 3).T, torch.int64, torch.arange(6).view(2, 3).t()),
        (np.arange(6), torch.int64, torch.arange(6)),
        (torch.arange(6), torch.int64, torch.arange(6)),
        (torch.arange(6).view(3, 2).t(), torch.int64, torch.arange(6).view(3, 2).t()),
        (torch.arange(12)[::2], torch.int64, torch.arange(0, 12, 2)),
        (torch.arange(6).to(torch.uint16), torch.int64, torch.arange(6)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values(place: Place, values: Any, dtype: torch.dtype | None, wanted: torch.Tensor) -> None:
    """Send values to a new tensor, and to a target in the middle of other memory."""
    made = to_device(values, place.device, dtype)
    assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape)
    assert made.tolist() == wanted.tolist()
    memory = filled((wanted.numel() + 3,), wanted.dtype, poison=True, device=place.device)
    rest = bits(memory)[wanted.nbytes :].clone()
    out = memory[: wanted.numel()].view(wanted.shape)
    assert to_device(values, out=out) is out
    assert same_bits(out, wanted.contiguous())
    assert torch.equal(bits(memory)[wanted.nbytes :], rest)


@pytest.mark.parametrize(
    ("values", "dtype", "names"),
    [
        ([1, 256], torch.uint8, ("256", "position 1", "0 to 255")),
        ([1, -1], torch.uint64, ("-1", "position 1")),
        ([2**63], None, (str(2**63), "int64")),
        ([1.5], torch.int32, ("float", "position 0")),
        (["a"], None, ("str",)),
        ([None], torch.bool, ("None", "position 0")),
        ([2], torch.bool, ("2", "0 to 1")),
        (np.array([300]), torch.int8, ("300", "-128 to 127")),
        (np.array([2**64 - 1], np.uint64), torch.int64, (str(2**64 - 1),)),
        (np.array([1.0]), torch.int32, ("float64", "view('uint8')")),
        (np.array([1.0]), None, ("float64",)),
        (torch.tensor([1.0]), None, ("float32", "view(torch.uint8)")),
        ("text", None, ("str",)),
        pytest.param(iter([1]), None, ("list_iterator", "list"), id="an iterator"),
        (7, None, ("int",)),
        ([[1], [2]], torch.int32, ("list", "position 0")),
        (np.array([[1, -1]]), torch.uint8, ("-1",)),
        (torch.tensor([256]), torch.uint8, ("256",)),
    ],
    ids=str,
)
def test_wrong_values(
    place: Place, values: Any, dtype: torch.dtype | None, names: tuple[str, ...]
) -> None:
    """They leave a target as it was."""
    out = filled((9,), dtype or torch.int64, device=place.device)
    with refused(LayoutError, *names):
        to_device(values, place.device, dtype)
    with refused(LayoutError, watch=out):
        to_device(values, out=out)
    assert to_device([], place.device, torch.int32).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: to_device([1, 2, 3], out=zeros(2)), LayoutError, "of 3 values .*got 2 of"),
        (lambda: to_device([1], dtype=torch.int32, out=zeros(1)), LayoutError, "int32, .*int64"),
        (lambda: to_device([1, 2], out=zeros(4)[::2]), LayoutError, "contiguous .*strides"),
        (lambda: to_device([1], "cpu", out=zeros(1).to(META)), DeviceMismatch, "cpu,.*meta"),
        (lambda: to_device([1]), DeviceMismatch, "a device or an out tensor"),
        (lambda: to_device(zeros(1).to(META), "cpu"), DeviceMismatch, "meta.*copy_"),
        *((partial(to_device, [1], "cpu", dtype), LayoutError, "Expected integers or bytes")  # type: ignore
          for dtype in (torch.bfloat16, "int32", [], 0, ARRAY, ONE.expand(2))),
        *((partial(to_device, [1], out=out), LayoutError, "tensor .*list|contiguous .*not strided")  # type: ignore
          for out in ([0], ONE.to_sparse(), NESTED)),
        *((partial(to_device, each, "cpu"), LayoutError, "torch.strided .*(sparse|nested)")
          for each in (ONE.to_sparse(), NESTED)),
        (lambda: to_device([[1], [2, 3]], "cpu"), LayoutError, "list at position 0"),  # type: ignore
        *((partial(to_device, [1], name), BackendUnavailable, f"{name}.* Name a device of")
          for name in ("xpu", "nonsense")),
        *((partial(to_device, [], device), BackendUnavailable, "not a device of torch|cannot")  # type: ignore
          for device in ([], {}, "", -1, 1 << 70, 1.5, True, ARRAY, ONE, object())),
    ],
)  # fmt: skip
def test_a_wrong_target(call: Any, error: type[PortaKVError], words: str) -> None:
    with refused(error) as caught:
        call()
    assert re.search(words, str(caught.value))
