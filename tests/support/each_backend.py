# SPDX-License-Identifier: Apache-2.0
"""A backend that carries out copies, on any device, and sources with stride 0, which every backend
has to support."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from portakv import Index, KVView, SlotError, copy_rows
from portakv.backends.base import Backend
from portakv.backends.compiled import Compiled
from portakv.registry.registry import choose
from support.ambient import STATES
from support.cuda_cases import CHUNK, NHD, SLOTS, Copy, End, by, chunk, pool
from support.guarded_memory import filled


def _chunk(tensor: torch.Tensor, **more: Any) -> End:
    return End(tensor, CHUNK, {"heads": 2}, **more)


def _pools(shape: tuple[int, ...], **ids: Any) -> End:
    """Return three layers, each expanded to a pool of three blocks."""
    return End([filled(shape).expand(2, 3, 4, 2, 8) for _ in range(3)], NHD, **ids)


def _windows(step: int) -> Copy:
    """Return rows that begin ``step`` elements after each other, and so share most of their
    bytes."""
    source = filled((64,)).as_strided((9, 16), (step, 1), 3)
    return Copy(
        End(source, "token dim", offset=1), by(End(filled((3, 4, 16)), "block token dim"), SLOTS), 7
    )


def _one_element_apart(axis: str) -> Copy:
    """Return a chunk, one of whose axes has a step of one element."""
    dense = filled((2, 3, 9, 2, 8))
    steps = [1 if x == axis else n for x, n in zip(_AXES.split(), dense.stride(), strict=True)]
    source = End(dense.as_strided(dense.shape, steps), _AXES)
    return Copy(by(source, [8, 4, 5, 6, 0, 1, 2]), chunk(7), 7)


_AXES = "kv layer token head dim"
#: Sources of which several rows, or parts of them, are one: a step of 0 bytes, or of one element.
REPEATED: dict[str, Callable[[], Copy]] = {
    "one token for all, from the second on": lambda: Copy(
        _chunk(filled((2, 3, 1, 16)).expand(2, 3, 9, 16), offset=2), by(pool(), SLOTS), 7
    ),
    "one token for all, to a chunk": lambda: Copy(
        _chunk(filled((2, 3, 1, 16)).expand(2, 3, 7, 16)), chunk(7), 7
    ),
    "one token for all, by ids": lambda: Copy(_pools((2, 1, 1, 2, 8), ids=SLOTS), chunk(7), 7),
    "one token of a block for all": lambda: Copy(_pools((2, 3, 1, 2, 8), ids=SLOTS), chunk(7), 7),
    "one block for all": lambda: Copy(_pools((2, 1, 4, 2, 8), ids=SLOTS), chunk(7), 7),
    "one block for all, by blocks": lambda: Copy(
        _pools((2, 1, 4, 2, 8), ids=[2, 0], step=4), by(pool(), [1, 2], 4), 8
    ),
    "one head for all": lambda: Copy(_pools((2, 3, 4, 1, 8), ids=SLOTS), chunk(7), 7),
    "keys for values": lambda: Copy(_pools((1, 3, 4, 2, 8), ids=SLOTS), chunk(7), 7),
    "one element for all": lambda: Copy(_pools((2, 3, 4, 2, 1), ids=SLOTS), chunk(7), 7),
    "one layer for all": lambda: Copy(
        _chunk(filled((2, 1, 7, 16)).expand(2, 3, 7, 16)), by(pool(), SLOTS), 7
    ),
    "rows of one element's step": lambda: _windows(1),
    "rows of three elements' step": lambda: _windows(3),
    **{f"one element's step by {x}": partial(_one_element_apart, x) for x in _AXES.split()[:4]},
}


class Elsewhere:
    """Tensors on a device, or ``pinned``, as they lie on the host: with the same strides, sharing
    the same storages."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._storages = dict[int, tuple[torch.Tensor, torch.Tensor]]()

    def moved(self, tree: Any) -> Any:
        """Return the same containers on the device."""
        if not isinstance(tree, torch.Tensor):
            return [self.moved(each) for each in tree]
        storage = tree.untyped_storage()
        if storage.data_ptr() not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            twin = here.pin_memory() if self._device == "pinned" else here.to(self._device)
            self._storages[storage.data_ptr()] = here, twin
        there = self._storages[storage.data_ptr()][1].untyped_storage()
        moved = torch.empty(0, dtype=tree.dtype, device=there.device)
        return moved.set_(there, tree.storage_offset(), tree.size(), tree.stride())

    def views(self, *ends: End) -> list[KVView]:
        """Return views of their tensors on the device."""
        return [KVView(self.moved(end.tensors), end.layout, **end.extents) for end in ends]

    def bring_back(self) -> None:
        """Copy the content of the device's storages, padding included, into those of the host."""
        for here, there in self._storages.values():
            here.copy_(there)


class Carrier(NamedTuple):
    """A backend as tests meet it: on the host, or on a device to which tensors are brought."""

    backend: type[Backend]
    device: torch.device

    @property
    def name(self) -> str:
        return self.backend.name

    def copies(
        self, copy: Copy, *, stream: torch.Stream | None = None, bad: str = "", there: bool = False
    ) -> None:
        """Copy as the library would, ids on the device if they are ``there``, and check every byte.
        ``bad``: the text of the error about a bad id."""

        def index(end: End) -> Index:
            made = end.index()
            if made.ids is None or not there:
                return made
            return Index(made.ids.to(self.device), end.step, end.offset)

        def carry(src: End, dst: End) -> None:
            with pytest.raises(SlotError, match=bad) if bad else nullcontext():
                copy_rows(
                    src.view(),
                    dst.view(),
                    index(src),
                    index(dst),
                    count=copy.count,
                    backend=self.name,
                    stream=stream,
                ).synchronize()

        self._judged(copy, carry)

    def launch_and_check(self, copy: Copy, status: torch.Tensor | None) -> None:
        """Launch without the library's checks, with a status word, and check every byte."""
        self._judged(copy, lambda src, dst: self.launches(Copy(src, dst, copy.count), status))

    def launches(
        self, copy: Copy, status: torch.Tensor | None = None, state: str | None = None
    ) -> None:
        """Make a backend, prepare a plan, launch it, and wait for the end, in a state of torch."""
        src = copy.src.view()
        dst = copy.dst.view()
        plan = copy.plan()
        indices = copy.src.index(), copy.dst.index()
        with nullcontext() if state is None else STATES[state](self.device):
            backend = self._made(state is None)
            can = backend.capabilities()
            ids_device = can.home_of_ids(self.device)
            src_index, dst_index = [
                x if x.ids is None else x.placed(ids_device, can.index_dtypes) for x in indices
            ]
            pending = backend.prepare(plan)(
                src, dst, src_index, dst_index, copy.count, None, status
            )
            if pending is not None:
                pending.wait()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _made(self, may_be_shared: bool) -> Backend:
        """Return a backend with nothing prepared; for `compiled`, which takes seconds, the
        registry's."""
        if may_be_shared and self.backend is Compiled:
            backend = choose(self.device, self.name).backend
            assert isinstance(backend, Backend)
            return backend
        return self.backend(self.device)

    def word(self) -> torch.Tensor:
        """Return a status word that the backend can write."""
        word = torch.zeros(1, dtype=torch.int64)
        return word if self.device.type == "cpu" else word.pin_memory()

    def _judged(self, copy: Copy, carry: Callable[[End, End], None]) -> None:
        if self.device.type == "cpu":
            copy.check(lambda: carry(copy.src, copy.dst))
            return
        there = Elsewhere(self.device)
        src, dst = (replace(x, tensors=there.moved(x.tensors)) for x in (copy.src, copy.dst))

        def run() -> None:
            carry(src, dst)
            there.bring_back()

        copy.check(run)
