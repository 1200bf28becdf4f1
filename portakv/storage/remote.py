# SPDX-License-Identifier: Apache-2.0
"""The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

Retry and resume are obstore's, by settings. This module makes requests, stops them for a while
after failures, and shows no secret. `portakv.storage.remote_store` has the blocks of a form.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import unquote
from weakref import WeakSet

from portakv.arguments import kind_of
from portakv.errors import InvalidTerms, StoreError
from portakv.extras import installing
from portakv.graph.graph import Graph
from portakv.runtime import resources
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage import reasons
from portakv.storage.compressed import Compressor, check_compress
from portakv.storage.form import BlockForm, size_notes
from portakv.storage.reasons import Reason
from portakv.storage.remote_store import Failure, Fault, RemoteStore, new_loop

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


class _CircuitBreaker:
    """The failures of a store in a row, after which requests to it stop for a while.

    Attributes:
        last_error: how the last failed request failed, without secrets.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.last_error = ""
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._pause = PAUSE
        self._until = 0.0  # when a store that is left alone is tried again

    @property
    def open(self) -> bool:
        """Return True while the store gets no requests, except for probes."""
        return self._failures >= FAILURES

    def admits(self) -> bool:
        """Return True if a request may go out now; while the breaker is open it is a probe."""
        with self._lock:
            if not self.open:
                return True
            if self._clock() < self._until:
                return False
            # This request is the probe; no other request goes out before it has ended.
            self._pause = min(LONGEST, 2 * self._pause)
            self._until = self._clock() + LONGEST
            return True

    def note(self, error: str | None) -> None:
        """Count a failure, or begin anew after a success."""
        with self._lock:
            self._failures = 0 if error is None else self._failures + 1
            if self._failures <= FAILURES:
                self._pause = PAUSE
            self._until = self._clock() + self._pause
            if error is not None:
                self.last_error = error


class _Puts:
    """Writes objects to obstore's store ``sink``, those above ``multipart`` bytes in parts."""

    def __init__(self, sink: Any, multipart: int) -> None:
        self._sink = sink
        self._multipart = multipart
        self._conditions = True  # the store takes puts with a condition, as far as is known

    def put(self, obs: Any, path: str, data: Any, replaces: Fault | None) -> bool:
        """Write an object once, by obstore; return True if this put has shown that the store takes
        no conditions. Raises the errors of obstore."""
        if len(data) > self._multipart:
            parts = {"chunk_size": PART, "max_concurrency": 4}
            obs.put(self._sink, path, data, use_multipart=True, **parts)
            return False

        put = partial(obs.put, self._sink, path, data, use_multipart=False)
        if not self._conditions:
            put()
            return False
        mode: Any = "create"
        if replaces:
            known = {"e_tag": replaces.e_tag, "version": replaces.version}
            mode = {name: value for name, value in known.items() if value} or "overwrite"
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
            self._conditions = False
            return True
        return False


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

        self.store, sink = uninterrupted(partial(self._connect, url, settings))
        self._puts = _Puts(sink, multipart)
        self._breaker = _CircuitBreaker(lambda: self.now())
        self.log = RateLimitedLog(_log, lambda: self.now())
        self._present: list[BlockForm] = []  # at the last look
        self._next_search = 0.0  # not before this time
        self.tier_stores: WeakSet[RemoteStore] = WeakSet()

    @property
    def left_alone(self) -> bool:
        """Return True while the store gets no requests, after failures in a row."""
        return self._breaker.open

    @property
    def last_error(self) -> str:
        """Return how the last failed request failed, without secrets; empty if none failed."""
        return self._breaker.last_error

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
        if not self._breaker.admits():
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
        self._note(failure)
        if failure:
            raise Failure(failure)
        return result

    def _reason(self, error: Exception) -> Reason:
        """Return how a request failed, without secrets."""
        refusals = self.obs.exceptions.PermissionDeniedError, PermissionError
        refused = isinstance(error, (*refusals, self.obs.exceptions.UnauthenticatedError))
        refused = refused or re.search(r"status code: 4(?!04|08|09|29)\d\d", str(error)) is not None
        kind = reasons.REFUSED if refused else reasons.UNREACHABLE
        return Reason(kind, f"{self.url}: {type(error).__name__}: {_clean(error)}")

    def _note(self, failure: Reason | None) -> None:
        """Count a failure, or begin anew after a success; log the failure."""
        if failure is None:
            self._breaker.note(None)
            return
        self._breaker.note(failure.where.removeprefix(f"{self.url}: "))
        text = "%r failed; its blocks are misses, and saves do not write there: %s"
        self.log.warning("failed", text, self, self.last_error, lines=1)

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
                replaced_any = self._puts.put(self.obs, path, data, replaces)
            except self.obs.exceptions.AlreadyExistsError as error:
                # S3 says so as well if a delete that ran meanwhile has won (409), and the object
                # exists after a put whose answer was lost.
                conflict = error
            else:
                if replaced_any:
                    self.log.warning("conditions", NO_CONDITIONS, self)
                return True
            if self._is_there(path, replaces):
                return True
        raise conflict

    def _is_there(self, path: str, fault: Fault | None) -> bool:
        """Return whether the store has an object, other than a faulty version."""
        try:
            meta = self.obs.head(self.store, path)
        except FileNotFoundError:
            return False
        return fault is None or (meta["e_tag"], meta["version"]) != (fault.e_tag, fault.version)

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
        lists = self.obs.list_with_delimiter_async
        listed = self.ask(_within, self.search_seconds, lists, self.store, "1/")
        for path in listed["common_prefixes"] if listed else ():
            if path in known:  # a name is a checksum of the form
                self._present.append(known[path])
                continue
            left = until - self.now()
            if left <= 0:
                continue
            text = self.ask(_within, left, self._read_small, f"{path}/form.json", miss=b"")
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


def _within(seconds: float, work: Callable[..., Awaitable[Any]], *terms: Any) -> Any:
    """Return the result of a request; raise `TimeoutError` if it does not end in time."""

    async def request() -> Any:
        try:
            return await asyncio.wait_for(work(*terms), seconds)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no answer in {seconds:.1f} s") from None

    def run() -> Any:
        with closing(new_loop()) as loop:
            return loop.run_until_complete(request())

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:  # a thread runs one event loop at a time
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()
    return run()


def check_remote(
    url: object,
    workers: Any = 8,
    multipart: Any = PART,
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
