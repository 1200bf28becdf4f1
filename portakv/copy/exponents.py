# SPDX-License-Identifier: Apache-2.0
"""Count the escapes that `pack` would make for planes of a few blocks, as the format does.

The blocks are copied to dense memory of their device and counted there. The host waits for the
device only if it reads the counts before they are complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from portakv.copy.pack_stage import stage_of, tensors_of
from portakv.copy.rows import copy_blocks
from portakv.layout.encodings import VECTOR, Pack, PackedPlane
from portakv.runtime.streams import ignoring_captures
from portakv.view.view import KVView

#: A sample has at most so many blocks, and of large blocks at most so many bytes.
BLOCKS = 8
BYTES = 8 << 20
#: Values that are counted together, which bounds the temporary memory to some 30 MiB.
TOGETHER = 1 << 20
_EXPONENTS = 256

#: The escapes of the planes of each kv, int64 ``[blocks, planes]``.
Counts = tuple[npt.NDArray[np.int64], ...]


def escapes_of(values: torch.Tensor, plane: PackedPlane) -> torch.Tensor:
    """Return the number of escapes of planes of bf16 bits, int16 ``[planes, values]``.

    Returns int64 ``[planes]``, on the device of the values, without a wait for it.
    """
    device = values.device
    exponents = values.to(torch.int64) >> 7 & 0xFF
    every = _histogram(exponents)
    counts = every
    if plane.sample == VECTOR:
        vector = torch.arange(plane.values // VECTOR, dtype=torch.int64, device=device)
        counts = _histogram(exponents[:, vector * VECTOR + (vector + vector // 16) % VECTOR])

    # Of equal counts the larger exponent has a code.
    numbers = torch.arange(_EXPONENTS, dtype=torch.int64, device=device)
    keys = (counts * _EXPONENTS + numbers).topk(plane.table_entries, 1).values
    with_codes = every.gather(1, keys % _EXPONENTS) * (keys >= _EXPONENTS)
    return plane.values - with_codes.sum(1)


def _histogram(exponents: torch.Tensor) -> torch.Tensor:
    """Return how often each exponent occurs in each row, int64 ``[rows, 256]``."""
    rows = len(exponents)
    device = exponents.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None] * _EXPONENTS
    places = (exponents + row).reshape(-1)
    counts = torch.zeros(rows * _EXPONENTS, dtype=torch.int64, device=device)
    # Unlike `bincount` this does not wait for the device. With one axis it also works while the
    # process wants deterministic algorithms.
    ones = torch.ones(1, dtype=torch.int64, device=device).expand(places.shape)
    return counts.scatter_add_(0, places, ones).view(rows, _EXPONENTS)


class Sample:
    """The escapes of a few blocks of a view, for several parameters.

    Args:
        view: a paged view of bf16 rows.
        ids: numbers of blocks, of which at most `BLOCKS` at equal distances are counted.
        packs: the parameters.

    Attributes:
        blocks: the number of blocks that are counted.
    """

    def __init__(self, view: KVView, ids: npt.NDArray[np.int64], packs: Sequence[Pack]) -> None:
        size = view.block_size
        assert size is not None
        self.blocks = max(1, min(BLOCKS, len(ids), BYTES // (size * view.form.token_bytes)))
        at = np.linspace(0, len(ids) - 1, self.blocks).round().astype(np.int64)
        device = view.device
        quiet = ignoring_captures(device)  # of other threads
        with torch.inference_mode(False), torch.no_grad(), quiet:
            stage = stage_of(view.form, view.form, size, self.blocks, device)
            copy_blocks(view, stage, ids[at], np.arange(self.blocks))
            counted = [self._counts(stage, size, pack) for pack in packs]
            there = torch.cat(counted)
            self._end: torch.Event | None = None
            self._host = there
            if device.type != "cpu":
                host = torch.empty(there.shape, dtype=there.dtype, device="cpu").pin_memory()
                self._host = host.copy_(there, non_blocking=True)
                self._end = torch.Event(device)
                self._end.record(torch.accelerator.current_stream(device.index))
        self._device = device
        self._packs = [*packs]
        self._kv = view.kv

    @property
    def ready(self) -> bool:
        """Return True if the counts are complete."""
        if self._end is None:
            return True
        with ignoring_captures(self._device):
            return self._end.query()

    def counts(self, pack: Pack) -> Counts:
        """Return the escapes with parameters of the sample; wait for them."""
        if self._end is not None:
            with ignoring_captures(self._device):
                self._end.synchronize()
        each = self._host.numpy().reshape(len(self._packs), self._kv, self.blocks, -1)
        return tuple(each[self._packs.index(pack)])

    def _counts(self, stage: KVView, size: int, pack: Pack) -> torch.Tensor:
        """Return the escapes of all kv, one after the other."""
        made = []
        tensors = tensors_of(stage)
        for kv, width in enumerate(stage.widths):
            plane = pack.plane(size * width // 2)
            planes = tensors[kv] if len(tensors) > 1 else tensors[0][:, :, kv]
            bits = planes.reshape(-1, plane.values).view(torch.int16)
            made += [escapes_of(x, plane) for x in bits.split(max(1, TOGETHER // plane.values))]
        return torch.cat(made)
