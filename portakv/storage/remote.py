# SPDX-License-Identifier: Apache-2.0
"""The tier of a block store that lies in an object store: S3, GCS, Azure, HTTP, a folder, memory.

Retry and resume are obstore's, by settings. Here contents are checked, a store that fails is left
alone for a while, and no secret is told.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from portakv.errors import StoreError
from portakv.graph.graph import Graph, Link
from portakv.runtime.bounded import Bounded
from portakv.storage.form import BlockForm
from portakv.storage.image import HEADER, Row, header, verify

_log = logging.getLogger(__name__)
Keys = Sequence[bytes]
Forms = Sequence[BlockForm]
#: Bytes between two looks at deadline and cancel; for how many seconds it is believed that a block
#: is there, or is not; how often an error is told.
PIECE, THERE, MISSING, TOLD = 1 << 20, 60.0, 5.0, 60.0
#: So many failures in a row, and nothing is asked for a second, then twice as long, up to the last.
FAILURES, PAUSE, LONGEST = 5, 1.0, 60.0
#: Settings of obstore, unless others are given; `read_timeout` for reading alone.
CLIENT: Any = {"connect_timeout": "2s", "read_timeout": "2s", "timeout": "60s"}
BACKOFF = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=2), "base": 2}
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=30), "backoff": BACKOFF}


class Remote:
    """Blocks below a prefix of an object store: ``s3://bucket/prefix``, ``gs://``, ``az://``,
    ``http(s)://`` (finds no other forms: it cannot list), ``file:///folder``, ``memory://`` (lives
    as long as this object), or a store object of obstore.

    Args:
        workers: requests at once; multipart: images above so many bytes go in parts.
        settings: what obstore's store takes: region, endpoint, credential_provider, ...; of
            ``client_options`` and ``retry_config`` what is given replaces `CLIENT` and `RETRY`.
    """

    now: Callable[[], float] = time.monotonic

    def __init__(
        self, url: Any, *, workers: int = 8, multipart: int = 64 << 20, **settings: Any
    ) -> None:
        try:
            import obstore
        except ImportError:
            raise StoreError("A remote tier needs obstore; install portakv[remote].") from None
        self.obs: Any = obstore
        self.workers, self._multipart = workers, multipart
        self.url, self.store, self._sink = _opened(url, settings)
        self._lock, self.failures, self._pause, self._until = threading.Lock(), 0, 0.0, 0.0
        self.last_error, self._told_at, self._found = "", -TOLD, list[BlockForm]()
        self.heads = ThreadPoolExecutor(workers, "portakv remote")

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def ask(self, work: Callable[..., Any], *given: Any, miss: Any = None) -> Any:
        """What ``work`` returns; True if the object exists already, ``miss`` if it does not exist;
        None if the store fails, which is told once a minute, or is left alone."""
        with self._lock:
            if self.failures >= FAILURES:
                if self.now() < self._until:
                    return None
                # This one is the probe, and has failed until it ends well.
                self._pause = min(LONGEST, 2 * self._pause)
                self._until = self.now() + self._pause
        well = False
        try:
            result, well = work(*given), True
            return result
        except Exception as error:
            there = isinstance(error, self.obs.exceptions.AlreadyExistsError)
            gone = isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)
            if well := there or gone:
                return there or miss  # there: also after a put whose answer was lost
            self.last_error, now = f"{type(error).__name__}: {_clean(error)}", self.now()
            with self._lock:
                if tell := now >= self._told_at + TOLD:
                    self._told_at = now
            if tell:
                _log.error("%r failed; its blocks are misses: %s", self, self.last_error)
            return None
        finally:
            with self._lock:
                self.failures = 0 if well else self.failures + 1
                if self.failures == FAILURES:
                    self._pause, self._until = PAUSE, self.now() + PAUSE

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
        self._found, lists = [], type(self.store).__name__ != "HTTPStore"
        listed = self.ask(self.obs.list_with_delimiter, self.store, "1/") if lists else None
        for path in listed["common_prefixes"] if listed else ():
            text = self.ask(lambda at: self.obs.get(self.store, at).bytes(), f"{path}/form.json")
            with suppress(StoreError, ValueError):
                other = BlockForm.from_json(bytes(text or b"").decode())
                if path == f"1/{other.name}" and other != form and form.same_cache(other):
                    self._found.append(other)
        return self._found

    def open(self, graph: Graph, rows: Any, forms: Forms, generation: int = 0) -> list[Shelf]:
        """A shelf of the first form, which is written, and of the others that `forms` found."""
        here = [forms[0], *(form for form in forms[1:] if form in self._found)]
        return [Shelf(self, graph, form, form == forms[0]) for form in here]

    def wipe(self) -> int:
        """Delete all blocks of all forms; how many objects there were. Raises `StoreError`."""
        gone = 0
        try:
            for batch in self.obs.list(self.store, "1/"):
                self.obs.delete(self.store, [one["path"] for one in batch])
                gone += len(batch)
        except Exception as error:
            raise StoreError(f"{self!r} was to be wiped, but {_clean(error)}.") from None
        return gone


class Shelf:
    """The blocks of one form in an object store, as `BlockStore` knows a tier."""

    tier, generation = "remote", 0

    def __init__(self, remote: Remote, graph: Graph, form: BlockForm, own: bool) -> None:
        self._remote, self._graph, self.form = remote, graph, form
        self._link = graph.link("remote", width=remote.workers)
        self.writable, self._has_form, self.notes = own, False, [remote.last_error or "ready"]
        # Until when a block is believed to be there; negative: until when it is not.
        self._verdicts: Bounded[bytes, float] = Bounded("remote verdicts", 1 << 17)

    def has(self, keys: Keys) -> list[bool]:
        """Which blocks are there, up to the first that is not; asked in batches."""
        there, width = 0, self._remote.workers
        for at in range(0, len(keys), width):
            batch = keys[at : at + width]
            way = map if all(self.known(batch)) else self._remote.heads.map
            there += [*way(self._there, batch), False].index(False)
            if there < at + len(batch):
                break
        return [at < there for at in range(len(keys))]

    def known(self, keys: Keys) -> list[bool]:
        """Which blocks are believed to be there."""
        now = self._remote.now()
        return [self._verdicts.get(key, 0.0) > now for key in keys]

    def _there(self, key: bytes) -> bool:
        until, now = self._verdicts.get(key, 0.0), self._remote.now()
        if abs(until) <= now:
            head, store = self._remote.obs.head, self._remote.store
            found = self._remote.ask(head, store, self._path(key), miss=False)
            if found is None:
                return False
            until = self._verdicts[key] = now + THERE if found else -now - MISSING
        return until > 0

    def _path(self, key: bytes) -> str:
        return f"1/{self.form.name}/{key.hex()[:2]}/{key.hex()}"

    def link(self, _: object) -> Link:
        """What a block is read and written by."""
        return self._link

    link_for_write = link

    def read(self, keys: Keys, rows: Sequence[Row], segments: Any = None, stop: Any = None) -> Any:
        """Read images, or headers and some segments, into rows; which came whole and right."""
        return [self._read(x, y, segments, stop) for x, y in zip(keys, rows, strict=True)]

    def _read(self, key: bytes, row: Row, segments: Any, stop: Any, before: Any = ()) -> bool:
        remote, count = self._remote, self._graph.count
        found = remote.ask(self._read_once, key, row, segments, stop, miss=("miss", None))
        result, tag = found or ("error", None)
        if result == "fault" and not before:
            count(self.tier, "load", "refetched")
            return self._read(key, row, segments, stop, (tag,))
        if result == "fault" and before == (tag,):
            remote.ask(remote.obs.delete, remote.store, [self._path(key)])
        if result != "hit":
            self._verdicts.pop(key, None)
        hit, every = bool(result == "hit"), self.form.segments
        nbytes = sum(every[i].nbytes for i in segments or range(len(every)))
        count(self.tier, "load", result, 1, nbytes if hit else 0)
        return hit

    def _read_once(self, key: bytes, row: Row, segments: Any, stop: Any) -> tuple[str, Any]:
        """``hit``, ``late`` or ``fault``, and the object's ETag."""
        form, tag = self.form, None
        spans = [(0, form.image_bytes)] if segments is None else [(0, HEADER)]
        for x in (form.segments[i] for i in segments or ()):
            spans.append((HEADER + x.offset, HEADER + x.offset + x.nbytes))
        for at, end in spans:
            options = {} if segments is None else {"range": (at, end)}
            found = self._remote.obs.get(self._remote.store, self._path(key), options=options)
            tag = found.meta["e_tag"]
            if found.meta["size"] != form.image_bytes:
                return "fault", tag
            small = end - at <= PIECE + HEADER  # a stream would copy it once more
            for piece in (found.bytes(),) if small else found.stream(PIECE):
                row[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
                if stop is not None and stop():
                    return "late", tag
        head = header(row, form)
        if isinstance(head, str) or head.key != key:
            return "fault", tag
        well = verify(row, form, head.checksums, head.generation, segments)
        return "hit" if well else "fault", tag

    def write(self, _: Link, keys: Keys, rows: Sequence[Row], *known: object) -> list[bool]:
        """Put sealed images, and once the form beside them; which are there now."""
        ask, put, nbytes = self._remote.ask, self._remote.put, self.form.image_bytes
        if not self._has_form:
            path, text = f"1/{self.form.name}/form.json", self.form.json().encode()
            self._has_form = ask(put, path, text) is True
        landed = []
        for key, row in zip(keys, rows, strict=True):
            landed.append(self._there(key))  # asked: no bytes go for what somebody else has put
            if not landed[-1]:
                landed[-1] = well = ask(put, self._path(key), row[:nbytes]) is True
                counted = ("hit", 1, nbytes) if well else ("error", 1)
                self._graph.count(self.tier, "save", *counted)
                if well:
                    self._verdicts[key] = self._remote.now() + THERE
        return landed

    def touch(self, keys: Keys) -> None:
        """Nothing: the bucket's rules say what goes."""

    def close(self) -> None:
        """Nothing: no more than connections is held."""

    def statistics(self) -> dict[str, Any]:
        """Beside the graph's counts."""
        failing = self._remote.failures >= FAILURES
        return {"url": self._remote.url, "left_alone": failing, "error": self._remote.last_error}


def _clean(error: Exception) -> str:
    """The first line of an error without keys of blocks and what secrets may be in: queries, names
    before a host, and the server's text but for its code."""
    text, code = str(error).partition("\n")[0], re.search(r"<Code>(\w+)", str(error))
    text = re.sub(r"^.*(?=Error performing)|(?<=status code: ...).*|\?\S*|//\S*@", "", text)
    text = re.sub("[0-9a-f]{64}", "KEY", text)[:300]
    return f"{text} ({code[1]})" if code else text


def _opened(url: Any, settings: dict[str, Any]) -> tuple[str, Any, Any]:
    """How a store is shown, the store to read from, and that to write to."""
    from obstore import store as kinds

    make: Any = kinds.from_url
    if not isinstance(url, str):
        return repr(url), url, url
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if {".", ".."} & set(unquote(parts.path).split("/")):
        raise StoreError(f"{shown} was to be a tier; expected a path without . and .. in it.")
    try:
        if parts.scheme in ("memory", "file"):
            memory = parts.scheme == "memory"
            store: Any = kinds.MemoryStore() if memory else make(url, mkdir=True, **settings)
            return shown, store, store
        client = CLIENT | {"allow_http": parts.scheme == "http"}
        client |= settings.pop("client_options", {})
        settings["retry_config"] = RETRY | settings.get("retry_config", {})
        store = make(url, client_options=client, **settings)
        client.pop("read_timeout")  # a body on its way out would end by it, too
        return shown, store, make(url, client_options=client, **settings)
    except Exception as error:
        why = f"{shown} was to be a tier, and obstore refused it or its settings: {_clean(error)}."
        raise StoreError(why) from None
