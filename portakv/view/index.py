# SPDX-License-Identifier: Apache-2.0
"""Index lists: for one side of a copy, which slot each position uses.

Position ``p``, with ``q = p + offset``, is slot ``ids[q // step] * step + q % step``; without ids
it is slot ``q``. ``step=1`` is a slot mapping, ``step=block_size`` a block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index as whole_number
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import SlotError, Unsupported
from portakv.view.bound import address_of

IdList: TypeAlias = "torch.Tensor | npt.NDArray[np.signedinteger[Any]] | Sequence[int]"
#: Slots or blocks: int32 or int64, one dimension, on host or device.
Ids: TypeAlias = "Index | IdList"
_DTYPES = (torch.int64, torch.int32)
_ANY = frozenset(_DTYPES)
_HOST = torch.device("cpu")
_WILD = 2**62  # past the end of any view, and far from where 64 bits wrap
_INT32 = 2**31 - 1
_MOST = 256  # checks that one list of ids remembers


class _Store:
    """What all indices of one list share."""

    __slots__ = ("array", "checked", "copies", "token")

    def __init__(self) -> None:
        self.token = object()  # stands for the list, and holds none of its memory
        # The ids as a contiguous int64 array on the host, and contiguous in other places or dtypes.
        self.array: npt.NDArray[np.int64] | None = None
        self.copies: list[torch.Tensor] = []
        # For (offset, count, slots, distinct) whether an id of that range is negative.
        self.checked: dict[tuple[int, int, int, bool | None], bool] = {}

    def remember(self, key: tuple[int, int, int, bool | None], skips: bool) -> None:
        if len(self.checked) >= _MOST:
            self.checked.clear()
        self.checked[key] = skips


class Index:
    """An index list. Its contents must not change once it was made: copies on both sides are kept.

    Args:
        ids: int32 or int64, one dimension, on host or device, contiguous or not (a tensor, a numpy
            array or a list of int); negative ids are padding and skip their positions. None:
            consecutive slots.
        step: tokens for each id.
        offset: tokens of the first id that are passed over.
        trusted: the caller promises that ids on a device are neither negative nor past the end, so
            that no copy waits for the device to look at them. A kernel that skips and guards still
            moves nothing for a bad one; what others do then is undefined. Ids on the host are
            looked at all the same. Engines that need ids on the host read those of a device there
            once, if the terms of a transfer leave no other engine.

    Attributes:
        length: positions that the ids cover; None without ids.
        on_host: True if ids can be validated before launch.
        trusted: ids on a device are clean by promise.

    Raises:
        SlotError: another dtype (float and bool included), rank, or a bad step or offset.
    """

    # plan_step: what a plan is made for: ``step``, or 0 without ids.
    # fleeting: a caller's ids for one call, which are not used again.
    __slots__ = (
        "_placed",
        "_served",
        "_store",
        "fleeting",
        "ids",
        "length",
        "offset",
        "on_host",
        "plan_step",
        "step",
        "trusted",
    )

    def __init__(
        self, ids: IdList | None = None, step: int = 1, offset: int = 0, *, trusted: bool = False
    ) -> None:
        if type(step) is not int or type(offset) is not int:
            with suppress(TypeError):
                step = whole_number(step)
                offset = whole_number(offset)
        if type(step) is not int or type(offset) is not int or not 0 < step <= _INT32 or offset < 0:
            raise SlotError(
                f"Index(step={step!r}, offset={offset!r}) was asked for; both are integers, step "
                f"from 1 to {_INT32} and offset at least 0."
            )
        made = None if ids is None else _as_ids(ids)
        self._set(made, step, offset, _Store(), False, bool(trusted))

    def _set(
        self,
        ids: torch.Tensor | None,
        step: int,
        offset: int,
        store: _Store,
        fleeting: bool,
        trusted: bool,
    ) -> None:
        # Plain attributes: every call reads them, and asking a tensor each time is dear.
        self.ids = ids
        self.step = step
        self.offset = offset
        self._store = store
        self.length = None if ids is None else ids.numel() * step - offset
        self.on_host = ids is None or ids.is_cpu
        self.plan_step = 0 if ids is None else step
        self.fleeting = fleeting
        self.trusted = trusted
        self._served: tuple[torch.device, frozenset[torch.dtype]] | None = None
        self._placed: Index | None = None  # what `placed` answered to that; None: this one

    @classmethod
    def of(cls, index: Ids | None, step: int = 1) -> Index:
        """An index as it is; None as consecutive slots; ids of ``step`` tokens, for one call."""
        if isinstance(index, Index):
            return index
        if index is None:
            return _CONSECUTIVE
        made = cls(index, step)
        made.fleeting = True
        return made

    @classmethod
    def joined(cls, ranges: Sequence[tuple[Index, int]]) -> Index:
        """The first ``count`` positions of several indices, one behind the other, as slots."""
        pieces = [
            torch.from_numpy(index.slots(count))
            if index.ids is None or index.step > 1
            else index.ids[index.offset : index.offset + count]
            for index, count in ranges
        ]
        home = next((piece.device for piece in pieces if not piece.is_cpu), _HOST)
        return cls(torch.cat([piece.to(home, torch.int64) for piece in pieces]))

    @classmethod
    def of_requests(
        cls,
        tables: torch.Tensor,
        lengths: IdList,
        step: int,
        *,
        first: IdList | None = None,
        front: IdList | None = None,
        count: int | None = None,
        trusted: bool = False,
    ) -> Index:
        """The tokens of several requests, one request behind the other, as slots. If all tensors
        are on a device and ``count`` is told, the host waits for nothing, and it can be captured
        into a graph; lengths or first tokens on the host are copied there, behind its work.

        Args:
            tables: block ids ``[requests, blocks]``, int32 or int64, on host or device; what lies
                behind the last block of a request is not looked at. There may be no requests.
            lengths: tokens of each request ``[requests]``. One below 0 on a device is 0.
            step: tokens of a block.
            first: tokens of each request that are passed over, ``[requests]``; None: none are.
            front: positions in front of the first request, which are skipped, ``[1]``; None: 0.
            count: positions in all; None: the sum of them and the lengths. Those past are skipped.
            trusted: as for the constructor; then no position may be skipped.

        Raises:
            SlotError: other dtypes or shapes; a length or first token below 0 on the host, or
                anywhere without ``count``; with tables on the host, a request that is longer than
                its table. On a device the copy raises it for tokens outside of a table.
        """
        kind = type(tables).__name__
        dense = isinstance(tables, torch.Tensor)
        if dense and (tables.is_nested or tables.layout is not torch.strided):
            kind = "nested or sparse tensor"
            dense = False
        if not dense or tables.dim() != 2 or tables.dtype not in _DTYPES:
            if dense:
                kind = f"{tables.dtype} tensor of shape {tuple(tables.shape)}"
            raise SlotError(
                f"Tables of requests were given as a {kind}; expected block ids [requests, blocks] "
                f"in an int32 or int64 tensor."
            )
        requests, blocks = tables.shape
        with suppress(TypeError):
            step = whole_number(step)
            count = None if count is None else whole_number(count)
        if not (isinstance(step, int) and isinstance(count or 0, int) and step > 0 <= (count or 0)):
            raise SlotError(
                f"Requests of step={step!r} and count={count!r} were asked for; expected integers, "
                f"step at least 1 and count at least 0."
            )
        _as_ids(tables.reshape(-1))  # inside torch.vmap and its like there are none
        sizes = _as_ids(lengths)
        begins = torch.zeros_like(sizes) if first is None else _as_ids(first)
        ahead = sizes[:0] if front is None else _as_ids(front)
        alike = len(sizes) == len(begins) == requests and len(ahead) == (front is not None)
        if not alike or (requests and not blocks):
            raise SlotError(
                f"{len(sizes)} lengths, {len(begins)} first tokens and {len(ahead)} front were "
                f"given for tables of shape {tuple(tables.shape)}; expected one of each for each "
                f"request, one front or none, and at least one block."
            )
        waits = tables.is_cpu or count is None
        if any(bool((x < 0).any()) for x in (sizes, begins, ahead) if waits or x.is_cpu):
            raise SlotError("Lengths, first or front below 0 were given; pass numbers from 0 on.")
        if not requests:
            number = int(ahead.sum()) if count is None else count
            skipped = torch.full((number,), -1, dtype=torch.int64, device=tables.device)
            return cls(skipped, trusted=trusted)
        begins = begins.to(tables.device, torch.int64)
        sizes = sizes.to(tables.device, torch.int64).clamp(min=0)
        ahead = ahead.to(tables.device, torch.int64)
        ends = sizes.cumsum(0) if front is None else sizes.cumsum(0) + ahead
        at = torch.arange(int(ends[-1]) if count is None else count, device=tables.device)
        request = torch.searchsorted(ends, at, right=True)
        inside = request < requests
        request = request.clamp(max=requests - 1)
        if front is not None:
            inside &= at >= ahead
        token = at + (begins - ends + sizes)[request]
        block = token // step
        ids = tables[request, block.clamp(0, blocks - 1)].long()
        slots = torch.where(ids < 0, -1, ids.clamp(max=_WILD // step) * step + token % step)
        # Those past their table a copy refuses, or moves nothing for.
        past = inside & ((block < 0) | (block >= blocks))
        if tables.is_cpu and bool(past.any()):
            longest = int(request[past.nonzero()[0, 0]])
            raise SlotError(
                f"Request {longest} has {int(begins[longest] + sizes[longest])} tokens, but its "
                f"table covers {blocks} blocks x {step}; pass a wider table or shorter lengths."
            )
        slots = torch.where(past, _WILD, slots)
        return cls(torch.where(inside, slots, -1), trusted=trusted)

    def _derived(self, ids: torch.Tensor | None, offset: int, store: _Store | None = None) -> Index:
        """An index of the same list, or with ``store`` of a part of it."""
        index = Index.__new__(Index)
        index._set(ids, self.step, offset, store or self._store, self.fleeting, self.trusted)
        return index

    def shifted(self, tokens: int) -> Index:
        """This index from position ``tokens`` on; shares ids and copies."""
        return self._derived(self.ids, self.offset + tokens) if tokens else self

    def without_repeats(self, count: int | None = None) -> Index:
        """This index with each slot named once. Of equal ids the last one stays and the others
        become padding, so that a destination that was named several times is written by the last
        position that names it. An id that an offset or a count cuts stands for all of its slots.

        On a device the host does not wait for it; but those ids are trusted no longer, so that a
        backend that does not skip negative ids itself waits when it copies.

        Args:
            count: positions of the copy, if it moves fewer than the index covers: ids behind them
                are left out, so that none stays in place of one that is moved.

        Raises:
            SlotError: a count that is no whole number of at least 0.
        """
        if count is not None:
            if not isinstance(count, (int, np.integer)) or count < 0:
                raise SlotError(
                    f"An index without repeats was asked for count={count!r}; expected a whole "
                    f"number of at least 0."
                )
            if count < (self.length or 0):
                return self.part(0, int(count)).without_repeats()
        if self.ids is None:
            return self
        if self.on_host:
            result = self.host_ids()
            if not _repeats(result):
                return self
            _, behind = np.unique(result[::-1], return_index=True)
            last = result.size - 1 - behind
            retained = np.full_like(result, -1)
            retained[last] = result[last]
            ids = torch.from_numpy(retained)
        else:
            order = self.ids.argsort(stable=True)
            ordered = self.ids[order]
            again = torch.zeros_like(ordered, dtype=torch.bool)
            again[:-1] = ordered[1:] == ordered[:-1]
            ids = torch.empty_like(ordered).scatter_(0, order, ordered.masked_fill(again, -1))
        index = self._derived(ids, self.offset, _Store())
        index.trusted = False
        return index

    def part(self, first: int, count: int) -> Index:
        """``count`` positions from ``first`` on, without the other ids; shares their copies."""
        if self.ids is None:
            return self.shifted(first)
        q = self.offset + first
        buffer = slice(q // self.step, -(-(q + count) // self.step))
        store = _Store()
        store.array = None if self._store.array is None else self._store.array[buffer]
        store.copies = [copy[buffer] for copy in self._store.copies]
        return self._derived(self.ids[buffer], q % self.step, store)

    @property
    def ids_token(self) -> object:
        """One object that stands for the list of ids in a key; None without ids."""
        return None if self.ids is None else self._store.token

    def ids_on(self, home: torch.device, dtypes: frozenset[torch.dtype] = _ANY) -> torch.Tensor:
        """The ids, contiguous, on ``home`` and in one of ``dtypes``; of host ids copied once.

        Raises:
            Unsupported: only int32 is read, and an id is larger.
        """
        result = self._found(home, dtypes)
        if result is not None:
            return result
        assert self.ids is not None
        ids = self.ids
        if ids.dtype not in dtypes and torch.int64 not in dtypes:
            largest = int(self.host_ids().max(initial=0)) if self.on_host else 0
            if largest > _INT32:
                raise Unsupported(
                    f"An index with id {largest}",
                    "the backend reads int32 ids only; use another backend",
                )
            ids = ids.clamp(-1, _INT32).to(torch.int32)  # what is bad stays so
        ids = ids.to(home, ids.dtype if ids.dtype in dtypes else torch.int64).contiguous()
        if self.on_host:
            # A copy made from device ids is ordered on one stream only, so it is not kept.
            self._store.copies.append(ids)
        return ids

    def has_ids_on(self, home: torch.device, dtypes: frozenset[torch.dtype]) -> bool:
        """True if `ids_on` copies nothing."""
        return self.ids is None or self._found(home, dtypes) is not None

    def add_copy(self, ids: torch.Tensor) -> None:
        """Keep a contiguous copy of the ids, made elsewhere, for `ids_on` to find."""
        self._store.copies.append(ids)

    def _found(self, home: torch.device, dtypes: frozenset[torch.dtype]) -> torch.Tensor | None:
        assert self.ids is not None
        for ids in (self.ids, *self._store.copies):
            if ids.device == home and ids.dtype in dtypes and ids.is_contiguous():
                return ids
        return None

    def placed(self, home: torch.device, dtypes: frozenset[torch.dtype]) -> Index:
        """This index with its ids where `ids_on` puts them."""
        served = self._served
        if served is not None and served[0] is home and served[1] is dtypes:
            return self._placed or self  # the same launch asks again and again
        ids = self.ids
        if ids is None:
            return self
        right = ids.device == home and ids.dtype in dtypes and ids.is_contiguous()
        placed = None if right else self._derived(self.ids_on(home, dtypes), self.offset)
        if right or self.on_host:
            self._served = (home, dtypes)
            self._placed = placed
        return placed or self

    def to_host(self) -> Index:
        """This index with its ids on the host; waits for the device if they are there."""
        if self.on_host:
            return self
        return self._derived(torch.from_numpy(self.host_ids()), self.offset)

    def host_ids(self) -> npt.NDArray[np.int64]:
        """The ids as a contiguous int64 array on the host; waits for a device that has them."""
        store = self._store
        if store.array is None:
            assert self.ids is not None
            ids = self.ids if self.on_host else self.ids.cpu()
            store.array = np.ascontiguousarray(ids.numpy(), dtype=np.int64)
        return store.array

    def known_ids(self) -> npt.NDArray[np.int64] | None:
        """As `host_ids`, if that waits for nothing; else None."""
        return self.host_ids() if self.ids is not None and self.on_host else self._store.array

    def units(self, count: int, unit: int, device: torch.device) -> torch.Tensor:
        """For each of ``count // unit`` units its number (slot // unit), int64 ``[units]``;
        negative if the id is; without ids counted from the first position, which may be any."""
        first = self.offset // unit
        per_id = self.step // unit
        if self.ids is not None and per_id == 1:
            return self.ids_on(device)[first : first + count // unit].long()
        at = torch.arange(first, first + count // unit, dtype=torch.int64, device=device)
        if self.ids is None:
            return at
        # Clamped before it is multiplied, so that a wild id stays wild.
        wide = self.ids_on(device).long().clamp(-1, _WILD // self.step)
        return wide[at // per_id] * per_id + at % per_id

    def slots(self, count: int, every: int = 1) -> npt.NDArray[np.int64]:
        """Slots of ``count`` positions, or each ``every``-th, on the host; negative if skipped."""
        at = np.arange(self.offset, self.offset + count, every, dtype=np.int64)
        if self.ids is None:
            return at
        ids = np.clip(self.host_ids()[at // self.step], -1, _WILD // self.step)
        return np.where(ids < 0, -1, ids * self.step + at % self.step)

    def check_length(self, count: int, slots: int, side: str) -> None:
        """Raise `SlotError` if ``count`` positions run past the list, or past a view of
        ``slots`` slots that is read without ids."""
        if self.ids is None and self.offset + count > slots:
            raise SlotError(
                f"{count} tokens from {self.offset} on were asked of the {side}, which holds "
                f"{slots} tokens; pass a larger buffer or a smaller range."
            )
        if self.ids is not None and self.length is not None and count > self.length:
            raise SlotError(
                f"{count} positions from {self.offset} on were asked of the {side} index, which "
                f"covers {self.ids.numel()} ids x {self.step} tokens; pass a longer list or a "
                f"smaller range."
            )

    def check(self, count: int, slots: int, side: str, *, distinct: bool = False) -> bool:
        """Validate host ids for ``count`` positions in a view of ``slots`` slots; remembered.

        Returns:
            True if an id is negative, so that positions are to be skipped; False also without ids
            and for ids on a device.

        Raises:
            SlotError: a slot past the end, or with ``distinct`` one that occurs twice.
        """
        if self.ids is None or not self.on_host:
            return False
        key = (self.offset, count, slots, distinct)
        known = self._store.checked.get(key)
        if known is not None:
            return known
        used = self.host_ids()[self.offset // self.step : -(-(self.offset + count) // self.step)]
        skips = False
        if used.size:
            # Read as unsigned a negative id is huge, so one pass shows whether all are in range.
            odd = (int(np.maximum.reduce(used.view(np.uint64))) + 1) * self.step > slots
            skips = odd and bool(used.min() < 0)
            twice = distinct and used.size > 1 and _repeats(used[used >= 0] if skips else used)
            if odd or twice:
                self._check_slots(count, slots, side, twice)
        self._store.remember(key, skips)
        return skips

    def checked_copy(
        self, first: int, count: int, slots: int, distinct: bool
    ) -> torch.Tensor | None:
        """The newest copy elsewhere of host ids, if `check` found them good from ``first`` on."""
        store = self._store
        if (first, count, slots, distinct) not in store.checked or not store.copies:
            return None
        return store.copies[-1]

    def mark_clean(self, count: int, slots: int) -> None:
        """Remember that ids on a device were found clean: neither negative nor past the end."""
        self._store.remember((self.offset, count, slots, None), False)

    def is_clean(self, count: int, slots: int) -> bool:
        """True if ids need no guard: they are on the host, trusted, or were marked clean."""
        return (
            self.on_host or self.trusted or (self.offset, count, slots, None) in self._store.checked
        )

    def _check_slots(self, count: int, slots: int, side: str, distinct: bool) -> None:
        expanded = self.slots(count)
        past = np.flatnonzero(expanded >= slots)
        if past.size:
            at = int(past[0])
            of = ""
            if self.step > 1:
                slot_id = int(self.host_ids()[(at + self.offset) // self.step])
                of = f" (of id {slot_id}, {self.step} slots each)"
            raise SlotError(
                f"Position {at} of the {side} index is slot {int(expanded[at])}{of}, but the view "
                f"has {slots} slots (0 to {slots - 1}); nothing was moved. Correct the index."
            )
        values, times = np.unique(expanded[expanded >= 0], return_counts=True)
        if distinct and (times > 1).any():
            at = int(np.argmax(times > 1))
            raise SlotError(
                f"Slot {int(values[at])} occurs {int(times[at])} times in the {side} index; each "
                f"may occur once there. Nothing was moved."
            )

    def __repr__(self) -> str:
        ids = "None" if self.ids is None else f"<{self.ids.numel()} ids on {self.ids.device}>"
        return f"Index({ids}, step={self.step}, offset={self.offset})"


_CONSECUTIVE = Index()  # what None stands for; without ids nothing of a copy stays in it


def _as_ids(ids: object) -> torch.Tensor:
    """Ids as a dense tensor of one dimension, which a list and an array become."""
    if isinstance(ids, (list, tuple, range)):
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
                raise SlotError(
                    f"An index holds integers, but {each!r} was found; pass slot numbers."
                )
        try:
            ids = np.array(ids, dtype=np.int64)
        except OverflowError:
            raise SlotError(
                "An index with a number of more than 64 bits was given; expected slot numbers."
            ) from None
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind != "i" or ids.dtype.itemsize not in (4, 8):
            raise SlotError(
                f"An index of dtype {ids.dtype} was given; expected int32 or int64. Convert it "
                f"with .astype('int64') if it really holds slot numbers."
            )
        # Torch takes neither negative strides, nor foreign byte orders, nor read-only memory.
        native = np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("="))
        # To numpy an array of one number is contiguous whatever its stride.
        plain = native.flags.writeable and min(native.strides, default=0) >= 0
        ids = torch.from_numpy(native if plain else native.copy())
    if not isinstance(ids, torch.Tensor):
        raise SlotError(
            f"An index is a tensor, an array or a list of integers, but a {type(ids).__name__} "
            f"was given."
        )
    if ids.dtype not in _DTYPES:
        raise SlotError(
            f"An index of dtype {ids.dtype} was given; expected torch.int32 or torch.int64. "
            f"Convert it with .to(torch.int64) if it really holds slot numbers."
        )
    if ids.is_nested or ids.layout is not torch.strided:
        kind = "nested" if ids.is_nested else str(ids.layout).removeprefix("torch.")
        raise SlotError(f"An index is a dense tensor, but a {kind} one was given; pass its slots.")
    if ids.dim() != 1:
        raise SlotError(
            f"An index of shape {tuple(ids.shape)} was given; expected one dimension. Flatten it."
        )
    if ids.is_meta:
        raise SlotError(
            "An index on device meta was given, which holds no ids; expected ids on the host or a "
            "device."
        )
    if not address_of(ids) and ids.numel():
        raise SlotError(
            "An index without memory of its own was given, as inside torch.vmap; call the copy "
            "outside of function transforms."
        )
    return ids


def _repeats(used: npt.NDArray[np.int64]) -> bool:
    """Whether a number occurs twice."""
    if used.size <= 64:
        return len(set(used.tolist())) < used.size
    most = int(np.maximum.reduce(used.view(np.uint64)))  # of a negative one it is huge
    if most < 64 * used.size:  # marks, a byte each: of 16,384 ids 20 - 72 us, a sort 460
        (seen := np.zeros(most + 1, np.bool_))[used] = True
        return int(np.count_nonzero(seen)) < used.size
    ordered = np.sort(used)
    return bool((ordered[1:] == ordered[:-1]).any())
