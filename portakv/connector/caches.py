# SPDX-License-Identifier: Apache-2.0
"""Registered caches: read once, and what is known of them for every transfer after that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from portakv.connector.chunks import ChunkReader
from portakv.connector.roots import Roots
from portakv.copy.shortcut import Lanes
from portakv.errors import DeviceMismatch, LayoutError
from portakv.registry.registry import Choice
from portakv.view.bound import Reading
from portakv.view.view import KVView


class Registration(NamedTuple):
    """Caches that a connector holds.

    Attributes:
        view: what was read of them.
        roots: what a compiler is shown of them.
        facts: what tells others apart; see `facts_of`.
        chunks: the reader of memory objects beside them.
        lanes: what was learnt of transfers to and from them.
    """

    view: KVView
    roots: Roots
    facts: Any
    chunks: ChunkReader
    lanes: Lanes

    @classmethod
    def read(
        cls, kv_caches: Any, reading: Reading, chunk_layout: str, choice: Choice, owner: Any
    ) -> Registration:
        """Read caches for a connector's ``choice``; ``owner`` is a weak reference to it.

        Raises:
            LayoutError: caches that contradict the layout. DeviceMismatch: on another device.
        """
        _check_caches(kv_caches, reading)
        view = KVView.through(reading, kv_caches, lasting=True)
        if view.device != choice.backend.device:
            raise DeviceMismatch(
                f"The kv_caches are on {view.device}, but this connector serves "
                f"{choice.backend.device}; make a connector for their device."
            )
        if choice.can.tables:
            view.table  # noqa: B018 - made now, so that no transfer has to
        chunks, lanes = ChunkReader(view, chunk_layout), Lanes(view, choice, owner)
        return cls(view, Roots(kv_caches), facts_of(kv_caches), chunks, lanes)

    def check_memory(self) -> None:
        """Raise `LayoutError` where the memory of a cache was freed or replaced in place."""
        if not self.roots.stand():
            raise self.view.replaced()


def _check_caches(kv_caches: Any, reading: Reading) -> None:
    """Name the slip of a slot mapping that was passed in the place of the caches."""
    layout = reading.layout
    if (
        isinstance(kv_caches, torch.Tensor)
        and kv_caches.dim() == 1
        and not kv_caches.is_floating_point()
        and (layout.containers or len(layout.dims) > 1)
    ):
        raise LayoutError(
            f"A {kv_caches.dtype} tensor of one dimension was passed as kv_caches, the second "
            f"argument; expected caches of {layout.text!r}. If it is the slot mapping, pass "
            f"slot_mapping=..., and no caches where they are registered."
        )


def facts_of(kv_caches: Any) -> Any:
    """Address, shape, strides and dtype of each tensor, nested as they are."""
    if isinstance(kv_caches, torch.Tensor):
        return kv_caches.data_ptr(), kv_caches.shape, kv_caches.stride(), kv_caches.dtype
    if isinstance(kv_caches, Mapping):
        kv_caches = kv_caches.values()
    elif not isinstance(kv_caches, (list, tuple)):
        raise LayoutError(
            f"kv_caches is a {type(kv_caches).__name__}; expected a tensor, list, tuple or dict."
        )
    return [facts_of(item) for item in kv_caches]
