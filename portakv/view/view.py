# SPDX-License-Identifier: Apache-2.0
"""`KVView`: tensors read through a layout are a form and addresses.

Addresses come from ``data_ptr()`` and strides, never from contiguity, the number of tensors or
``shape[i] == 2``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import index, methodcaller
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError
from portakv.layout.language import Layout
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture, usable_device
from portakv.runtime.transfer import event_pool
from portakv.view.bound import BoundLayout, Facts, Rows, Spans, as_dtype, bind_layout, reach
from portakv.view.bound import Tensors as Tensors
from portakv.view.foreign import Foreign, read_addresses
from portakv.view.form import ALIASED, Form, gather, locate, same_form, widest_vector

#: Addresses as `KVView.at` takes them: in lists as a layout names containers, or in a tensor.
Addresses: TypeAlias = "int | Sequence[Addresses] | npt.NDArray[Any] | torch.Tensor"

_HOST = torch.device("cpu")
_detached = methodcaller("detach")
_TABLE = "table on"  # with a device: the table that was made there, and the event behind that


class KVView:
    """Tensors read through a layout.

    Args:
        tensors: a tensor, or the containers that the layout names (list, tuple, dict).
        layout: a layout string, or the name of a preset.
        layers, kv, block_size, heads: declared extents. ``block_size`` is tokens of a block.
        dim: declared width in elements: one number, or one for each kv.
        reinterpret: the rows are bytes, whatever the dtype: they may be copied to and from rows of
            any number type. Rows of two different number types are otherwise refused.

    Attributes:
        form: strides, widths, alignment and place.
        tensors: what was read, as it was passed.
        slots: tokens that can be addressed (blocks * block_size, or a chunk's tokens).
        device: where the tensors are; of a peer's rows, which device reads them.
        home: where the memory is, whichever device reads it.

    Raises:
        LayoutError: a contradiction, naming the axis, the expected and the found extent.
        DeviceMismatch: tensors on different devices.
    """

    # fleeting: made for one call, and used on no stream but that call's.
    # derived: what slices, launches and engines made of this view; lives as long as the view.
    __slots__ = (
        "_foreign",
        "_memory",
        "_origins",
        "_owners",
        "_spans",
        "_table",
        "_unwritable",
        "derived",
        "device",
        "fleeting",
        "form",
        "home",
        "layout",
        "requires_grad",
        "slots",
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
            **unknown,
        )
        self._set(bound.layout, tensors, bound.read(tensors), lasting=True)

    @classmethod
    def through(cls, bound: BoundLayout, tensors: Tensors, *, lasting: bool = False) -> KVView:
        """A view through a layout that was bound before; raises as the constructor does.

        ``lasting``: it outlives the call that it is made for.
        """
        view = cls.__new__(cls)
        view._set(bound.layout, tensors, bound.read(tensors), lasting)
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
        **unknown: NoReturn,
    ) -> KVView:
        """A view over memory that is known by addresses alone, all of tensors of one shape.

        It holds no memory and cannot see that it was freed or moved: the caller promises that it
        stays until copies have ended, and that a table on a device is not written meanwhile. Such a
        table is never read back by a kernel's launch; what needs the addresses on the host (engines
        that cut a copy, plain indexing) reads it once.

        Args:
            addresses: whole numbers: one, or in lists as the layout names containers; or an int64
                or uint64 tensor with a dimension for each container level, on the host or on a
                device. Those on a device must be multiples of 16.
            layout: a layout string, or the name of a preset.
            shape: of the tensor at each address. The extent of the dimension that holds ``block``
                (of a chunk, ``token``) may be -1: unknown. Then no id is past the end, and nobody
                looks whether two views share memory.
            strides: in elements; None: contiguous, if no extent outside of one of -1 is above 1.
            dtype: of the tensors' elements.
            device: where the memory is; ``cpu``: on the host. None: the driver of the accelerator
                (CUDA, HIP) says it of the first address, and whether that is pinned; all others are
                taken to lie in memory of that kind. Without an accelerator it is the host.
            pinned: host memory is pinned, and mapped to devices; None: torch is asked, if
                ``device`` is told of one address in each page. Memory of a table on a device is.
            layers, kv, block_size, heads, dim, reinterpret: as for the constructor.

        Raises:
            LayoutError: what are no addresses, or not as many levels of them as the layout has; an
                address that is 0, or no multiple of the element's bytes; a contradiction; no
                ``device``, and no driver that can be asked.
            DeviceMismatch: a ``device`` that torch does not know, or cannot use here; a table on
                another device than the memory.
            TransferError: the driver fails when it is asked.
        """
        bound = bind_layout(
            layout,
            layers=layers,
            kv=kv,
            block_size=block_size,
            heads=heads,
            dim=dim,
            reinterpret=reinterpret,
            **unknown,
        )
        result = read_addresses(bound, addresses, shape, strides, dtype, device, pinned)
        view = cls.__new__(cls)
        facts = (result.form, result.origins, None, None), result.slots, result.device, False
        view._set(bound.layout, (), facts, lasting=False, foreign=result.memory, table=result.table)
        return view

    def _set(
        self,
        layout: Layout,
        tensors: Any,
        facts: Facts,
        lasting: bool,
        foreign: Foreign | None = None,
        table: torch.Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.tensors = tensors
        rows, self.slots, self.device, self.requires_grad = facts
        self.home = self.device
        self.form, self._origins, self._owners, self._spans = rows
        self._foreign = foreign
        self._table = table
        self.fleeting = not (lasting or foreign)
        self._memory: tuple[tuple[torch.UntypedStorage, int, int], ...] | None = None
        self._unwritable: str | None = None
        self.derived: dict[Hashable, Any] = {}
        if lasting:
            # Aliases keep the memory that was read, also if a caller gives a tensor another one.
            self._owners = tuple(map(_detached, self.owners))
            self._memory = ()

    @property
    def origins(self) -> tuple[int, ...]:
        """The addresses as integers (one if all is strided). Of a table that only a device has,
        it reads them once, and waits for that; raises `Unsupported` inside graph capture."""
        if self._origins is None:
            assert self._table is not None
            if capturing(self._table.device):
                why = "the host would wait for addresses that only the device has"
                raise refuse_capture("Reading addresses back", f"{why}; hand them over on the host")
            self._origins = tuple(self._table.tolist())
        return self._origins

    @property
    def known(self) -> bool:
        """True if the host knows the addresses, so that `origins` waits for nothing."""
        return self._origins is not None

    @property
    def entries(self) -> int:
        """How many addresses there are."""
        if self._origins is None:
            assert self._table is not None
            return self._table.numel()
        return len(self._origins)

    @property
    def tabled(self) -> bool:
        """Whether a kernel may read the addresses from their table."""
        return self.entries > 1 or self.form.lists or self.form.table_on_device

    @property
    def owners(self) -> tuple[torch.Tensor, ...]:
        """For each address the tensor whose storage it lies in; of foreign memory one that owns
        nothing."""
        if self._owners is None:
            assert self._foreign is not None
            self._owners = self._foreign.tensors(self.origins, self.device)
        return self._owners

    def edges(self) -> npt.NDArray[np.int64]:
        """Where allocations begin and end, in any order; of memory that is known by addresses
        alone, where its tensors do."""
        if self._foreign is not None:
            begins = self.addresses
            return np.concatenate([begins, begins + self._foreign.nbytes])
        storages = {x.data_ptr(): x.nbytes() for x in (y.untyped_storage() for y in self.owners)}
        return np.array([*storages, *map(sum, storages.items())], dtype=np.int64)

    @property
    def spans(self) -> Spans:
        """Sorted, disjoint ranges [first byte, past the last byte) that the tensors cover; none if
        only a device has the addresses."""
        if self._spans is None:
            assert self._foreign is not None
            if self._origins is None:
                return []  # not kept: they may be read back later
            self._spans = self._foreign.spans(self._origins)
        return self._spans

    @property
    def entry_bytes(self) -> int:
        """Of memory that is known by addresses alone, the bytes behind each; 0: unknown."""
        return self._foreign.nbytes if self._foreign is not None else 0

    @property
    def foreign(self) -> bool:
        """True if the memory is known by addresses alone, so that nothing here holds it."""
        return self._foreign is not None

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """The tensors that keep memory while a copy uses it: the owners, or of foreign memory the
        table that a caller has on a device."""
        if self._foreign is None:
            return self.owners
        return (self._table,) if self._table is not None else ()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.form.layers

    @property
    def kv(self) -> int:
        """Number of kv: 2 for keys and values, 1 for MLA."""
        return self.form.kv

    @property
    def heads(self) -> int:
        """Number of kv heads."""
        return self.form.heads

    @property
    def widths(self) -> tuple[int, ...]:
        """For each kv the bytes of ``dim`` (of the page, for opaque pages)."""
        return self.form.widths

    @property
    def block_size(self) -> int | None:
        """Tokens of a block; None if the view is not paged."""
        return self.form.block_size or None

    @property
    def opaque(self) -> bool:
        """True if only whole pages can be moved."""
        return self.form.opaque

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """The table of addresses as an int64 array on the host, which is not to be written."""
        result: npt.NDArray[np.int64] | None = self.derived.get("addresses")
        if result is None:
            result = self.derived["addresses"] = np.array(self.origins, dtype=np.int64)
        return result

    @property
    def table(self) -> torch.Tensor:
        """The table of addresses on the view's device, int64; made once. A caller's own lies where
        the caller has it. Raises `Unsupported` if it would be made inside graph capture."""
        if self._table is None:
            sent = torch.from_numpy(self.addresses_for(self.device)).to(self.device)
            return self.keep_table(sent, None)
        return self._table

    def addresses_for(self, device: torch.device) -> npt.NDArray[np.int64]:
        """`addresses`, to be sent to a device; raises `Unsupported` inside graph capture."""
        if capturing(device):
            why = "the host would wait for them; make the same call once before the capture"
            raise refuse_capture("Sending addresses to a device", why)
        return self.addresses

    def table_on(self, device: torch.device) -> torch.Tensor | None:
        """The table of addresses that lies on a device, if there is one."""
        if self._table is not None and self._table.device == device:
            return self._table
        retained: tuple[torch.Tensor, object] | None = self.derived.get((_TABLE, device))
        return None if retained is None else retained[0]

    def keep_table(self, table: torch.Tensor, made: torch.Event | None) -> torch.Tensor:
        """Keep a copy of the addresses that was made on a device, of several there the first.
        ``made``: behind its making; None: its readers need not wait for it."""
        table, _ = self.derived.setdefault((_TABLE, table.device), (table, made))
        if table.device == self.device:
            self._table = table
        return table

    def follow_table(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        """Order ``stream`` (None: the current one) behind the making of the table on a device, and
        hold the table for it. Inside graph capture nothing waits for what was enqueued outside."""
        if capturing(device):
            return
        used = stream or torch.accelerator.current_stream(device.index)
        _, made = self.derived.get((_TABLE, device), (None, None))
        if made is not None:
            used.wait_event(made)
        self.record_table(used)

    def record_table(self, stream: torch.Stream) -> None:
        """Tell the allocator that a stream uses the table on its device, if there is one."""
        table = self.table_on(stream.device)
        if table is not None:
            table.record_stream(stream)

    def overlaps(self, other: KVView) -> bool:
        """True if the two views' tensors share memory."""
        if not isinstance(other, KVView):
            kind = type(other).__name__
            raise LayoutError(f"Overlap with a {kind} was asked; expected a KVView. Pass one.")
        if self.home != other.home:
            return False
        dst = self.spans if self._spans is None else self._spans  # the property costs a call
        src = other.spans if other._spans is None else other._spans
        few, many = (dst, src) if len(dst) < len(src) else (src, dst)
        for first, past in few:
            at = bisect_left(many, (past,))
            if at and many[at - 1][1] > first:
                return True
        return False

    def check_writable(self) -> None:
        """Raise `LayoutError` if this view cannot be a destination."""
        why = self._unwritable
        if why is None:
            why = self.form.unwritable
            if self.requires_grad:
                why = "it requires grad; pass tensor.detach()"
            elif self.form.place == "peer":
                why = "it is a peer's, whose rows are read alone; let its own device read yours"
            elif not why and self._origins is not None and len(self._origins) > 1:
                result = [self.origins[entry] + offset for entry, offset in self.form.planes]
                distinct = all(len(set(each)) == len(each) for each in (result, self.origins))
                why = "" if distinct else ALIASED
            if self.known:  # else the addresses may be read back later
                self._unwritable = why
        if why:
            raise LayoutError(f"The destination, {self.layout.text!r}, cannot be written: {why}.")

    def strided(
        self,
        entry: int,
        offset: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        """A tensor over the storage of table entry ``entry``, ``offset`` bytes behind its address;
        ``size`` and ``stride`` count elements of ``dtype``. Copies nothing."""
        storage = self.owners[entry].untyped_storage()
        start = self.origins[entry] + offset - storage.data_ptr()
        if start < 0 or start + reach(size, stride) * dtype.itemsize > storage.nbytes():
            raise self.replaced()
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(storage, start // dtype.itemsize, size, stride)

    def check_memory(self) -> None:
        """Raise `LayoutError` if the memory behind a tensor was freed or replaced in place."""
        if self._foreign is not None:
            return
        for storage, address, nbytes in self._memory or ():
            if storage.data_ptr() != address or storage.nbytes() != nbytes:
                break
        else:
            if self._memory:
                return
        storages = {s._cdata: s for s in (owner.untyped_storage() for owner in self.owners)}
        result = tuple((s, s.data_ptr(), s.nbytes()) for s in storages.values())
        ranges = sorted((at, at + n) for _, at, n in result)
        for first, past in self.spans:
            # Storages that touch each other may hold one span together.
            for start, end in ranges:
                if start <= first < end:
                    first = end
            if first < past:
                raise self.replaced()
        # Tensors that are not held may be given other storages, so that all are asked again.
        self._memory = None if self._memory is None else result

    def replaced(self) -> LayoutError:
        """The error if the memory behind a tensor is another than that which was read."""
        return LayoutError(
            f"The memory behind a tensor of {self.layout.text!r} was replaced after it was read; "
            f"make the view anew, or register the kv_caches again."
        )

    def plane(self, layer: int, kv: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One plane as a strided tensor ``[blocks, block_size, heads, dim]`` (a chunk: ``[tokens,
        heads, dim]``) in ``dtype``, by default the tensors' own.

        Raises:
            LayoutError: no strided tensor can show it (`Form.unshown` says why), or its rows do not
                begin and end at whole numbers of ``dtype``.
        """
        try:
            there = 0 <= index(layer) < self.layers and 0 <= index(kv) < self.kv
        except TypeError:
            there = False
        if not there:
            raise LayoutError(
                f"The plane of layer {layer!r} and kv {kv!r} was asked of a view of {self.layers} "
                f"layers and {self.kv} kv; both are integers that count from 0."
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
        """Some layers, heads or kv of this view, as a view; copies nothing.

        An integer keeps its axis with extent 1. Slices of one layer all have one form.

        Raises:
            LayoutError: an empty or stepped range, one that cuts through a factor, or another axis.
        """
        if unknown:
            requested = ", ".join(f"{name}={unknown[name]!r}" for name in unknown)
            raise LayoutError(
                f"A slice by {requested} was asked; expected layers, heads or kv; pass an Index of "
                f"the blocks or tokens to the copy."
            )
        form = self.form
        spans = self.spans if self.known else None
        kv_range = _range("kv", kv, form.kv)
        layer_range = _range("layers", layers, form.layers)
        head_range = _range("heads", heads, form.heads)
        if (len(kv_range), len(layer_range), len(head_range)) == (form.kv, form.layers, form.heads):
            return self._with((form, self._origins, self._owners, spans), self._table)
        count = self.slots // (form.block_size or 1)  # blocks, or a chunk's tokens
        key = self.form, count, kv_range, layer_range, head_range
        form, gained, n = _slices.get_or_make(key, lambda: _sliced(*key))
        table = None
        origins = None
        left = None
        if self._origins is not None:
            origins = tuple(self._origins[number // n] + gain for number, gain in gained.items())
        elif self._table is not None:
            table = _moved(self._table, [number // n for number in gained], [*gained.values()])
        if self._foreign is None:
            left = tuple(self.owners[number // n] for number in gained)
            if spans and len(left) < n * len(self.owners):
                spans = _within(spans, left)
        view = self._with((form, origins, left, spans), table)
        if spans is None and self._foreign and self._foreign.nbytes:  # to be found from origins
            nbytes = self._foreign.nbytes - min(gained.values())
            view._foreign = self._foreign._replace(nbytes=nbytes)
        return view

    def as_bytes(self) -> KVView:
        """This view with rows of bytes, whatever the dtypes of its tensors; see ``reinterpret``."""
        if not self.form.dtypes:
            return self
        view: KVView | None = self.derived.get("bytes")
        if view is None:
            rows = same_form(self.form.untyped()), self._origins, self._owners, self._spans
            view = self.derived["bytes"] = self._with(rows, self._table)
        return view

    def as_peer(self, device: torch.device | str) -> KVView:
        """These rows as another ``device`` of their type reads them, at the same addresses: place
        ``peer``, to be the source of copies to that device. Memory that another process shared
        counts as this view's own device's; pass that. Nobody writes into a peer's memory.

        Raises:
            DeviceMismatch: rows of the host, a device of another type, or one that is not here.
        """
        reader = torch.device(device) if isinstance(device, torch.device) else usable_device(device)
        if reader.type == self.home.type != "cpu":
            index = (
                torch.accelerator.current_device_index() if reader.index is None else reader.index
            )
            return self._seen("peer", torch.device(reader.type, index))
        raise DeviceMismatch(
            f"Rows on {self.home} were asked to be read by {reader}; a device reads the memory of "
            f"others of its own type. Copy them to a view of pinned host memory, and from there."
        )

    def as_own(self) -> KVView:
        """A peer's rows as their own device sees them."""
        return self if self.form.place != "peer" else self._seen("device", self.home)

    def _seen(self, place: str, device: torch.device) -> KVView:
        view: KVView | None = self.derived.get((place, device))
        if view is None:
            form = same_form(replace(self.form, place=place, table_on_device=False))
            view = self._with((form, self.origins, self._owners, self._spans), None)
            view.device = device
            view = self.derived.setdefault((place, device), view)
        return view

    def planes(self, layers: tuple[int, int] | None, kv: tuple[int, int] | None) -> KVView:
        """The rows of some layers and kv, each range [first, past the last), None for all: a slice
        that is made once and kept with the view."""
        if layers is None and kv is None:
            return self
        key = "planes", layers, kv
        view: KVView | None = self.derived.get(key)
        home = self.table.device if self.form.table_on_device else _HOST
        captured = home != _HOST and capturing(home)
        if view is None or (captured and (_TABLE, home) in view.derived):
            ends = [None if x is None else slice(*x) for x in (layers, kv)]
            view = self.slice(layers=ends[0], kv=ends[1])
            if captured:
                return view  # its table is made at each replay
            if home != _HOST:
                view.keep_table(view.table, event_pool(home).recorded(None))
            view = self.derived.setdefault(key, view)
        if home != _HOST:
            view.follow_table(home)
        return view

    def _with(self, rows: Rows, table: torch.Tensor | None) -> KVView:
        view = KVView.__new__(KVView)
        facts = rows, self.slots, self.device, self.requires_grad
        own = table if self.form.table_on_device else None  # others are made when they are needed
        lasting = self._memory is not None
        view._set(self.layout, self.tensors, facts, lasting, self._foreign, own)
        view.home = self.home
        return view

    def __repr__(self) -> str:
        form = self.form
        blocks = self.slots // (self.form.block_size or 1)
        tokens = f"{blocks} blocks of {form.block_size}" if form.paged else f"{self.slots}"
        if self._foreign is not None and not self._foreign.nbytes:
            tokens = f"unknown blocks of {form.block_size}" if form.paged else "unknown"
        types = [x.dtype for x in self.owners] if self._foreign is None else [self._foreign.dtype]
        kinds = ", ".join(dict.fromkeys(str(x).removeprefix("torch.") for x in types))
        place = self.device if form.place == "device" else f"{self.device} ({form.place})"
        return (
            f"KVView({self.layout.text!r}: {form.layers} layers, {form.kv} kv, {form.heads} heads, "
            f"{tokens} tokens, widths {form.widths} B, {kinds} on {place})"
        )


#: A form, the bytes that each of its table's entries gains, by its number times the last one, and
#: how many entries become of one.
_Sliced: TypeAlias = "tuple[Form, dict[int, int], int]"
_slices: Bounded[tuple[object, ...], _Sliced] = Bounded("forms of slices", 1024)


def _sliced(form: Form, count: int, kv: range, layers: range, heads: range) -> _Sliced:
    """The form of a slice of a view of ``count`` blocks, or of a chunk's tokens."""
    parts = [form.parts[k].cut("head", heads) for k in kv]
    fewer_layers = len(layers) < form.layers
    # What the origins of such slices share at any layer, so that no layer has its own form.
    strides = [step.stride for part in parts if fewer_layers for step in part.layer]
    alignment = widest_vector([form.alignment, *strides, *(part.offset for part in parts)])
    # Parts behind one address that drift apart from layer to layer get entries of their own.
    shared = len({part.table for part in parts}) < len(parts)
    drift = fewer_layers and shared and len({part.layer for part in parts}) > 1
    n = len(parts) if drift else 1
    gathered, gained = gather([part.cut("layer", layers) for part in parts], count, n)
    dtypes = tuple(form.dtypes[k] for k in kv) if form.dtypes else ()
    sliced = replace(
        form,
        parts=gathered,
        layers=len(layers),
        heads=len(heads),
        widths=tuple(form.widths[k] for k in kv),
        alignment=alignment,
        dtypes=dtypes if any(dtypes) else (),
    )
    return same_form(sliced), gained, n


def _moved(table: torch.Tensor, entries: list[int], gains: list[int]) -> torch.Tensor:
    """Some entries of a table, each with bytes added; the host neither reads it nor waits."""
    steps = {b - a for a, b in pairwise(entries)}
    if len(set(gains)) == 1 and len(steps) < 2 and min(steps, default=1) > 0:
        picked = table[entries[0] : entries[-1] + 1 : min(steps, default=1)]
        return (picked + gains[0] if gains[0] else picked).contiguous()
    return torch.stack([table[at] + gain for at, gain in zip(entries, gains, strict=True)])


def _range(name: str, asked: slice | int | None, extent: int) -> range:
    if asked is None:
        return range(extent)
    try:
        if isinstance(asked, slice):
            result = range(extent)[asked]
        else:
            at = index(asked)
            result = range(at, at + 1) if 0 <= at < extent else range(0)
    except (TypeError, ValueError):
        raise LayoutError(
            f"{name}={asked!r} was asked; expected an integer or a slice of integers."
        ) from None
    if len(result) < 1 or result.step != 1:
        raise LayoutError(
            f"{name}={asked} asks for {list(result)} of {extent}; ask for a range of at least one "
            f"with step 1."
        )
    return result


def _within(spans: Spans, owners: Sequence[torch.Tensor]) -> Spans:
    """The parts of sorted, disjoint spans that lie in the storages of some of their tensors."""
    storages = (owner.untyped_storage() for owner in owners)
    ends = [past for _, past in spans]
    result = []
    for start, end in sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}):
        at = bisect_right(ends, start)
        while at < len(spans) and spans[at][0] < end:
            result.append((max(spans[at][0], start), min(spans[at][1], end)))
            at += 1
    return result
