# SPDX-License-Identifier: Apache-2.0
"""Pinning gigabytes: time and bytes taken, PortaKV's allocation against torch's.

The machine's memory is touched once and freed first: a virtual machine may get its pages from its
host only then, which would be counted as the first allocator's. What is taken is what the process
has more of resident by the kernel's account; of torch's, which the driver may keep elsewhere, what
its own statistics say.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from portakv.host import pinned
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.shared.harness import Row, Rows, Step, short
from portakv_benchmarks.shared.shapes import in_words

OURS, TORCH = "pinned.allocate", "torch, pin_memory=True"
_STATUS = Path("/proc/self/status")

#: Memory; what holds it; the bytes that its allocator says it took, None: ask the kernel.
Taken = tuple[torch.Tensor, object, int | None]


def pinning_steps(bench: Bench) -> Iterator[Step]:
    """One step."""
    nbytes = bench.preset.pinned
    yield f"pinning {in_words(nbytes)}", partial(_measure, bench, nbytes)


def _measure(bench: Bench, nbytes: int) -> Rows:
    bench.forget()
    gc.collect()
    _empty_torch()
    # Have the machine give as much as the greedier of the two takes, a power of two, and free it.
    torch.empty((1 << (nbytes - 1).bit_length()) // 8, dtype=torch.int64).fill_(1)
    rows = [_row(OURS, nbytes, _ours), _row(TORCH, nbytes, _torch)]
    _empty_torch()
    for row in rows:
        row["to_torch"] = short(row["seconds"] / rows[1]["seconds"])
    return rows


def _row(name: str, nbytes: int, take: Callable[[int], Taken]) -> Row:
    before = resident()
    began = perf_counter()
    tensor, held, said = take(nbytes)
    seconds = perf_counter() - began
    found = resident() - before
    taken = found if said is None else said
    # Another byte than 0 at both ends and in between.
    some = tensor[:: max(1, nbytes // 1000)].fill_(0x5A)
    right = tensor.numel() == nbytes and bool((some == 0x5A).all())
    pinned_all = bool(tensor[:1].is_pinned() and tensor[-1:].is_pinned())
    del some
    began = perf_counter()
    del tensor, held
    gc.collect()
    freed = perf_counter() - began
    return {
        "kind": "host_pinning", "shape": in_words(nbytes), "backend": name, "payload_bytes": nbytes,
        "seconds": short(seconds), "free_seconds": short(freed),
        "gib_per_s": short(nbytes / seconds / (1 << 30)),
        "taken_bytes": taken, "excess_mb": short(abs(taken - nbytes) / 1e6),
        "resident_bytes": found, "pinned": pinned_all, "verified": right,
    }  # fmt: skip


def _ours(nbytes: int) -> Taken:
    memory = pinned.allocate(nbytes)
    return memory.tensor, memory, None


def _torch(nbytes: int) -> Taken:
    before = _torch_has()
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return memory, None, None if before is None else (_torch_has() or 0) - before


def _torch_has() -> int | None:
    """The pinned bytes that torch says it has; None if it does not say."""
    if not (hasattr(torch.cuda, "host_memory_stats") and torch.cuda.is_available()):
        return None
    stats = torch.cuda.host_memory_stats()
    return int(stats.get("allocated_bytes.current", stats.get("allocated_bytes.allocated", 0)))


def _empty_torch() -> None:
    """Have torch give back the pinned memory that it keeps for later."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


def resident() -> int:
    """Bytes that the process has in memory, by the kernel's account."""
    found = re.search(r"^VmRSS:\s*(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
