# SPDX-License-Identifier: Apache-2.0
"""Pulls with encoding="auto": the owner chooses by a sample of its rows and by the rate of the
transport, and the rows are equal bit by bit whatever it chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.migrate_pulls import MODEL, Sides, sides
from support.packed_pulls import BLOCKS, LAYERS, LAYOUT, RAW_BYTES, SIZE, Packed, Raw, noise
from support.waits import LIMIT, until

from portakv import EncodingChoice, KVView, Pack
from portakv.copy.choose_encoding import Sample, rated_choice, stays_raw
from portakv.errors import InvalidTerms, LayoutError, TransferError, Unsupported
from portakv.migrate import Channel, Owner, Reader, Shard
from portakv.migrate.connections import PullHistory
from portakv.migrate.crossed import PullStatistics
from portakv.migrate.messages import Answer, BoxPart, Choose, Chosen
from portakv.migrate.owner import Gathers, RetainedSample
from portakv.migrate.pull import Pull

INTO = [6, 1, 4, 2, 9]
#: 10^9 bytes of raw rows a second, declared: rows of a CPU stay raw by the measured rates.
PACKING = 100.0
#: A transport that is slower than that, and one that is not.
SLOW = 0.5
FAST = 1000.0
WINDOW = (0, ((0, LAYERS), (0, 4)))


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Have owners pack rows of a CPU at a declared rate; return the samples that they take."""
    taken = list[Sample]()

    def sampled(*terms: Any) -> Sample:
        taken.append(Sample(*terms))
        return taken[-1]

    def rated(view: KVView, pack: Pack | None, link: float, _: object) -> EncodingChoice:
        return rated_choice(view, pack, link, PACKING)

    where = "portakv.migrate.owner"
    monkeypatch.setattr(f"{where}.stays_raw", lambda view, pack, _: stays_raw(view, pack, PACKING))
    monkeypatch.setattr(f"{where}.rated_choice", rated)
    monkeypatch.setattr(f"{where}.Sample", sampled)
    return taken


class Both:
    """An owner that sends its rows, and a reader."""

    def __init__(self, made: Sides, src: Any, dst: Any, **options: Any) -> None:
        self.src = src
        self.dst = dst
        self.owner: Owner = made.owner(Shard(src.view), **{"expose": "staging", **options})
        self.reader: Reader = made.reader(Shard(dst.view))

    def pull(self, max_gbps: float | None = None, **terms: Any) -> Pull:
        """Pull `BLOCKS` with the owner's choice, and compare all rows."""
        ticket = self.owner.offer(BLOCKS, tokens=80).ticket
        terms = {"encoding": "auto", "max_gbps": max_gbps, **terms}
        pull = self.reader.pull(ticket, INTO, **terms)
        pull.synchronize(LIMIT)
        assert torch.equal(self.src.bits(BLOCKS, 80), self.dst.bits(INTO, 80))
        return pull

    def figures(self, max_gbps: float | None = None, **terms: Any) -> PullStatistics:
        """Return the statistics of such a pull."""
        return self.pull(max_gbps, **terms).statistics


def randomize(raw: Raw) -> Raw:
    """Fill a cache with random bits, which have all exponents."""
    noise(raw.whole)
    return raw


def known(history: PullHistory, gbps: float) -> None:
    """Have a history contain the rate of an earlier pull."""
    history.count(1)
    start = history.begin()
    assert start is not None
    history.count(int(1e9 * gbps))
    history.end(start._replace(at=start.at - 1.0))


# --- the choice


def test_slow_transports_get_packed_rows(made: Sides, samples: list[Sample]) -> None:
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(SLOW)
    assert (seen.packed, seen.raw_because, seen.blocks_raw) == (True, "", 0)
    assert seen.nbytes == 5 * RAW_BYTES
    assert seen.wire_nbytes < 5 * RAW_BYTES * 0.85
    (choice,) = seen.choices
    assert choice.pack is not None
    assert (choice.link_gbps, choice.packing_gbps, choice.fits) == (SLOW, PACKING, 1.0)
    assert choice.ratio == pytest.approx(seen.nbytes / seen.wire_nbytes, rel=0.01)
    assert choice.escapes is not None
    assert 0 < choice.escapes < 0.06
    assert choice.why.startswith("Packing pays: ")
    assert len(samples) == 1


def test_random_bits_cross_raw(made: Sides, samples: list[Sample]) -> None:
    seen = Both(made, randomize(Raw()), Raw(fill=0.0)).figures(SLOW)
    assert (seen.packed, seen.wire_nbytes) == (False, 5 * RAW_BYTES)
    assert seen.raw_because.startswith("packing does not pay: ")
    (choice,) = seen.choices
    assert choice.pack is None
    assert choice.ratio is not None
    assert choice.ratio < 1.05
    assert len(samples) == 1


def test_fast_transports_get_raw_rows_without_a_sample(made: Sides, samples: list[Sample]) -> None:
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(FAST)
    assert (seen.packed, seen.wire_nbytes) == (False, 5 * RAW_BYTES)
    assert seen.raw_because.startswith("packing does not pay: ")
    assert seen.choices[0].fits is None
    assert not samples


def test_rows_of_a_cpu_stay_raw(made: Sides) -> None:
    """The control of `samples`: without a declared rate `reference` is too slow."""
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(SLOW)
    assert not seen.packed
    assert seen.raw_because == "the rows are on the CPU, which packs far slower than it copies"


def test_rows_cross_raw_until_a_rate_is_known(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pull connects, and the second one measures."""
    monkeypatch.setattr("portakv.migrate.connections.LEAST_NBYTES", 5 * RAW_BYTES)
    monkeypatch.setattr("portakv.migrate.connections.LEAST_SECONDS", 0.0)
    both = Both(made, Raw(), Raw(fill=0.0))
    for _ in range(2):
        seen = both.figures()
        assert not seen.packed
        assert seen.raw_because == "no recent pull has measured the rate of distributed"
        assert not samples
    seen = both.figures()
    (choice,) = seen.choices
    assert seen.packed
    assert choice.link_gbps is not None
    assert 0 < choice.link_gbps < PACKING


@pytest.mark.parametrize(("nbytes", "seconds"), [(5 * RAW_BYTES + 1, 0.0), (0, 60.0)])
def test_small_and_short_pulls_measure_no_rate(
    made: Sides,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    nbytes: int,
    seconds: float,
) -> None:
    """The controls of the last test."""
    monkeypatch.setattr("portakv.migrate.connections.LEAST_NBYTES", nbytes)
    monkeypatch.setattr("portakv.migrate.connections.LEAST_SECONDS", seconds)
    both = Both(made, Raw(), Raw(fill=0.0))
    assert [both.figures().packed for _ in range(3)] == [False] * 3
    assert not samples


def test_mapped_rows_are_never_packed(made: Sides, samples: list[Sample]) -> None:
    seen = Both(made, Raw(), Raw(fill=0.0), expose="mapped").figures()
    assert (seen.packed, seen.wire_nbytes, seen.choices) == (False, 0, ())
    assert seen.raw_because == "the owners' memory can be mapped"
    assert not samples


def test_blocks_that_do_not_fit_follow_raw(made: Sides, samples: list[Sample]) -> None:
    """The sample has blocks that fit, and then the rows change."""
    both = Both(made, Raw(), Raw(fill=0.0))
    both.figures(SLOW)
    both.src.spoil(7, 0)
    seen = both.figures(SLOW, verify=True)
    assert (seen.packed, seen.blocks_raw) == (True, 2)


@pytest.mark.parametrize("staging", [1 << 15, 1 << 20], ids=["slices", "whole"])
def test_layers_and_parts_of_blocks(made: Sides, samples: list[Sample], staging: int) -> None:
    """Parts of blocks at both ends cross raw, and all layers end."""
    src = Raw()
    dst = Raw(24, size=8, fill=0.0)
    owner = made.owner(Shard(src.view), expose="staging", staging=staging)
    reader = made.reader(Shard(dst.view))
    into = range(20, 10, -1)
    ticket = owner.offer(BLOCKS, tokens=75).ticket
    terms: dict[str, Any] = {"first": 21, "encoding": "auto", "max_gbps": SLOW, "by_layer": True}
    pull = reader.pull(ticket, into, **terms)
    for layer, end in enumerate(pull.layers):
        end.synchronize(LIMIT)
        assert torch.equal(src.bits(BLOCKS, 75, 21)[layer], dst.bits(into, 75, 21)[layer])
    pull.synchronize(LIMIT)
    assert pull.statistics.packed
    assert pull.statistics.raw_because == f"a part of a block of {SIZE} tokens cannot be packed"


def test_the_choice_is_the_reason_also_if_parts_cannot_be_packed(
    made: Sides, samples: list[Sample]
) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    owner = made.owner(Shard(src.view), expose="staging")
    reader = made.reader(Shard(dst.view))
    ticket = owner.offer(BLOCKS, tokens=75).ticket
    pull = reader.pull(ticket, range(len(BLOCKS)), first=21, encoding="auto", max_gbps=FAST)
    pull.synchronize(LIMIT)
    assert not pull.statistics.packed
    assert pull.statistics.raw_because.startswith("packing does not pay: ")


def test_random_bits_in_slices(made: Sides, samples: list[Sample]) -> None:
    """Slices that were made for slots cross raw."""
    both = Both(made, randomize(Raw()), Raw(fill=0.0), staging=1 << 15)
    seen = both.figures(SLOW, by_layer=True)
    assert (seen.packed, seen.wire_nbytes) == (False, 5 * RAW_BYTES)


def layer_by_layer(both: Both) -> Pull:
    """Return a pull that followed its owner's marks, and has ended."""
    offer = both.owner.offer(BLOCKS, tokens=80, progress="layers")
    pull = both.reader.pull(offer.ticket, INTO, by_layer=True, encoding="auto")
    for mark in range(1, LAYERS + 1):
        offer.raise_to(mark)
        pull.layers[mark - 1].synchronize(LIMIT)
    pull.synchronize(LIMIT)
    return pull


def test_rows_that_are_still_written(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part has its own choice, by a sample of complete layers alone."""
    monkeypatch.setattr(PullHistory, "gbps", property(lambda _: SLOW))
    both = Both(made, Raw(), Raw(fill=0.0))
    pull = layer_by_layer(both)
    assert torch.equal(both.src.bits(BLOCKS, 80), both.dst.bits(INTO, 80))
    assert pull.statistics.packed
    assert [choice.pack is None for choice in pull.statistics.choices] == [False] * LAYERS
    assert len(samples) == LAYERS


def test_the_rate_of_packing_is_measured_for_whole_shards(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a pull that follows a mark have other windows in each pull."""
    monkeypatch.setattr(PullHistory, "gbps", property(lambda _: SLOW))
    measured = list[int]()

    def rated(view: KVView, pack: Pack | None, link: float, packing: float | None) -> object:
        if packing is None:
            measured.append(view.layers)
        return rated_choice(view, pack, link, PACKING)

    monkeypatch.setattr("portakv.migrate.owner.rated_choice", rated)
    layer_by_layer(Both(made, Raw(), Raw(fill=0.0)))
    assert measured == [LAYERS] * LAYERS


def test_a_limit_that_no_transport_reaches_gets_raw_rows(
    made: Sides, samples: list[Sample]
) -> None:
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(9e8)
    assert not seen.packed
    assert seen.raw_because.startswith("packing does not pay: ")


def test_ranks_have_a_choice_each(made: Sides, samples: list[Sample]) -> None:
    """One owner's heads are random bits."""
    windows = [(0, 2, 4), (2, 4, 4)]
    halves = [Raw(heads=2), randomize(Raw(heads=2))]
    tickets = [
        made.owner(Shard(half.view, heads=window), expose="staging").offer(BLOCKS, tokens=80).ticket
        for half, window in zip(halves, windows, strict=True)
    ]
    dst = Raw(fill=0.0)
    pull = made.reader(Shard(dst.view)).pull(tickets, INTO, encoding="auto", max_gbps=SLOW)
    pull.synchronize(LIMIT)
    both = torch.cat([half.bits(BLOCKS, 80) for half in halves], dim=3)
    assert torch.equal(both, dst.bits(INTO, 80))
    assert sorted(choice.pack is None for choice in pull.statistics.choices) == [False, True]
    assert pull.statistics.packed
    assert pull.statistics.raw_because.startswith("packing does not pay")


def test_rows_that_cannot_be_packed_ask_for_no_choice(made: Sides) -> None:
    def halves() -> KVView:
        return KVView([*torch.zeros(2, 2, 12, SIZE, 4, 32, dtype=torch.float16)], LAYOUT)

    owner = made.owner(Shard(halves()), expose="staging")
    reader = made.reader(Shard(halves()))
    pull = reader.pull(owner.offer([1], tokens=16).ticket, [3], encoding="auto", max_gbps=SLOW)
    pull.synchronize(LIMIT)
    assert pull.statistics.raw_because == "'pack' takes rows of bfloat16 alone"
    assert pull.statistics.choices == ()


# --- samples that are kept


def test_a_sample_is_kept(made: Sides, samples: list[Sample]) -> None:
    both = Both(made, Raw(), Raw(fill=0.0))
    first = both.figures(SLOW)
    randomize(both.src)
    again = both.figures(SLOW)
    assert again.choices == first.choices
    assert again.blocks_raw == 5
    assert len(samples) == 1


def test_another_sample_follows_many_bytes(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.migrate.owner.SAMPLE_AGAIN", RAW_BYTES)
    both = Both(made, Raw(), Raw(fill=0.0))
    both.figures(SLOW)
    randomize(both.src)
    both.figures(SLOW)
    assert not both.figures(SLOW).packed
    assert len(samples) >= 2


def test_another_sample_follows_blocks_that_do_not_fit(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.copy.choose_encoding.LOOK_AT", 5)
    both = Both(made, Raw(), Raw(fill=0.0))
    both.figures(SLOW)
    randomize(both.src)
    assert both.figures(SLOW).packed
    assert not both.figures(SLOW).packed
    assert len(samples) == 2


def test_each_window_has_misfits_of_its_own(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the second shard alone do not fit any more, so it gets another sample."""
    monkeypatch.setattr("portakv.copy.choose_encoding.LOOK_AT", 5)
    first = Raw()
    second = Raw()
    into = [Raw(fill=0.0), Raw(fill=0.0)]
    owner = made.owner(Shard(first.view), Shard(second.view), expose="staging")
    reader = made.reader(*[Shard(raw.view) for raw in into])

    def packs() -> list[bool]:
        ticket = owner.offer(BLOCKS, BLOCKS, tokens=80).ticket
        pull = reader.pull(ticket, INTO, INTO, encoding="auto", max_gbps=SLOW)
        pull.synchronize(LIMIT)
        for src, dst in zip((first, second), into, strict=True):
            assert torch.equal(src.bits(BLOCKS, 80), dst.bits(INTO, 80))
        return [choice.pack is not None for choice in pull.statistics.choices]

    assert packs() == [True, True]
    assert len(samples) == 2
    randomize(second)
    assert packs() == [True, True]
    assert packs() == [True, False]
    assert len(samples) == 3


def test_other_memory_of_an_owner_gets_another_sample(made: Sides, samples: list[Sample]) -> None:
    both = Both(made, Raw(), Raw(fill=0.0))
    assert both.figures(SLOW).packed
    both.src = randomize(Raw())
    both.owner.reallocate(Shard(both.src.view))
    assert not both.figures(SLOW).packed
    assert len(samples) == 2


def test_a_slower_link_of_another_reader_gets_a_sample(made: Sides, samples: list[Sample]) -> None:
    """The rates alone decided before."""
    both = Both(made, Raw(), Raw(fill=0.0))
    assert not both.figures(FAST).packed
    assert both.figures(SLOW).packed
    assert not both.figures(FAST).packed
    assert len(samples) == 1


# --- the rate of a transport


def test_a_history_has_the_highest_of_the_last_rates() -> None:
    """Waits for other work make the transport seem slower, and nothing makes it seem faster."""
    history = PullHistory()
    assert history.gbps == inf
    for gbps in (1.0, 3.0, 1.0, 1.0):
        known(history, gbps)
    assert history.gbps == pytest.approx(3.0, rel=0.05)
    for _ in range(5):
        known(history, 2.0)
    assert history.gbps == pytest.approx(2.0, rel=0.05)


def test_a_history_forgets_a_rate_after_many_packed_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("portakv.migrate.connections.AGAIN", 1000)
    history = PullHistory()
    known(history, 3.0)
    history.count_packed(999, WINDOW, 1, 0)
    assert history.gbps < inf
    history.count_packed(1, WINDOW, 1, 0)
    assert history.gbps == inf
    known(history, 3.0)
    assert history.gbps < inf


@pytest.mark.parametrize("limited", [False, True])
def test_a_pull_next_to_other_slices_measures_nothing(limited: bool) -> None:
    """Packed slices, and those of a pull with a limited rate."""
    history = PullHistory()
    assert history.begin() is None
    history.count(1)
    start = history.begin()
    assert start is not None
    history.count(100 << 20)
    if limited:
        history.count(100, limited=True)
    else:
        history.count_packed(100, WINDOW, 1, 0)
    history.end(start._replace(at=start.at - 1.0))
    assert history.gbps == inf


def test_a_pull_next_to_a_limited_pull_measures_nothing(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for slices of the limited pull, so its own rate says little of the transport."""
    monkeypatch.setattr("portakv.migrate.connections.LEAST_NBYTES", 1)
    monkeypatch.setattr("portakv.migrate.connections.LEAST_SECONDS", 0.0)
    both = Both(made, Raw(), Raw(fill=0.0))
    both.pull(encoding=None)
    ticket = both.owner.offer(BLOCKS, tokens=80).ticket
    limited = both.reader.pull(ticket, INTO, max_gbps=2e-4)
    assert until(lambda: limited.statistics.wire_nbytes > 0, LIMIT)
    both.pull(encoding=None)
    limited.synchronize(LIMIT)
    assert both.figures().raw_because.startswith("no recent pull has measured the rate")


# --- the protocol


def test_an_owner_that_does_not_know_the_request_sends_raw_rows(
    made: Sides, samples: list[Sample]
) -> None:
    """As one of an earlier release: its channel knows no such message."""
    both = Both(made, Raw(), Raw(fill=0.0))
    both.owner.close()
    made.made.append(channel := Earlier(timeout=20.0))
    both.owner = Owner(channel, Shard(both.src.view), model=MODEL, expose="staging")
    made.made.append(both.owner)
    seen = both.figures(SLOW)
    assert (seen.packed, seen.wire_nbytes) == (False, 5 * RAW_BYTES)
    assert seen.raw_because.startswith("the owner made no choice: Choosing an encoding")
    assert "the message is not known there" in seen.raw_because
    assert not samples


class Earlier(Channel):
    """A channel of a release without `Choose`."""

    def serve(self, kind: Any, answer: Any) -> None:
        """Answer no message that such a release does not know."""
        if kind is not Choose:
            super().serve(kind, answer)


def chosen(text: str) -> Chosen:
    return Chosen("done", "Packing pays.", encoding=text)


@pytest.mark.parametrize("text", ["zip/1", "pack/9:4", "pack/1:4:2048"])
def test_a_choice_that_the_reader_does_not_know_leads_to_raw_rows(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(Gathers, "choose", lambda *_: chosen(text))
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(SLOW)
    assert not seen.packed
    assert seen.raw_because.startswith(f"the owner chose {text!r}: ")


def test_raw_rows_have_a_reason_if_their_owner_gives_none(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gathers, "choose", lambda *_: Chosen("done"))
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(SLOW)
    assert (seen.packed, seen.raw_because) == (False, "the owner gave no reason")


def test_an_owner_that_takes_no_sample_sends_raw_rows(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("portakv.migrate.owner.Sample", fails)
    both = Both(made, Raw(), Raw(fill=0.0))
    seen = both.figures(SLOW)
    assert not seen.packed
    assert "No sample was taken: no memory" in seen.raw_because
    monkeypatch.setattr("portakv.migrate.owner.Sample", Sample)
    assert both.figures(SLOW).packed


@pytest.mark.full  # the pull lets half a minute go by
def test_an_owner_that_stays_busy_sends_raw_rows(
    made: Sides, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.migrate.staged_reader.PATIENCE", 0.1)
    monkeypatch.setattr(Gathers, "choose", lambda *_: Answer("busy", seconds=1e-3))
    seen = Both(made, Raw(), Raw(fill=0.0)).figures(SLOW)
    assert not seen.packed
    assert seen.raw_because.startswith("the owner made no choice: ")
    assert "chose no encoding: it is busy" in seen.raw_because


@pytest.mark.parametrize(("first", "count"), [(3, 16), (16, 15)])
def test_an_owner_refuses_a_choice_for_parts_of_blocks(first: int, count: int) -> None:
    request = Choose(bytes(16), bytes(16), BoxPart(0, (0, 2), (0, 4), first, count), 1.0)
    with closing(Channel()) as channel:
        gathers = Gathers(channel, 1 << 20, None, torch.device("cpu"))  # nothing is computed
        with pytest.raises(LayoutError, match="whole blocks"):
            gathers.choose(request, cast("Any", SimpleNamespace(shards=[Shard(Raw().view)])))


def test_a_kept_reason_needs_no_sample() -> None:
    choice = RetainedSample("The rows stay.").choice(Raw().view, SLOW)
    assert choice == EncodingChoice(None, "The rows stay.", SLOW)


# --- what is refused


@pytest.mark.parametrize("method", ["mapped", "staging"])
@pytest.mark.parametrize("packed", ["owner", "reader", "both"])
def test_packed_views_leave_nothing_to_choose(made: Sides, method: str, packed: str) -> None:
    src: Any = Packed() if packed != "reader" else Raw()
    dst: Any = Packed() if packed != "owner" else Raw(fill=0.0)
    both = Both(made, src, dst, expose=method)
    with pytest.raises(Unsupported, match="encoding='auto': a side is packed already"):
        both.pull()


# --- the trace


def test_the_trace_has_the_choice(made: Sides, samples: list[Sample], tmp_path: Path) -> None:
    both = Both(made, Raw(), Raw(fill=0.0))
    choice = both.figures(SLOW).choices[0]
    both.reader.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"] for event in events if event["name"] == "encoding"] == [choice.figures()]
    with pytest.raises(TransferError, match="a file that can be written"):
        both.reader.trace(tmp_path)
    with pytest.raises(InvalidTerms, match="a path of a file"):
        both.reader.trace(cast("Any", 3))
