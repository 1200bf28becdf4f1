# SPDX-License-Identifier: Apache-2.0
"""Block transfers in slices: when slices start, how they end, and what stops them."""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ready
from support.block_cases import (
    DST,
    LAYERS,
    PATIENCE,
    SRC,
    Pair,
    copies_in_slices,
    layered,
    until,
)
from support.guarded_memory import check_sentence
from support.small_backends import small_backend
from support.threads import interrupting, run_threads
from support.waits import LIMIT

from portakv import BlockTransfer, Index, KVView, LateErrors, copy_blocks, register_backend
from portakv.copy import submit as block_slices
from portakv.copy.slices import WINDOW
from portakv.errors import SlotError, TransferCancelled, TransferError
from portakv.registry import registry
from portakv.runtime.interrupts import hand_over


class Gate:
    """Lets slices start, one for each `open`; those that are late land when the test says so."""

    def __init__(self) -> None:
        self.armed = False
        self.started = 0
        self.threads: set[int] = set()
        self.failing: dict[int, BaseException] = {}
        self._permits = threading.Semaphore(0)

    def open(self, slices: int = 1000) -> None:
        self._permits.release(slices)

    def pass_through(self, dst: Any) -> None:
        """Wait at the gate after each slice."""
        if not self.armed:
            return
        assert self._permits.acquire(timeout=PATIENCE)
        self.threads.add(threading.get_ident())
        self.started += 1
        if self.started - 1 in self.failing:
            raise self.failing[self.started - 1]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Register a backend ``gated`` that waits at the gate after every slice of one block."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.setattr(block_slices, "SLICE", 1)
    gate = Gate()
    register_backend("gated", small_backend("gated", spoil=gate.pass_through))
    registry.choose("cpu", "gated")
    gate.armed = True
    yield gate
    gate.open()
    until(lambda: not copies_in_slices())


class Started(Pair):
    """A transfer of five blocks through the gate."""

    def __init__(self, **options: Any) -> None:
        super().__init__(layered(), layered())
        self.before = self.dst.rows()
        self.transfer = self.start(backend="gated", **{"cancellable": True, **options})

    def until_slice(self, nth: int) -> None:
        """Wait until so many slices were issued."""
        until(lambda: self.transfer.statistics.slices == nth)

    def landed(self, blocks: int = 5) -> bool:
        """Only the first so many blocks were moved."""
        slots = self.dst.slots(DST[:blocks])
        self.before[:, :, slots] = self.expected[:, :, slots]
        return torch.equal(self.dst.rows(), self.before)


# Progress


def test_the_caller_does_not_wait(gate: Gate) -> None:
    one = Started()
    assert not one.transfer.done()
    assert one.transfer.statistics.blocks == 0
    gate.open(2)
    one.until_slice(3)
    assert not one.transfer.done()
    gate.open()
    one.transfer.synchronize()
    assert one.transfer.done()
    assert len(gate.threads) == 1
    assert threading.get_ident() not in gate.threads
    assert one.landed()
    assert one.transfer.statistics.slices == 5


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
@pytest.mark.parametrize("form", ["int64", "int32", "array"])
def test_the_caller_may_change_its_ids_after_the_call(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, form: str, guarded: bool
) -> None:
    """Without copies of the ids, later slices read what the caller has written since."""
    if not guarded:
        monkeypatch.setattr(Index, "apart", lambda index: index)
    dtype = torch.int32 if form == "int32" else torch.int64
    src, dst = (torch.tensor(ids, dtype=dtype) for ids in (SRC, DST))
    one = Pair(layered(), layered())
    ids = (src.numpy(), dst.numpy()) if form == "array" else (src, dst)
    transfer = one.start(*ids, backend="gated", cancellable=True)
    src.copy_(src.flip(0))
    gate.open()
    transfer.synchronize()
    assert one.landed() == guarded


@pytest.mark.parametrize("terms", [{}, {"by_layer": True}, {"cancellable": True}], ids=str)
def test_statistics_are_of_the_ids_of_the_call(terms: dict[str, Any], gate: Gate) -> None:
    src, dst = (torch.tensor(ids) for ids in (SRC, DST))
    one = Pair(layered(), layered())
    if not terms.get("cancellable"):
        gate.open()
    transfer = one.start(src, dst, backend="gated", **terms)
    src.fill_(-1)
    gate.open()
    transfer.synchronize()
    statistics = transfer.statistics
    assert statistics.blocks == statistics.blocks_requested == len(SRC)


def test_a_layer_ends_before_the_next(gate: Gate) -> None:
    one = Started(by_layer=True)
    layers = one.transfer.layers
    assert len(layers) == LAYERS
    gate.open(5 + WINDOW)  # of five slices for each layer
    layers[0].synchronize()
    assert layers[0].done()
    assert torch.equal(one.dst.rows()[0], one.expected[0])
    assert not layers[1].done()
    assert not one.transfer.done()
    gate.open()
    layers[2].wait()
    one.transfer.synchronize()
    assert one.landed()


def test_a_transfer_keeps_its_rate() -> None:
    """Only the last slice may exceed the requested rate; a busy machine may be slower."""
    src, dst = (torch.zeros(16, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
    src += torch.arange(16, dtype=torch.uint8)[:, None, None]
    views = [KVView(tensor, "block token dim") for tensor in (src, dst)]
    transfer = copy_blocks(views[0], views[1], range(16), range(16), max_gbps=0.02)
    transfer.synchronize()
    statistics = transfer.statistics
    assert statistics.slices == 16
    assert statistics.seconds is not None
    assert statistics.seconds >= 15 / 16 * src.numel() / 0.02e9
    assert torch.equal(src, dst)


def test_a_pause_of_a_rate_holds_no_thread() -> None:
    src = layered()
    dst = layered()
    before = {*threading.enumerate()}
    copies = list[BlockTransfer]()
    for _ in range(16):
        copies.append(copy_blocks(src.view, dst.view, SRC, DST, max_gbps=1e-9))
        until(lambda: copies[-1].statistics.blocks == 1)
    assert len({*threading.enumerate()} - before) < 5  # the loop, and helpers that took turns
    assert all(each.cancel() for each in copies)
    for each in copies:
        with pytest.raises(TransferCancelled):
            each.synchronize(timeout=PATIENCE)


# Cancellation


def test_a_cancel_ends_the_pause_of_a_rate() -> None:
    src = layered()
    dst = layered()
    transfer = copy_blocks(src.view, dst.view, SRC, DST, max_gbps=1e-9)  # minutes for each slice
    until(lambda: transfer.statistics.blocks == 1)
    assert transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.synchronize(timeout=PATIENCE)


def test_cancelling(gate: Gate) -> None:
    one = Started()
    transfer = one.transfer
    gate.open(2)
    one.until_slice(3)
    assert transfer.cancel()
    assert transfer.cancelled
    assert transfer.statistics.cancelled
    gate.open()
    for ask in (transfer.synchronize, transfer.done, transfer.wait):
        with pytest.raises(TransferCancelled) as caught:
            ask()
        check_sentence(str(caught.value), "3 of 5 slices", "cancelled")
    assert transfer.cancel()  # it stays so
    assert gate.started == 3
    assert one.landed(3)
    statistics = transfer.statistics
    assert (statistics.blocks, statistics.blocks_requested, statistics.slices) == (3, 5, 3)
    assert statistics.nbytes == 3 * one.expected[:, :, : one.dst.size].numel() * 2
    assert issubclass(TransferCancelled, TransferError)


def test_layers_that_landed_before_it_was_cancelled(gate: Gate) -> None:
    one = Started(by_layer=True)
    layers = one.transfer.layers
    gate.open(6)
    one.until_slice(7)
    assert one.transfer.cancel()
    gate.open()
    layers[0].synchronize()
    assert torch.equal(one.dst.rows()[0], one.expected[0])
    for layer in (layers[1], layers[2], one.transfer):
        with pytest.raises(TransferCancelled):
            layer.synchronize()
    assert one.transfer.statistics.blocks == 0, "no block has landed in all layers"


def test_cancelling_too_late(gate: Gate) -> None:
    one = Started()
    gate.open(4)
    one.until_slice(5)  # the last one is on its way
    assert not one.transfer.cancel()
    assert not one.transfer.cancelled
    gate.open(1)
    one.transfer.synchronize()
    assert not one.transfer.cancel()
    assert one.landed()


def test_cancelling_from_many_threads_while_others_wait(gate: Gate) -> None:
    transfer = Started().transfer
    answers = list[bool]()

    def work(nth: int) -> None:
        if nth == 0:
            with pytest.raises(TransferCancelled):
                transfer.synchronize(timeout=PATIENCE)
        elif nth < 9:
            answers.append(transfer.cancel())
        else:
            until(lambda: len(answers) == 8)
            gate.open()

    gate.open(1)
    run_threads(work, range(10))
    assert answers == [True] * 8
    assert gate.started <= 2


# Failures


def test_a_slice_that_fails_at_its_launch(gate: Gate) -> None:
    gate.failing[2] = OSError("the link is down")
    transfer = Started().transfer
    gate.open()
    with pytest.raises(TransferError) as caught:
        transfer.synchronize()
    assert type(caught.value) is TransferError
    assert isinstance(caught.value.__cause__, OSError)
    check_sentence(str(caught.value), "2 of 5 slices", "OSError", "the link is down")
    for ask in (transfer.done, transfer.wait):
        with pytest.raises(TransferError):
            ask()
    assert not transfer.cancel()
    assert not transfer.cancelled
    assert gate.started == 3, "nothing is issued after an error"
    assert transfer.statistics.blocks == 2


@pytest.mark.parametrize("ended", [False, True], ids=["goes on", "ended with the call"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_failure_whose_handle_was_dropped(gate: Gate, ended: bool, by_layer: bool) -> None:
    class Late(LateErrors):
        def keep(self, transfer: Any) -> None:
            if ended:
                gate.open()
                until(lambda: not copies_in_slices())
            super().keep(transfer)

    late = Late()
    gate.failing[2] = OSError("the link is down")
    del Started(by_layer=by_layer, late=late).transfer
    gate.open()
    until(lambda: not copies_in_slices())
    LateErrors().check()
    with pytest.raises(TransferError, match="2 of "):
        late.check()
    late.check()


def test_a_transfer_that_was_cancelled_is_no_late_error(gate: Gate) -> None:
    late = LateErrors()
    assert Started(late=late).transfer.cancel()
    gate.open()
    until(lambda: not copies_in_slices())
    late.check()


def test_an_error_of_the_library_stays_what_it_is(gate: Gate) -> None:
    error = SlotError("A slot was bad in the middle of it, which no one expects; correct it.")
    gate.failing[0] = error
    transfer = Started(by_layer=True).transfer
    gate.open()
    for ask in (transfer, *transfer.layers):
        with pytest.raises(SlotError) as caught:
            ask.synchronize()
        assert caught.value is error
    assert transfer.statistics.nbytes == 0


def test_few_are_in_flight_and_none_is_issued_behind_one_that_fails_when_it_lands(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_to_the_end = threading.Event()
    errors = [RuntimeError("a sticky error")]

    def wait() -> None:
        assert launch_to_the_end.wait(PATIENCE)
        if errors:
            raise errors.pop()

    late = SimpleNamespace(done=launch_to_the_end.is_set, wait=wait)
    monkeypatch.setattr(type(registry.choose("cpu", "gated").backend), "pending", late)
    one = Started()
    gate.open()
    one.until_slice(WINDOW)
    launch_to_the_end.set()
    with pytest.raises(TransferError, match="0 of 5 slices had landed, with RuntimeError: a stick"):
        one.transfer.synchronize()
    statistics = one.transfer.statistics
    assert statistics.slices == WINDOW
    assert statistics.blocks == 0, "blocks count up to the first that did not land"


def test_a_slice_that_fails_when_it_lands_ends_the_pause_of_a_rate(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next slice would start in minutes, and never does."""

    def wait() -> None:
        raise RuntimeError("a sticky error")

    late = SimpleNamespace(done=lambda: False, wait=wait)
    monkeypatch.setattr(type(registry.choose("cpu", "gated").backend), "pending", late)
    one = Started(max_gbps=1e-9)
    gate.open()
    with pytest.raises(TransferError, match="0 of 5 slices had landed, with RuntimeError: a stick"):
        one.transfer.synchronize(timeout=PATIENCE)
    assert one.transfer.statistics.slices == 1


def test_a_thread_that_cannot_start(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = threading.Event()
    while hand_over(done.wait):  # to each helper that there is
        pass
    with pytest.raises(TransferError, match="no thread can be started"):
        Started()
    done.set()
    assert gate.started == 0


# Signals and processes


def test_an_interrupt_leaves_it_running(gate: Gate) -> None:
    one = Started()
    with interrupting(type(one.transfer).synchronize), pytest.raises(KeyboardInterrupt):
        one.transfer.synchronize()
    assert not one.transfer.done()
    gate.open()
    one.transfer.synchronize()
    assert one.landed()
    assert one.transfer.statistics.blocks == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_the_process_is_told_that_the_parent_goes_on(gate: Gate) -> None:
    one = Started()
    one.until_slice(1)
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            for ask in (one.transfer.done, one.transfer.synchronize, one.transfer.wait):
                with pytest.raises(TransferError, match="goes on in the parent"):
                    ask()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    one.transfer.synchronize()
    assert one.landed()


PROGRAM = """
import sys, time
from importlib import import_module
import torch
from portakv import Index, KVView, copy_blocks

import_module("portakv.tasks.runtime").EXIT = 86400.0  # the copy is stopped, not waited for
src, dst = (torch.zeros(64, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
views = [KVView(x, "block token dim") for x in (src, dst)]
ids = list(range(64))
transfer = copy_blocks(views[0], views[1], ids, ids, max_gbps=1e-9)  # it would take days
while not transfer.statistics.slices:
    time.sleep(0.001)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        pytest.param("del transfer; sys.exit(3)", 3, marks=pytest.mark.full),
        pytest.param("raise SystemError('no')", 1, marks=pytest.mark.full),
    ],
)
def test_the_end_of_the_interpreter(end: str, code: int) -> None:
    program = textwrap.dedent(PROGRAM).format(end=end)
    done = ready.run("-c", program, cwd=Path(__file__).parent, timeout=LIMIT)
    assert done.returncode == code, done.stderr
    assert ("SystemError" in done.stderr) is (code == 1)
    assert "thread" not in done.stderr
