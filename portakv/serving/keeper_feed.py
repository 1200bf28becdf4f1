# SPDX-License-Identifier: Apache-2.0
"""`Feed`: what a keeper announces to the processes that follow the index of its store."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from secrets import randbits

from portakv.errors import InvalidTerms, PeerError
from portakv.serving.keeper_messages import (
    MOST_CHANGES,
    MOST_PAGE,
    AskKeys,
    Changed,
    Changes,
    Follow,
    Followed,
    KeysPage,
    joined_keys,
    tier_of,
)
from portakv.storage.changes import Change
from portakv.storage.store import BlockStore


@dataclass(eq=False)
class Follower:
    """A session of a process that follows the index.

    Attributes:
        forms: the names of the forms of each group of its engine.
        pages: the pages of the snapshot that it reads.
    """

    session: int
    address: str
    forms: Sequence[str]
    pages: list[KeysPage] = field(default_factory=list)


class Feed:
    """The followers of a store's index. Any thread may call.

    Args:
        store: with several forms, by their names.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._numbers = {name: number for number, name in enumerate(store.forms)}
        self._followers = dict[int, Follower]()  # by session
        self._lock = threading.Lock()

    def follow(self, ask: Follow, forms: Sequence[str]) -> Follower:
        """Return a new session of a follower. Raises `InvalidTerms` for another number of
        groups."""
        if ask.groups != len(forms):
            raise InvalidTerms(
                f"Expected the index of {len(forms)} groups of layers, as the ranks of the engine "
                f"have, got {ask.groups}. Pass as many."
            )
        made = Follower(randbits(62), ask.address, forms)
        with self._lock:
            self._followers[made.session] = made
        return made

    def followed(self, follower: Follower, bucket: bool) -> Followed:
        """Return the answer to a new follower. ``bucket``: the store has a bucket."""
        forms = self._store.forms
        return Followed(
            follower.session,
            tuple(self._numbers[form] for form in follower.forms),
            tuple(forms[form].payload_bytes for form in follower.forms),
            bucket,
            tuple(tuple(self._numbers[x] for x in self._alike(form)) for form in follower.forms),
        )

    def _alike(self, name: str) -> list[str]:
        """Return the names of the store's other forms of the same blocks, packed or raw ones.

        Blocks of a lossy form count for no other form.
        """
        forms = self._store.forms
        raw = forms[name].raw
        return [
            other
            for other, form in forms.items()
            if form.raw == raw and other != name and not form.lossy
        ]

    def __contains__(self, session: int) -> bool:
        return session in self._followers

    def follower(self, session: int) -> Follower | None:
        """Return the follower of a session that has not ended."""
        return self._followers.get(session)

    def followers(self) -> list[Follower]:
        """Return the sessions."""
        with self._lock:
            return [*self._followers.values()]

    def lost(self, follower: Follower) -> None:
        """End a session."""
        with self._lock:
            self._followers.pop(follower.session, None)

    def leave(self, session: int) -> None:
        """End the session of a number, if there is one."""
        with self._lock:
            self._followers.pop(session, None)

    def page(self, ask: AskKeys) -> KeysPage:
        """Return a page of the keys of a group; the first one takes a snapshot.

        Raises `PeerError` for a session that has ended, or for a page out of order.
        """
        follower = self._followers.get(ask.session)
        if follower is None or ask.group >= len(follower.forms):
            raise PeerError("Expected a session of this keeper, got one that has ended. Join anew.")
        if ask.page == 0:
            follower.pages = [*self._pages(follower.forms[ask.group])]
        if ask.page >= len(follower.pages):
            raise PeerError("Expected pages in order, got one past the last. Begin with page 0.")
        page = follower.pages[ask.page]
        if not page.more:
            follower.pages = []
        return page

    def _pages(self, form: str) -> Iterator[KeysPage]:
        """Yield a snapshot of the blocks of a form, and of those that are alike, in pages."""
        number: int | None = None
        keys = dict[str, list[bytes]]()
        for name in (form, *self._alike(form)):
            snapshot = self._store.of(name).keys()
            if number is None:  # changes after the first snapshot are applied to all
                number = snapshot.number
            for tier, listed in snapshot.keys.items():
                keys[tier_of(self._numbers[name], tier)] = listed
        return _pages(number or 0, keys)

    def announce(self, changes: Sequence[Change]) -> Iterator[tuple[Follower, Changes]]:
        """Yield the messages about changes for each follower."""
        followers = self.followers()
        if not followers:
            return
        items = [
            Changed(
                each.number,
                self._numbers[each.form],
                each.key,
                each.tier,
                each.stored,
                each.why,
            )
            for each in changes
        ]
        for first in range(0, len(items), MOST_CHANGES):
            some = tuple(items[first : first + MOST_CHANGES])
            for follower in followers:
                yield follower, Changes(follower.session, some)


def _pages(number: int, keys: dict[str, list[bytes]]) -> Iterator[KeysPage]:
    """Yield a snapshot in pages."""
    pieces = [*_pieces(keys)] or [("", b"")]
    for place, piece in enumerate(pieces, 1):
        yield KeysPage(number, (piece,), place < len(pieces))


def _pieces(keys: dict[str, list[bytes]]) -> Iterable[tuple[str, bytes]]:
    """Yield the keys of each tier in pieces of a page."""
    for tier, listed in keys.items():
        for first in range(0, len(listed), MOST_PAGE):
            yield tier, joined_keys(listed[first : first + MOST_PAGE])
