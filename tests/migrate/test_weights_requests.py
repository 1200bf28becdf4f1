# SPDX-License-Identifier: Apache-2.0
"""Requests about weights that cross while a pull does other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.waits import LIMIT
from support.weight_cases import Channels, make_channels, shared, whole_of

from portakv.errors import InvalidTerms, OfferGone, PeerError, TransferError, TransferTimeout
from portakv.migrate.channel import Channel
from portakv.tasks import Work
from portakv.weights import publish, pull, pull_weights
from portakv.weights.messages import END, AskWeights
from portakv.weights.owner import Versioned
from portakv.weights.plan import copy_pairs
from portakv.weights.pull import Owner

channels = pytest.fixture(make_channels)
LISTED = 2  # an item and its region; checksums come after them


class Followed(Channel):
    """A channel that notes its requests about weights."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = list[AskWeights]()
        self.before: Callable[[AskWeights], object] = bool

    async def answer(self, address: str, message: Any, *terms: Any) -> Any:
        if isinstance(message, AskWeights):
            self.asked.append(message)
            await Work(self.before, message)
        return await super().answer(address, message, *terms)


@pytest.fixture
def followed() -> Iterator[Followed]:
    channel = Followed()
    yield channel
    channel.close()


def known(channels: Channels, channel: Channel) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return weights that a channel has pulled before, their memory, and where they land."""
    source = shared(whole_of((6, 8)))
    owner = publish(channels(), {"w": source})
    into = torch.zeros(6, 8, dtype=torch.int32)
    pull_weights(channel, owner.ticket, {"w": into})
    return owner, source, into


def test_a_later_pull_makes_two_requests(channels: Channels, followed: Followed) -> None:
    """The begin brings the checksums; after a change, the owner computes them meanwhile."""
    owner, source, into = known(channels, followed)
    followed.asked.clear()
    pull_weights(followed, owner.ticket, {"w": into})
    assert [(x.first, x.begin) for x in followed.asked] == [(LISTED, True), (END, False)]
    with owner.update():
        source.fill_(5)
    pull_weights(followed, owner.ticket, {"w": into})
    assert into.eq(5).all()
    owner.close()


@pytest.mark.parametrize("asked", [True, False])
def test_a_change_after_the_last_byte_fails_the_pull(
    channels: Channels, followed: Followed, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Negative control: without the question at the end, the pull brings the former values."""
    owner, source, into = known(channels, followed)
    wait = pull.Copies.wait_for_bytes

    def change(copies: pull.Copies) -> None:
        wait(copies)
        with owner.update():
            source.fill_(5)

    async def ask_nothing(_: Owner) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(pull.Copies, "wait_for_bytes", change)
        if asked:
            with pytest.raises(TransferError, match="changed while they were pulled"):
                pull_weights(followed, owner.ticket, {"w": into})
        else:
            patch.setattr(Owner, "confirm", ask_nothing)
            pull_weights(followed, owner.ticket, {"w": into})
            assert not into.eq(5).all()
    pull_weights(followed, owner.ticket, {"w": into})
    assert into.eq(5).all()
    owner.close()


def test_a_change_between_the_begin_and_the_copies_fails_the_pull(
    channels: Channels, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksums that came with the begin are those of the former values."""
    owner, source, into = known(channels, followed)

    def change(pairs: Any) -> None:
        with owner.update():
            source.fill_(5)
        copy_pairs(pairs)

    with monkeypatch.context() as patch:
        patch.setattr(pull, "copy_pairs", change)
        with pytest.raises(TransferError, match="changed while they were pulled"):
            pull_weights(followed, owner.ticket, {"w": into})
    pull_weights(followed, owner.ticket, {"w": into})
    assert into.eq(5).all()
    owner.close()


def test_wrong_arguments_leave_the_connection_usable(
    channels: Channels, followed: Followed
) -> None:
    """The begin is on its way when they are refused."""
    owner, source, into = known(channels, followed)
    for wrong in ({"timeout": 0}, {"timeout": "1"}, {"max_gbps": -1}):
        with pytest.raises(InvalidTerms):
            pull_weights(followed, owner.ticket, {"w": into}, **wrong)
    with pytest.raises((InvalidTerms, PeerError)):
        pull_weights(followed, [owner.ticket, 3], {"w": into})  # type: ignore[list-item]
    into.zero_()
    pull_weights(followed, [owner.ticket], {"w": into})
    assert torch.equal(into, source)
    owner.close()


def test_a_begin_waits_for_an_update_and_ends_with_the_time_of_the_pull(
    channels: Channels, followed: Followed
) -> None:
    owner, source, into = known(channels, followed)
    into.zero_()
    with owner.update():
        with pytest.raises(TransferTimeout, match=r"timed out after 0\.2 s"):
            pull_weights(followed, owner.ticket, {"w": into}, timeout=0.2)
        assert not into.any()
        source.fill_(3)
    pull_weights(followed, owner.ticket, {"w": into})
    assert into.eq(3).all()
    owner.close()
    with pytest.raises(OfferGone):
        pull_weights(followed, owner.ticket, {"w": into})


def test_checksums_that_are_not_computed_yet_are_requested_later(
    channels: Channels, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies do not wait for the owner's worker."""
    owner, source, into = known(channels, followed)
    go_on = threading.Event()
    listed = Versioned.boxes

    def boxes(self: Versioned, numbered: Any = ()) -> Any:
        assert go_on.wait(LIMIT)
        return listed(self, numbered)

    def before(message: AskWeights) -> None:
        if message.first == LISTED and not message.begin:
            assert into.eq(5).all(), "they were copied before"
            go_on.set()

    monkeypatch.setattr(Versioned, "boxes", boxes)
    followed.before = before
    with owner.update():
        source.fill_(5)
    pull_weights(followed, owner.ticket, {"w": into})
    assert go_on.is_set()
    owner.close()
