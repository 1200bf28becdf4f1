# SPDX-License-Identifier: Apache-2.0
"""The bucket of an engine's store: its terms, and lookups that no scheduler waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from portakv.arguments import kind_of, text
from portakv.errors import InvalidTerms, PortaKVError
from portakv.runtime.bounded import Until
from portakv.serving.groups import Validity
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Keys
from portakv.storage.tiers.remote import Remote, check_remote
from portakv.tasks import runtime

#: Seconds that a lookup may take: less than a scheduler side's patience, so that a request gets the
#: blocks that the bucket has confirmed by then.
LOOKUP = 1.5
#: Seconds for which blocks that a lookup has found are offered. The store believes it for longer.
FOUND = 30.0
#: Seconds after which the end of a lookup is expected no longer.
LOST = 2 * LOOKUP
#: Seconds for which a block that the bucket did not confirm is not looked up again.
MISSING = 5.0
#: Seconds after which a waiting request asks again; a `RemoteStore` believes an answer for longer.
BELIEVED = 10.0
#: The most lookups at a time, and those that wait for a worker.
WORKERS = 4
MOST = 64
#: Names of options that are `Remote`'s own, and not settings of the package for object stores.
OWN = ("workers", "multipart", "compress")
#: Names of options that are secret, or that may hold secrets.
SECRET = re.compile("secret|token|password|credential|key|sas|authorization|headers", re.IGNORECASE)


def check_bucket(bucket: object, options: object) -> None:
    """Raise `InvalidTerms` for the address or the options of a bucket that are wrong or secret.

    An engine prints its configuration. No error shows a value.
    """
    bucket = text("bucket", bucket)
    if "://" not in bucket:
        raise InvalidTerms(
            "Expected bucket as an address such as s3://bucket/prefix, got one without '://'. "
            "Correct it."
        )
    if "@" in bucket:
        raise InvalidTerms(
            "Expected bucket without a name or password before '@', got one with it. Pass "
            "credentials by the environment."
        )
    if not isinstance(options, Mapping):
        raise InvalidTerms(
            f"Expected bucket_options as an object, got {kind_of(options)}. Correct it."
        )
    _check_not_secret(options)
    if "url" in options:
        raise InvalidTerms("Expected the address as bucket, got url in bucket_options. Move it.")
    some = {name: value for name, value in options.items() if name in OWN}
    check_remote(bucket, **some, settings={**options})


def bucket_of(bucket: str, options: Mapping[str, Any]) -> Remote:
    """Return the tier of a bucket, not open yet. Sends no request.

    Raises `StoreError` without the package for object stores, or for an address or an option that
    the package refuses; no value is shown.
    """
    settings = {name: _copied(value) for name, value in options.items()}
    return Remote(bucket, **settings)


def _copied(value: Any) -> Any:
    """Return a value whose mappings are dicts, as the package for object stores takes them."""
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return value


def _check_not_secret(options: Mapping[Any, object]) -> None:
    """Raise `InvalidTerms` for an option that may be a secret."""
    for name, value in options.items():
        name = text("the name of an option of the bucket", name)
        if SECRET.search(name) or (isinstance(value, str) and "@" in value):
            raise InvalidTerms(
                f"Expected bucket_options without secrets, as an engine prints them, got "
                f"{name!r}. Pass credentials by the environment, such as AWS_SECRET_ACCESS_KEY."
            )
        if isinstance(value, Mapping):
            _check_not_secret(value)


class BucketAnswers:
    """What a scheduler knows of the lookups in a bucket that have begun for it.

    It begins a lookup of the blocks that are not known, and remembers which blocks were not found.
    It waits for nothing. Any thread may call.

    Args:
        begin: begins a lookup of keys, whose end it reports by `ended`; also takes the number of
            the first one in its request.
        now: returns the time in seconds.
        partial: more blocks may be loaded where fewer cannot, such as with states. Then what a
            lookup did not find holds for its last block, else for the first one that is missing.
    """

    def __init__(
        self,
        begin: Callable[[Keys, int], object],
        now: Callable[[], float] = time.monotonic,
        partial: bool = False,
    ) -> None:
        self._partial = partial
        self._begin = begin
        self._now = now
        self._since = now()
        self._lock = runtime().lock
        #: By the key that names a lookup that has not ended, until when its end is expected.
        self._open = dict[bytes, float]()
        #: Whether blocks are believed to be in the bucket; others are looked up.
        self._beliefs: Until[bytes] = Until("beliefs about blocks of a bucket", 1 << 17, now)
        self._answers = True  # the bucket answered the last lookup in time

    @property
    def expired(self) -> int:
        """Return a number that changes when answers become too old to be offered again."""
        return int((self._now() - self._since) / BELIEVED)

    def has(self, key: bytes) -> bool:
        """Return whether a lookup has found a block a short time ago."""
        return self._beliefs.held(key) is True

    def leading(self, keys: Keys, known: int, number: int = 0) -> int | None:
        """Return how many leading blocks can be loaded, or None if a lookup is to end soon.

        No request waits for a bucket that did not answer the last lookup in time. Lookups go on
        meanwhile, one of which finds out when the bucket answers again.

        Args:
            known: how many leading blocks are known to be there.
            number: of the first key in its request.

        Raises what ``begin`` raises.
        """
        if known >= len(keys):
            return known
        first = keys[-1] if self._partial else keys[known]
        with self._lock:
            now = self._now()
            if self._beliefs.held(first) is False:
                return known
            begins = self._open.get(first, 0.0) <= now
            if begins and not self._may_begin(now):
                return known
            if begins:
                self._open[first] = now + LOST
        if begins:
            try:
                self._begin(keys[known:], number + known)
            except BaseException:  # also an interrupt
                with self._lock:
                    self._open.pop(first, None)
                raise
        return None if self._answers else known

    def ended(self, keys: Keys, count: int, answers: bool) -> None:
        """Note the end of a lookup.

        Args:
            keys: with which it began.
            count: how many leading blocks of them can be loaded.
            answers: the bucket answered in time.
        """
        with self._lock:
            self._open.pop(keys[-1] if self._partial else keys[0], None)
            for key in keys[:count]:
                self._beliefs.hold(key, FOUND)
            if count < len(keys):
                self._beliefs.hold(keys[-1] if self._partial else keys[count], MISSING, False)
            self._answers = answers

    def _may_begin(self, now: float) -> bool:
        """Return whether another lookup may begin, under the lock."""
        if len(self._open) >= MOST:
            self._open = {key: until for key, until in self._open.items() if until > now}
        return len(self._open) < MOST


def look_up(
    groups: Sequence[Sequence[FormStore]],
    keys: Keys,
    ended: Callable[[int, bool], object],
    validity: Validity,
    first: int = 0,
) -> None:
    """Begin to look up blocks. Report later how many can be loaded, and whether that came in time.

    Args:
        groups: of one store, the parts of each group of layers. A block is there if all parts have
            it.
        keys: of the blocks.
        ended: takes the report.
        validity: which prefixes the groups can serve.
        first: the number of the first block in its request.
    """
    until = runtime().time() + LOOKUP
    counting = partial(_count, groups, keys, validity, first, until)
    runtime().start(_look_up(groups[0][0], counting, ended, until))


async def _look_up(
    store: FormStore,
    counting: Callable[[], int],
    ended: Callable[[int, bool], object],
    until: float,
) -> None:
    queue = store.graph.queue("lookup", WORKERS)
    count = 0
    with suppress(PortaKVError):  # the store was closed
        count = await queue.call("lookup", counting)
    ended(count, count > 0 or runtime().time() < until)


def _count(
    groups: Sequence[Sequence[FormStore]],
    keys: Keys,
    validity: Validity,
    first: int,
    until: float,
) -> int:
    """Return how many leading blocks can be loaded, as far as is known by a time."""

    def left() -> float:
        return max(0.0, until - runtime().time())

    def leading(number: int, many: int) -> int:
        for part in groups[number]:
            many = part.lookup(keys[:many], left()) if many and left() else 0
        return many

    def there(number: int, many: int) -> list[bool]:
        parts = [part.lookup_each(keys[:many], left()) for part in groups[number]]
        return [all(each) for each in zip(*parts, strict=True)]

    return validity.longest(first, len(keys), leading, there)
