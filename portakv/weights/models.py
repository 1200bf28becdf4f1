# SPDX-License-Identifier: Apache-2.0
"""Let another process of this host use a model's memory, without a copy.

`share_model` describes all parameters and buffers of a module; `open_model` makes them the
parameters and buffers of the other process's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, TypeVar

import torch
from msgspec import Meta

from portakv.arguments import instance, invalid, kind_of
from portakv.errors import LayoutError, PeerError, Unsupported
from portakv.migrate.described import strided
from portakv.migrate.messages import Handle, Message, Name, Text, carried, prepare, sealed, unsealed
from portakv.migrate.shared_memory import Opener
from portakv.runtime.interrupts import uninterrupted
from portakv.weights.owner import MOST_ITEMS
from portakv.weights.parameters import Item, export_items, items_of, named, names_of

Module = TypeVar("Module", bound=torch.nn.Module)


class _Model(Message, frozen=True):
    """The items of a model's parameters and buffers, and the regions of their memory.

    A region is the type of its device and its handle.
    """

    items: Annotated[tuple[tuple[Text, Item], ...], Meta(max_length=MOST_ITEMS)]
    buffers: Annotated[tuple[Text, ...], Meta(max_length=MOST_ITEMS)]
    regions: Annotated[tuple[tuple[Name, Handle], ...], Meta(max_length=MOST_ITEMS)]


class SharedModel:
    """The result of `share_model`: ``data``, for any number of processes, and `close`."""

    def __init__(self, module: torch.nn.Module) -> None:
        instance("module", module, torch.nn.Module)
        tensors = _tensors(module)
        if not tensors:
            raise invalid("module", "one with parameters or buffers", module)
        if len(tensors) > MOST_ITEMS:
            raise invalid("module", f"one of at most {MOST_ITEMS} tensors", len(tensors))
        devices = {x.device for x in tensors.values() if x.device.type != "cpu"}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise Unsupported("Sharing a model", f"it is on {names}; share its parts by device")
        items = items_of(named("module", tensors))
        #: Retained, because other processes use the memory.
        self._memory = tensors
        self._regions, placed = export_items(tensors, items, "Sharing module")
        regions = [(x.tensor.device.type, x.handle) for x in self._regions if x.tensor is not None]
        model = _Model(tuple(placed.items()), tuple(_buffers(module)), tuple(regions))
        self.data = sealed(model)

    def close(self) -> None:
        """Release the memory. A second call does nothing.

        Let no process call `open_model` afterwards: host memory still opens while the module has
        it, and a device's memory may have other contents.
        """
        for region in self._regions:
            region.close()
        self._memory.clear()


def share_model(module: torch.nn.Module) -> SharedModel:
    """Describe a module's parameters and buffers for `open_model` in another process of this host.

    Host memory must be shared before (``module.share_memory()``). Keep the result as long as other
    processes open or use the memory, and do not replace the module's tensors meanwhile. They have
    the whole allocations, readable and writable: both processes must trust each other.

    Raises:
        InvalidTerms: not a module, or one without tensors.
        LayoutError: a tensor that is not plain, such as a sparse one.
        Unsupported: memory that cannot be shared, which it names; several devices.
    """
    return SharedModel(module)


def open_model(
    module: Module, data: bytes, device: torch.device | str | int | None = None
) -> Module:
    """Make the shared memory the parameters and buffers of a module, and return the module.

    The module may be on the ``meta`` device; its former memory is released. Names, shapes, dtypes
    and tied tensors must be those of the shared module; strides become those. Parameters need no
    gradient then, and are new objects: make optimizers and graphs later. No byte is copied, so
    later changes by the other process are visible here without notice. Only the process that shared
    the model may write it.

    Args:
        data: of `SharedModel`.
        device: the device of this process that reads a device's memory; None: the current device.

    Raises:
        InvalidTerms: no module, or another type than bytes.
        LayoutError: the module differs. It lists all differences, and changes nothing.
        PeerError: bytes of another kind, or the other process has ended.
        Unsupported: the memory cannot be opened here.
    """
    instance("module", module, torch.nn.Module)
    model = unsealed(carried("data", data, "Pass SharedModel.data."), _Model)
    if model is None:
        raise PeerError(
            "Expected data to be the bytes of `SharedModel.data` of this release, got others. "
            "Carry them unchanged."
        )
    items = dict(model.items)
    _check_alike(module, items, model.buffers)
    host = Opener("cpu", descriptors=False)
    other = Opener(device, descriptors=False)
    regions = [(host if kind == "cpu" else other).open(x) for kind, x in model.regions]
    opened = dict[str, torch.Tensor]()
    for name, item in items.items():
        if item.tie not in opened:
            opened[item.tie] = _opened(item, regions, name in model.buffers)
        opened[name] = opened[item.tie]
    uninterrupted(partial(_assign, module, opened))
    return module


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by all of their names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **_buffers(module)}


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _check_alike(
    module: torch.nn.Module, items: Mapping[str, Item], buffers: tuple[Text, ...]
) -> None:
    """Raise `LayoutError` if a module differs from the shared one."""
    local = _tensors(module)
    wrong = [f"{name}: it is only here" for name in local if name not in items]
    wrong += [f"{name}: it is only there" for name in items if name not in local]
    own_ties = names_of({name: id(tensor) for name, tensor in sorted(local.items())})
    ties = names_of({name: item.tie for name, item in sorted(items.items())})
    own_buffers = _buffers(module)
    for name in [name for name in local if name in items]:
        tensor = local[name]
        item = items[name]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            wrong.append(f"{name}: it is {kind_of(tensor)} here, not a plain one")
            continue
        facts = (
            ("shape", tuple(tensor.shape), item.local),
            ("dtype", str(tensor.dtype).removeprefix("torch."), item.dtype),
            ("kind", *("buffer" if name in x else "parameter" for x in (own_buffers, buffers))),
        )
        wrong += [f"{name}: its {x} is {a} here and {b} there" for x, a, b in facts if a != b]
        if own_ties[name] != ties[name]:
            wrong.append(f"{name}: {own_ties[name]} are one tensor here, and {ties[name]} there")
    if wrong:
        raise LayoutError(
            "Expected a module like the one that was shared, got the differences below; nothing "
            "was changed. Correct them on either side:\n" + "\n".join(wrong)
        )


def _opened(item: Item, regions: list[torch.Tensor], buffer: bool) -> torch.Tensor:
    """Return the tensor of an item in the shared memory."""
    dtype = getattr(torch, item.dtype)  # as the module's own tensor
    try:
        if item.place is not None:
            (number, offset) = item.place
            tensor = strided(regions[number], offset, dtype, item.local, item.strides)
        else:
            where = regions[0].device if regions else torch.device("cpu")
            tensor = torch.empty_strided(item.local, item.strides, dtype=dtype, device=where)
    except (LayoutError, LookupError, RuntimeError) as error:
        raise PeerError(
            f"Expected tensors in the memory that was shared, got others: {error}. Share the model "
            f"again."
        ) from None
    return tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False)


def _assign(module: torch.nn.Module, opened: Mapping[str, torch.Tensor]) -> None:
    """Replace the parameters and buffers of a module."""
    for name, tensor in opened.items():
        (path, _, own) = name.rpartition(".")
        setattr(module.get_submodule(path), own, tensor)


prepare(globals())
