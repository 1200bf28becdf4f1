# SPDX-License-Identifier: Apache-2.0
"""Call the core's planner: words of forms in, words of nests out."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache

from .library import function, function_of_numbers, written

# The codes of `core.h`.
MALFORMED = -1
NO_MEMORY = -2
UNLIKE = -10
UNIT = -11
PAGES = -12
NO_FACTOR = -13
NO_REFINEMENT = -14

#: The words of the longest plan that needs a single call, `PORTAKV_PLAN_LEAST` of `core.h`. A usual
#: plan has 40.
_ROOM = 128


class Refused(Exception):
    """The core has no plan: ``code`` says why, ``values`` are those of the error's sentence."""

    def __init__(self, code: int, values: array[int]) -> None:
        super().__init__(code)
        self.code = code
        self.values = values


def plan_words(src: int, dst: int, src_step: int, dst_step: int, unit: int) -> array[int]:
    """Return the words of a plan; `core.h` describes the arguments of `portakv_plan_make`.

    Args:
        src, dst: addresses of the words of the two forms.

    Raises:
        Refused: there is no plan.
    """
    return _words(_make(), src, dst, src_step, dst_step, unit)


def pack_words(raw: int, packed: int, packs: bool, equal_planes: bool) -> array[int]:
    """Return the words of the plan of a copy that packs or unpacks; see `portakv_plan_pack`.

    Args:
        raw, packed: addresses of the words of the two forms.

    Raises:
        Refused: there is no plan.
    """
    return _words(_pack(), raw, packed, packs, equal_planes)


def _words(write: Callable[..., int], *arguments: int) -> array[int]:
    """Return the words that a function writes, in as much room as they take."""
    count, out = written(write, _ROOM, *arguments)
    if count < 0:
        raise Refused(count, out)
    return out[:count]


@cache
def _make() -> Callable[..., int]:
    """Return `portakv_plan_make`."""
    numbers = (c_int64,) * 3
    forms = c_void_p, c_void_p
    return function_of_numbers(5, "plan_make", *forms, *numbers, c_void_p, c_int64)


@cache
def _pack() -> Callable[..., int]:
    """Return `portakv_plan_pack`."""
    forms = c_void_p, c_void_p
    return function("plan_pack", c_int64, *forms, c_int, c_int, c_void_p, c_int64)
