# SPDX-License-Identifier: Apache-2.0
"""The example of rows that go from two ranks of a process to three ranks of another one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from portakv_examples import migrate_rows
from portakv_examples.migrate_rows import METHODS, offer_rows, owner_device, pull_rows, show

CPU = torch.device("cpu")
SIMDEV = torch.device("privateuseone", 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one layer, for an owner and a reader in this process."""
    monkeypatch.setattr(migrate_rows, "LAYERS", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("what", "other"), [("", ""), ("good", "stale"), ("stale", "good")])
def test_a_wrong_byte_and_a_published_stale_row_are_seen(what: str, other: str) -> None:
    """The owner and the reader are in one process, which is quicker."""
    lines = list[str]()
    with ExitStack() as keep:
        offers = offer_rows(CPU, keep)
        if what:
            offers = {method: {**own, what: own[other]} for method, own in offers.items()}
        pulls = pull_rows(CPU, offers, keep)
    assert show(pulls, lines.append) is not bool(what)
    assert ("WRONG or missing" in lines[-1]) is bool(what)
    assert [pull.good for pull in pulls if pull.stale] == [what != "stale"] * len(METHODS)
    assert {pull.good for pull in pulls if not pull.stale} == {what != "good"}


@pytest.mark.simdev
def test_the_owner_is_on_another_device_or_on_the_host() -> None:
    assert owner_device(CPU) == CPU
    there = owner_device(SIMDEV)
    assert (there.type, there.index) == (SIMDEV.type, 1)
    assert owner_device(there) == SIMDEV


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_rows_of_the_host_come_to_a_device() -> None:
    with ExitStack() as keep:
        assert all(pull.good for pull in pull_rows(SIMDEV, offer_rows(CPU, keep), keep))


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_rows_of_a_device_that_shares_nothing_come_through_the_host() -> None:
    """A device without a UUID has a name of some length, which is no reason to refuse it."""
    with ExitStack() as keep:
        pulls = pull_rows(SIMDEV, offer_rows(owner_device(SIMDEV), keep), keep)
    assert all(pull.good for pull in pulls)
    good = [pull for pull in pulls if not pull.stale]
    assert {pull.strategy for pull in good} == {"distributed"}
    assert "_share_simdev_" in good[0].why
