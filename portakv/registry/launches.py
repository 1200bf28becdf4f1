# SPDX-License-Identifier: Apache-2.0
"""What the registry puts around a backend's launch, where its device or its claims ask for it.

Both hide `Repeatable.again`, so that every transfer comes through them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from portakv.backends.base import Launch, Tells
from portakv.errors import Unsupported
from portakv.runtime.transfer import Pending

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

_PLAIN = "bytes lie where strides say"


class OneAtATime:
    """A launch of a backend that does not claim ``threads``."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._lock = threading.Lock()

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> Pending | None:
        with self._lock:
            return self._launch(src, dst, src_index, dst_index, count, stream, status)


class PlainOnly:
    """A launch on a device whose tensors may be laid out otherwise than their strides say.

    Each view is looked at once, before anything is moved, and remembers that it was right.
    """

    def __init__(self, launch: Launch, tells: Sequence[Tells]) -> None:
        self._launch = launch
        self._tells = tells

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> Pending | None:
        if _PLAIN not in src.kept:
            self._look(src)
        if _PLAIN not in dst.kept:
            self._look(dst)
        return self._launch(src, dst, src_index, dst_index, count, stream, status)

    def _look(self, view: KVView) -> None:
        """Raise `Unsupported` where a tensor of the view is not plain."""
        owners = view.owners if view.form.place == "device" else ()
        for owner in owners:
            for tell in self._tells:
                why = tell(owner)
                if why:
                    raise Unsupported(
                        f"A copy of tensors of {view.layout.text!r}", f"{why}; nothing was moved"
                    )
        view.kept[_PLAIN] = True
