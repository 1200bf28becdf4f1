# SPDX-License-Identifier: Apache-2.0
"""Call the core to slice forms, by words that `native/core/core.h` describes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

from portakv.core.library import function_of_numbers, written
from portakv.errors import PortaKVError

# The codes of `core.h`.
HEADS_CUT = -80
LAYERS_CUT = -81

_ROOM = 128  # words that most answers take


@cache
def _slice() -> Callable[..., int]:
    """Return `portakv_form_slice`."""
    return function_of_numbers(9, "form_slice", c_void_p, c_int64, c_void_p, c_void_p, c_int64)


def slice_words(
    form: int, count: int, kv: range, layers: range, heads: range
) -> tuple[bytes, int, dict[int, int]] | int:
    """Return the words of the form of a slice, the copies of an entry, and for the number of each
    entry the bytes that its address gains; or a code of a factor that is cut.

    Args:
        form: the address of the words of a form.
        count: blocks of the view, or tokens of a chunk.
    """
    ranges = array("q", [kv.start, len(kv), layers.start, len(layers), heads.start, len(heads)])
    at = ranges.buffer_info()[0]
    number, out = written(_slice(), _ROOM, form, count, at)
    if number in (HEADS_CUT, LAYERS_CUT):
        return number
    if number < 0:
        raise PortaKVError("Expected a form and ranges that fit it. Report this as a bug.")
    copies, entries = out[:2]
    past = 2 + 2 * entries
    gained = dict(zip(out[2:past:2], out[3:past:2], strict=True))
    return out[past:number].tobytes(), copies, gained
