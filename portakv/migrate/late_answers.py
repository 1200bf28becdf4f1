# SPDX-License-Identifier: Apache-2.0
"""Compute the answers of an owner that take longer than its channel may: checksums of rows, and
choices of an encoding by a sample of rows. The worker of the owner computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from portakv.copy.choose_encoding import (
    SAMPLE_AGAIN,
    EncodingChoice,
    Sampled,
    best_of,
    judged,
    packs_of,
    rated_choice,
    stays_raw,
)
from portakv.copy.exponents import Sample
from portakv.errors import LayoutError, PortaKVError, TransferError
from portakv.graph.graph import Queue
from portakv.migrate.checksum import Later, checksum_of
from portakv.migrate.messages import Answer, Box, Choose, Chosen, Sum
from portakv.migrate.staging import Rows, rows_bytes
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence
from portakv.view import KVView

#: The most windows of shards whose samples are kept: those of readers that pull layer by layer are
#: single layers.
MOST_KEPT = 1024
_BUSY = Answer("busy", seconds=1e-3)


@dataclass
class Kept:
    """The facts by which rows of a window of a shard cross packed or raw.

    Attributes:
        why: why they stay raw whatever the rate of the transport, as a sentence; empty if not.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most.
        sampled: the result of a sample; None: the rates alone decided.
        left: raw bytes of requested rows until the next sample.
    """

    why: str = ""
    packing_gbps: float | None = None
    sampled: Sampled | None = None
    left: int = 0

    def choice(self, view: KVView, link_gbps: float) -> EncodingChoice | None:
        """Return the choice for a transport of so many 10^9 bytes a second; None if only a sample
        decides. Never blocks."""
        if self.why:
            return EncodingChoice(None, self.why, link_gbps)
        rated = rated_choice(view, None, link_gbps, self.packing_gbps)
        if rated.pack is None:
            return rated
        return None if self.sampled is None else judged(rated, self.sampled)


class LateAnswers:
    """The answers of one owner. Only the channel's thread calls it; see `Later`.

    ``rows`` and ``after`` of its methods: return the rows, and the work that wrote them.
    """

    def __init__(self, queue: Queue) -> None:
        self._sums = Later[int]("checksums of rows", queue)
        self._looks = Later[Kept]("samples of rows", queue)
        self._kept: Bounded[tuple[bytes, int, Box], Kept] = Bounded("samples of pulls", MOST_KEPT)

    def sum(self, request: Sum, rows: Callable[[], Rows], after: StreamFence) -> Answer:
        """Return a checksum of rows, or that it does not exist yet."""
        total = self._sums.answer(request, partial(_sum, request, rows, after))
        return _BUSY if total is None else Answer("done", digest=total)

    def choose(
        self, request: Choose, view: KVView, rows: Callable[[], Rows], after: StreamFence
    ) -> Answer:
        """Return the choice for rows of a view, or that it does not exist yet.

        Raises `LayoutError` for a part of a block. A sample that fails raises `TransferError`, and
        nothing is kept of it.
        """
        part = request.part
        unit = view.block_size
        if not unit or part.first % unit or part.count % unit:
            raise LayoutError(
                f"Expected a request for whole blocks of {view}, got tokens {part.first} + "
                f"{part.count}. Connect sides of one release."
            )

        # Most requests find a sample, and cost no turn of the worker.
        key = request.epoch, part.group, part.box
        kept = self._kept.get(key)
        choice = None
        if kept is not None and kept.left > 0 and not request.again:
            choice = kept.choice(view, request.link_gbps)
        if kept is None or choice is None:
            kept = self._looks.answer(request, partial(_look, request, view, rows, after))
            if kept is None:
                return _BUSY
            self._kept[key] = kept
            kept.left = SAMPLE_AGAIN
            choice = kept.choice(view, request.link_gbps)
            assert choice is not None  # `_look` has looked at what this request needs

        layers = part.layers[1] - part.layers[0]
        kept.left -= rows_bytes(view, layers, part.count, part.heads[1] - part.heads[0])
        return _chosen(choice)


def _chosen(choice: EncodingChoice) -> Chosen:
    """Return a choice as a message."""
    return Chosen(
        "done",
        choice.why[:1024],
        encoding="" if choice.pack is None else choice.pack.text,
        packing_gbps=choice.packing_gbps,
        ratio=choice.ratio,
        escapes=choice.escapes,
        fits=choice.fits,
    )


# --- in the worker


def _sum(request: Sum, rows: Callable[[], Rows], after: StreamFence) -> int:
    with torch.inference_mode(False), after.inside():
        view, ids = rows()
        return checksum_of(view, ids, request.part)


def _look(request: Choose, view: KVView, rows: Callable[[], Rows], after: StreamFence) -> Kept:
    """Measure the rate of packing, and take a sample if the rates do not decide already.

    The rate is that of the whole view: another measurement for each window of it would hold up the
    worker, which sends the rows of all pulls.
    """
    with torch.inference_mode(False), after.inside():
        why = stays_raw(view, None, None)
        if why:
            return Kept(why)
        rated = rated_choice(view, None, request.link_gbps, None)
        if rated.packing_gbps is None:
            raise TransferError(rated.why)
        if rated.pack is None:
            return Kept(packing_gbps=rated.packing_gbps)

        window, ids = rows()
        unit = window.form.block_size
        slots = ids.slots(request.part.count, every=unit)
        blocks = slots[slots >= 0] // unit
        if not len(blocks):
            raise TransferError("No sample was taken: the owner has none of the blocks.")
        try:
            sampled = best_of(window, Sample(window, blocks, packs_of(None)), None)
        except (PortaKVError, RuntimeError) as error:  # such as a lack of memory
            raise TransferError(f"No sample was taken: {error}") from error
        return Kept(packing_gbps=rated.packing_gbps, sampled=sampled)
