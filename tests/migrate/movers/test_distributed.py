# SPDX-License-Identifier: Apache-2.0
"""Slots cross by torch.distributed; a peer's death ends them at once, and a new pair is made."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.mover_cases import End, Wire, slot_of, wire

from portakv.errors import PeerError, TransferError, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Bye
from portakv.migrate.movers.distributed import Distributed

NEVER = 300.0  # of the mover's own timeout; what ends before it does not end by it
OWNER = Path(__file__).parent / "owner_process.py"


def empty(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


def test_slots_of_any_size_cross() -> None:
    with wire(Distributed) as both:
        for tag, nbytes in enumerate((0, 1, 7, 1000, 1 << 20)):
            both.cross(nbytes, tag)


def test_slots_cross_in_the_order_in_which_they_are_given_two_at_a_time() -> None:
    with wire(Distributed) as both:
        slots = [slot_of(10_000, seed) for seed in range(8)]
        given = [both.give(slot, tag % 2) for tag, slot in enumerate(slots)]
        into = [empty(10_000) for _ in slots]
        for tag, each in enumerate(into):
            both.take(each, tag % 2).wait(20)
        assert all(map(torch.equal, slots, into))
        for moving in given:
            moving.wait(20)


def test_a_take_before_the_give_waits_for_it() -> None:
    with wire(Distributed) as both:
        into = empty(1000)
        taking = both.take(into)
        with suppress(TimeoutError):
            taking.wait(0.1)
        both.give(slot_of(1000)).wait(20)
        taking.wait(20)
        assert torch.equal(into, slot_of(1000))


def test_nothing_of_the_callers_settings_matters() -> None:
    with wire(Distributed) as both, torch.inference_mode(), torch.device("meta"):
        both.cross(1000)


@pytest.mark.parametrize("side", ["take", "give"])
def test_a_death_that_the_channel_notices_ends_what_is_under_way(side: str) -> None:
    """Fault 5. Not the mover's timeout ends it; the slot is free, and a new pair is made."""
    with wire(Distributed, NEVER) as both:
        both.cross(100)
        slots = [slot_of(1 << 20), slot_of(1 << 20)]
        only = list(both.life.calls.items())[side == "take"]  # the other side hears nothing
        both.life.calls = dict([only])
        moving = [getattr(both, side)(slot, tag) for tag, slot in enumerate(slots)]
        time.sleep(0.1)  # so that gloo has the first one
        both.life.end()
        for each in moving:
            with pytest.raises(PeerError, match="peer is gone"):
                each.wait(20)
            assert each.free.is_set()
        both.life.end()
        both.owner.forget(both.life)
        both.reader.forget(End.address)
        both.connect()
        both.cross(100)


def test_an_owner_killed_in_mid_chunk_is_told_by_the_channel() -> None:
    """Fault 5. A real process, killed while a slot of it crosses; gloo alone would wait on, and the
    thread that it blocks does."""
    channel = Channel()
    owner = subprocess.Popen([sys.executable, str(OWNER)], stdout=subprocess.PIPE, text=True)
    mover = Distributed(torch.device("cpu"), NEVER)
    try:
        assert owner.stdout is not None
        address, nbytes = owner.stdout.readline().split()
        into = empty(int(nbytes))
        channel.ask(address, Bye(), Answer)
        taking = mover.lane(address, channel).move(into, 0)
        while not (into[0] or taking.over.is_set()):
            time.sleep(1e-4)
        owner.kill()
        with pytest.raises(PeerError):
            taking.wait(60)
        assert taking.free.is_set()
        landed = into.clone()
        assert landed[0] == 7  # it was in the middle of it
        assert not landed.all()
        assert mover.lanes == {}
    finally:
        owner.kill()
        owner.wait()
        mover.close()
        channel.close()


@pytest.mark.parametrize(("given", "asked"), [(5000, 100), (100, 5000), (1, 0)])
def test_a_slot_of_another_length_is_an_error_on_either_side(given: int, asked: int) -> None:
    """Fault 29. gloo takes too few bytes for all, and ends the process if there are too many."""
    with wire(Distributed) as both:
        giving, into = both.give(slot_of(given)), empty(asked)
        with pytest.raises(PeerError, match=f"{given} B came, {asked} were asked for"):
            both.take(into).wait(20)
        with pytest.raises(PeerError):
            giving.wait(20)
        assert not into.any()
        both.cross(1000)


def test_the_timeout_is_the_last_resort() -> None:
    """Fault 8. A peer that gives nothing, and lives."""
    with wire(Distributed) as both:
        both.cross(100)
        both.reader.timeout = 0.3
        taking = both.take(empty(100))
        with pytest.raises(TransferError, match="did not cross"):
            taking.wait(20)


def test_many_pairs_of_one_owner_cross_at_once() -> None:
    """Fault 32. No pair waits for another."""
    wires = [Wire(Distributed) for _ in range(8)]
    threads = [threading.Thread(target=each.cross, args=(1 << 18,)) for each in wires]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    for each in wires:
        each.reader.close()
        each.owner.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_refuses_and_leaves_its_parents_pair_alone() -> None:
    """Fault 31. The child closes what it inherited; the parent goes on."""
    with wire(Distributed) as both:
        both.cross(100)
        child, code = os.fork(), 1
        if not child:
            try:
                both.give(slot_of(100))
            except Unsupported:
                both.owner.close()
                both.reader.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        both.cross(100)


def test_a_channel_that_watches_nobody_leaves_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    with wire(Distributed) as both:

        def closed(*_: object) -> None:
            raise PeerError("The channel was closed.")

        monkeypatch.setattr(both.here, "watch", closed)
        with pytest.raises(PeerError, match="channel was closed"):
            both.take(empty(100))
        assert both.reader.lanes == {}


def test_no_thread_is_left_of_a_mover_that_was_closed() -> None:
    before = set(threading.enumerate())
    with wire(Distributed) as both:
        both.cross(100)
    until = time.monotonic() + 20
    while any(x.name == "portakv-mover" for x in set(threading.enumerate()) - before):
        assert time.monotonic() < until
        time.sleep(0.01)
