# SPDX-License-Identifier: Apache-2.0
"""Copy many tensors of a device by one launch for each size of tile.

The addresses of the tiles are a table, which the first pull makes and the next ones launch again.
So a pull of weights that were pulled before describes no tensor again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from portakv.copy import CopyOptions, copy_rows
from portakv.errors import BackendUnavailable, Unsupported
from portakv.migrate.weight_pairs import LARGE
from portakv.view.view import KVView

#: Bytes of the tiles. A tensor is cut into as many of the first as it has, its rest into the next.
TILES = (64 << 10, 4 << 10, 512)
_ALIGNED = 16  # bytes, so that kernels move whole vectors
_LAYOUT = "block | token dim"
# A pull is waited for, so its kernels take as much of the device as they can use.
_OPTIONS = CopyOptions(overlap="idle")
_Int64 = npt.NDArray[np.int64]


class Tiles:
    """The tiles of contiguous tensors, as copies from addresses to addresses of one device.

    It retains no memory. The caller keeps the tensors, and makes it again when one has moved. What
    is read counts as a peer's memory, also if another process of the same device shares it.

    Args:
        runs: of each tensor the address to write, the address to read, and the bytes.
        device: where all of them are.
    """

    def __init__(self, runs: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self._copies = list[tuple[KVView, KVView]]()
        for size, into, src in cut(np.array(runs, np.int64).reshape(-1, 3)):
            read = _tiles(src, size, device)
            if device.type != "cpu":
                read = read.as_peer(device)
            self._copies.append((_tiles(into, size, device), read))

    def check(self) -> None:
        """Raise `BackendUnavailable` or `Unsupported` if no backend copies between addresses of
        this device; copy nothing."""
        for into, src in self._copies:
            copy_rows(src, into, count=0, options=_OPTIONS)

    def issue(self) -> None:
        """Copy all tiles on the current stream of their device."""
        for into, src in self._copies:
            copy_rows(src, into, options=_OPTIONS)


def tiled_on(device: torch.device) -> bool:
    """Return whether tiles copy weights on a device; on the host neighbours are one copy."""
    return device.type != "cpu"


def fits_tiles(into: torch.Tensor, src: torch.Tensor) -> bool:
    """Return whether tiles can copy a tensor to another one of the same type and shape."""
    return (
        into.device == src.device
        and 0 < into.nbytes < LARGE
        and into.is_contiguous()
        and src.is_contiguous()
        and not into.nbytes % TILES[-1]
        and not (into.data_ptr() | src.data_ptr()) % _ALIGNED
    )


def tiles_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Tiles | None:
    """Return the tiles of tensors that `fits_tiles` accepts, all on one device, as pairs of what is
    written and what is read; None if no backend copies between addresses of this device."""
    runs = [(into.data_ptr(), src.data_ptr(), into.nbytes) for into, src in pairs]
    made = Tiles(runs, pairs[0][0].device)
    try:
        made.check()
    except (BackendUnavailable, Unsupported):
        return None
    return made


def cut(runs: _Int64) -> list[tuple[int, _Int64, _Int64]]:
    """Return for each size of tile that occurs where its tiles are written and read."""
    tiles = list[tuple[int, _Int64, _Int64]]()
    begun = np.zeros(len(runs), np.int64)  # bytes of each run in larger tiles
    for size in TILES:
        count = (runs[:, 2] - begun) // size
        total = int(count.sum())
        if total:
            within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
            into, src = (np.repeat(runs[:, side] + begun, count) + within * size for side in (0, 1))
            tiles.append((size, into, src))
            begun += count * size
    return tiles


def _tiles(addresses: _Int64, size: int, device: torch.device) -> KVView:
    """Return a view of tiles at addresses of a device."""
    table = torch.from_numpy(addresses)
    return KVView.at(table, _LAYOUT, shape=(1, size), dtype=torch.uint8, device=device)
