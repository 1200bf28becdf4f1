# SPDX-License-Identifier: Apache-2.0
"""Transports are chosen with a reason, and a buffer on its way ends once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from portakv.errors import BackendUnavailable, InvalidTerms, PeerError, TransferTimeout
from portakv.migrate.transports import TRANSPORTS, check_transport, choose
from portakv.migrate.transports.base import Moving, MovingStage
from portakv.migrate.transports.distributed import Distributed

CPU = torch.device("cpu")
API = "nixl._api"


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_MOVER", raising=False)


def test_the_first_transport_is_torch_distributed_and_says_why() -> None:
    """Fault 23. The library reports which transport it chose, and why."""
    transport = choose(CPU)
    assert isinstance(transport, Distributed)
    assert transport.why == "distributed: accepted, a group of two by gloo"
    assert choose(CPU, "distributed").why.endswith("it was requested by name")


def test_a_device_that_torch_has_no_group_for_is_told_of_each_transport() -> None:
    """Fault 23. Each transport's reason is kept; Mooncake is not taken unasked."""
    with pytest.raises(BackendUnavailable, match="no backend for meta") as raised:
        choose(torch.device("meta"))
    why = [str(each) for each in raised.value.trace]
    assert [each.partition(":")[0] for each in why] == ["distributed", "nixl", "mooncake"]
    assert "on meta devices" in why[1]
    assert "requested by name" in why[2]


@pytest.mark.parametrize("by", ["name", "environment"])
def test_a_forced_transport_never_falls_back(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, API, None)  # as if it were not installed
    if by == "environment":
        monkeypatch.setenv("PORTAKV_MOVER", "nixl")
    with pytest.raises(
        BackendUnavailable, match=r"nixl._api is not installed; install it by `pip install -e '.\["
    ):
        choose(CPU, "nixl" if by == "name" else "distributed")


def test_a_release_that_is_too_old_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL 0.8 would be accepted otherwise, and no buffer would cross."""
    monkeypatch.setitem(sys.modules, API, ModuleType(API))
    probed = TRANSPORTS.load("nixl").probe(CPU)
    assert not probed.accepted
    assert "nixl._api has no nixl_thread_sync_t; install a newer one by `pip" in probed.reason


def test_a_transport_that_nobody_knows_is_refused_with_the_names() -> None:
    with pytest.raises(InvalidTerms, match="'distributed' or 'nixl' or 'mooncake'"):
        choose(CPU, "pigeon")


@pytest.mark.parametrize("call", [choose, lambda device, name: check_transport(name, device)])
def test_a_transport_whose_class_has_another_name_is_refused(
    call: Callable[[torch.device, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers agree by the class's name, and would not find it by the entry point's."""
    monkeypatch.setitem(TRANSPORTS.targets, "mychan", Distributed)
    expected = "Expected transport 'mychan' to be a class with name = 'mychan', got 'distributed'"
    with pytest.raises(BackendUnavailable, match=f"{expected}. Give the entry point"):
        call(CPU, "mychan")


def test_a_slot_on_its_way_ends_once() -> None:
    buffer = torch.zeros(8, dtype=torch.uint8)
    moving = Moving(buffer, 60.0)
    assert not moving.has(MovingStage.OVER)
    assert not moving.wait(0.01)
    late = Moving(buffer, 0.01)
    for _ in range(2):
        with pytest.raises(TransferTimeout, match=r"8 B did not cross in 0.01 s"):
            late.wait()
    assert late.has(MovingStage.FREE)
    moving.end(PeerError("The peer is gone."))
    moving.end()
    assert moving.has(MovingStage.OVER)
    assert not moving.begin()
    with pytest.raises(PeerError, match="The peer is gone"):
        moving.wait()


@pytest.mark.parametrize("behind", [True, False])
def test_the_time_of_a_queued_slot_begins_after_the_slot_before_it(
    behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a slot that had its turn late failed, whatever time it was given."""
    buffer = torch.zeros(8, dtype=torch.uint8)
    now = 0.0
    monkeypatch.setattr("portakv.migrate.transports.base.monotonic", lambda: now)
    first = Moving(buffer, 1.0)
    second = Moving(buffer, 1.0, first if behind else None)
    now = 0.6
    assert not first.wait(0.0)
    assert not second.wait(0.0)
    first.end()
    now = 1.2  # after it was queued
    if behind:
        assert not second.wait(0.0)
        now = 2.5
    with pytest.raises(TransferTimeout, match=r"8 B did not cross in 1 s"):
        second.wait(0.0)


def test_slots_fail_one_after_the_other_if_none_crosses() -> None:
    buffer = torch.zeros(8, dtype=torch.uint8)
    slots = [Moving(buffer, 0.2)]
    for _ in range(2):
        slots.append(Moving(buffer, 0.2, slots[-1]))
    assert slots[2].until - slots[0].until == pytest.approx(0.4)
    with pytest.raises(TransferTimeout):
        slots[-1].wait()  # though no one waits for the others
