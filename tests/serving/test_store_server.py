# SPDX-License-Identifier: Apache-2.0
"""The state machine of a server: who has which rows in hand, and when a block is sealed."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from typing import Any

import pytest
from msgspec.msgpack import encode
from support.store_server_model import (
    FLAG,
    HEADS,
    LAYERS,
    MARK,
    PATIENCE,
    RAW,
    WHOLE,
    Believing,
    Early,
    FakeStore,
    Forgetful,
    Hasty,
    Walk,
    cells_in,
    form_of,
)

from portakv.errors import InvalidTerms, PeerError, StoreError
from portakv.graph.alarms import LEASE, LOOK, Alarms
from portakv.migrate.channel import LIMIT
from portakv.migrate.messages import decoder_of
from portakv.serving.server.messages import (
    MOST_KEYS,
    UNFIT,
    Delete,
    Join,
    Load,
    Pin,
    Progress,
    Save,
    after_of,
)
from portakv.serving.server.state import HEAD, Client, ServerState, cells_of, whole_form
from portakv.storage import BlockForm
from portakv.storage.keys import predecessors


@pytest.mark.parametrize("part", range(8))
def test_walks_of_ranks_that_join_copy_stop_and_die(part: int) -> None:
    for seed in range(part * 150, part * 150 + 150):
        Walk(ServerState, seed).run(300)


def test_walks_with_a_lease_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portakv.serving.server.state.PIECE", 1)
    for seed in range(2000, 2150):
        Walk(ServerState, seed).run(300)


def test_walks_with_a_message_for_each_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portakv.serving.server.state.PIECE", 1)
    monkeypatch.setattr("portakv.serving.server.state.MESSAGE", 1)
    for seed in range(3000, 3150):
        Walk(ServerState, seed).run(300)


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_many_walks(part: int) -> None:
    for seed in range(10_000 + part * 1000, 10_000 + part * 1000 + 1000):
        Walk(ServerState, seed).run(500)


def test_walks_do_something() -> None:
    walks = [Walk(ServerState, seed) for seed in range(40)]
    for walk in walks:
        walk.run(300)
    assert sum(walk.stored for walk in walks) > 100
    assert sum(walk.loaded for walk in walks) > 100
    assert sum(walk.store.kept_raw for walk in walks) > 10


def wrong_walks(kind: type[ServerState], many: int = 100) -> set[str]:
    """Return what walks of a state find."""
    found = set[str]()
    for seed in range(many):
        try:
            Walk(kind, seed).run(300)
        except AssertionError as error:
            found.add(str(error).partition("\n")[0])
    return found


def test_walks_find_rows_that_are_given_away_before_their_process_ends() -> None:
    assert "a row that a process uses was lent to another one" in wrong_walks(Forgetful)


def test_walks_find_blocks_that_are_sealed_before_all_ranks_have_reported() -> None:
    assert any("a block was sealed with" in each for each in wrong_walks(Hasty))


def test_walks_find_blocks_that_are_sealed_although_they_do_not_fit() -> None:
    assert "a row was sealed with bytes of another block" in wrong_walks(Believing, 30)


# --- step by step


class Ranks:
    """A state with ranks that have joined, by their forms."""

    def __init__(
        self, *forms: BlockForm, rows: int = 8, kind: type[ServerState] = ServerState
    ) -> None:
        self.time = 0.0
        self.state = kind(bool, PATIENCE, lambda: self.time)
        self.store = FakeStore(random.Random(1), rows)
        stores: Any = self.state.stores
        stores[WHOLE.digest] = self.store
        self.messages = defaultdict[int, list[Progress]](list)  # by rank
        self.clients = [self.join(form, pid) for pid, form in enumerate(forms, 1)]

    def join(self, form: BlockForm, pid: int, before: int = 0, engine: str = "e") -> Client:
        return self.state.join(Join(engine, (1, pid, 1), "", (form.json(),), before))

    def save(self, rank: int, number: int = 1) -> Progress:
        session = self.clients[rank].session
        return self.state.save(Save(session, number, 0, tuple(KEYS), None, "background"))

    def load(self, rank: int, number: int = 2) -> Progress:
        session = self.clients[rank].session
        return self.state.load(Load(session, number, 0, tuple(KEYS), 0.0, "urgent"))

    def write(
        self, rank: int, progress: Progress, good: bool = True, unfit: int | None = None
    ) -> None:
        """Copy and report what a rank was lent. ``unfit``: the block that does not fit."""
        client = self.clients[rank]
        for grant in progress.grants:
            mark = MARK if grant.form else b""
            landed = bytearray()
            for row, place in zip(grant.rows, grant.places, strict=True):
                fits = mark or place != unfit
                landed.append(good if fits else UNFIT)
                for cell in cells_in(next(iter(client.parts.values()))):
                    self.store.contents[row][cell] = mark + KEYS[place] if fits else FLAG
            self.state.report(client.session, grant.lease, bytes(landed))

    def learned(self, rank: int) -> list[Progress]:
        """Return what a rank learns until nothing follows."""
        for _ in range(20):
            self.store.go_on()
            self.state.advance()
            for client, progress in self.state.take():
                self.messages[self.clients.index(client)].append(progress)
        return self.messages.pop(rank, [])


KEYS = [bytes([n]) * 32 for n in range(1, 4)]
LEFT = form_of((0, LAYERS), (0, HEADS // 2))
RIGHT = form_of((0, LAYERS), (HEADS // 2, HEADS))


@pytest.mark.parametrize("end", ["stop", "leave", "lose", "process", "close", "load", "once more"])
def test_locks_end_with_their_client(end: str) -> None:
    ranks = Ranks(WHOLE, WHOLE)
    ranks.write(0, ranks.save(0))
    ranks.write(1, ranks.save(1))
    assert len(ranks.learned(0)) == 1
    one, other = ranks.clients
    some = (*KEYS, bytes(32))
    assert ranks.state.pin(Pin(one.session, 1, 0, some)) == bytes([1, 1, 1, 0])
    assert ranks.state.pin(Pin(other.session, 1, 0, tuple(KEYS[:1]))) == bytes([1])
    assert sorted(ranks.store.pinned) == sorted([*KEYS, KEYS[0]])
    left = [KEYS[0]]
    if end == "stop":
        ranks.state.stop(one.session, 9)
        ranks.state.stop(one.session, 1)
        ranks.state.stop(one.session, 1)
    elif end == "leave":
        ranks.state.lose(one.session, leaves=True)
    elif end == "lose":
        ranks.state.lose(one.session)
    elif end == "process":
        ranks.state.process_ended(one.process)
    elif end == "close":
        ranks.state.close()
        left = []
    elif end == "load":  # the same number names a load then
        ranks.state.load(Load(one.session, 1, 0, tuple(KEYS[:1]), 0.0, "urgent"))
        left *= 2  # its rows are lent
    else:  # or other locks
        ranks.state.pin(Pin(one.session, 1, 0, tuple(KEYS[:1])))
        left *= 2
    assert ranks.store.pinned == left
    if end not in ("stop", "load", "once more"):
        with pytest.raises(PeerError):
            ranks.state.pin(Pin(one.session, 2, 0, some))


def test_what_a_client_deletes_is_gone_for_all() -> None:
    ranks = Ranks(WHOLE)
    ranks.write(0, ranks.save(0))
    message = Delete(ranks.clients[0].session, 0, (*KEYS[:2], bytes(32)))
    assert ranks.state.delete(message) == bytes([1, 1, 0])
    assert [*ranks.store.cached] == KEYS[2:]
    assert ranks.state.delete(message) == bytes(3)


def test_a_block_is_sealed_after_all_ranks_have_reported_their_parts() -> None:
    ranks = Ranks(LEFT, RIGHT)
    first = ranks.save(0)
    second = ranks.save(1)
    assert [grant.rows for grant in first.grants] == [grant.rows for grant in second.grants]
    ranks.write(0, first)
    assert ranks.store.cached == {}
    ranks.write(1, second)
    assert set(ranks.store.cached) == {*KEYS}
    assert ranks.learned(0)[-1].stored == bytes([1, 1, 1])
    assert ranks.learned(1)[-1].stored == bytes([1, 1, 1])


@pytest.mark.parametrize("kind", [ServerState, Early], ids=["guarded", "negative control"])
def test_a_block_is_copied_raw_after_all_ranks_have_tried(kind: type[ServerState]) -> None:
    """Before that, one rank would copy raw while another one packs into the same row."""
    ranks = Ranks(LEFT, RIGHT, kind=kind)
    ranks.store.raw = RAW
    first = ranks.save(0)
    second = ranks.save(1)
    ranks.write(0, first, unfit=1)
    early = [grant for each in ranks.learned(0) for grant in each.grants]
    assert bool(early) is (kind is Early)
    if early:
        return
    ranks.write(1, second)
    assert KEYS[1] not in ranks.store.cached
    for rank in (0, 1):
        (progress,) = [each for each in ranks.learned(rank) if each.grants]
        assert [(grant.form, grant.places) for grant in progress.grants] == [(RAW.json(), (1,))]
        assert progress.stored is None
        ranks.write(rank, progress)
    assert set(ranks.store.cached) == {*KEYS}
    assert ranks.store.rough == {ranks.store.cached[KEYS[1]]}
    assert [ranks.learned(rank)[-1].stored for rank in (0, 1)] == [bytes([1, 1, 1])] * 2
    assert ranks.state.statistics()["saved_raw"] == 1


@pytest.mark.parametrize("raw", [RAW, None], ids=["a rank is gone", "no raw form"])
def test_a_block_that_does_not_fit_may_be_lost(raw: BlockForm | None) -> None:
    ranks = Ranks(LEFT, RIGHT)
    ranks.store.raw = raw
    first = ranks.save(0)
    ranks.write(1, ranks.save(1))
    if raw is not None:
        ranks.state.process_ended(ranks.clients[1].process)
    ranks.write(0, first, unfit=1)
    for progress in ranks.learned(0):
        ranks.write(0, progress)
    assert KEYS[1] not in ranks.store.cached
    assert {KEYS[0], KEYS[2]} <= set(ranks.store.cached)
    assert ranks.state.statistics()["leases"] == 0


def test_rows_that_a_rank_keeps_are_shown_with_their_age(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What operators watch: they are warned, and no longer once the rows are back."""
    caplog.set_level(logging.WARNING, "portakv.graph.alarms")
    ranks = Ranks(WHOLE)
    alarms = Alarms(ranks.state, clock=lambda: ranks.time)
    ranks.time = 5.0
    progress = ranks.save(0)
    lent = len(progress.grants)
    assert lent > 0
    ranks.time += LEASE - 1
    alarms.look()
    assert caplog.text == ""
    ranks.time += LOOK
    assert ranks.state.oldest_lease() == LEASE - 1 + LOOK
    alarms.look()
    assert f"have been lent to a rank of an engine for {LEASE - 1 + LOOK:.0f} s" in caplog.text
    ranks.write(0, progress)
    assert ranks.state.oldest_lease() == 0.0
    figures = ranks.state.figures()
    assert figures["keeper_lent_total"] == [{"value": lent}]
    assert figures["keeper_leases"] == [{"value": 0}]


def test_a_block_that_a_rank_could_not_copy_is_not_stored() -> None:
    ranks = Ranks(LEFT, RIGHT)
    ranks.write(0, ranks.save(0))
    ranks.write(1, ranks.save(1), good=False)
    assert ranks.learned(0)[-1].stored == bytes(3)
    assert ranks.store.cached == {}


def test_of_ranks_with_equal_parts_one_copies() -> None:
    ranks = Ranks(WHOLE, WHOLE)
    first = ranks.save(0)
    second = ranks.save(1)
    assert second.grants == ()
    ranks.write(0, first)
    assert ranks.learned(0)[-1].stored == bytes([1, 1, 1])
    assert ranks.learned(1)[-1].stored == bytes([1, 1, 1])


def test_nothing_is_stored_before_all_ranks_have_joined() -> None:
    ranks = Ranks(LEFT)
    progress = ranks.save(0)
    assert progress.grants == ()
    assert progress.stored == bytes(3)
    ranks.clients.append(ranks.join(RIGHT, 2))
    # The other rank is asked for the same save, which has ended.
    ranks.write(0, ranks.save(0, 5))
    ranks.write(1, ranks.save(1, 5))
    assert {*ranks.store.cached} == {*KEYS}


def test_a_rank_that_never_asks_ends_no_save_of_others() -> None:
    """After a while the rows go back; and the rank that asks later learns the same end."""
    ranks = Ranks(LEFT, RIGHT)
    ranks.write(0, ranks.save(0))
    assert ranks.learned(0) == []
    ranks.time = PATIENCE + 1
    assert ranks.learned(0)[-1].stored == bytes(3)
    assert len(ranks.store.free) == 8
    late = ranks.save(1)
    assert late.grants == ()
    assert late.stored == bytes(3)


def test_rows_stay_until_a_process_has_ended_and_its_late_report_is_dropped() -> None:
    ranks = Ranks(WHOLE)
    progress = ranks.save(0)
    process = ranks.clients[0].process
    ranks.state.lost(ranks.clients[0])
    assert ranks.learned(0) == []
    assert len(ranks.store.free) == 8 - len(KEYS)
    ranks.write(0, progress)  # as if it went on
    assert ranks.state.statistics()["late_reports"] == len(progress.grants)
    assert ranks.store.cached == {}
    assert len(ranks.store.free) == 8 - len(KEYS)
    ranks.state.process_ended(process)
    assert len(ranks.store.free) == 8


def test_a_client_that_joins_again_frees_the_rows_of_its_session_before() -> None:
    ranks = Ranks(WHOLE)
    ranks.save(0)
    before = ranks.clients[0]
    ranks.state.lost(before)
    ranks.join(WHOLE, 9, before.session)  # of another process
    assert len(ranks.store.free) == 8 - len(KEYS)
    ranks.join(WHOLE, 1, before.session)
    assert len(ranks.store.free) == 8


def test_a_load_ends_with_the_rows_that_are_there() -> None:
    ranks = Ranks(WHOLE)
    ranks.write(0, ranks.save(0))
    ranks.learned(0)
    places = list[int]()
    learned = [ranks.load(0)]
    while learned:
        for progress in learned:
            places += [place for grant in progress.grants for place in grant.places]
            ranks.write(0, progress)
            last = progress
        learned = ranks.learned(0)
    assert sorted(places) == [0, 1, 2]
    assert not last.more
    assert "late_reports" not in ranks.state.statistics()


def test_a_message_lends_no_more_than_it_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portakv.serving.server.state.PIECE", 1)
    monkeypatch.setattr("portakv.serving.server.state.MESSAGE", 2 * (HEAD + 8))
    ranks = Ranks(WHOLE)
    learned = [ranks.save(0), *ranks.learned(0)]
    assert [len(progress.grants) for progress in learned if progress.grants] == [2, 1]
    for progress in learned:
        ranks.write(0, progress)
    assert ranks.learned(0)[-1].stored == b"\1\1\1"


def test_parts_of_other_blocks_are_refused() -> None:
    ranks = Ranks(WHOLE)
    with pytest.raises(InvalidTerms, match=r"with model='model', .*got model='another'"):
        ranks.join(form_of((0, LAYERS), (0, HEADS), "another"), 2)
    with pytest.raises(InvalidTerms, match="groups of layers whose blocks differ"):
        ranks.state.join(Join("e", (1, 3, 1), "", (LEFT.json(), RIGHT.json())))


def test_a_session_that_has_ended_is_an_error() -> None:
    ranks = Ranks(WHOLE)
    for _ in range(2):
        ranks.state.lose(ranks.clients[0].session, leaves=True)
    with pytest.raises(PeerError, match="has ended"):
        ranks.save(0)


def test_an_error_of_the_store_leaves_nothing_behind() -> None:
    ranks = Ranks(WHOLE)
    begin = ranks.store.save_lent

    def fail(*args: Any, **terms: Any) -> Any:
        begin(*args, **terms)
        raise StoreError("it is closed")

    ranks.store.save_lent = fail  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        ranks.save(0)
    assert len(ranks.store.free) == 8
    assert ranks.state.take() == []


def test_cells_and_whole_forms() -> None:
    assert whole_form(LEFT) == WHOLE
    assert cells_of(WHOLE) == (1 << LAYERS * HEADS) - 1
    assert cells_of(LEFT) | cells_of(RIGHT) == cells_of(WHOLE)
    assert cells_of(LEFT) & cells_of(RIGHT) == 0


def test_the_longest_save_is_a_message_of_the_channel() -> None:
    """Its blocks have gaps, so each one has a key that it follows."""
    keys = [n.to_bytes(32, "little") for n in range(2 * MOST_KEYS)]
    some = tuple(keys[:MOST_KEYS])
    after = after_of(keys[MOST_KEYS:], keys[:MOST_KEYS])
    assert isinstance(after, tuple)
    longest = Save((1 << 63) - 1, (1 << 63) - 1, 1 << 16, some, after, "background")
    assert len(encode(longest)) <= LIMIT


def test_what_keys_follow_comes_through_a_message() -> None:
    for after in ([None], [KEYS[2]], [None, KEYS[0]], [KEYS[2], KEYS[0]], [None, None]):
        some = KEYS[: len(after)]
        message = Save(1, 1, 0, tuple(some), after_of(after, some), "normal")
        parsed = decoder_of(Save).decode(encode(message)).after
        assert [*predecessors(parsed, some)] == after
