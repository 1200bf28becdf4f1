# SPDX-License-Identifier: Apache-2.0
"""Raw memory, which is known by addresses alone: `KVView.at` reads it, and makes tensors over it.

Nothing here owns the memory or can check that it still exists; the caller promises that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from math import prod
from operator import mul, or_
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import as_whole, flag, shown
from portakv.errors import DeviceMismatch, LayoutError
from portakv.runtime import cuda, hip
from portakv.runtime.devices import usable_device, usual_device
from portakv.view.bound import BoundLayout, Facts, Spans, address_of, as_dtype, reach
from portakv.view.form import Form, widest_vector

#: Tokens of a view whose number of tokens is unknown: kernels count them in 32 bits.
UNKNOWN_SLOTS = 1 << 31
Addresses: TypeAlias = torch.Tensor | npt.NDArray[Any]
_ENDLESS = 1 << 62  # bytes from an address to an unknown end
_WORDS = (torch.int64, torch.uint64)
_HOST = torch.device("cpu")


class RawMemory(NamedTuple):
    """The memory at each address of a view: its dtype, and its number of bytes (0: unknown)."""

    dtype: torch.dtype
    nbytes: int

    def tensors(self, origins: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Make for each address a tensor over all of its memory, which owns nothing."""
        n = self.nbytes or _ENDLESS
        made = []
        # A tensor that is made in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            for origin in origins:
                storage = torch._C._construct_storage_from_data_pointer(origin, device, n)
                empty = torch.empty(0, dtype=self.dtype, device=device)
                made.append(empty.set_(storage, 0, (n // self.dtype.itemsize,), (1,)))
        return tuple(made)

    def spans(self, origins: Sequence[int]) -> Spans:
        """Return the spans of the memory, as `KVView.spans` does; none if its end is unknown.

        Those that touch are one: the tiles of a tensor, thousands, are then as quick to compare as
        the tensor.
        """
        if not (self.nbytes and origins):
            return []
        firsts = np.sort(np.array(origins, dtype=np.int64))
        begins = np.flatnonzero(np.append(True, np.diff(firsts) > self.nbytes))
        lasts = np.append(firsts[begins[1:] - 1], firsts[-1:])
        return list(zip(firsts[begins].tolist(), (lasts + self.nbytes).tolist(), strict=True))


class _Request(NamedTuple):
    """The terms that determine the form of raw memory."""

    bound: BoundLayout
    #: The extent of each container level.
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    place: str
    alignment: int
    #: True if only a device has the addresses.
    on_device: bool


class _Known(NamedTuple):
    """The form of raw memory, without addresses."""

    form: Form
    slots: int
    #: Extents and strides in which the table goes through the addresses; None: in their order.
    walk: tuple[list[int], list[int]] | None
    #: Bytes of the tensor at an address; 0: unknown.
    nbytes: int


def read_addresses(
    bound: BoundLayout,
    addresses: object,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    pinned: bool | None,
) -> tuple[Facts, RawMemory, torch.Tensor | None]:
    """Read tensors of one shape at addresses; arguments and errors are those of `KVView.at`.

    Returns the facts of a view, without origins if only a device knows the addresses; the memory;
    and the table that the device then has. The tensors that own the memory and its spans follow
    from the addresses when needed.
    """
    dtype = as_dtype(dtype)
    if pinned is not None:
        flag("pinned", pinned)
    if not isinstance(addresses, torch.Tensor):
        addresses = _as_array(addresses)
    if device is None:
        target, reported = _driver_device(bound, addresses)
        pinned = reported if pinned is None else pinned
    else:
        target = _named_device(device)
    if target.type == "meta":
        raise LayoutError(
            f"Expected a device with memory for the addresses of {bound.layout.text!r}, got meta. "
            f"With device=, name the device where the memory is."
        )
    shape = _whole_numbers("shape", shape)
    strides = None if strides is None else _whole_numbers("strides", strides)
    sizes = tuple(_container_sizes(bound, addresses))

    if isinstance(addresses, torch.Tensor) and not addresses.is_cpu:
        place = _place_of_table(addresses, target, pinned)
        known = _read_form(_Request(bound, sizes, shape, strides, dtype, place, 16, True))
        table = addresses.contiguous().view(torch.int64).reshape(-1)
        if known.walk is not None:
            # A strided read of the table needs no list of positions, so nothing is sent.
            table = table.as_strided(*known.walk).reshape(-1)
        unread: Facts = (known.form, None, None, None), known.slots, target, False
        return unread, RawMemory(dtype, known.nbytes), table

    numbers: list[int] = np.asarray(addresses).reshape(-1).astype(np.int64).tolist()
    joined = reduce(or_, numbers, 0)  # not less than any address
    alignment = widest_vector([joined])
    place = "device"
    if target.type == "cpu":
        pinned = _all_pinned(numbers) if pinned is None else pinned
        place = "pinned" if pinned else "pageable"
    wide = dtype.itemsize
    if numbers and (min(numbers) <= 0 or alignment < min(16, wide & -wide)):
        raise LayoutError(
            f"Expected addresses above 0 that are multiples of {wide} bytes for {dtype}, got "
            f"{[hex(x) for x in numbers[:4]]}. Pass the addresses of elements."
        )
    known = _read_form(_Request(bound, sizes, shape, strides, dtype, place, alignment, False))
    last = max(numbers) if joined + known.nbytes > 2 * _ENDLESS else 0
    if last + known.nbytes > 2 * _ENDLESS:
        raise LayoutError(
            f"Expected memory that ends below 2**63, got {known.nbytes} bytes from address "
            f"{last:#x} on. Pass the address of the first byte."
        )
    if known.walk is None:
        origins = tuple(numbers)
    else:
        walked = torch.tensor(numbers).as_strided(*known.walk)
        origins = tuple(walked.reshape(-1).tolist())
    facts: Facts = (known.form, origins, None, None), known.slots, target, False
    return facts, RawMemory(dtype, known.nbytes), None


def _named_device(device: torch.device | str) -> torch.device:
    """Return a device that the caller named; without an index it is the current one."""
    name = str(device)
    if name == "cpu":
        return _HOST
    target = usable_device(name)
    if target.type not in ("cpu", "meta") and target.index is None:
        return torch.device(target.type, torch.accelerator.current_device_index())
    return target


def _place_of_table(table: torch.Tensor, target: torch.device, pinned: bool | None) -> str:
    """Return the place of memory whose addresses lie in a table on a device.

    Raises:
        DeviceMismatch: the memory is on another device than the table.
        LayoutError: host memory that is not pinned, so that the device cannot read it.
    """
    if target.type != "cpu":
        if table.device != target:
            raise DeviceMismatch(
                f"Expected the addresses of memory on {target} in a table on {target} or on the "
                f"host, got a table on {table.device}. Pass table.to({str(target)!r})."
            )
        return "device"
    if pinned is False:
        raise LayoutError(
            f"Expected pinned memory for addresses in a table on {table.device}, got host memory "
            f"that is not pinned, which {table.device} cannot read. Pass the table on the host."
        )
    return "pinned"


def _read_form(request: _Request) -> _Known:
    """Return the form of tensors at addresses; of an unknown extent with as many tokens as fit."""
    unknown = [at for at, extent in enumerate(request.shape) if extent == -1]
    if not unknown:
        return _read_shape(request, request.shape)
    tokens = request.bound.declared[0].get("token", 1)
    while True:
        known = _read_shape(request, _closed_shape(request, unknown, tokens))
        if known.slots <= UNKNOWN_SLOTS:
            return known._replace(nbytes=0)
        # The shape or a container holds more tokens for each step of the extent than declared.
        tokens = -(-tokens * known.slots // UNKNOWN_SLOTS)


def _read_shape(request: _Request, shape: tuple[int, ...]) -> _Known:
    """Return the form of tensors of a shape without an unknown extent.

    Raises:
        LayoutError: shape and strides contradict each other, the layout or the extents.
    """
    strides = request.strides
    if strides is None:
        strides = tuple(accumulate((1, *shape[:0:-1]), mul))[::-1] if shape else ()
    if min(0, *shape, *strides) < 0:
        raise LayoutError(
            f"Expected no number below 0 in the shape and strides at an address, got shape {shape} "
            f"with strides {strides}. Pass the address of the first byte, and positive strides."
        )
    if len(strides) != len(shape):
        raise LayoutError(
            f"Expected a stride, in elements, for each dimension of shape {shape}, got strides "
            f"{strides}. Pass one for each dimension, or None for a contiguous tensor."
        )
    whole = prod(shape)
    reached = whole if request.strides is None else reach(shape, strides)
    nbytes = reached * request.dtype.itemsize
    if max(whole * request.dtype.itemsize, nbytes) > _ENDLESS:
        raise LayoutError(
            f"Expected a view at addresses of at most {_ENDLESS} bytes, with {UNKNOWN_SLOTS} "
            f"tokens if an extent is -1, got shape {request.shape} with strides "
            f"{request.strides}. Pass smaller numbers, or the extent."
        )
    kind = shape, strides, request.dtype
    form, slots, order = request.bound.read_table(
        request.sizes, kind, request.alignment, request.place, request.on_device
    )
    if order == list(range(len(order))):
        return _Known(form, slots, None, nbytes)

    # The order is a permuted grid: find its extents and strides.
    walk = (list[int](), list[int]())
    while len(order) > 1:
        step = order[1] - order[0]
        ends = (at for at in range(2, len(order)) if order[at] - order[at - 1] != step)
        extent = next(ends, len(order))
        walk[0].insert(0, extent)
        walk[1].insert(0, step)
        order = order[::extent]
    return _Known(form, slots, walk, nbytes)


def _closed_shape(request: _Request, unknown: list[int], tokens: int) -> tuple[int, ...]:
    """Return the shape with the most steps that can be counted in place of the unknown extent.

    ``tokens`` is the number of tokens of a step.

    Raises:
        LayoutError: several extents are unknown, another one than that of the blocks or tokens,
            or strides that would follow from it are missing.
    """
    layout = request.bound.layout
    shape = request.shape
    at = unknown[0]
    growing = "block" if layout.paged else "token"
    factors = layout.dims[at].factors if at < len(layout.dims) else ()
    if len(unknown) > 1 or growing not in [factor.axis for factor in factors]:
        raise LayoutError(
            f"Expected a shape in which one extent may be -1, that of the dimension of "
            f"{growing!r} in {layout.text!r}, got {shape}. Pass the other extents."
        )
    if request.strides is None and prod(shape[:at]) > 1:
        raise LayoutError(
            f"Expected strides for a view at addresses of shape {shape}, got None. The strides "
            f"outside of an unknown extent follow from no shape. Pass strides=, in elements."
        )
    declared = request.bound.declared[0]
    others = prod(declared.get(factor.axis, 1) for factor in factors if factor.axis != growing)
    return (*shape[:at], UNKNOWN_SLOTS // tokens * others, *shape[at + 1 :])


def _as_array(addresses: object) -> npt.NDArray[Any]:
    """Return addresses as an array, of objects if they are not whole numbers in equal lists."""
    try:
        return np.asarray(addresses)
    except ValueError:  # lists of unequal lengths
        return np.empty(0, dtype=object)


def _container_sizes(bound: BoundLayout, addresses: Addresses) -> list[int]:
    """Return the extent of each container level.

    Raises:
        LayoutError: not addresses, or not as many levels of them as the layout has.
    """
    text = bound.layout.text
    levels = len(bound.layout.containers)
    sizes = [*addresses.shape]
    dtype = addresses.dtype
    if isinstance(addresses, torch.Tensor):
        fits = dtype in _WORDS
    else:
        words = addresses.dtype.kind in "iu" and addresses.itemsize == 8
        fits = words or (addresses.dtype != object and not addresses.size)
    if not fits:
        raise LayoutError(
            f"Expected whole numbers of 64 bits as addresses for {text!r}, got {dtype}. Pass them "
            f"in lists of equal lengths, or in an int64 or uint64 tensor."
        )
    if isinstance(addresses, torch.Tensor) and (
        addresses.is_meta or (addresses.numel() and not address_of(addresses))
    ):
        raise LayoutError(
            f"Expected addresses for {text!r} in a tensor with memory, got one that owns no "
            f"memory, as on device meta or inside torch.vmap. Call KVView.at outside of function "
            f"transforms."
        )
    if levels == 0 and sizes == [1]:
        sizes = []
    if len(sizes) != levels or 0 in sizes:
        raise LayoutError(
            f"Expected addresses in {levels} container level(s), as {text!r} names them left of "
            f"`|`, got shape {sizes}. Pass one dimension for each level, and at least one address."
        )
    return sizes


def _whole_numbers(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(numbers, Iterable):
        found = [as_whole(number) for number in numbers]
        whole = [number for number in found if number is not None]
        if len(whole) == len(found):
            return tuple(whole)
    raise LayoutError(
        f"Expected whole numbers, one for each dimension of the tensor at an address, got "
        f"{name}={shown(numbers)}. Pass a tuple of integers."
    )


def _driver_device(bound: BoundLayout, addresses: Addresses) -> tuple[torch.device, bool | None]:
    """Return the device of the memory at the first address, and True or False if it is known to be
    pinned or not.

    Raises:
        LayoutError: no driver reports where the memory is.
    """
    _container_sizes(bound, addresses)
    device = usual_device()
    if isinstance(addresses, torch.Tensor) and not addresses.is_cpu:
        why = f"its addresses lie on {addresses.device} themselves"
    elif device.type == "cpu":
        return device, None
    else:
        address = int(np.asarray(addresses).reshape(-1)[0])
        if _all_pinned([address]):
            return _HOST, True
        try:
            number = _owner(address, device)
            return (_HOST, False) if number is None else (torch.device("cuda", number), None)
        except (OSError, AttributeError, hip.DriverMissing) as error:
            why = f"the driver of {device} does not report where its memory is ({error})"
    raise LayoutError(
        f"Expected a device for a view of {bound.layout.text!r} at addresses, got None, and {why}. "
        f"Pass device=."
    )


def _owner(address: int, device: torch.device) -> int | None:
    """Return the number of the device that owns memory which is not pinned; None: host memory.

    Raises:
        OSError, AttributeError, DriverMissing: no driver can report it.
    """
    if device.type != "cuda":
        raise OSError(f"drivers of {device.type} devices have no known query for it")
    cuda.adopt(device)
    if torch.version.hip is not None:
        return cuda.owner_of(address, hip.driver().runtime, "hipPointerGetAttribute")
    return cuda.owner_of(address, cuda.library(), "cuPointerGetAttribute")


def _all_pinned(addresses: Sequence[int] | npt.NDArray[np.int64]) -> bool:
    """Return True if host memory at all addresses is pinned, according to torch.

    Torch checks one address of each allocation whose range a driver reports; without a range it
    checks one address of each page.
    """
    remaining = np.asarray(addresses)
    storage = torch._C._construct_storage_from_data_pointer
    with torch.inference_mode(False):
        probe = torch.empty(0, dtype=torch.uint8, device=_HOST)

        def is_pinned(address: int) -> bool:
            return probe.set_(storage(address, _HOST, 1)).is_pinned()

        while remaining.size:
            first = int(remaining[0])
            if not is_pinned(first):  # the usual case, before pages are listed
                return False
            allocation = cuda.range_of(first)
            if allocation is None:
                one_per_page = {each >> 12: each for each in remaining.tolist()}
                del one_per_page[first >> 12]
                return all(map(is_pinned, one_per_page.values()))
            start, end = allocation
            remaining = remaining[(remaining < start) | (remaining >= end)]
    return True
