# SPDX-License-Identifier: Apache-2.0
"""Carry out the copies of a pull of weights, with the checksums of what landed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from portakv.errors import Unsupported
from portakv.migrate.checksum import BoxSums, Part
from portakv.migrate.parameters import Cell, part_of
from portakv.migrate.weight_mapped import Mapped
from portakv.migrate.weight_owner import Owner
from portakv.migrate.weight_pairs import copy_pairs
from portakv.migrate.weight_plan import Batch, Plan
from portakv.migrate.weight_receiver import Terms
from portakv.migrate.weight_take import Incoming, Wanted
from portakv.runtime.devices import inside
from portakv.runtime.streams import completion, side_stream
from portakv.runtime.transfer import Completion

_WINDOW = 2  # batches of a device in flight


class Copies:
    """The copies of one pull, and the checksums of what landed.

    The bytes come from the memory of owners or, if it cannot be mapped, through staging buffers.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        tensors: Mapping[str, torch.Tensor],
        devices: Collection[torch.device],
        transport: str | None = None,
    ) -> None:
        self._owners = owners
        self._tensors = tensors
        self._devices = devices
        self._transport = transport
        self._mapped = Mapped(owners, tensors, devices)
        self._cells = list[Cell]()
        self._terms = dict[int, Terms]()  # by the number of an owner that is not mapped
        self._sums = BoxSums()
        # The ends of the batches in flight; streams that compute checksums after a batch's copy.
        self._in_flight = deque[list[Completion]]()
        self._streams = dict[torch.device, torch.Stream]()

    def open(self, plan: Plan) -> None:
        """Open all memory of a plan that is not open yet, or connect to the owners that send it.

        Raises `PeerError` if it does not fit, and `Unsupported` if it can neither be mapped nor
        sent.
        """
        self._cells = plan.cells
        for number, owner in enumerate(self._owners):
            cells = plan.numbers[number]
            try:
                self._mapped.open(plan, number)
            except Unsupported as error:
                self._terms[number] = Terms(self._device(cells), self._transport, str(error))
                owner.receiver(self._terms[number])

    def _device(self, cells: Sequence[int]) -> torch.device:
        """Return the device of all tensors of these cells, or the host."""
        devices = {self._tensors[self._cells[n].name].device for n in cells}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def explain(self) -> list[str]:
        """Return for each owner how its weights cross, and why."""
        lines = list[str]()
        for number, owner in enumerate(self._owners):
            how = "its memory is mapped"
            if number in self._terms:
                receiver = owner.receiver(self._terms[number])
                how = f"{receiver.transport.name} sends it through staging buffers: {receiver.why}"
            lines.append(f"{owner.address}: {how}.")
        return lines

    def incoming(self) -> Incoming:
        """Return the slices that owners send, a context in which `copy` may be called."""
        return Incoming(self._terms, self._owners)

    def copy(self, batch: Batch, incoming: Incoming) -> None:
        """Copy a batch. The copies and their checksums may be in flight afterwards."""
        pairs = list[tuple[torch.Tensor, torch.Tensor]]()
        wanted = defaultdict[int, list[Wanted]](list)
        # With owners that send, tiles of the mapped ones would be a plan for each mixture.
        rest = batch.pieces if self._terms else self._mapped.copy_tiles(batch)
        for piece in rest:
            owner = piece.cell.owner
            if not piece.copied:
                continue
            if owner in self._terms:
                wanted[owner].append(Wanted(piece.cell, self._tensors[piece.cell.name]))
            else:
                pairs.append(self._mapped.pair(piece))
        for number, some in wanted.items():
            incoming.request(number, some)
        copy_pairs(pairs)
        incoming.then(partial(self._compare, batch))

    def _compare(self, batch: Batch) -> None:
        """Compute checksums of a batch after its copies, and wait for an earlier batch."""
        devices = [device for device in self._devices if device.type != "cpu"]
        self._in_flight.append([completion(device, None) for device in devices])
        while len(self._in_flight) > _WINDOW:
            for end in self._in_flight.popleft():
                end.synchronize()
        for device in self._devices:
            with self._after_copies(device):
                if not self._sums.again(device, batch.tables):
                    self._sums.add(self._parts(batch, device), batch.tables)

    def _parts(self, batch: Batch, device: torch.device) -> list[Part]:
        """Return what landed on a device with a batch, tied names too."""
        parts = list[Part]()
        for piece in batch.pieces:
            tensor = self._tensors[piece.cell.name]
            if tensor.device == device:
                (offset, start, extents) = piece.cell.box
                into = part_of(tensor, start, extents)
                parts.append(Part(piece.number, into, offset, piece.unit))
        return parts

    def _after_copies(self, device: torch.device) -> AbstractContextManager[object]:
        """Make a stream current that follows the copies, while the next batch is copied."""
        if device.type == "cpu":
            return nullcontext()
        current = torch.accelerator.current_stream(device.index)
        stream = self._streams[device] = side_stream(current, "weights", "checksums")
        stream.wait_stream(current)
        return inside(stream)

    def wait_for_bytes(self) -> None:
        """Wait until no copy reads an owner's memory; checksums may still be computed."""
        for device in self._devices:
            if device.type != "cpu":
                torch.accelerator.current_stream(device.index).synchronize()

    def synchronize(self) -> None:
        """Wait until nothing of this pull runs on a device."""
        self.wait_for_bytes()
        for stream in self._streams.values():
            stream.synchronize()

    def sums(self, count: int) -> list[int]:
        """Return the checksums of what landed, by the numbers of cells, after `wait_for_bytes`."""
        for stream in self._streams.values():
            stream.synchronize()
        return self._sums.results(count)
