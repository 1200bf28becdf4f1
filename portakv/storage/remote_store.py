# SPDX-License-Identifier: Apache-2.0
"""`RemoteStore` reads and writes the blocks of one form in an object store.

It verifies blocks, finds out which side changed wrong bytes, and leaves requests at a deadline.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from portakv.errors import StoreError
from portakv.graph.graph import Graph, Queue
from portakv.graph.task import Task
from portakv.runtime import resources
from portakv.runtime.bounded import Bounded
from portakv.storage import compressed, reasons
from portakv.storage.form import BlockForm
from portakv.storage.image import HEADER, Row, header, verify
from portakv.storage.reasons import Reason, Report

Keys = Sequence[bytes]
Stop = Callable[[], bool]
Result = TypeVar("Result")
FORM = b"form.json"  # lies next to the blocks; it is not a key
#: Bytes of a piece of a body that is copied as it comes.
PIECE = 4 << 20
#: Seconds between two looks at the deadline while an answer or a body is awaited.
POLL = 0.1
#: Descriptors of an event loop.
_DESCRIPTORS = 3
#: Seconds for which a block is believed to be there, and not to be there.
THERE = 60.0
MISSING = 5.0
#: Seconds for which a block that came wrong twice counts as missing, unless it is saved again.
FAULTY = 60.0
#: Which side changed the bytes of a block.
OBJECT = "the object is damaged"
PATH = "the bytes changed on the way here, and the object is left as it is"
UNKNOWN = "the store has no MD5 that says whether the object is damaged or the path to it"
UNREADABLE = "the object is compressed, and backports.zstd is not installed here"
UNDECIDED = "there was no time to find out whether the object is damaged or the path to it"
#: After these the next save writes the block again.
MENDED_BY_SAVES = (OBJECT, UNKNOWN)


class Failure(Exception):
    """A request that failed; ``reason`` says how, without secrets."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.where)
        self.reason = reason


class _Stopped(Exception):
    """A request was left because its caller does not wait any more."""


class _Fetched(NamedTuple):
    """The end of an object's fetch and the object's version.

    ``result`` is ``hit``, ``miss``, ``late``, ``fault``, or ``unreadable`` if the package that
    decompresses it is not installed. ``md5`` is that of a compressed object with a fault, if all
    of it came.
    """

    result: str
    e_tag: str | None = None
    version: str | None = None
    nbytes: int = 0
    md5: str | None = None

    def same_object(self, other: _Fetched | Fault) -> bool:
        """Return True if both are of one version of the object."""
        return (self.e_tag, self.version) == (other.e_tag, other.version)


@dataclass(frozen=True)
class Fault:
    """A version of an object whose bytes were wrong twice.

    It counts as missing until a time, and the next save may have to ``rewrite`` it.
    """

    e_tag: str | None
    version: str | None
    until: float
    rewrite: bool
    side: str


class RemoteStore:
    """The blocks of one form in an object store."""

    tier = "remote"
    generation = 0

    def __init__(self, remote: Any, graph: Graph, form: BlockForm, own: bool) -> None:
        self._remote = remote
        self._graph = graph
        self.where = remote.url
        self.form = form
        self.writable = own
        self.notes = [remote.last_error or "ready"]
        queue = graph.queue(f"remote:{remote.url}", remote.workers)
        # A second queue, so that a lookup does not wait for blocks.
        self._heads = graph.queue(f"remote:{remote.url} lookup", remote.workers)
        self.queue: Callable[[object], Queue] = lambda _: queue
        self.queue_for_write = self.queue
        # Until when a block, or the form, is believed to be there; negative: until when it is not.
        self.verdicts: Bounded[bytes, float] = Bounded("remote verdicts", 1 << 17)
        self._faults: Bounded[bytes, Fault] = Bounded("remote faults", 1 << 14)
        # True if ETags of objects in one part are their MD5; None until a fault needs the answer.
        self._tags_are_md5: bool | None = None

    def forget(self) -> None:
        """Believe nothing about any block."""
        self.verdicts.clear()
        self._faults.clear()

    def has(self, keys: Keys, timeout: float | None = None) -> list[bool]:
        """Return which blocks are stored; blocks without an answer after ``timeout`` seconds count
        as missing.

        One task requests each block that is not known.
        """
        graph = self._graph
        now = self._remote.now()
        until = graph.clock() + (3e9 if timeout is None else timeout)
        ask = self._there
        left = [key for key in keys if abs(self.verdicts.get(key, 0.0)) <= now]
        works = [lambda _, mask, key=key: mask & ask(key) for key in left if not self._fault(key)]
        tasks = [Task(work, 1, queue=self._heads, name="lookup") for work in works]
        graph.submit(tasks, priority="urgent")
        try:
            for task in tasks:
                task.wait(max(0.0, until - graph.clock()))
        finally:
            late = [task for task in tasks if not task.ended]
            if late:
                graph.run(lambda: [graph.cancel(task) for task in late])
        return self.known(keys)

    def known(self, keys: Keys) -> list[bool]:
        """Return which blocks are believed to be there."""
        now = self._remote.now()
        return [self.verdicts.get(key, 0.0) > now for key in keys]

    def wants(self, keys: Keys) -> list[bool]:
        """Return which blocks a save has to bring; the other blocks need no request."""
        faults = [self._fault(key) for key in keys]
        left_alone = [fault is not None and not fault.rewrite for fault in faults]
        known = self.known(keys)
        return [not (a or b) for a, b in zip(known, left_alone, strict=True)]

    def _fault(self, key: bytes) -> Fault | None:
        """Return the fault for which a block counts as missing now."""
        fault = self._faults.get(key)
        return fault if fault and self._remote.now() < fault.until else None

    def _there(self, key: bytes) -> bool:
        """Return whether a block is there; ask the store if that is not known."""
        until = self.verdicts.get(key, 0.0)
        now = self._remote.now()
        if self._fault(key):
            return False
        if abs(until) > now:
            return until > 0

        remote = self._remote
        meta = remote.ask(remote.obs.head, remote.store, self._path(key), miss=False)
        if meta is None:
            return False
        if meta and self._is_faulty_still(key, meta):
            return False
        self.verdicts[key] = now + THERE if meta else -now - MISSING
        return bool(meta)

    def _is_faulty_still(self, key: bytes, meta: Any) -> bool:
        """Return whether the object is the version that was damaged; note it for longer then."""
        fault = self._faults.pop(key, None)
        if not fault or not fault.e_tag or fault.side != OBJECT:
            return False
        if (meta["e_tag"], meta["version"]) != (fault.e_tag, fault.version):
            return False
        self._note_fault(key, fault.e_tag, fault.version, fault.side)
        return True

    def _note_fault(self, key: bytes, e_tag: str | None, version: str | None, side: str) -> None:
        rewrite = side in MENDED_BY_SAVES
        until = self._remote.now() + FAULTY
        self._faults[key] = Fault(e_tag, version, until, rewrite, side)
        self.verdicts.pop(key, None)

    def _believe_there(self, key: bytes) -> None:
        self._faults.pop(key, None)
        self.verdicts[key] = self._remote.now() + THERE

    def _path(self, key: bytes) -> str:
        return f"1/{self.form.name}/{key.hex()[:2]}/{key.hex()}"

    @property
    def _form_path(self) -> str:
        return f"1/{self.form.name}/{FORM.decode()}"

    # --- reading ---

    def read(
        self,
        keys: Keys,
        rows: Sequence[Row],
        segments: Sequence[int] | None = None,
        stop: Stop = bool,
        report: Report = reasons.ignore,
    ) -> list[bool]:
        """Read images, or headers and some segments, into rows; return which arrived whole and
        correct.

        A request in flight when ``stop()`` becomes True is left within `POLL` seconds.
        """
        landed: list[bool] = []
        try:
            begun = new_loop()
        except OSError as error:
            for key in keys:
                report(key, Reason(reasons.UNREACHABLE, f"{self._remote.url}: {error}"))
            return [False] * len(keys)
        with closing(begun) as loop:
            for key, row in zip(keys, rows, strict=True):
                fetch = partial(self._fetch_now, loop, key, stop=stop)
                try:
                    outcome = self._read_one(fetch, key, row, segments, report)
                except Failure as failure:
                    outcome = "error"
                    report(key, failure.reason)
                landed.append(outcome == "hit")
                nbytes = self._nbytes(segments) if outcome == "hit" else 0
                self._graph.count(self.tier, "load", outcome, 1, nbytes)
        return landed

    def _nbytes(self, segments: Sequence[int] | None) -> int:
        """Return the bytes of the payload that a read brings."""
        every = range(len(self.form.segments))
        return sum(self.form.segments[i].nbytes for i in (every if segments is None else segments))

    def _read_one(
        self,
        fetch: Callable[..., _Fetched],
        key: bytes,
        row: Row,
        segments: Sequence[int] | None,
        report: Report,
    ) -> str:
        """Fetch a block, once more if it came wrong, and return how that ended."""
        where = self._remote.url
        fetched = fetch(row, segments)
        known = self._fault(key)
        if fetched.result == "fault" and known and fetched.same_object(known):
            report(key, Reason(reasons.DAMAGED, f"{where}: {known.side}"))
            return "fault"

        if fetched.result == "unreadable":
            self._note_fault(key, fetched.e_tag, fetched.version, UNREADABLE)
            self._remote.log.warning("unreadable", "%s: %s", self._address(key), UNREADABLE)
            report(key, Reason(reasons.UNREADABLE, f"{where}: {UNREADABLE}"))
            return "error"

        if fetched.result == "fault":
            first = fetched
            self._graph.count(self.tier, "load", "refetched")
            text = "%s came wrong and is fetched again"
            self._remote.log.warning("refetched", text, self._address(key))
            fetched = fetch(row, segments)
            # Of an object that was written in between nothing is known.
            side = "the object changed while it was read"
            if fetched.result == "fault" and fetched.same_object(first):
                side = self._sick_side(fetch, row, segments, fetched)
                self._note_fault(key, fetched.e_tag, fetched.version, side)
                self._warn(key, side)
            if fetched.result == "fault":
                report(key, Reason(reasons.DAMAGED, f"{where}: {side}"))
        if fetched.result == "hit":
            self._believe_there(key)
            return "hit"

        # A lookup of a block that did not come asks again, however that ended.
        believed = self.verdicts.pop(key, 0.0) > 0
        if fetched.result == "miss":
            if believed:
                # The process that deleted the block may have deleted it.
                self.verdicts.pop(FORM, None)
            report(key, Reason(reasons.EVICTED if believed else reasons.MISSING, where))
        if fetched.result == "late":
            report(key, Reason(reasons.LATE, where))
        return fetched.result

    def _warn(self, key: bytes, side: str) -> None:
        """Log that a block counts as missing, because one side changed its bytes."""
        text = "%s came wrong twice: %s. It counts as missing for %g s%s"
        # A save does not mend what the way to the bucket does to bytes.
        saved = ", or until it is saved" if side in MENDED_BY_SAVES else ""
        self._remote.log.warning("faults", text, self._address(key), side, FAULTY, saved)

    def _address(self, key: bytes) -> str:
        return f"{self._remote.url}/{self._path(key)}"

    def _sick_side(
        self,
        fetch: Callable[..., _Fetched],
        row: Row,
        segments: Sequence[int] | None,
        fetched: _Fetched,
    ) -> str:
        """Return which side changed the bytes of an object.

        Compares the MD5 of the received bytes with the ETag, which is the MD5 of an object that was
        written in one part.
        """
        image_bytes = self.form.image_bytes
        if fetched.nbytes != image_bytes and not self._may_be_compressed(fetched.nbytes):
            return OBJECT
        e_tag = re.fullmatch('"?([0-9a-f]{32})"?', fetched.e_tag or "")
        if not e_tag:
            return UNKNOWN
        if segments is not None:  # an ETag is that of the whole object
            row = np.empty(image_bytes, np.uint8)
            try:
                whole = fetch(row, None)
            except Failure:
                return UNDECIDED
            if whole.result == "hit":
                return PATH
            if whole.result != "fault" or not whole.same_object(fetched):
                return UNDECIDED
            fetched = whole

        if (fetched.md5 or _md5(row[:image_bytes])) == e_tag[1]:
            return OBJECT
        return PATH if self._has_md5_tags() else UNKNOWN

    def _has_md5_tags(self) -> bool:
        """Return True if the form's ETag is its MD5.

        In a bucket that encrypts by keys of a key service, ETags look the same but are not.
        """
        if self._tags_are_md5 is None:
            remote = self._remote
            meta = remote.ask(remote.obs.head, remote.store, self._form_path, miss=False)
            if not meta:
                return False
            digest = _md5(self.form.json().encode())
            self._tags_are_md5 = (meta["e_tag"] or "").strip('"') == digest
        return self._tags_are_md5

    def _fetch_now(
        self,
        loop: asyncio.AbstractEventLoop,
        key: bytes,
        row: Row,
        segments: Sequence[int] | None,
        stop: Stop,
    ) -> _Fetched:
        """Fetch a block and wait for it. Raises `Failure`."""

        def run() -> _Fetched:
            return loop.run_until_complete(self._fetch(key, row, segments, stop))

        result: _Fetched = self._remote.attempt(run, miss=_Fetched("miss"))
        return result

    async def _fetch(
        self, key: bytes, row: Row, segments: Sequence[int] | None, stop: Stop
    ) -> _Fetched:
        """Fetch an object, or its header and some segments, into a row, and verify it."""
        try:
            return await self._fetch_until(key, row, segments, stop)
        except _Stopped:
            return _Fetched("late")
        except self._remote.obs.exceptions.BaseError as error:
            if re.search("status code: 416|Invalid range|range was invalid", str(error)):
                return _Fetched("fault")  # an object of no bytes
            raise

    async def _fetch_until(
        self, key: bytes, row: Row, segments: Sequence[int] | None, stop: Stop
    ) -> _Fetched:
        """Do what `_fetch` does. Raises `_Stopped`, and the errors of obstore."""
        spans = self._spans(segments)
        for span in spans:
            fetched, response = await self._request(key, span, segments is None, stop)
            if span == spans[0] and self._may_be_compressed(fetched.nbytes):
                if segments is None:
                    return await self._receive_compressed(key, row, fetched, response, stop)
                page = row[:HEADER]
                await _receive(response, page, span, stop)
                return await self._fetch_compressed(key, row, segments, fetched, stop)
            if fetched.nbytes != self.form.image_bytes:
                return fetched
            await _receive(response, row, span, stop)

        right = self._is_right(row, key, segments)
        return fetched._replace(result="hit" if right else "fault")

    async def _request(
        self, key: bytes, span: tuple[int, int], whole: bool, stop: Stop
    ) -> tuple[_Fetched, Any]:
        """Request a span of an object, or all of it; return its version, and the response."""
        if stop():
            raise _Stopped
        remote = self._remote
        options = {} if whole else {"range": span}
        work = remote.obs.get_async(remote.store, self._path(key), options=options)
        response = await _until_stopped(work, stop)
        meta = response.meta
        return _Fetched("fault", meta["e_tag"], meta["version"], meta["size"]), response

    # --- compressed objects ---

    def _may_be_compressed(self, nbytes: int) -> bool:
        """Return True if a compressed object can have this size, and an image cannot."""
        return HEADER < nbytes < self.form.image_bytes

    async def _receive_compressed(
        self, key: bytes, row: Row, fetched: _Fetched, response: Any, stop: Stop
    ) -> _Fetched:
        """Receive all of a compressed object, and write its image into a row."""
        data = np.empty(fetched.nbytes, np.uint8)
        await _receive(response, data, (0, fetched.nbytes), stop)
        terms = compressed.terms_of(data[:HEADER], self.form)
        right = terms is not None and terms.nbytes == fetched.nbytes
        if terms is not None and right:
            codec = _codec()
            if codec is None:
                return fetched._replace(result="unreadable")
            compressed.restore_header(data[:HEADER], row, self.form)
            for number in range(len(self.form.segments)):
                start, end = terms.span(number)
                part = data[start:end]
                right &= compressed.restore(part, row, self.form, terms, number, codec)
        if right and self._is_right(row, key, None):
            return fetched._replace(result="hit")
        return fetched._replace(result="fault", md5=_md5(data))

    async def _fetch_compressed(
        self, key: bytes, row: Row, segments: Sequence[int], fetched: _Fetched, stop: Stop
    ) -> _Fetched:
        """Fetch some segments of a compressed object whose first page is in a row."""
        terms = compressed.terms_of(row[:HEADER], self.form)
        if terms is None or terms.nbytes != fetched.nbytes:
            return fetched
        codec = _codec()
        if codec is None:
            return fetched._replace(result="unreadable")
        compressed.restore_header(row[:HEADER], row, self.form)
        for number in segments:
            span = terms.span(number)
            again, response = await self._request(key, span, False, stop)
            if not again.same_object(fetched) or again.nbytes != fetched.nbytes:
                return again
            data = np.empty(span[1] - span[0], np.uint8)
            await _receive(response, data, (0, len(data)), stop)
            if not compressed.restore(data, row, self.form, terms, number, codec):
                return fetched
        right = self._is_right(row, key, segments)
        return fetched._replace(result="hit" if right else "fault")

    def _spans(self, segments: Sequence[int] | None) -> list[tuple[int, int]]:
        """Return the parts of an image for a read: the whole image, or the header and segments."""
        if segments is None:
            return [(0, self.form.image_bytes)]
        spans = [(0, HEADER)]
        for number in segments:
            part = self.form.segments[number]
            start = HEADER + part.offset
            spans.append((start, start + part.nbytes))
        return spans

    def _is_right(self, row: Row, key: bytes, segments: Sequence[int] | None) -> bool:
        """Return True if a row has the header of a key, and segments with its checksums."""
        head = header(row, self.form)
        if isinstance(head, str) or head.key != key:
            return False
        return verify(row, self.form, head.checksums, head.generation, segments)

    # --- writing ---

    def write(
        self,
        _: Queue,
        keys: Keys,
        rows: Sequence[Row],
        *known: object,
        report: Report = reasons.ignore,
    ) -> list[bool]:
        """Put sealed images, and the form next to them; return which are there now."""
        remote = self._remote
        if not self.known([FORM])[0] and remote.ask(
            remote.put, self._form_path, self.form.json().encode()
        ):
            self.verdicts[FORM] = remote.now() + THERE

        landed: list[bool] = []
        for key, row in zip(keys, rows, strict=True):
            try:
                self._write_one(key, row)
                landed.append(True)
            except Failure as failure:
                self._graph.count(self.tier, "save", "error")
                report(key, failure.reason)
                landed.append(False)
        return landed

    def _write_one(self, key: bytes, row: Row) -> None:
        """Write a block unless a correct one is stored. Raises `Failure`."""
        fault = self._fault(key)
        if fault and not fault.rewrite:
            return
        # The first request asks for the object: no bytes go for a block that another writer has
        # written.
        if not fault and self._there(key):
            return
        fault = self._fault(key)  # the answer may have been the damaged version
        nbytes = self.form.image_bytes
        compressor = self._remote.compressor
        data = compressor.object_of(row, self.form) if compressor else row[:nbytes]
        self._remote.attempt(self._remote.put, self._path(key), data, fault)
        self._graph.count(self.tier, "save", "hit", 1, nbytes)
        self._believe_there(key)

    def touch(self, *_: object) -> None:
        """Do nothing: the bucket's rules delete objects, and connections stay."""

    close = touch

    def statistics(self) -> dict[str, Any]:
        """Return figures next to the graph's counts."""
        remote = self._remote
        figures = {
            "url": remote.url,
            "left_alone": remote.left_alone,
            "error": remote.last_error,
        }
        if remote.compressor:
            figures["compressed"] = remote.compressor.statistics()
        return figures


def _codec() -> Any:
    """Return what decompresses, or None if it is not installed."""
    try:
        return compressed.zstd()
    except StoreError:
        return None


def _md5(data: Any) -> str:
    """Return the MD5 of a buffer in hex."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


async def _until_stopped(work: Awaitable[Result], stop: Stop) -> Result:
    """Return the result of ``work``, or raise `_Stopped` within `POLL` seconds after ``stop()``
    became true; the request is dropped then."""
    task = asyncio.ensure_future(work)
    while True:
        await asyncio.wait([task], timeout=POLL)
        if task.done():
            return task.result()
        if stop():
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # it ended meanwhile; asyncio logs errors that no one reads
            raise _Stopped


async def _receive(response: Any, row: Row, span: tuple[int, int], stop: Stop) -> None:
    """Copy a body into a span of a row, or raise `_Stopped`."""
    at, end = span
    if end - at <= PIECE + HEADER:  # a stream would copy it once more
        body = await _until_stopped(response.bytes_async(), stop)
        row[at : at + len(body)] = np.frombuffer(body, np.uint8)
        return
    pieces = aiter(response.stream(PIECE))
    while at < end:
        try:
            piece = await _until_stopped(anext(pieces), stop)
        except StopAsyncIteration:  # the body was too short, which the checksums find
            return
        row[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
        if at < end and stop():
            raise _Stopped


def new_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop.

    Raises `OSError` if too few descriptors are free. asyncio would leave a part of a loop then, and
    print a traceback when that goes.
    """
    if resources.free(_DESCRIPTORS) < _DESCRIPTORS:
        none_free = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise OSError(resources.reason(none_free))
    return asyncio.new_event_loop()
