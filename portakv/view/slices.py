# SPDX-License-Identifier: Apache-2.0
"""Slices of a view: ranges of layers, heads and kv, and the forms and addresses that follow."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import as_whole
from portakv.core.slice import HEADS_CUT, slice_words
from portakv.core.view import words_of_dtypes
from portakv.errors import LayoutError
from portakv.view.bound import Spans
from portakv.view.form import PLACES, Form, form_of


class SlicedForm(NamedTuple):
    """The form of a slice, and the table entries that the slice uses."""

    form: Form
    #: Bytes that each used entry gains. The key is the entry's number times ``copies``, plus which
    #: of the copies it is.
    gained: dict[int, int]
    #: Entries of the slice for each entry of the view.
    copies: int

    @property
    def sources(self) -> list[int]:
        """Return the number of the view's entry for each entry of the slice."""
        return [number // self.copies for number in self.gained]

    def origins(self, origins: Sequence[int]) -> tuple[int, ...]:
        """Return the addresses of the slice, from the addresses of the view."""
        pairs = zip(self.sources, self.gained.values(), strict=True)
        return tuple(origins[entry] + gain for entry, gain in pairs)

    def table(self, table: torch.Tensor) -> torch.Tensor:
        """Return the entries of the slice from a table; the host does not read or wait for it."""
        entries = self.sources
        gains = list(self.gained.values())
        steps = {later - earlier for earlier, later in pairwise(entries)}
        step = min(steps, default=1)
        if len(set(gains)) == 1 and len(steps) < 2 and step > 0:
            picked = table[entries[0] : entries[-1] + 1 : step]
            return (picked + gains[0] if gains[0] else picked).contiguous()
        return torch.stack([table[at] + gain for at, gain in zip(entries, gains, strict=True)])


def slice_form(form: Form, count: int, kv: range, layers: range, heads: range) -> SlicedForm:
    """Return the form of a slice of a view of ``count`` blocks, or of a chunk's tokens.

    Raises:
        LayoutError: the range of layers or heads cuts a factor.
    """
    read = slice_words(form.address, count, kv, layers, heads)
    if isinstance(read, int):
        axis, wanted = ("head", heads) if read == HEADS_CUT else ("layer", layers)
        raise LayoutError(
            f"{axis} {wanted.start}..{wanted.stop} cuts through a factor of the {axis!r} axis; "
            f"slice at multiples of its factors."
        )
    words, copies, gained = read
    of_name = words_of_dtypes()
    dtypes = [of_name[form.dtypes[k]] for k in kv] if form.dtypes else [0] * len(kv)
    rest = array("q", [PLACES.index(form.place), form.table_on_device, *dtypes])
    encoding = tuple([form.encoding[k] for k in kv]) if form.encoding else ()
    return SlicedForm(form_of(words + rest.tobytes(), encoding), gained, copies)


def slice_range(name: str, requested: slice | int | None, extent: int) -> range:
    """Return the positions that a slice of one axis covers; an integer covers one position.

    Raises:
        LayoutError: not an integer or a slice of integers, or an empty or stepped range.
    """
    if requested is None:
        return range(extent)
    try:
        if isinstance(requested, slice):
            result = range(extent)[requested]
        else:
            at = as_whole(requested)
            if at is None:
                raise TypeError
            result = range(at, at + 1) if 0 <= at < extent else range(0)
    except (TypeError, ValueError):
        raise LayoutError(
            f"Expected an integer or a slice of integers, got {name}={requested!r}. Pass one."
        ) from None
    if len(result) < 1 or result.step != 1:
        raise LayoutError(
            f"Expected a range of at least one of {extent} {name} with step 1, got "
            f"{name}={requested}, which covers {list(result)}. Pass a range within the view."
        )
    return result


def spans_within(spans: Spans, storages: Sequence[torch.UntypedStorage]) -> Spans:
    """Return the parts of sorted, disjoint spans that lie in ``storages``."""
    ends = [past for _, past in spans]
    result = []
    for start, end in sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}):
        at = bisect_right(ends, start)
        while at < len(spans) and spans[at][0] < end:
            result.append((max(spans[at][0], start), min(spans[at][1], end)))
            at += 1
    return result


def cover(spans: Spans, ranges: Sequence[tuple[int, int]]) -> bool:
    """Return True if sorted ranges of storages cover every span."""
    for first, past in spans:
        # Storages that touch each other may be parts of one span.
        for start, end in ranges:
            if start <= first < end:
                first = end
        if first < past:
            return False
    return True


def regions(
    storages: Iterable[torch.UntypedStorage],
) -> tuple[tuple[torch.UntypedStorage, int, int], ...]:
    """Return each storage once, with its address and its bytes."""
    # Tensors may share a storage, for which torch makes an object for each of them.
    distinct = {storage._cdata: storage for storage in storages}
    return tuple((each, each.data_ptr(), each.nbytes()) for each in distinct.values())


def storage_edges(storages: Iterable[torch.UntypedStorage]) -> npt.NDArray[np.int64]:
    """Return the first byte of each storage, and then the byte past each."""
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return np.array([*sizes, *map(sum, sizes.items())], dtype=np.int64)
