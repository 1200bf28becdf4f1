# SPDX-License-Identifier: Apache-2.0
"""`PageStore`: pages of bytes in an engine's host memory, of one size or of any. `PageTier`,
`PagePool` and `PageTasks` save and load them as engines ask for it.

A page is opaque: nothing is known of its bytes but their number. Engines that have a tier of host
memory hand over such pages by key.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import compress
from math import gcd
from pathlib import Path
from shutil import rmtree
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import instance, invalid, items, octets, seconds, text, whole
from portakv.errors import InvalidTerms, PortaKVError, StoreError, TransferTimeout
from portakv.runtime.bounded import Bounded, Until
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.bucket import MISSING, look_up
from portakv.serving.groups import Validity
from portakv.serving.local import PATIENCE, StoreTerms, found_in, log_start, open_store
from portakv.serving.server.client import GRACE, ServerBlocks, SharedStore
from portakv.serving.worker import Calls, is_done
from portakv.storage import BlockForm, BlockStore
from portakv.storage.calls import Change
from portakv.storage.eviction import Pins
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Keys
from portakv.storage.tiers.folder import claim, unusable
from portakv.storage.tiers.folder import forms_in as every_form_in
from portakv.storage.work import Handle, Mask
from portakv.tasks import End, Limit, Priority, Signal, TaskGroup, Wait, runtime
from portakv.view import IdList, KVView

# ------------------------------------------------------------------------------------------------
# The sizes of pages, their keys, and the forms under which pages lie in folders.

Result = TypeVar("Result")
_log = RateLimitedLog(logging.getLogger(__name__))
#: Bytes of a key of a store; keys of other lengths are hashed.
KEY = 32


def page_key(key: bytes) -> bytes:
    """Return the 32 bytes under which the page of a key of any length is stored."""
    return key if len(key) == KEY else blake2b(key, digest_size=KEY).digest()


def check_shared(terms: StoreTerms) -> None:
    """Raise `InvalidTerms` for terms of pages that processes cannot share through a folder."""
    if not terms.shared or not terms.folders or terms.bucket is not None:
        raise InvalidTerms(
            "Expected terms with shared and a folder, and without a bucket, which processes share "
            "anyway, got others. Correct them."
        )


class PageSize(NamedTuple):
    """The size of pages.

    Attributes:
        nbytes: bytes of a page.
        runs: into how many runs of equal length a page is cut, each at a separate address, such as
            one for each layer.
    """

    nbytes: int
    runs: int = 1

    def form(self, model: str, identity: str = "") -> BlockForm:
        """Return the form of stored pages; that of another model or identity differs.

        Raises `InvalidTerms` for a size that no page can have.
        """
        whole("nbytes", self.nbytes, 1)
        whole("runs", self.runs, 1, 1 << 16)
        if self.nbytes % self.runs:
            expected = f"a multiple of the {self.runs} runs of a page"
            raise invalid("nbytes", expected, self.nbytes)
        runs = (0, self.runs, self.runs)
        width = (self.nbytes // self.runs,)
        notes = f"page of an engine {text('identity', identity, least=0, most=1 << 15)}".rstrip()
        layout = "block layer page"
        return BlockForm(model, "uint8", 1, width, 1, runs, (0, 1, 1), layout, notes=notes)


def forms_in(folder: str, model: str, identity: str = "") -> Iterator[BlockForm]:
    """Yield the forms of the pages that lie in a folder, of a model and an identity."""
    for form in every_form_in(Path(folder)):
        if size_of(form).form(model, identity) == form:
            yield form


def remove_pages(folder: str, model: str, identity: str, sizes: Iterable[PageSize]) -> None:
    """Remove the pages of a model and an identity from a folder that no store has open: those of
    some sizes, which lie there, and those of all other sizes.

    Raises `StoreBusy` for a folder that another process has, and `StoreError` for files that cannot
    be removed.
    """
    place = Path(folder)
    claimed = claim(place)
    try:
        names = {form.name for form in forms_in(folder, model, identity)}
        for name in names.union(size.form(model, identity).name for size in sizes):
            rmtree(place / name)
    except OSError as error:
        raise unusable(place, error) from None
    finally:
        os.close(claimed)


def size_of(form: BlockForm) -> PageSize:
    """Return the size of the pages that a form would have."""
    runs = form.layers[1]
    return PageSize(runs * form.widths[0], runs)


def sizes_in(terms: StoreTerms, model: str, identity: str = "") -> list[PageSize]:
    """Return the sizes of the pages that lie in the folders of terms.

    A store that begins with these sizes finds all pages of earlier processes. Sizes for which
    ``staging`` has no room are left out.
    """
    sizes = dict[PageSize, None]()
    for folder in terms.folders:
        for form in forms_in(folder, model, identity):
            if form.image_bytes <= terms.staging:
                sizes[size_of(form)] = None
    return [*sizes]


# ------------------------------------------------------------------------------------------------
# A save or a load of pages.


class PageJob(End[None]):
    """A save or a load of pages, and its end. Any thread may call.

    Args:
        limit: seconds after which the job is late.

    Attributes:
        kind: "save" or "load".
        keys: as the caller passed them.
        tag: what the caller passed to tell its jobs apart.
        nbytes: bytes of a page.
        began: when the call was made, in seconds of `time.monotonic`.
        seconds: from then to the end; 0 before the end.
        landed: the pages that are stored, or were loaded, bool ``[keys]``; none before the end.
        given_up: a tier held a save for too long. Pages that are being written may land later.
    """

    def __init__(
        self,
        kind: Literal["save", "load"],
        keys: Keys,
        nbytes: int,
        tag: Hashable,
        limit: float = math.inf,
    ) -> None:
        super().__init__(runtime())
        self.kind = kind
        self.keys = keys
        self.tag = tag
        self.nbytes = nbytes
        self.began = time.monotonic()
        self.seconds = 0.0
        self.landed: Mask = np.zeros(len(keys), np.bool_)
        self.given_up = False
        self._limit = limit
        self._handle: Handle | None = None

    def __repr__(self) -> str:
        return f"PageJob({self.kind}, {len(self.keys)} pages, tag={self.tag!r})"

    def follow(self, handle: Handle | None) -> PageJob:
        """End with the transfer of a store, or now without one; return the job."""
        self._handle = handle
        if handle is None:
            self._end()
            return self
        handle.when_ended(self._end)
        if not self.ended and self._limit < math.inf:
            self._runtime.start(self._expire(handle))
        return self

    async def _expire(self, handle: Handle) -> None:
        """Cancel a job that is late, and end a save of which nothing reads the pages any more."""
        wait = Wait(until=self._runtime.time() + self._limit)
        self.on_end(wait.wake)
        if await wait:
            return
        handle.cancel()
        while not self.ended and handle.released is not None:
            if is_done(handle.released):
                self._end(given_up=True)
            await Wait(until=self._runtime.time() + SOON)

    def _end(self, given_up: bool = False) -> None:
        """Note the end, once."""
        with self._runtime.lock:
            if self.ended:
                return
            if self._handle is not None:
                self.landed = self._handle.landed
            self.given_up = given_up
            self.seconds = time.monotonic() - self.began
            self.settle(None, None)


#: Seconds between two looks at a save that is late.
SOON = 0.1
#: Seconds after which a save gives up the pages that are not stored: a disk that hangs must not
#: hold the engine's pages for ever.
SAVE = 60.0
#: A number for each page, or for each run of each page.
Addresses: TypeAlias = "Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any]"


class Usage(NamedTuple):
    """How full the farthest tier with a bound is: the disk, or without one the host tier.

    Attributes:
        used: bytes of its stored images.
        capacity: the bytes that it may have.
    """

    used: int
    capacity: int


#: The store of the pages of one size.
PageBlocks: TypeAlias = "FormStore | ServerBlocks"


class PageStore:
    """Pages of bytes in the host memory of an engine, in the stores of PortaKV.

    The store is in this process, or with ``shared`` that of a server. No call but the constructor,
    `pages` of a new size and `close` waits for anything. A page that is not there, is damaged, or
    comes too late, does not land.

    Args:
        terms: where pages are stored, without an encoding. ``block_size`` and ``by_layer`` have no
            meaning for pages. With ``shared`` they have a folder, and each process has equal terms.
        model: the name of the model; pages of another model are not found.
        sizes: of the pages. `pages` may add others later, unless the terms have ``shared``: then
            they are equal in all processes.
        identity: what else fixes the bytes of a page, such as layout, dtype and parallelism. Pages
            of another identity are not found.
        patience: seconds to wait for a folder that another process has, or for a server. Without
            one, pages are missing until one serves.

    Raises:
        InvalidTerms: wrong arguments; sizes that no page has; pages that a server of the folder
            refuses, such as those of another model.
        StoreError, StoreBusy: memory for no page; a folder that another process has, or that cannot
            be used.

    Attributes:
        terms: where pages are stored.
        remote: another process answers some calls, and its index follows the end of a save.
    """

    def __init__(
        self,
        terms: StoreTerms,
        model: str,
        sizes: Iterable[PageSize | int] = (),
        *,
        identity: str = "",
        patience: float = PATIENCE,
    ) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        if terms.encoding is not None:  # it takes rows of a known type
            expected = "None, as pages are stored as they are"
            raise invalid("encoding", expected, terms.encoding, "Leave it out.")
        self.remote = bool(terms.shared)
        if self.remote:
            check_shared(terms)
        self._model = text("model", model)
        self._identity = text("identity", identity, least=0, most=1 << 15)
        self._patience = seconds("patience", patience)
        self._lock = threading.Lock()  # of what is open
        self._sizes = dict[PageSize, Pages]()
        self._store: BlockStore | SharedStore | None = None
        for size in items("sizes", sizes, "sizes of pages"):
            made = size if isinstance(size, PageSize) else PageSize(whole("sizes", size, 1))
            form = made.form(self._model, self._identity)
            self._sizes[made] = Pages(made, form, self.terms.deadline)
        if self._sizes:
            with self._lock:
                self._open()

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def serves(self) -> bool:
        """Return whether this process has the store; others may."""
        store = self._store
        return store.serves if isinstance(store, SharedStore) else True

    def every(self) -> list[Pages]:
        """Return the pages of each size."""
        return [*self._sizes.values()]

    def pages(self, nbytes: int, runs: int = 1) -> Pages:
        """Return the pages of a size.

        A size that is new opens the store again, with this size too: that waits for the jobs in
        flight, and pages that only the host tier had are gone. Other calls find nothing meanwhile.

        Raises `InvalidTerms`, `StoreError` and `StoreBusy` as the constructor does, and
        `InvalidTerms` for a size that a shared store lacks. The store is closed then, and the next
        call opens it again.
        """
        size = PageSize(nbytes, runs)
        with self._lock:
            found = self._sizes.get(size)
            is_new = found is None
            if found is None:
                if self.remote:
                    raise InvalidTerms(
                        f"Expected a size of {[*self._sizes]}, got {size}. Pass all sizes when the "
                        f"store is made."
                    )
                form = size.form(self._model, self._identity)
                found = Pages(size, form, self.terms.deadline)
                nbytes = form.image_bytes
                if nbytes > self.terms.staging:  # before anything is closed
                    raise StoreError(
                        f"Expected staging to have room for a page of {nbytes} bytes, got "
                        f"{self.terms.staging}. Give it more."
                    )
            if found.blocks is None:
                self._close(self._patience)
                self._sizes[size] = found
                try:
                    self._open()
                except PortaKVError:
                    if is_new:
                        del self._sizes[size]  # the others can be opened without it
                    raise
            return found

    def changes(self) -> list[Change]:
        """Return the pages that were stored or lost since the last call, in order.

        The first call returns none. Their keys are those of `page_key`. Changes of a shared store
        are those of any process.
        """
        store = self._store
        try:
            return [] if store is None else store.listen()
        except PortaKVError:  # it was closed
            return []

    def count(self) -> int | None:
        """Return the pages that the disk has, of a shared store those that are known here; None
        while the store is not open."""
        return None if self._store is None else found_in(self.statistics(), 1)

    def usage(self) -> Usage:
        """Return how full the store is."""
        disk = bool(self.terms.folders)
        capacity = self.terms.capacity if disk else self.terms.host
        store = self._store
        if store is None:
            return Usage(0, capacity)
        if isinstance(store, BlockStore) and not disk:
            return Usage(store.rows.nbytes_by_state()["kept"], capacity)
        images = {pages.form.name: pages.form.image_bytes for pages in self.every()}
        slots = [each for each in store.statistics()["disk_slots"] if each["state"] == "used"]
        return Usage(sum(each["value"] * images[each["form"]] for each in slots), capacity)

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of the store, as `BlockStore.statistics`; none while it is closed. Of
        a shared store these are the slots of the pages that are known here."""
        store = self._store
        return {} if store is None else store.statistics()

    def close(self, timeout: float = 10.0) -> None:
        """End the jobs in flight within so many seconds, and close the store.

        Raises `TransferTimeout` as `BlockStore.close` does, and if the folder has not opened by
        then.
        """
        timeout = seconds("timeout", timeout)
        until = time.monotonic() + timeout
        if not self._lock.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
            raise TransferTimeout(
                f"Expected the folder of a store of pages to open within {timeout:g} s, got a "
                f"medium that hangs. Close the store again, or end the process."
            )
        try:
            self._close(max(0.0, until - time.monotonic()))
        finally:
            self._lock.release()

    def clear(self) -> bool:
        """Remove all pages from the disk and from memory; return False if others may use them: with
        a bucket, and in a shared store, which `portakv store wipe` empties.

        These are the pages of the model and the identity, of all sizes, also of those that were
        not opened. Waits for the jobs in flight; other calls find nothing meanwhile. `Remote.wipe`
        empties a bucket.

        Raises `StoreError` and `StoreBusy` as the constructor does, and for files that cannot be
        removed.
        """
        if self.remote or self.terms.bucket is not None:
            return False
        with self._lock:
            self._close(self._patience)
            try:
                for folder in self.terms.folders:
                    remove_pages(folder, self._model, self._identity, self._sizes)
            finally:  # the pages that are left can be loaded
                self._open()
        return True

    def _close(self, timeout: float) -> None:
        store = self._store
        for pages in self._sizes.values():
            pages.blocks = None
        if store is not None:
            store.close(timeout)
            self._store = None

    def _open(self) -> None:
        """Open the store of all sizes, under the lock."""
        forms = {pages.form.name: pages.form for pages in self._sizes.values()}
        store: BlockStore | SharedStore
        if self.remote:
            store = SharedStore(forms, self.terms, self._patience)
        else:
            tiers = self.terms.tiers()
            options = {"full": "wait", "pin": False}  # nothing is copied to a device
            store = open_store(forms, self.terms, tiers, self._patience, **options)
        self._store = store
        for pages in self._sizes.values():
            pages.blocks = store.of(pages.form.name)


class Pages:
    """The pages of one size of a store, which makes it.

    Calls while the store is closed find nothing, and their jobs have ended without a page.

    Attributes:
        size: of the pages.
        form: of the stored pages.
        deadline: seconds after which a load gives up, unless it has its own deadline.
        blocks: the store of the form; None while it is closed.
    """

    def __init__(self, size: PageSize, form: BlockForm, deadline: float) -> None:
        self.size = size
        self.form = form
        self.deadline = deadline
        self.blocks: PageBlocks | None = None

    def over(self, memory: object) -> KVView:
        """Return a view of memory of the engine, whose slots are pages.

        It has the address alone, and retains nothing. The caller promises that the memory stays
        until the jobs that use it have ended.

        Args:
            memory: bytes ``[slots, at least nbytes]`` on the host that may be written, their rows
                without gaps inside: a memoryview, an array or a tensor.

        Raises `InvalidTerms` for other memory, and for a size with several runs.
        """
        if self.size.runs > 1:
            expected = "memory of pages of one run"
            raise invalid("memory", expected, memory, "Pass the addresses of the runs to at().")
        array = _bytes_of(memory)
        if array is None or array.shape[1] < self.size.nbytes:
            expected = f"bytes [slots, {self.size.nbytes} or more] that may be written"
            raise invalid("memory", expected, memory)
        return KVView.at(
            [array.ctypes.data],
            "layer | block page",
            shape=(len(array), self.size.nbytes),
            strides=(array.strides[0], 1),
            dtype=torch.uint8,
            device=torch.device("cpu"),
            pinned=False,
            block_size=1,
        )

    def at(self, addresses: Addresses) -> KVView:
        """Return a view of pages at addresses of host memory, in their order.

        The caller promises the memory as `over` says.

        Args:
            addresses: int ``[pages]``, or ``[pages, runs]``, of the first byte of each run.

        Raises `InvalidTerms` for numbers of another shape, and `LayoutError` for values that are
        not addresses.
        """
        runs = self.size.runs
        try:
            array = np.asarray(addresses, np.int64).reshape(-1, runs)
        except (TypeError, ValueError, OverflowError):
            raise invalid("addresses", f"numbers [pages, {runs}]", addresses) from None
        return KVView.at(
            array.T.tolist(),
            "layer block | page",
            shape=(self.size.nbytes // runs,),
            dtype=torch.uint8,
            device=torch.device("cpu"),
            pinned=False,
            block_size=1,
        )

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded, as far as is known here: a look into the index.

        Raises `InvalidTerms` for a key that is not bytes.
        """
        blocks = self.blocks
        if type(key) is not bytes:
            key = octets("key", key)
        try:
            return blocks is not None and blocks.has(page_key(key))
        except StoreError:  # it was closed
            return False

    def holds(self, keys: Keys) -> Mask:
        """Return which pages can be loaded, as far as is known here, bool ``[keys]``."""
        names = _names(keys)
        there = self._asked(lambda blocks: blocks.has_each(names), [False] * len(names))
        return np.array(there, np.bool_)

    def lookup(self, keys: Keys, timeout: float | None = 1.0) -> int:
        """Return the number of leading pages that can be loaded.

        Waits at most ``timeout`` seconds for buckets, as `BlockStore.lookup` does; for no other
        tier, and for no server.
        """
        names = _names(keys)
        return self._asked(lambda blocks: blocks.lookup(names, timeout), 0)

    def save(
        self,
        keys: Keys,
        view: KVView,
        slots: IdList | None = None,
        *,
        after: Sequence[bytes | None] | None = None,
        priority: Priority = "normal",
        deadline: float | None = SAVE,
        tag: Hashable = None,
    ) -> PageJob:
        """Save pages, which must keep their bytes until the job has ended.

        Pages that are stored already are not read. A page that is to be saved waits for staging.

        Args:
            keys: of any length, which differ.
            view: of `over` or `at`.
            slots: of the view, one for each key; None: all, in order.
            after: for each key the one that it follows, or None: a page is evicted before the page
                that it follows. None: no page follows another one.
            priority: among the jobs of the store.
            deadline: seconds after which pages that are not stored are given up; None: never.
            tag: any value, for the caller.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `BlockStore.save` does.
        """
        names = _names(keys)
        follows: list[bytes | None] = [None] * len(names)
        if after is not None:
            follows = [None if each is None else page_key(each) for each in after]
        limit = math.inf if deadline is None else deadline
        job = PageJob("save", keys, self.size.nbytes, tag, limit)
        handle = None
        if names:
            handle = self._asked(
                lambda blocks: blocks.save(
                    view,
                    _slots(view, slots),
                    names,
                    after=follows,
                    priority=priority,
                    deadline=deadline,
                ),
                None,
            )
        return job.follow(handle)

    def load(
        self,
        keys: Keys,
        view: KVView,
        slots: IdList | None = None,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        tag: Hashable = None,
    ) -> PageJob:
        """Load pages into memory, which belongs to the job until its end.

        Pages that do not land are not written. The arguments are those of `save`; ``deadline``:
        seconds after which pages that did not come are given up; None: that of the store's terms.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `BlockStore.load` does.
        """
        names = _names(keys)
        limit = self.deadline if deadline is None else deadline
        job = PageJob("load", keys, self.size.nbytes, tag, limit + GRACE)
        handle = None
        if names:
            handle = self._asked(
                lambda blocks: blocks.load(
                    view,
                    _slots(view, slots),
                    names,
                    priority=priority,
                    deadline=limit,
                    missing="skip",
                ),
                None,
            )
        return job.follow(handle)

    def pin(self, keys: Keys) -> Pins:
        """Keep pages from eviction until `Pins.release`, as far as they are there.

        A pin costs a short look under the lock of the disk's index, or the answer of a server, two
        seconds at most. Pages that are pinned for ever leave no room for others.
        """
        names = _names(keys)
        return self._asked(lambda blocks: blocks.pin(names), Pins(len(names)))

    def delete(self, keys: Keys) -> Mask:
        """Forget pages; return which were there, bool ``[keys]``. See `BlockStore.delete`.

        Waits for the answer of a server, two seconds at most.
        """
        names = _names(keys)
        return self._asked(lambda blocks: blocks.delete(names), np.zeros(len(names), np.bool_))

    def touch(self, keys: Keys) -> None:
        """Record the use of pages, the first key last, so that a prefix outlives its suffix."""
        names = _names(keys)
        self._asked(lambda blocks: blocks.touch(names), None)

    def _asked(self, ask: Callable[[PageBlocks], Result], otherwise: Result) -> Result:
        """Return the answer of the store; ``otherwise`` while it is closed."""
        blocks = self.blocks
        if blocks is not None:
            with suppress(StoreError):  # it was closed
                return ask(blocks)
        return otherwise


def _names(keys: object) -> list[bytes]:
    """Return the keys of the store for keys of any length. Raises `InvalidTerms`."""
    listed: list[bytes] = items("keys", keys, "bytes")
    for number, key in enumerate(listed):
        if not isinstance(key, bytes):
            raise invalid(f"keys[{number}]", "bytes", key)
    return [*map(page_key, listed)]


def _slots(view: KVView, slots: IdList | None) -> IdList:
    return range(view.slots) if slots is None else slots


def _bytes_of(memory: object) -> npt.NDArray[np.uint8] | None:
    """Return memory as bytes ``[slots, bytes]`` without a copy; None if it is not such memory."""
    if isinstance(memory, torch.Tensor):
        if memory.device.type != "cpu":
            return None
        memory = memory.detach().view(torch.uint8).numpy() if memory.dim() == 2 else None
    try:
        array = np.asarray(memory)
    except (TypeError, ValueError):
        return None
    if array.ndim != 2 or not array.flags.writeable or array.dtype.hasobject:
        return None
    if array.shape[1] and array.strides[1] != array.itemsize:
        return None
    return array.view(np.uint8)


def page_store(
    terms: StoreTerms, model: str, sizes: Sequence[PageSize], identity: str = ""
) -> PageStore:
    """Return a store of pages, after a line about it in the log.

    Raises `InvalidTerms` for a folder that cannot be made or written, and as `PageStore` does.
    """
    terms.check_usable()
    store = PageStore(terms, model, sizes, identity=identity)
    server = "This process" if store.serves else "Another process of this host"
    log_start(terms, "pages", store.count(), server)
    return store


# ------------------------------------------------------------------------------------------------
# The pages below an engine's own tier of host memory: the engine decides which pages move. Its
# scheduler calls; no call waits for a disk, nor for the plan of a transfer, which a helper makes.

#: Seconds for which a page that did not land is not offered again, unless it is saved meanwhile.
#: An engine would request it again immediately, and get no further.
FAILED = 60.0
#: The most pages that wait for `PageTier.step` to record their use, and the seconds between two.
TOUCHED = 4096
PACE = 1.0
#: The most keys that are remembered to report their loss, and those of pages that did not land.
REMEMBERED = 1 << 20
#: The most keys of a lookup in a bucket.
BATCH = 256
#: Seconds after which a lookup that has not ended counts as one that found nothing: its worker may
#: be gone, and the scheduler must not wait for ever. An answer comes within two seconds.
PENDING = 10.0


class TierEvents(NamedTuple):
    """The keys of pages that were stored, and of pages that no tier has any longer."""

    stored: list[bytes]
    lost: list[bytes]


class _BucketLookups:
    """The lookups in a bucket that were made for a scheduler, which waits for none of them."""

    def __init__(self, pages: Pages, now: Callable[[], float]) -> None:
        self._pages = pages
        self._wanted = dict[Hashable, list[bytes]]()  # by chain of a request
        #: True: a lookup is expected to end, which is wanted or has begun; False: the bucket lacks
        #: the page.
        self._beliefs: Until[bytes] = Until("beliefs about pages of a bucket", REMEMBERED, now)
        self._answers = True  # the bucket answered the last lookup in time

    def look(self, key: bytes, chain: Hashable) -> bool | None:
        """Return None if a lookup will show whether a bucket has a page, else False."""
        belief = self._beliefs.held(key)
        if belief is None and self._beliefs.get(key, (False, 0.0))[0]:  # its worker may be gone
            self._end([key], 0, self._answers)
            return False
        if belief is False:
            return False
        if belief is None:
            self._wanted.setdefault(chain, []).append(key)
            self._beliefs.hold(key, PENDING)
        return None if self._answers else False

    def begin(self) -> None:
        """Begin lookups of the pages that are wanted, the first ones of each chain together."""
        wanted = self._wanted
        self._wanted = {}
        blocks = self._pages.blocks
        for keys in wanted.values():
            for first in range(0, len(keys), BATCH):
                some = keys[first : first + BATCH]
                if isinstance(blocks, FormStore):
                    ended = partial(self._end, some)
                    look_up([[blocks]], [*map(page_key, some)], ended, Validity.of_rows(1))
                else:  # it was closed
                    self._end(some, 0, self._answers)

    def _end(self, keys: Keys, count: int, answers: bool) -> None:
        """Note the end of a lookup, of which so many leading pages are there."""
        for key in keys[:count]:
            self._beliefs.pop(key, None)
        for key in keys[count:]:
            self._beliefs.hold(key, MISSING, False)
        self._answers = answers


class PageTier:
    """The pages of one size below an engine's tier of host memory.

    Args:
        store: has the pages.
        pages: of the store.
        memory: the engine's tier of host memory, bytes ``[slots, bytes]``, which stays until
            `close` has returned.
        chain_of: returns what tells the chains of a request apart, such as groups of layers, from
            a key.
        reports: keep `events`.
        now: returns the time in seconds.

    Jobs that come after `close` end without a page.

    Raises `InvalidTerms` for other memory.

    Attributes:
        counts: pages that were loaded and stored, and those that did not land.
        pages: of the store.
        reports: `events` are kept.
        view: of the engine's tier of host memory.
    """

    def __init__(
        self,
        store: PageStore,
        pages: Pages,
        memory: object,
        *,
        chain_of: Callable[[bytes], Hashable] = bool,
        reports: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = {"loaded": 0, "load_failed": 0, "stored": 0, "store_failed": 0}
        self._store = store
        self.pages = pages
        self.view = pages.over(memory)
        self._now = now
        self._chain_of = chain_of
        # The jobs that have not been reported, by their numbers; None: it has not begun.
        self._jobs = dict[Hashable, PageJob | None]()
        # The last page of each chain of each request, which the next one follows.
        self._lasts = dict[Hashable, dict[Hashable, bytes]]()
        self._failed: Until[bytes] = Until("pages that did not land", REMEMBERED, now)
        self._touched = dict[bytes, float]()  # with the time of their first use since `step`
        self._lookups = None if store.terms.bucket is None else _BucketLookups(pages, now)
        self.reports = reports
        self._stored = list[bytes]()  # since the last `events`
        self._names: Bounded[bytes, bytes] = Bounded("keys of stored pages", REMEMBERED)
        if reports:
            store.changes()  # later ones are kept
        self._calls = Calls()

    @property
    def busy(self) -> bool:
        """Return whether a job has not been reported."""
        return bool(self._jobs)

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded: a look into the index of this process."""
        if not self.pages.has(key):
            return False
        return not self._failed.holds(key)

    def look(self, key: bytes, request: Hashable) -> bool | None:
        """Return whether a page can be loaded; None if a bucket has yet to answer.

        Answers as `has` does for other tiers. `step` begins the lookups in a bucket, whose answers
        come within two seconds.
        """
        if self.has(key):
            return True
        if self._lookups is None or self._failed.holds(key):
            return False
        return self._lookups.look(key, (request, self._chain_of(key)))

    def save(self, number: Hashable, keys: Keys, slots: Sequence[int], request: Hashable) -> None:
        """Begin to save slots under keys, which are of a request and in its order."""
        after = list[bytes | None]()
        lasts = self._lasts.setdefault(request, {})
        for key in keys:
            chain = self._chain_of(key)
            after.append(lasts.get(chain))
            lasts[chain] = key
        self._submit("save", number, keys, partial(self.pages.save, after=after), slots)

    def load(self, number: Hashable, keys: Keys, slots: Sequence[int]) -> None:
        """Begin to load pages into slots."""
        self._submit("load", number, keys, self.pages.load, slots)

    def _submit(
        self,
        kind: Literal["save", "load"],
        number: Hashable,
        keys: Keys,
        call: Callable[..., PageJob],
        slots: Sequence[int],
    ) -> None:
        """Have a helper begin a job. It ends without a page if the store refuses it."""

        def begin() -> None:
            try:
                self._jobs[number] = call(keys, self.view, slots, tag=number)
            except Exception as error:  # class 4: the engine waits for the end of each job
                refuse(error)

        def refuse(why: object) -> None:
            text = "A %s of %d pages of an engine is refused: %s"
            _log.warning("refused", text, kind, len(keys), why)
            self._jobs[number] = PageJob(kind, keys, self.pages.size.nbytes, number).follow(None)

        self._jobs[number] = None
        if not self._calls.add(begin):
            refuse("Expected a tier that is open, got one that was closed.")

    def ended(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call."""
        ended = [job for job in self._begun() if job.done()]
        for job in ended:
            del self._jobs[job.tag]
            self._note(job)
        return ended

    def _begun(self) -> list[PageJob]:
        """Return the jobs that have begun and were not reported, in order."""
        return [job for job in [*self._jobs.values()] if job is not None]

    def drain(self) -> None:
        """Wait until all jobs have ended; `ended` returns them then.

        Jobs that hang are cancelled at their deadline, a minute for saves, which end then: a tier
        has copies of their pages.
        """
        self._calls.wait()
        for job in self._begun():
            job.wait()

    def touch(self, keys: Collection[bytes]) -> None:
        """Note that pages are used, in the order of their chains. `step` records it."""
        now = self._now()
        for key in keys if len(self._touched) < TOUCHED else ():
            self._touched.setdefault(key, now)

    def step(self) -> None:
        """Begin lookups in a bucket, and record the use of pages once in a while."""
        if self._lookups is not None:
            self._lookups.begin()
        first = next(iter(self._touched.values()), None)
        if first is None or self._now() < first + PACE:
            return
        keys = [*self._touched]
        self._touched.clear()
        self._calls.add(partial(self.pages.touch, keys))

    def forget(self, request: Hashable) -> None:
        """Forget a request that has ended."""
        self._lasts.pop(request, None)

    def events(self) -> TierEvents:
        """Return what was stored and lost since the last call; nothing without ``reports``."""
        events = TierEvents(self._stored, [])
        self._stored = []
        for change in self._store.changes() if self.reports else ():
            key = None if change.stored else self._names.get(change.key)
            if key is not None and not self.pages.has(key):
                del self._names[change.key]
                events.lost.append(key)
        return events

    def close(self, timeout: float = 10.0) -> None:
        """Close the store, as `PageStore.close` does. `ended` then reports the jobs in flight."""
        self._calls.close(timeout)
        self._store.close(timeout)

    def _note(self, job: PageJob) -> None:
        """Note which pages of a job landed."""
        landed = job.landed.tolist()
        there = [key for key, good in zip(job.keys, landed, strict=True) if good]
        missing = len(landed) - len(there)
        verb = "stored" if job.kind == "save" else "loaded"
        self.counts[verb] += len(there)
        self.counts["store_failed" if job.kind == "save" else "load_failed"] += missing
        if job.kind == "load":
            for key in {*job.keys}.difference(there) if missing else ():
                self._failed.hold(key, FAILED)
            return
        for key in there if self._failed else ():
            self._failed.pop(key, None)
        if self.reports:
            self._stored += there
            for key in there:
                self._names[page_key(key)] = key


# ------------------------------------------------------------------------------------------------
# The pages of a pool of host memory, for an engine whose threads wait for them.

#: The most runs of a page: more are too short to be copied one by one.
MOST_RUNS = 4096
#: Seconds between two lines of the log about a load that does not end.
POOL_GRACE = 5.0


class PagePool:
    """The pages of one pool of an engine's host memory, in a `PageStore`.

    A page has pieces of any lengths, each at a separate address: one for keys and one for values,
    or two for each layer. A piece is cut into runs, which have equal lengths in all pieces.

    Its calls wait until nothing uses the memory any more, and raise nothing for a store that fails:
    a page that did not come, or was not stored, is False in the result. Any thread may call.

    Args:
        pieces: bytes of each piece of a page, in their order.
        identity: what tells the pages from those of other pools that have equal keys.

    Raises `InvalidTerms` for pieces that no page has.

    Attributes:
        size: of the pages.
    """

    def __init__(self, pieces: Sequence[int], identity: bytes = b"") -> None:
        sizes = [whole("pieces", size, 1) for size in items("pieces", pieces, "bytes of pieces")]
        if not sizes:
            raise invalid("pieces", "bytes of pieces", pieces)
        run = gcd(*sizes)
        counts = [size // run for size in sizes]
        if sum(counts) > MOST_RUNS:
            expected = f"pieces of at most {MOST_RUNS} equal runs together"
            raise invalid("pieces", expected, pieces)
        self.size = PageSize(sum(sizes), sum(counts))
        self._identity = octets("identity", identity)
        # Of each run: the number of its piece, and its place in the piece.
        self._piece = np.repeat(np.arange(len(sizes)), counts)
        self._offset = np.concatenate([np.arange(count) for count in counts]) * run
        #: Of each piece, its place in a page whose pieces lie one after the other.
        self._places = np.cumsum([0, *sizes[:-1]])
        self._pages: Pages | None = None

    def open(self, store: PageStore) -> None:
        """Use a store from now on. Raises as `PageStore.pages` does."""
        self._pages = store.pages(*self.size)

    def lookup(self, keys: Keys) -> int:
        """Return the number of leading pages that can be loaded; a bucket has a second to
        answer."""
        pages = self._pages
        return 0 if pages is None else pages.lookup(self._names(keys))

    def holds(self, keys: Keys) -> Mask:
        """Return which pages can be loaded, as far as is known here, bool ``[keys]``."""
        pages = self._pages
        if pages is None:
            return np.zeros(len(keys), np.bool_)
        return pages.holds(self._names(keys))

    def restorable(self, keys: Keys, trailing: int | None = None) -> Mask:
        """Return for each number of leading pages, less one, whether it can be restored, bool
        ``[keys]``.

        ``trailing``: the number of last pages that this needs; None: all of them.
        """
        count = len(keys)
        if trailing is None:
            return np.arange(count) < self.lookup(keys)
        self.lookup(keys[-trailing:])  # a bucket is asked about the last pages
        missing = np.cumsum(np.r_[0, ~self.holds(keys)])
        first = np.maximum(0, np.arange(1, count + 1) - trailing)
        able: Mask = missing[1:] == missing[first]
        return able

    def save(self, keys: Keys, addresses: npt.ArrayLike, after: bytes | None = None) -> Mask:
        """Store pages; return which of them are stored now, bool ``[keys]``.

        Args:
            keys: of the pages, each of which follows the one before it.
            addresses: of the pieces of each page, int ``[keys, pieces]``; for pages whose pieces
                lie one after the other ``[keys, 1]``.
            after: the key that the first page follows; None: it begins a prompt.
        """
        names = self._names(keys)
        first = None if after is None else self._names([after])[0]
        follows = [first, *names[:-1]][: len(names)]
        return self._moved("save", names, addresses, after=follows)

    def load(self, keys: Keys, addresses: npt.ArrayLike) -> Mask:
        """Load pages; return which of them have come, with verified bytes, bool ``[keys]``.

        The others are not written. The arguments are those of `save`.
        """
        return self._moved("load", self._names(keys), addresses)

    def _moved(
        self,
        kind: Literal["save", "load"],
        names: Keys,
        addresses: npt.ArrayLike,
        **terms: Any,
    ) -> Mask:
        """Save or load pages; return which of them landed, once nothing uses the memory."""
        pages = self._pages
        if pages is None or not names:
            return np.zeros(len(names), np.bool_)
        call: Callable[..., PageJob] = pages.save if kind == "save" else pages.load
        job = call(names, pages.at(self._runs(addresses)), deadline=pages.deadline, **terms)
        patience = pages.deadline + POOL_GRACE
        while not job.wait(patience):
            line = f"A {kind} of pages takes too long, and still uses its memory. %s"
            _log.warning(kind, line, SLOW_DEVICE)
            patience = POOL_GRACE
        if job.given_up:
            line = "A save of pages was given up: a tier is slow, or hangs. %s"
            _log.warning("save", line, SLOW_DEVICE)
        return job.landed

    def _names(self, keys: Keys) -> list[bytes]:
        """Return keys that no other pool has."""
        return [key + self._identity for key in keys] if self._identity else [*keys]

    def _runs(self, addresses: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the addresses of the runs of pages, int64 ``[pages, runs]``."""
        given = np.asarray(addresses, np.int64)
        pieces = len(self._places)
        if given.ndim != 2 or given.shape[1] not in (1, pieces):
            expected = f"numbers [pages, {pieces}]"
            raise invalid("addresses", expected, addresses)
        if given.shape[1] < pieces:
            given = given + self._places
        runs: npt.NDArray[Any] = given[:, self._piece] + self._offset
        return runs


# ------------------------------------------------------------------------------------------------
# `PageTasks`: saves and loads of pages whose sizes are not known before they come.
#
# A task has pages of any sizes, each at its own address. Its coroutine waits for their ends, and
# a helper reports them. Another helper opens the store for sizes that are new.

# ------------------------------------------------------------------------------------------------
# The pages of a store that an engine counts, and lookups whose answers it has not fetched.

Kind: TypeAlias = Literal["save", "load"]
Key = TypeVar("Key")
Answer = TypeVar("Answer")

#: The most lookups whose answers wait to be fetched. The locks of older ones end, and their answers
#: find nothing: so many of these wait.
UNFETCHED = 4096
EMPTY = 1 << 16


class Counted(Generic[Key]):
    """The pages that an engine counts, by their names, with its own keys and their bytes."""

    def __init__(self) -> None:
        self._lock = runtime().lock
        self._pages = dict[bytes, tuple[Key, int]]()

    def __len__(self) -> int:
        return len(self._pages)

    def add(
        self, keys: Iterable[Key], names: Iterable[bytes], sizes: Iterable[int]
    ) -> tuple[list[Key], list[int]]:
        """Count pages; return the keys and bytes of those that were not counted.

        Pages of size 0 are not there.
        """
        new = list[Key]()
        new_sizes = list[int]()
        with self._lock:
            for key, name, nbytes in zip(keys, names, sizes, strict=True):
                if nbytes and name not in self._pages:
                    self._pages[name] = key, nbytes
                    new.append(key)
                    new_sizes.append(nbytes)
        return new, new_sizes

    def remove(self, names: Iterable[bytes]) -> list[tuple[Key, int] | None]:
        """Count pages no more; return the key and the bytes of each, or None for one that was not
        counted."""
        with self._lock:
            return [self._pages.pop(name, None) for name in names]


class Lookups(Generic[Answer]):
    """The answers of lookups, until they are fetched, with the names of the pages they locked.

    An answer that too many lookups follow before it is fetched finds nothing. So each lookup ends,
    and the locks of those that no one fetches end, too.

    Args:
        nothing: returns an answer of a number of keys that finds none.
        most: the most answers that keep their locks.
    """

    def __init__(self, nothing: Callable[[int], Answer], most: int = UNFETCHED) -> None:
        self._log = RateLimitedLog(logging.getLogger(__name__))
        self._lock = runtime().lock
        self._nothing = nothing
        self._most = most
        self._answers: Bounded[int, Answer] = Bounded("answers of lookups", EMPTY)
        # By lookup, the number of its keys and the names of locked pages, the oldest first.
        self._locked = dict[int, tuple[int, Keys]]()

    def add(self, number: int, answer: Answer, keys: int, locked: Keys) -> Keys:
        """Keep the answer of a lookup of so many keys.

        Returns the names whose locks are to end, since the answer of another lookup was not fetched
        in time.
        """
        with self._lock:
            self._answers[number] = answer
            self._locked[number] = keys, locked
            if len(self._locked) <= self._most:
                return ()
            late = next(iter(self._locked))
            keys, locked = self._locked.pop(late)
            self._answers[late] = self._nothing(keys)
        self._log.warning(
            "unfetched",
            "A lookup of %d pages finds none: %d later ones came before its answer was fetched. "
            "Look at the engine's log.",
            keys,
            self._most,
            lines=1,
        )
        return locked

    def fetch(self, number: int) -> Answer | None:
        """Return the answer of a lookup, once; None if there is none."""
        with self._lock:
            self._locked.pop(number, None)
            return self._answers.pop(number, None)


# ------------------------------------------------------------------------------------------------
# Saves and loads of pages of any sizes.

#: Seconds between two looks for pages that were lost.
LOOK = 1.0
#: Seconds between two attempts to open a store after one that failed.
PAUSE = 5.0
#: The most keys that wait to be deleted when the store has opened.
DELETED = 65536


class Buffer(NamedTuple):
    """Bytes in the host memory of an engine.

    Attributes:
        address: of the first byte.
        nbytes: the number of bytes.
    """

    address: int
    nbytes: int


class PageTask:
    """A save or a load of pages.

    Attributes:
        kind: "save" or "load".
        keys: as the caller passed them; a key may come several times.
        buffers: a page for each key.
        tag: what the caller passed to tell its tasks apart.
        landed: the pages that are stored or were loaded, bool ``[keys]``.
        fresh: the pages of a save that the store did not have before, bool ``[keys]``.
        jobs: with the numbers of their pages; None: the task has not begun.
    """

    def __init__(self, kind: Kind, keys: Keys, buffers: Sequence[Buffer], tag: Hashable) -> None:
        self.kind = kind
        self.keys = keys
        self.buffers = buffers
        self.tag = tag
        self.landed = np.zeros(len(keys), np.bool_)
        self.fresh = np.zeros(len(keys), np.bool_)
        self.jobs: Sequence[tuple[PageJob, list[int]]] | None = None

    @property
    def landed_bytes(self) -> int:
        """Return the bytes of the pages that landed; of a save, those that were not there
        before."""
        moved = self.landed & self.fresh if self.kind == "save" else self.landed
        return sum(buffer.nbytes for buffer in compress(self.buffers, moved))

    def parts(self) -> list[tuple[int, list[int]]]:
        """Return the numbers of pages that one job moves, with their bytes: each key once."""
        parts = dict[tuple[int, int], list[int]]()
        seen = Counter[bytes]()
        for number, (key, buffer) in enumerate(zip(self.keys, self.buffers, strict=True)):
            parts.setdefault((buffer.nbytes, seen[key]), []).append(number)
            seen[key] += 1
        return [(nbytes, part) for (nbytes, _), part in parts.items()]


class PageTasks:
    """The tasks of an engine over a store of pages.

    Args:
        store: of the pages; `close` closes it.
        ended: called for each task that has ended, in a helper thread.
        lost: called with the keys of `page_key` of pages that the store no longer has, after these
            calls.

    No method but `close` waits for a transfer, and none waits for a folder to open. A save that the
    folder holds up ends after `SAVE` seconds, a load after the deadline of the store's terms. After
    `close` tasks end without a page.
    """

    def __init__(
        self,
        store: PageStore,
        ended: Callable[[PageTask], object],
        lost: Callable[[list[bytes]], object],
    ) -> None:
        self.store = store
        self._ended = ended
        self._lost = lost
        self._runtime = runtime()
        self._calls = Calls()  # open the store
        self._waiting = set[PageTask]()  # until the store has opened for their sizes
        self._begun = Signal(self._runtime)  # tells of tasks that have begun
        self._changes = deque[Change]()  # that an opening has seen, until they are reported
        self._deleted = deque[bytes](maxlen=DELETED)  # while the store was closed
        self._unopened: Until[int] = Until("sizes of pages that did not open", 1024)
        self._closing = False
        # The locks of pages add up. A batch of pins ends with the last lock of its pages.
        self._locks = dict[bytes, list[Pins]]()
        self._locks_of = Counter[Pins]()
        store.changes()  # later changes are kept
        self._reports = Limit(self._runtime)  # one after the other
        self._running = TaskGroup(self._runtime, self._failed)
        self._running.start(self._watch())

    @property
    def alive(self) -> bool:
        """Return whether tasks are carried out."""
        return not self._closing and len(self._running) > 0

    @property
    def locked(self) -> int:
        """Return the number of pages that are locked."""
        return len(self._locks)

    def begin(
        self, kind: Kind, keys: Keys, buffers: Sequence[Buffer], tag: Hashable = None
    ) -> PageTask:
        """Begin a task. Its buffers belong to it until its end.

        Args:
            kind: "save" or "load".
            keys: of any length.
            buffers: a page for each key.
            tag: any value, for the caller.
        """
        task = PageTask(kind, keys, buffers, tag)
        # A page that is saved after its deletion stays.
        if self._deleted or self._closed_sizes(task):
            self._waiting.add(task)
            self._calls.add(partial(self._open_for, task))
        else:
            self._begin(task)
        self._running.start(self._carry_out(task))
        return task

    def holds(self, keys: Keys) -> Mask:
        """Return which pages can be loaded in some size, bool ``[keys]``."""
        result = np.zeros(len(keys), np.bool_)
        for pages in self.store.every():
            result |= pages.holds(keys)
        return result

    def stored(self, task: PageTask) -> Mask:
        """Return which pages of a save that has ended are stored, bool ``[keys]``.

        The index of a server follows the end of a save, so that it does not count.
        """
        return task.landed if self.store.remote else self.holds(task.keys)

    def lock(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Lock the pages that can be loaded in some size; return their bytes, int64 ``[keys]``.

        A page that is not there has 0 bytes, and no lock. The store evicts no page before the last
        of its locks has ended. A size that is new ends all locks.
        """
        result = np.zeros(len(keys), np.int64)
        left = [*range(len(keys))]
        for pages in self.store.every():
            pins = pages.pin([keys[number] for number in left])
            locked = [*compress(left, pins.held)]
            with self._runtime.lock:
                for number in locked:
                    self._locks.setdefault(keys[number], []).append(pins)
                    self._locks_of[pins] += 1
            result[locked] = pages.size.nbytes
            left = [*compress(left, ~pins.held)]
        return result

    def lock_later(self, keys: Keys, locked: Callable[[npt.NDArray[np.int64]], object]) -> None:
        """Lock pages, and call with what `lock` returns: within this call, or in a thread if
        another process answers."""

        def lock() -> None:
            sizes = np.zeros(len(keys), np.int64)
            try:
                sizes = self.lock(keys)
            finally:  # the engine waits for the call
                locked(sizes)

        if not self.store.remote or not self._calls.add(lock):
            lock()

    def unlock(self, keys: Iterable[bytes]) -> None:
        """End a lock of each page; ignore pages that are not locked."""
        ended = list[Pins]()
        with self._runtime.lock:
            for key in keys:
                if key not in self._locks:
                    continue
                pins = self._locks[key].pop()
                if not self._locks[key]:
                    del self._locks[key]
                self._locks_of[pins] -= 1
                if not self._locks_of[pins]:
                    del self._locks_of[pins]
                    ended.append(pins)
        for pins in ended:
            pins.release()

    def delete(self, keys: Keys) -> Mask:
        """Delete pages of any size, locked or not; return which were stored, bool ``[keys]``.

        While the store opens, no page is known to be stored. The pages are deleted, and reported
        as lost, when it has opened.
        """
        result = np.zeros(len(keys), np.bool_)
        before = self._opened()
        for pages in self.store.every():
            result |= pages.delete(keys)
        after = self._opened()
        if (None in before or before != after) and not self._closing:
            self._deleted.extend(keys)
            self._calls.add(self._delete_again)
        return result

    def _opened(self) -> list[PageBlocks | None]:
        """Return the open stores of all sizes; None for a size that is closed."""
        return [pages.blocks for pages in self.store.every()]

    def close(self, timeout: float = 10.0) -> None:
        """End the tasks, which are not reported, close the store, and end its locks, each within so
        many seconds.

        Raises `TransferTimeout` as `BlockStore.close` does.
        """
        self._closing = True
        try:
            with suppress(TransferTimeout):
                self._runtime.start(self._running.close()).synchronize(timeout)
            self.store.close(timeout)
        finally:
            self._calls.close(timeout)

    # --- the helper that opens the store

    def _open_for(self, task: PageTask) -> None:
        """Open the store for a task and begin it, unless it has ended meanwhile; close the store
        again if it was closed meanwhile."""
        for nbytes in self._closed_sizes(task):
            if not self._closing:
                self._open(nbytes)
        self._delete_again()
        with self._runtime.lock:
            waits = task in self._waiting
            self._waiting.discard(task)
        if waits:
            self._begin(task)
        if self._closing:
            try:
                self.store.close()
            except TransferTimeout as error:
                _log.warning("close", "A store of pages was left open: %s", error)

    def _open(self, nbytes: int) -> None:
        """Open the store for a size; after a failure, not again for `PAUSE` seconds."""
        if self._unopened.holds(nbytes):
            return
        try:
            self.store.pages(nbytes)
            self._changes.extend(self.store.changes())  # later changes are kept
        except PortaKVError as error:
            _log.warning("open", "Pages are not stored or loaded: %s", error)
            self._unopened.hold(nbytes, PAUSE)

    def _delete_again(self) -> None:
        """Delete the pages whose deletion came while the store was closed."""
        if self._deleted and None not in self._opened():
            keys = [self._deleted.popleft() for _ in range(len(self._deleted))]
            self.delete(keys)

    def _closed_sizes(self, task: PageTask) -> set[int]:
        """Return the sizes of a task for which the store is to be opened.

        Of a size that no save had yet, there is no page to load.
        """
        every = {pages.size.nbytes: pages for pages in self.store.every()}
        sizes = {buffer.nbytes for buffer in task.buffers}
        known = {nbytes for nbytes in sizes if nbytes in every}
        closed = {nbytes for nbytes in known if every[nbytes].blocks is None}
        return closed | (sizes - known if task.kind == "save" else set())

    def _begin(self, task: PageTask) -> None:
        """Begin the jobs of a task. Pages of a job that cannot begin do not land."""
        by_size = {pages.size.nbytes: pages for pages in self.store.every()}
        jobs = list[tuple[PageJob, list[int]]]()
        for nbytes, part in task.parts():
            pages = by_size.get(nbytes)
            if pages is None:
                continue
            keys = [task.keys[number] for number in part]
            try:
                view = pages.at([task.buffers[number].address for number in part])
                if task.kind == "save":
                    task.fresh[part] = ~pages.holds(keys)
                    job = pages.save(keys, view, priority="background")
                else:
                    job = pages.load(keys, view)
            except PortaKVError as error:
                # The other parts have begun, so that the caller must not get an error.
                _log.warning("begin", "Pages are not stored or loaded: %s", error)
            else:
                jobs.append((job, part))
        with self._runtime.step:
            task.jobs = jobs
            self._begun.notify()

    # --- coroutines

    async def _carry_out(self, task: PageTask) -> None:
        """Wait for the end of a task, and report it. The store may not open in time for it."""
        limit = SAVE if task.kind == "save" else self.store.terms.deadline
        until = self._runtime.time() + limit

        def has_begun() -> bool:
            return task.jobs is not None

        if not await self._begun.wait_for(has_begun, until) and task in self._waiting:
            self._waiting.discard(task)
            task.jobs = ()
            line = "Pages are not stored or loaded: their folder does not open. %s"
            _log.warning("late", line, SLOW_DEVICE)
        await self._begun.wait_for(has_begun)
        for job, part in task.jobs or ():
            await job
            task.landed[part] = job.landed
        await self._reports.work(self._report, task)

    async def _watch(self) -> None:
        """Have pages reported that were lost while no task ended."""
        while True:
            await Wait(until=self._runtime.time() + LOOK)
            await self._reports.work(self._report)

    def _report(self, *ended: PageTask) -> None:
        """Report tasks that have ended, and the pages that were lost, to the engine."""
        reports = [partial(self._ended, task) for task in ended]
        if lost := self._lost_pages():
            reports.append(partial(self._lost, lost))
        for report in reports if not self._closing else ():
            try:
                report()
            except Exception as error:  # of the engine's own code, which may raise anything
                self._failed(error)

    def _lost_pages(self) -> list[bytes]:
        """Return the keys of pages that were lost, and not stored again."""
        changes = [self._changes.popleft() for _ in range(len(self._changes))]
        changes += self.store.changes()
        gone = [change.key for change in changes if not change.stored]
        return [*compress(gone, ~self.holds(gone))]

    def _failed(self, error: BaseException) -> None:
        """Log an error that ends no other report."""
        _log.warning("report", "A report of pages failed: %r. Look at the engine's log.", error)
