# SPDX-License-Identifier: Apache-2.0
"""Binding memory to NUMA nodes by the kernel's own call: no libnuma is needed."""

from __future__ import annotations

import ctypes
import errno
import operator
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from portakv.errors import Unsupported

# Numbers of the system call, from the kernel's tables of each architecture.
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "loongarch64": 235, "ppc64le": 259,
          "s390x": 268}  # fmt: skip
_MPOL_BIND = 2
_NODES = Path("/sys/devices/system/node")
_WHY = {
    errno.EPERM: "the kernel forbids it here; give the container CAP_SYS_NICE, or start the "
    "process under numactl --membind",
    errno.ENOSYS: "this kernel was built without NUMA; leave numa=None",
    errno.EINVAL: "the process may not use that node (cpuset); ask for one that it may",
}


def nodes() -> list[int]:
    """The nodes of this machine that have memory; empty where the kernel tells of none."""
    for name in ("has_memory", "online"):
        with suppress(OSError, ValueError):
            return _listed((_NODES / name).read_text())
    return []


def node_of(device: torch.device | str) -> int | None:
    """The node that a CUDA or ROCm device hangs on; None where the machine does not say."""
    found: Any = torch.cuda.get_device_properties(torch.device(device))
    if not hasattr(found, "pci_bus_id"):
        return None
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):
        node = int((Path("/sys/bus/pci/devices") / address / "numa_node").read_text())
        return node if node >= 0 else None
    return None


def bind(address: int, nbytes: int, wanted: int | Sequence[int]) -> None:
    """Have pages of the range that are not there yet come from these nodes and no other.

    Raises:
        Unsupported: no node, or one that is not there, an architecture or kernel that cannot bind,
            or a container that may not.
    """
    try:
        asked = _numbers(wanted)
    except TypeError:
        raise Unsupported(
            f"Binding {nbytes} bytes of host memory to NUMA node {wanted!r}",
            "nodes have whole numbers; name one or more, or leave numa=None",
        ) from None
    if not asked:
        raise Unsupported(
            f"Binding {nbytes} bytes of host memory to an empty list of NUMA nodes",
            "pages must come from some node; name one or more, or leave numa=None",
        )
    what = f"Binding {nbytes} bytes of host memory to NUMA node {', '.join(map(str, asked))}"
    number = _MBIND.get(platform.machine())
    if number is None:
        raise Unsupported(what, f"the system call is not known on {platform.machine()}")
    known = nodes()
    if not known:
        raise Unsupported(what, "this kernel tells of no NUMA nodes; leave numa=None")
    if not set(asked) <= set(known):
        raise Unsupported(what, f"this machine has the nodes {known}; ask for some of these")
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(asked) // bits + 1))()
    for node in asked:
        mask[node // bits] |= 1 << node % bits
    code = _mbind(number, address, nbytes, mask, len(mask) * bits + 1)
    if code:
        raise Unsupported(what, _WHY.get(code, f"the kernel refused it ({os.strerror(code)})"))


def _numbers(wanted: Any) -> list[int]:
    """One whole number, or several; raises `TypeError` for anything else."""
    with suppress(TypeError):
        return [operator.index(wanted)]
    return [operator.index(node) for node in wanted]


def _mbind(number: int, address: int, nbytes: int, mask: ctypes.Array[ctypes.c_ulong], most: int,
           ) -> int:  # fmt: skip
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    done = libc.syscall(
        ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(nbytes),
        ctypes.c_ulong(_MPOL_BIND), mask, ctypes.c_ulong(most), ctypes.c_ulong(0),
    )  # fmt: skip
    return 0 if done == 0 else ctypes.get_errno()


def _listed(text: str) -> list[int]:
    """``0-1,4`` as numbers."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
