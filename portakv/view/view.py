# SPDX-License-Identifier: Apache-2.0
"""`KVView`: tensors read through a layout are a form and addresses; its slices, dense views, and
views that a copy writes.

Addresses come from ``data_ptr()`` and strides, never from contiguity, the number of tensors or
``shape[i] == 2``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.graph import increment_version

from portakv.arguments import as_whole, shown
from portakv.core.runs import pointer_to
from portakv.core.slice import HEADS_CUT, slice_words
from portakv.core.view import READ_ONLY, words_of_dtypes, writable
from portakv.errors import DeviceMismatch, LayoutError
from portakv.layout.encodings import Encoding, parameters_of, plane_of
from portakv.layout.language import Layout
from portakv.runtime.devices import capturing, refuse_capture, usable_device
from portakv.runtime.transfer import event_pool
from portakv.view.addresses import RawMemory, read_addresses
from portakv.view.bound import (
    BoundLayout,
    Facts,
    Rows,
    Spans,
    as_dtype,
    bind_layout,
    flatten_tensors,
    reach,
)
from portakv.view.bound import Tensors as Tensors
from portakv.view.form import PART_AXES, PLACES, Form, form_of, locate, same_form
from portakv.view.overlap import shared_axes, shared_by_addresses

T = TypeVar("T")

#: Addresses as `KVView.at` takes them: in lists as a layout names containers, or in a tensor.
Addresses: TypeAlias = "int | Sequence[Addresses] | npt.NDArray[Any] | torch.Tensor"

_HOST = torch.device("cpu")
_storage_of = torch.Tensor.untyped_storage
_TABLE = "table on"  # with a device: its table, and the event after the table's creation


class KVView:
    """Tensors read through a layout.

    Args:
        tensors: a tensor, or the containers that the layout names (list, tuple, dict).
        layout: a layout string, or the name of a preset.
        layers, kv, block_size, heads: declared extents. ``block_size`` is tokens of a block.
        dim: declared width in elements: one number, or one for each kv.
        reinterpret: the rows are bytes, whatever the dtype: they may be copied to and from rows of
            any number type. Rows of two different number types are otherwise refused.
        encoding: ``pack``, ``fp8``, a `Pack` or an `Fp8`: the uint8 tensors hold encoded blocks, a
            slot where the layout names ``page``; ``block_size`` and ``dim`` (values) are declared.

    Attributes:
        form: strides, widths, alignment and place.
        tensors: what was read, as it was passed.
        slots: tokens that can be addressed (blocks * block_size, or a chunk's tokens).
        device: where the tensors are; of a peer's rows, which device reads them.
        memory_device: where the memory is, whichever device reads it.

    Raises:
        LayoutError: a contradiction, naming the axis, the expected and the found extent.
        DeviceMismatch: tensors on different devices.
        InvalidTerms, Unsupported: an encoding that is unknown, or not for planes of this size.
    """

    # temporary: made for one call, and used on no stream but that call's.
    # blocks_overlap: blocks begin inside of others, and the caller names only those that are apart.
    # derived: what was made of this view and lives as long; docs/design.md lists it.
    __slots__ = (
        "_memory",
        "_origins",
        "_owners",
        "_raw",
        "_spans",
        "_storages",
        "_table",
        "blocks_overlap",
        "derived",
        "device",
        "form",
        "layout",
        "memory_device",
        "requires_grad",
        "slots",
        "temporary",
        "tensors",
    )

    def __init__(
        self,
        tensors: Tensors,
        layout: str,
        *,
        layers: int | None = None,
        kv: int | None = None,
        block_size: int | None = None,
        heads: int | None = None,
        dim: int | Sequence[int] | None = None,
        reinterpret: bool = False,
        encoding: Encoding | str | None = None,
        **unknown: NoReturn,
    ) -> None:
        bound = bind_layout(
            layout,
            layers=layers,
            kv=kv,
            block_size=block_size,
            heads=heads,
            dim=dim,
            reinterpret=reinterpret,
            encoding=encoding,
            **unknown,
        )
        self._set(bound.layout, tensors, bound.read(tensors), persistent=True)

    @classmethod
    def through(
        cls,
        bound: BoundLayout,
        tensors: Tensors,
        *,
        persistent: bool = False,
        facts: Facts | None = None,
    ) -> KVView:
        """Return a view through a bound layout; raise as the constructor does.

        Args:
            persistent: the view outlives the call that makes it.
            facts: what `BoundLayout.read` returns of the tensors, if that is known.
        """
        view = cls.__new__(cls)
        view._set(bound.layout, tensors, facts or bound.read(tensors), persistent)
        return view

    @classmethod
    def at(
        cls,
        addresses: Addresses,
        layout: str,
        *,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        pinned: bool | None = None,
        layers: int | None = None,
        kv: int | None = None,
        block_size: int | None = None,
        heads: int | None = None,
        dim: int | Sequence[int] | None = None,
        reinterpret: bool = False,
        encoding: Encoding | str | None = None,
        **unknown: NoReturn,
    ) -> KVView:
        """Return a view over raw memory: addresses of tensors of one shape.

        The view does not retain the memory. The caller promises that it stays until copies have
        ended, and that a table on a device is not written meanwhile. Only strategies that need
        addresses on the host read such a table back, once.

        Args:
            addresses: one integer, or integers in lists as the layout names containers; or an int64
                or uint64 tensor with a dimension for each container level, on the host or on a
                device. Addresses on a device must be multiples of 16.
            layout: a layout string or a preset.
            shape: of the tensor at each address. The extent of the dimension that holds ``block``
                (of a chunk, ``token``) may be -1: no id is past the end, no overlap is detected.
            strides: in elements; None: contiguous, if no extent outside of one of -1 is above 1.
            dtype: of the tensors' elements.
            device: where the memory is; ``cpu``: on the host. None: the driver of the accelerator
                (CUDA, HIP) reports it for the first address, and the other addresses are assumed
                to be of that kind. Without an accelerator the memory is on the host.
            pinned: host memory is pinned, and mapped to devices. None: with a ``device``, torch
                reports it for one address in each page. Memory of a table on a device is pinned.
            layers, kv, block_size, heads, dim, reinterpret, encoding: as for the constructor.

        Raises:
            LayoutError: wrong addresses or levels of them; an address that is 0, or not a multiple
                of the element's bytes; a contradiction; no ``device``, and no driver to ask.
            DeviceMismatch: a ``device`` that torch cannot use here; a table on another device.
            TransferError: the driver reports an error.
        """
        bound = bind_layout(
            layout,
            layers=layers,
            kv=kv,
            block_size=block_size,
            heads=heads,
            dim=dim,
            reinterpret=reinterpret,
            encoding=encoding,
            **unknown,
        )
        facts, memory, table = read_addresses(
            bound, addresses, shape, strides, dtype, device, pinned
        )
        view = cls.__new__(cls)
        view._set(bound.layout, (), facts, persistent=False, raw=memory, table=table)
        return view

    def _set(
        self,
        layout: Layout,
        tensors: Any,
        facts: Facts,
        persistent: bool,
        raw: RawMemory | None = None,
        table: torch.Tensor | None = None,
        storages: tuple[torch.UntypedStorage, ...] | None = None,
    ) -> None:
        self.layout = layout
        self.tensors = tensors
        rows, self.slots, self.device, self.requires_grad = facts
        self.memory_device = self.device
        self.form, self._origins, self._owners, self._spans = rows
        self._raw = raw
        self._table = table
        self.temporary = not (persistent or raw)
        self._memory: tuple[tuple[torch.UntypedStorage, int, int], ...] | None = None
        self.blocks_overlap = False
        self.derived: dict[Hashable, Any] = {}
        self._storages: tuple[torch.UntypedStorage, ...] | None = None
        if persistent:
            assert self._owners is not None
            # Storages keep the memory that was read, also if a caller gives a tensor another one.
            self._storages = storages or tuple(map(_storage_of, self._owners))
            self._memory = ()

    @property
    def origins(self) -> tuple[int, ...]:
        """Return the addresses as integers (one if all rows are strided).

        Reads a table that only a device has once, and waits for it; raises `Unsupported` inside
        graph capture.
        """
        if self._origins is None:
            assert self._table is not None
            if capturing(self._table.device):
                why = "the host would wait for addresses that only the device has"
                raise refuse_capture("Reading addresses back", f"{why}; hand them over on the host")
            self._origins = tuple(self._table.tolist())
        return self._origins

    @property
    def known(self) -> bool:
        """Return True if the host knows the addresses, so that `origins` waits for nothing."""
        return self._origins is not None

    @property
    def entries(self) -> int:
        """Return the number of addresses."""
        if self._origins is None:
            assert self._table is not None
            return self._table.numel()
        return len(self._origins)

    @property
    def tabled(self) -> bool:
        """Return True if a kernel may read the addresses from their table."""
        return self.entries > 1 or self.form.lists or self.form.table_on_device

    @property
    def owners(self) -> tuple[torch.Tensor, ...]:
        """Return for each address the tensor that owns its storage; for raw memory an empty
        tensor."""
        if self._owners is None:
            assert self._raw is not None
            self._owners = self._raw.tensors(self.origins, self.device)
        if self._storages is None:
            return self._owners
        pairs = zip(self._owners, self._storages, strict=True)
        return self._once("owners", lambda: tuple(_alias(*each) for each in pairs))

    @property
    def storages(self) -> tuple[torch.UntypedStorage, ...]:
        """Return the storage of the tensor at each address, which keeps the memory."""
        return self._storages or tuple(map(_storage_of, self.owners))

    def edges(self) -> npt.NDArray[np.int64]:
        """Return the ranges of allocations in any order; of raw memory, those of its tensors."""
        if self._raw is not None:
            begins = self.addresses
            return np.concatenate([begins, begins + self._raw.nbytes])
        return self._with_memory("edges", lambda: storage_edges(self.storages))

    def _with_memory(self, key: str, make: Callable[[], T]) -> T:
        """Return what was made for the storages of the last check; else make it."""
        memory = self._memory
        known: tuple[object, T] | None = self.derived.get(key)
        if memory and known is not None and known[0] is memory:
            return known[1]
        made = make()
        self.derived[key] = memory, made
        return made

    @property
    def spans(self) -> Spans:
        """Return sorted, disjoint ranges [first byte, past the last byte) that the tensors cover.

        There are none if only a device has the addresses.
        """
        if self._spans is None:
            assert self._raw is not None
            if self._origins is None:
                return []  # not cached: the addresses may be read back later
            self._spans = self._raw.spans(self._origins)
        return self._spans

    @property
    def entry_bytes(self) -> int:
        """Return for raw memory the bytes at each address; 0: unknown."""
        return self._raw.nbytes if self._raw is not None else 0

    @property
    def raw(self) -> bool:
        """Return True if the memory is known by addresses alone, so that nothing retains it."""
        return self._raw is not None

    @property
    def retained(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that retain memory while a copy uses it.

        They are the owners. For raw memory, it is the table that a caller has on a device.
        """
        if self._raw is None:
            return self.owners
        return (self._table,) if self._table is not None else ()

    def used_on(self, stream: torch.Stream) -> tuple[torch.Tensor, ...]:
        """Return the tensors whose allocator does not know yet that a stream uses them.

        An allocator remembers a stream until the memory is freed, so each is named once.
        """
        if not self._memory:  # of raw memory, or of views that are made for one call
            return self.retained
        known = self._with_memory("streams", set[tuple[int, int]])
        named = stream.device.index, stream.stream_id
        if named in known:
            return ()
        known.add(named)
        return self.retained

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return self.form.layers

    @property
    def kv(self) -> int:
        """Return the number of kv: 2 for keys and values, 1 for MLA."""
        return self.form.kv

    @property
    def heads(self) -> int:
        """Return the number of kv heads."""
        return self.form.heads

    @property
    def widths(self) -> tuple[int, ...]:
        """Return for each kv the bytes of ``dim`` (of the page, for opaque pages)."""
        return self.form.widths

    @property
    def block_size(self) -> int | None:
        """Return the tokens of a block; None if the view is not paged."""
        return self.form.block_size or None

    @property
    def opaque(self) -> bool:
        """Return True if only whole pages can be moved."""
        return self.form.opaque

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Return the table of addresses as an int64 array on the host; callers do not write it."""
        # The first array stays: launches in other threads may read it by its address.
        return self._host_table()[0]

    @property
    def addresses_at(self) -> int:
        """Return the address of `addresses`, for calls of the core during which the view lives."""
        return self._host_table()[1]

    def _host_table(self) -> tuple[npt.NDArray[np.int64], int]:
        def make() -> tuple[npt.NDArray[np.int64], int]:
            table = np.array(self.origins, dtype=np.int64)
            return table, pointer_to(table)

        return self._once("addresses", make)

    @property
    def table(self) -> torch.Tensor:
        """Return the table of addresses on the view's device, int64; made once.

        A table that the caller passed stays where it is. Raises `Unsupported` if a table would be
        made inside graph capture.
        """
        if self._table is None:
            sent = torch.from_numpy(self.addresses_for(self.device)).to(self.device)
            return self.keep_table(sent, None)
        return self._table

    def addresses_for(self, device: torch.device) -> npt.NDArray[np.int64]:
        """Return `addresses` for a device; raise `Unsupported` inside graph capture."""
        if capturing(device):
            why = "the host would wait for them; make the same call once before the capture"
            raise refuse_capture("Sending addresses to a device", why)
        return self.addresses

    def table_on(self, device: torch.device) -> torch.Tensor | None:
        """Return the table of addresses on a device, or None."""
        if self._table is not None and self._table.device == device:
            return self._table
        retained: tuple[torch.Tensor, object] | None = self.derived.get((_TABLE, device))
        return None if retained is None else retained[0]

    def keep_table(self, table: torch.Tensor, made: torch.Event | None) -> torch.Tensor:
        """Cache a copy of the addresses on a device; the first copy there stays.

        ``made``: the event after its creation; None: its readers need not wait.
        """
        table, _ = self.derived.setdefault((_TABLE, table.device), (table, made))
        if table.device == self.device:
            self._table = table
        return table

    def made_table(self, device: torch.device) -> torch.Tensor | None:
        """Return the table on a device if its readers need not wait for its creation; else None.

        Work that reads it retains it: no stream is recorded with its allocator.
        """
        table, made = self.derived.get((_TABLE, device), (None, None))
        return table if made is None else None

    def follow_table(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        """Order ``stream`` (None: the current one) after the creation of the table on a device.

        Retains the table for the stream. No graph may be captured, which waits for no work outside.
        The host has no streams.
        """
        if device == _HOST:
            return
        used = stream or torch.accelerator.current_stream(device.index)
        _, made = self.derived.get((_TABLE, device), (None, None))
        if made is not None:
            used.wait_event(made)
        self.record_table(used)

    def record_table(self, stream: torch.Stream) -> None:
        """Record with the allocator that a stream uses the table on its device, if there is one."""
        table = self.table_on(stream.device)
        if table is not None:
            table.record_stream(stream)

    def overlaps(self, other: KVView) -> bool:
        """Return True if the two views' tensors share memory."""
        if not isinstance(other, KVView):
            raise LayoutError(f"Expected other to be a KVView, got {shown(other)}. Pass a view.")
        if self.memory_device != other.memory_device:
            return False
        few, many = sorted((self.spans, other.spans), key=len)
        # Most views of many spans lie in two buffers, which their outer ends tell apart.
        if not few or few[-1][1] <= many[0][0] or many[-1][1] <= few[0][0]:
            return False
        for first, past in few:
            at = bisect_left(many, (past,))
            if at and many[at - 1][1] > first:
                return True
        return False

    def strided(
        self,
        entry: int,
        offset: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        """Return a tensor over the storage of table entry ``entry``, ``offset`` bytes after its
        address.

        ``size`` and ``stride`` count elements of ``dtype``. Copies nothing.
        """
        kept = self._storages
        storage = kept[entry] if kept else self.owners[entry].untyped_storage()
        start = self.origins[entry] + offset - storage.data_ptr()
        if start < 0 or start + reach(size, stride) * dtype.itemsize > storage.nbytes():
            raise self.replaced()
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(storage, start // dtype.itemsize, size, stride)

    def check_memory(self) -> None:
        """Raise `LayoutError` if the memory of a tensor was freed or replaced in place."""
        if self._raw is not None:
            return
        # Compare the storages with those of the last check, which costs less than their ranges.
        changed = not self._memory
        for storage, address, nbytes in self._memory or ():
            if storage.data_ptr() != address or storage.nbytes() != nbytes:
                changed = True
                break
        if changed:
            self._check_storages()

    def _check_storages(self) -> None:
        """Raise `LayoutError` unless the storages of the tensors cover the spans of the view."""
        checked = regions(self.storages)
        ranges = sorted((start, start + nbytes) for _, start, nbytes in checked)
        if not cover(self.spans, ranges):
            raise self.replaced()
        # Tensors without a reference may get other storages, so each is checked again.
        self._memory = None if self._memory is None else checked

    def replaced(self) -> LayoutError:
        """Return the error for memory of a tensor that differs from the memory that was read."""
        return LayoutError(
            f"Expected the memory of {self.layout.text!r} to stay, got a tensor whose memory was "
            "replaced after it was read. Make the view again, or register the kv_caches again."
        )

    def plane(self, layer: int, kv: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return one plane as a strided tensor ``[blocks, block_size, heads, dim]``, of ``dtype``.

        A chunk's plane is ``[tokens, heads, dim]``. ``dtype`` is by default the tensors' own.

        Raises:
            LayoutError: no strided tensor can show it (`Form.unshown` has the reason), or its rows
                do not begin and end at whole numbers of ``dtype``.
        """
        at_layer = as_whole(layer)
        at_kv = as_whole(kv)
        numbers = at_layer is not None and at_kv is not None
        if not (numbers and at_layer in range(self.layers) and at_kv in range(self.kv)):
            raise LayoutError(
                f"Expected layer and kv of a plane to be integers that count from 0, below "
                f"{self.layers} and {self.kv}, got layer {layer!r} and kv {kv!r}. Pass others."
            )
        if self.form.unshown:
            raise LayoutError(
                f"No strided tensor can show a plane of {self.layout.text!r}: {self.form.unshown}; "
                f"read the view by its form, or move what plan.runs lists."
            )
        part = self.form.parts[kv]
        entry, offset = locate(part.table, part.offset, part.layer, layer)
        element = self.owners[entry].dtype if dtype is None else as_dtype(dtype)
        chain = [(self.slots // (self.form.block_size or 1), part.block)] if part.block else []
        chain += [(self.form.block_size or self.slots, part.token), (self.heads, part.head)]
        stride = [steps[0].stride if steps else 0 for _, steps in chain]
        width = element.itemsize
        row = self.widths[kv]
        if any(place % width for place in (self.origins[entry] + offset, row, *stride)):
            raise LayoutError(
                f"A plane of {self.layout.text!r} cannot be read as {element}: its rows of {row} "
                f"bytes do not all begin and end at multiples of {width}; pass dtype=torch.uint8."
            )
        size = [*(extent for extent, _ in chain), row // width]
        return self.strided(entry, offset, element, size, [*(s // width for s in stride), 1])

    def slice(
        self,
        *,
        layers: slice | int | None = None,
        heads: slice | int | None = None,
        kv: slice | int | None = None,
        **unknown: NoReturn,
    ) -> KVView:
        """Return some layers, heads or kv of this view, as a view; copy nothing.

        An integer keeps its axis with extent 1. Slices of one layer all have one form. A slice of
        everything is this view.

        Raises:
            LayoutError: an empty or stepped range, one that cuts through a factor, or another axis.
        """
        if unknown:
            requested = ", ".join(f"{name}={unknown[name]!r}" for name in unknown)
            raise LayoutError(
                f"Expected a slice by layers, heads or kv, got {requested}. Pass an Index of the "
                f"blocks or tokens to the copy."
            )
        form = self.form
        kv_range = slice_range("kv", kv, form.kv)
        layer_range = slice_range("layers", layers, form.layers)
        head_range = slice_range("heads", heads, form.heads)
        if (len(kv_range), len(layer_range), len(head_range)) == (form.kv, form.layers, form.heads):
            return self

        spans = self.spans if self.known else None
        count = self.slots // (form.block_size or 1)  # blocks, or a chunk's tokens
        sliced = slice_form(form, count, kv_range, layer_range, head_range)
        table = None
        origins = None
        owners = None
        storages = None
        if self._origins is not None:
            origins = sliced.origins(self._origins)
        elif self._table is not None:
            table = sliced.table(self._table)
        if self._raw is None:
            assert self._owners is not None
            whole = self.storages
            owners = tuple(self._owners[entry] for entry in sliced.sources)
            storages = tuple(whole[entry] for entry in sliced.sources)
            if spans and len(owners) < sliced.copies * len(self._owners):
                spans = spans_within(spans, storages)

        view = self._with((sliced.form, origins, owners, spans), table, storages)
        # The spans follow from the origins later, so the bytes at each address have to be right.
        if spans is None and self._raw and self._raw.nbytes:
            nbytes = self._raw.nbytes - min(sliced.gained.values())
            view._raw = self._raw._replace(nbytes=nbytes)
        return view

    def as_bytes(self) -> KVView:
        """Return this view with rows of bytes, whatever its dtypes; see ``reinterpret``."""
        if not self.form.dtypes:
            return self
        return self._once("bytes", lambda: self._of_form(self.form.untyped(), self._table))

    def as_slots(self) -> KVView:
        """Return packed blocks as rows of bytes; a block is one token, and a slot is its row."""

        def make() -> KVView:
            view = self._of_form(self.form.as_slots(), self._table)
            view.slots = self.slots // self.form.block_size
            return view

        return self._once("slots", make)

    def as_peer(self, device: torch.device | str) -> KVView:
        """Return these rows as another ``device`` of their type reads them, at the same addresses.

        Their place is ``peer``; they can be the source of copies to that device. Memory that
        another process shared counts as this view's own device's; pass that device. No copy writes
        into a peer's memory.

        Raises:
            DeviceMismatch: rows of the host, a device of another type, or one that is not here.
        """
        reader = torch.device(device) if isinstance(device, torch.device) else usable_device(device)
        if reader.type == self.memory_device.type != "cpu":
            index = (
                torch.accelerator.current_device_index() if reader.index is None else reader.index
            )
            return self._seen("peer", torch.device(reader.type, index))
        raise DeviceMismatch(
            f"Expected a reader of the same device type as the rows on {self.memory_device}, got "
            f"{reader}. Copy the rows to a view of pinned host memory, and from there."
        )

    def as_own(self) -> KVView:
        """Return a peer's rows as their own device sees them."""
        return self if self.form.place != "peer" else self._seen("device", self.memory_device)

    def _seen(self, place: str, device: torch.device) -> KVView:

        def make() -> KVView:
            self.origins  # noqa: B018 - reads a table that only the other device has
            form = replace(self.form, place=place, table_on_device=False)
            view = self._of_form(form, None)
            view.device = device
            return view

        return self._once((place, device), make)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made of this view under a key; make it the first time."""
        made: T | None = self.derived.get(key)
        if made is None:
            made = self.derived.setdefault(key, make())
        return made

    def _of_form(self, form: Form, table: torch.Tensor | None) -> KVView:
        """Return all rows of this view in another form."""
        return self._with((same_form(form), self._origins, self._owners, self._spans), table)

    def planes(self, layers: tuple[int, int] | None, kv: tuple[int, int] | None) -> KVView:
        """Return the rows of some layers and kv, each range [first, past the last), None for all.

        The slice is made once and cached with the view.
        """
        if layers is None and kv is None:
            return self
        key = "planes", layers, kv
        view: KVView | None = self.derived.get(key)
        device = self.table.device if self.form.table_on_device else _HOST
        captured = device != _HOST and capturing(device)
        if view is None or (captured and (_TABLE, device) in view.derived):
            ends = [None if x is None else slice(*x) for x in (layers, kv)]
            view = self.slice(layers=ends[0], kv=ends[1])
            # The table of a slice is made at each replay. A view does not cache itself.
            if captured or view is self:
                return view
            if device != _HOST:
                view.keep_table(view.table, event_pool(device).recorded(None))
            view = self.derived.setdefault(key, view)
        if device != _HOST and not captured:
            view.follow_table(device)
        return view

    def _with(
        self,
        rows: Rows,
        table: torch.Tensor | None,
        storages: tuple[torch.UntypedStorage, ...] | None = None,
    ) -> KVView:
        """Return a view of ``rows`` of this one; ``storages`` are theirs, None: of all rows."""
        view = KVView.__new__(KVView)
        facts = rows, self.slots, self.device, self.requires_grad
        own = table if self.form.table_on_device else None
        persistent = self._memory is not None
        kept = storages or self._storages
        view._set(self.layout, self.tensors, facts, persistent, self._raw, own, kept)
        view.memory_device = self.memory_device
        view.blocks_overlap = self.blocks_overlap
        return view

    def __repr__(self) -> str:
        form = self.form
        blocks = self.slots // (self.form.block_size or 1)
        tokens = f"{blocks} blocks of {form.block_size}" if form.paged else f"{self.slots}"
        if self._raw is not None and not self._raw.nbytes:
            tokens = f"unknown blocks of {form.block_size}" if form.paged else "unknown"
        types = [x.dtype for x in self.owners] if self._raw is None else [self._raw.dtype]
        kinds = ", ".join(dict.fromkeys(str(x).removeprefix("torch.") for x in types))
        place = self.device if form.place == "device" else f"{self.device} ({form.place})"
        return (
            f"KVView({self.layout.text!r}: {form.layers} layers, {form.kv} kv, {form.heads} heads, "
            f"{tokens} tokens, widths {form.widths} B, {kinds} on {place})"
        )


def _alias(owner: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a tensor over the storage of an owner, also if the owner has another one now."""
    if owner.untyped_storage()._cdata == storage._cdata:
        return owner.detach()
    empty = torch.empty(0, dtype=owner.dtype, device=storage.device)
    count = storage.nbytes() // owner.dtype.itemsize
    return empty.set_(storage, 0, (count,), (1,))


# ------------------------------------------------------------------------------------------------
# Slices of a view: ranges of layers, heads and kv, and the forms and addresses that follow.


class SlicedForm(NamedTuple):
    """The form of a slice, and the table entries that the slice uses."""

    form: Form
    #: Bytes that each used entry gains. The key is the entry's number times ``copies``, plus which
    #: of the copies it is.
    gained: dict[int, int]
    #: Entries of the slice for each entry of the view.
    copies: int

    @property
    def sources(self) -> list[int]:
        """Return the number of the view's entry for each entry of the slice."""
        return [number // self.copies for number in self.gained]

    def origins(self, origins: Sequence[int]) -> tuple[int, ...]:
        """Return the addresses of the slice, from the addresses of the view."""
        pairs = zip(self.sources, self.gained.values(), strict=True)
        return tuple(origins[entry] + gain for entry, gain in pairs)

    def table(self, table: torch.Tensor) -> torch.Tensor:
        """Return the entries of the slice from a table; the host does not read or wait for it."""
        entries = self.sources
        gains = list(self.gained.values())
        steps = {later - earlier for earlier, later in pairwise(entries)}
        step = min(steps, default=1)
        if len(set(gains)) == 1 and len(steps) < 2 and step > 0:
            picked = table[entries[0] : entries[-1] + 1 : step]
            return (picked + gains[0] if gains[0] else picked).contiguous()
        return torch.stack([table[at] + gain for at, gain in zip(entries, gains, strict=True)])


def slice_form(form: Form, count: int, kv: range, layers: range, heads: range) -> SlicedForm:
    """Return the form of a slice of a view of ``count`` blocks, or of a chunk's tokens.

    Raises:
        LayoutError: the range of layers or heads cuts a factor.
    """
    read = slice_words(form.address, count, kv, layers, heads)
    if isinstance(read, int):
        axis, wanted = ("head", heads) if read == HEADS_CUT else ("layer", layers)
        raise LayoutError(
            f"{axis} {wanted.start}..{wanted.stop} cuts through a factor of the {axis!r} axis; "
            f"slice at multiples of its factors."
        )
    words, copies, gained = read
    of_name = words_of_dtypes()
    dtypes = [of_name[form.dtypes[k]] for k in kv] if form.dtypes else [0] * len(kv)
    rest = array("q", [PLACES.index(form.place), form.table_on_device, *dtypes])
    encoding = tuple([form.encoding[k] for k in kv]) if form.encoding else ()
    return SlicedForm(form_of(words + rest.tobytes(), encoding), gained, copies)


def slice_range(name: str, requested: slice | int | None, extent: int) -> range:
    """Return the positions that a slice of one axis covers; an integer covers one position.

    Raises:
        LayoutError: not an integer or a slice of integers, or an empty or stepped range.
    """
    if requested is None:
        return range(extent)
    try:
        if isinstance(requested, slice):
            result = range(extent)[requested]
        else:
            at = as_whole(requested)
            if at is None:
                raise TypeError
            result = range(at, at + 1) if 0 <= at < extent else range(0)
    except (TypeError, ValueError):
        raise LayoutError(
            f"Expected an integer or a slice of integers, got {name}={requested!r}. Pass one."
        ) from None
    if len(result) < 1 or result.step != 1:
        raise LayoutError(
            f"Expected a range of at least one of {extent} {name} with step 1, got "
            f"{name}={requested}, which covers {list(result)}. Pass a range within the view."
        )
    return result


def spans_within(spans: Spans, storages: Sequence[torch.UntypedStorage]) -> Spans:
    """Return the parts of sorted, disjoint spans that lie in ``storages``."""
    ends = [past for _, past in spans]
    result = []
    for start, end in sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}):
        at = bisect_right(ends, start)
        while at < len(spans) and spans[at][0] < end:
            result.append((max(spans[at][0], start), min(spans[at][1], end)))
            at += 1
    return result


def cover(spans: Spans, ranges: Sequence[tuple[int, int]]) -> bool:
    """Return True if sorted ranges of storages cover every span."""
    for first, past in spans:
        # Storages that touch each other may be parts of one span.
        for start, end in ranges:
            if start <= first < end:
                first = end
        if first < past:
            return False
    return True


def regions(
    storages: Iterable[torch.UntypedStorage],
) -> tuple[tuple[torch.UntypedStorage, int, int], ...]:
    """Return each storage once, with its address and its bytes."""
    # Tensors may share a storage, for which torch makes an object for each of them.
    distinct = {storage._cdata: storage for storage in storages}
    return tuple((each, each.data_ptr(), each.nbytes()) for each in distinct.values())


def storage_edges(storages: Iterable[torch.UntypedStorage]) -> npt.NDArray[np.int64]:
    """Return the first byte of each storage, and then the byte past each."""
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return np.array([*sizes, *map(sum, sizes.items())], dtype=np.int64)


# ------------------------------------------------------------------------------------------------
# Dense memory for blocks, raw or encoded, in one order that any side is copied to and from.


def dense_blocks(
    form: Form,
    unit: int,
    blocks: int,
    device: torch.device,
    encoding: Encoding | None = None,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> KVView:
    """Return uninitialised memory for the rows of a form in blocks of ``unit`` tokens.

    The view has a contiguous tensor for each kv: ``[blocks, layers, heads, tokens, dim]``, or
    uint8 ``[blocks, layers, heads, slot_bytes]`` if the blocks are encoded.

    Args:
        form: of raw rows, or of blocks in an encoding.
        encoding: of the blocks in place of raw rows; None: as the form has them.
        allocate: returns uint8 memory of so many bytes; None: memory of ``device``.
    """
    dtypes = [getattr(torch, name or "uint8") for name in form.dtypes]
    if form.encoding:
        encoding = parameters_of(form.encoding)
        dims = [plane.values // unit for plane in form.encoding]
    else:
        sizes = [dtype.itemsize for dtype in dtypes]
        dims = [width // size for width, size in zip(form.widths, sizes, strict=True)]
    inner = "token dim"
    shapes: list[tuple[int, ...]] = [(unit, dim) for dim in dims]
    if encoding is not None:
        inner = "page"
        shapes = [(plane_of(encoding, unit, dim).slot_bytes,) for dim in dims]
        dtypes = [torch.uint8] * form.kv

    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = torch.Size((blocks, form.layers, form.heads, *shape))
        if allocate is None:
            tensors.append(torch.empty(size, dtype=dtype, device=device))
        else:
            tensors.append(allocate(size.numel() * dtype.itemsize).view(dtype).view(size))
    return KVView(
        tensors,
        f"kv | block layer head {inner}",
        kv=form.kv,
        block_size=unit,
        dim=dims,
        encoding=encoding,
    )


# ------------------------------------------------------------------------------------------------
# Check that a view can be the destination of a copy, and note that a copy has written it.

_WHY_NOT = "why not a destination"  # of a view; empty if it is one
_WRITTEN = "tensors with versions"  # of a view


def check_writable(view: KVView) -> None:
    """Raise `LayoutError` if a view cannot be a destination.

    The answer is kept with the view, except that its memory is mapped for reading only: the caller
    may map it anew.
    """
    why: str | None = view.derived.get(_WHY_NOT)
    if why is None:
        why = _why_not(view)
        # Look at the first and the last byte of each span of host memory.
        on_host = not why and view.form.place == "pageable"
        if on_host and not all(writable(first, past) for first, past in view.spans):
            why = READ_ONLY
        elif view.known:  # else the addresses may be read back later
            view.derived[_WHY_NOT] = why
    if why:
        raise LayoutError(f"Expected a writable destination, got {view.layout.text!r}: {why}.")


def _why_not(view: KVView) -> str:
    """Return why rows at these addresses cannot be a destination; empty if they can."""
    form = view.form
    if view.requires_grad:
        return "it requires grad. Pass tensor.detach()"
    if form.place == "peer":
        return "a peer's rows are only read. Let its own device read the source"
    count: int | None = view.slots // (form.block_size or 1)
    if view.blocks_overlap or (view.raw and not view.entry_bytes):
        count = None  # the blocks of a copy are apart, or none knows how many there are
    axes = shared_axes(form, count)
    if not axes and view.known and view.entries > 1:
        axes = shared_by_addresses(form, count, view.addresses)
    return _why_shared(view, axes) if axes else ""


def _why_shared(view: KVView, axes: tuple[str, ...]) -> str:
    """Return why rows that are apart along some axes cannot both be written, with what to do."""
    for part, name in product(view.form.parts, axes):
        steps = part.axis(name) if name in PART_AXES else ()
        if any(step.stride == step.table == 0 for step in steps):
            containers = view.layout.containers
            listed = any(each.axis == name for group in containers for each in group.factors)
            remedy = f"separate memory for each {name}" if listed else "tensor.contiguous()"
            return (
                f"its {name!r} axis has stride 0, so that several rows share one place. Pass "
                f"{remedy}"
            )
    if {*axes} <= {"", "kv", "layer"}:
        return (
            "two of its planes lie at one address, so that one would overwrite the other. Pass "
            "separate memory for each"
        )
    apart = " and ".join(repr(name) for name in axes if name)
    return (
        f"two of its rows, which are apart along {apart}, share bytes. Pass tensors whose rows "
        f"share none, such as tensor.contiguous()"
    )


def note_written(view: KVView) -> None:
    """Raise the version of each tensor of a view, as torch does when it writes in place.

    So autograd notices if a copy overwrites a tensor that it saved for a backward pass. Raw memory
    has no versions, nor have tensors that were made in inference mode.
    """
    increment_version(with_versions(view))


def with_versions(view: KVView) -> tuple[torch.Tensor, ...]:
    """Return a tensor for each version of a view: views of one tensor share it."""
    tensors: tuple[torch.Tensor, ...] | None = view.derived.get(_WRITTEN)
    if tensors is None:
        tensors = view.derived[_WRITTEN] = _find_versions(view)
    return tensors


def _find_versions(view: KVView) -> tuple[torch.Tensor, ...]:
    if view.raw:
        return ()
    if not view.layout.containers:
        return view.owners
    # A table has only the first of tensors that lie at equal distances, and a slice has all tensors
    # of its view.
    flat, _ = flatten_tensors(view.layout, view.tensors)
    spans = view.spans
    pasts = [past for _, past in spans]
    written = {}
    for tensor in flat:
        begin = tensor.data_ptr()
        at = bisect_right(pasts, begin)
        if at == len(spans):
            continue
        first = spans[at][0]
        # Most tensors need no look at their strides.
        if first <= begin or first < begin + reach(tensor.shape, tensor.stride()) * tensor.itemsize:
            base = tensor if tensor._base is None else tensor._base
            written[id(base)] = base
    return tuple(written.values())
