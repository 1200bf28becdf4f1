# SPDX-License-Identifier: Apache-2.0
"""`PageStore`: pages of bytes in an engine's host memory, and the stores that save and load them.

A page is opaque: nothing is known of its bytes but their number. Engines that have a tier of host
memory hand over such pages by key.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import compress, takewhile
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import instance, invalid, items, octets, seconds, text, whole
from portakv.errors import InvalidTerms, PortaKVError, StoreError, TransferTimeout
from portakv.runtime.finished import Finished
from portakv.serving.local import PATIENCE, StoreTerms, found_in, open_store
from portakv.serving.server.client import GRACE, ServerBlocks, ServerTransfer
from portakv.serving.server.index import ServerIndex
from portakv.serving.worker import is_done
from portakv.storage import BlockForm, BlockStore
from portakv.storage.calls import Change
from portakv.storage.eviction import Pins
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Keys
from portakv.storage.tiers.files import claim, unusable
from portakv.storage.tiers.files import forms_in as every_form_in
from portakv.storage.work import Handle, Mask
from portakv.tasks import Priority
from portakv.view import IdList, KVView

# ------------------------------------------------------------------------------------------------
# The sizes of pages, their keys, and the forms under which pages lie in folders.

Result = TypeVar("Result")
#: Bytes of a key of a store; keys of other lengths are hashed.
KEY = 32


def page_key(key: bytes) -> bytes:
    """Return the 32 bytes under which the page of a key of any length is stored."""
    return key if len(key) == KEY else blake2b(key, digest_size=KEY).digest()


def check_raw(terms: StoreTerms) -> None:
    """Raise `InvalidTerms` for terms of pages with an encoding, which takes rows of a known
    type."""
    if terms.encoding is not None:
        do = "Leave it out."
        raise invalid("encoding", "None, as pages are stored as they are", terms.encoding, do)


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


class PageJob:
    """A save or a load of pages. Any thread may call.

    Attributes:
        kind: "save" or "load".
        keys: as the caller passed them.
        tag: what the caller passed to tell its jobs apart.
        nbytes: bytes of a page.
        began: when the call was made, in seconds of `time.monotonic`.
        seconds: from then to the end; 0 before the end.
        handle: of the store, or the transfer of a server; None if there was no store.
    """

    def __init__(
        self, kind: Literal["save", "load"], keys: Keys, nbytes: int, tag: Hashable
    ) -> None:
        self.kind = kind
        self.keys = keys
        self.tag = tag
        self.nbytes = nbytes
        self.began = time.monotonic()
        self.seconds = 0.0
        self.handle: Handle | ServerTransfer | None = None
        self._until: dict[PageJob, float] | None = None  # has the job until its end
        self._given_up: Mask | None = None  # the pages that had landed by then

    def __repr__(self) -> str:
        return f"PageJob({self.kind}, {len(self.keys)} pages, tag={self.tag!r})"

    @property
    def landed(self) -> Mask:
        """Return the pages that are stored, or were loaded, bool ``[keys]``; none before the
        end."""
        if self._given_up is not None:
            return self._given_up
        if self.handle is None:
            return np.zeros(len(self.keys), np.bool_)
        return self.handle.landed

    def done(self) -> bool:
        """Return whether the job has ended, so that nothing uses the pages; never block or
        raise."""
        if self.handle is None or self._given_up is not None:
            return True
        return is_done(self.handle)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job has ended, at most so many seconds; return whether it has."""
        limit = seconds("timeout", timeout, optional=True)
        if self.handle is not None and self._given_up is None:
            with suppress(PortaKVError):
                self.handle.synchronize(limit)
        return self.done()

    def give_up(self) -> bool:
        """Cancel a job; end a save that a tier holds, once nothing reads its pages.

        Returns whether the job has ended. Pages that are being written may land later.
        """
        self.cancel()
        released = None if self.handle is None else self.handle.released
        unused = released is not None and is_done(released)
        if unused and self._until is not None and self._until.pop(self, None) is not None:
            self._given_up = self.landed.copy()
            self._add()
        return self.done()

    def cancel(self) -> bool:
        """Move no further page; return whether some pages will not be moved.

        The pages that are being moved are in use until the end.
        """
        return self.handle is not None and self.handle.cancel()

    def _follow(
        self,
        handle: Handle | ServerTransfer,
        ended: Finished[PageJob],
        until: dict[PageJob, float] | None,
    ) -> None:
        """Add the job to a queue at the end of its handle, or when it is given up."""
        self.handle = handle
        self._ended = ended
        self._until = until
        handle.when_ended(self._end)

    def _end(self) -> None:
        if self._until is None or self._until.pop(self, None) is not None:
            self._add()

    def _add(self) -> None:
        self.seconds = time.monotonic() - self.began
        self._ended.add(self)


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


class ServerPageBlocks:
    """The pages of one size in the store of a server, with the calls of a `FormStore`.

    What is there is known from a copy of the server's index.

    Args:
        blocks: of a rank of the server.
        index: of the server.
        number: of the size among those of the index.
    """

    def __init__(self, blocks: ServerBlocks, index: ServerIndex, number: int) -> None:
        self.save = blocks.save
        self.load = blocks.load
        self.delete = blocks.delete
        self.has_each = partial(index.holds, number)
        self._blocks = blocks

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded."""
        return self.has_each((key,))[0]

    def lookup(self, keys: Keys, timeout: float | None) -> int:
        """Return the number of leading pages that can be loaded; waits for nothing."""
        return sum(takewhile(bool, self.has_each(keys)))

    def pin(self, keys: Keys) -> Pins:
        """Keep pages from eviction; asks the server only if one is known to have a page."""
        there = [*compress(range(len(keys)), self.has_each(keys))]
        pins = Pins(len(keys))
        if there:
            made = self._blocks.pin([keys[at] for at in there])
            pins.add([there[place] for place in np.flatnonzero(made.held).tolist()], made.release)
        return pins

    def touch(self, keys: Keys) -> None:
        """Do nothing: a server records no use but that of loads."""


#: The store of the pages of one size.
PageBlocks: TypeAlias = "FormStore | ServerPageBlocks"


class SizedPages:
    """The pages of each size of a store, and their jobs: the base of stores of pages.

    Attributes:
        terms: where pages are stored.
        ended: the jobs that have ended, unless a call names another queue.
        until: of jobs that have not ended, by when they have to. The thread that removes a job
            from here ends it.
    """

    def __init__(self, terms: StoreTerms) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        self.ended = Finished[PageJob]()
        self.ended.start()
        self.until = dict[PageJob, float]()
        self._sizes = dict[PageSize, Pages]()

    def every(self) -> list[Pages]:
        """Return the pages of each size."""
        return [*self._sizes.values()]

    def finished(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call. There is one consumer.

        Jobs that are late end in this call if all workers or a server hang, and saves that a tier
        holds past their deadline: a consumer that sleeps on `fileno` makes it now and then, too.
        """
        now = time.monotonic()
        for job, until in [*self.until.items()]:
            if until <= now:
                job.give_up()
        return self.ended.take()

    def fileno(self) -> int:
        """Return a descriptor that is readable while `finished` has jobs; -1 after `close`.

        Raises `HostMemoryError` without a free descriptor.
        """
        return self.ended.fileno()


class PageStore(SizedPages):
    """Pages of bytes in the host memory of an engine, in the stores of PortaKV.

    The store is in this process. No call but the constructor, `pages` of a new size and `close`
    waits for anything. A page that is not there, is damaged, or comes too late, does not land.

    Args:
        terms: where pages are stored, without an encoding. ``block_size`` and ``by_layer`` have no
            meaning for pages.
        model: the name of the model; pages of another model are not found.
        sizes: of the pages. `pages` may add others later.
        identity: what else fixes the bytes of a page, such as layout, dtype and parallelism. Pages
            of another identity are not found.
        patience: seconds to wait for a folder that another process has.

    Raises:
        InvalidTerms: wrong arguments; sizes that no page has.
        StoreError, StoreBusy: memory for no page; a folder that another process has.
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
        super().__init__(terms)
        if terms.shared:
            raise InvalidTerms(
                "Expected terms of a store of this process, got shared=True. Leave it out, and "
                "give each process of the host a separate folder."
            )
        check_raw(terms)
        self._model = text("model", model)
        self._identity = text("identity", identity, least=0, most=1 << 15)
        self._patience = seconds("patience", patience)
        self._lock = threading.Lock()  # of what is open
        self._store: BlockStore | None = None
        for size in items("sizes", sizes, "sizes of pages"):
            made = size if isinstance(size, PageSize) else PageSize(whole("sizes", size, 1))
            form = made.form(self._model, self._identity)
            self._sizes[made] = Pages(self, made, form)
        if self._sizes:
            with self._lock:
                self._open()

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pages(self, nbytes: int, runs: int = 1) -> Pages:
        """Return the pages of a size.

        A size that is new opens the store again, with this size too: that waits for the jobs in
        flight, and pages that only the host tier had are gone. Other calls find nothing meanwhile.

        Raises `InvalidTerms`, `StoreError` and `StoreBusy` as the constructor does. The store is
        closed then, and the next call opens it again.
        """
        size = PageSize(whole("nbytes", nbytes, 1), whole("runs", runs, 1, 1 << 16))
        with self._lock:
            found = self._sizes.get(size)
            is_new = found is None
            if found is None:
                form = size.form(self._model, self._identity)
                found = Pages(self, size, form)
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

        The first call returns none. Their keys are those of `page_key`.
        """
        store = self._store
        try:
            return [] if store is None else store.listen()
        except PortaKVError:  # it was closed
            return []

    def count(self) -> int | None:
        """Return the pages that the disk has; None while the store is not open."""
        return None if self._store is None else found_in(self.statistics(), 1)

    def usage(self) -> Usage:
        """Return how full the store is."""
        disk = bool(self.terms.folders)
        capacity = self.terms.capacity if disk else self.terms.host
        store = self._store
        if store is None:
            return Usage(0, capacity)
        if not disk:
            return Usage(store.rows.nbytes_by_state()["kept"], capacity)
        images = {pages.form.name: pages.form.image_bytes for pages in self.every()}
        slots = [each for each in store.statistics()["disk_slots"] if each["state"] == "used"]
        return Usage(sum(each["value"] * images[each["form"]] for each in slots), capacity)

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of the store, as `BlockStore.statistics`; none while it is closed."""
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
        self.ended.close()

    def clear(self) -> bool:
        """Remove all pages from the disk and from memory; return False with a bucket.

        These are the pages of the model and the identity, of all sizes, also of those that were
        not opened. Waits for the jobs in flight; other calls find nothing meanwhile. A bucket may
        have the pages of other engines: `Remote.wipe` empties it.

        Raises `StoreError` and `StoreBusy` as the constructor does, and for files that cannot be
        removed.
        """
        if self.terms.bucket is not None:
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
        blocks: the store of the form; None while it is closed.
    """

    def __init__(
        self, store: SizedPages, size: PageSize, form: BlockForm, blocks: PageBlocks | None = None
    ) -> None:
        self.size = size
        self.form = form
        self.blocks = blocks
        self._store = store

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
        ended: Finished[PageJob] | None = None,
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
            ended: the queue that takes the job at its end; None: that of the store.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `BlockStore.save` does.
        """
        names = _names(keys)
        follows: list[bytes | None] = [None] * len(names)
        if after is not None:
            follows = [None if each is None else page_key(each) for each in after]
        job = PageJob("save", keys, self.size.nbytes, tag)
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
        return self._begun(job, handle, ended, deadline)

    def load(
        self,
        keys: Keys,
        view: KVView,
        slots: IdList | None = None,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        tag: Hashable = None,
        ended: Finished[PageJob] | None = None,
    ) -> PageJob:
        """Load pages into memory, which belongs to the job until its end.

        Pages that do not land are not written. The arguments are those of `save`; ``deadline``:
        seconds after which pages that did not come are given up; None: that of the store's terms.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `BlockStore.load` does.
        """
        names = _names(keys)
        job = PageJob("load", keys, self.size.nbytes, tag)
        until = self._store.terms.deadline if deadline is None else deadline
        handle = None
        if names:
            handle = self._asked(
                lambda blocks: blocks.load(
                    view,
                    _slots(view, slots),
                    names,
                    priority=priority,
                    deadline=until,
                    missing="skip",
                ),
                None,
            )
        return self._begun(job, handle, ended, until + GRACE)

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

    def _begun(
        self,
        job: PageJob,
        handle: Handle | ServerTransfer | None,
        ended: Finished[PageJob] | None,
        give_up: float | None,
    ) -> PageJob:
        """Have a queue take a job at its end, or so many seconds later if a tier holds it."""
        queue = self._store.ended if ended is None else ended
        if handle is None:
            queue.add(job)
            return job
        until = None
        if give_up is not None:
            until = self._store.until
            until[job] = job.began + give_up
        job._follow(handle, queue, until)
        return job


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
