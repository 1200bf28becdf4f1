# SPDX-License-Identifier: Apache-2.0
"""Sums of words times the keys of their positions: the keys, and what kernels of such sums share.

A key is an odd number, and sums are modulo 2^64. A word has at most half of the bits of the
modulus, so its highest bits change the sum too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.resources import files
from typing import TypeVar

import torch

from portakv.errors import TransferError, Unsupported
from portakv.runtime import cuda, hip
from portakv.runtime.cuda import KernelDriver

Kernel = TypeVar("Kernel")

MODULUS = 1 << 64
#: The integers that words are read as, by bytes.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Distance between the numbers of the positions of two axes.
AXIS = 1 << 48
# The step, the shifts and the factors of splitmix64, as signed numbers.
STEP = 0x9E3779B97F4A7C15 - MODULUS
MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))


def signed(number: int) -> int:
    """Return a number modulo 2^64 as a signed integer of 64 bits."""
    number %= MODULUS
    return number - MODULUS if number >= MODULUS // 2 else number


def key_of(position: int) -> int:
    """Return the odd number of a position, as a signed integer of 64 bits."""
    x = signed(position * STEP)
    for shift, factor in MIXES:
        x = signed((x ^ x >> shift) * factor)
    return x | 1


def keys_of(first: int, n: int, device: torch.device) -> torch.Tensor:
    """Return the odd numbers of ``n`` positions of an axis, int64 ``[n]``."""
    x = torch.arange(first, first + n, dtype=torch.int64, device=device)
    x *= STEP
    for shift, factor in MIXES:
        x ^= x >> shift
        x *= factor
    return x.bitwise_or_(1)


def words_text() -> str:
    """Return the part of a kernel's text that loads words and computes keys of positions. The text
    defines ``PORTAKV_SUM_THREADS`` before it."""
    return files("portakv.runtime").joinpath("words.cuh").read_text()


def driver_of(device: torch.device) -> KernelDriver:
    """Return the driver that loads and launches the kernel on a device.

    Raises:
        Unsupported: the device has no such driver; the text has the reason.
    """
    if device.type == "cuda" and torch.version.hip is not None:
        try:
            return hip.Card(device, hip.driver())
        except (hip.DriverMissing, RuntimeError) as error:
            raise _refused(device, str(error)) from error
    why = cuda.why_not(device) or cuda.device_too_old(device)
    if why is not None:
        raise _refused(device, why)
    return cuda.CudaDriver(device)


def _refused(device: torch.device, why: str) -> Unsupported:
    return Unsupported(f"A kernel of sums on {device}", why)


def checked_kernel(
    what: str,
    device: torch.device,
    log: logging.Logger,
    make: Callable[[], Kernel],
    agrees: Callable[[Kernel, torch.device], bool],
) -> Kernel | None:
    """Return the kernel that ``make`` loads for sums on a device; None, with a log, if it cannot be
    used.

    Args:
        what: the sums, in the log.
        agrees: returns whether a kernel has the sums that torch's operators have.
    """
    try:
        kernel = make()
        right = agrees(kernel, device)
    except Unsupported as error:
        log.debug("%s on %s use torch's operators. %s", what, device, error)
        return None
    except (RuntimeError, OSError, TransferError) as error:
        log.warning("%s on %s use torch's operators: no kernel. %s", what, device, error)
        return None
    if not right:
        log.warning(
            "%s on %s use torch's operators: the kernel's sums are wrong. Report it as a fault, "
            "with the names of the device and its driver.",
            what,
            device,
        )
    return kernel if right else None
