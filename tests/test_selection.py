# SPDX-License-Identifier: Apache-2.0
"""Candidates are found by name, of this package and of others, and one trace says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.waits import LIMIT

from portakv.errors import BackendUnavailable, InvalidTerms, StoreError
from portakv.migrate.transports.base import Transport
from portakv.migrate.transports.distributed import Distributed
from portakv.selection import Catalog, Decision, Kind, select
from portakv.storage.io.base import Engine
from portakv.storage.io.choose import Threads

KIND = Kind("pump", "PORTAKV_PUMP", "pump", error=StoreError, unknown=InvalidTerms)
MODULE = """
from portakv.migrate.transports.distributed import Distributed
from portakv.storage.tiers.disk import Disk
from portakv.storage.io.choose import Threads

class Acme(Threads):
    name = "acme"

class Pigeon(Distributed):
    name = "pigeon"

def cold(folder):
    return Disk(folder, capacity=1 << 23)
"""
ENTRIES = """
[portakv.io_engines]
acme = acme_pumps:Acme
threads = acme_pumps:Acme
[portakv.transports]
pigeon = acme_pumps:Pigeon
[portakv.tiers]
cold = acme_pumps:cold
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with an engine, a transport and a tier."""
    (tmp_path / "acme_pumps.py").write_text(MODULE)
    folder = tmp_path / "acme-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))


def engines(paths: bool = True) -> Catalog[Engine]:
    built_in = {"threads": "portakv.storage.io.choose:Threads"}
    return Catalog(KIND, None, built_in, "portakv.io_engines", paths=paths)


@pytest.mark.usefixtures("acme")
def test_another_package_brings_a_candidate_and_replaces_none() -> None:
    catalog = engines()
    assert catalog.names() == ["threads", "acme"]
    assert catalog.load("acme").name == "acme"
    assert catalog.load("threads") is Threads
    (refused,) = catalog.refused()
    assert str(refused) == (
        "threads: rejected, the entry point 'acme_pumps:Acme' would replace a pump of that name; "
        "refused"
    )


@pytest.mark.usefixtures("acme")
def test_tiers_and_transports_of_another_package(tmp_path: Path) -> None:
    transports = Catalog[Transport](KIND, Transport, {}, "portakv.transports")
    assert issubclass(transports.load("pigeon"), Distributed)
    tiers = Catalog[Any](KIND, None, {}, "portakv.tiers")
    make: Any = tiers.load("cold")
    assert make(tmp_path).folders == [tmp_path]


def test_without_the_package_its_names_are_unknown() -> None:
    catalog = engines()
    assert catalog.names() == ["threads"]
    with pytest.raises(InvalidTerms, match=r"^Expected pump to be 'threads' or .*got 'acme'"):
        catalog.load("acme")
    with pytest.raises(InvalidTerms, match=r"got 'thread'\. Did you mean 'threads'"):
        catalog.check("io", "thread")


def test_a_path_is_a_name_except_from_another_process() -> None:
    path = "portakv.storage.io.choose:Threads"
    assert engines().load(path) is Threads
    with pytest.raises(InvalidTerms, match="Expected pump to be 'threads', got 'portakv"):
        engines(paths=False).load(path)


@pytest.mark.parametrize("target", ["portakv.storage.io.choose:verifies", "json:dumps"])
def test_a_candidate_is_of_the_class_of_its_kind(target: str) -> None:
    catalog = Catalog[Threads](KIND, Threads, {}, "portakv.nothing")
    with pytest.raises(BackendUnavailable, match=r"a subclass of portakv.*\.Threads"):
        catalog.load(target)


def consider(name: str) -> tuple[str | None, Decision]:
    works = name in ("two", "three")
    return (name if works else None), Decision(name, works, f"{name} decides so")


def test_the_first_that_accepts_is_taken_with_every_decision() -> None:
    selected = select(KIND, "a well", ("one", "two", "three"), consider)
    assert (selected.value, selected.name) == ("two", "two")
    assert selected.why == "one: rejected, one decides so; two: accepted, two decides so"
    assert select(KIND, "a well", ("one", "two", "three"), consider, "three").name == "three"


def test_none_that_accepts_is_an_error_with_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="a pump to serve a well, but none can:") as caught:
        select(KIND, "a well", ("one", "four"), consider)
    assert [str(each) for each in caught.value.trace] == [
        "one: rejected, one decides so",
        "four: rejected, four decides so",
    ]
    forced = "Expected pump 'one', which is forced, to serve a well, but it cannot: one decides so."
    with pytest.raises(StoreError, match=f"^{forced}\nPass pump=None to let PortaKV choose"):
        select(KIND, "a well", ("one", "two"), consider, "one")
    monkeypatch.setenv("PORTAKV_PUMP", "one")
    assert KIND.forced("two") == "one"
    with pytest.raises(StoreError, match="Unset PORTAKV_PUMP to let PortaKV choose"):
        select(KIND, "a well", ("one", "two"), consider, KIND.forced())


class _Read(Mapping[str, Any]):
    """Built-in candidates; the first thread that reads them waits until the test lets it go on."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self._first = threading.Lock()

    def __getitem__(self, name: str) -> str:
        return {"threads": "portakv.storage.io.choose:Threads"}[name]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        if self._first.acquire(blocking=False):
            self.began.set()
            assert self.go_on.wait(LIMIT)
        return iter(["threads"])


def test_a_candidate_that_another_thread_registers_meanwhile_stays() -> None:
    """Two threads may be the first to use a catalog; no candidate is lost."""
    built_in = _Read()
    catalog = Catalog[Engine](KIND, None, built_in, "portakv.io_engines")
    reader = threading.Thread(target=catalog.names)
    reader.start()
    assert built_in.began.wait(LIMIT)
    writer = threading.Thread(target=catalog.register, args=("mine", Threads))
    writer.start()
    writer.join(0.2)  # without a lock it registers now, and else after the reader
    built_in.go_on.set()
    for thread in (reader, writer):
        thread.join(LIMIT)
    assert catalog.load("mine") is Threads
    assert catalog.names() == ["threads", "mine"]
