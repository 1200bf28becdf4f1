# SPDX-License-Identifier: Apache-2.0
"""Readers renew the leases of the offers that they pull."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
from support.migrate_pulls import Clock, Compares, Couple, Sides, sides, waiting_copies
from support.peer_cases import reading
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, OfferGone

SLOW = 2e-3  # 10^9 bytes a second: a pull of 75 tokens takes ten milliseconds
NEVER = 1e-9  # 10^9 bytes a second: a pull of 75 tokens takes hours


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


def test_a_slow_pull_renews_its_offer(made: Sides) -> None:
    both = Couple(made)
    clock = Clock(both.owner)
    offer = both.offer(lease=0.5)
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulled = both.pull(offer, max_gbps=SLOW)
        clock.outlast(offer, 0.5)
        copied.set()
        pulled.synchronize(LIMIT)
    assert until(lambda: offer.state == "taken")  # the owner learns of it after us
    assert both.right()


def test_a_pull_that_compares_digests_for_long_renews_its_offer(made: Sides) -> None:
    both = Couple(made)
    clock = Clock(both.owner)
    offer = both.offer(lease=0.5)
    compares = Compares(both.owner)
    pulled = both.pull(offer, verify=True)
    clock.outlast(offer, 0.5)
    compares.may.set()
    pulled.synchronize(LIMIT)
    assert until(lambda: offer.state == "taken")  # the owner learns of it after us


def test_renewals_end_at_the_longest_lease(made: Sides) -> None:
    both = Couple(made)
    offer = both.offer(lease=0.3, max_lease=0.6)
    with pytest.raises(OfferGone):
        both.pull(offer, max_gbps=NEVER).synchronize(LIMIT)
    assert offer.state == "expired"
    with pytest.raises(InvalidTerms, match="max_lease"):
        both.offer(lease=2.0, max_lease=1.0)


@pytest.mark.parametrize("waits", [True, False])
def test_the_loop_leaves_the_end_to_a_caller_that_waits(made: Sides, waits: bool) -> None:
    """The loop renews the offer meanwhile; without such a caller the loop commits the pull."""
    both = Couple(made)
    clock = Clock(both.owner)
    offer = both.offer(lease=0.5)
    copied = threading.Event()
    looks = list[str]()

    def followed(look: Callable[[], bool]) -> bool:
        looks.append(threading.current_thread().name)
        return look()

    with (
        reading(waiting_copies(both, copied)),
        ThreadPoolExecutor(1) as callers,
        ExitStack() as undo,
    ):
        undo.callback(copied.set)  # a failed assertion must not leave the caller waiting
        pulled = both.pull(offer)
        ends = callers.submit(pulled.synchronize) if waits else None
        assert until(lambda: pulled.has_waiter == waits)
        clock.outlast(offer, 0.5)  # the loop has looked after the pull at least once since
        pulled.look = partial(followed, pulled.look)
        clock.outlast(offer, 0.5)
        assert ("portakv loop" in looks) != waits
        copied.set()
        if ends is not None:
            ends.result(LIMIT)
        assert until(lambda: pulled.concluded)
    assert offer.taken(LIMIT)
    assert both.right()
