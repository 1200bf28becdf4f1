# SPDX-License-Identifier: Apache-2.0
"""Index lists: the slot of each position, for one side of a copy.

Position ``p``, with ``q = p + offset``, is slot ``ids[q // step] * step + q % step``; without ids
it is slot ``q``. ``step=1`` is a slot mapping, ``step=block_size`` a block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import as_whole, flag, kind_of, shown
from portakv.core import ids as core
from portakv.errors import SlotError, Unsupported
from portakv.view.bound import address_of

# ------------------------------------------------------------------------------------------------
# Lists of ids as tensors: their types, and which are refused.

IdList: TypeAlias = "torch.Tensor | npt.NDArray[np.signedinteger[Any]] | Sequence[int]"
ID_DTYPES = (torch.int64, torch.int32)
#: A slot past the end of any view, and far from where 64 bits overflow.
PAST_ANY_VIEW = 2**62
#: The most tokens of an id.
MOST_STEP = 2**31 - 1
_INT64 = np.dtype(np.int64)


def as_ids(ids: object) -> torch.Tensor:
    """Return ids as a dense tensor of one dimension; a list or an array becomes one.

    Raises:
        SlotError: another type, dtype or rank, or a tensor that owns no memory.
    """
    if isinstance(ids, (list, tuple, range)):
        return _tensor_of_list(ids if type(ids) is list else list(ids))
    if isinstance(ids, np.ndarray):
        return _tensor_of(ids)
    if isinstance(ids, torch.Tensor):
        _check_tensor(ids)
        return ids
    raise SlotError(
        f"Expected an index as a tensor, an array or a list of integers, got {kind_of(ids)}. "
        f"Convert it to one of these."
    )


def _tensor_of_list(listed: list[Any]) -> torch.Tensor:
    result = core.read_list(listed)
    if result is not None:
        return result[0]
    for each in listed:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
            raise SlotError(f"Expected integers in an index, got {shown(each)}. Pass ids.")
    try:
        return torch.from_numpy(np.array(listed, dtype=np.int64))
    except OverflowError:
        raise SlotError(
            "Expected integers of at most 64 bits in an index, got a larger number. Pass ids that "
            "the view has."
        ) from None


def _tensor_of(ids: npt.NDArray[Any]) -> torch.Tensor:
    if ids.dtype is _INT64 and ids.strides == (8,) and ids.flags.writeable:
        return torch.from_numpy(ids)
    if ids.dtype.kind != "i" or ids.dtype.itemsize not in (4, 8):
        raise SlotError(
            f"Expected an index of int32 or int64, got dtype {ids.dtype}. Convert it with "
            f".astype('int64') if it holds ids."
        )
    # Torch takes neither negative strides, nor other byte orders, nor read-only memory.
    native = np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("="))
    # To numpy an array of one number is contiguous with any stride.
    plain = native.flags.writeable and min(native.strides, default=0) >= 0
    tensor = torch.from_numpy(native if plain else native.copy())
    _check_dimensions(tensor)
    return tensor


def _check_tensor(ids: torch.Tensor) -> None:
    if ids.dtype not in ID_DTYPES:
        raise SlotError(
            f"Expected an index of torch.int32 or torch.int64, got dtype {ids.dtype}. Convert it "
            f"with .to(torch.int64) if it holds ids."
        )
    if ids.is_nested or ids.layout is not torch.strided:
        kind = "nested" if ids.is_nested else str(ids.layout).removeprefix("torch.")
        raise SlotError(f"Expected a dense tensor as an index, got a {kind} one. Pass its slots.")
    if ids.is_neg():
        raise SlotError(
            "Expected an index whose bytes are its ids, got a lazily negated tensor. Pass "
            "tensor.resolve_neg()."
        )
    _check_dimensions(ids)
    if ids.is_meta:
        raise SlotError(
            "Expected an index on the host or a device, got one on device meta, which holds no "
            "ids. Make the index where its ids are."
        )
    number = ids.numel()
    if not address_of(ids) and number:
        raise SlotError(
            "Expected an index with memory, got one that owns no memory, as inside torch.vmap. "
            "Call the copy outside of function transforms."
        )
    # The storage may have been resized.
    past = ids.storage_offset() + ids.stride(0) * (number - 1) + 1
    if number and past * ids.itemsize > ids.untyped_storage().nbytes():
        raise SlotError(
            f"Expected an index whose storage holds its {number} ids, got one whose storage was "
            f"resized to {ids.untyped_storage().nbytes()} bytes. Make the index again."
        )


def _check_dimensions(ids: torch.Tensor) -> None:
    if ids.dim() != 1:
        raise SlotError(
            f"Expected an index of one dimension, got shape {tuple(ids.shape)}. Flatten it."
        )


# ------------------------------------------------------------------------------------------------
# The slots of several requests, from their block tables: `Index.of_requests`.


def request_slots(
    tables: torch.Tensor,
    lengths: IdList,
    step: int,
    first: IdList | None,
    front: IdList | None,
    count: int | None,
) -> torch.Tensor:
    """Return a slot for each position, -1 if it is skipped; see `Index.of_requests`."""
    _check_tables(tables)
    step, count = _whole_terms(step, count)
    as_ids(tables.reshape(-1))  # raises if torch.vmap or a similar transform hides the numbers
    requests = len(tables)
    sizes = as_ids(lengths)
    begins = torch.zeros_like(sizes) if first is None else as_ids(first)
    ahead = None if front is None else as_ids(front)
    _check_numbers(tables, sizes, begins, ahead, count)

    if not requests:
        if count is None:
            count = 0 if ahead is None else int(ahead.sum())
        return torch.full((count,), -1, dtype=torch.int64, device=tables.device)
    begins = begins.to(tables.device, torch.int64)
    sizes = sizes.to(tables.device, torch.int64).clamp(min=0)
    if ahead is not None:
        ahead = ahead.to(tables.device, torch.int64)
    return _slots_at(tables, step, sizes, begins, ahead, count)


def _check_tables(tables: torch.Tensor) -> None:
    kind = kind_of(tables)
    if isinstance(tables, torch.Tensor):
        if tables.is_nested or tables.layout is not torch.strided:
            kind = "a nested or sparse tensor"
        elif tables.dim() == 2 and tables.dtype in ID_DTYPES:
            return
        else:
            kind = f"a {tables.dtype} tensor of shape {tuple(tables.shape)}"
    raise SlotError(
        f"Expected tables of requests as block ids [requests, blocks] in an int32 or int64 tensor, "
        f"got {kind}. Convert them to such a tensor."
    )


def _whole_terms(step: int, count: int | None) -> tuple[int, int | None]:
    """Return ``step`` and ``count`` as integers; raise `SlotError` if they are not."""
    tokens = as_whole(step)
    positions = 0 if count is None else as_whole(count)
    if tokens is None or not 0 < tokens <= MOST_STEP or positions is None or positions < 0:
        raise SlotError(
            f"Expected requests with an integer step of at least 1 and an integer count of at "
            f"least 0, got step={step!r} and count={count!r}. Pass such integers."
        )
    return tokens, None if count is None else positions


def _check_numbers(
    tables: torch.Tensor,
    sizes: torch.Tensor,
    begins: torch.Tensor,
    front: torch.Tensor | None,
    count: int | None,
) -> None:
    """Raise `SlotError` unless each request has a length, a first token and a block; also for a
    number below 0, unless the host would have to wait for a device."""
    requests, blocks = tables.shape
    fronts = 0 if front is None else len(front)
    one_each = len(sizes) == len(begins) == requests
    one_front = front is None or fronts == 1
    if not one_each or not one_front or (requests and not blocks):
        raise SlotError(
            f"Expected one length and one first token for each request, one front or None, and at "
            f"least one block, got {len(sizes)} lengths, {len(begins)} first tokens and {fronts} "
            f"front for tables of shape {tuple(tables.shape)}. Pass one of each for each request."
        )
    waits = tables.is_cpu or count is None
    for numbers in (sizes, begins, front):
        if numbers is None or not (waits or numbers.is_cpu):
            continue
        if bool((numbers < 0).any()):
            raise SlotError(
                "Expected lengths, first and front of at least 0, got a number below 0. Pass "
                "numbers from 0 on."
            )


def _slots_at(
    tables: torch.Tensor,
    step: int,
    sizes: torch.Tensor,
    begins: torch.Tensor,
    front: torch.Tensor | None,
    count: int | None,
) -> torch.Tensor:
    """Return the slots of requests whose numbers lie with their tables; see `request_slots`."""
    # The request of each position, and the token of that request.
    ends = sizes.cumsum(0) if front is None else sizes.cumsum(0) + front
    at = torch.arange(int(ends[-1]) if count is None else count, device=sizes.device)
    request = torch.searchsorted(ends, at, right=True)
    inside = request < len(sizes)
    request = request.clamp(max=len(sizes) - 1)
    if front is not None:
        inside &= at >= front
    token = at + (begins - ends + sizes)[request]

    blocks = tables.shape[1]
    block = token // step
    ids = tables[request, block.clamp(0, blocks - 1)].long()
    slots = torch.where(ids < 0, -1, ids.clamp(max=PAST_ANY_VIEW // step) * step + token % step)

    # A token outside of its table gets a slot past the end: the copy rejects or skips it.
    past = inside & ((block < 0) | (block >= blocks))
    if tables.is_cpu and bool(past.any()):
        longest = int(request[past.nonzero()[0, 0]])
        raise SlotError(
            f"Expected a table of at least {int((begins + sizes)[longest])} tokens for request "
            f"{longest}, got {blocks} blocks x {step}. Pass a wider table or shorter lengths."
        )
    slots = torch.where(past, PAST_ANY_VIEW, slots)
    return torch.where(inside, slots, -1)


#: Slots or blocks: int32 or int64, one dimension, on host or device.
Ids: TypeAlias = "Index | IdList"
_ANY = frozenset(ID_DTYPES)
_HOST = torch.device("cpu")
_MOST_INT32 = 2**31 - 1
_MOST = 256  # ranges that are marked clean in one list of ids


class _Store:
    """Share the copies of one list among all of its indices."""

    array: npt.NDArray[np.int64] | None = None  # the ids, contiguous and on the host

    def __init__(self, array: npt.NDArray[np.int64] | None = None) -> None:
        if array is not None:
            self.array = array
        # The ids, contiguous, in other places or dtypes.
        self.copies: list[torch.Tensor] = []
        # The ranges that passed a check: offset, count, slots, and of ids on the host, whether they
        # were checked for repeats.
        self.clean: set[tuple[int, ...]] = set()

    def keep(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first array that any thread kept: no later one takes its place, since the
        core reads it by its address."""
        return vars(self).setdefault("array", array)  # type: ignore[no-any-return]


class Index:
    """An index list. Its contents must not change after it is made: copies on both sides are
    cached. The first copy of ids to a device may wait for the current stream there. Ids that a
    call takes as a list, an array or a tensor never wait.

    Args:
        ids: int32 or int64, one dimension, on host or device, contiguous or not (a tensor, a numpy
            array or a list of int); negative ids are padding and skip their positions. None:
            consecutive slots.
        step: tokens for each id.
        offset: tokens of the first id that are passed over.
        trusted: the caller promises that ids on a device are neither negative nor past the end, so
            that no copy waits for the device to check them. A kernel that skips and guards still
            moves nothing for a bad id; the result of other kernels is then undefined. Ids on the
            host are checked all the same. Strategies that need ids on the host read the ids of a
            device there once, if the terms of a transfer leave no other strategy.

    Attributes:
        length: positions that the ids cover; None without ids.
        on_host: True if ids can be validated before launch.
        trusted: ids on a device are clean by promise.

    Raises:
        SlotError: another dtype (float and bool included), rank, or a bad step or offset.
    """

    # plan_step: the step that a plan is made for: ``step``, or 0 without ids.
    # temporary: a caller's ids for one call, which are not used again.
    __slots__ = (
        "_store",
        "ids",
        "length",
        "offset",
        "on_host",
        "plan_step",
        "step",
        "temporary",
        "trusted",
    )

    def __init__(
        self, ids: IdList | None = None, step: int = 1, offset: int = 0, *, trusted: bool = False
    ) -> None:
        tokens = step if type(step) is int else as_whole(step)
        passed_over = offset if type(offset) is int else as_whole(offset)
        if tokens is None or not 0 < tokens <= MOST_STEP or passed_over is None or passed_over < 0:
            raise SlotError(
                f"Expected an integer step from 1 to {MOST_STEP} and an integer offset of at least "
                f"0, got Index(step={step!r}, offset={offset!r}). Pass such numbers."
            )
        made = None if ids is None else as_ids(ids)
        self._set(made, tokens, passed_over, _Store(), False, flag("trusted", trusted))

    def _set(
        self,
        ids: torch.Tensor | None,
        step: int,
        offset: int,
        store: _Store,
        temporary: bool,
        trusted: bool,
    ) -> None:
        # Plain attributes, since every call reads them and a property of a tensor takes longer.
        self.ids = ids
        self.step = step
        self.offset = offset
        self._store = store
        self.temporary = temporary
        self.trusted = trusted
        self.length: int | None = None
        self.on_host = True
        self.plan_step = 0
        if ids is None:
            return
        self.length = ids.numel() * step - offset
        self.on_host = ids.is_cpu
        self.plan_step = step

    @classmethod
    def of(cls, index: Ids, step: int = 1) -> Index:
        """Return an index as it is, and ids of ``step`` tokens as an index for one call.

        Raises `SlotError` for ids that the constructor refuses, and for None.
        """
        if isinstance(index, Index):
            return index
        if index is None:
            raise SlotError("Expected ids, got None. Pass Index() for consecutive slots.")
        if type(step) is not int or not 0 < step <= MOST_STEP:
            step = cls(None, step).step  # as a whole number, or its error
        return cls.checked(as_ids(index), step)

    @classmethod
    def checked(cls, ids: torch.Tensor, step: int) -> Index:
        """Return an index for one call of ids that are not checked."""
        index = cls.__new__(cls)
        index._set(ids, step, 0, _Store(), True, False)
        return index

    @classmethod
    def joined(cls, ranges: Sequence[tuple[Index, int]]) -> Index:
        """Join the first ``count`` positions of several indices, one after the other, as slots."""
        pieces = [
            torch.from_numpy(index.slots(count))
            if index.ids is None or index.step > 1
            else index.ids[index.offset : index.offset + count]
            for index, count in ranges
        ]
        device = next((piece.device for piece in pieces if not piece.is_cpu), _HOST)
        return cls(torch.cat([piece.to(device, torch.int64) for piece in pieces]))

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
        """Make an index of the tokens of several requests, one request after the other, as slots.

        If all tensors are on a device and ``count`` is passed, the host waits for nothing, and the
        call can be captured into a graph. Lengths or first tokens on the host are copied to the
        device, ordered after its work.

        Args:
            tables: block ids ``[requests, blocks]``, int32 or int64, on host or device; ids after
                the last block of a request are not read. There may be no requests.
            lengths: tokens of each request ``[requests]``. Below 0 on a device counts as 0.
            step: tokens of a block.
            first: tokens of each request that are passed over, ``[requests]``; None: 0 for each.
            front: positions in front of the first request, which are skipped, ``[1]``; None: 0.
            count: number of positions; None: the sum of front and lengths. Later ones are skipped.
            trusted: as for the constructor; then no position may be skipped.

        Raises:
            SlotError: other dtypes or shapes; a length or first token below 0 on the host, or
                anywhere without ``count``; with tables on the host, a request that is longer than
                its table. On a device the copy raises it for tokens outside of a table.
        """
        slots = request_slots(tables, lengths, step, first, front, count)
        return cls(slots, trusted=trusted)

    def _derived(
        self, ids: torch.Tensor | None, offset: int, store: _Store | None = None, step: int = 0
    ) -> Index:
        """Make an index of the same list, or with ``store`` of a part of it, or with a step."""
        index = Index.__new__(Index)
        kind = self.temporary, self.trusted
        index._set(ids, step or self.step, offset, store or self._store, *kind)
        return index

    def shifted(self, tokens: int) -> Index:
        """Return this index from position ``tokens`` on; it shares ids and copies."""
        return self._derived(self.ids, self.offset + tokens) if tokens else self

    def of_blocks(self, block_size: int) -> Index:
        """Return this index with each block as one position: its step, or ``block_size``, is 1.

        The offset is a whole number of blocks. Copies of the ids are shared.
        """
        store = _Store(self._store.array)
        store.copies = [*self._store.copies]  # those that there are
        return self._derived(self.ids, self.offset // block_size, store, 1)

    def without_repeats(self, count: int | None = None) -> Index:
        """Return this index with each slot named once.

        The last of equal ids stays and the others become padding. A destination that was named
        several times is then written by the last position that names it. An id that an offset or a
        count cuts stands for all of its slots.

        The host does not wait for ids on a device. But those ids are trusted no longer, so a
        backend that does not skip negative ids itself waits when it copies.

        Args:
            count: positions of the copy, if it moves fewer than the index covers. Later ids are
                left out, so that none of them replaces an id that is moved.

        Raises:
            SlotError: a count that is not a whole number of at least 0.
        """
        if count is not None:
            positions = as_whole(count)
            if positions is None or positions < 0:
                raise SlotError(
                    f"Expected a whole number of at least 0 as the count of an index without "
                    f"repeats, got count={count!r}. Pass the positions of the copy."
                )
            if positions < (self.length or 0):
                return self.part(0, positions).without_repeats()
        if self.ids is None:
            return self
        if self.on_host:
            retained = core.without_repeats(self.ids)
            if retained is None:
                return self
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
        """Return ``count`` positions from ``first`` on, without the other ids; the part shares
        their copies."""
        if self.ids is None:
            return self.shifted(first)
        q = self.offset + first
        used = slice(q // self.step, -(-(q + count) // self.step))
        array = self._store.array
        store = _Store(None if array is None else array[used])
        store.copies = [copy[used] for copy in self._store.copies]
        return self._derived(self.ids[used], q % self.step, store)

    def ids_on(self, device: torch.device, dtypes: frozenset[torch.dtype] = _ANY) -> torch.Tensor:
        """Return the ids, contiguous, on ``device`` and in one of ``dtypes``; host ids are copied
        once.

        Raises:
            Unsupported: only int32 is read, and an id is larger.
        """
        result = self._copy_on(device, dtypes)
        if result is not None:
            return result
        assert self.ids is not None
        ids = self.ids
        if ids.dtype not in dtypes and torch.int64 not in dtypes:
            largest = int(self.host_ids().max(initial=0)) if self.on_host else 0
            if largest > _MOST_INT32:
                raise Unsupported(
                    f"An index with id {largest}",
                    "the backend reads int32 ids only; use another backend",
                )
            ids = ids.clamp(-1, _MOST_INT32).to(torch.int32)  # an invalid id stays invalid
        ids = ids.to(device, ids.dtype if ids.dtype in dtypes else torch.int64).contiguous()
        if self.on_host:
            # A copy of device ids is ordered on one stream only, so it is not cached.
            self._store.copies.append(ids)
        return ids

    def checked_on(
        self, device: torch.device, offset: int, count: int, slots: int, distinct: bool
    ) -> torch.Tensor | None:
        """Return host ids on ``device``; None: for these positions they fail `check` or skip."""
        assert self.ids is not None
        if not 0 < count <= self.ids.numel() * self.step - offset:
            return None
        place = offset, count, slots, distinct
        if place not in self._store.clean:
            if core.check(self.ids, self.step, offset, count, slots, distinct) != core.CLEAN:
                return None
            self._mark(place)
        return self.ids_on(device)

    def has_ids_on(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> bool:
        """Return True if `ids_on` copies nothing."""
        return self.ids is None or self._copy_on(device, dtypes) is not None

    def add_copy(self, ids: torch.Tensor) -> None:
        """Cache a contiguous copy of the ids, made elsewhere, for `ids_on`."""
        self._store.copies.append(ids)

    def _copy_on(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> torch.Tensor | None:
        assert self.ids is not None
        for ids in (self.ids, *self._store.copies):
            if ids.device == device and ids.dtype in dtypes and ids.is_contiguous():
                return ids
        return None

    def placed(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> Index:
        """Return this index with its ids where `ids_on` puts them."""
        ids = self.ids
        if ids is None or (ids.device == device and ids.dtype in dtypes and ids.is_contiguous()):
            return self
        return self._derived(self.ids_on(device, dtypes), self.offset)

    def to_host(self) -> Index:
        """Return this index with its ids on the host; wait for the device if they are there."""
        if self.on_host:
            return self
        return self._derived(torch.from_numpy(self.host_ids()), self.offset)

    def apart(self) -> Index:
        """Return this index for a copy that goes on after its call. Temporary ids on the host are
        copied, since their caller may change them then."""
        if not (self.temporary and self.on_host) or self.ids is None:
            return self
        array = self.host_ids().copy()
        return self._derived(torch.from_numpy(array), self.offset, _Store(array))

    def host_ids(self) -> npt.NDArray[np.int64]:
        """Return the ids as a contiguous int64 array on the host; wait for a device with them."""
        store = self._store
        if store.array is None:
            assert self.ids is not None
            ids = self.ids if self.on_host else self.ids.cpu()
            return store.keep(np.ascontiguousarray(ids.numpy(), dtype=np.int64))
        return store.array

    def known_ids(self) -> npt.NDArray[np.int64] | None:
        """Return `host_ids` if that waits for nothing; else None."""
        return self.host_ids() if self.ids is not None and self.on_host else self._store.array

    def units(self, count: int, unit: int, device: torch.device) -> torch.Tensor:
        """Return the number (slot // unit) of each of ``count // unit`` units, int64 ``[units]``.

        The number is negative if the id is. Without ids it counts from the first position, which
        may be any.
        """
        first = self.offset // unit
        per_id = self.step // unit
        if self.ids is not None and per_id == 1:
            ids = self.ids_on(device)
            number = count // unit
            if first or number != ids.numel():
                ids = ids[first : first + number]
            return ids if ids.dtype is torch.int64 else ids.long()
        at = torch.arange(first, first + count // unit, dtype=torch.int64, device=device)
        if self.ids is None:
            return at
        # Clamp before the multiplication, so that an id past the end stays past the end.
        wide = self.ids_on(device).long().clamp(-1, PAST_ANY_VIEW // self.step)
        return wide[at // per_id] * per_id + at % per_id

    def slots(self, count: int, every: int = 1) -> npt.NDArray[np.int64]:
        """Return the slots of ``count`` positions, or of each ``every``-th, on the host; negative
        if skipped."""
        if self.ids is None:
            return np.arange(self.offset, self.offset + count, every, dtype=np.int64)
        ids = self.ids if self.on_host else torch.from_numpy(self.host_ids())
        return core.slots(ids, self.step, self.offset, count, every)

    def check_length(self, count: int, slots: int, side: str) -> None:
        """Raise `SlotError` if ``count`` positions run past the list, or past a view of
        ``slots`` slots that is read without ids."""
        if self.ids is None and self.offset + count > slots:
            raise SlotError(
                f"Expected a range of the {side}, which holds {slots} tokens, got {count} tokens "
                f"from {self.offset} on. Pass a larger buffer or a smaller range."
            )
        if self.ids is not None and self.length is not None and count > self.length:
            raise SlotError(
                f"Expected a range inside the {self.ids.numel()} ids x {self.step} tokens of the "
                f"{side} index, got {count} positions from {self.offset} on. Pass a longer list or "
                f"a smaller range."
            )

    def check(self, count: int, slots: int, side: str, *, distinct: bool = False) -> bool:
        """Validate host ids for ``count`` positions in a view of ``slots`` slots.

        Returns:
            True if an id is negative, so that positions are to be skipped; False also without ids
            and for ids on a device.

        Raises:
            SlotError: a slot past the end, or with ``distinct`` one that occurs twice.
        """
        code = self._check(count, slots, distinct)
        if code < 0:
            raise self._slot_error(count, slots, side, distinct)
        return code == core.NEGATIVE

    def check_named(self, name: str, count: int, slots: int, *, distinct: bool = False) -> bool:
        """Validate host ids as `check` does, for a list that a caller passed as ``name``.

        Raises:
            SlotError: names the argument, the id at fault and its place in the list.
        """
        code = self._check(count, slots, distinct)
        if code < 0:
            raise self._named_error(name, count, slots, distinct)
        return code == core.NEGATIVE

    def _check(self, count: int, slots: int, distinct: bool) -> int:
        """Return the core's code of ids on the host, which is below 0 for bad ids."""
        if self.ids is None or not self.on_host:
            return core.CLEAN
        return core.check(self.ids, self.step, self.offset, count, slots, distinct)

    def _slot_error(self, count: int, slots: int, side: str, distinct: bool) -> SlotError:
        """Return the error of the first slot past the view's ``slots`` slots, or else of the
        smallest that occurs twice."""
        assert self.ids is not None
        fault = core.fault(self.ids, self.step, self.offset, count, slots, distinct)
        of = ""
        if not fault.times:
            if self.step > 1:
                of = f" (of id {fault.id}, {self.step} slots each)"
            return SlotError(
                f"Expected the {side} index to stay inside the view's {slots} slots, got slot "
                f"{fault.slot}{of} at position {fault.position}; nothing was moved. Correct the "
                f"index: its last id is {slots // self.step - 1}."
            )
        if self.step > 1:
            of = f" (of id {fault.slot // self.step})"
        return SlotError(
            f"Expected each slot once in the {side} index, got slot {fault.slot}{of}, which occurs "
            f"{fault.times} times; nothing was moved. Name it once, or pass "
            f"Index.without_repeats(), which keeps the last."
        )

    def _named_error(self, name: str, count: int, slots: int, distinct: bool) -> SlotError:
        """Return the error of the first id that is past the view's ``slots`` slots, or else of the
        first that occurs twice."""
        assert self.ids is not None
        fault = core.fault(self.ids, self.step, self.offset, count, slots, distinct)
        one = "block" if self.step > 1 else "slot"
        if fault.past_place >= 0:
            return SlotError(
                f"Expected {name} to be ids from 0 to {slots // self.step - 1}, the {one}s of the "
                f"view, got {fault.past_id} at position {fault.past_place}. Correct this id."
            )
        return SlotError(
            f"Expected {name} to name each {one} once, got {fault.again_id} at positions "
            f"{fault.first_place} and {fault.again_place}. Name it once."
        )

    def skips(self, count: int, slots: int) -> bool:
        """Return True if ids that the host knows, and that passed `check`, skip positions."""
        if self.on_host:
            return self._check(count, slots, False) == core.NEGATIVE
        if self._store.array is None:
            return False
        ids = torch.from_numpy(self._store.array)
        return core.check(ids, self.step, self.offset, count, slots, False) == core.NEGATIVE

    def mark_clean(self, count: int, slots: int) -> None:
        """Note that a check of ids on a device passed: no id is negative or past the end."""
        if not self.on_host:
            self._mark((self.offset, count, slots))

    def _mark(self, place: tuple[int, ...]) -> None:
        if len(self._store.clean) >= _MOST:
            self._store.clean = set()
        self._store.clean.add(place)

    def is_clean(self, count: int, slots: int) -> bool:
        """Return True if ids need no guard: they are on the host, trusted, or were marked clean."""
        if self.on_host or self.trusted:
            return True
        return (self.offset, count, slots) in self._store.clean

    def __repr__(self) -> str:
        ids = "None" if self.ids is None else f"<{self.ids.numel()} ids on {self.ids.device}>"
        return f"Index({ids}, step={self.step}, offset={self.offset})"


def index_of(ids: Ids | None, step: int = 1) -> Index:
    """Return the index of a copy's argument: None stands for consecutive slots."""
    return CONSECUTIVE if ids is None else Index.of(ids, step)


CONSECUTIVE = Index()  # without ids a copy caches nothing in it
