# SPDX-License-Identifier: Apache-2.0
"""Block transfers in slices: when slices start, how they end, and what stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_cases import LAYERS, PATIENCE, Cache, layered, until, wanted
from support.guarded_memory import check_sentence
from support.small_backends import small_backend

from portakv import (
    BlockTransfer,
    SlotError,
    TransferCancelled,
    TransferError,
    copy_blocks,
    register_backend,
)
from portakv.blocks import slices as block_slices
from portakv.registry import registry
from portakv.runtime import worker
from portakv.runtime.worker import WINDOW

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]


class Gate:
    """Lets slices start, one for each `open`; and lets them land, unless they are `late`."""

    def __init__(self) -> None:
        self.armed = False
        self.started: list[torch.Tensor] = []
        self.threads: set[int] = set()
        self._permits = threading.Semaphore(0)
        self.failing: dict[int, BaseException] = {}
        self.late: Late | None = None

    def open(self, slices: int = 1) -> None:
        self._permits.release(slices)

    def pass_through(self, dst: Any) -> None:
        """Called behind each slice."""
        if not self.armed:
            return
        assert self._permits.acquire(timeout=PATIENCE)
        self.threads.add(threading.get_ident())
        nth = len(self.started)
        self.started.append(dst)
        if nth in self.failing:
            raise self.failing[nth]

    def wait_for(self, slices: int) -> None:
        """Wait until so many have been issued."""
        until(lambda: len(self.started) >= slices)


class Late:
    """Work that no stream orders; it ends when the test says so, the first time with an error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.end = threading.Event()
        self.error = error

    def done(self) -> bool:
        return self.end.is_set()

    def wait(self) -> None:
        assert self.end.wait(PATIENCE)
        error, self.error = self.error, None
        if error is not None:
            raise error


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A backend ``gated`` that waits at the gate behind every slice; one block to a slice."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.setattr(block_slices, "SLICE", 1)
    gate = Gate()
    backend = small_backend("gated", spoil=gate.pass_through)
    register_backend("gated", backend)
    registry.choose("cpu", "gated")
    backend.given.clear()
    gate.armed = True
    yield gate
    gate.open(1000)
    until(lambda: not worker._running)


def start(**options: Any) -> tuple[BlockTransfer, Cache, torch.Tensor, torch.Tensor]:
    """A transfer through the gate; its destination, and that one's rows before and after."""
    src, dst = layered(), layered()
    before, after = dst.rows(), wanted(src, dst, SRC, DST)
    options = {"cancellable": True, **options}
    return copy_blocks(src.view, dst.view, SRC, DST, backend="gated", **options), dst, before, after


def moved(dst: Cache, before: torch.Tensor, after: torch.Tensor, blocks: int) -> torch.Tensor:
    """The rows once only the first so many blocks were moved."""
    slots = dst.slots(DST[:blocks])
    found = before.clone()
    found[:, :, slots] = after[:, :, slots]
    return found


# Progress


def test_the_caller_does_not_wait(gate: Gate) -> None:
    transfer, dst, _, after = start()
    assert not transfer.done()
    assert transfer.statistics.blocks == 0
    gate.open(2)
    until(lambda: transfer.statistics.slices == 3)
    assert not transfer.done()
    gate.open(3)
    transfer.synchronize()
    assert transfer.done()
    assert gate.threads == {next(iter(gate.threads))} != {threading.get_ident()}
    assert torch.equal(dst.rows(), after)
    assert transfer.statistics.slices == 5


def test_few_slices_are_under_way(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late()
    backend = registry.choose("cpu", "gated").backend
    monkeypatch.setattr(type(backend), "pending", late)
    transfer, *_ = start()
    gate.open(5)
    gate.wait_for(WINDOW)
    time.sleep(0.05)
    assert len(gate.started) == WINDOW
    assert transfer.statistics.blocks == 0
    late.end.set()
    transfer.synchronize()
    assert len(gate.started) == 5


def test_a_layer_ends_before_the_next(gate: Gate) -> None:
    transfer, dst, _, after = start(by_layer=True)
    assert len(transfer.layers) == LAYERS
    gate.open(5 + WINDOW)  # of five slices for each layer
    transfer.layers[0].synchronize()
    assert transfer.layers[0].done()
    assert torch.equal(dst.rows()[0], after[0])
    assert not transfer.layers[1].done()
    assert not transfer.done()
    gate.open(1000)
    transfer.layers[2].wait()
    transfer.synchronize()
    assert torch.equal(dst.rows(), after)


# Cancellation


def test_cancelling(gate: Gate) -> None:
    transfer, dst, before, after = start()
    gate.open(2)
    gate.wait_for(2)
    until(lambda: transfer.statistics.slices == 3)
    assert transfer.cancel()
    assert transfer.cancelled
    assert transfer.statistics.cancelled
    gate.open(1000)
    for ask in (transfer.synchronize, transfer.done, transfer.wait):
        with pytest.raises(TransferCancelled) as caught:
            ask()
        check_sentence(str(caught.value), "3 of 5 slices", "cancelled")
    assert transfer.cancel()  # it stays so
    assert len(gate.started) == 3
    assert torch.equal(dst.rows(), moved(dst, before, after, 3))
    found = transfer.statistics
    assert (found.blocks, found.blocks_asked, found.slices) == (3, 5, 3)
    assert found.nbytes == 3 * dst.rows()[:, :, : dst.size].numel() * 2
    assert issubclass(TransferCancelled, TransferError)


def test_layers_that_landed_before_it_was_cancelled(gate: Gate) -> None:
    transfer, dst, _, after = start(by_layer=True)
    gate.open(6)
    gate.wait_for(6)
    until(lambda: transfer.statistics.slices == 7)
    assert transfer.cancel()
    gate.open(1000)
    transfer.layers[0].synchronize()
    assert torch.equal(dst.rows()[0], after[0])
    for layer in (transfer.layers[1], transfer.layers[2], transfer):
        with pytest.raises(TransferCancelled):
            layer.synchronize()
    assert transfer.statistics.blocks == 0, "no block has landed in all layers"


def test_cancelling_too_late(gate: Gate) -> None:
    transfer, dst, _, after = start()
    gate.open(4)
    gate.wait_for(4)
    until(lambda: transfer.statistics.slices == 5)  # the last one is on its way
    assert not transfer.cancel()
    assert not transfer.cancelled
    gate.open()
    transfer.synchronize()
    assert not transfer.cancel()
    assert torch.equal(dst.rows(), after)


def test_cancelling_from_many_threads(gate: Gate) -> None:
    transfer, *_ = start()
    gate.open(1)
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(transfer.cancel())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    gate.open(1000)
    with pytest.raises(TransferCancelled):
        transfer.synchronize()
    assert len(gate.started) <= 2


def test_whoever_waits_learns_of_it(gate: Gate) -> None:
    transfer, *_ = start()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            transfer.synchronize()
        except TransferCancelled as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    transfer.cancel()
    gate.open(1000)
    thread.join(PATIENCE)
    assert len(caught) == 1


# Failures


def test_a_slice_that_fails_at_its_launch(gate: Gate) -> None:
    gate.failing[2] = OSError("the link is down")
    transfer, *_ = start()
    gate.open(1000)
    with pytest.raises(TransferError) as caught:
        transfer.synchronize()
    assert type(caught.value) is TransferError
    assert isinstance(caught.value.__cause__, OSError)
    check_sentence(str(caught.value), "2 of 5 slices", "OSError", "the link is down")
    with pytest.raises(TransferError):
        transfer.done()
    with pytest.raises(TransferError):
        transfer.wait()
    assert not transfer.cancel()
    assert not transfer.cancelled
    assert len(gate.started) == 3, "nothing is issued behind an error"
    assert transfer.statistics.blocks == 2


def test_an_error_of_the_library_stays_what_it_is(gate: Gate) -> None:
    error = SlotError("A slot was bad in the middle of it, which nobody expects; correct it.")
    gate.failing[0] = error
    transfer, *_ = start(by_layer=True)
    gate.open(1000)
    for ask in (transfer, *transfer.layers):
        with pytest.raises(SlotError) as caught:
            ask.synchronize()
        assert caught.value is error
    assert transfer.statistics.nbytes == 0


def test_a_slice_that_fails_when_it_lands(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(RuntimeError("a sticky error"))
    backend = registry.choose("cpu", "gated").backend
    monkeypatch.setattr(type(backend), "pending", late)
    transfer, *_ = start()
    gate.open(1000)
    late.end.set()
    with pytest.raises(TransferError, match="0 of 5 slices had landed, with RuntimeError: a stick"):
        transfer.synchronize()
    found = transfer.statistics
    assert found.slices >= WINDOW, "others were under way, and landed"
    assert found.blocks == 0, "blocks count up to the first that did not land"


def test_a_thread_that_cannot_start(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        start()
    assert not worker._running


# Threads and processes


def test_several_at_once(gate: Gate) -> None:
    started = [start(by_layer=bool(i % 2)) for i in range(4)]
    gate.open(1000)
    for transfer, dst, _, after in reversed(started):
        transfer.synchronize()
        assert torch.equal(dst.rows(), after)
    assert len(gate.threads) > 1


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_it_running(gate: Gate) -> None:
    transfer, dst, _, after = start()

    def interrupt() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        transfer.synchronize()
    thread.join()
    assert not transfer.done()
    gate.open(1000)
    transfer.synchronize()
    assert torch.equal(dst.rows(), after)
    assert transfer.statistics.blocks == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_is_not_left_waiting(gate: Gate) -> None:
    transfer, dst, _, after = start(by_layer=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            assert not transfer.cancel()
            for ask in (
                transfer.done,
                transfer.synchronize,
                transfer.wait,
                transfer.layers[1].synchronize,
            ):
                with pytest.raises(TransferError, match="forked"):
                    ask()
            assert transfer.statistics.blocks == 0
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open(1000)
    transfer.synchronize()
    assert torch.equal(dst.rows(), after)


PROGRAM = """
import atexit, sys, time
atexit.register(lambda: print(time.time()))  # behind the handlers of what is imported and begun
import torch
from portakv import KVView, copy_blocks

src, dst = (torch.zeros(64, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
views = [KVView(x, "block token dim") for x in (src, dst)]
ids = list(range(64))
transfer = copy_blocks(views[0], views[1], ids, ids, max_gbps=1e-4)  # more than a minute
while not transfer.statistics.slices:
    time.sleep(0.001)
print(time.time())
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(3)", 3), ("del transfer", 0), ("raise SystemError('no')", 1)],
)
def test_the_end_of_the_interpreter(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).format(end=end)],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("SystemError" in done.stderr) is (code == 1)
    assert "thread" not in done.stderr
    # It is stopped, not waited for in vain.
    began, ended = map(float, done.stdout.split())
    assert ended - began < worker.EXIT_SECONDS * 0.9
