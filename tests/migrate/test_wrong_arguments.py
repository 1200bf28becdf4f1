# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of owners and readers raise an error that names the argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.migrate_pulls import MODEL, Couple, Rows, Sides, sides

from portakv.errors import BackendUnavailable, InvalidTerms, LayoutError, PeerError, SlotError
from portakv.migrate import Channel, Owner, Reader, Shard
from portakv.migrate.transports.onesided import Nixl


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as made:
        yield made


@pytest.mark.parametrize("kind", [Owner, Reader])
def test_owners_and_readers_name_the_argument(kind: Any) -> None:
    rows = Rows()
    channel = Channel()
    try:
        for wrong in (rows.view, [rows.whole], None):
            with pytest.raises(InvalidTerms, match=r"Expected shards .* Shard\(view\)"):
                kind(channel, wrong, model=MODEL)
        with pytest.raises(LayoutError, match="Expected shards"):
            kind(channel, model=MODEL)
        with pytest.raises(InvalidTerms, match="Expected channel to be a Channel, got None"):
            kind(None, rows.shard, model=MODEL)
        terms: list[dict[str, Any]] = [{"model": ""}, {"model": 5}, {"transport": "pigeon"}]
        if kind is Owner:
            terms += [{"staging": x} for x in ("1G", 100, True, None)]
            terms += [{"expose": x} for x in ("all", None)]
        for each in terms:
            with pytest.raises(InvalidTerms, match=f"Expected {next(iter(each))} to be"):
                kind(channel, rows.shard, **{"model": MODEL, **each})
        kind(channel, rows.shard, model=MODEL).close()
    finally:
        channel.close()


def test_a_transport_that_cannot_run_here_is_refused_by_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if Nixl.probe(Rows().view.device).accepted:
        pytest.skip("nixl runs here")
    rows = Rows()
    channel = Channel()
    try:
        for kind in (Owner, Reader):
            with pytest.raises(BackendUnavailable, match=r"Expected transport .* 'nixl'"):
                kind(channel, rows.shard, model=MODEL, transport="nixl")
    finally:
        channel.close()


@pytest.mark.parametrize("wrong", [[[0, 1]], None, "view"])
def test_a_shard_takes_a_view(wrong: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected view to be a KVView"):
        Shard(wrong)


@pytest.mark.parametrize("axis", ["layers", "heads"])
@pytest.mark.parametrize("wrong", [3, "abc", [], (0, 1), (0.0, 2, 2), (0, True, 4), object()])
def test_a_window_is_three_numbers(axis: str, wrong: Any) -> None:
    with pytest.raises(LayoutError, match=rf"{axis}=.*\(from, to, of\)"):
        Shard(Rows().view, **{axis: wrong})


def test_offers_name_the_argument(made: Sides) -> None:
    both = Couple(made)
    terms: list[dict[str, Any]] = [
        *({"tokens": x} for x in (0, "4", 1.5, True, None)),
        *({"lease": x} for x in ("1", 0, -1, float("nan"), 2**63, None, True)),
        *({"readers": x} for x in (0, "2", True)),
    ]
    for each in terms:
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(each))} to be"):
            both.owner.offer(both.blocks, **{"tokens": 16, **each})
    for blocks in ([3, 3], ["a"], 5, [99], [0.5]):
        with pytest.raises(SlotError, match=r"\bblocks\b"):
            both.owner.offer(blocks, tokens=16 * 2)  # type: ignore[arg-type]
    assert both.owner.statistics()["held"] == 0
    offer = both.offer()
    for timeout in ("x", -1, float("nan"), True):
        with pytest.raises(InvalidTerms, match="Expected timeout to be"):
            offer.taken(timeout=timeout)  # type: ignore[arg-type]
    offer.revoke()


def test_pulls_name_the_argument(made: Sides) -> None:
    both = Couple(made)
    ticket = both.offer().ticket
    for wrong in (None, 5, [5], [], "x", object()):
        with pytest.raises(InvalidTerms, match="Expected tickets"):
            both.reader.pull(wrong, both.into)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="Expected tickets"):
        both.reader.pull(b"", both.into)
    terms: list[dict[str, Any]] = [
        *({"first": x} for x in (-1, "1", True, None, 75, 2**63)),
        *({"timeout": x} for x in (-1, float("nan"), "1", True)),
        *({name: x} for name in ("by_layer", "verify") for x in (1, None)),
        {"overlap": "iddle"},
        *({"max_gbps": x} for x in (0, "2", True)),
        *({"max_thread_blocks": x} for x in (0, "2", True)),
    ]
    for each in terms:
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(each))} to be"):
            both.reader.pull(ticket, both.into, **each)
    for into in ([6, 6, 6], ["a"], 5, [99, 1, 4], [6]):
        with pytest.raises(SlotError, match=r"\bblocks\b"):
            both.reader.pull(ticket, into)  # type: ignore[arg-type]
    assert (both.dst.whole == -1).all()
    both.reader.pull(ticket, both.into).synchronize(30)
    assert both.right()
    assert both.spared()


def test_the_former_name_of_the_transport_is_deprecated() -> None:
    rows = Rows()
    channel = Channel()
    try:
        for kind in (Owner, Reader):
            with pytest.warns(DeprecationWarning, match="Pass transport="):
                kind(channel, rows.shard, model=MODEL, mover="distributed").close()
            with pytest.raises(InvalidTerms, match="Expected mover to be"), pytest.warns():
                kind(channel, rows.shard, model=MODEL, mover="pigeon")
    finally:
        channel.close()
