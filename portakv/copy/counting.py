# SPDX-License-Identifier: Apache-2.0
"""Count the copies of this process, from the first call of `count_copies` on."""

from __future__ import annotations

from collections import Counter, deque
from threading import Lock

from portakv.runtime.bounded import making
from portakv.view.form import Form

#: New copies that are added up together.
TOGETHER = 512


class CopyCounts:
    """The copies that were issued and their bytes, by strategy and by the places of both sides.

    Any thread may call. A copy is noted in one step, without a lock. One in `TOGETHER` adds all up.

    Attributes:
        new: the arguments of `add`.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.new = deque[tuple[str, str, Form, int]]()
        self._copies = Counter[tuple[str, str, str]]()
        self._nbytes = Counter[tuple[str, str, str]]()

    def add(self, strategy: str, src: str, dst: Form, tokens: int) -> None:
        """Count a copy by its strategy, the place of the source's rows and the form of the
        destination."""
        self.new.append((strategy, src, dst, tokens))
        if len(self.new) >= TOGETHER:
            self.sum_up()

    def sum_up(self) -> None:
        """Add what is new: most copies are alike, so `Counter` counts them first."""
        with self._lock:
            new = [self.new.popleft() for _ in range(len(self.new))]
            for (strategy, src, dst, tokens), copies in Counter(new).items():
                key = strategy, src, dst.place
                size = dst.token_bytes * tokens
                if dst.opaque:  # of a page
                    size //= dst.block_size or 1
                self._copies[key] += copies
                self._nbytes[key] += size * copies

    def figures(self) -> dict[str, list[dict[str, str | float]]]:
        """Return figures by the names of metrics: samples with labels and a "value"."""
        self.sum_up()
        figures: dict[str, list[dict[str, str | float]]] = {}
        with self._lock:
            both = {"copies_total": self._copies, "copy_bytes_total": self._nbytes}
            for name, counted in both.items():
                figures[name] = [
                    {"strategy": strategy, "src": src, "dst": dst, "value": value}
                    for (strategy, src, dst), value in counted.items()
                ]
        return figures

    def close(self) -> None:
        """Count no further copy; `count_copies` then begins anew."""
        with making():
            if Counted.counts is self:
                Counted.counts = None


class Counted:
    """What counts the copies of this process; None as long as nothing asks for it."""

    counts: CopyCounts | None = None


def count_copies() -> CopyCounts:
    """Return the counts of the copies of this process, which are counted from the first call on.

    For `Collector` and `portakv.graph.open_telemetry.observe`. A copy that is replayed by a graph
    of a device is counted once, when it is captured.
    """
    with making():
        if Counted.counts is None:
            Counted.counts = CopyCounts()
        return Counted.counts
