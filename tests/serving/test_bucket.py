# SPDX-License-Identifier: Apache-2.0
"""The bucket of an engine's store: its terms, and a scheduler that waits for no answer of it."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ready
from support.held_bucket import HeldBucket, TermsWith
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import InvalidTerms, StoreError, TransferError
from portakv.serving import Group, SchedulerSide, Validity
from portakv.serving.bucket import BELIEVED, FOUND, LOST, MISSING, MOST, BucketAnswers
from portakv.serving.local import GroupView, LocalIndex, StoreTerms
from portakv.serving.scheduler import PATIENCE
from portakv.storage import Remote, prefix_keys
from portakv.storage.store import FormStore
from portakv.storage.work import Handle

SIZE = 8
TOKENS = [*range(40)]
KEYS = prefix_keys(TOKENS, SIZE)
MORE = prefix_keys(range(64), SIZE)
ROOM: dict[str, Any] = {"host": 0, "staging": 1 << 20}
SECRET = "wJalrXUtnSECRETbPxRfi"


def a_view() -> KVView:
    caches = [torch.arange(8.0 * 2 * SIZE).reshape(8, 2, SIZE)]
    return KVView(caches, "layer | block page", block_size=SIZE)


def put(bucket: HeldBucket, count: int) -> None:
    """Have another store save blocks in a bucket."""
    view = a_view()
    index = LocalIndex()
    (store,) = index.open([GroupView(view)], TermsWith.a_bucket(bucket, **ROOM), "model", SIZE)
    store.save(view, range(count), KEYS[:count]).synchronize(LIMIT)
    index.close()


@pytest.fixture
def bucket() -> Iterator[HeldBucket]:
    made = HeldBucket()
    yield made
    made.release()


def opened(bucket: HeldBucket, **terms: Any) -> tuple[LocalIndex, FormStore, KVView]:
    """Return the index and the store of an engine."""
    view = a_view()
    index = LocalIndex()
    made = TermsWith.a_bucket(bucket, **{**ROOM, **terms})
    (store,) = index.open([GroupView(view)], made, "model", SIZE)
    return index, store, view


# --- terms


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"bucket": 5}, "Expected bucket"),
        ({"bucket": "blocks"}, "without '://'"),
        ({"bucket": "s3://b/../c"}, "without . and .."),
        ({"bucket": f"s3://b?sig={SECRET}"}, "without a query"),
        ({"bucket": f"s3://AK:{SECRET}@b/c"}, "without a name or password"),
        ({"bucket_options": {"region": "x"}}, "got no bucket"),
        ({"bucket": "s3://b", "bucket_options": 5}, "bucket_options as an object"),
        ({"bucket": "s3://b", "bucket_options": {"url": "s3://c"}}, "Move it"),
        ({"bucket": "s3://b", "bucket_options": {"workers": 0}}, "workers="),
        ({"bucket": "s3://b", "bucket_options": {"compress": "lz4"}}, "compress="),
        ({"bucket": "s3://b", "bucket_options": {"client_options": 1}}, "client_options="),
        ({"bucket": "s3://b", "by_layer": True}, "by_layer without a bucket"),
    ],
)
def test_wrong_terms_of_a_bucket_are_refused(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says) as caught:
        StoreTerms.of(terms)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"secret_access_key": SECRET},
        {"AWS_SESSION_TOKEN": SECRET},
        {"account_key": SECRET},
        {"sas_token": SECRET},
        {"endpoint": f"http://a:{SECRET}@host"},
        {"client_options": {"default_headers": {"x-auth": SECRET}}},
        {"client_options": {"proxy_url": f"http://a:{SECRET}@host"}},
    ],
)
def test_an_option_that_may_be_a_secret_is_refused_by_name(options: dict[str, Any]) -> None:
    """An engine prints its configuration."""
    with pytest.raises(InvalidTerms, match="Pass credentials by the environment") as caught:
        StoreTerms.of({"bucket": "s3://b/c", "bucket_options": options})
    assert SECRET not in str(caught.value)


def test_a_folder_as_bucket_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidTerms, match="which others may write"):
        StoreTerms.of({"bucket": f"file://{tmp_path}"})


def test_options_reach_the_bucket_and_a_refused_one_is_one_sentence() -> None:
    terms = StoreTerms(bucket="s3://b/c", bucket_options={"region": "r", "workers": 3})
    (tier,) = terms.tiers()
    assert getattr(tier, "workers", 0) == 3
    wrong = StoreTerms(bucket="s3://b/c", bucket_options={"colour": "red"})
    with pytest.raises(StoreError, match="Expected"):
        LocalIndex().open([GroupView(a_view())], wrong, "model", SIZE)


# --- lookups


def test_blocks_that_only_a_bucket_has_are_found_and_loaded(bucket: HeldBucket) -> None:
    """The index first answers that it does not know, then what the bucket has."""
    put(bucket, 3)
    index, store, view = opened(bucket)
    assert index.leading(KEYS) is None
    assert until(lambda: index.leading(KEYS) == 3, LIMIT)
    assert index.has(KEYS[2])
    assert not index.has(KEYS[3])
    rows = view.tensors[0][:3].clone()
    view.tensors[0].zero_()
    store.load(view, range(3), KEYS[:3]).synchronize(LIMIT)
    assert torch.equal(view.tensors[0][:3], rows)
    requests = bucket.requests
    assert index.leading(KEYS[:3]) == 3  # the answer is remembered
    assert bucket.requests == requests
    index.close()
    assert index.leading(KEYS) == 0


def test_an_index_does_not_wait_for_a_bucket_that_does_not_answer(bucket: HeldBucket) -> None:
    put(bucket, 3)
    index, _, _ = opened(bucket)
    bucket.hold()
    assert index.leading(KEYS) is None
    assert until(lambda: bucket.waiting > 0, LIMIT)
    # After a lookup that got no answer, requests are computed and do not wait.
    assert until(lambda: index.leading(KEYS) == 0, LIMIT)
    assert bucket.waiting > 0
    other = prefix_keys(range(100, 140), SIZE)
    assert index.leading(other) == 0
    bucket.release()
    assert until(lambda: index.leading(KEYS) == 3, LIMIT)
    assert until(lambda: index.leading(prefix_keys(range(200, 240), SIZE)) is None, LIMIT)
    index.close()


def test_an_index_that_asks_itself_does_wait(bucket: HeldBucket) -> None:
    """Otherwise the test above proves nothing: `FormStore.lookup` waits until its timeout."""
    index, store, _ = opened(bucket)
    bucket.hold()
    began = store.graph.clock()
    assert store.lookup(KEYS, timeout=0.3) == 0
    assert store.graph.clock() >= began + 0.3
    bucket.release()
    index.close()


def test_a_request_waits_for_a_bucket_no_longer_than_the_patience_of_a_scheduler_side(
    bucket: HeldBucket,
) -> None:
    now = 0.0
    index, _, _ = opened(bucket)
    scheduler_side = SchedulerSide(SIZE, [Group(SIZE)], 1, index, lambda: now)
    scheduler_side.add("a", TOKENS)
    bucket.hold()
    assert scheduler_side.leading("a", 0) is None
    now += PATIENCE
    assert scheduler_side.leading("a", 0) == 0
    bucket.release()
    index.close()


def test_blocks_of_a_bucket_go_through_a_scheduler_side(bucket: HeldBucket) -> None:
    put(bucket, 5)
    index, _, _ = opened(bucket)
    scheduler_side = SchedulerSide(SIZE, [Group(SIZE)], 1, index)
    scheduler_side.add("a", TOKENS)
    # The last token is the engine's.
    assert until(lambda: scheduler_side.leading("a", 0) == 4 * SIZE, LIMIT)
    index.close()


def test_a_block_of_several_groups_is_asked_for_in_all(bucket: HeldBucket) -> None:
    """The second group has two of the three blocks of the first one."""
    views = [a_view(), a_view()]
    terms = TermsWith.a_bucket(bucket, **ROOM)
    writer = LocalIndex()
    stores = writer.open([GroupView(view) for view in views], terms, "model", SIZE)
    for store, view, count in zip(stores, views, (3, 2), strict=True):
        store.save(view, range(count), KEYS[:count]).synchronize(LIMIT)
    writer.close()
    index = LocalIndex()
    index.open([GroupView(view) for view in views], terms, "model", SIZE)
    assert index.leading(KEYS) is None
    assert until(lambda: index.leading(KEYS) == 2, LIMIT)
    index.close()


def test_a_prefix_in_a_bucket_ends_where_a_state_is(bucket: HeldBucket) -> None:
    """Rows of four blocks, a state at the ends of the first and the third."""
    views = [a_view(), KVView(torch.arange(160.0).reshape(8, 1, 20), "block token dim")]
    groups = [GroupView(views[0]), GroupView(views[1], "states", None)]
    terms = TermsWith.a_bucket(bucket, **ROOM)
    writer = LocalIndex()
    rows, states = writer.open(groups, terms, "model", SIZE)
    rows.save(views[0], range(4), KEYS[:4]).synchronize(LIMIT)
    states.save(views[1], [0, 2], [KEYS[0], KEYS[2]]).synchronize(LIMIT)
    writer.close()
    index = LocalIndex()
    index.validity = Validity([Group(SIZE), Group(SIZE, states="last")], SIZE)
    index.open(groups, terms, "model", SIZE)
    assert index.leading(KEYS) is None
    assert until(lambda: index.leading(KEYS) == 3, LIMIT)
    assert index.leading(KEYS) == 3  # no lookup goes on
    assert until(lambda: index.leading(KEYS[:2]) == 1, LIMIT)
    longer = LocalIndex()
    longer.validity = Validity([Group(SIZE), Group(SIZE, states="last")], SIZE)
    longer.open(groups, terms, "model", SIZE)
    other = [*prefix_keys([7, 7, *TOKENS], SIZE)[:1], *KEYS[:1]]
    assert until(lambda: longer.leading(other[:1]) == 0, LIMIT)
    assert until(lambda: longer.leading(KEYS[1:2]) == 0, LIMIT)  # rows without a state
    assert until(lambda: longer.leading(KEYS[1:3]) == 2, LIMIT)  # a longer one is looked up
    index.close()
    longer.close()


def test_an_index_without_a_bucket_never_says_that_it_does_not_know() -> None:
    index = LocalIndex()
    index.open([GroupView(a_view())], StoreTerms(host=1 << 20, staging=1 << 20), "model", SIZE)
    assert index.leading(KEYS) == 0
    losses = index.losses
    assert index.losses == losses
    index.close()


# --- what a scheduler knows, by a clock of the test


class Clocked:
    """What a scheduler knows, and the lookups that it has begun."""

    def __init__(self) -> None:
        self.now = 1.0
        self.begun = list[Sequence[bytes]]()
        self.answers = BucketAnswers(lambda keys, _: self.begun.append(keys), lambda: self.now)


def test_a_block_that_a_bucket_lacks_is_asked_for_again_later() -> None:
    case = Clocked()
    assert case.answers.leading(KEYS, 1) is None
    assert case.answers.leading(KEYS, 1) is None
    assert case.begun == [KEYS[1:]]  # once
    case.answers.ended(KEYS[1:], 2, True)
    assert case.answers.leading(KEYS, 3) == 3
    assert len(case.begun) == 1
    assert case.answers.leading(KEYS, 5) == 5  # all are known
    case.now += MISSING
    assert case.answers.leading(KEYS, 3) is None
    assert case.begun == [KEYS[1:], KEYS[3:]]


def test_no_request_waits_after_a_lookup_without_an_answer() -> None:
    """Lookups go on; the first one with an answer lets requests wait again."""
    case = Clocked()
    other = prefix_keys(range(100, 140), SIZE)
    third = prefix_keys(range(200, 240), SIZE)
    assert case.answers.leading(KEYS, 0) is None
    case.answers.ended(KEYS, 0, False)
    assert case.answers.leading(KEYS, 0) == 0
    assert case.answers.leading(other, 0) == 0
    assert case.begun == [KEYS, other]
    case.answers.ended(other, 5, True)
    assert case.answers.leading(third, 0) is None


def test_blocks_that_a_bucket_has_are_believed_for_a_while() -> None:
    case = Clocked()
    assert case.answers.leading(KEYS, 0) is None
    case.answers.ended(KEYS, 3, True)
    assert [case.answers.has(key) for key in KEYS] == [True] * 3 + [False] * (len(KEYS) - 3)
    case.now += FOUND
    assert not case.answers.has(KEYS[0])


def test_a_lookup_whose_end_is_never_reported_is_begun_anew() -> None:
    case = Clocked()
    assert case.answers.leading(KEYS, 0) is None
    case.now += LOST
    assert case.answers.leading(KEYS, 0) is None
    assert case.begun == [KEYS, KEYS]


def test_lookups_are_bounded() -> None:
    case = Clocked()
    many = [prefix_keys(range(n, n + SIZE), SIZE) for n in range(1000, 1001 + MOST)]
    answers = [case.answers.leading(keys, 0) for keys in many]
    assert answers == [None] * MOST + [0]
    case.answers.ended(many[0], 0, True)
    assert case.answers.leading(many[-1], 0) is None
    assert case.begun[-1] == many[-1]


def test_a_lookup_that_cannot_begin_is_not_waited_for() -> None:
    def fail(keys: object, first: object) -> None:
        raise StoreError("Expected an open store, got a closed one. Make another.")

    answers = BucketAnswers(fail)
    for _ in range(2):
        with pytest.raises(StoreError):
            answers.leading(KEYS, 0)


def test_an_answer_that_becomes_old_is_asked_for_again() -> None:
    """A scheduler side remembers an answer while its index reports no loss."""
    case = Clocked()
    first = case.answers.expired
    case.now += BELIEVED / 2
    assert case.answers.expired == first
    case.now += BELIEVED
    assert case.answers.expired != first


# --- a bucket that fails


def test_an_engine_starts_with_a_bucket_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """Its blocks are misses, saves go to the other tiers, and the log has one line."""
    with socket.socket() as unheard:  # refuses connections
        unheard.bind(("127.0.0.1", 0))
        options = {
            "endpoint": f"http://127.0.0.1:{unheard.getsockname()[1]}",
            "region": "us-east-1",
            "skip_signature": True,
            "retry_config": {"max_retries": 0},
            "client_options": {"allow_http": True},
        }
        terms = StoreTerms(
            host=1 << 20, staging=1 << 20, bucket="s3://blocks/kv", bucket_options=options
        )
        index = LocalIndex()
        view = a_view()
        with caplog.at_level(logging.WARNING):
            (store,) = index.open([GroupView(view)], terms, "model", SIZE)
            save = store.save(view, [0, 1], KEYS[:2])
            with pytest.raises(TransferError, match="unreachable"):
                save.synchronize(LIMIT)
            assert until(lambda: index.leading(KEYS) == 2, LIMIT)  # host memory has them
            assert until(lambda: index.leading(prefix_keys(range(50, 90), SIZE)) == 0, LIMIT)
        index.close()
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 1, lines
    assert "s3://blocks/kv" in lines[0]
    assert "its blocks are misses" in lines[0]


class SilentServer:
    """A server that accepts connections and answers nothing."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.connections = list[socket.socket]()
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                self.connections.append(self.socket.accept()[0])

    def bucket(self, seconds: float) -> Remote:
        """Return a bucket of this server, whose requests wait for minutes."""
        made = Remote(
            "s3://blocks/kv",
            endpoint=f"http://127.0.0.1:{self.socket.getsockname()[1]}",
            region="us-east-1",
            skip_signature=True,
            retry_config={"max_retries": 0},
            client_options={"allow_http": True, "read_timeout": "10m", "timeout": "10m"},
        )
        made.search_seconds = seconds
        return made

    def close(self) -> None:
        """Close all connections."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(LIMIT)
        for each in self.connections:
            each.close()


@pytest.fixture
def server() -> Iterator[SilentServer]:
    made = SilentServer()
    yield made
    with suppress(OSError):
        made.close()


def open_two_groups(made: Remote) -> LocalIndex:
    """Return the index of an engine with two groups of layers."""
    index = LocalIndex()
    index.open(
        [GroupView(a_view()), GroupView(a_view())],
        TermsWith.a_bucket(made, host=1 << 20),
        "model",
        SIZE,
    )
    return index


def test_an_engine_starts_with_a_bucket_that_is_silent(
    server: SilentServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for one request in all, whatever the groups of layers, and no longer than a search
    for other forms may take."""
    with caplog.at_level(logging.WARNING):
        index = open_two_groups(server.bucket(0.1))
    assert index.leading(KEYS) in (None, 0)
    assert until(lambda: len(server.connections) > 0, LIMIT)
    (line,) = [each.getMessage() for each in caplog.records]
    assert "its blocks are misses" in line
    assert "no answer in 0.1 s" in line
    server.close()
    index.close()


def test_control_without_the_limit_a_silent_bucket_holds_the_start_up(
    server: SilentServer,
) -> None:
    made = list[LocalIndex]()
    starting = threading.Thread(target=lambda: made.append(open_two_groups(server.bucket(600.0))))
    starting.start()
    assert until(lambda: len(server.connections) > 0, LIMIT)
    assert not made
    server.close()
    starting.join(LIMIT)
    assert len(server.connections) == 1
    made[0].close()


def has_ended(save: Handle) -> bool:
    """Return whether a save has ended, however it did."""
    try:
        return save.done()
    except TransferError:
        return True


def writes_to_disk(store: FormStore) -> float:
    """Return the bytes of writes to the disk that have not ended, whose rows it still needs."""
    queues = store.graph.statistics()["queue_bytes"]
    return sum(float(x["value"]) for x in queues if str(x["queue"]).startswith("disk"))


@pytest.fixture
def narrow() -> Iterator[HeldBucket]:
    """Return a bucket that takes one request at a time."""
    made = HeldBucket(workers=1)
    yield made
    made.release()


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_a_slow_bucket_costs_no_save_of_the_disk(
    guard: bool, narrow: HeldBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploads that wait give up rows that a save needs. Without the guard they hold all rows."""
    terms: dict[str, Any] = {"folder": str(tmp_path / "kv"), "capacity": 1 << 20}
    index, store, view = opened(narrow, **terms, staging=8 << 12)
    if not guard:
        vars(store)["_make_way"] = lambda *_: None
    most = store.rows.most
    assert 2 <= most <= 4
    narrow.hold()
    saves = list[Handle]()
    with caplog.at_level(logging.WARNING):
        for number, key in enumerate(MORE):
            before = MORE[number - 1] if number else None
            saves.append(store.save(view, [number], [key], after=before))
            if guard or number < most:
                assert until(lambda: not writes_to_disk(store), LIMIT)
                assert index.has(key)
            assert until(lambda: narrow.waiting > 0, LIMIT)
    held = most - 1 if guard else most
    assert until(lambda: all(map(has_ended, saves[held:-1])), LIMIT)
    assert not any(map(has_ended, saves[:held]))
    assert sum(map(index.has, MORE)) == (len(MORE) if guard else most)
    lines = [each for each in caplog.records if "slower than saves" in each.getMessage()]
    assert len(lines) == guard

    narrow.release()
    some = [*saves[:held], saves[-1]] if guard else saves[:held]
    for save in some:
        save.synchronize(LIMIT)
    counted = store.graph.statistics()["tier_blocks_total"]
    figures = {(x["tier"], x["op"], x["result"]): x["value"] for x in counted}
    assert figures.get(("remote", "save", "dropped"), 0) == (len(MORE) - most if guard else 0)
    assert figures["remote", "save", "hit"] == len(some)
    index.close()


def test_a_bucket_that_keeps_up_loses_no_block(narrow: HeldBucket, tmp_path: Path) -> None:
    """One save has all rows; its uploads wait for each other."""
    terms: dict[str, Any] = {"folder": str(tmp_path / "kv"), "capacity": 1 << 20}
    index, store, view = opened(narrow, **terms, staging=8 << 12)
    most = store.rows.most
    store.save(view, range(most), MORE[:most]).synchronize(LIMIT)
    another = opened(narrow)[0]  # without the disk
    assert until(lambda: another.leading(MORE[:most]) == most, LIMIT)
    another.close()
    index.close()


# --- several processes

_ENGINE = """
import json, sys, torch
from portakv import KVView
from portakv.serving.local import GroupView, LocalIndex, StoreTerms
from portakv.storage import prefix_keys
view = KVView([torch.full((8, 2, 8), 7.0)], "layer | block page", block_size=8)
terms = StoreTerms.of(json.loads(sys.argv[1]))
index = LocalIndex()
(store,) = index.open([GroupView(view)], terms, "model", 8)
keys = prefix_keys(range(40), 8)
store.save(view, range(5), keys).synchronize(30)
index.close()
"""


def test_what_one_engine_saved_another_one_loads_from_the_bucket_alone(tmp_path: Path) -> None:
    terms: dict[str, Any] = {**ROOM, "bucket": f"file://{tmp_path / 'bucket'}"}
    ready.run("-c", _ENGINE, json.dumps(terms), timeout=LIMIT).check_returncode()
    view = KVView([torch.zeros(8, 2, SIZE)], "layer | block page", block_size=SIZE)
    index = LocalIndex()
    (store,) = index.open([GroupView(view)], StoreTerms.of(terms), "model", SIZE)
    assert index.leading(KEYS) is None
    assert until(lambda: index.leading(KEYS) == 5, LIMIT)
    store.load(view, range(5), KEYS).synchronize(LIMIT)
    assert (view.tensors[0][:5] == 7.0).all()
    assert not view.tensors[0][5:].any()
    index.close()
