# SPDX-License-Identifier: Apache-2.0
"""Hand-overs of engines whose workers have parts of a model: stages of layers, ranks of heads, and
the rows of MLA, which every rank has whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from secrets import token_bytes
from typing import Any

import pytest
import torch
from support.waits import LIMIT, until

from portakv import KVView
from portakv.migrate import Shard, Ticket, shared_empty
from portakv.serving import GroupCache, Plan, Report, WorkerSide
from portakv.serving.handover import Handover, HandoverTerms
from portakv.serving.local import NoBlocks
from portakv.serving.plan import NO_HANDOVERS, Handovers, OfferJob, PullJob
from portakv.storage import BlockForm

MODEL = "a model"
LAYERS = 4
HEADS = 4
DIM = 8
TOKENS = 75
BLOCKS = 8
ALL = (0, LAYERS), (0, HEADS)
#: The layers and heads of the workers of engines.
ENGINES = {
    "one worker": [ALL],
    "two stages": [((0, 1), (0, HEADS)), ((1, LAYERS), (0, HEADS))],
    "two ranks": [((0, LAYERS), (0, 2)), ((0, LAYERS), (2, HEADS))],
    "two ranks in each of two stages": [
        ((first, past), (head, head + 2)) for first, past in ((0, 3), (3, 4)) for head in (0, 2)
    ],
}
Window = tuple[tuple[int, int], tuple[int, int]]


def numbers(*shape: int) -> torch.Tensor:
    """Return different numbers, int32."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.int32, device="cpu").view(shape)


#: [layer, kv, token, head, dim], and the rows of MLA: [layer, token, dim].
ROWS = numbers(LAYERS, 2, TOKENS, HEADS, DIM)
LATENT = numbers(LAYERS, TOKENS, DIM)


class Worker:
    """A worker of an engine.

    Args:
        window: its layers and heads.
        size: tokens of a block.
        latent: the model has MLA.
        first: it is the first of its engine, which sends the others' messages.
    """

    def __init__(self, window: Window, size: int, latent: bool, first: bool) -> None:
        (layer, past), (head, last) = window
        count = past - layer
        if latent:
            self.memory = shared_empty((count, BLOCKS, size, DIM), torch.int32)
            view = KVView([*self.memory], "layer | block token dim")
            heads = (0, 1, 1)
            self.expected = LATENT[layer:past]
        else:
            self.memory = shared_empty((count, 2, BLOCKS, size, last - head, DIM), torch.int32)
            view = KVView([*self.memory], "layer | kv block token head dim")
            heads = (head, last, HEADS)
            self.expected = ROWS[layer:past, :, :, head:last]
        self.memory.fill_(-1)
        self._blocks = 1 if latent else 2  # the axis of the memory
        shard = Shard(view, layers=(layer, past, LAYERS), heads=heads)
        self.handover = Handover([shard], MODEL, HandoverTerms(), leads=first)
        blocks_of = NoBlocks(BlockForm.of(view, MODEL))
        self.worker_side = WorkerSide([GroupCache(view, blocks_of)], handover=self.handover)
        self.report = Report()
        self.freed = set[str]()
        self.loaded = set[str]()

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Return a copy of the rows of a prompt in blocks."""
        at = self._blocks
        blocks = self.memory.index_select(at, torch.tensor(ids, device="cpu"))
        return blocks.flatten(at, at + 1).narrow(at, 0, TOKENS)

    def write(self) -> None:
        """Write the rows of a prompt into the first blocks."""
        at = self._blocks
        size = self.memory.shape[at + 1]
        for token in range(TOKENS):
            block = self.memory.select(at, token // size)
            block.select(at, token % size).copy_(self.expected.select(at, token))

    def step(self, handovers: Handovers = NO_HANDOVERS, retained: tuple[str, ...] = ()) -> None:
        self.worker_side.load(Plan(handovers=handovers, retained=[*retained]))
        self.report = self.report.merged(self.worker_side.report())
        ended = self.worker_side.ended()
        self.freed |= ended.freed
        self.loaded |= ended.loaded

    def ticket(self, name: bytes) -> bytes:
        endpoint = self.handover.endpoint
        assert endpoint is not None
        return Ticket.of(*endpoint, name)


Engine = list[Worker]


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Return a function that makes an engine of workers."""
    with ExitStack() as stack:

        def made(workers: Sequence[Window], size: int, latent: bool = False) -> Engine:
            result = []
            for number, window in enumerate(workers):
                worker = Worker(window, size, latent, number == 0)
                stack.callback(worker.handover.close)
                result.append(worker)
            return result

        yield made


def offered(src: Engine, size: int) -> list[bytes]:
    """Let an engine offer a prompt; return the tickets, one of each worker."""
    name = token_bytes(32)
    ids = range(-(-TOKENS // size))
    for worker in src:
        worker.write()
        job = OfferJob("p", name, TOKENS, ((*ids,),), 20.0)
        worker.step(Handovers(offers=[job]), retained=("p",))
    return [worker.ticket(name) for worker in src]


def pulled(dst: Engine, tickets: list[bytes], ids: Sequence[int]) -> list[bool]:
    """Let each worker of an engine pull with the tickets of all workers of the other one."""
    landed = []
    for worker in dst:
        job = PullJob(1, "d", (*tickets,), 0, TOKENS, ((*ids,),))
        worker.step(Handovers(pulls=[job]))
    for worker in dst:

        def has_ended(worker: Worker = worker) -> bool:
            worker.step()
            return bool(worker.loaded)

        assert until(has_ended, LIMIT)
        landed.append(worker.report.missing == {1: frozenset()})
    return landed


def hand_over(src: Engine, dst: Engine, sizes: tuple[int, int]) -> None:
    """Hand a prompt over, and let the owner have its blocks again."""
    tickets = offered(src, sizes[0])
    ids = [7, 3, 1, 0, 5][: -(-TOKENS // sizes[1])]
    assert pulled(dst, tickets, ids) == [True] * len(dst)
    for worker in dst:
        assert torch.equal(worker.rows(ids), worker.expected)
    for worker in dst:
        worker.step(Handovers(released=[*tickets]))
    for owner in src:

        def is_free(owner: Worker = owner) -> bool:
            owner.step()
            return bool(owner.freed)

        assert until(is_free, LIMIT)


def wide(pairs: Iterable[tuple[str, str]], usual: Sequence[tuple[str, str]]) -> list[Any]:
    """Return pairs of engines, of which only the usual ones run every time."""
    others = [pytest.param(*pair, marks=pytest.mark.full) for pair in pairs if pair not in usual]
    return [*usual, *others]


@pytest.mark.parametrize(
    ("src", "dst"),
    wide(
        product([name for name in ENGINES if "stages" in name], ENGINES),
        [("two stages", "one worker"), ("two stages", "two ranks")],
    ),
)
def test_stages_hand_over_to_any_engine_and_back(
    engine: Callable[..., Engine], src: str, dst: str
) -> None:
    """Each worker takes the layers and heads that it has, from the workers that have them."""
    sizes = 16, 32
    hand_over(engine(ENGINES[src], 16), engine(ENGINES[dst], 32), sizes)
    hand_over(engine(ENGINES[dst], 16), engine(ENGINES[src], 32), sizes)


@pytest.mark.parametrize(
    ("src", "dst"),
    wide(
        product(["one worker", "two ranks"], ["one worker", "two ranks", "two stages"]),
        [("two ranks", "one worker"), ("one worker", "two stages")],
    ),
)
def test_every_rank_has_and_takes_the_rows_of_mla(
    engine: Callable[..., Engine], src: str, dst: str
) -> None:
    sizes = 32, 16
    hand_over(engine(ENGINES[src], 32, latent=True), engine(ENGINES[dst], 16, latent=True), sizes)


def test_a_stage_that_is_missing_fails_each_pull_that_needs_it(
    engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    src = engine(ENGINES["two stages"], 16)
    dst = engine(ENGINES["two stages"], 16)
    tickets = offered(src, 16)
    assert pulled(dst, tickets[:1], range(5)) == [True, False]
    assert torch.equal(dst[0].rows(range(5)), dst[0].expected)
    assert bool((dst[1].memory == -1).all())
    assert "layers 1-3" in caplog.text


def test_rows_of_mla_are_not_taken_for_others(
    engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    src = engine(ENGINES["one worker"], 16, latent=True)
    (worker,) = dst = engine(ENGINES["one worker"], 16)
    assert pulled(dst, offered(src, 16), range(5)) == [False]
    assert bool((worker.memory == -1).all())
    assert len(caplog.records) == 1
