# SPDX-License-Identifier: Apache-2.0
"""Pages in the store of a server: several processes have the same ones, and any may end."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ready
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms
from portakv.serving import StoreTerms
from portakv.serving.pages import PagePool, PageStore

PIECES = [512, 256]
COUNT = 12
KEYS = [bytes([number]) * 32 for number in range(1, COUNT + 1)]
ROOM: dict[str, Any] = {"host": 1 << 20, "staging": 2 << 20, "capacity": 4 << 20}


def terms_of(folder: Path, **more: Any) -> StoreTerms:
    return StoreTerms(folder=str(folder / "kv"), shared=True, **ROOM | more)


def pool_of(folder: Path, identity: bytes = b"pool", model: str = "model") -> Any:
    pool = PagePool(PIECES, identity)
    store = PageStore(terms_of(folder), model, [pool.size])
    pool.open(store)
    return store, pool


def memory(seed: int) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (COUNT, sum(PIECES)), np.uint8)


def rows(of: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = of.ctypes.data + np.arange(COUNT)[:, None] * of.strides[0]
    return result


def right_or_missing(pool: PagePool, seed: int) -> int:
    """Load all pages, and check them; return how many came."""
    target = memory(99)
    landed = pool.load(KEYS, rows(target))
    for number, there in enumerate(landed):
        assert (target[number] == memory(seed if there else 99)[number]).all()
    return int(landed.sum())


@pytest.fixture
def closing() -> Any:
    with ExitStack() as stack:
        yield stack


def test_what_one_has_stored_the_other_has(tmp_path: Path, closing: ExitStack) -> None:
    """Also after the one that served has ended; ranks with separate pages do not see them."""
    one, first = pool_of(tmp_path)
    other, second = pool_of(tmp_path)
    closing.callback(other.close)
    third = PagePool(PIECES, b"another rank")
    third.open(other)
    source = memory(1)
    try:
        assert first.lookup(KEYS) == 0
        assert first.save(KEYS, rows(source)).all()
        assert until(lambda: second.lookup(KEYS) == COUNT, LIMIT)
        assert right_or_missing(second, 1) == COUNT
        assert third.lookup(KEYS) == 0
        assert right_or_missing(third, 1) == 0
    finally:
        one.close()
    assert until(lambda: right_or_missing(second, 1) == COUNT, LIMIT)
    assert until(lambda: second.lookup(KEYS) == COUNT, LIMIT)
    assert third.save(KEYS, rows(memory(2))).all()
    assert right_or_missing(third, 2) == COUNT


def test_pages_of_another_model_are_refused(tmp_path: Path, closing: ExitStack) -> None:
    store, pool = pool_of(tmp_path)
    closing.callback(store.close)
    pool.save(KEYS, rows(memory(1)))
    with pytest.raises(InvalidTerms):
        pool_of(tmp_path, model="another")


@pytest.mark.parametrize(
    "more",
    [{"folder": None}, {"bucket": "memory://"}, {"encoding": "pack"}],
    ids=str,
)
def test_terms_that_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    terms = StoreTerms(**{"folder": str(tmp_path / "kv"), "shared": True, **ROOM, **more})
    with pytest.raises(InvalidTerms, match="encoding" if "encoding" in more else "shared"):
        PageStore(terms, "model", [PagePool(PIECES).size])


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from serving.test_store_server_pages import KEYS, memory, pool_of, rows

store, pool = pool_of(Path({folder!r}))
source = memory(1)
while not pool.save(KEYS[:4], rows(source)[:4]).all():
    pass  # a busy machine takes longer than a save may
print("stored", flush=True)
while True:
    pool.save(KEYS, rows(source))
"""


def test_kill_9_of_the_process_that_serves(tmp_path: Path, closing: ExitStack) -> None:
    """The other one serves then, and has what was stored."""
    tests = str(Path(__file__).parents[1])
    code = textwrap.dedent(KILLED).format(tests=tests, folder=str(tmp_path))
    with ready.Python("-c", code, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stored\n"
            store, pool = pool_of(tmp_path)
            closing.callback(store.close)
            assert until(lambda: pool.lookup(KEYS) >= 4, LIMIT)
            assert right_or_missing(pool, 1) >= 4
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert until(lambda: right_or_missing(pool, 1) >= 4, LIMIT)
    pool.save(KEYS, rows(memory(1)))
    assert until(lambda: right_or_missing(pool, 1) == COUNT, LIMIT)
