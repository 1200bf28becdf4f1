# SPDX-License-Identifier: Apache-2.0
"""The remote tier against a real S3 server over HTTP (moto's, or that of ``PORTAKV_TEST_S3``:
``http://host:port/bucket`` with credentials in the environment), through a proxy that cuts, stalls,
slows and flips."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import obstore
import pytest
import torch
from obstore.store import S3Store
from prometheus_client import CollectorRegistry, generate_latest
from support import ready
from support.core_cases import noise
from support.storage_proxy import Fault, Proxy
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, StoreError, TransferError
from portakv.graph import Collector
from portakv.storage.form import BlockForm
from portakv.storage.image import HEADER, Row, seal
from portakv.storage.store import BlockStore
from portakv.storage.tiers.remote import FAILURES, Remote, RemoteStore
from portakv.storage.work import Graph

pytestmark = pytest.mark.xdist_group("s3")  # one process imports a server, which takes a second

CANONICAL = "block layer head kv token dim"
SMALL = BlockForm("m", "float16", 2, (8, 8), 16, (0, 4, 4), (0, 2, 2), CANONICAL)
LAYERED = BlockForm("m", "float16", 2, (512, 512), 16, (0, 8, 8), (0, 8, 8), CANONICAL)  # 2 MiB
SECRET = "wJalrXUtnSECRETbPxRfi"
OPEN = {"allow_http": True}
CREDENTIALS: Any = {"access_key_id": "AKTEST", "secret_access_key": SECRET}
if "PORTAKV_TEST_S3" in os.environ:
    CREDENTIALS = {}
KEYS = [bytes([n]) * 32 for n in range(40)]


class Case:
    """A separate prefix in the store, which is reached through the proxy, or around it."""

    def __init__(self, proxy: Proxy, bucket: str) -> None:
        self.proxy = proxy
        self.bucket = bucket
        self.prefix = uuid4().hex
        self.graph = Graph()
        self.now = 0.0
        self.raw = self.store(f"http://{proxy.store[0]}:{proxy.store[1]}", self.prefix)
        proxy.play()

    def store(self, endpoint: str, prefix: str) -> S3Store:
        options: Any = {
            "endpoint": endpoint,
            "region": "us-east-1",
            "client_options": OPEN,
            **CREDENTIALS,
        }
        return S3Store(self.bucket, prefix=prefix, **options)

    def remote(
        self,
        url: str = "",
        read_timeout: float = 5.0,
        retries: int = 3,
        retry_timeout: float = 20.0,
        **settings: Any,
    ) -> Remote:
        options = {"read_timeout": timedelta(seconds=read_timeout), **OPEN}
        pauses = {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.02)}
        retry = {"max_retries": retries, "retry_timeout": timedelta(seconds=retry_timeout)}
        retry["backoff"] = pauses
        where: Any = {"endpoint": self.proxy.url, "region": "us-east-1", "client_options": options}
        url = url or f"s3://{self.bucket}/{self.prefix}"
        remote = Remote(url, retry_config=retry, **where, **CREDENTIALS, **settings)
        remote.now = lambda: self.now
        return remote

    def tier_store(self, form: BlockForm = SMALL, **settings: Any) -> RemoteStore:
        return self.opened(self.remote(**settings), form)[0]

    def opened(self, remote: Remote, form: BlockForm) -> list[RemoteStore]:
        """Return a tier's stores for a form and the forms that it has, as a store opens them."""
        tier_stores = remote.open(self.graph, None, [form, *remote.forms(form)])
        self.proxy.play()
        return tier_stores

    def counted(self) -> dict[str, int]:
        counts = self.graph.statistics()["tier_blocks_total"]
        return {f"{one['op']} {one['result']}": int(one["value"]) for one in counts}

    def path(self, key: bytes, form: BlockForm = SMALL) -> str:
        return f"1/{form.name}/{key.hex()[:2]}/{key.hex()}"

    def lay(
        self, key: bytes, form: BlockForm = SMALL, data: Any = None, generation: int = 1
    ) -> Row:
        """Put a block around the proxy."""
        row = image(form, key, generation)
        data = row if data is None else data
        obstore.put(self.raw, self.path(key, form), data, use_multipart=False)
        return row


def image(form: BlockForm, key: bytes, generation: int = 1) -> Row:
    """Return a sealed image of random bytes."""
    row = np.random.default_rng([*key]).integers(0, 256, form.image_bytes, np.uint8)
    seal(row, form, key, generation)
    return row


def load(stored: RemoteStore, key: bytes, **how: Any) -> tuple[bool, Row]:
    """Return whether a block came, and its row."""
    row = np.full(stored.form.image_bytes, 0xEE, np.uint8)
    (well,) = stored.read([key], [row], **how)
    return well, row


def save(stored: RemoteStore, *keys: bytes) -> list[bool]:
    """Write blocks of random bytes."""
    rows = [image(stored.form, key) for key in keys]
    return stored.write(stored.queue_for_write(1), keys, rows, [1] * len(keys), [()] * len(keys))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Proxy, str]]:
    url = os.environ.get("PORTAKV_TEST_S3")
    moto = None
    if not url:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        moto = import_module("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        url = "http://{}:{}/blocks".format(*moto.get_host_and_port())
        urlopen(Request(url, method="PUT", headers={"x-amz-acl": "public-read-write"}))
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "", parts.port or 80)
    yield proxy, parts.path.strip("/")
    proxy.shutdown()
    proxy.server_close()
    if moto:
        moto.stop()


@pytest.fixture
def case(server: tuple[Proxy, str]) -> Case:
    return Case(*server)


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("cut", [0, 1, SMALL.image_bytes // 2, SMALL.image_bytes - 1])
def test_a_body_that_is_cut_is_resumed_from_its_first_missing_byte(
    case: Case, cut: int, reset: bool
) -> None:
    """Fault 35."""
    sealed = case.lay(KEYS[0])
    stored = case.tier_store()
    case.proxy.play(Fault("GET", cut=cut, reset=reset))
    well, row = load(stored, KEYS[0])
    assert well
    assert np.array_equal(row, sealed)
    assert len(case.proxy.requests) == 2
    assert case.proxy.sent <= len(sealed) + (64 << 10)


def test_three_cuts_cost_three_requests_and_few_bytes(case: Case) -> None:
    """Fault 35."""
    sealed = case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    case.proxy.play(*(Fault("GET", cut=500_000, reset=n == 1) for n in range(3)))
    well, row = load(stored, KEYS[0])
    assert well
    assert np.array_equal(row, sealed)
    last = len(sealed) - 1
    ranges = [line.partition("bytes=")[2] for line in case.proxy.requests]
    assert ranges == ["", f"500000-{last}", f"1000000-{last}", f"1500000-{last}"]
    assert case.proxy.sent <= len(sealed) + 3 * (64 << 10)


def test_a_part_of_a_block_that_is_cut_is_resumed(case: Case) -> None:
    """Fault 35."""
    case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    at = HEADER + LAYERED.segments[3].offset
    case.proxy.play(Fault("GET", cut=100), Fault("GET"), Fault("GET", cut=1000, reset=True))
    assert load(stored, KEYS[0], segments=[3])[0]
    last = at + LAYERED.segments[3].nbytes - 1
    ranges = [line.partition("bytes=")[2] for line in case.proxy.requests]
    assert ranges == ["0-4095", "100-4095", f"{at}-{last}", f"{at + 1000}-{last}"]


def test_more_cuts_than_the_budget_are_a_miss_in_time(case: Case) -> None:
    """Fault 36."""
    case.lay(KEYS[0])
    stored = case.tier_store(retries=3)
    case.proxy.play(Fault("GET", cut=100, times=99))
    assert not load(stored, KEYS[0])[0]
    assert len(case.proxy.requests) == 4
    assert case.counted() == {"load error": 1}
    case.proxy.play()
    assert load(stored, KEYS[0])[0]


@pytest.mark.parametrize("fault", [{"cut": 100}, {"answer": b"503 Slow Down\nx"}, {"cut": -1}])
def test_no_number_of_retries_outlasts_the_retry_timeout(case: Case, fault: Any) -> None:
    """Fault 36."""
    case.lay(KEYS[0], LAYERED)
    for seconds in (0.5, 2.0, 8.0):  # a busy machine takes its time for each request
        stored = case.tier_store(LAYERED, retries=100_000, retry_timeout=seconds)
        case.proxy.play(Fault("GET", times=100_000, **fault))
        assert not load(stored, KEYS[0])[0]
        if (sent := len(case.proxy.requests)) > 4:
            break
    assert (4 < sent < 100_000, {*case.counted()}) == (True, {"load error"})


def test_a_stall_longer_than_the_read_timeout_is_resumed(case: Case) -> None:
    """Fault 37."""
    sealed = case.lay(KEYS[0])
    stored = case.tier_store(read_timeout=0.3)
    case.proxy.play(Fault("GET", stall=5.0))
    well, row = load(stored, KEYS[0])
    assert well
    assert np.array_equal(row, sealed)
    assert len(case.proxy.requests) >= 2  # it did not wait for the first answer


def test_a_slow_body_is_left_between_two_pieces_after_the_deadline(case: Case) -> None:
    """Fault 38."""
    case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    ends = iter([False, True])
    case.proxy.play(Fault("GET", rate=4e6))
    rows = [np.zeros(LAYERED.image_bytes, np.uint8) for _ in range(2)]
    assert stored.read(KEYS[:2], rows, None, lambda: next(ends, True)) == [False, False]
    assert case.counted() == {"load late": 2}
    assert len(case.proxy.requests) == 1  # left after the first of three pieces, and not begun
    assert case.proxy.sent < LAYERED.image_bytes


def test_a_load_with_a_deadline_does_not_wait_for_a_slow_store(case: Case) -> None:
    """Fault 38. Ten seconds at 1 MB/s; what is under way is left within a piece."""
    shape = 5, 2, 16, 8, 512
    tensors = [torch.zeros(shape, dtype=torch.float16, device="cpu") for _ in range(8)]
    view = KVView(tensors, "layer | block kv token head dim")
    form = BlockForm.of(view, "m")
    for key in KEYS[:5]:
        case.lay(key, form)
    store = BlockStore(form, staging=64 << 20, tiers=[case.remote(workers=1)], full="wait")
    case.proxy.play(Fault("GET", rate=1e6, times=9))
    handle = store.load(view, range(5), KEYS[:5], deadline=0.5, missing="skip")
    handle.synchronize(LIMIT)
    assert not handle.landed.any()
    store.close()
    assert case.proxy.sent < 3 * form.image_bytes
    assert not any(tensor.any() for tensor in tensors)
    counts = store.statistics()["tier_blocks_total"]
    assert {(x["op"], x["result"]): x["value"] for x in counts if x["tier"] == "remote"} == {
        ("load", "late"): 5
    }


def test_a_block_that_is_there_when_the_deadline_passes_is_no_miss(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 38."""
    monkeypatch.setattr("portakv.storage.tiers.remote.POLL", 60.0)
    case.lay(KEYS[0])
    ends = iter([False])
    assert load(case.tier_store(), KEYS[0], stop=lambda: next(ends, True))[0]


@pytest.mark.parametrize("at", [9, 5000])
@pytest.mark.parametrize("times", [1, 2])
def test_a_byte_flipped_in_transit_is_fetched_again_then_a_miss(
    case: Case, at: int, times: int
) -> None:
    """Fault 39."""
    sealed = case.lay(KEYS[0])
    stored = case.tier_store()
    case.proxy.play(Fault("GET", flip=at, times=times))
    well, row = load(stored, KEYS[0])
    assert well == (times == 1)
    assert not well or np.array_equal(row, sealed)
    assert [line[:3] for line in case.proxy.requests if "form.json" not in line] == ["GET", "GET"]
    assert stored.has([KEYS[0]]) == [well]  # what is wrong twice with one ETag counts as missing
    assert obstore.head(case.raw, case.path(KEYS[0]))["size"] == len(sealed)


OTHER = replace(SMALL, model="another")
WRONG: dict[str, Callable[[Row], Any]] = {
    "truncated": lambda row: row[:-1],
    "empty": lambda row: b"",
    "too long": lambda row: bytes(row) + b"x",
    "another form": lambda row: image(OTHER, KEYS[0]),
    "another key": lambda row: image(SMALL, KEYS[1]),
    "another payload": lambda row: np.concatenate([row[:HEADER], image(SMALL, KEYS[1])[HEADER:]]),
}


@pytest.mark.parametrize("segments", [None, [0]])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_object_is_a_miss_and_can_be_written_again(
    case: Case, wrong: str, segments: list[int] | None
) -> None:
    """Fault 40."""
    case.lay(KEYS[0], data=WRONG[wrong](image(SMALL, KEYS[0])))
    stored = case.tier_store()
    assert not load(stored, KEYS[0], segments=segments)[0]
    assert case.counted() == {"load refetched": 1, "load fault": 1}
    assert stored.has([KEYS[0]]) == [False]
    case.now += 10
    assert save(stored, KEYS[0]) == [True]
    assert load(stored, KEYS[0])[0]


def test_an_object_that_changes_in_between_is_never_mixed(case: Case) -> None:
    """Fault 41."""
    case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    new = image(LAYERED, KEYS[0], 2)
    change = Fault("GET", before=lambda: case.lay(KEYS[0], LAYERED, new))
    case.proxy.play(Fault("GET", cut=700_000), change)
    assert not load(stored, KEYS[0])[0]
    well, row = load(stored, KEYS[0])
    assert well
    assert np.array_equal(row, new)


def test_a_range_that_is_ignored_never_gives_wrong_bytes(case: Case) -> None:
    """Fault 42."""
    sealed = case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    case.proxy.play(Fault("GET", cut=700_000), Fault("GET", whole=True))
    assert not load(stored, KEYS[0])[0]
    case.proxy.play(Fault("GET", whole=True))
    assert not load(stored, KEYS[0], segments=[3])[0]
    assert np.array_equal(load(stored, KEYS[0])[1], sealed)


def test_a_storm_of_503_opens_the_breaker_which_closes_again(case: Case) -> None:
    """Fault 43."""
    case.lay(KEYS[0])
    stored = case.tier_store(retries=1)

    def requests_of_load(well: bool) -> int:
        before = len(case.proxy.requests)
        assert load(stored, KEYS[0])[0] == well
        return len(case.proxy.requests) - before

    case.proxy.play(Fault("GET", answer=b"503 Slow Down\nx", times=2 * (FAILURES + 7)))
    assert [requests_of_load(False) for _ in range(FAILURES)] == [2] * FAILURES
    assert stored.statistics()["left_alone"]
    assert requests_of_load(False) == 0
    assert stored.has(KEYS[:1]) == [False]
    assert save(stored, KEYS[1]) == [False]
    pauses = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    for at, pause in enumerate(pauses):  # after each one request goes, the probe
        case.now += pause - 0.5
        assert requests_of_load(False) == 0
        case.now += 0.5
        assert requests_of_load(at == len(pauses) - 1) == (2 if at < len(pauses) - 1 else 1)
    assert not stored.statistics()["left_alone"]
    assert stored.has(KEYS[:1]) == [True]  # a refusal was not remembered


@pytest.mark.parametrize(
    "answer",
    [
        f"403 Forbidden\n<Error><Code>AccessDenied</Code><K>{SECRET}</K></Error>",
        f"400 Bad Request\n<Error><Code>ExpiredToken</Code><T>{SECRET}</T></Error>",
        f"401 Unauthorized\n{SECRET}",
    ],
)
def test_credentials_that_are_refused_are_told_once_a_minute_and_never_shown(
    case: Case, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 44."""
    remote = case.remote()
    (stored,) = case.opened(remote, SMALL)
    case.proxy.play(Fault("", answer=answer.encode(), times=99))
    with ThreadPoolExecutor(4) as pool:
        assert not any(well for well, _ in pool.map(partial(load, stored), KEYS[:4]))
    assert stored.has(KEYS[:1]) == [False]
    assert save(stored, KEYS[0]) == [False]
    assert len(caplog.records) == 1
    case.now += 61
    assert not load(stored, KEYS[0])[0]
    assert len(caplog.records) == 2
    code = answer.partition("<Code>")[2].partition("<")[0] or "401"
    assert code in caplog.text
    assert repr(remote) in caplog.text
    assert KEYS[0].hex() not in caplog.text
    with pytest.raises(StoreError) as raised:
        remote.wipe()
    with pytest.raises(TypeError, match="pickle") as pickled:
        pickle.dumps(remote)  # the secret would stand in it
    (again,) = remote.open(case.graph, None, [SMALL])
    seen = [caplog.text, repr(remote), repr(vars(remote)), repr(vars(stored)), str(again.notes)]
    registry = CollectorRegistry()
    registry.register(Collector(case.graph))
    seen += [generate_latest(registry).decode()]
    seen += [json.dumps([stored.statistics(), case.counted(), *map(str, caplog.records)])]
    for error in (raised.value, pickled.value):
        trace = traceback.TracebackException.from_exception(error, capture_locals=True)
        frames = [x for x in trace.stack if x.filename != __file__]  # this file has the answer
        seen += [*trace.format_exception_only(), *traceback.StackSummary.from_list(frames).format()]
        assert error.__cause__ is None
    assert not [text for text in seen if SECRET in text or "secret" in text.lower()]


def test_a_secret_in_an_address_or_a_refused_setting_is_not_shown() -> None:
    """Fault 44."""
    wrong: list[tuple[str, Any]] = [
        (f"ftp://me:{SECRET}@host/x?sig={SECRET}", {}),
        ("s3://b/x", {"secret": SECRET}),
        ("s3://b/x", {"client_options": {"nothing": SECRET}}),
        ("s3://b/x", {"client_options": {"timeout": SECRET}}),
        ("gs://b/x", {"service_account_key": f'"{SECRET}"'}),
        (f"https://a.blob.core.windows.net/c/x?sig={SECRET}", {}),
    ]
    for url, more in wrong:
        with pytest.raises((StoreError, InvalidTerms)) as raised:
            Remote(url, **more)
        assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert repr(Remote(f"s3://me:{SECRET}@b/x")) == "Remote('s3://b/x')"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"s3://user:pa/{SECRET}@bucket/p", "s3://bucket/p"),
        (f"s3://{SECRET}/pa@{SECRET}@bucket/p", "s3://bucket/p"),
        (f"https://user:p?{SECRET}@host/p", "https://"),
        (f"https://user:{SECRET}#p@host/p", "https://"),
        (f"https://host/c?sig=a@{SECRET}", "https://"),
        (f"https://me:{SECRET}@host/c?sig={SECRET}", "https://host/c"),
        (f"user:{SECRET}@host/p", "host/p"),
        (f"s3:/user:{SECRET}@host//p", "host//p"),
    ],
)
def test_a_secret_in_an_address_is_not_shown_whatever_stands_in_it(url: str, shown: str) -> None:
    """Fault 44: a slash, an @, or what begins a query."""
    sentence = f"Remote('{shown}')"
    try:
        text = repr(Remote(url))
    except (StoreError, InvalidTerms) as error:
        text = "".join(traceback.format_exception(error))
        sentence = f" {shown}: " if isinstance(error, StoreError) else f" after {shown}. "
    assert sentence in text
    assert SECRET not in text


def test_what_a_provider_of_credentials_says_is_not_shown(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 44."""

    def provider() -> Any:
        raise RuntimeError(f"the token {SECRET} has expired")

    stored = case.opened(Remote(f"s3://{case.bucket}/x", credential_provider=provider), SMALL)[0]
    assert not load(stored, KEYS[0])[0]
    assert "RuntimeError" in caplog.text
    assert "RuntimeError" in stored.statistics()["error"]
    assert SECRET not in caplog.text + str([stored.statistics(), stored.notes])


@pytest.mark.parametrize("url", ["", "/a/folder", "s3://", "file://not/whole", "http://[::1"])
def test_what_can_be_no_address_is_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(StoreError, match=r"Expected a url .* got an error for .*\. Correct"):
        Remote(url)


@pytest.mark.parametrize(
    ("argument", "url", "how", "error"),
    [
        *(("url", x, {}, InvalidTerms) for x in (None, 5, Path("/x"), "https://h/c?sv=1")),
        *(
            ("workers", "memory://", {"workers": x}, InvalidTerms)
            for x in (0, -1, "8", True, 2**63)
        ),
        *(("multipart", "memory://", {"multipart": x}, InvalidTerms) for x in (1, -1, "8", None)),
        ("retry_config", "s3://b/x", {"retry_config": 5}, InvalidTerms),
        ("client_options", "s3://b/x", {"client_options": None}, InvalidTerms),
        ("region", "s3://b/x", {"region": 5}, StoreError),
        ("endpoint", "s3://b/x", {"region": "r", "endpoint": b"x"}, StoreError),
        ("nothing", "s3://b/x", {"nothing": "x"}, StoreError),
        ("allow_http", "s3://b/x", {"allow_http": True}, StoreError),  # a panic of obstore's
    ],
)
def test_a_wrong_argument_is_named(argument: str, url: Any, how: Any, error: Any) -> None:
    with pytest.raises(error, match=rf"^Expected {argument}= .*, got ") as raised:
        Remote(url, **how)
    assert str(raised.value).count("=") == 1  # no other argument


@pytest.mark.parametrize(
    ("url", "kind", "how"),
    [
        ("gs://bucket/a/b", "GCSStore", {"skip_signature": True}),
        ("az://container/a/b", "AzureStore", {"account_name": "me", "account_key": "c2VjcmV0"}),
        ("abfs://c@me.dfs.core.windows.net/a/b", "AzureStore", {"sas_key": "sv=1&sig=x"}),
        ("https://me.blob.core.windows.net/c/a/b", "AzureStore", {}),
        ("s3://bucket/a/b", "S3Store", {"skip_signature": True}),
    ],
)
def test_addresses_of_each_provider_keep_their_prefix(url: str, kind: str, how: Any) -> None:
    remote = Remote(url, **how)
    assert type(remote.store).__name__ == kind
    assert remote.store.prefix == "a/b"
    assert remote.url.endswith("/a/b")


@pytest.mark.skipif(not CREDENTIALS, reason="the environment holds those of a real store")
def test_plain_http_can_be_allowed_by_the_environment(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.lay(KEYS[0])
    named: dict[str, Any] = {"endpoint": case.proxy.url, "region": "us-east-1", **CREDENTIALS}
    for allowed in (False, True):
        if allowed:
            monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        (stored,) = case.opened(Remote(f"s3://{case.bucket}/{case.prefix}", **named), SMALL)
        assert stored.has(KEYS[:1]) == [allowed]
        assert allowed or "'allow_http': True" in stored.statistics()["error"]


def test_a_forked_process_is_refused(case: Case) -> None:
    """Fault 13. Calls of obstore would never return there."""
    remote = case.remote()
    refusals = []
    (stored,) = case.opened(remote, SMALL)
    works: list[Any] = [
        partial(Remote, "memory://"),
        remote.wipe,
        partial(remote.forms, SMALL),
        partial(load, stored, KEYS[0]),
        partial(stored.has, KEYS[:1]),
        partial(save, stored, KEYS[0]),
    ]
    child = os.fork()
    if not child:
        signal.alarm(20)
        for work in works:
            try:
                work()
            except (StoreError, TransferError) as error:
                refusals.append("spawn" in str(error) or "forked from" in str(error))
        os._exit(0 if refusals == [True] * len(works) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_obstore_a_sentence_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"portakv\[remote\]"):
        Remote("memory://")


def test_a_store_is_refused_with_a_sentence_if_no_descriptor_is_left(tmp_path: Path) -> None:
    """Fault 25. With any number of descriptors a store opens and answers, or gives a reason."""
    text = """if True:
        import sys
        from support.no_descriptors import limited
        from portakv.errors import StoreError
        from portakv.storage.tiers.disk import Disk
        from portakv.storage.form import BlockForm
        from portakv.storage.tiers.remote import Remote
        from portakv.storage.store import BlockStore
        form = BlockForm("m", "float16", 2, (8, 8), 16, (0, 4, 4), (0, 2, 2),
            "block layer head kv token dim")
        ways = [lambda: Disk(sys.argv[1], capacity=1 << 20), lambda: Remote("memory://")]
        BlockStore(form, staging=1 << 20, tiers=[ways[0]()]).close()  # what it imports
        for way in ways:
            for left in (*range(8), 30):
                with limited(left):
                    try:
                        store = BlockStore(form, staging=1 << 20, tiers=[way()])
                        assert store.lookup([b"k" * 32]) == 0
                        store.close()
                        print("stored")
                    except StoreError as error:
                        print(error)
    """
    ran = ready.run("-c", text, tmp_path / "a", timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 18
    assert (lines[8], lines[17]) == ("stored", "stored")  # obstore begins, too
    assert all("too many open files: `ulimit -n` allows" in lines[n] for n in (0, 9))


def test_a_put_whose_answer_is_lost_is_a_success(case: Case) -> None:
    """Fault 45."""
    stored = case.tier_store()
    case.proxy.play(Fault(f"PUT .*{KEYS[0].hex()}", cut=-1))
    assert save(stored, KEYS[0]) == [True]
    assert (
        bytes(obstore.get(case.raw, case.path(KEYS[0])).bytes()) == image(SMALL, KEYS[0]).tobytes()
    )
    assert stored.statistics()["error"] == ""


def test_an_object_deleted_after_lookup_is_a_miss_and_its_verdict_goes(case: Case) -> None:
    """Fault 46."""
    case.lay(KEYS[0])
    stored = case.tier_store()
    assert stored.has(KEYS[:1]) == [True]
    obstore.delete(case.raw, [case.path(KEYS[0])])
    assert stored.has(KEYS[:1]) == [True]
    assert not load(stored, KEYS[0])[0]
    assert case.counted() == {"load miss": 1}
    assert stored.has(KEYS[:1]) == [False]


def test_a_block_that_was_loaded_is_there_for_a_lookup(case: Case) -> None:
    """Whatever was found before it was put by somebody else."""
    stored = case.tier_store()
    assert stored.has(KEYS[:1]) == [False]
    case.lay(KEYS[0])
    assert load(stored, KEYS[0])[0]
    assert stored.has(KEYS[:1]) == [True]


@pytest.mark.parametrize("how", ["wipe", "miss", "minute"])
def test_a_form_that_was_deleted_is_put_again(case: Case, how: str) -> None:
    """A wipe or another client deletes the form: with blocks, which is noticed, or alone."""
    remote = case.remote()
    (stored,) = case.opened(remote, SMALL)
    assert save(stored, KEYS[0]) == [True]
    assert case.remote().wipe() == 2 if how != "wipe" else remote.wipe() == 2
    if how == "miss":
        assert not load(stored, KEYS[0])[0]
    case.now += 61 if how == "minute" else 0
    assert stored.wants(KEYS[:1]) == [True]
    assert save(stored, KEYS[0]) == [True]
    assert [x.form for x in case.opened(case.remote(), replace(SMALL, heads=(0, 1, 2)))] == [
        replace(SMALL, heads=(0, 1, 2)),
        SMALL,
    ]


def test_an_upload_of_which_a_part_fails_leaves_nothing(case: Case) -> None:
    """Fault 47."""
    big = replace(LAYERED, layers=(0, 68, 68))  # 17 MiB, two parts
    stored = case.tier_store(big, multipart=16 << 20)
    case.proxy.play(Fault("partNumber=2", answer=b"500 Oh\nx", times=99))
    assert save(stored, KEYS[0]) == [False]
    if obstore.__version__ >= "0.12":  # before, parts stay for the bucket's rule
        assert "DELETE" in " ".join(case.proxy.requests)  # the upload
    assert stored.has(KEYS[:1]) == [False]
    case.proxy.play()
    assert save(stored, KEYS[0]) == [True]
    assert sum("partNumber" in line for line in case.proxy.requests) == 2
    well, row = load(stored, KEYS[0])
    assert well
    assert np.array_equal(row, image(big, KEYS[0]))


@pytest.mark.parametrize("code", ["NoSuchBucket", "ContainerNotFound"])
def test_a_container_that_is_missing_is_no_missing_block(case: Case, code: str) -> None:
    """Fault 48."""
    stored = case.tier_store()
    answer = f"404 Not Found\n<Error><Code>{code}</Code></Error>".encode()
    case.proxy.play(Fault("", answer=answer, times=9))
    assert not load(stored, KEYS[0])[0]
    assert code in stored.statistics()["error"]
    assert case.counted() == {"load error": 1}
    case.proxy.play(Fault("", answer=b"404 Not Found\nx", times=9))
    assert save(stored, KEYS[0]) == [False]
    assert "performing PUT" in stored.statistics()["error"]


def test_a_bucket_that_is_missing_is_told_and_misses(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 48."""
    (stored,) = case.opened(case.remote("s3://nowhere/x"), SMALL)
    assert "NoSuchBucket" in stored.notes[0]
    assert stored.has(KEYS[:1]) == [False]
    assert save(stored, KEYS[0]) == [False]
    assert len(caplog.records) == 1
    case.now += 61
    assert not load(stored, KEYS[0])[0]
    assert "NoSuchBucket" in caplog.records[1].message


@pytest.mark.parametrize("name", ["a b/ü/漢", "a%2Fb", "x/1"])
def test_names_of_a_prefix_stay_what_they_are(case: Case, name: str) -> None:
    """Fault 49."""
    url = f"s3://{case.bucket}/{case.prefix}/{name}"
    (stored,) = case.opened(case.remote(url), SMALL)
    assert save(stored, *KEYS[:2]) == [True, True]
    case.now += 61
    assert stored.has(KEYS[:3]) == [True, True, False]
    paths = [one["path"] for batch in obstore.list(case.raw) for one in batch]
    assert len(paths) == 3
    assert len({path.partition("/1/" + SMALL.name)[0] for path in paths}) == 1


@pytest.mark.parametrize("url", ["s3://b/a/../c", "s3://b/..", "s3://b/%2e%2E/c", "s3://b/./c"])
def test_a_prefix_that_leads_out_is_refused(url: str) -> None:
    """Fault 49."""
    with pytest.raises(InvalidTerms, match=r"without \. and \.\."):
        Remote(url)


def test_a_lookup_asks_in_batches_and_remembers_for_a_while(case: Case) -> None:
    for key in KEYS[:18]:
        if key != KEYS[13]:
            case.lay(key)
    store = BlockStore(SMALL, staging=1 << 20, tiers=[case.remote(workers=8)])

    def requests_of_lookup(count: int) -> int:
        case.proxy.play()
        assert store.lookup(KEYS[:30], timeout=20) == count
        return len(case.proxy.requests)

    assert requests_of_lookup(13) == 8 + 16  # two batches; the third is not sent
    case.now += 4
    assert requests_of_lookup(13) == 0
    case.lay(KEYS[13])
    case.now += 2  # nothing is missing for more than 5 s
    assert requests_of_lookup(18) == 1 + 6
    case.now += 55  # or there for more than 60
    assert requests_of_lookup(18) == 17 + 6
    assert store.lookup([]) == 0
    store.close()


@pytest.mark.parametrize("forms", [1, 3])
def test_a_load_asks_no_bucket_what_it_has(case: Case, forms: int) -> None:
    """It begins immediately, with blocks of the store's form if no lookup confirmed other parts."""
    shape = 40, 2, 16, 2, 8
    tensors = [noise(*shape, dtype=torch.float16, seed=n) for n in range(4)]
    view = KVView(tensors, "layer | block kv token head dim")
    target = KVView([torch.zeros_like(x) for x in tensors], "layer | block kv token head dim")
    halves = [view.slice(heads=slice(n, n + 1)) for n in range(2)]
    parts = [BlockForm.of(x, "m", heads=(n, n + 1, 2)) for n, x in enumerate(halves)]
    for form, part, some in [
        (BlockForm.of(view, "m"), view, range(20)),
        *zip(parts[: forms - 1], halves, 2 * [range(20, 40)], strict=False),
    ]:
        with BlockStore(form, staging=1 << 20, tiers=[case.remote()], full="wait") as store:
            store.save(part, some, [KEYS[i] for i in some], deadline=20).synchronize(LIMIT)
    store = BlockStore(BlockForm.of(view, "m"), staging=1 << 20, tiers=[case.remote()])
    case.proxy.play(Fault("HEAD", stall=0.2, times=999))
    for count in (20, 40 if forms > 1 else 20):
        loaded = store.load(target, range(40), KEYS[:40], missing="skip")
        loaded.synchronize(LIMIT)
        assert loaded.landed.sum() == count
        assert loaded.landed[:20].all()
        for actual, expected in zip(target.tensors, tensors, strict=True):
            assert torch.equal(actual[:count].view(torch.int16), expected[:count].view(torch.int16))
        assert not [x for x in case.proxy.requests if x.startswith("HEAD")]
        case.proxy.play()
        assert store.lookup(KEYS[:40], timeout=20) == (40 if forms > 1 else 20)
        case.proxy.play()
    store.close()


def test_parts_of_a_block_are_read_and_verified_alone(case: Case) -> None:
    sealed = case.lay(KEYS[0], LAYERED)
    stored = case.tier_store(LAYERED)
    assert len(LAYERED.segments) == 8
    well, row = load(stored, KEYS[0], segments=[2, 5])
    assert well
    for n, part in enumerate(LAYERED.segments):
        at = slice(HEADER + part.offset, HEADER + part.offset + part.nbytes)
        assert np.array_equal(row[at], sealed[at]) == (n in (2, 5))
    assert case.proxy.sent == HEADER + 2 * LAYERED.segments[0].nbytes
    broken = sealed.copy()
    broken[HEADER + LAYERED.segments[2].offset] ^= 4
    case.lay(KEYS[0], LAYERED, broken)
    assert load(stored, KEYS[0], segments=[3])[0]
    assert not load(stored, KEYS[0], segments=[2])[0]


def test_each_remote_has_a_link_of_its_own_width(case: Case) -> None:
    (one,), (two,) = (
        case.opened(case.remote(f"s3://{case.bucket}/{case.prefix}/{n}", workers=n), SMALL)
        for n in (2, 3)
    )
    assert [x.queue(KEYS[0]).width for x in (one, two)] == [2, 3]
    assert {x.queue(KEYS[0]).tier for x in (one, two)} == {"remote"}


@pytest.mark.slow  # the graph's 10 s
def test_a_lookup_that_hangs_does_not_keep_the_process(case: Case) -> None:
    """Fault 64."""
    text = """if True:
        import sys, threading, time
        from portakv.storage.work import Graph
        from portakv.storage.form import BlockForm
        from portakv.storage.tiers.remote import Remote
        form = BlockForm("m", "float16", 2, (8, 8), 16, (0, 4, 4), (0, 2, 2), "block layer page")
        store = Remote("s3://b/x", endpoint=sys.argv[1], region="r", access_key_id="a",
            secret_access_key="b", client_options={"allow_http": True, "read_timeout": "86400s"})
        (held,) = store.open(Graph(), None, [form])
        keys = [bytes([n]) * 32 for n in range(4)]
        threading.Thread(target=held.has, args=[keys], daemon=True).start()
        time.sleep(1)
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ready.run("-c", text, url).check_returncode()


def test_a_slow_upload_is_not_cut_by_the_read_timeout(case: Case) -> None:
    stored = case.tier_store(LAYERED, read_timeout=0.2)
    case.proxy.play(Fault(f"PUT .*{KEYS[0].hex()}", slow_upload=4e6))
    assert save(stored, KEYS[0]) == [True]
    assert sum(line.startswith("PUT") for line in case.proxy.requests) == 2  # the form, the block


def test_a_block_that_is_there_or_comes_first_is_not_written_again(case: Case) -> None:
    older = image(SMALL, KEYS[1])
    case.lay(KEYS[0], data=older)
    stored = case.tier_store()
    case.proxy.play(Fault(f"PUT .*{KEYS[2].hex()}", before=lambda: case.lay(KEYS[2], data=older)))
    assert save(stored, KEYS[0], KEYS[2]) == [True, True]
    assert not [line for line in case.proxy.requests if line.startswith("PUT") and "0000" in line]
    for key in (KEYS[0], KEYS[2]):
        assert bytes(obstore.get(case.raw, case.path(key)).bytes()) == older.tobytes()


def test_blocks_of_other_forms_of_the_cache_are_found_and_read(case: Case) -> None:
    part = replace(SMALL, heads=(1, 2, 2))
    other = replace(SMALL, model="another")
    for form in (SMALL, part, other):
        assert save(case.tier_store(form), KEYS[0]) == [True]
    for name, text in [("0" * 32, part.json()), ("1" * 32, "{"), ("2" * 32, "\xff")]:
        obstore.put(case.raw, f"1/{name}/form.json", text.encode("latin-1"))
    tier_stores = case.opened(case.remote(), SMALL)
    assert [(x.form, x.writable) for x in tier_stores] == [(SMALL, True), (part, False)]
    assert load(tier_stores[1], KEYS[0])[0]


# Without credentials only moto's bucket can be read over plain HTTP.
@pytest.mark.parametrize("kind", ["file", "memory", *(["http"] if CREDENTIALS else [])])
def test_every_kind_of_store_keeps_and_wipes_its_blocks(
    case: Case, kind: str, tmp_path: Path
) -> None:
    url = {
        "file": f"file://{tmp_path}/a b/c",
        "memory": "memory://",
        "http": f"{case.proxy.url}/{case.bucket}/{case.prefix}",
    }[kind]
    remote = Remote(url)
    for again in (False, True):  # a second store on the same tier
        (stored,) = case.opened(remote, SMALL)
        assert stored.has(KEYS[:2]) == [again, False]
        assert save(stored, KEYS[0]) == [True]
        assert save(stored, KEYS[0]) == [True]
        well, row = load(stored, KEYS[0])
        assert well
        assert np.array_equal(row, image(SMALL, KEYS[0]))
        assert not load(stored, KEYS[1])[0]
    if kind == "http":
        with pytest.raises(StoreError, match="Expected to wipe"):
            remote.wipe()
    else:
        assert remote.wipe() == 2  # and form.json
        assert case.opened(remote, SMALL)[0].has(KEYS[:1]) == [False]


def test_a_wipe_takes_nothing_beside_the_prefix(case: Case) -> None:
    whole_bucket = case.store(case.proxy.url, "")
    obstore.put(whole_bucket, f"{case.prefix}2/1/x", b"1")
    obstore.put(whole_bucket, f"{case.prefix}/other", b"1")
    assert save(case.tier_store(), *KEYS) == [True] * len(KEYS)
    assert case.remote().wipe() == len(KEYS) + 1
    paths = [one["path"] for batch in obstore.list(whole_bucket) for one in batch]
    assert {x for x in paths if case.prefix in x} == {f"{case.prefix}2/1/x", f"{case.prefix}/other"}


def test_one_probe_is_sent_at_a_time() -> None:
    """Fault 43."""
    remote = Remote("memory://")
    clock = [0.0]
    calls = list[object]()
    remote.now = lambda: clock[0]

    def fails() -> None:
        raise OSError("no")

    def hangs() -> bool:
        clock[0] += 30
        return remote.ask(calls.append, 1) is None

    for _ in range(FAILURES):
        remote.ask(fails)
    clock[0] += 1
    assert remote.ask(hangs)
    assert calls == []
    remote.ask(calls.append, 2)
    assert calls == [2]


def test_an_object_that_is_written_anew_in_between_is_no_miss_afterwards(case: Case) -> None:
    """Fault 39. What is wrong twice, but not with one ETag."""
    wrong = [image(OTHER, key) for key in KEYS[:2]]
    case.lay(KEYS[0], data=wrong[0])
    stored = case.tier_store()
    case.proxy.play(Fault("GET"), Fault("GET", before=lambda: case.lay(KEYS[0], data=wrong[1])))
    assert not load(stored, KEYS[0])[0]
    assert stored.has(KEYS[:1]) == [True]


# --- a fault deletes nothing ---


def bodies(case: Case, keys: list[bytes] = KEYS) -> dict[bytes, bytes]:
    """Return the objects of blocks, read around the proxy."""
    paths = {case.path(key): key for key in keys}
    result = {}
    for batch in obstore.list(case.raw):
        for one in batch:
            if one["path"] in paths:
                result[paths[one["path"]]] = bytes(obstore.get(case.raw, one["path"]).bytes())
    return result


@pytest.mark.parametrize("segments", [None, [0]])
def test_a_path_that_flips_a_bit_costs_no_object(
    case: Case, segments: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by a deletion nor by a save, which would take the same path."""
    stored = case.tier_store()
    keys = KEYS[:8]
    assert save(stored, *keys) == [True] * 8
    before = bodies(case)
    flip = Fault(r"GET .*/[0-9a-f]{64} ", flip=4099, times=999)  # header and payload alike
    if segments:
        flip = Fault(r"GET .*/[0-9a-f]{64} ", flip=9, times=999)
    case.proxy.play(flip)
    rows = [np.zeros(SMALL.image_bytes, np.uint8) for _ in keys]
    assert stored.read(keys, rows, segments) == [False] * 8
    assert bodies(case) == before

    assert stored.has(keys) == [False] * 8
    assert stored.wants(keys) == [False] * 8
    case.proxy.play(Fault("PUT", answer=b"500 no object may be written\nx", times=99))
    assert save(stored, *keys) == [True] * 8
    assert bodies(case) == before

    messages = [x.getMessage() for x in caplog.records if "came wrong twice" in x.getMessage()]
    assert len(messages) == 8
    for key, line in zip(keys, messages, strict=True):
        assert f"{stored.remote.url}/{case.path(key)} " in line
        assert "the bytes changed on the way here" in line
        assert line.endswith("It counts as missing for 60 s")  # a save does not mend the path

    # After a while the path is tried again.
    case.proxy.play()
    case.now += 61
    assert stored.has(keys) == [True] * 8
    assert load(stored, keys[0])[0]


@pytest.mark.parametrize("segments", [None, [0]])
@pytest.mark.parametrize("flip", [9, HEADER + 3], ids=["page", "frame"])
def test_the_side_that_changed_a_compressed_object_is_found(
    case: Case, flip: int, segments: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """By the MD5 of the object, as for an image."""
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    stored = case.tier_store(compress="zstd")
    row = np.full(SMALL.image_bytes, 7, np.uint8)
    seal(row, SMALL, KEYS[0], 1)
    assert stored.write(stored.queue_for_write(1), KEYS[:1], [row], [1], [()]) == [True]
    before = bodies(case)[KEYS[0]]
    assert len(before) < len(row)
    # A part of the object may come in another response than its first page.
    start = 0 if segments is None or flip < HEADER else HEADER
    case.proxy.play(Fault(r"GET .*/[0-9a-f]{64} ", flip=flip - start, times=999))
    assert not load(stored, KEYS[0], segments=segments)[0]
    assert "the bytes changed on the way here" in caplog.text
    assert stored.wants(KEYS[:1]) == [False]

    case.proxy.play()
    case.now += 61
    assert load(stored, KEYS[0], segments=segments)[0]
    broken = bytearray(before)
    broken[flip] ^= 1
    case.lay(KEYS[0], data=bytes(broken))
    assert not load(stored, KEYS[0], segments=segments)[0]
    assert "came wrong twice: the object is damaged" in caplog.text
    assert stored.wants(KEYS[:1]) == [True]


@pytest.mark.parametrize("segments", [None, [0]])
def test_a_damaged_object_counts_as_missing_until_a_save_writes_it_anew(
    case: Case, segments: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    stored = case.tier_store()
    assert save(stored, *KEYS[:2]) == [True, True]
    broken = image(SMALL, KEYS[0])
    broken[HEADER + 5] ^= 1
    case.lay(KEYS[0], data=broken)
    assert stored.has(KEYS[:2]) == [True, True]
    assert not load(stored, KEYS[0], segments=segments)[0]
    said = f"{case.path(KEYS[0])} came wrong twice: the object is damaged. It counts as missing for"
    assert f"{said} 60 s, or until it is saved" in caplog.text
    assert bodies(case)[KEYS[0]] == broken.tobytes()

    # No lookup offers it again, neither now nor after the verdict's time.
    for _ in range(3):
        assert stored.has(KEYS[:2]) == [False, True]
        assert stored.wants(KEYS[:2]) == [True, False]
        case.now += 61
        stored.has(KEYS[1:2])

    # A load that does not look it up fetches it once, not twice.
    case.proxy.play()
    assert stored.has(KEYS[:1]) == [False]
    assert not load(stored, KEYS[0], segments=segments)[0]
    gets = [line for line in case.proxy.requests if line.startswith("GET")]
    assert len(gets) == (1 if segments is None else 2)

    assert save(stored, KEYS[0]) == [True]
    assert bodies(case)[KEYS[0]] == image(SMALL, KEYS[0]).tobytes()
    assert stored.has(KEYS[:2]) == [True, True]
    assert load(stored, KEYS[0], segments=segments)[0]


def test_two_writers_of_a_damaged_object_leave_one_whole_object(case: Case) -> None:
    """The second one finds that the first has replaced it, and lets that be."""
    one = case.tier_store()
    other = case.tier_store()
    case.lay(KEYS[0], data=b"damaged")
    assert not load(one, KEYS[0])[0]
    assert not load(other, KEYS[0])[0]
    assert save(one, KEYS[0]) == [True]
    first = obstore.head(case.raw, case.path(KEYS[0]))
    assert save(other, KEYS[0]) == [True]
    assert obstore.head(case.raw, case.path(KEYS[0])) == first
    for stored in (one, other):
        assert stored.has(KEYS[:1]) == [True]
        assert load(stored, KEYS[0])[0]


def test_an_object_that_was_damaged_and_is_gone_is_written(case: Case) -> None:
    stored = case.tier_store()
    case.lay(KEYS[0], data=b"damaged")
    assert not load(stored, KEYS[0])[0]
    obstore.delete(case.raw, [case.path(KEYS[0])])
    assert save(stored, KEYS[0]) == [True]
    assert bodies(case)[KEYS[0]] == image(SMALL, KEYS[0]).tobytes()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_stores_without_an_md5_have_damaged_objects_written_anew(
    case: Case, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Remote("memory://" if kind == "memory" else f"file://{tmp_path}")
    (stored,) = case.opened(remote, SMALL)
    assert save(stored, KEYS[0]) == [True]
    broken = image(SMALL, KEYS[0])
    broken[HEADER] ^= 1
    obstore.put(remote.store, case.path(KEYS[0]), bytes(broken))
    assert not load(stored, KEYS[0])[0]
    assert "no MD5 that says" in caplog.text
    assert stored.has(KEYS[:1]) == [False]
    assert save(stored, KEYS[0]) == [True]
    assert load(stored, KEYS[0])[0]


def test_an_etag_that_is_no_md5_blames_no_path(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """A bucket that encrypts by a key service has ETags of 32 hex that are no MD5."""
    stored = case.tier_store()
    assert save(stored, KEYS[0]) == [True]
    # The form's object shows it: its bytes are known, its ETag is then another one's.
    obstore.put(case.raw, f"1/{SMALL.name}/form.json", b"other bytes")
    case.proxy.play(Fault("GET", flip=9, times=2))
    assert not load(stored, KEYS[0])[0]
    assert "no MD5 that says" in caplog.text
    assert stored.wants(KEYS[:1]) == [True]


@pytest.mark.parametrize("kind", ["memory", "file", "s3", "parts"])
def test_rows_may_be_written_once_a_save_has_returned(
    case: Case, kind: str, tmp_path: Path
) -> None:
    """`memory://` kept references to staging rows, which hold other blocks soon."""
    form = SMALL
    if kind == "parts":
        form = replace(LAYERED, heads=(0, 80, 80))  # 20 MiB
    urls = {"memory": "memory://", "file": f"file://{tmp_path}"}
    multipart = 16 << 20 if kind == "parts" else 64 << 20
    remote = Remote(urls[kind]) if kind in urls else case.remote(multipart=multipart)
    (stored,) = case.opened(remote, form)
    row = image(form, KEYS[0])
    queue = stored.queue_for_write(1)
    assert stored.write(queue, KEYS[:1], [row], [1], [()]) == [True]
    row[:] = 0xFF
    assert load(stored, KEYS[0])[0]


def test_a_store_in_memory_has_more_blocks_than_staging_has_rows() -> None:
    tensors = [noise(64, 2, 16, 2, 8, dtype=torch.float16, seed=i) for i in range(4)]
    view = KVView(tensors, "layer | block kv token head dim")
    form = BlockForm.of(view, "m")
    keys = [bytes([n]) * 32 for n in range(64)]
    remote = Remote("memory://")
    staging = 8 * form.image_bytes
    with BlockStore(form, staging=staging, tiers=[remote], full="wait") as store:
        store.save(view, range(64), keys).synchronize(LIMIT)
        assert store.lookup(keys) == 64
        target = KVView([torch.zeros_like(x) for x in tensors], "layer | block kv token head dim")
        store.load(target, range(64), keys).synchronize(LIMIT)
    for one, other in zip(target.tensors, tensors, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


# --- a load that is given up ---


@pytest.mark.parametrize(
    "fault", [{"rate": 1000.0, "step": 100}, {"stall": 2 * LIMIT}, {"silent": 2 * LIMIT}]
)
@pytest.mark.parametrize("form", [SMALL, replace(LAYERED, heads=(0, 64, 64))], ids=["8K", "16M"])
def test_a_body_that_drips_or_stops_is_left_soon_after_the_deadline(
    case: Case, form: BlockForm, fault: Any
) -> None:
    """Retries and pieces do not matter: before, a read waited for a whole piece, up to 60 s."""
    case.lay(KEYS[0], form)
    stored = case.tier_store(form, read_timeout=4 * LIMIT)
    case.proxy.play(Fault("GET", times=99, **fault))
    ends = time.monotonic() + 0.5
    assert not load(stored, KEYS[0], stop=lambda: time.monotonic() > ends)[0]
    assert case.counted() == {"load late": 1}
    # The worker and the store serve the next one.
    case.proxy.play()
    assert load(stored, KEYS[0])[0]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"403 Forbidden\n<Error><Code>AccessDenied</Code></Error>", "refused"),
        (b"401 Unauthorized\nx", "refused"),
        (b"400 Bad Request\n<Error><Code>ExpiredToken</Code></Error>", "refused"),
        (b"503 Slow Down\nx", "unreachable"),
        (b"429 Too Many Requests\nx", "unreachable"),
        (b"404 Not Found\n<Error><Code>NoSuchBucket</Code></Error>", "unreachable"),
        (b"404 Not Found\n<Error><Code>NoSuchKey</Code></Error>", "missing"),
    ],
)
def test_what_a_store_answers_becomes_a_reason(case: Case, answer: bytes, kind: str) -> None:
    stored = case.tier_store(retries=0)
    case.proxy.play(Fault("", answer=answer, times=99))
    reported: list[tuple[bytes, Any]] = []
    assert not load(stored, KEYS[0], report=lambda *each: reported.append(each))[0]
    ((key, reason),) = reported
    assert key == KEYS[0]
    assert reason.kind == kind
    assert reason.where.startswith(stored.remote.url)
    # A store that is left alone says what it failed with.
    for _ in range(FAILURES):
        load(stored, KEYS[0], report=lambda *each: reported.append(each))
    left_alone = "left alone for a while after" in reported[-1][1].where
    assert left_alone == (kind != "missing")
