# SPDX-License-Identifier: Apache-2.0
"""Copies across the link by torch: tensors of bytes over the memory that the views lie in."""

from __future__ import annotations

from bisect import bisect_right

import torch

from portakv.engines.pieces import ALL, Pieces
from portakv.errors import TransferError
from portakv.runtime import _flight
from portakv.view.view import KVView


class TorchCrossing:
    """Puts pieces on the link of any device through its torch."""

    fold_below = ALL  # each copy is a call

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """See `Crossing.copy`."""
        late = "pageable" not in (src.form.place, dst.form.place)
        mine, theirs = _Storages(src), _Storages(dst)
        to_device = dst.form.place == "device"
        with _flight.inside(stream), torch.no_grad():
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
