# SPDX-License-Identifier: Apache-2.0
"""Two engines and a server over one folder, which are killed in turn while another engine loads."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.store_server_processes import Failed, Worker, image_bytes, nursery, prompt

pytestmark = pytest.mark.xdist_group("keeper")
BLOCKS = 3  # of a prompt
_STORE_SERVER = """
from portakv.serving import StoreServer, StoreTerms
store_server = StoreServer(StoreTerms(folder=folder, **terms), patience=2.0)
"""
#: The command, which prints into nothing and never ends by itself.
_SERVER = """
import os, sys
from portakv.cli import main
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdout = os.fdopen(1, "w")
raise RuntimeError(f"the server ended with {main(['store', 'serve', *words])}")
"""
_RANK = """
from support.store_server_processes import *
rank = Rank(folder, **terms)
"""
#: Saves prompts until it is killed. A name of a file says that the blocks of a prompt are stored.
_SAVES = """
from pathlib import Path
number = first
while True:
    if rank.client.wait(0.1) and rank.saved(prompt(number, blocks)) == [True] * blocks:
        (Path(marks) / str(number)).touch()
        number += 1
"""
#: Loads stored prompts until it is killed, and fails if a row is wrong. A file has a letter a load.
_LOADS = """
import random, time
from pathlib import Path
chance = random.Random(0)
while True:
    stored = sorted(int(path.name) for path in Path(marks).iterdir())
    if stored and rank.client.wait(0.1):
        tokens = prompt(chance.choice(stored), blocks)
        if any(rank.load(tokens, untouched=False)):
            with open(loads, "a") as file:
                file.write("x")
    time.sleep(0.02)  # leave the others time
"""


class Host:
    """A server, and two engines: each with a server that stands by, and ranks. A third engine
    loads what the two have stored.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.stack = ExitStack()
        self.folder = str(folder / "store")
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.loads = folder / "loads"
        self.loads.touch()
        self.first = 0
        self.store_servers = [self.store_server(number) for number in range(3)]
        self.engines = [self.engine(number) for number in range(2)]
        self.reader = self.stack.enter_context(Worker(nursery()))
        self.reader.do(_RANK, folder=self.folder, terms={"engine": "a third engine"})
        self.reader.begin(_LOADS, blocks=BLOCKS, marks=str(self.marks), loads=str(self.loads))

    def store_server(self, number: int) -> Worker:
        """Return a process that serves or stands by: the first one runs `portakv store serve`."""
        made = self.stack.enter_context(Worker(nursery()))
        size = image_bytes()
        terms = {"staging": 12 * size, "host": 12 * size, "capacity": 1 << 30}
        if number == 0:
            sizes = [word for name in terms for word in (f"--{name}", str(terms[name]))]
            made.begin(_SERVER, words=[self.folder, *sizes])
        else:
            made.do(_STORE_SERVER, folder=self.folder, terms=terms)
        return made

    def engine(self, number: int) -> list[Worker]:
        """Return the ranks of an engine, which save: one rank, or two with half of the heads."""
        split = [(0, 4)] if number == 0 else [(0, 2), (2, 4)]
        self.first += 10_000
        return [self.rank(number, heads) for heads in split]

    def rank(self, number: int, heads: tuple[int, int]) -> Worker:
        made = self.stack.enter_context(Worker(nursery()))
        made.do(_RANK, folder=self.folder, terms={"engine": f"engine {number}", "heads": heads})
        made.begin(_SAVES, first=self.first, blocks=BLOCKS, marks=str(self.marks))
        return made

    def kill(self, turn: int) -> None:
        """Kill the server, a server that stands by, or an engine; and begin another one."""
        number = turn % 5
        if number < 3:
            if number == 0:
                self.store_servers[number].alive(0.0)
            self.store_servers[number].kill()
            self.store_servers[number] = self.store_server(number)
        else:
            ranks = self.engines[number - 3]
            for rank in self.chance.sample(ranks, len(ranks)):
                rank.kill()
            self.engines[number - 3] = self.engine(number - 3)

    def stored(self) -> list[int]:
        """Return the numbers of prompts that a rank has seen stored."""
        return sorted(int(path.name) for path in self.marks.iterdir())

    def loaded(self) -> int:
        """Return how many loads of the third engine have brought blocks, all right."""
        self.reader.alive(0.0)
        return self.loads.stat().st_size


def walk(folder: Path, kills: int) -> int:
    """Kill in turn; judge that no rows are wrong, and that what was stored is there."""
    host = Host(folder, 5)
    with host.stack:
        for turn in range(kills):
            stored = len(host.stored())
            loaded = host.loaded()
            for _ in range(3000):  # until something was stored and loaded since the last kill
                if len(host.stored()) > stored and host.loaded() > loaded:
                    break
                host.engines[turn % 2][0].alive(0.02)
            else:
                pytest.fail("nothing is stored or loaded any more")
            host.kill(turn)
        assert host.loaded() >= kills
        host.reader.kill()
        for rank in [each for engine in host.engines for each in engine]:
            rank.kill()
        numbers = host.stored()
        reader = host.stack.enter_context(Worker(nursery()))
        reader.do(_RANK, folder=host.folder, terms={"engine": "reader"})
        assert reader.do("answer = rank.client.wait(LIMIT)")
        for number in numbers:
            tokens = prompt(number, BLOCKS)
            assert reader.do("answer = rank.load(tokens)", tokens=tokens) == [True] * BLOCKS, number
        return len(numbers)


@pytest.mark.full
def test_an_engine_that_loads_sees_wrong_rows(tmp_path: Path) -> None:
    """The negative control: rows of another prompt were stored under a prompt's keys."""
    with Worker(nursery()) as store_server, Worker(nursery()) as rank:
        folder = str(tmp_path / "store")
        store_server.do(_STORE_SERVER, folder=folder, terms={"staging": 1 << 20, "host": 1 << 20})
        rank.do(_RANK, folder=folder, terms={})
        rank.do(
            "rank.client.wait(LIMIT); rank.fill(other, range(blocks));"
            "rank.blocks.save(rank.view, range(blocks), keys_of(tokens)).synchronize(LIMIT)",
            other=prompt(2, BLOCKS),
            tokens=prompt(1, BLOCKS),
            blocks=BLOCKS,
        )
        marks = tmp_path / "marks"
        marks.mkdir()
        (marks / "1").touch()
        rank.begin(_LOADS, marks=str(marks), loads=str(tmp_path / "loads"))
        with pytest.raises(Failed, match="wrong rows in block 0"):
            rank.end()


def test_kills_in_turn(tmp_path: Path) -> None:
    assert walk(tmp_path, 5) >= 5


@pytest.mark.full
def test_many_kills_in_turn(tmp_path: Path) -> None:
    assert walk(tmp_path, 200) >= 200
