# SPDX-License-Identifier: Apache-2.0
"""Two engines and a server over one folder, which are killed in turn."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.keeper_processes import Worker, image_bytes, nursery, prompt

pytestmark = pytest.mark.xdist_group("keeper")
LIMIT = 60.0  # seconds; nothing here takes as long
BLOCKS = 3  # of a prompt
_KEEPER = """
from portakv.serving import Keeper, StoreTerms
keeper = Keeper(StoreTerms(folder=folder, **terms), patience=2.0)
"""
_RANK = """
from support.keeper_processes import *
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


class Host:
    """A server, and two engines: each with a keeper that stands by, and ranks."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.stack = ExitStack()
        self.folder = str(folder / "store")
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.first = 0
        self.keepers = [self.keeper() for _ in range(3)]
        self.engines = [self.engine(number) for number in range(2)]

    def keeper(self) -> Worker:
        made = self.stack.enter_context(Worker(nursery()))
        size = image_bytes()
        terms = {"staging": 12 * size, "host": 12 * size, "capacity": 1 << 30}
        made.do(_KEEPER, folder=self.folder, terms=terms)
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
        """Kill the server, a keeper that stands by, or an engine; and begin another one."""
        number = turn % 5
        if number < 3:
            self.keepers[number].kill()
            self.keepers[number] = self.keeper()
        else:
            ranks = self.engines[number - 3]
            for rank in self.chance.sample(ranks, len(ranks)):
                rank.kill()
            self.engines[number - 3] = self.engine(number - 3)

    def stored(self) -> list[int]:
        """Return the numbers of prompts that a rank has seen stored."""
        return sorted(int(path.name) for path in self.marks.iterdir())


def walk(folder: Path, kills: int) -> int:
    """Kill in turn; judge that no rows are wrong, and that what was stored is there."""
    host = Host(folder, 5)
    with host.stack:
        for turn in range(kills):
            before = len(host.stored())
            for _ in range(3000):  # until something was stored since the last kill
                if len(host.stored()) > before:
                    break
                host.engines[turn % 2][0].alive(0.02)
            else:
                pytest.fail("nothing is stored any more")
            host.kill(turn)
        for rank in [each for engine in host.engines for each in engine]:
            rank.kill()
        stored = host.stored()
        reader = host.stack.enter_context(Worker(nursery()))
        reader.do(_RANK, folder=host.folder, terms={"engine": "reader"})
        assert reader.do("answer = rank.client.wait(LIMIT)")
        for number in stored:
            tokens = prompt(number, BLOCKS)
            assert reader.do("answer = rank.load(tokens)", tokens=tokens) == [True] * BLOCKS, number
        return len(stored)


def test_kills_in_turn(tmp_path: Path) -> None:
    assert walk(tmp_path, 5) >= 5


@pytest.mark.full
def test_many_kills_in_turn(tmp_path: Path) -> None:
    assert walk(tmp_path, 200) >= 200
