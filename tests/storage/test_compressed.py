# SPDX-License-Identifier: Apache-2.0
"""Compressed blocks of an object store: every byte comes back, images of before are read, damage is
a miss, and a process without the package neither reads nor replaces them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
import xxhash
from obstore.store import LocalStore
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, StoreError, TransferError
from portakv.storage import BlockForm, BlockStore, Remote, reasons
from portakv.storage.image import HEADER, Row, header, seal, verify
from portakv.storage.reasons import Reason
from portakv.storage.tiers import remote as remotes
from portakv.storage.tiers.remote import RemoteStore
from portakv.storage.work import Graph

zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")

CANONICAL = "block layer head kv token dim"
#: Four layers of 128 KiB: two segments.
FORM = BlockForm("m", "bfloat16", 2, (256, 256), 16, (0, 4, 4), (0, 8, 8), CANONICAL)
KEYS = [key_of(n) for n in range(8)]


def image(key: bytes, form: BlockForm = FORM, data: Any = None) -> Row:
    """Return a sealed image of normal numbers in bf16, or of ``data``."""
    if data is None:
        generator = torch.Generator(device="cpu").manual_seed(key[0])
        count = form.payload_bytes // 2
        numbers = torch.randn(count, generator=generator, dtype=torch.float32, device="cpu")
        data = numbers.to(torch.bfloat16).view(torch.uint8).numpy()
    row = np.zeros(form.image_bytes, np.uint8)
    row[HEADER : HEADER + form.payload_bytes] = data
    seal(row, form, key, 7)
    return row


def noise(form: BlockForm = FORM) -> Row:
    """Return bytes that no method makes smaller."""
    return np.random.default_rng(3).integers(0, 256, form.payload_bytes, np.uint8)


class Case:
    """A bucket in a folder, which several processes could have open."""

    def __init__(self, folder: Path) -> None:
        self.url = f"file://{folder}/bucket"
        self.graph = Graph()

    def opened(self, compress: str | None, form: BlockForm = FORM) -> RemoteStore:
        remote = Remote(self.url, compress=compress)
        (stored,) = remote.open(self.graph, None, [form])
        return stored


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    case = Case(tmp_path)
    yield case
    case.graph.close()


def save(stored: RemoteStore, key: bytes, row: Row) -> bool:
    (landed,) = stored.write(stored.queue_for_write(1), [key], [row], [1], [()])
    return landed


def load(
    stored: RemoteStore, key: bytes, segments: list[int] | None = None
) -> tuple[bool, Row, list[Reason]]:
    """Return whether a block came, its row, and the reasons if it did not."""
    row = np.full(stored.form.image_bytes, 0xEE, np.uint8)
    given: list[Reason] = []
    (landed,) = stored.read([key], [row], segments, report=lambda _, reason: given.append(reason))
    return landed, row, given


def bucket_of(stored: RemoteStore) -> LocalStore:
    bucket: LocalStore = LocalStore.from_url(stored.where)
    return bucket


def path_of(stored: RemoteStore, key: bytes) -> str:
    return f"1/{stored.form.name}/{key.hex()[:2]}/{key.hex()}"


def body(stored: RemoteStore, key: bytes) -> bytes:
    """Return the object of a block."""
    return bytes(obstore.get(bucket_of(stored), path_of(stored, key)).bytes())


def replace(stored: RemoteStore, key: bytes, data: bytes) -> None:
    obstore.put(bucket_of(stored), path_of(stored, key), data)


@pytest.mark.parametrize(
    ("dtype", "least"), [("bfloat16", 1.4), ("float32", 1.1), ("uint8", 1.4)], ids=str
)
def test_an_image_comes_back_byte_by_byte_in_fewer_bytes(
    case: Case, dtype: str, least: float
) -> None:
    """Bytes of a type that is not known are sorted as a sample of them says."""
    itemsize = getattr(torch, dtype).itemsize
    widths = (512 // itemsize, 512 // itemsize)
    form = BlockForm("m", dtype, 2, widths, 16, (0, 4, 4), (0, 8, 8), CANONICAL)
    data = None
    if dtype == "float32":
        data = np.random.default_rng(5).normal(size=form.payload_bytes // 4).astype(np.float32)
        data = data.view(np.uint8)
    row = image(KEYS[0], form, data)
    stored = case.opened("zstd", form)
    assert save(stored, KEYS[0], row)
    size = len(body(stored, KEYS[0]))
    assert len(row) / size > least
    assert stored.statistics()["compressed"] == {"image_bytes": len(row), "object_bytes": size}

    for compress in ("zstd", None):  # a reader need not compress
        landed, got, _ = load(case.opened(compress, form), KEYS[0])
        assert landed
        assert np.array_equal(got, row)


@pytest.mark.parametrize("segment", [0, 1])
def test_a_segment_is_read_alone(case: Case, segment: int) -> None:
    row = image(KEYS[0])
    stored = case.opened("zstd")
    assert save(stored, KEYS[0], row)
    landed, got, _ = load(stored, KEYS[0], [segment])
    assert landed
    part = FORM.segments[segment]
    start = HEADER + part.offset
    assert np.array_equal(got[:HEADER], row[:HEADER])
    assert np.array_equal(got[start : start + part.nbytes], row[start : start + part.nbytes])
    other = HEADER + FORM.segments[1 - segment].offset
    assert set(got[other : other + part.nbytes].tolist()) == {0xEE}


def test_images_of_before_are_read_and_are_written_by_default(case: Case) -> None:
    row = image(KEYS[0])
    plain = case.opened(None)
    assert save(plain, KEYS[0], row)
    assert body(plain, KEYS[0]) == row.tobytes()
    stored = case.opened("zstd")
    landed, got, _ = load(stored, KEYS[0])
    assert landed
    assert np.array_equal(got, row)
    assert save(stored, KEYS[0], row)  # which is there, and stays
    assert body(plain, KEYS[0]) == row.tobytes()


def test_bytes_that_do_not_shrink_are_written_as_an_image(case: Case) -> None:
    row = image(KEYS[0], data=noise())
    stored = case.opened("zstd")
    assert save(stored, KEYS[0], row)
    assert body(stored, KEYS[0]) == row.tobytes()
    assert load(stored, KEYS[0])[0]


def test_an_object_made_by_the_page_of_the_format_is_read(case: Case) -> None:
    """Written here by the description alone: one segment a frame, one as it is."""
    row = image(KEYS[0])
    first, second = FORM.segments
    payload = row[HEADER:]
    sorted_bytes = np.concatenate([payload[: first.nbytes][0::2], payload[: first.nbytes][1::2]])
    frame = zstd.compress(sorted_bytes.tobytes(), 9)
    page = bytearray(row[:HEADER].tobytes())
    page[:8] = b"PKVZST\x00\x01"
    struct.pack_into("<IIQQ", page, 512, 2, 0, len(frame), second.nbytes)
    struct.pack_into("<Q", page, HEADER - 8, xxhash.xxh3_64_intdigest(bytes(page[:-8])))
    rest = payload[first.nbytes : first.nbytes + second.nbytes].tobytes()
    stored = case.opened(None)
    replace(stored, KEYS[0], bytes(page) + frame + rest)
    landed, got, _ = load(stored, KEYS[0])
    assert landed
    assert np.array_equal(got, row)


def damages(size: int, frame: int) -> dict[str, Any]:
    """Return what can happen to an object: the places of flipped bits, or another length."""
    return {
        "magic": 3,
        "key": 40,
        "width": 512,
        "length": 520,
        "seal": HEADER - 1,
        "a frame's head": HEADER + 1,
        "a frame's middle": HEADER + frame // 2,
        "the last byte": size - 1,
        "cut in a frame": slice(0, HEADER + frame // 2),
        "cut by a byte": slice(0, size - 1),
        "the page alone": slice(0, HEADER),
        "empty": slice(0, 0),
        "longer": None,
    }


@pytest.mark.parametrize(
    "segments",
    [None, [0], pytest.param([1], marks=pytest.mark.full)],
    ids=["whole", "first", "second"],
)
@pytest.mark.parametrize("damage", damages(0, 0))
def test_damage_is_a_miss_and_a_save_mends_it(
    case: Case, damage: str, segments: list[int] | None
) -> None:
    row = image(KEYS[0])
    stored = case.opened("zstd")
    assert save(stored, KEYS[0], row)
    right = body(stored, KEYS[0])
    terms = remotes.terms_of(np.frombuffer(right, np.uint8)[:HEADER], FORM)
    assert terms is not None
    where = damages(len(right), terms.lengths[0])[damage]
    data = bytearray(right)
    if isinstance(where, int):
        data[where] ^= 0x10
    elif where is None:
        data += b"x"
    else:
        data = data[where]
    replace(stored, KEYS[0], bytes(data))

    # A segment that the damage does not reach may come, and is right then.
    landed, got, given = load(stored, KEYS[0], segments)
    reached = {"a frame's head": 0, "a frame's middle": 0, "the last byte": 1}.get(damage)
    if segments and reached is not None and segments != [reached]:
        part = FORM.segments[segments[0]]
        start = HEADER + part.offset
        assert landed
        assert np.array_equal(got[start : start + part.nbytes], row[start : start + part.nbytes])
        return
    assert not landed
    assert [reason.kind for reason in given] == [reasons.DAMAGED]
    assert stored.has(KEYS[:1]) == [False]
    assert save(stored, KEYS[0], row)
    assert body(stored, KEYS[0]) == right
    assert load(stored, KEYS[0], segments)[0]


def test_without_checksums_damage_would_land(case: Case) -> None:
    """The control of the cases above: zstd itself does not notice every flipped bit."""
    row = image(KEYS[0])
    stored = case.opened("zstd")
    assert save(stored, KEYS[0], row)
    data = np.frombuffer(body(stored, KEYS[0]), np.uint8).copy()
    terms = remotes.terms_of(data[:HEADER], FORM)
    assert terms is not None
    data[terms.span(1)[0] + 1000] ^= 0x10  # of the mantissas, which stand as they are
    got = row.copy()
    part = data[slice(*terms.span(1))]
    assert remotes.restore(part, got, FORM, terms, 1, zstd)
    assert not np.array_equal(got, row)
    head = header(got, FORM)
    assert not isinstance(head, str)
    assert verify(row, FORM, head.checksums, head.generation)
    assert not verify(got, FORM, head.checksums, head.generation)


def test_a_frame_that_grows_is_not_unpacked_whole() -> None:
    row = image(KEYS[0])
    bomb = np.frombuffer(zstd.compress(bytes(1 << 24)), np.uint8)
    terms = remotes.Terms(1, (len(bomb), len(bomb)))
    asked = []

    class Codec:
        """The module, with a decompressor that notes the bytes that it may return."""

        ZstdError = zstd.ZstdError

        class ZstdDecompressor:
            def __init__(self) -> None:
                self.real = zstd.ZstdDecompressor()

            def decompress(self, data: Any, most: int) -> bytes:
                asked.append(most)
                content: bytes = self.real.decompress(data, most)
                return content

            @property
            def eof(self) -> bool:
                return bool(self.real.eof)

    assert not remotes.restore(bomb, row, FORM, terms, 0, Codec)
    assert asked == [FORM.segments[0].nbytes + 1]


@pytest.mark.parametrize("value", ["lz4", "", 5, True, b"zstd"])
def test_a_method_that_does_not_exist_is_named(value: Any) -> None:
    with pytest.raises(InvalidTerms, match=r"^Expected compress= as None or 'zstd', got "):
        Remote("memory://", compress=value)


def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_package_a_sentence_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_the_package(monkeypatch)
    Remote("memory://")
    with pytest.raises(StoreError, match=r"portakv\[zstd\]"):
        Remote("memory://", compress="zstd")


@pytest.mark.parametrize("segments", [None, [1]], ids=["whole", "second"])
def test_without_the_package_compressed_blocks_are_misses_and_stay(
    case: Case, monkeypatch: pytest.MonkeyPatch, segments: list[int] | None
) -> None:
    row = image(KEYS[0])
    assert save(case.opened("zstd"), KEYS[0], row)
    before = body(case.opened(None), KEYS[0])
    with monkeypatch.context() as patch:
        without_the_package(patch)
        stored = case.opened(None)
        assert stored.has(KEYS[:1]) == [True]
        landed, _, given = load(stored, KEYS[0], segments)
        assert not landed
        assert [reason.kind for reason in given] == [reasons.UNREADABLE]
        assert stored.has(KEYS[:1]) == [False]  # so that no engine asks for it again and again
        assert save(stored, KEYS[0], row)
        assert save(stored, KEYS[1], row := image(KEYS[1]))
        assert load(stored, KEYS[1])[0]  # the bucket is not left alone
    assert body(stored, KEYS[0]) == before
    assert load(case.opened(None), KEYS[0])[0]


@pytest.mark.parametrize("encoding", [None, "pack"])
def test_a_store_of_blocks(tmp_path: Path, encoding: str | None) -> None:
    """Raw and packed blocks are saved by one store, and loaded by another one."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    rows = torch.randn((2, 8, 16, 4, 32), generator=generator, dtype=torch.float32, device="cpu")
    layers = [rows.to(torch.bfloat16), rows.flip(1).to(torch.bfloat16)]
    view = KVView(layers, "layer | kv block token head dim")
    form = BlockForm.of(view, "org/model", encoding=encoding)
    landed = []
    for compress in ("zstd", None):
        tier = Remote(f"file://{tmp_path}/bucket", compress=compress)
        with BlockStore(form, staging=4 << 20, tiers=[tier]) as store:
            if compress:
                store.save(view, range(4), KEYS[:4]).synchronize(LIMIT)
            empty = [torch.zeros_like(layer) for layer in layers]
            target = KVView(empty, "layer | kv block token head dim")
            store.load(target, range(4, 8), KEYS[:4]).synchronize(LIMIT)
        landed += [
            torch.equal(x[:, 4:].view(torch.int16), y[:, :4].view(torch.int16))
            for x, y in zip(empty, layers, strict=True)
        ]
    assert landed == [True] * 4


def test_the_error_of_a_load_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [torch.ones((2, 4, 16, 4, 32), dtype=torch.bfloat16, device="cpu")]
    view = KVView(layers, "layer | kv block token head dim")
    form = BlockForm.of(view, "org/model")
    url = f"file://{tmp_path}/bucket"
    with BlockStore(form, staging=4 << 20, tiers=[Remote(url, compress="zstd")]) as store:
        store.save(view, [0], KEYS[:1]).synchronize(LIMIT)
    without_the_package(monkeypatch)
    with BlockStore(form, staging=4 << 20, tiers=[Remote(url)]) as store:
        handle = store.load(view, [1], KEYS[:1])
        with pytest.raises(TransferError, match=r"1 not readable .*backports\.zstd"):
            handle.synchronize(LIMIT)
