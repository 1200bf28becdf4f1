# SPDX-License-Identifier: Apache-2.0
"""The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

Retry and resume are obstore's, by settings. This module checks contents, leaves a store alone for a
while after failures, leaves requests at a deadline, and shows no secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote
from weakref import WeakSet

import numpy as np

from portakv.errors import InvalidTerms, StoreError
from portakv.graph.graph import Graph, Queue, Task
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage import reasons
from portakv.storage.form import BlockForm, block_size_notes
from portakv.storage.image import HEADER, Row, header, verify
from portakv.storage.reasons import Reason, Report

_log = logging.getLogger(__name__)
Keys = Sequence[bytes]
Stop = Callable[[], bool]
Result = TypeVar("Result")
FORM = b"form.json"  # lies next to the blocks; it is no key
#: Bytes of a piece of a body that is copied as it comes.
PIECE = 4 << 20
#: Seconds between two looks at the deadline while an answer or a body is awaited.
POLL = 0.1
#: Seconds for which a block is believed to be there, and not to be there.
THERE = 60.0
MISSING = 5.0
#: Seconds for which a block that came wrong twice counts as missing, unless it is saved again.
FAULTY = 60.0
#: After so many failures in a row the store is left alone for `PAUSE` seconds, then for twice as
#: long, up to `LONGEST`.
FAILURES = 5
PAUSE = 1.0
LONGEST = 60.0
#: Bytes of each part of an upload in parts.
PART = 16 << 20
MOST_WORKERS = 1024
#: Settings of obstore, unless the caller gives others; `read_timeout` for reading alone.
CLIENT: Any = {"connect_timeout": "2s", "read_timeout": "2s", "timeout": "60s"}
BACKOFF = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=2), "base": 2}
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=30), "backoff": BACKOFF}

#: Which side changed the bytes of a block.
OBJECT = "the object is damaged"
PATH = "the bytes changed on the way here, and the object is left as it is"
UNKNOWN = "the store has no MD5 that says whether the object is damaged or the path to it"
UNDECIDED = "there was no time to find out whether the object is damaged or the path to it"


class _Failure(Exception):
    """A request that failed; ``reason`` says how, without secrets."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.where)
        self.reason = reason


class _Stopped(Exception):
    """A request was left because its caller does not wait any more."""


class _Fetched(NamedTuple):
    """How the fetch of an object ended: ``hit``, ``miss``, ``late`` or ``fault``; and what the
    store says about the object."""

    result: str
    e_tag: str | None = None
    version: str | None = None
    nbytes: int = 0

    def same_object(self, other: _Fetched | _Fault) -> bool:
        """Return whether both are of one version of the object."""
        return (self.e_tag, self.version) == (other.e_tag, other.version)


@dataclass(frozen=True)
class _Fault:
    """A version of an object whose bytes came wrong twice. It counts as missing until a time, and
    the next save may have to ``rewrite`` it."""

    e_tag: str | None
    version: str | None
    until: float
    rewrite: bool
    side: str


class Remote:
    """Blocks below a prefix of an object store: ``s3://bucket/prefix``, ``gs://``, ``az://``,
    ``http(s)://`` (finds no other forms: it cannot list), ``file:///folder``, or ``memory://``
    (lives as long as this object).

    Args:
        workers: requests at once; multipart: images above so many bytes go in parts, 16 MiB or
            more.
        settings: what obstore's store takes: region, endpoint, credential_provider, ...; of
            ``client_options`` and ``retry_config`` what is given replaces `CLIENT` and `RETRY`.

    Raises:
        InvalidTerms: an address or a number that cannot be one.
        StoreError: obstore is not installed, or refuses the address or a setting.
    """

    now: Callable[[], float] = time.monotonic
    _process: Any = None  # that made the first one

    def __init__(self, url: str, *, workers: int = 8, multipart: int = 64 << 20, **settings: Any):
        try:
            import obstore
        except (ImportError, OSError) as x:
            raise StoreError(f"A remote tier needs obstore, portakv[remote]: {x}.") from None
        _check_arguments(url, workers, multipart, settings)
        Remote._process = Remote._process or this_process()
        self._obs = obstore
        self.url = _shown(url)
        self.workers = workers
        self._multipart = multipart

        self.store, self._sink = uninterrupted(partial(self._connect, url, settings))
        # A store in memory keeps the buffer that it is given, and the caller uses it again.
        self._keeps_buffers = self.url.startswith("memory:")

        self._lock = threading.Lock()
        self.failures = 0  # in a row
        self._pause = PAUSE
        self._until = 0.0  # when a store that is left alone is tried again
        self.last_error = ""
        self.log = RateLimitedLog(_log, lambda: self.now())
        self._found: list[BlockForm] = []
        self._size_notes: list[str] = []
        self.tier_stores: WeakSet[RemoteStore] = WeakSet()

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    @property
    def obs(self) -> Any:
        """obstore; refused in a process in which its calls would never return."""
        if self._process.forked:
            raise StoreError(f"{self!r} is obstore's, which hangs once forked; start it by spawn.")
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
        try:
            # Its threads begin here: if they cannot, it panics, and so does each later call.
            self.obs.put(self.obs.store.MemoryStore(), "a", b"")
            store = make(url, client_options=reading, **settings)
            if kind == "memory":
                return store, store
            # `read_timeout` would end a body on its way out, too.
            return store, make(url, client_options=writing, **settings)
        except BaseException as error:  # also obstore's panic, which is no Exception
            text = _clean(error).rstrip(".")
        for name in options:
            others = {key: value for key, value in settings.items() if key != name}
            with suppress(BaseException):
                make(url, client_options=reading, **others)
                raise_for = f"Expected {name}= as obstore takes it, got a value that it refuses"
                break
        else:
            raise_for = "Expected a url and settings as obstore takes them, got an error"
        raise StoreError(f"{raise_for} for {self.url}: {text}. Correct it.")

    def ask(self, work: Callable[..., Any], *given: Any, miss: Any = None) -> Any:
        """Return what `attempt` returns, or None if the store failed or is left alone."""
        try:
            return self.attempt(work, *given, miss=miss)
        except _Failure:
            return None

    def attempt(self, work: Callable[..., Any], *given: Any, miss: Any = None) -> Any:
        """Return what ``work`` returns; True if the object exists already; ``miss``, if given, if
        there is none. Raises `_Failure` if the store fails, which is logged once a minute, or is
        left alone."""
        with self._lock:
            if self.failures >= FAILURES:
                if self.now() < self._until:
                    where = f"{self.url}: left alone for a while after {self.last_error}"
                    raise _Failure(Reason(reasons.UNREACHABLE, where))
                # This request is the probe; no other one goes out before it has ended.
                self._pause = min(LONGEST, 2 * self._pause)
                self._until = self.now() + LONGEST

        result = miss
        failure: Reason | None = None
        try:
            result = work(*given)
        except Exception as error:
            missing = isinstance(error, FileNotFoundError) and miss is not None
            if isinstance(error, self.obs.exceptions.AlreadyExistsError):
                result = True  # also after a put whose answer was lost
            elif not missing or re.search("NoSuchBucket|ContainerNotFound", str(error)):
                failure = self._reason(error)
        self._note(failure)
        if failure:
            raise _Failure(failure)
        return result

    def _reason(self, error: Exception) -> Reason:
        """Return how a request failed, without secrets."""
        refusals = self.obs.exceptions.PermissionDeniedError, PermissionError
        refused = isinstance(error, (*refusals, self.obs.exceptions.UnauthenticatedError))
        refused = refused or re.search(r"status code: 4(?!04|08|29)\d\d", str(error)) is not None
        kind = reasons.REFUSED if refused else reasons.UNREACHABLE
        return Reason(kind, f"{self.url}: {type(error).__name__}: {_clean(error)}")

    def _note(self, failure: Reason | None) -> None:
        """Count a failure, or begin anew after a success; log the failure."""
        with self._lock:
            self.failures = self.failures + 1 if failure else 0
            if self.failures <= FAILURES:
                self._pause = PAUSE
            self._until = self.now() + self._pause
            if failure:
                self.last_error = failure.where.removeprefix(f"{self.url}: ")
        if failure:
            text = "%r failed; its blocks are misses, and saves do not write there: %s"
            self.log.warning("failed", text, self, self.last_error, lines=1)

    def put(self, path: str, data: Any, replaces: _Fault | None = None) -> bool:
        """Write an object that is not there, or that ``replaces`` a faulty version. A store that
        has no such conditions, or an upload in parts, replaces any object: what two writers have
        for one key is the same block, and each object is one writer's."""
        if self._keeps_buffers:
            data = bytes(data)
        if len(data) > self._multipart:
            parts = {"chunk_size": PART, "max_concurrency": 4}
            self.obs.put(self._sink, path, data, use_multipart=True, **parts)
            return True

        mode: Any = "create"
        if replaces:
            known = {"e_tag": replaces.e_tag, "version": replaces.version}
            mode = {name: value for name, value in known.items() if value} or "overwrite"
        errors = self.obs.exceptions
        try:
            self.obs.put(self._sink, path, data, use_multipart=False, mode=mode)
        except (NotImplementedError, errors.NotSupportedError):
            self.obs.put(self._sink, path, data, use_multipart=False)
        except (errors.PreconditionError, FileNotFoundError):
            if not replaces:
                raise
            # Another writer was first, whose object stays, or the faulty one was deleted.
            self.obs.put(self._sink, path, data, use_multipart=False, mode="create")
        return True

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return other forms of the same cache that lie there."""
        return uninterrupted(partial(self._find_forms, form))

    def _find_forms(self, form: BlockForm) -> list[BlockForm]:
        """Do what `forms` promises: an interrupted request would keep the others waiting."""
        self._found = []
        self._size_notes = []
        stored = list[BlockForm]()
        store = self.store
        if type(store).__name__ == "HTTPStore":
            return self._found
        listed = self.ask(self.obs.list_with_delimiter, store, "1/")
        for path in listed["common_prefixes"] if listed else ():
            text = self.ask(self._read_small, f"{path}/form.json", miss=b"")
            with suppress(StoreError, ValueError):
                other = BlockForm.from_json((text or b"").decode())
                if path == f"1/{other.name}" and other != form:
                    stored.append(other)
        self._found = [other for other in stored if form.same_cache(other)]
        self._size_notes = block_size_notes(form, stored)
        for note in self._size_notes:
            self.log.warning(note, "%s: %s", self.url, note)
        return self._found

    def _read_small(self, path: str) -> bytes:
        return bytes(self.obs.get(self.store, path).bytes())

    def open(self, graph: Graph, _: Any, forms: Any) -> list[RemoteStore]:
        """Return a store of the first form, which is written, and of the others that `forms`
        found."""
        own = forms[0]
        some = [x for x in forms if x == own or x in self._found]
        tier_stores = [RemoteStore(self, graph, form, form == own) for form in some]
        tier_stores[0].notes += self._size_notes
        self.tier_stores.update(tier_stores)
        return [*tier_stores]

    def wipe(self) -> int:
        """Delete all blocks of all forms; return how many objects there were. Raises
        `StoreError`."""
        gone = 0
        obs = self.obs
        try:
            for batch in obs.list(self.store, "1/", chunk_size=1000):
                obs.delete(self.store, [one["path"] for one in batch])
                gone += len(batch)
        except Exception as error:
            raise StoreError(f"{self!r} was to be wiped, but {_clean(error)}.") from None
        finally:
            for tier_store in [*self.tier_stores]:
                tier_store.forget()
        return gone


class RemoteStore:
    """The blocks of one form in an object store, as `BlockStore` knows a tier."""

    tier = "remote"
    generation = 0

    def __init__(self, remote: Remote, graph: Graph, form: BlockForm, own: bool) -> None:
        self._remote = remote
        self._graph = graph
        self.where = remote.url
        self.form = form
        self.writable = own
        self.notes = [remote.last_error or "ready"]
        queue = graph.queue(f"remote:{remote.url}", remote.workers)
        # Another one, so that a lookup does not wait for blocks.
        self._heads = graph.queue(f"remote:{remote.url} lookup", remote.workers)
        self.queue: Callable[[object], Queue] = lambda _: queue
        self.queue_for_write = self.queue
        # Until when a block, or the form, is believed to be there; negative: until when it is not.
        self.verdicts: Bounded[bytes, float] = Bounded("remote verdicts", 1 << 17)
        self._faults: Bounded[bytes, _Fault] = Bounded("remote faults", 1 << 14)
        # Whether ETags of objects in one part are their MD5; None until a fault asks for it.
        self._tags_are_md5: bool | None = None

    def forget(self) -> None:
        """Believe nothing about any block."""
        self.verdicts.clear()
        self._faults.clear()

    def has(self, keys: Keys, timeout: float | None = None) -> list[bool]:
        """Return which blocks are there; not those about which the store has said nothing after
        ``timeout`` seconds. A task asks about each block that is not known."""
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
        """Return which blocks a save has to bring; the store need not be asked about others."""
        faults = [self._fault(key) for key in keys]
        left_alone = [fault is not None and not fault.rewrite for fault in faults]
        known = self.known(keys)
        return [not (a or b) for a, b in zip(known, left_alone, strict=True)]

    def _fault(self, key: bytes) -> _Fault | None:
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
        result = remote.ask(remote.obs.head, remote.store, self._path(key), miss=False)
        if result is None:
            return False
        if result and self._is_faulty_still(key, result):
            return False
        self.verdicts[key] = now + THERE if result else -now - MISSING
        return bool(result)

    def _is_faulty_still(self, key: bytes, found: Any) -> bool:
        """Return whether the object is the version that was damaged; note it for longer then."""
        fault = self._faults.pop(key, None)
        if not fault or not fault.e_tag or fault.side != OBJECT:
            return False
        if (found["e_tag"], found["version"]) != (fault.e_tag, fault.version):
            return False
        self._note_fault(key, fault.e_tag, fault.version, fault.side)
        return True

    def _note_fault(self, key: bytes, e_tag: str | None, version: str | None, side: str) -> None:
        rewrite = side in (OBJECT, UNKNOWN)
        until = self._remote.now() + FAULTY
        self._faults[key] = _Fault(e_tag, version, until, rewrite, side)
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
        """Read images, or headers and some segments, into rows; return which came whole and right.
        A request that runs when ``stop()`` becomes true is left within `POLL` seconds."""
        landed: list[bool] = []
        with closing(asyncio.new_event_loop()) as loop:
            for key, row in zip(keys, rows, strict=True):
                fetch = partial(self._fetch_now, loop, key, stop=stop)
                try:
                    result = self._read_one(fetch, key, row, segments, report)
                except _Failure as failure:
                    result = "error"
                    report(key, failure.reason)
                landed.append(result == "hit")
                nbytes = self._nbytes(segments) if result == "hit" else 0
                self._graph.count(self.tier, "load", result, 1, nbytes)
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
                text = (
                    "%s came wrong twice: %s. It counts as missing for %g s, or until it is saved"
                )
                self._remote.log.warning("faults", text, self._address(key), side, FAULTY)
            if fetched.result == "fault":
                report(key, Reason(reasons.DAMAGED, f"{where}: {side}"))
        if fetched.result == "hit":
            self._believe_there(key)
            return "hit"

        # A lookup of a block that did not come asks again, however that ended.
        believed = self.verdicts.pop(key, 0.0) > 0
        if fetched.result == "miss":
            if believed:
                self.verdicts.pop(FORM, None)  # what took the block may have taken it, too
            report(key, Reason(reasons.EVICTED if believed else reasons.MISSING, where))
        if fetched.result == "late":
            report(key, Reason(reasons.LATE, where))
        return fetched.result

    def _address(self, key: bytes) -> str:
        return f"{self._remote.url}/{self._path(key)}"

    def _sick_side(
        self,
        fetch: Callable[..., _Fetched],
        row: Row,
        segments: Sequence[int] | None,
        fetched: _Fetched,
    ) -> str:
        """Return which side changed the bytes of an object: the MD5 of the bytes that came is
        compared with the ETag, which is the MD5 of an object that was written in one part."""
        if fetched.nbytes != self.form.image_bytes:
            return OBJECT
        e_tag = re.fullmatch('"?([0-9a-f]{32})"?', fetched.e_tag or "")
        if not e_tag:
            return UNKNOWN
        if segments is not None:  # an ETag is that of the whole object
            row = np.empty(self.form.image_bytes, np.uint8)
            try:
                whole = fetch(row, None)
            except _Failure:
                return UNDECIDED
            if whole.result == "hit":
                return PATH
            if whole.result != "fault" or not whole.same_object(fetched):
                return UNDECIDED

        image = row[: self.form.image_bytes].data
        if hashlib.md5(image, usedforsecurity=False).hexdigest() == e_tag[1]:
            return OBJECT
        return PATH if self._has_md5_tags() else UNKNOWN

    def _has_md5_tags(self) -> bool:
        """Return whether the form's ETag is its MD5: not so in a bucket that encrypts by keys of a
        key service, whose ETags look the same."""
        if self._tags_are_md5 is None:
            remote = self._remote
            result = remote.ask(remote.obs.head, remote.store, self._form_path, miss=False)
            if not result:
                return False
            text = self.form.json().encode()
            digest = hashlib.md5(text, usedforsecurity=False).hexdigest()
            self._tags_are_md5 = (result["e_tag"] or "").strip('"') == digest
        return self._tags_are_md5

    def _fetch_now(
        self,
        loop: asyncio.AbstractEventLoop,
        key: bytes,
        row: Row,
        segments: Sequence[int] | None,
        stop: Stop,
    ) -> _Fetched:
        """Fetch a block and wait for it. Raises `_Failure`."""

        def run() -> _Fetched:
            return loop.run_until_complete(self._fetch(key, row, segments, stop))

        result: _Fetched = self._remote.attempt(run, miss=_Fetched("miss"))
        return result

    async def _fetch(
        self, key: bytes, row: Row, segments: Sequence[int] | None, stop: Stop
    ) -> _Fetched:
        """Fetch an object, or its header and some segments, into a row, and check it."""
        form = self.form
        obs = self._remote.obs
        spans = [(0, form.image_bytes if segments is None else HEADER)]
        for part in (form.segments[i] for i in segments or ()):
            spans.append((HEADER + part.offset, HEADER + part.offset + part.nbytes))

        fetched = _Fetched("late")
        for span in spans:
            if stop():
                return fetched
            options = {} if segments is None else {"range": span}
            work = obs.get_async(self._remote.store, self._path(key), options=options)
            try:
                result = await _until_stopped(work, stop)
                fetched = _Fetched("late", result.meta["e_tag"], result.meta["version"])
                fetched = fetched._replace(nbytes=result.meta["size"])
                if fetched.nbytes != form.image_bytes:
                    return fetched._replace(result="fault")
                if not await _receive(result, row, span, stop):
                    return fetched
            except _Stopped:
                return fetched
            except obs.exceptions.BaseError as error:
                if re.search("status code: 416|Invalid range", str(error)):
                    return fetched._replace(result="fault")  # an object of no bytes
                raise

        head = header(row, form)
        right = not isinstance(head, str) and head.key == key
        if not isinstance(head, str) and right:
            right = verify(row, form, head.checksums, head.generation, segments)
        return fetched._replace(result="hit" if right else "fault")

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
            except _Failure as failure:
                self._graph.count(self.tier, "save", "error")
                report(key, failure.reason)
                landed.append(False)
        return landed

    def _write_one(self, key: bytes, row: Row) -> None:
        """Put a block unless a good one is there. Raises `_Failure`."""
        fault = self._fault(key)
        if fault and not fault.rewrite:
            return
        # The store is asked first: no bytes go for what another writer has put.
        if not fault and self._there(key):
            return
        fault = self._fault(key)  # the answer may have been the damaged version
        nbytes = self.form.image_bytes
        self._remote.attempt(self._remote.put, self._path(key), row[:nbytes], fault)
        self._graph.count(self.tier, "save", "hit", 1, nbytes)
        self._believe_there(key)

    def touch(self, *_: object) -> None:
        """Do nothing, as at the end: the bucket's rules say what goes, and connections stay."""

    close = touch

    def statistics(self) -> dict[str, Any]:
        """Return figures next to the graph's counts."""
        failing = self._remote.failures >= FAILURES
        return {"url": self._remote.url, "left_alone": failing, "error": self._remote.last_error}


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
                task.exception()  # it ended in between; asyncio logs errors that no one looks at
            raise _Stopped


async def _receive(found: Any, row: Row, span: tuple[int, int], stop: Stop) -> bool:
    """Copy a body into a span of a row; return False if it was left after ``stop()``."""
    at, end = span
    if end - at <= PIECE + HEADER:  # a stream would copy it once more
        body = await _until_stopped(found.bytes_async(), stop)
        row[at : at + len(body)] = np.frombuffer(body, np.uint8)
        return True
    pieces = aiter(found.stream(PIECE))
    while at < end:
        try:
            piece = await _until_stopped(anext(pieces), stop)
        except StopAsyncIteration:  # the body was too short, which the checksums find
            return True
        row[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
        if at < end and stop():
            return False
    return True


def _check_arguments(url: Any, workers: Any, multipart: Any, settings: dict[str, Any]) -> None:
    """Raise `InvalidTerms` that names the first argument of `Remote` that cannot be right."""
    if not isinstance(url, str):
        raise InvalidTerms(
            f"Expected url= as text, got {type(url).__name__}. Pass s3://bucket/prefix or the like."
        )
    if "?" in url:
        raise InvalidTerms(
            f"Expected url= without a query, got one after {_shown(url)}. Pass settings by name."
        )
    if {".", ".."} & {*unquote(url).split("/")}:
        raise InvalidTerms(
            f"Expected url= without . and .. in its path, got {_shown(url)}. Write the path out."
        )
    whole = isinstance(workers, int) and not isinstance(workers, bool)
    if not whole or not 1 <= workers <= MOST_WORKERS:
        raise InvalidTerms(
            f"Expected workers= as an integer from 1 to {MOST_WORKERS}, got {workers!r}. Pass 8."
        )
    whole = isinstance(multipart, int) and not isinstance(multipart, bool)
    if not whole or not PART <= multipart < 1 << 63:
        raise InvalidTerms(
            f"Expected multipart= as {PART} bytes or more, which one part has, got {multipart!r}. "
            f"Pass 64 << 20."
        )
    for name in ("client_options", "retry_config"):
        if not isinstance(settings.get(name, {}), dict):
            raise InvalidTerms(
                f"Expected {name}= as a dict, got {type(settings[name]).__name__}. Pass the "
                f"entries of obstore that differ from PortaKV's."
            )


def _shown(url: str) -> str:
    """An address without what secrets may be in: all up to the last @, in whatever part of it, and
    the query."""
    head, at, shown = url.rpartition("@")
    if at:
        kind = re.match(r"\w*://", head)
        # After a query has begun, the @ may be its own.
        shown = (kind[0] if kind else "") + ("" if re.search("[?#]", head) else shown)
    return re.split("[?#]", shown)[0]


def _clean(error: BaseException) -> str:
    """The first line of an error without keys of blocks and what secrets may be in: queries, names
    before a host, quoted values, what the server (but for its code) and a provider say."""
    text = str(error).partition("\n")[0]
    code = re.search(r"<Code>(\w+)", str(error))
    text = re.sub(r"^.*(?=Error performing)|(?<=status code: ...).*|[0-9a-f]{64}", "", text)
    text = re.sub(r'(provider: \w+).*|"[^"]*"|\?\S*|//\S*@', r"\1", text)[:300]
    if "HTTP error: builder error" in text:
        text += " (plain http needs client_options={'allow_http': True})"
    return f"{text} ({code[1]})" if code else text
