# SPDX-License-Identifier: Apache-2.0
"""Call the core to pick transfer strategies, by words that `native/core/pick.h` describes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from struct import Struct
from types import SimpleNamespace

from portakv.core.library import function, function_of_numbers

#: The strategies, the gentlest to a running model first: of equal costs the first one wins.
ORDER = ("staged", "batched_memcpy", "zero_copy", "pageable")
#: For each strategy its bit in a set.
BITS = {name: 1 << number for number, name in enumerate(ORDER)}

# The codes of `core.h`.
SEVERAL, EXPOSED, SLOWED, QUICKER, EXCLUDED = (1 << bit for bit in range(8, 13))
NONE = -70

# `PickReason` of `pick.h`.
(
    EXCLUDED_ALONE,
    WAITLESS,
    LEFT,
    MEASURED,
    GENTLEST,
    RULE_PAGES,
    RULE_SMALL,
    RULE_NARROW,
    RULE_WIDE,
    RULE_EVEN,
    RULE_GATHERED,
) = range(11)

#: `PickRules`: whole numbers, then seconds, rates and parts.
pack_rules = Struct("=10q11d").pack
#: The words of `PickedCopies` before its limits and rules.
pack_copies = Struct("=5q").pack
#: A `Shape` that no strategy has.
NO_SHAPE = (0, -1, 0)
_shapes = Struct(f"={3 * len(ORDER)}q").pack


@cache
def pick_copy() -> Callable[..., int]:
    """Return `portakv_pick_copy`."""
    words = c_void_p, c_void_p
    numbers = (c_int64,) * 5
    return function_of_numbers(7, "pick_copy", *words, *numbers, c_int)


@cache
def _functions() -> SimpleNamespace:
    """Return the functions."""
    words = c_void_p, c_void_p, c_void_p
    return SimpleNamespace(
        pick=function("pick", c_int64, *words, c_int64, c_int64, c_int),
        cost=function("cost", None, c_void_p, c_double, c_double, c_void_p),
    )


def look_up(columns: array[float], run_bytes: int, runs: int) -> tuple[float, float]:
    """Return the seconds of the device and of the host; ``columns``: of one strategy, not empty."""
    out = array("d", bytes(16))
    _functions().cost(columns.buffer_info()[0], run_bytes, runs, out.buffer_info()[0])
    return out[0], out[1]


def pick_by_shapes(
    rules: bytes,
    costs: array[float],
    shapes: Sequence[Sequence[int]],
    out: int,
    waits: int,
    new_ids: bool,
) -> int:
    """Return the answer of `portakv_pick`."""
    words = _shapes(*(word for shape in shapes for word in shape))
    answer: int = _functions().pick(rules, costs.buffer_info()[0], words, out, waits, new_ids)
    return answer


def set_of(strategies: Iterable[str]) -> int:
    """Return strategies as a set of bits."""
    return sum(map(BITS.__getitem__, strategies))
