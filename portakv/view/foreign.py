# SPDX-License-Identifier: Apache-2.0
"""Memory that is known by addresses alone: what `KVView.at` reads, and tensors over it.

Nothing here holds the memory or can tell whether it is still there; that is the caller's promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import index
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import hip
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import usable_device, usual_device
from portakv.view.bound import BoundLayout, Spans, address_of, as_dtype, reach
from portakv.view.form import Form, widest_vector

#: Tokens that a view has if nobody says how many there are: kernels count them in 32 bits.
UNKNOWN_SLOTS = 1 << 31
_ENDLESS = 1 << 62  # bytes behind an address of which no end is known
_WORDS = (torch.int64, torch.uint64)
_HOST = torch.device("cpu")
#: Extents and strides in which the addresses are walked.
_Walk: TypeAlias = "tuple[list[int], list[int]]"
#: Form, slots, how the addresses come into the table (None: as they are), bytes of a tensor.
_Known: TypeAlias = "tuple[Form, int, _Walk | None, int]"
_forms: Bounded[tuple[Any, ...], _Known]
_forms = Bounded("forms of memory at addresses", 1024)
_usable: Bounded[str, torch.device] = Bounded("devices that addresses were on", 64)


class Foreign(NamedTuple):
    """Memory behind each address of a view: what it holds, and how many bytes (0: unknown)."""

    dtype: torch.dtype
    nbytes: int

    def tensors(self, origins: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """For each address a tensor over all of its memory; it owns nothing."""
        n = self.nbytes or _ENDLESS
        made = []
        # One made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            for origin in origins:
                storage = torch._C._construct_storage_from_data_pointer(origin, device, n)
                empty = torch.empty(0, dtype=self.dtype, device=device)
                made.append(empty.set_(storage, 0, (n // self.dtype.itemsize,), (1,)))
        return tuple(made)

    def spans(self, origins: Sequence[int]) -> Spans:
        """The ranges that it covers, as `KVView.spans` has them; none if its end is unknown."""
        if not (self.nbytes and origins):
            return []
        firsts = np.sort(np.array(origins, dtype=np.int64))
        begins = np.flatnonzero(np.append(True, np.diff(firsts) >= self.nbytes))
        lasts = np.append(firsts[begins[1:] - 1], firsts[-1:])
        return list(zip(firsts[begins].tolist(), (lasts + self.nbytes).tolist(), strict=True))


class Found(NamedTuple):
    """What `read_addresses` found; ``origins`` None: only a device knows them, by its ``table``."""

    form: Form
    slots: int
    device: torch.device
    origins: tuple[int, ...] | None
    table: torch.Tensor | None
    memory: Foreign


def read_addresses(
    bound: BoundLayout,
    addresses: Any,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    pinned: bool | None,
) -> Found:
    """Read tensors of one shape at addresses; arguments and errors are those of `KVView.at`."""
    wide = as_dtype(dtype).itemsize
    if device is None:
        home, reported = _home(bound, addresses)
        pinned = reported if pinned is None else pinned
    else:
        home = _usable.get_or_make(str(device), lambda: usable_device(str(device)))
        if home.type not in ("cpu", "meta") and home.index is None:
            home = torch.device(home.type, torch.accelerator.current_device_index())
    if home.type == "meta":
        raise LayoutError(
            f"Addresses of {bound.layout.text!r} were said to be on device meta, which has no "
            f"memory; name the device where they are."
        )
    shape = _whole("shape", shape)
    strides = None if strides is None else _whole("strides", strides)
    origins = None
    table = None
    sizes = _depth(bound, addresses)
    if isinstance(addresses, torch.Tensor) and not addresses.is_cpu:
        table = addresses
        alignment = 16
        place = "pinned" if home.type == "cpu" else "device"
        if place == "device" and table.device != home:
            raise DeviceMismatch(
                f"Addresses of memory on {home} were given in a table on {table.device}; expected "
                f"one on {home}, or on the host. Pass table.to({str(home)!r})."
            )
        if place == "pinned" and pinned is False:
            raise LayoutError(
                f"Addresses of host memory that is not pinned were given in a table on "
                f"{table.device}, which does not reach it; pass the table on the host."
            )
    else:
        numbers = np.asarray(addresses).reshape(-1).astype(np.int64)
        alignment = widest_vector([int(np.bitwise_or.reduce(numbers, initial=0))])
        listed = numbers.tolist()
        place = _place(numbers, home, pinned)
        if numbers.size and (int(numbers.min()) <= 0 or alignment < min(16, wide & -wide)):
            raise LayoutError(
                f"A view at addresses {[hex(x) for x in numbers.tolist()[:4]]} was asked for "
                f"{dtype}; expected addresses above 0, multiples of {wide} bytes."
            )
    key = bound, tuple(sizes), shape, strides, dtype, place, alignment, table is not None
    known = _forms.get(key)
    if known is None:
        known = _forms[key] = _read(*key)
    form, slots, walk, nbytes = known
    if table is None and int(numbers.max()) + nbytes > 2 * _ENDLESS:
        raise LayoutError(
            f"A view at address {int(numbers.max()):#x} was asked for {nbytes} bytes behind it; "
            f"expected memory that ends below 2**63. Pass the address of the first byte."
        )
    if table is not None:
        table = table.contiguous().view(torch.int64).reshape(-1)
        if walk is not None:
            table = table.as_strided(*walk).reshape(-1)  # the host sends no list of places
    else:
        origins = tuple(listed)
        if walk is not None:
            origins = tuple(torch.from_numpy(numbers).as_strided(*walk).reshape(-1).tolist())
    return Found(form, slots, home, origins, table, Foreign(dtype, nbytes))


def _read(
    bound: BoundLayout,
    sizes: Sequence[int],
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    place: str,
    alignment: int,
    on_device: bool,
    tokens: int = 0,
) -> _Known:
    """What tensors at addresses in containers of these sizes share. ``tokens``: how many a step of
    an unknown extent has; 0: as many as are declared."""
    shape_given = shape
    tokens = tokens or bound.declared[0].get("token", 1)
    open_ended = [at for at, extent in enumerate(shape) if extent == -1]
    if open_ended:
        shape = _closed(bound, shape, open_ended, tokens)
        if strides is None and prod(shape[: open_ended[0]]) > 1:
            raise LayoutError(
                f"Expected strides for a view at addresses of shape {shape_given}, got None. The "
                f"strides outside of an unknown extent follow from no shape. Pass strides=, in "
                f"elements."
            )
    strides_given = strides
    if strides is None:
        strides = tuple(prod(shape[at + 1 :]) for at in range(len(shape)))
    if min((*shape, *strides), default=0) < 0:
        raise LayoutError(
            f"A view at addresses was asked for shape {shape} with strides {strides}; expected no "
            f"number below 0. Pass the address of the first byte, and positive strides."
        )
    if len(strides) != len(shape):
        raise LayoutError(
            f"A view at addresses was asked for shape {shape} with strides {strides}; expected a "
            f"stride, in elements, for each dimension, or None for a contiguous tensor."
        )
    reached = reach(shape, strides) * dtype.itemsize
    if max(prod(shape) * dtype.itemsize, reached) > _ENDLESS:
        raise LayoutError(
            f"Expected a view at addresses of at most {_ENDLESS} bytes, with {UNKNOWN_SLOTS} "
            f"tokens if an extent is -1, got shape {shape_given} with strides {strides}. Pass "
            f"smaller numbers, or the extent."
        )
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    form, slots, order = bound.read_table(sizes, like, alignment, place, on_device)
    if open_ended and slots > UNKNOWN_SLOTS:  # the shape or a container told of more tokens
        tokens = -(-tokens * slots // UNKNOWN_SLOTS)
        return _read(
            bound, sizes, shape_given, strides_given, dtype, place, alignment, on_device, tokens
        )
    nbytes = 0 if open_ended else reached
    return form, slots, None if order == list(range(len(order))) else _walked(order), nbytes


def _walked(order: Sequence[int]) -> _Walk:
    """The extents and strides of a list of places that is a grid, walked in another order."""
    extents = list[int]()
    strides = list[int]()
    while len(order) > 1:
        step = order[1] - order[0]
        ends = (at for at in range(2, len(order)) if order[at] - order[at - 1] != step)
        extents.insert(0, next(ends, len(order)))
        strides.insert(0, step)
        order = order[:: extents[0]]
    return extents, strides


def _closed(
    bound: BoundLayout, shape: tuple[int, ...], at: list[int], tokens: int
) -> tuple[int, ...]:
    """The shape with as many tokens as can be counted in place of the extent that is unknown."""
    layout = bound.layout
    growing = "block" if bound.layout.paged else "token"
    dims = layout.dims[at[0]].factors if at[0] < len(layout.dims) else ()
    if len(at) > 1 or growing not in [factor.axis for factor in dims]:
        raise LayoutError(
            f"A view of {layout.text!r} was asked for shape {shape}; one extent may be -1, that of "
            f"the dimension of {growing!r}. Pass the others."
        )
    others = prod(
        bound.declared[0].get(factor.axis, 1) for factor in dims if factor.axis != growing
    )
    return (*shape[: at[0]], UNKNOWN_SLOTS // tokens * others, *shape[at[0] + 1 :])


def _depth(bound: BoundLayout, addresses: Any) -> list[int]:
    """The extent of each container level; raises `LayoutError` for what are no addresses."""
    levels = len(bound.layout.containers)
    text = bound.layout.text
    if isinstance(addresses, torch.Tensor):
        result = addresses.dtype
        right = addresses.dtype in _WORDS
        if right and (addresses.is_meta or (addresses.numel() and not address_of(addresses))):
            raise LayoutError(
                f"Addresses for {text!r} were given in a tensor without memory of its own, as on "
                f"device meta or inside torch.vmap; call KVView.at outside of function transforms."
            )
    else:
        try:
            addresses = np.asarray(addresses)
        except ValueError:  # lists of unequal lengths
            addresses = np.empty(0, dtype=object)
        words = addresses.dtype.kind in "iu" and addresses.itemsize == 8
        result = addresses.dtype
        right = words or (addresses.dtype != object and not addresses.size)
    if not right:
        raise LayoutError(
            f"Addresses of {result} were given for {text!r}; expected whole numbers of 64 bits, in "
            f"lists of equal lengths, or in an int64 or uint64 tensor."
        )
    sizes = list(addresses.shape)
    if levels == 0 and sizes == [1]:
        sizes = []
    if len(sizes) != levels or 0 in sizes:
        raise LayoutError(
            f"Addresses of shape {sizes} were given for {text!r}, which names {levels} container "
            f"level(s) left of `|`; pass one dimension for each, and at least one address."
        )
    return sizes


def _whole(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, numbers))
    except TypeError:
        raise LayoutError(
            f"A view at addresses was asked for with {name}={numbers!r}; expected whole numbers, "
            f"one for each dimension of the tensor at an address."
        ) from None


def _home(bound: BoundLayout, addresses: Any) -> tuple[torch.device, bool | None]:
    """Where the memory at the first address is, and whether it is pinned, if that was told as well;
    raises `LayoutError` if nothing here can tell."""
    _depth(bound, addresses)
    device = usual_device()
    why = ""
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
            why = f"the driver of {device} cannot be asked where its memory is ({error})"
    raise LayoutError(
        f"A view of {bound.layout.text!r} at addresses was asked for without a device, and {why}; "
        f"expected to be told. Pass device=."
    )


def _owner(address: int, device: torch.device) -> int | None:
    """The number of the device that memory which is not pinned belongs to; None: it is the host's.
    Raises `OSError`, `AttributeError` or `DriverMissing` if no driver can be asked."""
    if device.type != "cuda":
        raise OSError(f"it is not known how a driver of {device.type} devices is asked")
    _cuda_driver.adopt(device)
    if torch.version.hip is not None:
        return _cuda_driver.owner_of(address, hip.driver().runtime, "hipPointerGetAttribute")
    return _cuda_driver.owner_of(address, _cuda_driver.library(), "cuPointerGetAttribute")


def _place(origins: npt.NDArray[np.int64], device: torch.device, pinned: bool | None) -> str:
    if device.type != "cpu":
        return "device"
    if pinned is None:
        pinned = _all_pinned(origins)
    return "pinned" if pinned else "pageable"


def _all_pinned(addresses: Sequence[int] | npt.NDArray[np.int64]) -> bool:
    """Whether host memory at addresses is pinned, as torch says of one of each allocation whose
    reach a driver tells, else of one of each page."""
    left = np.asarray(addresses)
    storage = torch._C._construct_storage_from_data_pointer
    with torch.inference_mode(False):
        at = torch.empty(0, dtype=torch.uint8, device=_HOST)

        def is_pinned(address: int) -> bool:
            return at.set_(storage(address, _HOST, 1)).is_pinned()

        while left.size:
            reach = _cuda_driver.range_of(int(left[0]))
            if reach is None:
                return all(map(is_pinned, {each >> 12: each for each in left.tolist()}.values()))
            if not is_pinned(int(left[0])):
                return False
            left = left[(left < reach[0]) | (left >= reach[1])]
    return True
