# SPDX-License-Identifier: Apache-2.0
"""A server and its clients in processes of their own, which are stopped and killed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.store_server_processes import Failed, Worker, image_bytes, nursery, prompt
from support.waits import LIMIT, until

from portakv.integrations.vllm.ranks import JoinedIndex, index_of
from portakv.serving import Group, StoreTerms
from portakv.serving.server.messages import PROTOCOL

pytestmark = pytest.mark.xdist_group("keeper")
_STORE_SERVER = """
import logging
from portakv.serving.server.server import StoreServer
from portakv.serving.local import StoreTerms
store_server = StoreServer(StoreTerms(folder=folder, **terms), patience=patience)
"""
_RANK = """
from support.store_server_processes import *
rank = Rank(folder, **terms)
answer = rank.client.wait(LIMIT) if waits else None
"""


class Host:
    """Processes around one folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = str(folder / "store")
        self.stack = stack

    def process(self) -> Worker:
        return self.stack.enter_context(Worker(nursery()))

    def store_server(
        self, staging: int = 16, host: int = 16, patience: float = 10.0, before: str = ""
    ) -> Worker:
        """Return a process with a server, whose sizes are in blocks. ``before``: code."""
        made = self.process()
        size = image_bytes()
        terms = {"staging": staging * size, "host": host * size, "capacity": 64 << 20}
        made.do(before + _STORE_SERVER, folder=self.folder, terms=terms, patience=patience)
        return made

    def rank(self, waits: bool = True, **terms: Any) -> Worker:
        """Return a process with a rank."""
        made = self.process()
        answer = made.do(_RANK, folder=self.folder, terms=terms, waits=waits)
        assert answer is True or not waits
        return made


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


def save_together(ranks: list[Worker], tokens: list[int]) -> list[list[bool]]:
    """Save tokens in all ranks of an engine, and return which blocks each says are stored."""
    for rank in ranks:
        rank.begin("answer = rank.saved(tokens)", tokens=tokens)
    return [rank.end() for rank in ranks]


def test_what_two_ranks_write_one_reads(host: Host) -> None:
    """A block of whole heads is written by two ranks, and read by one of another engine."""
    host.store_server()
    ranks = [host.rank(heads=(0, 2)), host.rank(heads=(2, 4))]
    tokens = prompt(1, 5)
    assert save_together(ranks, tokens) == [[True] * 5] * 2
    other = host.rank(engine="another")
    assert other.do("answer = rank.load(tokens)", tokens=prompt(1, 6)) == [*[True] * 5, False]
    # And the reverse.
    assert save_together([other], prompt(2, 3)) == [[True] * 3]
    for rank in ranks:
        assert rank.do("answer = rank.load(tokens)", tokens=prompt(2, 3)) == [True] * 3


@pytest.mark.parametrize("killed", [False, True])
def test_two_engines_of_one_name_share_blocks(host: Host, killed: bool) -> None:
    """Their ranks count as those of one engine: a block needs every part, from whichever of them.

    Equal keys are equal rows, also if an engine ends in the middle.
    """
    host.store_server()
    heads = [(0, 2), (2, 4)]
    first = [host.rank(heads=each) for each in heads]
    second = [host.rank(heads=each) for each in heads]
    tokens = prompt(1, 5)
    for rank in (*first, *second):
        rank.begin("answer = rank.saved(tokens)", tokens=tokens)
    if killed:
        first[1].kill()
    left = [rank for rank in (*first, *second) if not rank.dead]
    ended = [rank.end() for rank in left]
    assert killed or ended == [[True] * 5] * 4
    other = host.rank(engine="another")
    loaded = other.do("answer = rank.load(tokens)", tokens=prompt(1, 6))  # and compares the rows
    assert not loaded[5]
    assert save_together(second, prompt(2, 3)) == [[True] * 3] * 2
    for rank in left:
        assert rank.do("answer = rank.load(tokens)", tokens=prompt(2, 3)) == [True] * 3
    assert other.do("answer = rank.load(tokens)", tokens=prompt(2, 3)) == [True] * 3
    if not killed:
        assert loaded == [*[True] * 5, False]


def test_a_rank_that_comes_before_its_store_server_finds_it(host: Host) -> None:
    rank = host.rank(waits=False)
    tokens = prompt(1, 2)
    assert rank.do("answer = rank.load(tokens)", tokens=tokens) == [False] * 2
    assert rank.do("answer = rank.saved(tokens)") == [False] * 2
    host.store_server()
    assert rank.do("answer = rank.client.wait(LIMIT)")
    assert rank.do("answer = rank.saved(tokens)") == [True] * 2


#: Waits for a server that refuses now.
_WAIT = """
import time
from portakv.errors import InvalidTerms
answer = False
until = time.monotonic() + LIMIT
while not answer and time.monotonic() < until:
    try:
        answer = rank.client.wait(0.1)
    except InvalidTerms:
        time.sleep(0.05)
"""


def test_blocks_of_another_model_are_refused_in_one_sentence(host: Host) -> None:
    """As long as ranks have joined; the store is then opened for others."""
    host.store_server()
    first = host.rank()
    other = host.rank(engine="another", model="another", waits=False)
    with pytest.raises(
        Failed, match="Expected blocks with model='model', as the store server stores"
    ):
        other.do("rank.client.wait(LIMIT)")
    assert other.do("answer = rank.load(tokens)", tokens=prompt(1, 2)) == [False] * 2
    first.kill()
    assert other.do(_WAIT)
    # On a busy machine the server may lose the rank, which joins again.
    assert until(lambda: other.do("answer = rank.saved(tokens)") == [True] * 2, LIMIT)


def test_a_rank_that_is_killed_in_a_save_ends_the_save(host: Host) -> None:
    store_server = host.store_server()
    left = host.rank(heads=(0, 2))
    right = host.rank(heads=(2, 4))
    right.do(
        """
import threading
from portakv.storage.memory import Crossing
begun = threading.Event()
def copy(*args):
    begun.set()
    threading.Event().wait()
Crossing.copy = copy
"""
    )
    tokens = prompt(1, 4)
    left.begin("answer = rank.saved(tokens)", tokens=tokens)
    right.do("handle = rank.save(tokens); answer = begun.wait(LIMIT)", tokens=tokens)
    right.kill()
    assert left.end() == [False] * 4
    again = host.rank(heads=(2, 4))
    assert save_together([left, again], tokens) == [[True] * 4] * 2
    assert again.do("answer = rank.load(tokens)", tokens=tokens) == [True] * 4
    assert until(
        lambda: store_server.do("answer = store_server.statistics()")["leases"] == 0, LIMIT
    )


#: A connection that answers nothing is over soon.
_SOON = """
from portakv.migrate import channel
channel.HEARTBEAT = 100
channel.DEAD = 400
"""
_FORGETFUL = """
from portakv.serving.server import server as module
from support.store_server_model import Forgetful
module.ServerState = Forgetful
"""
#: A rank that is stopped in the middle of a copy, of which it writes the rest when it goes on.
_STOPS = """
import signal, threading
from portakv.storage.memory import Crossing
real = Crossing.copy
def copy(*args):
    Crossing.copy = real
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    real(*args)
Crossing.copy = copy
"""


def stopped_in_a_write(host: Host, guard: bool) -> bool:
    """Stop a rank in the middle of a save, give all rows to others, and let the rank go on.

    Returns whether the blocks of the others have right rows.
    """
    store_server = host.store_server(4, 12, 1.0, _SOON + ("" if guard else _FORGETFUL))
    other = host.rank(engine="another")
    rank = host.rank()
    rank.do(_STOPS)
    rank.begin("handle = rank.save(tokens)", tokens=prompt(99, 1))
    assert until(lambda: rank.stopped, LIMIT)
    assert until(
        lambda: store_server.do("answer = store_server.statistics()")["sessions"] == 1, LIMIT
    )
    tokens = [prompt(number, 1) for number in range(40)]
    other.do("for tokens in many: assert rank.saved(tokens) == [True]", many=tokens)
    rank.go_on()
    rank.end()
    rank.do("handle.synchronize(LIMIT); answer = rank.client.wait(LIMIT)")
    if not guard:
        with pytest.raises(Failed, match="wrong rows"):
            other.do("answer = [rank.load(tokens) for tokens in many[::-1]]")
        return False
    landed = other.do("answer = [rank.load(tokens) for tokens in many[::-1]]")
    assert landed.count([True]) == len(tokens)
    # The rank has joined again, and has its rows no longer.
    assert until(
        lambda: store_server.do("answer = store_server.statistics()")["leases"] == 0, LIMIT
    )
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(99, 1)) == [True]
    return True


def test_rows_of_a_stopped_rank_are_not_given_away(host: Host) -> None:
    assert stopped_in_a_write(host, True)


def test_rows_that_are_given_away_are_overwritten(host: Host) -> None:
    """The same without the guard."""
    assert not stopped_in_a_write(host, False)


def test_a_store_server_that_is_killed_is_replaced(host: Host) -> None:
    """Ranks go on with misses, then with the blocks of the folder."""
    first = host.store_server()
    second = host.store_server()
    assert first.do("answer = store_server.serves")
    assert not second.do("answer = store_server.serves")
    ranks = [host.rank(heads=(0, 2)), host.rank(heads=(2, 4))]
    tokens = prompt(1, 4)
    assert save_together(ranks, tokens) == [[True] * 4] * 2
    for rank in ranks:
        rank.do(_LINES)
    second.stop()  # for a while nobody serves
    first.kill()
    for rank in ranks:
        assert rank.do("answer = rank.load(tokens)", tokens=tokens) == [False] * 4
        assert rank.do("answer = rank.saved(tokens)", tokens=prompt(2, 3)) == [False] * 3
    second.go_on()
    for rank in ranks:
        assert rank.do("answer = rank.client.wait(LIMIT)")
        assert rank.do("answer = rank.load(tokens)", tokens=tokens) == [True] * 4
        lines = rank.do("answer = lines")
        assert len([line for line in lines if "is gone: blocks count as missing" in line]) == 1
    assert second.do("answer = store_server.serves")
    assert save_together(ranks, prompt(2, 3)) == [[True] * 3] * 2


def test_a_store_server_that_is_closed_leaves_the_folder_to_the_next(host: Host) -> None:
    first = host.store_server()
    rank = host.rank()
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(2, 3)) == [True] * 3
    first.do("store_server.close()")
    assert until(lambda: not rank.do("answer = rank.client.wait(0)"), LIMIT)
    host.store_server()
    assert rank.do("answer = rank.client.wait(LIMIT)")
    assert rank.do("answer = rank.load(tokens)", tokens=prompt(2, 3)) == [True] * 3


def test_a_load_whose_store_server_dies_ends(host: Host) -> None:
    store_server = host.store_server()
    rank = host.rank()
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 3)) == [True] * 3
    store_server.stop()
    asks = """
from portakv.serving.server.link import Link
real = Link.ask
def ask(self, *args):
    open(path, "w").close()
    return real(self, *args)
Link.ask = ask
"""
    asked = Path(host.folder) / "asked"
    rank.do(asks, path=str(asked))
    rank.begin("answer = rank.load(tokens)", tokens=prompt(1, 3))
    assert until(asked.exists, LIMIT)
    store_server.kill()
    assert rank.end() == [False] * 3


def test_a_store_server_that_hangs_is_a_miss(host: Host) -> None:
    """A call waits for it once, and no later one does. It serves again when it goes on."""
    store_server = host.store_server()
    rank = host.rank()
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 3)) == [True] * 3
    rank.do("from portakv.serving.server import client; client.ASKING = 0.2")
    store_server.stop()
    for _ in range(3):
        assert rank.do("answer = rank.load(tokens)", tokens=prompt(1, 3)) == [False] * 3
    assert not rank.do("answer = rank.client.wait(0)")
    store_server.go_on()
    assert rank.do("answer = rank.client.wait(LIMIT)")
    assert rank.do("answer = rank.load(tokens)", tokens=prompt(1, 3)) == [True] * 3
    # What was lent to the call that waited is free again.
    assert until(
        lambda: store_server.do("answer = store_server.statistics()")["leases"] == 0, LIMIT
    )


_STORE = """
from portakv.storage import BlockStore, Disk
from support.store_server_processes import *
form = Rank(folder + "/elsewhere").form
store = BlockStore(form, staging=1 << 20, tiers=[Disk(folder, capacity=64 << 20)])
"""


def test_a_folder_that_another_program_has_is_refused_in_one_sentence(host: Host) -> None:
    """The server waits for it for a while, and serves when it is free."""
    program = host.process()
    program.do(_STORE, folder=host.folder)
    soon = "from portakv.serving.server import server; server.BUSY = 0.2\n"
    host.store_server(before=soon)
    rank = host.rank(waits=False)
    with pytest.raises(Failed, match=r"that process [0-9]+ has open already"):
        rank.do("rank.client.wait(LIMIT)")
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 3)) == [False] * 3
    program.do("store.close()")
    assert rank.do(_WAIT)
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 3)) == [True] * 3


#: Keeps the lines of the log.
_LINES = """
import logging
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("portakv").addHandler(Keep())
"""


_LEVELS = """
import logging
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))
logging.getLogger("portakv").addHandler(Keep())
logging.getLogger("portakv").setLevel(logging.INFO)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_the_end_of_a_store_server_is_as_loud_as_its_return(host: Host, killed: bool) -> None:
    """One that ends in order says so: no rank warns of it. One that is killed does not."""
    first = host.store_server()
    ranks = [host.rank(heads=(0, 2)), host.rank(heads=(2, 4))]
    for rank in ranks:
        rank.do(_LEVELS)
    if killed:
        first.kill()
    else:
        first.do("store_server.close()")
    for rank in ranks:
        assert until(lambda rank=rank: not rank.do("answer = rank.client.wait(0)"), LIMIT)
    host.store_server()
    level, how = ("WARNING", "is gone") if killed else ("INFO", "has ended")
    for rank in ranks:
        assert rank.do("answer = rank.client.wait(LIMIT)")
        (ended, back) = rank.do("answer = lines")
        assert ended[0] == level
        assert f"{how}: blocks count as missing until another one serves." in ended[1]
        assert back == (level, f"The store server of {host.folder} serves this process.")


def test_a_store_server_of_another_version_serves_nobody(host: Host) -> None:
    host.store_server(before="from portakv.serving.server import server as s; s.PROTOCOL = 99\n")
    rank = host.process()
    rank.do(_LINES + _RANK, folder=host.folder, terms={}, waits=False)
    assert rank.do("answer = rank.client.wait(LIMIT)") is False
    for _ in range(3):
        assert rank.do("answer = rank.load(tokens)", tokens=prompt(1, 2)) == [False] * 2
    (said,) = [line for line in rank.do("answer = lines") if "version" in line]
    assert re.search(rf"of version {PROTOCOL} in .*, got version 99: nothing", said)


def test_a_scheduler_starts_beside_a_store_server_of_another_version(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.store_server(before="from portakv.serving.server import server as s; s.PROTOCOL = 99\n")
    terms = StoreTerms(folder=host.folder, shared=True, host=16 << 20, staging=16 << 20)
    settings: Any = SimpleNamespace(
        stores=True,
        uses_store_server=True,
        store=terms,
        engine="e",
        groups=(Group(16),),
        parts=(1,),
        block_size=16,
    )
    index = index_of(settings)
    assert isinstance(index, JoinedIndex)
    try:
        assert index.leading([b"k" * 32]) == 0
        assert any("got version 99" in line for line in caplog.messages)
    finally:
        index.close()


# --- the index

_INDEX = """
from portakv.serving.server.client import ServerIndex
from support.store_server_processes import *
index = ServerIndex(Place.of_folder(folder), "engine")
answer = index.wait(LIMIT)
"""
_LEADING = "answer = index.leading(keys_of(tokens))"


def test_an_index_follows_a_store_server(host: Host) -> None:
    """What is stored, and what the host tier evicts; and after the server was replaced."""
    store_server = host.store_server(8, 8)
    rank = host.rank()
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 3)) == [True] * 3
    scheduler = host.process()
    assert scheduler.do(_INDEX, folder=host.folder)
    assert scheduler.do(_LEADING, tokens=prompt(1, 5)) == 3
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(2, 4)) == [True] * 4
    assert until(lambda: scheduler.do(_LEADING, tokens=prompt(2, 4)) == 4, LIMIT)
    assert scheduler.do("answer = [index.has(key) for key in keys_of(tokens)]") == [True] * 4
    host.store_server(8, 8)
    store_server.kill()
    assert until(lambda: scheduler.do(_LEADING, tokens=prompt(2, 4)) == 0, LIMIT)
    assert scheduler.do("answer = index.wait(LIMIT)")
    assert scheduler.do(_LEADING, tokens=prompt(2, 4)) == 4  # of the disk


#: A server that loses the messages about changes.
_LOSES = """
from portakv.serving.server.server import OpenStore
real = OpenStore.announce
missed = []
def announce(self, changes):
    missed.extend(change.tier for change in changes)
    return []
OpenStore.announce = announce
"""
#: An index that does not look at the numbers of changes.
_CARELESS = """
def careless(self, changes):
    for changed in changes:
        self._number = changed.number - 1
        real(self, [changed])
real = ServerIndex.apply
ServerIndex.apply = careless
"""


def knows_what_it_missed(host: Host, before: str) -> bool:
    """Return whether an index knows blocks about which a message was lost."""
    store_server = host.store_server()
    rank = host.rank()
    scheduler = host.process()
    assert scheduler.do(_INDEX.replace("index =", f"{before}\nindex ="), folder=host.folder)
    store_server.do(_LOSES)
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 1)) == [True]
    assert until(lambda: {*store_server.do("answer = missed")} == {"host", "disk"}, LIMIT)
    store_server.do("OpenStore.announce = real")
    assert rank.do("answer = rank.saved(tokens)", tokens=prompt(2, 1)) == [True]
    assert until(lambda: scheduler.do(_LEADING, tokens=prompt(2, 1)) == 1, LIMIT)
    return bool(scheduler.do(_LEADING, tokens=prompt(1, 1)))


def test_an_index_reads_all_again_after_a_gap(host: Host) -> None:
    assert knows_what_it_missed(host, "")


def test_an_index_that_ignores_gaps_lacks_blocks(host: Host) -> None:
    """The same without the guard."""
    assert not knows_what_it_missed(host, _CARELESS)
