# SPDX-License-Identifier: Apache-2.0
"""`Prefixes`: the prefixes of prompts in a store, for a process that has their tokens and rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from portakv.arguments import instance, octets, text
from portakv.errors import InvalidTerms, PortaKVError, StoreError, TransferTimeout
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.local import PATIENCE, TOKENS, GroupView, LocalIndex, StoreTerms
from portakv.storage import BlockForm, prefix_keys
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Keys
from portakv.storage.work import Handle
from portakv.view import KVView

_log = RateLimitedLog(logging.getLogger(__name__))


def check_terms(terms: StoreTerms | Mapping[str, object]) -> StoreTerms:
    """Return the terms of a store that one process has, with a block size.

    Raises `InvalidTerms` for other objects and names, and for terms that only engines have.
    """
    if isinstance(terms, Mapping):
        terms = StoreTerms.of(terms)
    instance("terms", terms, StoreTerms, "Pass StoreTerms, or a mapping of its names.")
    for name in ("shared", "by_layer"):
        if getattr(terms, name):
            raise InvalidTerms(
                f"Expected terms without {name}, which only engines have, got {name}=True. Leave "
                f"it out."
            )
    return terms if terms.block_size else replace(terms, block_size=TOKENS)


class Prefixes:
    """The whole blocks of prompts in a store, by the tokens that they follow from.

    Loads and saves never raise for a store that fails: a block that does not come is missing, and
    the log has a line.

    Args:
        view: a paged view of rows as the model makes them, which only describes them. Its blocks
            have the tokens of a stored block. None: the model has no rows of all tokens.
        terms: where the blocks are stored.
        model: the name of the model, and what else decides what a row is.
        patience: seconds to wait for a folder that another process has.
        tail: a view with a block for what else a model keeps after the last token, such as states;
            None: nothing.
        notes: what fixes the bytes of a tail.

    Raises:
        InvalidTerms: terms that only engines have, a view that is not paged, a wrong name.
        StoreError, StoreBusy: memory for no block; a folder that another process has.
    """

    def __init__(
        self,
        view: KVView | None,
        terms: StoreTerms,
        model: str,
        patience: float = PATIENCE,
        tail: KVView | None = None,
        notes: str = "",
    ) -> None:
        self._terms = check_terms(terms)
        text("model", model)
        self._index = LocalIndex()
        groups = [] if view is None else [GroupView(view)]
        if tail is not None:
            groups.append(GroupView(tail, notes, None))
        size = self._terms.block_size if view is None else view.block_size
        assert size is not None
        self.block_size = size
        stores = self._index.open(groups, self._terms, model, size, patience)
        self._store: FormStore | None = None if view is None else stores[0]
        self._tails: FormStore | None = None if tail is None else stores[-1]

    @property
    def deadline(self) -> float:
        """Return the seconds after which a load gives up."""
        return self._terms.deadline

    @property
    def form(self) -> BlockForm | None:
        """Return the form of the stored blocks; None: no rows are stored."""
        return None if self._store is None else self._store.form

    def keys(self, tokens: object, salt: bytes = b"") -> list[bytes]:
        """Return the keys of the whole blocks of a prompt, as `prefix_keys` does."""
        octets("salt", salt)
        return prefix_keys(tokens, self.block_size, salt)

    def tail_key(self, keys: Keys, rest: Sequence[int], salt: bytes = b"") -> bytes:
        """Return the key of what a model keeps after tokens.

        Args:
            keys: of the whole blocks of the tokens.
            rest: the tokens after them.
            salt: as for `keys`.
        """
        before = keys[-1] if keys else b""
        text_of = [len(rest), *rest]
        kind = b"tail" + bytes([len(before)])
        return prefix_keys(text_of, len(text_of), kind + before + octets("salt", salt))[0]

    def lookup(self, keys: Keys) -> int:
        """Return the number of leading blocks that the store has, as far as it answers in time; all
        for a model without rows."""
        if self._store is None:
            return len(keys)
        try:
            return self._store.lookup(keys)
        except StoreError as error:
            _log.warning("lookup", "Prefixes are computed, as a store has failed: %s", error)
            return 0

    def has_tails(self, keys: Keys, timeout: float) -> list[bool]:
        """Return which tails the store has, as far as it answers in so many seconds."""
        assert self._tails is not None
        try:
            return self._tails.lookup_each(keys, timeout)
        except StoreError as error:
            _log.warning("lookup", "Prefixes are computed, as a store has failed: %s", error)
            return [False] * len(keys)

    def load_tail(self, view: KVView, key: bytes) -> bool:
        """Load a tail into the block of a view; return whether it landed. See `load`."""
        return self._load(self._tails, view, [key]) == 1

    def save_tail(self, view: KVView, key: bytes) -> Handle | None:
        """Save a tail from the block of a view; see `save`."""
        return self._save(self._tails, view, [key])

    def load(self, view: KVView, keys: Keys) -> int:
        """Load the first blocks of a prompt into the first blocks of a view.

        Return how many leading blocks landed, with verified bytes. The other blocks of the view
        are undefined, and may be written until the deadline of the terms has passed and later: use
        a view of new memory for each call, and drop it if it fell short.
        """
        return self._load(self._store, view, keys)

    def _load(self, store: FormStore | None, view: KVView, keys: Keys) -> int:
        if not keys or store is None:
            return 0
        deadline = self._terms.deadline
        blocks = range(len(keys))
        try:
            handle = store.load(view, blocks, keys, deadline=deadline, missing="skip")
        except StoreError as error:
            _log.warning("load", "A prefix is computed, as a store has failed: %s", error)
            return 0
        try:
            handle.synchronize(timeout=2 * deadline)
        except PortaKVError as error:
            handle.cancel()
            _log.warning("load", "A prefix is computed, as its load has failed: %s", error)
            return 0
        landed = int(handle.landed.cumprod().sum())
        if landed < len(keys):
            _log.warning(
                "missing",
                "%d of %d blocks of a prefix are computed again: they were evicted, are damaged, "
                "or did not come in time.",
                len(keys) - landed,
                len(keys),
            )
        return landed

    def save(self, view: KVView, keys: Keys) -> Handle | None:
        """Save the first blocks of a prompt from the first blocks of a view.

        Skip blocks that the store has. Return once the view may be written again, after at most
        the deadline of the terms if a tier hangs: blocks without staging by then are not saved. The
        handle ends when the blocks are stored. None: the log has a line about a store that failed.
        """
        return self._save(self._store, view, keys)

    def _save(self, store: FormStore | None, view: KVView, keys: Keys) -> Handle | None:
        if not keys or store is None:
            return None
        try:
            handle = store.save(view, range(len(keys)), keys, full="wait")
        except StoreError as error:
            _log.warning("save", "A prefix is not saved, as a store has failed: %s", error)
            return None
        released = handle.released
        assert released is not None
        try:
            released.synchronize(timeout=self._terms.deadline)
        except TransferTimeout:
            handle.cancel()
            released.synchronize()
            line = "A part of a prefix is not saved, as a tier is slow or hangs. %s"
            _log.warning("slow", line, SLOW_DEVICE)
        return handle

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the figures of the store, as `BlockStore.statistics` does."""
        return self._index.statistics()

    def close(self) -> None:
        """End the saves in progress, and close the store."""
        self._index.close()
