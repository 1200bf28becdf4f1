# SPDX-License-Identifier: Apache-2.0
"""Processes with a server, or with a rank of an engine, which tests drive, stop and kill.

They are forked from a nursery that has imported everything, so that one is made in milliseconds.
"""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Client, Listener
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.serving.server.client import StoreClient
from portakv.serving.server.link import Place
from portakv.storage import BlockForm, prefix_keys
from support.migrate_nursery import Nursery
from support.stopping import go_on, stop, stopped
from support.waits import LIMIT

LAYERS = 2
HEADS = 4
SIZE = 8  # tokens of a block
LAYOUT = "layer | block kv token head dim"
MODEL = "model"


@cache
def nursery() -> Nursery:
    """Return the nursery of all tests of servers, which lives as long as this process."""
    made = Nursery()
    made.do("import support.store_server_processes, portakv.cli, portakv.serving")
    atexit.register(made.kill)
    return made


class Failed(Exception):
    """An error of the code that a process ran."""


class Worker:
    """A process that runs code, with names that stay. A context manager, which kills it."""

    def __init__(self, nursery: Nursery) -> None:
        self._folder = mkdtemp()
        socket = f"{self._folder}/socket"
        self._nursery = nursery
        self.pid, ready = nursery.born(
            "from support.store_server_processes import act; act(socket, tell)", socket=socket
        )
        assert ready == "ready", ready
        self._pipe = Client(socket)
        self.dead = False

    def begin(self, code: str, **values: Any) -> None:
        """Begin to run code there."""
        self._pipe.send((code, values))

    def end(self) -> Any:
        """Return what the code left in ``answer``."""
        assert self._pipe.poll(LIMIT), "the process does not answer"
        answer, failure = self._pipe.recv()
        if failure:
            raise Failed(failure)
        return answer

    def do(self, code: str, **values: Any) -> Any:
        """Run code there, and return what it left in ``answer``."""
        self.begin(code, **values)
        return self.end()

    def alive(self, seconds: float) -> None:
        """Let the code that runs there go on for a while; raise `Failed` if it has failed."""
        if self._pipe.poll(seconds):
            self.end()

    def kill(self) -> None:
        """Kill the process, as the kernel does when memory runs out."""
        if not self.dead:
            self.dead = True
            self._nursery.end(self.pid)
            self._pipe.close()

    def stop(self) -> None:
        """Stop the process."""
        stop(self.pid)

    def go_on(self) -> None:
        """Have a stopped process go on."""
        go_on(self.pid)

    @property
    def stopped(self) -> bool:
        """Return whether the process is stopped."""
        return stopped(self.pid)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.kill()


def act(socket: str, tell: Any) -> None:
    """Run what a `Worker` sends, in its process."""
    listener = Listener(socket)
    tell("ready")
    pipe = listener.accept()
    names: dict[str, Any] = {}
    with suppress(EOFError):
        while True:
            code, values = pipe.recv()
            names.update(values, answer=None)
            failure = ""
            try:
                exec(code, names)
            except BaseException:
                failure = traceback.format_exc()
            pipe.send((None if failure else names["answer"], failure))


# --- in such a process


class Rank:
    """A rank of an engine: caches of some heads, and its client of a server.

    Its rows are those that the tokens of a request give; see `rows_of`.
    """

    def __init__(
        self,
        folder: str,
        engine: str = "engine",
        heads: tuple[int, int] = (0, HEADS),
        blocks: int = 32,
        size: int = SIZE,
        model: str = MODEL,
        device: str | torch.device = "cpu",
    ) -> None:
        self.heads = heads
        self.size = size
        across = heads[1] - heads[0]
        shape = blocks, 2, size, across, 2
        self.caches = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(LAYERS)]
        self.view = KVView(self.caches, LAYOUT)
        self.form = BlockForm.of(self.view, model, heads=(*heads, HEADS))
        place = Place.of_folder(folder)
        registers = None if self.view.device.type == "cpu" else self.view.device
        self.client = StoreClient(place, [self.form], engine, registers)
        self.blocks = self.client.blocks[0]

    def fill(self, tokens: Sequence[int], ids: Sequence[int]) -> None:
        """Write the rows of tokens into blocks."""
        expected = rows_of(tokens, self.size, self.heads)
        for layer, rows in enumerate(self.caches):
            rows[torch.tensor([*ids])] = torch.from_numpy(expected[layer]).to(rows.device)

    def save(self, tokens: Sequence[int]) -> Any:
        """Compute the rows of tokens, and begin to save them."""
        keys = keys_of(tokens, self.size)
        ids = range(len(keys))
        self.fill(tokens, ids)
        return self.blocks.save(self.view, ids, keys)

    def saved(self, tokens: Sequence[int]) -> list[bool]:
        """Save tokens, and return which blocks are stored."""
        handle = self.save(tokens)
        handle.synchronize(LIMIT)
        return [bool(each) for each in handle.landed]

    def load(
        self, tokens: Sequence[int], deadline: float = 20.0, untouched: bool = True
    ) -> list[bool]:
        """Load tokens into empty caches, and return which blocks landed; check their rows.

        ``untouched``: check that no other rows were written. A server that is killed while rows
        are copied leaves some.
        """
        for rows in self.caches:
            rows.fill_(-1)
        keys = keys_of(tokens, self.size)
        handle = self.blocks.load(self.view, range(len(keys)), keys, deadline=deadline)
        handle.synchronize(LIMIT)
        landed = handle.landed
        expected = rows_of(tokens, self.size, self.heads)
        for layer, rows in enumerate(self.caches):
            for block in range(len(keys)):
                if not (landed[block] or untouched):
                    continue
                right = expected[layer][block] if landed[block] else -1
                assert (rows[block].numpy() == right).all(), f"wrong rows in block {block}"
        return [bool(each) for each in landed]


def keys_of(tokens: Sequence[int], size: int = SIZE) -> list[bytes]:
    """Return the keys of the blocks of tokens."""
    return prefix_keys(tokens, size)


def rows_of(tokens: Sequence[int], size: int, heads: tuple[int, int]) -> np.ndarray:
    """Return the rows of tokens: int64 ``[layers, blocks, kv, token, heads, dim]``.

    A row is a number that its tokens so far, its layer, its head and its place in the row give.
    """
    blocks = len(tokens) // size
    seen = 17
    base = np.zeros(blocks * size, np.int64)
    for number in range(blocks * size):
        seen = (seen * 1_000_003 + tokens[number]) % (1 << 40)
        base[number] = seen
    result = np.zeros((LAYERS, blocks, 2, size, heads[1] - heads[0], 2), np.int64)
    for layer in range(LAYERS):
        for head in range(*heads):
            for kv in range(2):
                for dim in range(2):
                    salt = ((layer * 64 + head) * 2 + kv) * 2 + dim
                    rows = (base << 12) + salt
                    result[layer, :, kv, :, head - heads[0], dim] = rows.reshape(blocks, size)
    return result


def prompt(number: int, blocks: int, size: int = SIZE) -> list[int]:
    """Return the tokens of a request."""
    return [number * 1000 + token for token in range(blocks * size)]


def image_bytes() -> int:
    """Return the bytes of a row of a server of these blocks."""
    form = BlockForm(
        MODEL,
        "int64",
        2,
        (2, 2),
        SIZE,
        (0, LAYERS, LAYERS),
        (0, HEADS, HEADS),
        "block layer head kv token dim",
    )
    return form.image_bytes
