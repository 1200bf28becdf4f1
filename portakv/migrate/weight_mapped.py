# SPDX-License-Identifier: Apache-2.0
"""Weights in memory of owners that this process has mapped: what a pull reads there, and where it
writes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.autograd.graph import increment_version

from portakv.migrate.ipc import Opener
from portakv.migrate.parameters import part_of
from portakv.migrate.weight_owner import Owner
from portakv.migrate.weight_plan import Batch, Piece, Plan, TiledPieces
from portakv.migrate.weight_tiles import Tiles, fits_tiles, tiled_on, tiles_of

#: What a copy writes, and what it reads.
Pair = tuple[torch.Tensor, torch.Tensor]


class Mapped:
    """The mapped memory of the owners of one pull.

    Args:
        owners: of the weights, some of which may be mapped.
        tensors: the reader's, by name.
        devices: of the tensors.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        tensors: Mapping[str, torch.Tensor],
        devices: Collection[torch.device],
    ) -> None:
        self._owners = owners
        self._tensors = tensors
        self._tiled = any(map(tiled_on, devices))
        self._openers = dict[torch.device, Opener]()
        self._sources = dict[int, torch.Tensor]()  # by the numbers of cells

    def open(self, plan: Plan, number: int) -> None:
        """Open the memory of one owner of a plan, unless it is open.

        Raises `PeerError` if it does not fit, and `Unsupported` if it cannot be mapped.
        """
        publication = self._owners[number].publication
        opened = publication.sources(plan, number, self._tensors, self._openers)
        self._sources.update(zip(plan.numbers[number], opened, strict=True))

    def pair(self, piece: Piece) -> Pair:
        """Return what a piece writes, and what it reads."""
        cell = piece.cell
        tensor = self._tensors[cell.name]
        if piece.of_tensor:
            into = tensor.detach() if tensor.requires_grad else tensor
        else:
            into = part_of(tensor, cell.box.start, cell.box.extents)
        if piece.of_cell:
            return into, self._sources[piece.number]
        return into, self._owners[cell.owner].publication.source(cell, tensor, self._openers)

    def copy_tiles(self, batch: Batch) -> Sequence[Piece]:
        """Copy the pieces of a batch that tiles copy, and return the others."""
        if not self._tiled:
            return batch.pieces
        sources = self._sources
        read_at = [sources[piece.number].data_ptr() for piece in batch.pieces if piece.copied]
        tiled = batch.tiled
        if tiled is None or tiled.read_at != read_at:
            tiled = batch.tiled = self._in_tiles(batch, read_at)
        for tiles in tiled.tiles:
            tiles.issue()
        # As torch's own copies do: who publishes these tensors notices it.
        increment_version([self._tensors[name] for name in tiled.names])
        return tiled.rest

    def _in_tiles(self, batch: Batch, read_at: list[int]) -> TiledPieces:
        """Return the pieces of a batch in tiles, as far as tiles can copy them."""
        tiles = list[Tiles]()
        names = list[str]()
        rest = list[Piece]()
        fitting = defaultdict[torch.device, list[tuple[Piece, Pair]]](list)
        for piece in batch.pieces:
            device = self._tensors[piece.cell.name].device
            if piece.copied and tiled_on(device) and fits_tiles(*(pair := self.pair(piece))):
                fitting[device].append((piece, pair))
            else:
                rest.append(piece)
        for some in fitting.values():
            pieces, pairs = zip(*some, strict=True)
            made = tiles_of(pairs)
            if made is None:
                rest += pieces
            else:
                tiles.append(made)
                names += [piece.cell.name for piece in pieces]
        return TiledPieces(read_at, tiles, names, rest)
