# SPDX-License-Identifier: Apache-2.0
"""Describe and export the memory of an owner, for readers that map it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch

from portakv.errors import LayoutError, Unsupported
from portakv.migrate import ipc, messages
from portakv.migrate.described import Regions, describe
from portakv.migrate.name_table import Entry as Entry
from portakv.migrate.name_table import NameTable
from portakv.migrate.shards import Shard
from portakv.migrate.words import Place as Place
from portakv.migrate.words import Words as Words

#: What readers on this host may map: whole allocations, or nothing
Expose: TypeAlias = Literal["mapped", "staging"]
#: The exports of this process's devices: torch opens device memory of other processes only.
_exports: WeakValueDictionary[tuple[bytes, torch.device], Exports] = WeakValueDictionary()
EVENTS = 64  # recorded after offers' rows, in turn: so many offers have separate events


class DescribedShards(NamedTuple):
    """Shards as data, and the allocations that they lie in."""

    shards: tuple[messages.Described, ...]
    storages: list[torch.UntypedStorage]


def describe_all(shards: Sequence[Shard]) -> DescribedShards:
    """Return shards as data; raise `LayoutError` if they lie in too many allocations."""
    regions = Regions()
    described = tuple(describe(shard, regions) for shard in shards)
    if len(regions.storages) >= messages.MOST_REGIONS:
        raise LayoutError(
            f"Expected shards in at most {messages.MOST_REGIONS - 1} allocations, got "
            f"{len(regions.storages)}. Make the tensors slices of fewer allocations."
        )
    return DescribedShards(described, regions.storages)


class Exports:
    """The memory of one epoch of an owner.

    Attributes:
        regions: the allocations and the proof, as readers get them.
        allocations: those that readers may map.
        words: the handle of the page of validity words; empty if nothing may be mapped, or if other
            processes may write the rows after this one has died, when its words hold for ever.
        names: the handle of the table of names; empty if there are no words.
        events: recorded after offers' rows; none if the device cannot export them.
    """

    def __init__(
        self,
        described: DescribedShards,
        epoch: bytes,
        device: torch.device,
        expose: str,
        words: Words,
        names: NameTable,
    ) -> None:
        self.allocations = list[ipc.Held]()
        # The proof is exported like a region, after all others.
        self._proof = ipc.proof(epoch, device)
        regions = list[messages.Region]()
        if expose == "mapped":
            names.allocate()
        files = ipc.SharedFiles()
        for storage in [*described.storages, self._proof.untyped_storage()]:
            described_as = storage.nbytes(), ipc.where(storage.device)
            try:
                if expose != "mapped":
                    raise Unsupported("Mapping", "the owner exposes staged rows alone")
                self.allocations.append(ipc.export(storage, files))
                regions.append(messages.Region(*described_as, self.allocations[-1].handle))
            except Unsupported as error:
                # A reader that cannot map a region reads staged rows of it.
                regions.append(messages.Region(*described_as, why=error.why))
        self.regions = tuple(regions)
        self.words = b""
        self.names = b""
        self.events = list[torch.Event]()
        if self.allocations:
            self.events = _events(device)
            hosts = [x.data_ptr() for x in described.storages if x.device.type == "cpu"]
            if not any(files.has_name(address) for address in hosts):
                self.allocations.append(words.export(files))
                self.words = self.allocations[-1].handle
                self.allocations.append(names.export(files))
                self.names = self.allocations[-1].handle
        self.event_handles = tuple(ipc.export_event(event) for event in self.events)
        if self.allocations and device.type != "cpu":
            _exports[epoch, device] = self

    def flat(self) -> list[torch.Tensor]:
        """Return the regions as this process has them; empty after `close`."""
        held = [each.tensor for each in self.allocations[: len(self.regions)]]
        return [tensor for tensor in held if tensor is not None]

    def close(self) -> None:
        """Release the allocations: no process opens them from now on."""
        for export in self.allocations:
            export.close()


def exports_here(epoch: bytes, device: torch.device) -> Exports | None:
    """Return the exports of an epoch if they are this process's, and lie on this device."""
    return _exports.get((epoch, device))


def _events(device: torch.device) -> list[torch.Event]:
    """Return events for readers' streams to wait for; none if the device cannot export them."""
    if device.type == "cpu":
        return []
    try:
        module = torch.get_device_module(device)
        with module.device(device):
            made = [module.Event(interprocess=True) for _ in range(EVENTS)]
            for event in made:  # the first export binds an event to this device
                ipc.export_event(event)
    except (Unsupported, RuntimeError, TypeError):
        return []
    return made
