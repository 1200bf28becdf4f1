# SPDX-License-Identifier: Apache-2.0
"""`MappedRows`: the rows of a keeper's store, mapped by a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from portakv.graph import Mask
from portakv.host import pinned
from portakv.migrate.ipc import open_shared
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.serving.keeper_parts import cells_of, whole_form
from portakv.serving.keeper_store import rows_here
from portakv.storage import BlockForm
from portakv.storage.form import Slices
from portakv.storage.rows import Crossing
from portakv.storage.spare import copy_fitting
from portakv.view import KVView


class Sides(NamedTuple):
    """How a rank copies between rows and its view.

    Attributes:
        inner: the rank's part of the rows; None: the rows have nothing of it.
        outer: arguments of `KVView.slice` for the rank's view.
        cells: what is copied of each block.
    """

    inner: KVView | None
    outer: Slices
    cells: int


class RankForm:
    """The part of a rank of the blocks of one group of layers.

    Attributes:
        form: of the part.
        whole: of whole blocks.
        cells: of the part; see `cells_of`.
    """

    def __init__(self, form: BlockForm) -> None:
        self.form = form
        self.whole = whole_form(form)
        self.cells = cells_of(form)


class MappedRows:
    """The rows of a keeper's store in this process.

    Args:
        handle: as the keeper has shared them.
        device: that copies from and to them; None or the CPU: none, so they are not registered.

    Raises `PeerError` and `Unsupported` as `open_shared` does.

    Attributes:
        pinned: copies of a device run at the link, and the host does not wait for them.
    """

    def __init__(self, handle: bytes, device: torch.device | None) -> None:
        here = rows_here.get(handle)
        self.pinned = False
        self._memory: pinned.PinnedMemory | None = None
        self._tensor = open_shared(handle) if here is None else here
        self._sides: Bounded[tuple[int, str], Sides] = Bounded("sides of mapped rows", 256)
        if device is None or device.type == "cpu":
            return
        self.pinned = self._tensor.is_pinned()
        if not self.pinned and pinned.why_not_register() is None:
            with inside(device):
                self._memory = pinned.register(self._tensor, unit=self._tensor.shape[1])
            self._tensor = self._memory.view(torch.uint8, self._tensor.shape)
            self.pinned = self._memory.pinned

    def sides(self, group: RankForm, form: str) -> Sides:
        """Return how a rank copies rows of a form, by its JSON; empty: of whole blocks."""
        return self._sides.get_or_make((id(group), form), lambda: self._made(group, form))

    def copy(
        self,
        group: RankForm,
        form: str,
        crossing: Crossing,
        view: KVView,
        rows: Sequence[int],
        at: Sequence[int],
        saves: bool,
    ) -> tuple[int, Mask]:
        """Copy blocks between rows of a form and a rank's view.

        Args:
            form: its JSON; empty: of whole blocks.
            rows, at: the number of each row, and the place of its block among those of the
                crossing.
            saves: the copy goes into the rows.

        Returns:
            What is copied of each block, as `cells_of` has it; and the blocks that do not fit into
            packed slots, bool ``[rows]``.
        """
        sides = self.sides(group, form)
        unfit: Mask = np.zeros(len(rows), np.bool_)
        if sides.inner is None:
            return sides.cells, unfit
        outer = view.slice(**sides.outer) if form else view
        if saves:
            unfit, _ = copy_fitting(crossing, sides.inner, outer, np.array(rows), np.array(at))
        else:
            crossing.copy(sides.inner, outer, rows, at)
        return sides.cells, unfit

    def _made(self, group: RankForm, form: str) -> Sides:
        other = BlockForm.from_json(form) if form else group.whole
        common = group.form.part_of(other)
        if common is None:
            return Sides(None, {}, 0)
        of_rows, of_view = common
        with torch.inference_mode(False):  # copies write them in any mode
            inner = other.view(self._tensor).slice(**of_rows)
        cells = cells_of(other) & group.cells
        return Sides(inner, of_view, cells)

    def close(self) -> None:
        """Release the registration; views that are in use retain the memory."""
        if self._memory is not None:
            self._memory.close()
