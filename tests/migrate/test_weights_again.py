# SPDX-License-Identifier: Apache-2.0
"""Weights that are pulled again: what stays open and planned, and wrong bytes that are found."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from msgspec.structs import replace
from support.peer_process import Peer
from support.waits import LIMIT
from support.weight_cases import (
    Between,
    Channels,
    find_wrong_copies,
    make_channels,
    shared,
    whole_of,
)

from portakv.errors import LayoutError, OfferGone, PeerError
from portakv.weights import Parameter, prepare_weights, publish, pull_weights
from portakv.weights import owner as owners
from portakv.weights.messages import Weights
from portakv.weights.owner import Versioned, checksums
from portakv.weights.parameters import Box, items_of
from portakv.weights.plan import copy_pairs
from portakv.weights.pull import publications

T = TypeVar("T")
channels = pytest.fixture(make_channels)


def test_bytes_that_a_copy_changes_are_found(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, parts and tied names, each bit; without the change the pull succeeds."""
    rows = shared(whole_of((6, 8)))
    owner = publish(channels(), {"whole": rows, "part": shared(whole_of((6, 8)))})
    channel = channels()
    into = torch.zeros(6, 8, dtype=torch.int32)
    part = torch.zeros(6, 4, dtype=torch.int32)
    local: dict[str, Parameter | torch.Tensor] = {
        "whole": into,
        "part": Parameter.split(part, 1, (8,), (1, 2)),
    }
    pull = partial(pull_weights, channel, owner.ticket, local)
    find_wrong_copies(monkeypatch, pull, {"whole": into, "part": part})
    owner.close()


def test_a_second_pull_opens_nothing_and_requests_no_items(channels: Channels) -> None:
    """Also after a change of the values; another pull of other tensors has another plan."""
    whole = shared(whole_of((9, 4)))
    owner = publish(channels(), {str(i): whole[i] for i in range(9)})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask
    answers = list[Weights]()

    def follow(*arguments: Any) -> Any:
        answers.append(ask(*arguments))
        return answers[-1]

    between.ask = follow
    into = torch.zeros(9, 4, dtype=torch.int32)
    local = {str(i): into[i] for i in range(9)}
    pull_weights(between, owner.ticket, local)
    assert sum(len(x.items) for x in answers) == 9
    assert sum(len(x.regions) for x in answers) == 1, "the allocation, and not each tensor"
    for values in (5, 6):
        answers.clear()
        with owner.update():
            whole.fill_(values)
        pull_weights(between, owner.ticket, local)
        assert into.eq(values).all()
        assert not any(x.items or x.regions for x in answers)
    other = torch.zeros(9, 4, dtype=torch.int32)
    pull_weights(between, owner.ticket, {str(8 - i): other[i] for i in range(9)})
    assert other.eq(6).all()
    owner.close()


def test_memory_stays_open_until_the_connection_ends(channels: Channels) -> None:
    """Or until the owner closes the publication; no descriptor is left meanwhile."""
    tensors = {str(i): shared(whole_of((5000,))) for i in range(30)}
    addresses = {x.data_ptr() for x in tensors.values()}

    def mapped() -> int:
        """Mappings of the tensors' files, the owner's own not counted."""
        lines = [x.split() for x in Path("/proc/self/maps").read_text().splitlines()]
        # By device and inode: files of another device have the same numbers.
        files = {(x[3], x[4]) for x in lines if int(x[0].split("-")[0], 16) in addresses}
        return sum((x[3], x[4]) in files for x in lines) - len(addresses)

    owner = publish(channels(), tensors)
    local = {name: torch.zeros(5000, dtype=torch.int32) for name in tensors}
    first = channels()
    for channel in (first, channels()):
        descriptors = len(os.listdir("/proc/self/fd"))
        prepare_weights(channel, owner.ticket, local)
        assert not any(x.any() for x in local.values())
        assert mapped() == 30
        assert len(os.listdir("/proc/self/fd")) < descriptors + 15
        if channel is first:
            channel.close()
        else:
            pull_weights(channel, owner.ticket, local)
            owner.close()
            with pytest.raises(OfferGone):
                pull_weights(channel, owner.ticket, local)
        gc.collect()
        assert mapped() == 0


def test_a_reader_that_publishes_what_it_pulls_reports_the_change(channels: Channels) -> None:
    """Its own readers never get a mixture: torch counts the copy as a change of the tensors."""
    source = shared(whole_of((6, 4)))
    first = publish(channels(), {"w": source})
    relayed = {"w": torch.zeros_like(source).share_memory_()}
    second = publish(channels(), relayed)
    into = {x: torch.zeros_like(y) for x, y in relayed.items()}
    channel = channels()
    for values in (7, 8):
        with first.update():
            source.fill_(values)
        pull_weights(channels(), first.ticket, relayed)
        pull_weights(channel, second.ticket, into)
        assert all(x.eq(values).all() for x in into.values())
    first.close()
    second.close()


def test_memory_of_a_former_publication_is_released(channels: Channels) -> None:
    """A trainer that publishes again and again keeps no reader's memory open."""
    there = channels()
    here = channels()
    source = shared(whole_of((6, 4)))
    into = torch.zeros(6, 4, dtype=torch.int32)
    before = len(publications)
    for _ in range(5):
        published = publish(there, {"w": source})
        pull_weights(here, published.ticket, {"w": into})
        assert len(publications) <= before + 1
    here.close()
    assert not [key for key in publications if key[0] == here.id]


def test_places_outside_of_a_region_are_the_owners_error(channels: Channels) -> None:
    """An owner that lies about places, strides or handles; nothing is written."""
    owner = publish(channels(), {"w": shared(whole_of((4,)))})
    lies: list[dict[str, Any]] = [
        {"place": (0, 1)},
        {"place": (0, 1 << 47)},
        {"place": (1, 0)},
        {"place": None},
        {"strides": (1 << 47,)},
        {"strides": ()},
        {"local": (3,)},
    ]
    for lie in lies:
        between: Any = Between(channels(), lambda: None)
        ask = between.ask

        def answer(*arguments: Any, ask: Any = ask, lie: dict[str, Any] = lie) -> Any:
            answer = ask(*arguments)
            return replace(answer, items=tuple((x, replace(y, **lie)) for x, y in answer.items))

        between.ask = answer
        into = torch.zeros(4, dtype=torch.int32)
        with pytest.raises(PeerError, match=r"as .* described it, got other memory"):
            pull_weights(between, owner.ticket, {"w": into})
        assert not into.any()
    owner.close()


def test_copies_on_the_host_touch_no_bytes_between_tensors() -> None:
    """Also of tensors that lie next to each other on one side or on both, and of an empty one."""
    src = torch.arange(1, 101, dtype=torch.uint8)
    into = torch.zeros(100, dtype=torch.uint8)
    places = [(0, 0, 10), (20, 20, 10), (10, 10, 10), (40, 31, 9), (49, 40, 5), (60, 95, 0)]
    pairs = [(into[d : d + n], src[s : s + n]) for s, d, n in reversed(places)]
    copy_pairs(pairs)
    expected = torch.zeros(100, dtype=torch.uint8)
    for s, d, n in places:
        expected[d : d + n] = src[s : s + n]
    assert torch.equal(into, expected)


def weights_of(tensor: torch.Tensor) -> Versioned:
    """Return weights of one tensor."""
    parameters = {"w": Parameter(tensor)}
    return Versioned(parameters, items_of(parameters))


def test_checksums_in_progress_are_not_used_after_they_were_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker has read the old bytes when a reader reports that the checksums differ."""
    tensor = torch.arange(4)
    weights = weights_of(tensor)
    computed = threading.Event()
    go_on = threading.Event()

    def slow(boxes: Any) -> list[int]:
        sums = checksums(boxes)
        computed.set()
        assert go_on.wait(LIMIT)
        return sums

    monkeypatch.setattr(owners, "checksums", slow)
    version = weights.version()
    assert weights.sums(version) is None
    assert computed.wait(LIMIT)
    tensor.numpy()[:] = 7
    weights.forget_sums()
    go_on.set()
    assert repeated(lambda: weights.sums(version)) == checksums([(tensor, Box((0,), (0,), (4,)))])


def test_checksums_of_another_version_are_not_computed() -> None:
    """A worker finds that the weights have changed since the request."""
    tensor = torch.arange(4)
    weights = weights_of(tensor)
    old = weights.version()
    tensor.fill_(7)
    assert weights.sums(old) is None
    assert repeated(lambda: weights.sums(weights.version()))  # computed after the others
    assert weights.sums(old) is None


def test_checksums_of_parts_are_not_used_after_they_were_refused() -> None:
    """They are complete, but the reader that requested them has not come back."""
    tensor = torch.arange(4)
    box = Box((0,), (0,), (3,))
    boxes = [(0, box)]
    weights = weights_of(tensor)
    weights.sums(0, boxes)
    repeated(lambda: weights.sums(0))  # computed after the others
    tensor.numpy()[:] = 7
    weights.forget_sums()
    assert repeated(lambda: weights.sums(0, boxes)) == checksums([(tensor, box)])


def repeated(request: Callable[[], T | None]) -> T:
    """Repeat a request until it has an answer."""
    while (answer := request()) is None:
        time.sleep(1e-3)
    return answer


REPLACED = r"Expected w at \S+ in the memory that was published, got other memory\. Have its"


def replaced(tensor: torch.Tensor, how: str) -> None:
    """Give a tensor other memory."""
    other = torch.full((6, 4), 9, dtype=torch.int32)
    if how == "private":
        tensor.data = other
    elif how == "shared":
        tensor.data = shared(whole_of((6, 4)))
    elif how == "dtype":
        tensor.data = other.short()
    elif how == "turned":
        tensor.data = tensor.data.t()
    else:
        tensor.set_(other)  # type: ignore[call-overload]


@pytest.mark.parametrize("how", ["private", "shared", "dtype", "turned", "set"])
@pytest.mark.parametrize("reported", [True, False])
def test_memory_that_was_replaced_is_named(channels: Channels, how: str, reported: bool) -> None:
    """Torch counts no assignment of ``data``, so the checksums in the cache are the old memory's.

    A reader that pulled before learns it at each pull, and a new one does.
    """
    tensor = shared(whole_of((6, 4)))
    owner = publish(channels(), {"first": shared(whole_of((3,))), "w": tensor})
    channel = channels()
    into = {"first": torch.zeros(3, dtype=torch.int32), "w": torch.zeros(6, 4, dtype=torch.int32)}
    pull_weights(channel, owner.ticket, into)
    with owner.update() if reported else nullcontext():
        replaced(tensor, how)
    for each in (channel, channel, channels()):
        with pytest.raises(PeerError, match=REPLACED):
            pull_weights(each, owner.ticket, into)
    owner.close()


def test_memory_that_is_replaced_during_a_pull_is_named(channels: Channels) -> None:
    """Without a word the version is the same; a pull after the former memory is back succeeds."""
    memory = shared(whole_of((6, 4)))
    tensor = memory.detach()
    owner = publish(channels(), {"w": tensor})
    into = torch.zeros(6, 4, dtype=torch.int32)
    pull_weights(channels(), owner.ticket, {"w": into})
    between = Between(channels(), lambda: replaced(tensor, "private"))
    with pytest.raises(PeerError, match=REPLACED):
        pull_weights(between, owner.ticket, {"w": into})
    tensor.data = memory
    into.zero_()
    pull_weights(between, owner.ticket, {"w": into})
    assert torch.equal(into, memory)
    owner.close()


_ON_A_DEVICE = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
tensors = {str(i): torch.full((256,), i, dtype=torch.int16, device="cuda:0") for i in range(2000)}
tensors |= {f"large{i}": torch.full((3, 9 << 20), i, device="cuda:0") for i in range(4)}
published = publish(channel, tensors)
answer = published.ticket
"""


@pytest.mark.gpu
def test_weights_of_a_device_are_pulled_again(channels: Channels) -> None:
    """Few regions for many small tensors; new values after an update; wrong bytes are found."""
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    kinds |= {str(i): ((256,), torch.int16) for i in range(2000)}
    kinds |= {f"large{i}": ((3, 9 << 20), torch.int64) for i in range(4)}
    with Peer() as owner:
        ticket = owner.do(_ON_A_DEVICE)
        into = {x: torch.zeros(s, dtype=d, device="cuda:0") for x, (s, d) in kinds.items()}
        between: Any = Between(channels(), lambda: None)
        ask = between.ask
        regions = list[bytes]()

        def follow(*arguments: Any) -> Any:
            answer = ask(*arguments)
            regions.extend(answer.regions)
            return answer

        between.ask = follow
        for added in range(3):
            if added:
                owner.do("with published.update():\n    for x in tensors.values(): x.add_(1)")
            assert pull_weights(between, ticket, into) == sum(x.nbytes for x in into.values())
            for i in range(2000):
                assert into[str(i)].eq(i + added).all()
            for i in range(4):
                assert into[f"large{i}"].eq(i + added).all()
        assert 1 <= len(regions) < 100
        owner.do("tensors['large2'].data[2, 5] = 77; published.changed()")
        pull_weights(between, ticket, into)
        assert into["large2"][2, 5] == 77
        owner.do("tensors['3'].data = tensors['3'].data.clone()")
        with pytest.raises(PeerError, match="Expected 3 at"):
            pull_weights(between, ticket, into)


def test_a_second_pull_into_the_same_objects_notices_each_change(channels: Channels) -> None:
    """Of shape and address, strides or dtype in place, of boxes, and of an object."""
    source = shared(whole_of((4, 8)))
    owner = publish(channels(), {"w": source})
    channel = channels()
    into = torch.zeros(4, 8, dtype=torch.int32)
    local: dict[str, Parameter | torch.Tensor] = {"w": into}
    for _ in range(3):
        pull_weights(channel, owner.ticket, local)
    changes: list[Callable[[], object]] = [
        lambda: into.t_(),
        lambda: setattr(into, "data", torch.zeros(2, 8, dtype=torch.int32)),
        lambda: setattr(into, "data", torch.zeros(4, 8, dtype=torch.int16)),
    ]
    for change in changes:
        change()
        with pytest.raises(LayoutError):
            pull_weights(channel, owner.ticket, local)
        into.data = torch.zeros(4, 8, dtype=torch.int32)
        for _ in range(3):
            pull_weights(channel, owner.ticket, local)
            assert torch.equal(into, source)
    listed = {"w": Parameter(into, (4, 8), [Box((0, 0), (0, 0), (4, 8))])}
    for _ in range(3):
        pull_weights(channel, owner.ticket, listed)
    listed["w"] = Parameter(into, (4, 8), [Box((0, 0), (0, 0), (9, 9))])
    with pytest.raises(LayoutError):
        pull_weights(channel, owner.ticket, listed)
    other = torch.zeros(4, 8, dtype=torch.int32)
    pull_weights(channel, owner.ticket, {"w": other})
    assert torch.equal(other, source)
    owner.close()
