# SPDX-License-Identifier: Apache-2.0
"""Published tensors, the number of their version, and their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, ne
from weakref import WeakSet

import torch
from msgspec import msgpack

from portakv.errors import LayoutError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.checksum import Later, box_checksums
from portakv.runtime.bounded import Bounded
from portakv.weights.parameters import Box, Item, Parameter, part_of

_kind_of = attrgetter("device", "dtype", "shape")
_version_of: Callable[[torch.Tensor], int] = attrgetter("_version")


class Update:
    """An update of published weights in progress."""


class Versioned:
    """Published tensors with their descriptions, and the number of their version."""

    def __init__(self, parameters: dict[str, Parameter], items: dict[str, Item]) -> None:
        self.parameters = parameters
        self.items = items
        self.changes = 0
        # `parameters` retains the tensors, which may get other memory.
        self._names = [*parameters]
        self._memory = _memory_of(parameters)
        # Updates in progress; weak, because the end of an update may be interrupted.
        self.updates = WeakSet[Update]()

    def version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        tensors = [x.tensor for x in [*self.parameters.values()]]
        try:
            counts = [*map(_version_of, tensors)]
        except RuntimeError:  # inference tensors have no counter
            counts = [x._version for x in tensors if not x.is_inference()]
        return self.changes + sum(counts)

    def replaced(self) -> str | None:
        """Return the name of a tensor that has other memory than when it was published."""
        memory = _memory_of({**self.parameters})
        if memory == self._memory or not memory[0]:  # or the publication was closed
            return None
        now = zip(*memory, strict=True)
        then = zip(*self._memory, strict=True)
        return next(compress(self._names, map(ne, now, then)), None)

    def boxes(self) -> Iterator[tuple[str, torch.Tensor, Box]]:
        """Yield each box of each item, with its tensor and the first name of its memory."""
        parameters = {**self.parameters}
        for name, item in self.items.items():
            if name in parameters:  # else the publication was closed
                for box in item.boxes:
                    yield item.tie, parameters[name].tensor, box

    def numbered(self, boxes: Sequence[tuple[int, Box]]) -> list[tuple[torch.Tensor, Box]]:
        """Return boxes of numbered items with their tensors; raise `LayoutError` for a wrong
        number."""
        parameters = [*self.parameters.values()]
        if any(number >= len(parameters) for number, _ in boxes):
            raise LayoutError(f"Expected numbers below {len(parameters)}, got others. Pull again.")
        return [(parameters[number].tensor, box) for number, box in boxes]


def _memory_of(parameters: Mapping[str, Parameter]) -> tuple[list[object], ...]:
    """Return which memory each tensor has, and how its elements lie there, in columns.

    Each `map` makes its calls without a step of Python for a tensor: a channel's thread compares
    all tensors while a reader waits.
    """
    tensors = [x.tensor for x in parameters.values()]
    return (
        [*map(torch.Tensor.data_ptr, tensors)],
        [*map(_kind_of, tensors)],
        [*map(torch.Tensor.stride, tensors)],
    )


class Checksums:
    """The checksums of published weights, computed once for each version by a worker.

    Only the channel's thread calls `all` and `of`.
    """

    def __init__(self, weights: Versioned, graph: Graph) -> None:
        self._weights = weights
        self._queue = graph.queue("weights")
        self._task: Task | None = None
        # A part of each result's key: what a worker began before `forget` is not used after it.
        self._forgotten = 0
        self._done: tuple[tuple[int, int], list[int]] | None = None
        self._later = Later[list[int]]("checksums of weights", self._queue)
        self._parts = Bounded[tuple[int, int, bytes], list[int]](
            "checksums of parts of weights", 256
        )

    def start(self) -> None:
        """Compute the checksums of all boxes, unless a worker does."""
        if self._task is None or self._task.ended:
            self._task = Task(self._compute, 1, queue=self._queue, name="checksums")
            self._queue.graph.submit([self._task])

    def _compute(self, *_: object) -> None:
        """Compute all checksums, each memory's once, and cache them with their version."""
        weights = self._weights
        before = self._forgotten, weights.version()
        places = list[int]()
        numbers = dict[object, int]()
        boxes = list[tuple[torch.Tensor, Box]]()
        for tie, tensor, box in weights.boxes():
            number = numbers.setdefault((tie, box), len(boxes))
            places.append(number)
            if number == len(boxes):
                boxes.append((tensor, box))
        sums = checksums(boxes)
        if not weights.updates and weights.version() == before[1]:
            self._done = before, [sums[number] for number in places]

    def all(self, version: int) -> list[int] | None:
        """Return the checksums of all boxes of all items; None: a worker computes them.

        Raises the worker's error.
        """
        done = self._done
        if done is not None and done[0] == (self._forgotten, version):
            return done[1]
        task = self._task
        if task is not None and task.ended and task.error is not None:
            self._task = None
            raise task.error
        self.start()
        return None

    def refresh(self, version: int) -> None:
        """Start to compute all checksums if they are those of another version."""
        if self._done is None or self._done[0] != (self._forgotten, version):
            self.start()

    def of(self, numbered: Sequence[tuple[int, Box]], version: int) -> list[int] | None:
        """Return the checksums of boxes of numbered items; None: a worker computes them."""
        key = self._forgotten, version, msgpack.encode(numbered)
        if key in self._parts:
            return self._parts[key]
        boxes = self._weights.numbered(numbered)
        sums = self._later.answer(key, partial(checksums, boxes))
        if sums is not None:
            self._parts[key] = sums
        return sums

    def forget(self) -> None:
        """Compute all checksums anew when they are next requested."""
        self._forgotten += 1
        self._done = None
        self._parts.clear()


def checksums(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """Return the checksums of boxes of tensors, by their place in the whole tensor."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)
