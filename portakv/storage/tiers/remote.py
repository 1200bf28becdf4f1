# SPDX-License-Identifier: Apache-2.0
"""The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

Retry and resume are obstore's, by settings. This module makes requests, stops them for a while
after failures, and shows no secret. `RemoteStore` has the blocks of a form.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from struct import Struct
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote
from weakref import WeakSet

import numpy as np

from portakv.arguments import kind_of, whole
from portakv.errors import InvalidTerms, StoreError
from portakv.extras import installing
from portakv.runtime import resources
from portakv.runtime.bounded import Until
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage import reasons
from portakv.storage.form import MOST_SEGMENTS, BlockForm, size_notes
from portakv.storage.image import (
    HEADER,
    MAGIC,
    Row,
    header,
    is_sealed,
    pieces_of,
    verify,
    write_seal,
)
from portakv.storage.reasons import Reason, Report
from portakv.storage.work import Graph, Queue
from portakv.tasks import Handle, runtime

# ------------------------------------------------------------------------------------------------
# Compress block images for object stores by zstd, segment by segment.
#
# A compressed object begins with a page of 4,096 bytes: the image's header with another magic,
# and at byte 512 the terms: u32 width, u32 0, and u64 bytes of each segment in the object (48 of
# them, 0 after the last). The last 8 bytes are the page's seal. The segments follow in order,
# each a zstd frame, or as it is in the image if a frame would not be smaller. A width of 2 or 4
# means that the bytes of a segment were sorted before: the first bytes of all elements, then the
# second ones, and so on. Signs and exponents are a few of all values, and mantissas are not.

ZSTD = "zstd"
#: zstd's level, the least length of a repetition, and the bits of its table. Rows of numbers repeat
#: nothing, so that a long search for repetitions takes time and makes the result larger; what
#: saves bytes is a code by how often they occur.
LEVEL = 1
LEAST_REPETITION = 7
TABLE_BITS = 6
COMPRESSED = b"PKVZST\x00\x01"
WIDTHS = (1, 2, 4)
#: Bytes from the middle of an image that decide the width, and whether it is compressed at all.
SAMPLE = 1 << 16
#: The least share of its bytes by which a sample must shrink.
LEAST_SAVED = 1 / 64
_TERMS = Struct(f"<II{MOST_SEGMENTS}Q")
_TERMS_AT = 512  # after the end of the image's header


class Terms(NamedTuple):
    """How an object was written: the width, and the bytes of each segment in the object."""

    width: int
    lengths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole object."""
        return HEADER + sum(self.lengths)

    def span(self, segment: int) -> tuple[int, int]:
        """Return the first byte of a segment in the object, and the first byte after it."""
        start = HEADER + sum(self.lengths[:segment])
        return start, start + self.lengths[segment]


class Compressor:
    """Makes objects of images, and counts the bytes of both. Threads may share it.

    Raises `StoreError` without the package for zstd.
    """

    def __init__(self) -> None:
        self._codec = zstd()
        self._counts = Counter[str]()
        self._lock = runtime().lock

    def object_of(self, row: Row, form: BlockForm) -> Row | bytes:
        """Return the object of a sealed image, which is the image if it does not become smaller."""
        image = row[: form.image_bytes]
        made = compress(image, form, self._codec)
        data: Row | bytes = image if made is None else made
        with self._lock:
            self._counts.update(image_bytes=len(image), object_bytes=len(data))
        return data

    def statistics(self) -> dict[str, int]:
        """Return the bytes of the images and of their objects."""
        with self._lock:
            return {name: self._counts[name] for name in ("image_bytes", "object_bytes")}


def check_compress(compress: object) -> None:
    """Raise `InvalidTerms` for a method that does not exist."""
    if compress not in (None, ZSTD):
        raise InvalidTerms(
            f"Expected compress= as None or {ZSTD!r}, got {compress!r}. Pass one of them."
        )


def zstd() -> Any:
    """Return the module for zstd, of Python 3.14 or of its backport. Raises `StoreError`."""
    error = None
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except (ImportError, OSError) as x:
            error = x
    raise StoreError(
        f"Expected backports.zstd for compressed blocks of a bucket, got: {error}. "
        f"{installing('zstd')} brings it."
    )


def compress(row: Row, form: BlockForm, codec: Any) -> bytes | None:
    """Return the object of a sealed image, or None if it would not be smaller.

    ``codec``: what `zstd` returned. Equal images have equal objects.
    """
    pieces = pieces_of(row, form)
    width = _best_width(row[HEADER : HEADER + form.payload_bytes], pieces, codec)
    if width is None:
        return None

    parts: list[Any] = []
    lengths = []
    for piece in pieces:
        frame = _frame(piece, width, codec)
        length = sum(map(len, frame))
        if length >= len(piece):
            frame = [piece.data]
            length = len(piece)
        parts += frame
        lengths.append(length)
    terms = Terms(width, tuple(lengths))
    if terms.nbytes >= form.image_bytes:
        return None

    page = row[:HEADER].copy()
    page[: len(MAGIC)] = np.frombuffer(COMPRESSED, np.uint8)
    rest = [0] * (MOST_SEGMENTS - len(lengths))
    _TERMS.pack_into(page.data, _TERMS_AT, width, 0, *terms.lengths, *rest)
    write_seal(page)
    return b"".join([page.data, *parts])


def terms_of(page: Row, form: BlockForm) -> Terms | None:
    """Return how an object was written, by its first 4,096 bytes; None if it is not compressed, or
    damaged there."""
    if page[: len(MAGIC)].tobytes() != COMPRESSED or not is_sealed(page):
        return None
    width, _, *lengths = _TERMS.unpack_from(page.data, _TERMS_AT)
    segments = form.segments
    terms = Terms(width, tuple(lengths[: len(segments)]))
    fits = all(0 < n <= x.nbytes for n, x in zip(terms.lengths, segments, strict=True))
    return terms if fits and width in WIDTHS else None


def restore_header(page: Row, row: Row, form: BlockForm) -> None:
    """Write the header of the image, and the zeros after its payload, into a row."""
    row[:HEADER] = page[:HEADER]
    row[: len(MAGIC)] = np.frombuffer(MAGIC, np.uint8)
    row[_TERMS_AT : _TERMS_AT + _TERMS.size] = 0
    write_seal(row)
    row[HEADER + form.payload_bytes : form.image_bytes] = 0


def restore(data: Row, row: Row, form: BlockForm, terms: Terms, segment: int, codec: Any) -> bool:
    """Write a segment of the image into a row; return False if its bytes are no such segment.

    ``data``: the segment's bytes in the object. The caller verifies what was written.
    """
    piece = pieces_of(row, form)[segment]
    if len(data) == len(piece):
        piece[:] = data
        return True
    if len(piece) % terms.width:
        return False
    decompressor = codec.ZstdDecompressor()
    try:
        # One byte more than the segment has: a frame that is damaged does not fill the memory.
        content = decompressor.decompress(data, len(piece) + 1)
    except codec.ZstdError:
        return False
    if len(content) != len(piece) or not decompressor.eof:
        return False
    by_byte = np.frombuffer(content, np.uint8).reshape(terms.width, -1)
    for number, bytes_of_one in enumerate(by_byte):
        piece[number :: terms.width] = bytes_of_one
    return True


def _best_width(payload: Row, pieces: list[Row], codec: Any) -> int | None:
    """Return the width by which a sample of a payload becomes smallest, or None if it stays as it
    is."""
    widths = [x for x in WIDTHS if all(len(piece) % x == 0 for piece in pieces)]
    size = min(SAMPLE, len(payload)) // WIDTHS[-1] * WIDTHS[-1] or len(payload)
    start = (len(payload) - size) // 2 // WIDTHS[-1] * WIDTHS[-1]
    sample = payload[start : start + size]
    widths = [x for x in widths if size % x == 0]
    sizes = {x: sum(map(len, _frame(sample, x, codec))) for x in widths}
    best = min(sizes, key=lambda width: sizes[width])
    return best if sizes[best] <= size * (1 - LEAST_SAVED) else None


def _frame(piece: Row, width: int, codec: Any) -> list[Any]:
    """Return the parts of a frame of a segment, with a block for the first bytes of all elements,
    a block for the second bytes, and so on."""
    options = codec.CompressionParameter
    compressor = codec.ZstdCompressor(
        options={
            options.compression_level: LEVEL,
            options.min_match: LEAST_REPETITION,
            options.hash_log: TABLE_BITS,
        }
    )
    parts = []
    for one in piece.reshape(-1, width).T:
        bytes_of_one = np.ascontiguousarray(one)
        parts.append(compressor.compress(bytes_of_one, codec.ZstdCompressor.FLUSH_BLOCK))
    parts.append(compressor.flush())
    return parts


# ------------------------------------------------------------------------------------------------
# The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

# ------------------------------------------------------------------------------------------------
# `RemoteStore` reads and writes the blocks of one form in an object store.

Keys = Sequence[bytes]
Stop = Callable[[], bool]
Result = TypeVar("Result")
FORM = b"form.json"  # lies next to the blocks; it is not a key
#: Bytes of a piece of a body that is copied as it comes.
PIECE = 4 << 20
#: Seconds between two looks at the deadline while an answer or a body is awaited.
POLL = 0.1
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


#: The ETag and the version of an object, each None if the store has none.
Version = tuple[str | None, str | None]


def _version_in(meta: Any) -> Version:
    return meta["e_tag"], meta["version"]


class _Fetched(NamedTuple):
    """The end of an object's fetch and the object's version.

    ``result`` is ``hit``, ``miss``, ``late``, ``fault``, or ``unreadable`` if the package that
    decompresses it is not installed. ``md5`` is that of a compressed object with a fault, if all
    of it came.
    """

    result: str
    version: Version = (None, None)
    nbytes: int = 0
    md5: str | None = None


@dataclass(frozen=True)
class Fault:
    """A version of an object whose bytes were wrong twice.

    It counts as missing for a while, and the next save may have to ``rewrite`` it.
    """

    version: Version
    side: str

    @property
    def rewrite(self) -> bool:
        """Return True if a save mends it."""
        return self.side in MENDED_BY_SAVES


class RemoteStore:
    """The blocks of one form in an object store."""

    tier = "remote"
    generation = 0

    def __init__(self, remote: Any, graph: Graph, form: BlockForm, own: bool) -> None:
        self.remote = remote
        self.graph = graph
        self.where = remote.url
        self.form = form
        self.writable = own
        self.notes = [remote.last_error or "ready"]
        queue = graph.queue(f"remote:{remote.url}", remote.workers)
        # A second queue, so that a lookup does not wait for blocks.
        self._heads = graph.queue(f"remote:{remote.url} lookup", remote.workers)
        self.queue: Callable[[object], Queue] = lambda _: queue
        self.queue_for_write = self.queue

        def now() -> float:
            return float(remote.now())

        #: Of blocks, and of the form: True, it is there; False, it is not; a `Fault`, it counts as
        #: missing.
        self._beliefs: Until[bytes] = Until("beliefs about blocks of a bucket", 1 << 17, now)
        # True if ETags of objects in one part are their MD5; None until a fault needs the answer.
        self._tags_are_md5: bool | None = None

    def forget(self) -> None:
        """Believe nothing about any block."""
        self._beliefs.clear()

    def has(self, keys: Keys, timeout: float | None = None) -> list[bool]:
        """Return which blocks are stored; blocks without an answer after ``timeout`` seconds count
        as missing.

        One request asks for each block that is not known.
        """
        self.graph.check_open()
        runtime = self.graph.runtime
        until = runtime.time() + (3e9 if timeout is None else timeout)
        left = [key for key in keys if not self._beliefs.holds(key)]

        def begin() -> list[Handle[bool]]:
            call = partial(self._heads.call, "lookup", self._there)
            return [runtime.start(call(key)) for key in left]

        requests = runtime.change(begin, undo=_cancel_all)
        try:
            for request in requests:
                request.wait(max(0.0, until - runtime.time()))
        finally:
            _cancel_all(requests)
        return self.known(keys)

    def known(self, keys: Keys) -> list[bool]:
        """Return which blocks are believed to be there."""
        return [self._beliefs.held(key) is True for key in keys]

    def wants(self, keys: Keys) -> list[bool]:
        """Return which blocks a save has to bring; the other blocks need no request."""
        faults = [self.fault(key) for key in keys]
        left_alone = [fault is not None and not fault.rewrite for fault in faults]
        known = self.known(keys)
        return [not (a or b) for a, b in zip(known, left_alone, strict=True)]

    def fault(self, key: bytes) -> Fault | None:
        """Return the fault for which a block counts as missing now."""
        belief = self._beliefs.held(key)
        return belief if isinstance(belief, Fault) else None

    def _there(self, key: bytes) -> bool:
        """Return whether a block is there; ask the store if that is not known."""
        belief = self._beliefs.held(key)
        if belief is not None:
            return belief is True

        remote = self.remote
        meta = remote.ask(remote.obs.head, remote.store, self.path(key), miss=False)
        if meta is None:
            return False
        if meta and self._is_faulty_still(key, meta):
            return False
        self._beliefs.hold(key, THERE if meta else MISSING, bool(meta))
        return bool(meta)

    def _is_faulty_still(self, key: bytes, meta: Any) -> bool:
        """Return whether the object is the version that was damaged; note it for longer then."""
        fault, _ = self._beliefs.get(key, (None, 0.0))  # also if it held long ago
        if not isinstance(fault, Fault) or not fault.version[0] or fault.side != OBJECT:
            return False
        if _version_in(meta) != fault.version:
            return False
        self.note_fault(key, fault.version, fault.side)
        return True

    def note_fault(self, key: bytes, version: Version, side: str) -> None:
        """Count a version of a block as missing for a while."""
        self._beliefs.hold(key, FAULTY, Fault(version, side))

    def believe_there(self, key: bytes) -> None:
        """Note that a block is there, whole and correct."""
        self._beliefs.hold(key, THERE)

    def doubt(self, key: bytes) -> bool:
        """Have the next lookup ask for a block that did not come; return True if it was believed to
        be there."""
        belief, _ = self._beliefs.get(key, (None, 0.0))
        if not isinstance(belief, Fault):
            self._beliefs.pop(key, None)
        return belief is True

    def path(self, key: bytes) -> str:
        """Return the place of a block in the object store."""
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
        some = self.form.segments if segments is None else [self.form.segments[i] for i in segments]
        nbytes = sum(segment.nbytes for segment in some)
        landed: list[bool] = []
        for key, row in zip(keys, rows, strict=True):
            try:
                outcome = _Read(self, key, row, segments, stop).result(report)
            except Failure as failure:
                outcome = "error"
                report(key, failure.reason)
            landed.append(outcome == "hit")
            self.graph.count(self.tier, "load", outcome, 1, nbytes if landed[-1] else 0)
        return landed

    def has_md5_tags(self) -> bool:
        """Return True if the form's ETag is its MD5.

        In a bucket that encrypts by keys of a key service, ETags look the same but are not.
        """
        if self._tags_are_md5 is None:
            remote = self.remote
            meta = remote.ask(remote.obs.head, remote.store, self._form_path, miss=False)
            if not meta:
                return False
            digest = _md5(self.form.json().encode())
            self._tags_are_md5 = (meta["e_tag"] or "").strip('"') == digest
        return self._tags_are_md5

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
        remote = self.remote
        if not self.known([FORM])[0] and remote.ask(
            remote.put, self._form_path, self.form.json().encode()
        ):
            self._beliefs.hold(FORM, THERE)

        landed: list[bool] = []
        for key, row in zip(keys, rows, strict=True):
            try:
                self._write_one(key, row)
                landed.append(True)
            except Failure as failure:
                self.graph.count(self.tier, "save", "error")
                report(key, failure.reason)
                landed.append(False)
        return landed

    def _write_one(self, key: bytes, row: Row) -> None:
        """Write a block unless a correct one is stored. Raises `Failure`."""
        fault = self.fault(key)
        if fault and not fault.rewrite:
            return
        # The first request asks for the object: no bytes go for a block that another writer has
        # written.
        if not fault and self._there(key):
            return
        fault = self.fault(key)  # the answer may have been the damaged version
        nbytes = self.form.image_bytes
        compressor = self.remote.compressor
        data = compressor.object_of(row, self.form) if compressor else row[:nbytes]
        self.remote.attempt(self.remote.put, self.path(key), data, fault)
        self.graph.count(self.tier, "save", "hit", 1, nbytes)
        self.believe_there(key)

    def touch(self, *_: object) -> None:
        """Do nothing: the bucket's rules delete objects, and connections stay."""

    close = touch

    def statistics(self) -> dict[str, Any]:
        """Return figures next to the graph's counts."""
        remote = self.remote
        figures = {
            "url": remote.url,
            "left_alone": remote.left_alone,
            "error": remote.last_error,
        }
        if remote.compressor:
            figures["compressed"] = remote.compressor.statistics()
        return figures


def _cancel_all(requests: Sequence[Handle[bool]]) -> None:
    """Cancel the requests that have not begun."""
    for request in requests:
        request.cancel()


def _md5(data: Any) -> str:
    """Return the MD5 of a buffer in hex."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that the loop of this process runs."""
    if runtime().runs_here:
        work.close()
        raise StoreError("Expected a thread for a request, got none that is free.")
    return asyncio.run_coroutine_threadsafe(work, runtime().started(StoreError)).result()


def _until_stopped(request: Callable[[], Awaitable[Result]], stop: Stop) -> Result:
    """Return the result of a request, or raise `_Stopped` within `POLL` seconds after ``stop()``
    became true; the request is dropped then."""

    async def ended() -> Result:
        task = asyncio.ensure_future(request())
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

    return _in_loop(ended())


class _Read:
    """The read of a block into a row: of its image, or of its header and some ``segments``."""

    def __init__(
        self,
        tier_store: RemoteStore,
        key: bytes,
        row: Row,
        segments: Sequence[int] | None,
        stop: Stop,
    ) -> None:
        self._store = tier_store
        self._remote = tier_store.remote
        self._form = tier_store.form
        self._key = key
        self._row = row
        self._segments = segments
        self._stop = stop
        self._address = f"{self._remote.url}/{tier_store.path(key)}"

    def result(self, report: Report) -> str:
        """Fetch the block, once more if it came wrong, and return how that ended."""
        store = self._store
        key = self._key
        where = self._remote.url
        log = self._remote.log
        fetched = self._fetch()
        known = store.fault(key)
        if fetched.result == "fault" and known and fetched.version == known.version:
            report(key, Reason(reasons.DAMAGED, f"{where}: {known.side}"))
            return "fault"

        if fetched.result == "unreadable":
            store.note_fault(key, fetched.version, UNREADABLE)
            log.warning("unreadable", "%s: %s", self._address, UNREADABLE)
            report(key, Reason(reasons.UNREADABLE, f"{where}: {UNREADABLE}"))
            return "error"

        if fetched.result == "fault":
            first = fetched
            store.graph.count(store.tier, "load", "refetched")
            log.warning("refetched", "%s came wrong and is fetched again", self._address)
            fetched = self._fetch()
            # Of an object that was written in between nothing is known.
            side = "the object changed while it was read"
            if fetched.result == "fault" and fetched.version == first.version:
                side = self._sick_side(fetched)
                store.note_fault(key, fetched.version, side)
                text = "%s came wrong twice: %s. It counts as missing for %g s%s"
                # A save does not mend what the way to the bucket does to bytes.
                saved = ", or until it is saved" if side in MENDED_BY_SAVES else ""
                log.warning("faults", text, self._address, side, FAULTY, saved)
            if fetched.result == "fault":
                report(key, Reason(reasons.DAMAGED, f"{where}: {side}"))
        if fetched.result == "hit":
            store.believe_there(key)
            return "hit"

        believed = store.doubt(key)
        if fetched.result == "miss":
            if believed:
                # The process that deleted the block may have deleted it.
                store.doubt(FORM)
            report(key, Reason(reasons.EVICTED if believed else reasons.MISSING, where))
        if fetched.result == "late":
            report(key, Reason(reasons.LATE, where))
        return fetched.result

    def _sick_side(self, fetched: _Fetched) -> str:
        """Return which side changed the bytes of the object.

        Compares the MD5 of the received bytes with the ETag, which is the MD5 of an object that was
        written in one part.
        """
        image_bytes = self._form.image_bytes
        if fetched.nbytes != image_bytes and not self._may_be_compressed(fetched.nbytes):
            return OBJECT
        e_tag = re.fullmatch('"?([0-9a-f]{32})"?', fetched.version[0] or "")
        if not e_tag:
            return UNKNOWN
        row = self._row
        if self._segments is not None:  # an ETag is that of the whole object
            row = np.empty(image_bytes, np.uint8)
            try:
                whole = _Read(self._store, self._key, row, None, self._stop)._fetch()
            except Failure:
                return UNDECIDED
            if whole.result == "hit":
                return PATH
            if whole.result != "fault" or whole.version != fetched.version:
                return UNDECIDED
            fetched = whole

        if (fetched.md5 or _md5(row[:image_bytes])) == e_tag[1]:
            return OBJECT
        return PATH if self._store.has_md5_tags() else UNKNOWN

    def _fetch(self) -> _Fetched:
        """Fetch the object, or its header and some segments, into the row, and verify it. Raises
        `Failure`."""
        fetched: _Fetched = self._remote.attempt(self._fetch_once, miss=_Fetched("miss"))
        return fetched

    def _fetch_once(self) -> _Fetched:
        """Do what `_fetch` does. Raises the errors of obstore."""
        try:
            for span in self._spans():
                fetched, response = self._request(span)
                if not span[0] and self._may_be_compressed(fetched.nbytes):
                    return self._fetch_compressed(fetched, response)
                if fetched.nbytes != self._form.image_bytes:
                    return fetched
                self._receive(response, self._row, span)
        except _Stopped:
            return _Fetched("late")
        except self._remote.obs.exceptions.BaseError as error:
            if re.search("status code: 416|Invalid range|range was invalid", str(error)):
                return _Fetched("fault")  # an object of no bytes
            raise
        return fetched._replace(result="hit" if self._is_right() else "fault")

    def _spans(self) -> list[tuple[int, int]]:
        """Return the parts of an image to read: the whole image, or the header and segments."""
        if self._segments is None:
            return [(0, self._form.image_bytes)]
        parts = [self._form.segments[number] for number in self._segments]
        starts = [HEADER + part.offset for part in parts]
        ends = [HEADER + part.offset + part.nbytes for part in parts]
        return [(0, HEADER), *zip(starts, ends, strict=True)]

    def _request(self, span: tuple[int, int]) -> tuple[_Fetched, Any]:
        """Request a span of the object, or all of it; return its version, and the response."""
        if self._stop():
            raise _Stopped
        remote = self._remote
        options = {} if self._segments is None else {"range": span}
        path = self._store.path(self._key)
        get = partial(remote.obs.get_async, remote.store, path, options=options)
        response = _until_stopped(get, self._stop)
        meta = response.meta
        return _Fetched("fault", _version_in(meta), meta["size"]), response

    def _receive(self, response: Any, row: Row, span: tuple[int, int]) -> None:
        """Copy a body into a span of a row, or raise `_Stopped`."""
        at, end = span
        if end - at <= PIECE + HEADER:  # a stream would copy it once more
            body = _until_stopped(response.bytes_async, self._stop)
            row[at : at + len(body)] = np.frombuffer(body, np.uint8)
            return
        pieces = aiter(response.stream(PIECE))
        while at < end:
            try:
                piece = _until_stopped(partial(anext, pieces), self._stop)
            except StopAsyncIteration:  # the body was too short, which the checksums find
                return
            row[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
            if at < end and self._stop():
                raise _Stopped

    def _may_be_compressed(self, nbytes: int) -> bool:
        """Return True if a compressed object can have this size, and an image cannot."""
        return HEADER < nbytes < self._form.image_bytes

    def _fetch_compressed(self, fetched: _Fetched, response: Any) -> _Fetched:
        """Receive a compressed object, or its first page and some segments, and write the image
        into the row. ``response``: to the request for all of it, or for the page."""
        whole = self._segments is None
        form = self._form
        data = np.empty(fetched.nbytes if whole else HEADER, np.uint8)
        self._receive(response, data, (0, len(data)))
        terms = terms_of(data[:HEADER], form)
        right = terms is not None and terms.nbytes == fetched.nbytes
        if terms is not None and right:
            try:
                codec = zstd()
            except StoreError:  # it is not installed
                return fetched._replace(result="unreadable")
            restore_header(data[:HEADER], self._row, form)
            for number in range(len(form.segments)) if whole else self._segments or ():
                start, end = terms.span(number)
                part = data[start:end]
                if not whole:
                    again, response = self._request((start, end))
                    if (again.version, again.nbytes) != (fetched.version, fetched.nbytes):
                        return again
                    part = np.empty(end - start, np.uint8)
                    self._receive(response, part, (0, len(part)))
                right = right and restore(part, self._row, form, terms, number, codec)
        if right and self._is_right():
            return fetched._replace(result="hit")
        return fetched._replace(result="fault", md5=_md5(data) if whole else None)

    def _is_right(self) -> bool:
        """Return True if the row has the header of the key, and segments with its checksums."""
        head = header(self._row, self._form)
        if isinstance(head, str) or head.key != self._key:
            return False
        return verify(self._row, self._form, head.checksums, head.generation, self._segments)


_log = logging.getLogger(__name__)
#: After so many failures in a row the store is left alone for `PAUSE` seconds, then for twice as
#: long, up to `LONGEST`.
FAILURES = 5
PAUSE = 1.0
LONGEST = 60.0
#: Bytes of each part of an upload in parts.
PART = 16 << 20
MOST_WORKERS = 1024
#: Puts of an object of which the store says that it exists, and has none.
PUTS = 3
NO_CONDITIONS = (
    "%r takes no conditional puts: from now on each put replaces the object. Pass "
    "conditional_put='disabled', and none is tried."
)
#: Codes of S3 with which a store refuses a header that it does not know, by status 400. Answers
#: with other codes say what else is wrong.
REFUSED_HEADER = ("BadRequest", "InvalidArgument", "InvalidRequest", "NotImplemented")
#: Free descriptors for a remote tier. Without one obstore's threads cannot begin, and they never do
#: in that process then.
DESCRIPTORS = 16
#: Settings of obstore, unless the caller passes others; `read_timeout` for reading alone.
CLIENT: Any = {"connect_timeout": "2s", "read_timeout": "2s", "timeout": "60s"}
BACKOFF = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=2), "base": 2}
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=30), "backoff": BACKOFF}


class Remote:
    """A tier of blocks below a prefix of an object store.

    The URL is ``s3://bucket/prefix``, ``gs://``, ``az://``, ``http(s)://`` (finds no other forms:
    it cannot list), ``file:///folder``, or ``memory://`` (lives as long as this object).

    Args:
        workers: the number of requests at a time; multipart: images above so many bytes go in
            parts, 16 MiB or more.
        compress: ``"zstd"`` compresses the blocks that are written; None writes images. Blocks of
            both kinds are read, whatever it is.
        settings: settings of obstore's store: region, endpoint, credential_provider, ...; entries
            of ``client_options`` and ``retry_config`` replace those of `CLIENT` and `RETRY`.

    Raises:
        InvalidTerms: an address or a number that is not valid.
        StoreError: obstore is not installed, or rejects the address or a setting; ``compress``
            without the package for it.
    """

    now: Callable[[], float] = time.monotonic
    #: Seconds after which the search for other forms ends. No search begins in as many seconds
    #: after one that failed or ended so, so that a store with several forms waits once for a bucket
    #: that is silent.
    search_seconds = 3.0
    _process: Any = None  # the process that made the first one

    def __init__(
        self,
        url: str,
        *,
        workers: int = 8,
        multipart: int = 64 << 20,
        compress: str | None = None,
        **settings: Any,
    ) -> None:
        if resources.free(DESCRIPTORS) < DESCRIPTORS:
            none_free = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            raise StoreError(
                f"Expected descriptors for a remote tier, but {resources.reason(none_free)}."
            )
        try:
            import obstore
        except (ImportError, OSError) as x:
            raise StoreError(
                f"Expected obstore for a remote tier, got: {x}. {installing('remote')} brings it."
            ) from None
        check_remote(url, workers, multipart, settings, compress)
        #: What compresses blocks; None if they are written as they are.
        self.compressor = Compressor() if compress else None
        Remote._process = Remote._process or this_process()
        self._obs = obstore
        self.url = _shown(url)
        self.workers = workers

        self.store, self._sink = uninterrupted(partial(self._connect, url, settings))
        self._multipart = multipart
        self._takes_conditions = True  # of puts, as far as is known
        #: How the last failed request failed, without secrets; empty if none failed.
        self.last_error = ""
        self._lock = runtime().lock
        self._failures = 0  # in a row
        self._pause = PAUSE
        self._until = 0.0  # when a store that is left alone is tried again
        self.log = RateLimitedLog(_log, lambda: self.now())
        self._present: list[BlockForm] = []  # at the last look
        self._next_search = 0.0  # not before this time
        self.tier_stores: WeakSet[RemoteStore] = WeakSet()

    @property
    def left_alone(self) -> bool:
        """Return True while the store gets no requests, after failures in a row."""
        return self._failures >= FAILURES

    def _admits(self) -> bool:
        """Return True if a request may go out now; of a store that is left alone it is a probe."""
        with self._lock:
            if not self.left_alone:
                return True
            if self.now() < self._until:
                return False
            # This request is the probe; no other request goes out before it has ended.
            self._pause = min(LONGEST, 2 * self._pause)
            self._until = self.now() + LONGEST
            return True

    def _note(self, error: str | None) -> None:
        """Count a failure, or begin anew after a success."""
        with self._lock:
            self._failures = 0 if error is None else self._failures + 1
            if self._failures <= FAILURES:
                self._pause = PAUSE
            self._until = self.now() + self._pause
            if error is not None:
                self.last_error = error

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    @property
    def obs(self) -> Any:
        """Return obstore. Raises `StoreError` in a forked process, where its calls never return."""
        if self._process.forked:
            raise StoreError(
                f"Expected {self!r} in the process that made it, got a forked one, where obstore "
                f"hangs. Start the process by spawn."
            )
        return self._obs

    def _connect(self, url: str, settings: dict[str, Any]) -> tuple[Any, Any]:
        """Return obstore's store to read from, and the one to write to. Raises `StoreError`."""
        kind = self.url.partition(":")[0]
        plain_http = kind == "http" or os.environ.get("AWS_ALLOW_HTTP", False)
        reading = CLIENT | {"allow_http": plain_http} | settings.pop("client_options", {})
        writing = {name: value for name, value in reading.items() if name != "read_timeout"}
        retry = RETRY | settings.pop("retry_config", {})
        options = settings
        settings = {"retry_config": retry, **options}
        if kind == "file":
            settings["mkdir"] = True
        make = self.obs.store.from_url
        runtime().started(StoreError)  # while descriptors are free
        try:
            # Its threads begin here: if they cannot, it panics, and so does each later call.
            self.obs.put(self.obs.store.MemoryStore(), "a", b"")
            store = make(url, client_options=reading, **settings)
            if kind == "memory":
                return store, store
            # `read_timeout` would end a body on its way out, too.
            return store, make(url, client_options=writing, **settings)
        except BaseException as error:  # also obstore's panic, which is not an Exception
            text = _clean(error).rstrip(".")
        for name in options:
            others = {key: value for key, value in settings.items() if key != name}
            with suppress(BaseException):  # obstore's panic again
                make(url, client_options=reading, **others)
                raise_for = f"Expected {name}= as obstore takes it, got a value that it refuses"
                break
        else:
            raise_for = "Expected a url and settings as obstore takes them, got an error"
        raise StoreError(f"{raise_for} for {self.url}: {text}. Correct it.")

    def ask(self, work: Callable[..., Any], *terms: Any, miss: Any = None) -> Any:
        """Return the result of `attempt`, or None if the store failed or gets no requests now."""
        try:
            return self.attempt(work, *terms, miss=miss)
        except Failure:
            return None

    def attempt(self, work: Callable[..., Any], *terms: Any, miss: Any = None) -> Any:
        """Return the result of ``work``; ``miss`` if the object does not exist.

        Raises `Failure` if the store fails, which is logged once a minute, or gets no requests now.
        """
        if not self._admits():
            where = f"{self.url}: left alone for a while after {self.last_error}"
            raise Failure(Reason(reasons.UNREACHABLE, where))

        result = miss
        failure: Reason | None = None
        try:
            result = work(*terms)
        except Exception as error:  # obstore raises many types, and those of its clients
            missing = isinstance(error, FileNotFoundError) and miss is not None
            if not missing or re.search("NoSuchBucket|ContainerNotFound", str(error)):
                failure = self._reason(error)
        if failure is None:
            self._note(None)
            return result
        self._note(failure.where.removeprefix(f"{self.url}: "))
        text = "%r failed; its blocks are misses, and saves do not write there: %s"
        self.log.warning("failed", text, self, self.last_error, lines=1)
        raise Failure(failure)

    def _reason(self, error: Exception) -> Reason:
        """Return how a request failed, without secrets."""
        refusals = self.obs.exceptions.PermissionDeniedError, PermissionError
        refused = isinstance(error, (*refusals, self.obs.exceptions.UnauthenticatedError))
        refused = refused or re.search(r"status code: 4(?!04|08|09|29)\d\d", str(error)) is not None
        kind = reasons.REFUSED if refused else reasons.UNREACHABLE
        return Reason(kind, f"{self.url}: {type(error).__name__}: {_clean(error)}")

    def put(self, path: str, data: Any, replaces: Fault | None = None) -> bool:
        """Write an object that does not exist, or that ``replaces`` a faulty version; return True.

        Raises the errors of obstore. A store without such conditions, or an upload in parts,
        replaces any object: two writers have the same block for one key, and each object is one
        writer's.
        """
        if self.url.startswith("memory:"):
            # This store retains the caller's buffer, which the caller uses again.
            data = bytes(data)
        for _ in range(PUTS):
            try:
                self._put_once(path, data, replaces)
                return True
            except self.obs.exceptions.AlreadyExistsError as error:
                # S3 says so as well if a delete that ran meanwhile has won (409), and the object
                # exists after a put whose answer was lost.
                conflict = error
            if self._is_there(path, replaces):
                return True
        raise conflict

    def _put_once(self, path: str, data: Any, replaces: Fault | None) -> None:
        """Write an object once, as `put` says. Raises the errors of obstore."""
        obs = self.obs
        if len(data) > self._multipart:
            parts = {"chunk_size": PART, "max_concurrency": 4}
            obs.put(self._sink, path, data, use_multipart=True, **parts)
            return

        put = partial(obs.put, self._sink, path, data, use_multipart=False)
        if not self._takes_conditions:
            put()
            return
        mode: Any = "create"
        if replaces:
            known = zip(("e_tag", "version"), replaces.version, strict=True)
            mode = {name: value for name, value in known if value} or "overwrite"
        errors = obs.exceptions
        try:
            put(mode=mode)
        except (NotImplementedError, errors.NotSupportedError):
            put()
        except (errors.PreconditionError, FileNotFoundError):
            if not replaces:
                raise
            # Another writer was first and its object stays, or the faulty object was deleted.
            put(mode="create")
        except errors.GenericError as error:
            if mode == "overwrite" or not _may_refuse_conditions(str(error)):
                raise
            put()  # its error names what else is wrong
            self._takes_conditions = False
            self.log.warning("conditions", NO_CONDITIONS, self)

    def _is_there(self, path: str, fault: Fault | None) -> bool:
        """Return whether the store has an object, other than a faulty version."""
        try:
            meta = self.obs.head(self.store, path)
        except FileNotFoundError:
            return False
        return fault is None or _version_in(meta) != fault.version

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return other forms of the same cache that lie there."""
        return uninterrupted(partial(self._find_forms, form))

    def _find_forms(self, form: BlockForm) -> list[BlockForm]:
        """List the forms in the bucket.

        An interrupted request would block the others, so a helper runs this for `forms`.
        """
        if type(self.store).__name__ != "HTTPStore" and self.now() >= self._next_search:
            self._search()
        return [other for other in self._present if other != form and form.same_cache(other)]

    def _search(self) -> None:
        """List the forms, and read those that are not known.

        The next search reads those for which no time is left.
        """
        known = {f"1/{other.name}": other for other in self._present}
        self._present = []
        until = self.now() + self.search_seconds
        lists = partial(self.obs.list_with_delimiter_async, self.store, "1/")
        listed = self.ask(_within, self.search_seconds, lists)
        for path in listed["common_prefixes"] if listed else ():
            if path in known:  # a name is a checksum of the form
                self._present.append(known[path])
                continue
            left = until - self.now()
            if left <= 0:
                continue
            read = partial(self._read_small, f"{path}/form.json")
            text = self.ask(_within, left, read, miss=b"")
            with suppress(StoreError, ValueError):  # the text is not a form
                other = BlockForm.from_json((text or b"").decode())
                if path == f"1/{other.name}":
                    self._present.append(other)
        if listed is None or self.now() >= until:
            self._next_search = self.now() + self.search_seconds

    async def _read_small(self, path: str) -> bytes:
        response = await self.obs.get_async(self.store, path)
        return bytes(await response.bytes_async())

    def open(
        self, graph: Graph, _: object, forms: Sequence[BlockForm], own: int = 1
    ) -> list[RemoteStore]:
        """Return a tier store of each of the first ``own`` forms, which are written, and of the
        other forms that `forms` found."""
        written = forms[:own]
        some = [x for x in forms if x in written or x in self._present]
        tier_stores = [RemoteStore(self, graph, form, form in written) for form in some]
        for note in size_notes(written, self._present):
            self.log.warning(note, "%s: %s", self.url, note)
            tier_stores[0].notes.append(note)
        self.tier_stores.update(tier_stores)
        return [*tier_stores]

    def check(self) -> bool:
        """Return whether the store answers a request, whose failure `last_error` describes then.

        A store over HTTP cannot list, gets no request, and counts as one that answers.
        """
        if type(self.store).__name__ == "HTTPStore":
            return True
        listed = uninterrupted(partial(self.ask, self.obs.list_with_delimiter, self.store, "1/"))
        return listed is not None

    def wipe(self) -> int:
        """Delete all blocks of all forms; return how many objects there were. Raises
        `StoreError`."""
        gone = 0
        obs = self.obs
        try:
            for batch in obs.list(self.store, "1/", chunk_size=1000):
                obs.delete(self.store, [one["path"] for one in batch])
                gone += len(batch)
        except Exception as error:  # obstore raises many types, and those of its clients
            raise StoreError(
                f"Expected to wipe {self!r}, got: {_clean(error)}. Wipe it again."
            ) from None
        finally:
            for tier_store in [*self.tier_stores]:
                tier_store.forget()
        return gone


def _may_refuse_conditions(error: str) -> bool:
    """Return whether a store may have refused a put for its condition: by status 501, or by 400
    without a code that says what else is wrong."""
    status = re.search(r"status code: (\d{3})", error)
    if status is None or status[1] not in ("400", "501"):
        return False
    code = re.search(r"<Code>(\w+)", error)
    return status[1] == "501" or code is None or code[1] in REFUSED_HEADER


def _within(seconds: float, request: Callable[[], Awaitable[Result]]) -> Result:
    """Return the result of a request; raise `TimeoutError` if it does not end in time."""

    async def ended() -> Result:
        try:
            return await asyncio.wait_for(request(), seconds)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no answer in {seconds:.1f} s") from None

    return _in_loop(ended())


def check_remote(
    url: object,
    workers: object = 8,
    multipart: object = PART,
    settings: Mapping[str, Any] | None = None,
    compress: object = None,
) -> None:
    """Raise `InvalidTerms` that names the first argument of `Remote` that cannot be right.

    Needs no package for object stores, and sends no request.
    """
    settings = settings or {}
    if not isinstance(url, str):
        raise InvalidTerms(
            f"Expected url= as text, got {kind_of(url)}. Pass s3://bucket/prefix or the like."
        )
    if "?" in url:
        raise InvalidTerms(
            f"Expected url= without a query, got one after {_shown(url)}. Pass settings by name."
        )
    if {".", ".."} & {*unquote(url).split("/")}:
        raise InvalidTerms(
            f"Expected url= without . and .. in its path, got {_shown(url)}. Write the path out."
        )
    whole("workers=", workers, 1, MOST_WORKERS)
    whole("multipart=", multipart, PART, (1 << 63) - 1, what="of bytes")
    check_compress(compress)
    for name in ("client_options", "retry_config"):
        if not isinstance(settings.get(name, {}), dict):
            raise InvalidTerms(
                f"Expected {name}= as a dict, got {kind_of(settings[name])}. Pass the "
                f"entries of obstore that differ from PortaKV's."
            )


def _shown(url: str) -> str:
    """Return an address without parts that may be secret: all up to the last @, and the query."""
    head, at, shown = url.rpartition("@")
    if at:
        kind = re.match(r"\w*://", head)
        # After a query has begun, the @ may be its own.
        shown = (kind[0] if kind else "") + ("" if re.search("[?#]", head) else shown)
    return re.split("[?#]", shown)[0]


def _clean(error: BaseException) -> str:
    """Return the first line of an error without keys of blocks and parts that may be secret.

    Removes queries, names before a host, quoted values, and the texts of the server (except its
    code) and of a provider.
    """
    text = str(error).partition("\n")[0]
    code = re.search(r"<Code>(\w+)", str(error))
    text = re.sub(r"^.*(?=Error performing)|(?<=status code: ...).*|[0-9a-f]{64}", "", text)
    text = re.sub(r'(provider: \w+).*|"[^"]*"|\?\S*|//\S*@', r"\1", text)[:300]
    if "HTTP error: builder error" in text:
        text += " (plain http needs client_options={'allow_http': True})"
    return f"{text} ({code[1]})" if code else text
