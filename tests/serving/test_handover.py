# SPDX-License-Identifier: Apache-2.0
"""The workers of two engines that hand rows over, of real caches and over real channels."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from secrets import token_bytes
from typing import Any

import pytest
import torch
from support.handing import LAYOUT, LEASE, MODEL, ROWS, TOKENS, Side
from support.migrate_pulls import Clock
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import InvalidTerms
from portakv.migrate import Ticket, messages
from portakv.serving import Report
from portakv.serving.handover import HandoverTerms
from portakv.serving.local import NoBlocks
from portakv.serving.plan import Handovers, OfferJob, PullJob, RemoteRows
from portakv.storage import BlockForm


@pytest.fixture
def sides() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def made(stack: ExitStack, *args: Any, **terms: Any) -> Side:
    """Return a side that is closed at the end of a test."""
    side = Side(*args, **terms)
    stack.callback(side.handover.close)
    return side


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16), (16, 16)])
def test_rows_are_handed_over(sides: ExitStack, sizes: tuple[int, int]) -> None:
    """The owner's blocks are free again after the release, and a second pull fails."""
    many = [-(-TOKENS // size) for size in sizes]
    src = made(sides, 8, sizes[0], pulls=False)
    dst = made(sides, 8, sizes[1], offers=False)
    assert dst.handover.endpoint is None
    src.write(range(2, 2 + many[0]))
    name = token_bytes(32)
    src.offer(name, range(2, 2 + many[0]))
    into = [7, 3, 1, 0, 5][: many[1]]
    dst.pull([src.ticket(name)], into)
    assert dst.pulled()
    assert dst.right(into)
    assert not dst.failed
    src.step()
    assert not src.freed
    dst.step(Handovers(released=[src.ticket(name)]))
    assert until(lambda: bool(src.step().freed), LIMIT)
    assert src.report.offers == {"taken": 1}
    assert src.worker_side.quiet
    dst.loaded.clear()
    dst.report = Report()
    dst.pull([src.ticket(name)], into)
    assert not dst.pulled()
    assert dst.failed == {*into}


class NotedReader:
    """A reader in whose place a hand-over asks for pulls.

    Attributes:
        overlaps: of the pulls.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.overlaps = list[str]()

    def pull(self, *about: Any, **terms: Any) -> Any:
        self.overlaps.append(terms["overlap"])
        return self._reader.pull(*about, **terms)

    def close(self) -> None:
        self._reader.close()


@pytest.mark.parametrize(
    ("idle", "pulls", "overlaps"),
    [(True, 1, ["idle"]), (True, 2, ["compute"] * 2), (False, 1, ["compute"])],
)
def test_a_single_pull_of_an_engine_that_does_nothing_else_has_the_device(
    sides: ExitStack, idle: bool, pulls: int, overlaps: list[str]
) -> None:
    src = made(sides, 8, 32, pulls=False)
    dst = made(sides, 4, 64, offers=False)
    noted: Any = NotedReader(dst.handover.reader)
    dst.handover.reader = noted
    jobs = []
    for number in range(pulls):
        name = token_bytes(32)
        src.offer(name, range(3))
        ids = range(2 * number, 2 * number + 2)
        jobs.append(PullJob(number, f"d{number}", (src.ticket(name),), 0, TOKENS, ((*ids,),)))
    dst.step(Handovers(pulls=jobs), idle=idle)
    assert noted.overlaps == overlaps
    assert until(lambda: len(dst.step().report.missing) == pulls, LIMIT)


def test_rows_before_the_first_are_not_touched(sides: ExitStack) -> None:
    src = made(sides, 8, 16, pulls=False)
    dst = made(sides, 8, 16, offers=False)
    src.write(range(5))
    name = token_bytes(32)
    src.offer(name, range(5))
    dst.pull([src.ticket(name)], [-1, -1, 4, 5, 6], first=32)
    assert dst.pulled()
    assert torch.equal(dst.rows(range(2, 7))[:, :, 32:], ROWS[:, :, 32:])
    assert bool((dst.memory[:, :, :4] == -1).all())


def test_two_ranks_hand_over_to_one_and_back(sides: ExitStack) -> None:
    halves = [made(sides, 8, 16, heads, leads=heads[0] == 0) for heads in ((0, 2), (2, 4))]
    whole = made(sides, 8, 32)
    name = token_bytes(32)
    for half in halves:
        half.write(range(5))
        half.offer(name, range(5))
    tickets = [half.ticket(name) for half in halves]
    whole.pull(tickets, [0, 1, 2])
    assert whole.pulled()
    assert whole.right([0, 1, 2])
    whole.step(Handovers(released=[*tickets]))
    for half in halves:
        assert until(lambda half=half: bool(half.step().freed), LIMIT)
    other = token_bytes(32)
    whole.offer(other, [0, 1, 2])
    for half in halves:
        half.memory.fill_(-1)
        half.pull([whole.ticket(other)], [0, 1, 2, 3, 4])
        assert half.pulled()
        assert half.right([0, 1, 2, 3, 4])
    # Only one of them says that both have the rows.
    halves[1].step(Handovers(released=[whole.ticket(other)]))
    halves[0].step(Handovers(released=[whole.ticket(other)]))
    assert until(lambda: bool(whole.step().freed), LIMIT)


def test_ranks_that_do_not_cover_each_other(
    sides: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    half = made(sides, 8, 16, (0, 2))
    whole = made(sides, 8, 32)
    name = token_bytes(32)
    half.offer(name, range(5))
    whole.pull([half.ticket(name)], [0, 1, 2])
    assert not whole.pulled()
    assert whole.failed == {0, 1, 2}
    assert "heads 2-3" in caplog.text
    assert len(caplog.records) == 1


def test_another_model_is_refused(sides: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    src = made(sides, 8, 16, model="one")
    dst = made(sides, 8, 16, model="two")
    name = token_bytes(32)
    src.offer(name, range(5))
    dst.pull([src.ticket(name)], range(5))
    assert not dst.pulled()
    assert "'one'" in caplog.text
    assert "'two'" in caplog.text


@pytest.mark.parametrize("ticket", [b"no ticket", b""])
def test_a_ticket_that_is_none_is_a_failed_pull(sides: ExitStack, ticket: bytes) -> None:
    dst = made(sides, 8, 16)
    dst.pull([ticket], range(5))
    assert dst.pulled() is False
    dst.step(Handovers(renewals=[RemoteRows((ticket,), 1, 1.0)], released=[ticket]))


def test_a_lease_that_is_over_frees_the_blocks(sides: ExitStack) -> None:
    """Renewals that a reader sends prolong it before."""
    src = made(sides, 8, 16, pulls=False)
    dst = made(sides, 8, 16, offers=False)
    owner = src.handover.owner
    assert owner is not None
    clock = Clock(owner)
    name = token_bytes(32)
    src.offer(name, range(5), lease=1.0)
    (offer,) = owner.offers.values()
    dst.step(Handovers(renewals=[RemoteRows((src.ticket(name),), 1, 5.0)]))
    assert until(lambda: offer.lease.until == clock.now + 5.0, LIMIT)
    clock.now += 4.9
    assert offer.state == "held"
    clock.now += 0.2
    assert until(lambda: bool(src.step().freed), LIMIT)
    assert src.report.offers == {"expired": 1}
    dst.pull([src.ticket(name)], range(5))
    assert not dst.pulled()


def test_offers_that_are_revoked_are_not_pulled(sides: ExitStack) -> None:
    """An offer of the same plan is made after that."""
    src = made(sides, 8, 16)
    dst = made(sides, 8, 16)
    names = [token_bytes(32) for _ in range(2)]
    src.write(range(5))
    src.offer(names[0], range(5))
    later = OfferJob("q", names[1], TOKENS, (tuple(range(5)),), LEASE)
    src.step(Handovers(revoked=True, offers=[later]))
    assert until(lambda: bool(src.step().freed), LIMIT)
    assert src.report.offers == {"revoked": 1}
    dst.pull([src.ticket(names[0])], range(5))
    assert not dst.pulled()
    dst.loaded.clear()
    dst.report = Report()
    dst.pull([src.ticket(names[1])], range(5))
    assert dst.pulled()


def test_rows_that_cannot_be_offered_are_given_back(
    sides: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    src = made(sides, 8, 16)
    src.offer(token_bytes(32), [0, 99, 1, 2, 3])
    assert src.freed == {"p"}
    assert src.report.offers == {"failed": 1}
    assert "are not handed over" in caplog.text


@pytest.mark.parametrize("how", ["refused", "withdrawn", "not known"])
def test_engines_do_not_wait_for_offers_that_do_not_come(how: str, sides: ExitStack) -> None:
    """The pull waits already. Of a name that is not known yet, which is the control, it goes on."""
    src = made(sides, 8, 16)
    dst = made(sides, 8, 16, handing=HandoverTerms(timeout=3600.0))
    names = [token_bytes(32) for _ in range(2)]
    dst.pull([src.ticket(names[0])], range(5))
    ((_, waiting),) = dst.handover.pulling
    assert waiting is not None
    assert dst.handover.reader is not None
    late = dst.handover.reader._housekeeper.waiting[waiting]
    assert until(lambda: late.queried, LIMIT)
    assert not dst.step().loaded
    if how == "refused":
        src.offer(names[0], [0, 99, 1, 2, 3])
    elif how == "withdrawn":
        src.step(Handovers(revoked=True, withdrawn=[names[0]]))
    if how == "not known":
        # A later pull of the same engine has its rows, so that the owner was asked again.
        src.write(range(5))
        src.offer(names[1], range(5))
        job = PullJob(2, "e", (src.ticket(names[1]),), 0, TOKENS, ((5, 6, 7, 0, 1),))
        dst.step(Handovers(pulls=[job]))
        assert until(lambda: "e" in dst.step().loaded, LIMIT)
        assert "d" not in dst.loaded
        return
    assert not dst.pulled()
    assert dst.failed == {*range(5)}


def test_a_name_that_was_withdrawn_can_be_offered_later(sides: ExitStack) -> None:
    src = made(sides, 8, 16)
    dst = made(sides, 8, 16)
    name = token_bytes(32)
    src.step(Handovers(revoked=True, withdrawn=[name]))
    src.write(range(5))
    src.offer(name, range(5))
    dst.pull([src.ticket(name)], range(5))
    assert dst.pulled()


def test_an_engine_that_is_gone_is_a_failed_pull(
    sides: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    src = Side(8, 16)
    dst = made(sides, 8, 16)
    name = token_bytes(32)
    src.offer(name, range(5))
    ticket = src.ticket(name)
    src.handover.close()
    with caplog.at_level(logging.WARNING):
        dst.step(Handovers(renewals=[RemoteRows((ticket,), 1, 1.0)], released=[ticket]))
        dst.pull([ticket], range(5))
        assert not dst.pulled()
    assert len(caplog.records) == 1


def test_an_address_needs_a_secret_that_both_have(sides: ExitStack, tmp_path: Path) -> None:
    """One that is wrong is a failed pull."""
    tmp_path.chmod(0o700)
    those = list[Side]()
    for number, secret in enumerate(["0123456789abcdef"] * 2 + ["another secret of 16"]):
        file = tmp_path / f"secret{number}"
        file.write_text(secret)
        file.chmod(0o600)
        handing = HandoverTerms(address="tcp://127.0.0.1:0", secret_file=str(file), timeout=20.0)
        those.append(made(sides, 8, 16, handing=handing))
    src, dst, other = those
    name = token_bytes(32)
    src.write(range(5))
    src.offer(name, range(5))
    for side, lands in ((dst, True), (other, False)):
        side.pull([src.ticket(name)], range(5))
        assert side.pulled() is lands
    assert dst.right(range(5))


def test_a_store_that_is_none_saves_nothing(sides: ExitStack) -> None:
    side = made(sides, 8, 16)
    form = BlockForm.of(KVView([*side.memory], LAYOUT), MODEL)
    for call in (NoBlocks(form).save, NoBlocks(form).load):
        with pytest.raises(Exception, match="only hands requests over"):
            call()


def silent(stack: ExitStack, folder: Path) -> str:
    """Return an address at which a process listens that answers nothing."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(folder / "s"))
    listener.listen(8)
    return f"ipc://{folder / 's'}"


def test_a_ticket_without_a_name_waits_for_no_handshake(sides: ExitStack, tmp_path: Path) -> None:
    """A proxy may pass any ticket on, with any address."""
    dst = made(sides, 8, 16)
    terms = silent(sides, tmp_path), TOKENS, (bytes(20),), (16,), LEASE
    ticket = messages.Ticket(token_bytes(16), token_bytes(16), *terms).pack(token_bytes(32))
    dst.pull([ticket], range(5))
    assert dst.pulled() is False


def test_an_engine_that_hangs_delays_no_message_to_another(
    sides: ExitStack, tmp_path: Path
) -> None:
    src = made(sides, 8, 16, pulls=False)
    dst = made(sides, 8, 16, offers=False)
    name = token_bytes(32)
    src.offer(name, range(5))
    address = silent(sides, tmp_path)
    others = [Ticket.of(address, token_bytes(16), token_bytes(32)) for _ in range(80)]
    dst.step(Handovers(renewals=[RemoteRows((other,), 1, LEASE) for other in others]))
    dst.step(Handovers(released=[src.ticket(name)]))
    assert until(lambda: bool(src.step().freed), LIMIT)


def terms_of(tmp_path: Path, address: str = "tcp://127.0.0.1:0", **terms: Any) -> HandoverTerms:
    """Return terms of an engine that listens at an address."""
    secret = tmp_path / "secret"
    if not secret.exists():
        secret.write_text("of both sides, 16 bytes or more")
        secret.chmod(0o600)
    return HandoverTerms(address=address, secret_file=str(secret), **terms)


def test_a_decode_engine_connects_to_its_peers_before_the_first_pull(
    sides: ExitStack, tmp_path: Path
) -> None:
    """Also to one that does not listen yet, and not to one whose rows it can never take."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    late = f"tcp://127.0.0.1:{free}"
    src = made(sides, 8, 16, handing=terms_of(tmp_path), pulls=False)
    other = made(sides, 8, 16, handing=terms_of(tmp_path), model="x")
    ends = [side.handover.endpoint for side in (src, other)]
    peers = [end.address for end in ends if end is not None]
    handing = terms_of(tmp_path, peers=[*peers, late])
    dst = made(sides, 8, 16, handing=handing, offers=False)
    reader = dst.handover.reader
    assert reader is not None
    assert reader.statistics()["owners"] == 0
    dst.handover.meet()
    assert until(lambda: reader.statistics()["owners"] == 1, LIMIT)
    made(sides, 8, 16, handing=terms_of(tmp_path, late), pulls=False)
    assert until(lambda: reader.statistics()["owners"] == 2, LIMIT)


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"peers": "tcp://10.0.0.1:5600"}, "list of addresses, got 'tcp"),
        ({"peers": ["tcp://10.0.0.1:0"]}, "numeric address with a port, got 'tcp://10.0.0.1:0'"),
        ({"peers": ["tcp://eth0:5600"]}, "numeric address with a port, got 'tcp://eth0:5600'"),
        ({"peers": [5600]}, "Expected peers to be"),
        ({"peers": ["tcp://10.0.0.1:5600"]}, "Expected secret_file with peers"),
    ],
)
def test_peers_are_addresses(terms: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidTerms, match=why):
        HandoverTerms.of(terms)
