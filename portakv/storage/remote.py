# SPDX-License-Identifier: Apache-2.0
"""The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

Retry and resume are obstore's, by settings. Here contents are checked, a store that fails is left
alone for a while, and no secret is told.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import unquote
from weakref import WeakSet

import numpy as np

from portakv.errors import StoreError
from portakv.graph.graph import Graph, Link, Node
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.storage.form import BlockForm
from portakv.storage.image import HEADER, Row, header, verify

_log = logging.getLogger(__name__)
Keys = Sequence[bytes]
FORM = b"form.json"  # beside the blocks; it is no key
#: Bytes between two looks at the deadline; seconds that a block is believed to be there, or not to
#: be, and between errors that are told.
PIECE, THERE, MISSING, TOLD = 1 << 20, 60.0, 5.0, 60.0
#: So many failures in a row, and nothing is asked for a second, then twice as long, up to the last.
FAILURES, PAUSE, LONGEST = 5, 1.0, 60.0
#: Settings of obstore, unless others are given; `read_timeout` for reading alone.
CLIENT: Any = {"connect_timeout": "2s", "read_timeout": "2s", "timeout": "60s"}
BACKOFF = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=2), "base": 2}
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=30), "backoff": BACKOFF}


class Remote:
    """Blocks below a prefix of an object store: ``s3://bucket/prefix``, ``gs://``, ``az://``,
    ``http(s)://`` (finds no other forms: it cannot list), ``file:///folder``, or ``memory://``
    (lives as long as this object).

    Args:
        workers: requests at once; multipart: images above so many bytes go in parts.
        settings: what obstore's store takes: region, endpoint, credential_provider, ...; of
            ``client_options`` and ``retry_config`` what is given replaces `CLIENT` and `RETRY`.
    """

    now: Callable[[], float] = time.monotonic
    _process: Any = None  # that made the first one

    def __init__(self, url: str, *, workers: int = 8, multipart: int = 64 << 20, **settings: Any):
        try:
            import obstore
        except (ImportError, OSError) as x:
            raise StoreError(f"A remote tier needs obstore, portakv[remote]: {x}.") from None
        Remote._process = Remote._process or this_process()
        self._obs, self.workers, self._multipart = obstore, workers, multipart
        self.url = _shown(str(url))
        kind, make = self.url.partition(":")[0], self.obs.store.from_url
        client = CLIENT | {"allow_http": kind == "http" or os.environ.get("AWS_ALLOW_HTTP", False)}
        try:
            if workers < 1 or "?" in url or {".", ".."} & {*unquote(url).split("/")}:
                raise ValueError("its path is wrong, or it has a query, or no worker")
            client |= settings.pop("client_options", {})
            settings |= {"retry_config": RETRY | settings.get("retry_config", {})}
            settings |= {"mkdir": True} if kind == "file" else {}
            # Its threads begin here: if they cannot, it panics, and so does each later call.
            self.obs.put(self.obs.store.MemoryStore(), "a", b"")
            self.store = self._sink = make(url, client_options=client, **settings)
            client.pop("read_timeout")  # a body on its way out would end by it, too
            if kind != "memory":
                self._sink = make(url, client_options=client, **settings)
        except BaseException as x:  # also obstore's panic, which is no Exception
            raise StoreError(
                f"{self.url} was to be a tier: {_clean(x)}. Expected an address and settings as "
                f"obstore has them, no . and .. in the path, no query, and a worker or more."
            ) from None
        self._lock, self.failures, self._pause, self._until = threading.Lock(), 0, PAUSE, 0.0
        self.last_error, self._told_at, self._found = "", -TOLD, list[BlockForm]()
        self.shelves = WeakSet[Shelf]()

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    @property
    def obs(self) -> Any:
        """obstore; refused in a process in which its calls would never return."""
        if self._process.forked:
            raise StoreError(f"{self!r} is obstore's, which hangs once forked; start it by spawn.")
        return self._obs

    def ask(self, work: Callable[..., Any], *given: Any, miss: Any = None) -> Any:
        """What ``work`` returns; True if the object exists already; ``miss``, if given, if there is
        none; None if the store fails, which is told once a minute, or is left alone."""
        with self._lock:
            if self.failures >= FAILURES:
                if self.now() < self._until:
                    return None
                # This one is the probe; nobody else asks before it has ended.
                self._pause, self._until = min(LONGEST, 2 * self._pause), self.now() + LONGEST
        result, told = miss, ""
        try:
            result = work(*given)
        except Exception as error:
            missing = isinstance(error, FileNotFoundError) and miss is not None
            if isinstance(error, self.obs.exceptions.AlreadyExistsError):
                result = True  # also after a put whose answer was lost
            elif not missing or re.search("NoSuchBucket|ContainerNotFound", str(error)):
                result, told = None, f"{type(error).__name__}: {_clean(error)}"
        with self._lock:
            self.failures, now = self.failures + 1 if told else 0, self.now()
            self._pause = self._pause if self.failures > FAILURES else PAUSE
            self._until, self.last_error = now + self._pause, told or self.last_error
            if told and now >= self._told_at + TOLD:
                self._told_at = now
                _log.error("%r failed; its blocks are misses: %s", self, told)
        return result

    def put(self, path: str, data: Any) -> bool:
        """Write an object that is not there (a store that cannot tell, or parts: any object)."""
        big = len(data) > self._multipart
        how = {"chunk_size": 16 << 20, "max_concurrency": 4} if big else {"mode": "create"}
        try:
            self.obs.put(self._sink, path, data, use_multipart=big, **how)
        except (NotImplementedError, self.obs.exceptions.NotSupportedError):
            self.obs.put(self._sink, path, data, use_multipart=False)
        return True

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Other forms of the same cache that lie there."""
        self._found, obs, store = [], self.obs, self.store
        lists = type(store).__name__ != "HTTPStore"
        listed = self.ask(obs.list_with_delimiter, store, "1/") if lists else None
        for path in listed["common_prefixes"] if listed else ():
            text = self.ask(lambda at: obs.get(store, at).bytes(), f"{path}/form.json", miss=b"")
            with suppress(StoreError, ValueError):
                other = BlockForm.from_json(bytes(text or b"").decode())
                if path == f"1/{other.name}" and other != form and form.same_cache(other):
                    self._found.append(other)
        return self._found

    def open(self, graph: Graph, _: Any, forms: Any) -> list[Shelf]:
        """A shelf of the first form, which is written, and of the others that `forms` found."""
        own = forms[0]
        some = [x for x in forms if x == own or x in self._found]
        shelves = [Shelf(self, graph, form, form == own) for form in some]
        self.shelves.update(shelves)
        return [*shelves]

    def wipe(self) -> int:
        """Delete all blocks of all forms; how many objects there were. Raises `StoreError`."""
        gone, obs = 0, self.obs
        try:
            for batch in obs.list(self.store, "1/", chunk_size=1000):
                obs.delete(self.store, [one["path"] for one in batch])
                gone += len(batch)
        except Exception as error:
            raise StoreError(f"{self!r} was to be wiped, but {_clean(error)}.") from None
        finally:
            for shelf in [*self.shelves]:
                shelf.verdicts.clear()
        return gone


class Shelf:
    """The blocks of one form in an object store, as `BlockStore` knows a tier."""

    tier, generation = "remote", 0

    def __init__(self, remote: Remote, graph: Graph, form: BlockForm, own: bool) -> None:
        self._remote, self._graph, self.form = remote, graph, form
        link = graph.link(f"remote:{remote.url}", remote.workers)
        # Another one, so that a lookup does not wait for blocks.
        self._heads = graph.link(f"remote:{remote.url} lookup", remote.workers)
        self.link: Callable[[object], Link] = lambda _: link
        self.link_for_write = self.link
        self.writable, self.notes = own, [remote.last_error or "ready"]
        # Until when a block, or the form, is believed to be there; negative: until when it is not.
        self.verdicts: Bounded[bytes, float] = Bounded("remote verdicts", 1 << 17)

    def has(self, keys: Keys, timeout: float | None = None) -> list[bool]:
        """Which blocks are there; not those about which the store has said nothing after
        ``timeout`` seconds. What is not known is asked in a node for each block."""
        graph, verdicts, now = self._graph, self.verdicts, self._remote.now()
        until, ask = graph.clock() + (3e9 if timeout is None else timeout), self._there
        left = [key for key in keys if abs(verdicts.get(key, 0.0)) <= now]
        works = [lambda _, mask, key=key: mask & ask(key) for key in left]
        nodes = [Node(work, 1, link=self._heads, name="lookup") for work in works]
        graph.submit(nodes, priority="urgent")
        for node in nodes:
            node.wait(max(0.0, until - graph.clock()))
        for node in nodes:
            graph.cancel(node)
        return self.known(keys)

    def known(self, keys: Keys) -> list[bool]:
        """Which blocks are believed to be there."""
        now = self._remote.now()
        return [self.verdicts.get(key, 0.0) > now for key in keys]

    def wants(self, keys: Keys) -> list[bool]:
        """Which blocks a save is to bring; the others need not be asked about."""
        return [not known for known in self.known(keys)]

    def _there(self, key: bytes) -> bool:
        until, now = self.verdicts.get(key, 0.0), self._remote.now()
        if abs(until) <= now:
            head, store = self._remote.obs.head, self._remote.store
            found = self._remote.ask(head, store, self._path(key), miss=False)
            if found is None:
                return False
            until = self.verdicts[key] = now + THERE if found else -now - MISSING
        return until > 0

    def _path(self, key: bytes) -> str:
        return f"1/{self.form.name}/{key.hex()[:2]}/{key.hex()}"

    def read(self, keys: Keys, rows: Sequence[Row], segments: Any = None, stop: Any = bool) -> Any:
        """Read images, or headers and some segments, into rows; which came whole and right."""
        ask, count, landed, form = self._remote.ask, self._graph.count, list[bool](), self.form
        nbytes = sum(form.segments[i].nbytes for i in segments or range(len(form.segments)))
        for key, row in zip(keys, rows, strict=True):
            fetch = partial(ask, self._fetch, key, row, segments, stop, miss=("miss", None))
            result, tag = fetch() or ("error", None)
            if result == "fault":
                count(self.tier, "load", "refetched")
                result, again = fetch() or ("error", None)
                if (result, again) == ("fault", tag):
                    ask(self._remote.obs.delete, self._remote.store, [self._path(key)], miss=True)
            landed.append(result == "hit")
            if landed[-1]:
                self.verdicts[key] = self._remote.now() + THERE
            elif self.verdicts.pop(key, 0.0) > 0 and result == "miss":
                self.verdicts.pop(FORM, None)  # whoever took the block may have taken it, too
            count(self.tier, "load", result, 1, landed[-1] * nbytes)
        return landed

    def _fetch(self, key: bytes, row: Row, segments: Any, stop: Any) -> tuple[str, Any]:
        """``hit``, ``late`` or ``fault``, and the object's ETag."""
        form, tag, obs = self.form, None, self._remote.obs
        spans = [(0, form.image_bytes if segments is None else HEADER)]
        for x in (form.segments[i] for i in segments or ()):
            spans.append((HEADER + x.offset, HEADER + x.offset + x.nbytes))
        for at, end in spans:
            if stop():
                return "late", tag
            options = {} if segments is None else {"range": (at, end)}
            try:
                found = obs.get(self._remote.store, self._path(key), options=options)
            except obs.exceptions.BaseError as error:
                if re.search("status code: 416|Invalid range", str(error)):
                    return "fault", tag  # an object of no bytes
                raise
            tag = found.meta["e_tag"]
            if found.meta["size"] != form.image_bytes:
                return "fault", tag
            small = end - at <= PIECE + HEADER  # a stream would copy it once more
            for piece in (found.bytes(),) if small else found.stream(PIECE):
                row[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
                if at < end and stop():
                    return "late", tag
        head = header(row, form)
        if isinstance(head, str) or head.key != key:
            return "fault", tag
        well = verify(row, form, head.checksums, head.generation, segments)
        return "hit" if well else "fault", tag

    def write(self, _: Link, keys: Keys, rows: Sequence[Row], *known: object) -> list[bool]:
        """Put sealed images, and the form beside them; which are there now."""
        ask, put, nbytes = self._remote.ask, self._remote.put, self.form.image_bytes
        if not self.known([FORM])[0]:
            path, text = f"1/{self.form.name}/{FORM.decode()}", self.form.json().encode()
            if ask(put, path, text):
                self.verdicts[FORM] = self._remote.now() + THERE
        landed, count = list[bool](), self._graph.count
        for key, row in zip(keys, rows, strict=True):
            landed.append(self._there(key))  # asked: no bytes go for what somebody else has put
            if not landed[-1]:
                landed[-1] = well = bool(ask(put, self._path(key), row[:nbytes]))
                count(self.tier, "save", "hit" if well else "error", 1, well * nbytes)
                if well:
                    self.verdicts[key] = self._remote.now() + THERE
        return landed

    def touch(self, _: Any = None) -> None:
        """Nothing, as at the end: the bucket's rules say what goes, and connections alone stay."""

    close = touch

    def statistics(self) -> dict[str, Any]:
        """Beside the graph's counts."""
        failing = self._remote.failures >= FAILURES
        return {"url": self._remote.url, "left_alone": failing, "error": self._remote.last_error}


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
    text, code = str(error).partition("\n")[0], re.search(r"<Code>(\w+)", str(error))
    text = re.sub(r"^.*(?=Error performing)|(?<=status code: ...).*|[0-9a-f]{64}", "", text)
    text = re.sub(r'(provider: \w+).*|"[^"]*"|\?\S*|//\S*@', r"\1", text)[:300]
    if "HTTP error: builder error" in text:
        text += " (plain http needs client_options={'allow_http': True})"
    return f"{text} ({code[1]})" if code else text
