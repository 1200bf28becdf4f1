# SPDX-License-Identifier: Apache-2.0
"""Figures of the blocks that a store packs, or keeps raw."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from portakv.copy.choose_encoding import is_out_of_date
from portakv.graph.trace import Figures
from portakv.layout.encodings import FLAG_AT, PACKED, TOTAL_AT, PackedPlane
from portakv.storage.form import HEADER, BlockForm


class EncodedFigures:
    """Counts blocks that saves bring into rows, packed or raw; any thread may call it."""

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        """Count under a lock, that of the store's graph."""
        self._lock = lock
        self._counts = Counter[str]()
        self._of_late: dict[torch.device, tuple[int, int]] = {}  # packed blocks, and misfits

    def add_raw(self, form: BlockForm, blocks: int) -> None:
        """Count blocks that were not to be packed, of a form of either encoding."""
        nbytes = blocks * form.raw.payload_bytes
        with self._lock:
            self._counts.update(payload=nbytes, wire=nbytes, raw=blocks)

    def add_packed(
        self,
        device: torch.device,
        form: BlockForm,
        fits: int,
        misfits: int,
        followed: int,
        image: Any = None,
    ) -> None:
        """Count blocks whose slots crossed.

        Args:
            device: where they came from.
            fits: those that fit.
            misfits: those that did not.
            followed: the ``misfits`` that were brought raw after that; the others did not land.
            image: the row of one that fits, uint8 ``[row_bytes]``, whose escapes count.
        """
        escapes, values = (0, 0) if image is None else _escapes(form, image)
        raw = form.raw.payload_bytes
        wire = (fits + misfits) * form.payload_bytes + followed * raw
        with self._lock:
            self._counts.update(payload=(fits + followed) * raw, wire=wire)
            self._counts.update(packed=fits, overflow=followed, escapes=escapes, values=values)
            packed, unfit = self._of_late.get(device, (0, 0))
            self._of_late[device] = packed + fits + misfits, unfit + misfits

    def sample_is_out_of_date(self, device: torch.device) -> bool:
        """Return whether too many blocks of a device did not fit since `forget_misfits`."""
        with self._lock:
            return bool(is_out_of_date(*self._of_late.get(device, (0, 0))))

    def forget_misfits(self, device: torch.device) -> None:
        """Begin to count a device's blocks anew for `sample_is_out_of_date`."""
        with self._lock:
            self._of_late.pop(device, None)

    def statistics(self, form: str) -> Figures:
        """Return the figures."""
        with self._lock:
            counts = self._counts.copy()
        ratio = counts["payload"] / counts["wire"] if counts["wire"] else 1.0
        escapes = counts["escapes"] / counts["values"] if counts["values"] else 0.0
        return {
            "encoding_payload_bytes_total": [{"form": form, "value": counts["payload"]}],
            "encoding_wire_bytes_total": [{"form": form, "value": counts["wire"]}],
            "encoding_ratio": [{"form": form, "value": ratio}],
            "encoding_escapes": [{"form": form, "value": escapes}],
            "encoding_blocks_total": [
                {"form": form, "result": result, "value": counts[result]}
                for result in ("packed", "raw", "overflow")
            ],
        }


def _escapes(form: BlockForm, image: Any) -> tuple[int, int]:
    """Return the escapes of the planes of a packed image that fit, and their values; none for
    another encoding, which has no escapes."""
    planes = [plane for plane in form.planes if isinstance(plane, PackedPlane)]
    if not planes:
        return 0, 0
    if len({*form.widths}) == 1:  # kv is an axis
        planes = planes[:1]
    payload = image[HEADER : HEADER + form.payload_bytes]
    slots = payload.reshape(-1, sum(plane.slot_bytes for plane in planes))
    escapes = 0
    values = 0
    start = 0
    for plane in planes:
        head = slots[:, start + plane.head_at : start + plane.escapes_at].astype(np.int64)
        fits = head[:, FLAG_AT] == PACKED
        counts = head[:, TOTAL_AT] + 256 * head[:, TOTAL_AT + 1]
        escapes += int(counts[fits].sum())
        values += int(fits.sum()) * plane.values
        start += plane.slot_bytes
    return escapes, values
