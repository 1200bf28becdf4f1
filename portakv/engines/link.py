# SPDX-License-Identifier: Apache-2.0
"""Crossings: what puts pieces of memory on the link between a device and the host."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import Protocol

import torch

from portakv.engines import link_cuda as _crossing_cuda
from portakv.engines.pieces import ALL, Pieces
from portakv.errors import TransferError
from portakv.runtime.devices import inside
from portakv.view.view import KVView


class Link(Protocol):
    """Puts pieces on the link of one device; any thread may call it.

    Attributes:
        fold_below: bytes; narrower rows are worth folding into 2-D copies, wider ones only where
            they are many: they cross faster as copies of their own.
    """

    fold_below: int

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy the pieces, ordered on ``stream`` (None: the device's current one).

        The host does not wait, except where memory is pageable or a device's torch knows no other
        way. Who calls holds the memory of both views until the copy has ended.

        Raises:
            TransferError: the driver refuses; some of the pieces may have been moved.
        """


def by_torch(device: torch.device) -> bool:
    """True where runs cross the link of a device by calls of its torch, each at a call's cost."""
    return _crossing_cuda.why_not(device) is not None


@cache
def link_of(device: torch.device) -> Link:
    """What crosses the link of a device: CUDA's driver by itself, else the device's torch."""
    return TorchLink(device) if by_torch(device) else _crossing_cuda.CudaLink(device)


class TorchLink:
    """Puts pieces on the link of any device through its torch."""

    fold_below = ALL  # each copy is a call

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """See `Link.copy`."""
        late = "pageable" not in (src.form.place, dst.form.place)
        mine, theirs = _Storages(src), _Storages(dst)
        to_device = dst.form.place == "device"
        with inside(stream), torch.no_grad():
            for at, start, width, height, dst_pitch, src_pitch in zip(
                *(column.tolist() for column in pieces), strict=True
            ):
                host_pitch = src_pitch if to_device else dst_pitch
                if height == 1 or host_pitch == width:
                    source = mine.rows(start, width, height, src_pitch)
                    theirs.rows(at, width, height, dst_pitch).copy_(source, non_blocking=late)
                    continue
                # Strided host memory torch would pack on the host, which would have to wait.
                for row in range(height):
                    source = mine.rows(start + row * src_pitch, width, 1, width)
                    target = theirs.rows(at + row * dst_pitch, width, 1, width)
                    target.copy_(source, non_blocking=late)


class _Storages:
    """The memory of a view as bytes, found by address."""

    def __init__(self, view: KVView) -> None:
        storages = {owner.untyped_storage().data_ptr(): owner for owner in view.owners}
        self._starts = sorted(storages)
        self._bytes = [_bytes_of(storages[start]) for start in self._starts]

    def rows(self, address: int, width: int, height: int, pitch: int) -> torch.Tensor:
        """Rows at an address, uint8 ``[height, width]``.

        Raises:
            TransferError: they do not lie in one allocation of the view.
        """
        number = bisect_right(self._starts, address) - 1
        reach = (height - 1) * pitch + width
        if number >= 0:
            start, memory = self._starts[number], self._bytes[number]
            if address + reach <= start + memory.numel():
                return memory.as_strided((height, width), (pitch, 1), address - start)
        raise TransferError(
            f"{reach} bytes at {address:#x} were asked to be copied, which lie in no single "
            f"allocation of the view; expected memory of the view. Check that it still exists."
        )


def _bytes_of(owner: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=owner.device).set_(owner.untyped_storage())
