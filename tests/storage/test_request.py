# SPDX-License-Identifier: Apache-2.0
"""`Request`: what the blocks of a save follow, for one chain of keys and for several."""

from __future__ import annotations

import pytest
from support.storage_cases import key_of

from portakv.storage.calls import Request
from portakv.storage.eviction import FIRST, mark_of

KEYS = [key_of(number) for number in range(6)]
ROOT = key_of(100)
#: What each of `KEYS` follows, and the root of each.
CHAINS: dict[str, tuple[list[bytes | None], list[bytes | None]]] = {
    "a prompt": ([None, *KEYS[:5]], [None] * 6),
    "the end of a prompt": ([ROOT, *KEYS[:5]], [ROOT] * 6),
    "two prompts": ([ROOT, *KEYS[:2], None, *KEYS[3:5]], [ROOT] * 3 + [None] * 3),
    "apart": ([ROOT, None] * 3, [ROOT, None] * 3),
    "a circle": ([KEYS[5], *KEYS[:5]], [None] * 6),
}


@pytest.mark.parametrize("which", CHAINS)
def test_what_blocks_follow(which: str) -> None:
    after, roots = CHAINS[which]
    request = Request("save", KEYS, "background", after=after)
    assert request.roots == roots
    assert request.follows == [FIRST if key is None else mark_of(key) for key in after]
    for some in ([0], [5], [1, 4], range(6), range(3, 6)):
        expected = dict.fromkeys(roots[i] for i in some if roots[i] is not None)
        assert request.before(some) == [*expected]
    before = [key for key in dict.fromkeys(roots) if key is not None]
    assert request.order == {**dict.fromkeys(before, -1), **{k: i for i, k in enumerate(KEYS)}}


def test_a_load_follows_nothing() -> None:
    request = Request("load", KEYS, "urgent")
    assert request.before(range(6)) == []
    assert request.order == {key: place for place, key in enumerate(KEYS)}
