# SPDX-License-Identifier: Apache-2.0
"""What tests of small copies send, and whether it arrived."""

from __future__ import annotations

import os
import threading

import numpy as np
import torch

from portakv import Unsupported
from portakv.host import _small_ways, small
from portakv.host._small_ways import Way, why_not_inline
from portakv.runtime import cuda as _cuda_driver
from support.device_cases import DEVICE

INTEGERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32,
    torch.int64, torch.uint64,
)  # fmt: skip


def lacking(way: str) -> str | None:
    """What keeps the first CUDA device from having a way."""
    if way == "inline":
        return why_not_inline(DEVICE)
    return None if way == "copy" else _cuda_driver.why_not(DEVICE)


def forget() -> None:
    """Forget what small copies know of devices and keep ready for them."""
    for one in (
        small._targets, small._senders, _small_ways._inline, _small_ways._kernels,
    ):  # fmt: skip
        one.clear()
    _small_ways._copy_function.cache_clear()


def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements with any bits, on the host."""
    if dtype == torch.bool:
        return torch.arange(count) % 3 == 0
    if not count:
        return torch.empty(0, dtype=dtype)  # numpy's empty array has stride 0, of which no view is
    wide = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, np.uint8)
    return torch.from_numpy(wide).view(dtype)


def same_bits(landed: torch.Tensor, values: torch.Tensor) -> bool:
    """True where a tensor holds the dtype and the bits of values on the host."""
    return landed.dtype == values.dtype and torch.equal(
        landed.cpu().view(torch.uint8), values.view(torch.uint8)
    )


def mixed_up(way: Way, count: int) -> list[int]:
    """Which of four threads found others' values in a target of its own, which it fills by the
    same sender many times; the targets lie on the host."""
    wrong: list[int] = []
    together = threading.Barrier(4)

    def work(nth: int) -> None:
        out = torch.zeros(count, dtype=torch.int64)
        together.wait()
        for time in range(100):
            values = np.arange(count) * (nth + 1) + time
            way.send(values, out, None, False)
            if not np.array_equal(out.numpy(), values):
                wrong.append(nth)

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def sent_by_a_fork(way: Way, out: torch.Tensor) -> int:
    """What a forked process ends with that sends: 0 where it is refused for being one."""
    child = os.fork()
    if not child:
        try:
            way.send([2], out, None, False)
        except Unsupported as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
