# SPDX-License-Identifier: Apache-2.0
"""Pulls of weights whose caller does not wait: their end, errors, cancellation, and forks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import ready
from support.waits import LIMIT
from support.weight_cases import Between, Channels, make_channels, shared, whole_of

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.weights import publish, pull_weights
from portakv.weights.pull import WeightsPull

channels = pytest.fixture(make_channels)


@contextmanager
def waiting(channels: Channels) -> Iterator[tuple[WeightsPull, threading.Event, Any, torch.Tensor]]:
    """A pull that waits before it requests checksums, until the event is set."""
    go_on = threading.Event()
    copied = threading.Event()

    def pause() -> None:
        copied.set()
        go_on.wait(LIMIT)

    published = publish(channels(), {"w": shared(whole_of((4, 3)))})
    between = Between(channels(), pause)
    into = torch.zeros(4, 3, dtype=torch.int32)
    try:
        pull = pull_weights(between, published.ticket, {"w": into}, wait=False)
        assert copied.wait(LIMIT)
        yield pull, go_on, published, into
    finally:
        go_on.set()
        published.close()


def test_a_pull_returns_before_its_end(channels: Channels) -> None:
    with waiting(channels) as (pull, go_on, _, into):
        assert not pull.done()
        assert not pull.ended
        assert pull.error is None
        assert pull.nbytes == 0
        with pytest.raises(TransferTimeout, match="goes on"):
            pull.synchronize(0.05)
        go_on.set()
        pull.synchronize(LIMIT)
        assert pull.done()
        assert pull.ended
        assert pull.nbytes == into.nbytes
        assert torch.equal(into, torch.from_numpy(whole_of((4, 3))))
        pull.wait()
        assert not pull.cancel()
        assert pull.error is None


def test_a_cancelled_pull_ends_with_an_error(channels: Channels) -> None:
    with waiting(channels) as (pull, go_on, *_):
        assert pull.cancel()
        go_on.set()
        with pytest.raises(TransferCancelled, match="Do not use"):
            pull.synchronize(LIMIT)
        assert isinstance(pull.error, TransferCancelled)
        assert pull.nbytes == 0
        for end in (pull.done, pull.wait, pull.synchronize):
            with pytest.raises(TransferCancelled):
                end()


def test_a_pull_that_waits_is_cancelled_immediately(channels: Channels) -> None:
    """It waits for its rate, or for a pull whose rate has its lane."""
    published = publish(channels(), {str(i): torch.ones(20 << 20) for i in range(2)})
    channel = channels()
    tensors = {str(i): torch.zeros(20 << 20) for i in range(2)}
    paced = pull_weights(channel, published.ticket, tensors, wait=False, max_gbps=1e-5)
    until = time.monotonic() + LIMIT
    while not published.statistics()["lanes"] and time.monotonic() < until:
        time.sleep(1e-3)
    waits = pull_weights(channel, published.ticket, tensors, wait=False)
    time.sleep(0.05)
    for pull in (waits, paced):
        assert pull.cancel()
        with pytest.raises(TransferCancelled):
            pull.synchronize(LIMIT)
        pull.cancel()
    pull_weights(channel, published.ticket, tensors, timeout=LIMIT)
    assert all(x.eq(1).all() for x in tensors.values())
    published.close()


def test_an_update_fails_a_pull_in_flight(channels: Channels) -> None:
    with waiting(channels) as (pull, go_on, published, _):
        with published.update():
            pass
        go_on.set()
        with pytest.raises(TransferError, match="changed while they were pulled"):
            pull.synchronize(LIMIT)


def test_a_publication_that_ends_fails_a_pull_in_flight(channels: Channels) -> None:
    with waiting(channels) as (pull, go_on, published, _):
        published.close()
        go_on.set()
        with pytest.raises(OfferGone):
            pull.synchronize(LIMIT)


def test_wrong_arguments_are_refused_by_the_call(channels: Channels) -> None:
    """What only the owner knows, such as a shape, is an error of the pull."""
    published = publish(channels(), {"w": shared(whole_of((4, 3)))})
    into = torch.zeros(4, 3, dtype=torch.int32)
    wrong: list[Any] = [0, 1, None, "no"]
    for wait in wrong:
        with pytest.raises(InvalidTerms, match="Expected wait"):
            pull_weights(channels(), published.ticket, {"w": into}, wait=wait)
    with pytest.raises(LayoutError, match="expanded"):
        pull_weights(channels(), published.ticket, {"w": into[:1].expand(4, 3)}, wait=False)
    pull = pull_weights(channels(), published.ticket, {"w": into[:3]}, wait=False)
    with pytest.raises(LayoutError, match="its shape is"):
        pull.synchronize(LIMIT)
    assert not into.any()
    published.close()


def test_an_error_of_another_kind_is_a_transfer_error(channels: Channels) -> None:
    published = publish(channels(), {"w": shared(whole_of((4,)))})

    def fail() -> None:
        raise ZeroDivisionError("no")

    into = torch.zeros(4, dtype=torch.int32)
    pull = pull_weights(Between(channels(), fail), published.ticket, {"w": into}, wait=False)
    with pytest.raises(TransferError, match="failed: ZeroDivisionError"):
        pull.synchronize(LIMIT)
    published.close()


def test_several_pulls_are_in_flight(channels: Channels) -> None:
    source = shared(whole_of((1000, 50)))
    published = publish(channels(), {str(i): source[i] for i in range(1000)})
    channel = channels()
    tensors = [torch.zeros(1000, 50, dtype=torch.int32) for _ in range(6)]
    pulls = [
        pull_weights(channel, published.ticket, {str(i): x[i] for i in range(1000)}, wait=False)
        for x in tensors
    ]
    for pull, tensor in zip(pulls, tensors, strict=True):
        pull.synchronize(LIMIT)
        assert torch.equal(tensor, source)
    published.close()


def test_a_dropped_pull_goes_on(channels: Channels) -> None:
    published = publish(channels(), {"w": shared(whole_of((4,)))})
    into = torch.zeros(4, dtype=torch.int32)
    pull_weights(channels(), published.ticket, {"w": into}, wait=False)
    until = time.monotonic() + 20
    while not into.all() and time.monotonic() < until:
        time.sleep(1e-3)
    assert into.tolist() == [1, 2, 3, 4]
    published.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_pull(channels: Channels) -> None:
    with waiting(channels) as (pull, *_):
        pid = os.fork()
        if not pid:
            try:
                pull.synchronize(LIMIT)
            except TransferError as error:
                os._exit(7 if "forked" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


_ENDS = """
import atexit, sys

# The last of the functions at the end of the process, because it is the first one here.
atexit.register(lambda: print(pull.ended and type(pull.error).__name__))

import torch
from portakv.migrate import Channel, pull_weights

channel = Channel()
into = torch.zeros(32 << 20)  # four batches; by the rate the second one's turn is after 160 s
pull = pull_weights(channel, bytes.fromhex(sys.argv[1]), {"w": into}, wait=False, max_gbps=2e-4)
while not into[0].item():
    pass
"""


@pytest.mark.full
def test_the_end_of_the_process_cancels_a_pull_in_flight(channels: Channels) -> None:
    """It would wait 10 s for the worker otherwise, and leave it in the middle of the pull."""
    published = publish(channels(), {"w": torch.ones(32 << 20).share_memory_()})
    ended = ready.run("-c", _ENDS, published.ticket.hex(), timeout=LIMIT)
    assert ended.stdout == "TransferCancelled\n", ended.stderr
    published.close()


@pytest.mark.gpu
def test_a_pull_on_a_device_follows_the_caller_s_stream(channels: Channels) -> None:
    """The destination is written by the stream of the caller, before the copy."""
    from support.peer_process import Peer

    with Peer() as owner:
        ticket = owner.do(
            "import torch\n"
            "from portakv.migrate import Channel, publish\n"
            "channel = Channel(timeout=20.0)\n"
            "tensors = {str(i): torch.full((1 << 18,), i, device='cuda:0') for i in range(40)}\n"
            "published = publish(channel, tensors)\n"
            "answer = published.ticket\n"
        )
        into = {str(i): torch.zeros(1 << 18, dtype=torch.int64, device="cuda:0") for i in range(40)}
        channel = channels()
        busy = torch.ones(8192, 8192, device="cuda:0")
        for _ in range(2):
            for _ in range(60):  # the fills come after work of a tenth of a second
                busy = busy @ busy / 8192
            for tensor in into.values():
                tensor.fill_(-1)
            pull = pull_weights(channel, ticket, into, wait=False)
            pull.synchronize(LIMIT)
            assert pull.nbytes == 40 << 21
            for i in range(40):
                assert into[str(i)].eq(i).all()
