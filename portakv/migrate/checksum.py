# SPDX-License-Identifier: Apache-2.0
"""Checksums by which both sides of a pull compare their bytes.

A checksum is a sum, modulo 2^64, of words. Each word is multiplied by the key of its position in
the whole model. Checksums of parts therefore add up to the checksum of the whole, for any layout
and any sharding.

The key of a position is the product of one odd number for each axis, so the sum is computed axis by
axis. A word has at most half of the bits of the modulus, so its highest bits change the sum too.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from math import gcd
from typing import Generic, NamedTuple, TypeVar

import torch

from portakv.backends.rows_launch import RowsDriver
from portakv.copy import copy_rows
from portakv.errors import TransferError, Unsupported
from portakv.graph.graph import Queue
from portakv.graph.task import Task
from portakv.migrate.checksum_kernel import CachedTables, SumKernel, Table, driver_of
from portakv.migrate.checksum_words import (
    AXIS,
    MIXES,
    STEP,
    WORDS,
    words_of,
    words_of_all,
)
from portakv.migrate.checksum_words import MODULUS as MODULUS
from portakv.migrate.checksum_words import Part as Part
from portakv.migrate.checksum_words import unit_of as unit_of
from portakv.migrate.messages import Box
from portakv.migrate.messages import Part as Rows
from portakv.migrate.staging import chunk, chunk_bytes, page_of, staging
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

A = TypeVar("A")
_log = logging.getLogger(__name__)
# Requests that are retained together. The oldest result that no one fetched is dropped.
_MAX_REQUESTS = 64


class _Batch(NamedTuple):
    """The size of one step of the computation."""

    words: int  # words that are multiplied together
    nbytes: int  # bytes of rows that are gathered together


# On a host, a batch fits the cache of a core, and torch uses one thread, as for all operations of
# less than 2^15 elements: several threads of several processes waited longer than they summed. On a
# device, a batch takes longer than its launches.
_HOST = _Batch((1 << 15) - 1, 2 << 20)
_DEVICE = _Batch(1 << 23, 32 << 20)


def _batch_of(device: torch.device) -> _Batch:
    return _HOST if device.type == "cpu" else _DEVICE


class _Mixer:
    """Sums words of one device, in a private buffer for the words that are multiplied together."""

    def __init__(self, device: torch.device) -> None:
        self.batch = _batch_of(device)
        self.buffer = torch.empty(self.batch.words, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int], torch.Tensor]("keys of checksums", 16)

    def key(self, first: int, n: int) -> torch.Tensor:
        """Return the odd numbers of ``n`` positions of an axis."""
        x = torch.arange(first, first + n, dtype=self.buffer.dtype, device=self.buffer.device)
        x *= STEP
        for shift, factor in MIXES:
            x ^= x >> shift
            x *= factor
        return x.bitwise_or_(1)

    def sum(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Return the sum of words times their keys, without a wait for a device.

        ``starts``: the first position of each axis. Words with one more axis, the first, are
        several parts; the result has a sum of each.
        """
        if words.numel() > self.batch.words:
            return self._sum_in_parts(words, starts)

        # Axes before those of the starts are several parts of one shape.
        axes = words.shape[words.ndim - len(starts) :]
        for first, n in reversed([*zip(starts, axes, strict=True)]):
            key = self.keys.get_or_make((first, n), partial(self.key, first, n))
            product = self.buffer[: words.numel()].view(words.shape)
            words = torch.mul(words, key, out=product).sum(-1)
        return words

    def sum_parts(self, parts: Iterable[Part]) -> tuple[list[int], torch.Tensor]:
        """Return numbers of parts, and sums that add up to the checksums of these numbers.

        Small parts of one shape are summed together. Empty parts have no sums.
        """
        alike = defaultdict[Hashable, list[Part]](list)
        for part in parts:
            tensor = part.tensor
            alike[tensor.shape, tensor.stride(), tensor.dtype, part.start, part.unit].append(part)
        numbers = list[int]()
        sums = list[torch.Tensor]()
        for group in alike.values():
            _, tensor, start, unit = group[0]
            if not tensor.numel():
                continue
            (words, positions) = words_of(tensor, start, unit)
            starts = [axis * AXIS + x for axis, x in enumerate(positions)]
            numbers += [part.number for part in group]
            if len(group) == 1:
                sums.append(self.sum(words, starts).view(1))
            else:
                sums += self._sums_of(group, words.numel(), starts)
        if len(sums) == 1:
            return numbers, sums[0]
        return numbers, torch.cat([*sums, self.buffer[:0]])

    def _sums_of(
        self, group: Sequence[Part], size: int, starts: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """Yield sums of parts of one shape and position, each of ``size`` words."""
        _, _, start, unit = group[0]
        most = max(1, self.batch.words // size)
        for at in range(0, len(group), most):
            some = words_of_all([part.tensor for part in group[at : at + most]], start, unit)
            if len(some) == 1:
                yield self.sum(some[0], starts).view(1)
            else:
                yield self.sum(torch.stack(some), starts)

    def _sum_in_parts(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Split the words along their first axis that is longer than 1, and add up the parts."""
        axis = next(axis for axis, n in enumerate(words.shape) if n > 1)
        n = max(1, self.batch.words * words.shape[axis] // words.numel())
        sums = list[torch.Tensor]()
        for number, part in enumerate(words.split(n, axis)):
            part_starts = [*starts]
            part_starts[axis] += number * n
            sums.append(self.sum(part, part_starts))
        return torch.stack(sums).sum()


def checksum(view: KVView, index: Index, count: int, window: Box, first: int = 0) -> int:
    """Return the checksum of ``count`` positions of an index; skipped positions do not count.

    Opaque pages count whole.

    Args:
        window: the layers and heads of the model that the view contains.
        first: the token of the first position.
    """
    (layers, heads) = window
    size = page_of(view)
    unit = gcd(4, *view.widths)
    sums = BoxSums()

    batch = max(1, _batch_of(view.device).nbytes // view.form.token_bytes) * size
    buffer = staging(chunk_bytes(view, min(count, batch)), view.device)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        part = index.part(start, n)
        (tensors, rows) = chunk(view, n, buffer)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        _zero_skipped(tensors, part, n, size, view.device)

        for kv, tensor in enumerate(tensors):
            words = tensor.view(WORDS[unit])
            # The words of each kv have an axis of their own.
            inner = kv * AXIS + heads[0] * words.shape[2] // view.heads
            starts = layers[0], (first + start) // size, inner
            sums.add([Part(0, words, starts, unit)])
    return sums.results(1)[0]


def checksum_of(view: KVView, index: Index, part: Rows) -> int:
    """Return the checksum of a part of an offer; packed blocks count as slots.

    ``index``: of the part's first position on.
    """
    if not view.form.encoding:
        return checksum(view, index, part.count, part.box, part.first)
    size = view.form.block_size
    blocks = part.count // size
    return checksum(view.as_slots(), index.of_blocks(size), blocks, part.box, part.first // size)


def _zero_skipped(
    tensors: Iterable[torch.Tensor], part: Index, n: int, size: int, device: torch.device
) -> None:
    """Zero the gathered rows of skipped positions: the copy left their former bytes there."""
    if part.ids is None:
        return
    tokens = torch.arange(0, n, size, dtype=torch.int64, device=device)
    skipped = part.ids.to(device)[(tokens + part.offset) // part.step] < 0
    if skipped.any():
        for tensor in tensors:
            tensor[:, skipped] = 0


def box_checksums(boxes: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[int]:
    """Return the checksums of parts of tensors.

    Each part comes with its first element's position in the whole tensor. Words are as wide as the
    ends of a part allow. Checksums of parts add up if their words have one width.
    """
    sums = BoxSums()
    parts = [Part(number, part, (*start,)) for number, (part, start) in enumerate(boxes)]
    sums.add(parts)
    return sums.results(len(parts))


class BoxSums:
    """Adds up checksums of parts of tensors by numbers, on the devices of the parts.

    Only `results` waits for a device, once for each. The first part on a device also waits, while
    `kernel_of` loads and checks a kernel.
    """

    def __init__(self) -> None:
        self._summers = dict[torch.device, SumKernel | _Mixer]()
        self._numbers = defaultdict[torch.device, list[int]](list)
        self._sums = defaultdict[torch.device, list[torch.Tensor]](list)

    def add(self, parts: Iterable[Part], cached: CachedTables | None = None) -> None:
        """Compute the checksums of parts on the current stream of their device.

        ``cached``: gets the tables of the parts, for `again`, if they can be launched again.
        """
        by_device = defaultdict[torch.device, list[Part]](list)
        for part in parts:
            by_device[part.tensor.device].append(part)
        with torch.inference_mode():
            for device, some in by_device.items():
                summer = self._summer(device)
                if cached is None or not isinstance(summer, SumKernel):
                    self._add(device, *summer.sum_parts(some))
                    continue
                tables = list[Table]()
                copied = 0
                for table in summer.tables(some):
                    self._add(device, *summer.sum_tables([table]))
                    copied += table.copied
                    if not copied:  # else the table retains copies, and is not used again
                        tables.append(table)
                if not copied:
                    cached[summer] = tables

    def again(self, device: torch.device, cached: CachedTables) -> bool:
        """Compute the checksums of the parts on a device that `add` has put into ``cached``, which
        lie where they lay; return False if it has put none there."""
        summer = self._summer(device)
        if not isinstance(summer, SumKernel) or summer not in cached:
            return False
        with torch.inference_mode():
            self._add(device, *summer.sum_tables(cached[summer]))
        return True

    def _summer(self, device: torch.device) -> SumKernel | _Mixer:
        """Return what computes checksums on a device."""
        if device not in self._summers:
            self._summers[device] = kernel_of(device) or _Mixer(device)
        return self._summers[device]

    def _add(self, device: torch.device, numbers: list[int], sums: torch.Tensor) -> None:
        self._numbers[device] += numbers
        self._sums[device].append(sums)

    def results(self, count: int) -> list[int]:
        """Return the checksums of the numbers below ``count``."""
        totals = [0] * count
        for device, sums in self._sums.items():
            with torch.inference_mode():
                values = torch.cat(sums).tolist()
            for number, value in zip(self._numbers[device], values, strict=True):
                totals[number] += value
        return [total % MODULUS for total in totals]


_kernels: Bounded[torch.device, SumKernel | None] = Bounded("kernels of checksums", 64)


def kernel_of(device: torch.device) -> SumKernel | None:
    """Return the kernel for checksums on a device; None if torch's operators compute them there.

    The first call for a device compiles the kernel, or reads it from disk, and compares its sums
    with those of the host.
    """
    if device.type == "cpu":
        return None
    return _kernels.get_or_make(device, lambda: load_kernel(device, driver_of))


def load_kernel(
    device: torch.device, find_driver: Callable[[torch.device], RowsDriver]
) -> SumKernel | None:
    """Return the kernel for checksums on a device; None, with a log, if it cannot be used."""
    try:
        kernel = SumKernel(device, find_driver(device))
        right = _agrees(kernel, device)
    except Unsupported as error:
        _log.debug("Checksums on %s use torch's operators. %s", device, error)
        return None
    except (RuntimeError, OSError, TransferError) as error:
        _log.warning("Checksums on %s use torch's operators: no kernel. %s", device, error)
        return None
    if not right:
        _log.warning(
            "Checksums on %s use torch's operators: the kernel's sums are wrong. Report it as a "
            "fault, with the names of the device and its driver.",
            device,
        )
    return kernel if right else None


def _agrees(kernel: SumKernel, device: torch.device) -> bool:
    """Return True if a kernel and the host have the same sums of examples of every word."""
    with torch.inference_mode():
        examples = torch.arange(1 << 12, dtype=torch.int64, device="cpu") * STEP
        expected = _by_number(*_Mixer(examples.device).sum_parts(_parts_of(examples)))
        return _by_number(*kernel.sum_parts(_parts_of(examples.to(device)))) == expected


def _parts_of(examples: torch.Tensor) -> list[Part]:
    """Return parts with whole and odd rows, few and many, of words of each width."""
    tensors = list[torch.Tensor]()
    for dtype in WORDS.values():
        row = examples.view(dtype)
        rows = row.view(64, -1)[:61]
        tensors += [row, row[1:], rows, rows[:, None, 1:], rows[:3].T]
    return [Part(number, x, (1,) * x.ndim) for number, x in enumerate(tensors)]


def _by_number(numbers: Sequence[int], sums: torch.Tensor) -> dict[int, int]:
    totals = defaultdict[int, int](int)
    for number, value in zip(numbers, sums.tolist(), strict=True):
        totals[number] += value
    return {number: total % MODULUS for number, total in totals.items()}


class Later(Generic[A]):
    """Results of a worker for requests that take longer than a channel may, such as checksums.

    A peer repeats its request until the result exists. Only one thread calls this class.
    """

    def __init__(self, name: str, queue: Queue) -> None:
        self._queue = queue
        self._results = Bounded[Hashable, tuple[Task, list[A]]](name, _MAX_REQUESTS)

    def answer(self, question: Hashable, make: Callable[[], A]) -> A | None:
        """Return the result of ``make`` and drop it here, or None if it does not exist yet.

        Raises the error of ``make``.
        """
        task, answers = self._results.get(question, (None, list[A]()))
        if task is not None and task.done():
            del self._results[question]
            if task.error:
                raise task.error
            return answers[0]

        if task is None and len(self._queue.graph.live) < _MAX_REQUESTS:
            task = Task(lambda *_: answers.append(make()), 1, queue=self._queue, name="answer")
            self._results[question] = task, answers
            self._queue.graph.submit([task], priority="urgent")
        return None
