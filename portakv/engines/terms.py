# SPDX-License-Identifier: Apache-2.0
"""Terms: what a caller asks of a transfer between a device and the host beside its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from portakv.errors import Unsupported

#: What else the device does meanwhile: it computes, and must not be slowed; or nothing.
OVERLAPS = ("compute", "idle")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a transfer may take.

    Attributes:
        overlap: ``compute``, the device runs a model meanwhile, so that nothing but copy engines
            and short kernels may be used; or ``idle``, the fastest way whatever it takes.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory;
            None: the engine's own limit.
        max_gbps: the most 10^9 bytes in a second; None: the link's own.
        detached: no stream that the caller knows waits for the end, so that the next transfer need
            not wait for this one's.

    Raises:
        Unsupported: terms that nobody can keep.
    """

    overlap: str = "compute"
    max_thread_blocks: int | None = None
    max_gbps: float | None = None
    detached: bool = False

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise Unsupported(
                f"A transfer with overlap={self.overlap!r}",
                f"expected one of {', '.join(OVERLAPS)}; pass one of these, or leave it out for "
                f"{OVERLAPS[0]}",
            )
        if not isinstance(self.detached, bool):
            raise Unsupported(
                f"A transfer with detached={self.detached!r}",
                "expected True or False; pass one, or leave it out for False",
            )
        blocks, rate = self.max_thread_blocks, self.max_gbps
        if blocks is not None and (not isinstance(blocks, int) or blocks < 1):
            raise Unsupported(
                f"A transfer with max_thread_blocks={blocks!r}",
                "expected a whole number from 1 on; pass one, or None for the engine's own limit",
            )
        if rate is not None and not (isinstance(rate, Real) and rate > 0):
            raise Unsupported(
                f"A transfer with max_gbps={rate!r}",
                "expected 10^9 bytes in a second, above 0; pass so many, or None for the link's "
                "own rate",
            )
