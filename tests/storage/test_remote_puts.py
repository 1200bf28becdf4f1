# SPDX-License-Identifier: Apache-2.0
"""What the remote tier makes of the answers to its puts: conflicts, and conditions that a bucket
refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from support.small_bucket import Faults, SmallBucket

from portakv.storage.form import BlockForm
from portakv.storage.image import Row, seal
from portakv.storage.tiers.remote import Remote, RemoteStore
from portakv.storage.work import Graph

FORM = BlockForm(
    "m", "float16", 2, (8, 8), 16, (0, 4, 4), (0, 2, 2), "block layer head kv token dim"
)
KEYS = [bytes([n]) * 32 for n in range(4)]
CONFLICT = 409, b"<Error><Code>ConditionalRequestConflict</Code></Error>"
REFUSED_HEADER = (
    b"<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that "
    b"is not implemented</Message><Header>If-None-Match</Header></Error>"
)
Answer = tuple[int, bytes]


@pytest.fixture
def bucket() -> Iterator[SmallBucket]:
    with SmallBucket() as made:
        yield made
        made.shutdown()


def opened(bucket: SmallBucket, **settings: Any) -> RemoteStore:
    """Return the tier's store of the form, whose requests are tried twice."""
    pauses = {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.02)}
    retry: Any = {
        "max_retries": 1,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {**pauses, "base": 2},
    }
    keys: Any = {"access_key_id": "test", "secret_access_key": "test"}
    remote = Remote("s3://small/kv", retry_config=retry, **bucket.options, **keys, **settings)
    (stored,) = remote.open(Graph(), None, [FORM])
    return stored


def image(key: bytes) -> Row:
    """Return a sealed image of random bytes."""
    row = np.random.default_rng([*key]).integers(0, 256, FORM.image_bytes, np.uint8)
    seal(row, FORM, key, 1)
    return row


def save(stored: RemoteStore, *keys: bytes, report: Any = lambda *each: None) -> list[bool]:
    """Write blocks."""
    rows = [image(key) for key in keys]
    queue = stored.queue_for_write(1)
    return stored.write(queue, keys, rows, [1] * len(keys), [()] * len(keys), report=report)


def load(stored: RemoteStore, key: bytes) -> bool:
    """Return whether a block came, with the right bytes."""
    row = np.full(FORM.image_bytes, 0xEE, np.uint8)
    (well,) = stored.read([key], [row])
    return well and row.tobytes() == image(key).tobytes()


def path(key: bytes) -> str:
    return f"kv/1/{FORM.name}/{key.hex()[:2]}/{key.hex()}"


class Puts:
    """Answers the puts of one name, so many times; counts all of them.

    Attributes:
        puts: the puts of the name until now, each with whether it had a condition.
        first: is called before an answer.
    """

    def __init__(
        self,
        bucket: SmallBucket,
        name: str,
        answer: Answer,
        times: int = 99,
        conditional: bool = False,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        self.puts = list[bool]()
        self._name = name
        self._answer = answer
        self._left = times
        self._conditional = conditional
        self._first = first
        bucket.faults = Faults(puts=self.answer)

    def answer(self, path: str, conditional: bool) -> Answer | None:
        if self._name not in path:
            return None
        self.puts.append(conditional)
        if not self._left or (self._conditional and not conditional):
            return None
        self._left -= 1
        self._first()
        return self._answer


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_put_that_conflicts_is_no_success_unless_an_object_is_there(
    bucket: SmallBucket, times: int
) -> None:
    """S3 answers 409 if a delete that ran meanwhile has won: nothing was stored."""
    stored = opened(bucket)
    puts = Puts(bucket, KEYS[0].hex(), CONFLICT, times)
    reported: list[Any] = []
    assert save(stored, KEYS[0], report=lambda *each: reported.append(each)) == [times < 3]
    assert (path(KEYS[0]) in bucket.objects) == (times < 3)
    assert stored.has(KEYS[:1]) == [times < 3]
    assert load(stored, KEYS[0]) == (times < 3)
    assert len(puts.puts) == min(times + 1, 3)
    if times < 3:
        assert not reported
        return
    ((key, reason),) = reported
    assert key == KEYS[0]
    assert reason.kind == "unreachable"
    assert "status code: 409 (ConditionalRequestConflict)" in reason.where


def test_a_form_whose_put_conflicts_is_put_again(bucket: SmallBucket) -> None:
    stored = opened(bucket)
    Puts(bucket, "form.json", CONFLICT, 1)
    assert save(stored, KEYS[0]) == [True]
    assert f"kv/1/{FORM.name}/form.json" in bucket.objects


def test_a_conflict_with_another_writer_is_a_success(bucket: SmallBucket) -> None:
    """Its object is there, and stays."""
    stored = opened(bucket)

    def lay() -> None:
        bucket.objects[path(KEYS[0])] = image(KEYS[0]).tobytes()

    puts = Puts(bucket, KEYS[0].hex(), CONFLICT, first=lay)
    assert save(stored, KEYS[0]) == [True]
    assert puts.puts == [True]
    assert load(stored, KEYS[0])


def test_a_conflict_that_leaves_a_damaged_object_is_no_success(bucket: SmallBucket) -> None:
    stored = opened(bucket)
    bucket.objects[path(KEYS[0])] = b"damaged"
    assert not load(stored, KEYS[0])
    Puts(bucket, KEYS[0].hex(), CONFLICT)
    assert save(stored, KEYS[0]) == [False]
    assert stored.has(KEYS[:1]) == [False]
    bucket.faults = Faults()
    assert save(stored, KEYS[0]) == [True]
    assert load(stored, KEYS[0])


@pytest.mark.parametrize(
    "answer",
    [
        (501, REFUSED_HEADER),
        (501, b""),
        (400, REFUSED_HEADER),
        (400, b"<Error><Code>InvalidArgument</Code></Error>"),
        (400, b""),
    ],
)
def test_a_bucket_without_conditional_puts_gets_puts_without_a_condition(
    bucket: SmallBucket, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    stored = opened(bucket)
    puts = Puts(bucket, "", answer, conditional=True)
    assert save(stored, *KEYS[:3]) == [True] * 3
    assert all(load(stored, key) for key in KEYS[:3])
    assert sum(puts.puts) == (2 if answer[0] == 501 else 1), "it is not tried again"
    assert caplog.text.count("conditional_put='disabled'") == 1
    assert stored.statistics()["error"] == ""

    # A damaged object is written anew, too.
    bucket.objects[path(KEYS[0])] = b"damaged"
    assert not load(stored, KEYS[0])
    assert save(stored, KEYS[0]) == [True]
    assert load(stored, KEYS[0])


@pytest.mark.parametrize("code", ["ExpiredToken", "EntityTooLarge", "RequestTimeout"])
def test_a_put_that_is_refused_for_another_reason_names_it(
    bucket: SmallBucket, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not tried without a condition."""
    stored = opened(bucket)
    puts = Puts(bucket, KEYS[0].hex(), (400, f"<Error><Code>{code}</Code></Error>".encode()))
    assert save(stored, KEYS[0]) == [False]
    assert puts.puts == [True]
    assert f"status code: 400 ({code})" in caplog.text
    assert "conditional_put" not in caplog.text


def test_a_put_that_fails_without_a_condition_names_that_failure(
    bucket: SmallBucket, caplog: pytest.LogCaptureFixture
) -> None:
    """The next put has a condition again."""
    stored = opened(bucket)
    assert save(stored, KEYS[3]) == [True]
    denied = 403, b"<Error><Code>AccessDenied</Code></Error>"
    made = list[bool]()

    def answer(path: str, conditional: bool) -> Answer:
        made.append(conditional)
        return (400, b"") if conditional else denied

    bucket.faults = Faults(puts=answer)
    assert save(stored, KEYS[0]) == [False]
    assert made == [True, False]
    assert "status code: 403 (AccessDenied)" in caplog.text
    assert "conditional_put" not in caplog.text
    puts = Puts(bucket, KEYS[1].hex(), denied, times=0)
    assert save(stored, KEYS[1]) == [True]
    assert puts.puts == [True]


def test_conditions_can_be_left_out_by_a_setting(bucket: SmallBucket) -> None:
    stored = opened(bucket, conditional_put="disabled")
    puts = Puts(bucket, "", (501, b""), conditional=True)
    assert save(stored, KEYS[0]) == [True]
    assert puts.puts == [False, False]
    assert load(stored, KEYS[0])
