# SPDX-License-Identifier: Apache-2.0
"""Warnings of what is open in a process: stores, owners and servers, each wherever it lives."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ready, store_server_host
from support.migrate_pulls import Couple, sides
from support.slot_cases import Faulty
from support.storage_cases import key_of, small_form
from support.waits import LIMIT, until

from portakv import tasks
from portakv.graph import alarms
from portakv.graph.alarms import Watch, watch
from portakv.runtime import resources
from portakv.serving import PageStore, StoreTerms
from portakv.storage import BlockStore, Disk
from portakv.storage.tiers.folder import file_system_of
from portakv.view.view import KVView

LOGGER = "portakv.graph.alarms"
ILL: dict[str, list[dict[str, Any]]] = {"queue_slow": [{"queue": "disk:/nvme/kv", "value": 1}]}


class Source:
    """An object with figures, which counts the looks at it."""

    def __init__(self, figures: dict[str, list[dict[str, Any]]]) -> None:
        self.looks = 0
        self._figures = figures

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        self.looks += 1
        return self._figures


class Broken:
    """An object whose figures cannot be read."""

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        raise KeyError("a counter of another package")


class Process:
    """The watch of a process that has just begun, and what it logs."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.time = 0.0
        self.watch = Watch(lambda: self.time)
        self._caplog = caplog

    def forget(self) -> None:
        """Watch nothing that is open, for the control of a test."""
        self.watch.watched.clear()

    def warnings(self) -> list[str]:
        """Return what the next look logs."""
        self.time += alarms.LOOK
        self._caplog.clear()
        self.watch.look()
        return self.logged()

    def all_logged(self) -> list[str]:
        """Return what any module has logged."""
        return [each.getMessage() for each in self._caplog.records]

    def logged(self) -> list[str]:
        return [each.getMessage() for each in self._caplog.records if each.name == LOGGER]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Process]:
    caplog.set_level(logging.WARNING, LOGGER)
    made = Process(caplog)
    monkeypatch.setattr(alarms, "here", made.watch)
    yield made
    made.watch.watched.clear()


def fail_on_device(request: Any) -> int | None:
    return -errno.EIO if request.write else None


CONTROL = pytest.mark.parametrize("watched", [True, False], ids=["watched", "control"])


@CONTROL
def test_a_dying_disk_of_a_plain_store(process: Process, watched: bool, tmp_path: Path) -> None:
    form = small_form()
    io = Faulty()
    disk = Disk(tmp_path / "kv", capacity=8 * form.image_bytes, io=io)
    rows = torch.zeros(4, 8, 2, 4, 2, 32, dtype=torch.float16, device="cpu")
    view = KVView([*rows], "layer | block kv token head dim")
    with BlockStore(form, tiers=[disk], staging=8 * form.image_bytes) as store:
        assert process.warnings() == []
        if not watched:
            process.forget()
        io.fail = fail_on_device
        store.save(view, [0], [key_of(1)])
        assert until(lambda: broken_slots(store) == 1)
        texts = process.warnings()
    assert len(texts) == watched
    assert all("smartctl" in text and str(tmp_path / "kv") in text for text in texts)


@CONTROL
@pytest.mark.parametrize("by", ["a store", "a store server", "a store of pages"])
@pytest.mark.parametrize("fault", ["full", "lost"])
def test_a_folder_that_is_full_or_lost(
    process: Process,
    monkeypatch: pytest.MonkeyPatch,
    watched: bool,
    by: str,
    fault: str,
    tmp_path: Path,
) -> None:
    """A full one is noticed by a save; a lost one by a look alone, also where nothing is saved."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    folder = tmp_path / "kv"
    terms: dict[str, Any] = {"folder": str(folder), "capacity": 1 << 20, "staging": 1 << 20}
    with ExitStack() as opened:
        if by == "a store":
            form = small_form()
            disk = Disk(folder, capacity=8 * form.image_bytes)
            store = BlockStore(form, tiers=[disk], staging=8 * form.image_bytes)
            opened.enter_context(store)
            rows = torch.zeros(4, 8, 2, 4, 2, 32, dtype=torch.float16, device="cpu")
            view = KVView([*rows], "layer | block kv token head dim")
            save: Callable[[], object] = partial(store.save, view, [0], [key_of(1)])
        elif by == "a store server":
            view = store_server_host.caches()
            host = opened.enter_context(store_server_host.hosts())(view, **terms)
            blocks = host.join(view).blocks[0]
            save = partial(blocks.save, view, [0], store_server_host.KEYS[:1])
        else:
            store_of_pages = PageStore(StoreTerms(host=0, **terms), "m", [8192])
            pages = opened.enter_context(store_of_pages).pages(8192)
            memory = np.zeros((1, 8192), np.uint8)  # a view retains nothing
            save = partial(pages.save, [bytes(32)], pages.over(memory))
        assert process.warnings() == []
        if not watched:
            process.forget()
        if fault == "full":
            monkeypatch.setattr(resources, "fallocate", refuse)
            save()
            where = file_system_of(folder)
            assert until(lambda: any(where in text for text in process.all_logged()))
        else:
            shutil.rmtree(folder)
        texts = process.warnings()
    expected = "have no space" if fault == "full" else "were removed"
    assert len(texts) == watched
    assert all(expected in text and str(folder) in text for text in texts)


def broken_slots(store: BlockStore) -> float:
    samples = store.statistics()["disk_slots"]
    return sum(float(each["value"]) for each in samples if each["state"] == "broken")


@CONTROL
@pytest.mark.parametrize("end", ["expired", "taken"])
def test_leases_in_a_process_with_an_owner_alone(process: Process, watched: bool, end: str) -> None:
    with sides() as made:
        both = Couple(made)
        if not watched:
            process.forget()
        now = both.owner.now()
        both.owner.now = lambda: now
        if end == "taken":
            taken = both.offer()
            both.pull(taken).synchronize(LIMIT)
            assert until(lambda: taken.state == "taken")
        offer = both.offer(lease=1.0)
        now += 2.0
        texts = process.warnings()
        assert both.owner.statistics()["expired"] == 1
        assert offer.state == "expired"
        expected = int(watched and end == "expired")
        assert ["tickets reach readers" in text for text in texts] == [True] * expected


def test_the_looks_log_and_end_with_their_sources(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "LOOK", 0.01)
    source = Source(ILL)
    watch(source)
    assert until(lambda: process.logged() != [])
    assert process.watch.running
    del source
    gc.collect()
    assert until(lambda: not process.watch.running)
    assert len(process.logged()) == 1
    other = Source(ILL)
    watch(other)
    assert until(lambda: other.looks > 0)
    assert len(process.logged()) == 1  # the same link, within the minute


def test_figures_that_cannot_be_read_stop_no_other(process: Process) -> None:
    broken = Broken()
    ill = Source(ILL)
    watch(broken)
    watch(ill)
    texts = process.warnings()
    assert ["cannot be read" in text for text in texts] == [True, False]
    assert "iostat" in texts[1]


def test_nothing_is_read_for_warnings_that_are_not_logged(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(ILL)
    watch(source)
    caplog.set_level(logging.ERROR, LOGGER)
    assert process.warnings() == []
    assert source.looks == 0
    caplog.set_level(logging.WARNING, LOGGER)
    assert len(process.warnings()) == 1


def test_a_forked_process_watches_what_it_opens(process: Process) -> None:
    parents = Source(ILL)
    watch(parents)
    parent = tasks.runtime()
    child = os.fork()
    if child == 0:
        own = Source(ILL)
        watch(own)
        there = alarms.here
        right = there is not process.watch and len(there.watched) == 1
        os._exit(0 if right and there.running and tasks.runtime() is not parent else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert alarms.here is process.watch


@pytest.mark.full
def test_the_interpreter_ends_next_to_a_look() -> None:
    script = """
import sys, threading
from portakv.graph import alarms
from portakv.storage.work import Graph
alarms.LOOK = 1e-4
class Slow:
    def figures(self):
        began.set()
        return {}
began = threading.Event()
sources = [Slow() for _ in range(100)]
graph = Graph()
for each in [*sources, graph]:
    alarms.watch(each)
assert began.wait(60)
"""
    done = ready.run("-c", script, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
