# SPDX-License-Identifier: Apache-2.0
"""Published tensors, the number of their version, and their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from operator import attrgetter, ne
from weakref import WeakSet

import torch
from msgspec import msgpack

from portakv.errors import LayoutError
from portakv.migrate.checksum import box_checksums
from portakv.runtime.bounded import Bounded
from portakv.tasks import Limit, TaskGroup, runtime
from portakv.weights.parameters import Box, Item, Parameter, forms_of, part_of

#: How often the checksums were forgotten, the version, and the encoded boxes that are numbered.
_Key = tuple[int, int, bytes]

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
        self._memory = forms_of(self._tensors())
        # Updates in progress; weak, because the end of an update may be interrupted.
        self.updates = WeakSet[Update]()

    def _tensors(self) -> list[torch.Tensor]:
        """Return the tensors; none once the publication was closed."""
        return [x.tensor for x in [*self.parameters.values()]]

    def version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        tensors = self._tensors()
        try:
            counts = [*map(_version_of, tensors)]
        except RuntimeError:  # inference tensors have no counter
            counts = [x._version for x in tensors if not x.is_inference()]
        return self.changes + sum(counts)

    def replaced(self) -> str | None:
        """Return the name of a tensor that has other memory than when it was published."""
        memory = forms_of(self._tensors())
        if memory == self._memory or not memory[0]:  # or the publication was closed
            return None
        now = zip(*memory, strict=True)
        then = zip(*self._memory, strict=True)
        return next(compress(self.items, map(ne, now, then)), None)

    def boxes(
        self, numbered: Sequence[tuple[int, Box]] = ()
    ) -> Iterator[tuple[str, torch.Tensor, Box]]:
        """Yield boxes of numbered items, each with the first name of its memory and its tensor.

        Without a number: each box of each item, in order. Raises as `numbered`.
        """
        items = [*self.items.values()]
        if not numbered and self.parameters:  # else the publication was closed
            numbered = [(n, box) for n, item in enumerate(items) for box in item.boxes]
        tensors = self.numbered(number for number, _ in numbered)
        for (number, box), tensor in zip(numbered, tensors, strict=True):
            yield items[number].tie, tensor, box

    def numbered(self, numbers: Iterable[int]) -> list[torch.Tensor]:
        """Return the tensors of numbered items; raise `LayoutError` for a wrong number."""
        tensors = self._tensors()
        try:
            return [tensors[number] for number in numbers]
        except IndexError:
            what = f"Expected numbers below {len(tensors)}, got others. Pull again."
            raise LayoutError(what) from None


#: Computations that a publication begins while others run.
_MOST = 256


class Checksums:
    """The checksums of published weights, computed once for each version by helpers.

    One thread at a time calls it.

    Args:
        tasks: of the publication.
    """

    def __init__(self, weights: Versioned, tasks: TaskGroup) -> None:
        self._weights = weights
        self._tasks = tasks
        self._turn = Limit(runtime())  # one computation at a time
        # A part of each result's key: what a helper began before `forget` is not used after it.
        self._forgotten = 0
        # Empty while a helper computes them, and if the weights have changed meanwhile.
        self._known = Bounded[_Key, list[int] | Exception]("known checksums of weights", _MOST)

    def of(self, version: int, numbered: Sequence[tuple[int, Box]] = ()) -> list[int] | None:
        """Return the checksums of boxes of numbered items, or of all boxes of all items in order.

        None: a helper computes them. Raises the error of the computation, such as `LayoutError` for
        a wrong number.
        """
        key = self._forgotten, version, msgpack.encode(numbered)
        if key not in self._known and len(self._tasks) < _MOST:
            self._known[key] = []
            self._tasks.start(self._make(key, numbered))
        sums = self._known.get(key)
        if isinstance(sums, Exception):
            del self._known[key]
            raise sums
        return sums or None

    async def _make(self, key: _Key, numbered: Sequence[tuple[int, Box]]) -> None:
        try:
            self._known[key] = await self._turn.work(self._compute, key[1], numbered)
        except Exception as error:  # whoever requested them gets it
            self._known[key] = error

    def _compute(self, version: int, numbered: Sequence[tuple[int, Box]]) -> list[int]:
        """Return checksums, each memory's computed once; none if no pull can use them."""
        if self._weights.version() != version:
            return []
        places = list[int]()
        numbers = dict[object, int]()
        boxes = list[tuple[torch.Tensor, Box]]()
        for tie, tensor, box in self._weights.boxes(numbered):
            number = numbers.setdefault((tie, box), len(boxes))
            places.append(number)
            if number == len(boxes):
                boxes.append((tensor, box))
        sums = checksums(boxes)
        return [sums[number] for number in places]

    def forget(self) -> None:
        """Compute all checksums anew when they are next requested."""
        self._forgotten += 1
        self._known.clear()


def checksums(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """Return the checksums of boxes of tensors, by their place in the whole tensor."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)
