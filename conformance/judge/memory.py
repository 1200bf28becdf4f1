# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the storages of tensors, read and written by absolute address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portakv_conformance.judge.rows import leaves


@dataclass
class Region:
    """The bytes of one storage (uint8, one dimension) and the address where they lie."""

    base: int
    content: np.ndarray

    @property
    def end(self) -> int:
        """Return the address after the last byte."""
        return self.base + self.content.size


@dataclass
class Memory:
    """The storages under some tensors: regions that do not overlap, by rising address."""

    regions: list[Region]

    @classmethod
    def snapshot(cls, *tensors: object) -> Memory:
        """Copy every distinct storage below tensors or nested containers of them."""
        storages: dict[tuple[int, int], torch.Tensor] = {}
        for tensor in leaves(tensors):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[(storage.data_ptr(), storage.nbytes())] = tensor
        regions: list[Region] = []
        for (base, _), tensor in sorted(storages.items(), key=lambda item: item[0]):
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            content = np.array(whole.set_(tensor.untyped_storage()).cpu().numpy(), copy=True)
            # Two storages can be windows on one piece of memory; it must be kept only once.
            if regions and base < regions[-1].end:
                past = content[max(regions[-1].end - base, 0) :]
                regions[-1].content = np.concatenate([regions[-1].content, past])
            else:
                regions.append(Region(base, content))
        return cls(regions)

    def copy(self) -> Memory:
        """Return the same regions with separate bytes."""
        return Memory([Region(r.base, r.content.copy()) for r in self.regions])

    def restore(self, wholes: Iterable[torch.Tensor]) -> None:
        """Put the bytes back into tensors of uint8, each the whole of one of the storages."""
        by_base = {region.base: region.content for region in self.regions}
        for whole in wholes:
            whole.copy_(torch.from_numpy(by_base[whole.data_ptr()]))

    def read(self, addresses: np.ndarray) -> np.ndarray:
        """Return the bytes at absolute addresses (int64, any shape)."""
        values = np.empty(addresses.shape, dtype=np.uint8)
        for region, chosen in self._split(addresses):
            values[chosen] = region.content[addresses[chosen] - region.base]
        return values

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Put bytes (uint8, the shape of ``addresses``) at absolute addresses."""
        for region, chosen in self._split(addresses):
            region.content[addresses[chosen] - region.base] = values[chosen]

    def changes(self, now: Memory) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of each region that differs from ``now``, and these addresses."""
        for number, (was, region) in enumerate(zip(self.regions, now.regions, strict=True)):
            offsets = np.nonzero(was.content != region.content)[0]
            if offsets.size:
                yield number, was.base + offsets

    def find(self, address: int) -> tuple[int, int] | None:
        """Return the number of the region that holds an address and the offset in it, or None."""
        for number, region in enumerate(self.regions):
            if region.base <= address < region.end:
                return number, address - region.base
        return None

    def _split(self, addresses: np.ndarray) -> list[tuple[Region, Any]]:
        if not addresses.size:
            return []
        low = int(addresses.min())
        high = int(addresses.max())
        for region in self.regions:
            if region.base <= low and high < region.end:
                return [(region, ...)]
        bases = np.array([region.base for region in self.regions], dtype=np.int64)
        number = np.searchsorted(bases, addresses, side="right") - 1
        pieces = [(self.regions[n], number == n) for n in np.unique(number) if n >= 0]
        inside = sum(int((addresses[c] < r.end).sum()) for r, c in pieces)
        if inside != addresses.size:
            outside = addresses.size - inside
            raise IndexError(
                f"Expected rows inside the storages of their tensors, got {outside} bytes outside. "
                f"Correct the tensors' strides or the extents."
            )
        return pieces
