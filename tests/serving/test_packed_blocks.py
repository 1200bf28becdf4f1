# SPDX-License-Identifier: Apache-2.0
"""Packed blocks of engines: in a process, and of ranks by a server; readers of either kind, blocks
that do not fit, and damage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.held_bucket import HeldBucket, TermsWith
from support.store_damage import damaged_images_believed, flip_bits, slot_files
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import InvalidTerms
from portakv.serving import ServerIndex, StoreClient, StoreServer, StoreTerms
from portakv.serving.local import GroupView, LocalIndex, alike_in, forms_of
from portakv.serving.server.messages import AskKeys, Follow
from portakv.serving.server.server import OpenStore
from portakv.storage import BlockForm, BlockStore, Disk, prefix_keys
from portakv.storage.calls import Change

LAYOUT = "layer | kv block token head dim"
LAYERS = 2
BLOCKS = 8
SIZE = 16
HEADS = 4
DIM = 16
COUNT = 5
KEYS = prefix_keys(range(COUNT * SIZE), SIZE)
PLACES = [6, 1, 7, 0, 3]  # of the blocks in the cache
NOISY = 2  # the position of a block that does not fit
ALL = [True] * COUNT


def cache(noisy: bool = True) -> KVView:
    """Return a cache of bf16 rows; ``noisy``: a plane of its last head fits into no slot."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    shape = (LAYERS, 2, BLOCKS, SIZE, HEADS, DIM)
    rows = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").bfloat16()
    if noisy:
        patterns = torch.arange(SIZE * DIM, dtype=torch.int64, device="cpu") * 12345
        plane = patterns.to(torch.int16).view(torch.bfloat16).view(SIZE, DIM)
        rows[1, 1, PLACES[NOISY], :, HEADS - 1] = plane
    return KVView([*rows], LAYOUT)


def empty(heads: int = HEADS, size: int = SIZE, dtype: torch.dtype = torch.bfloat16) -> KVView:
    blocks = BLOCKS * SIZE // size
    shape = (LAYERS, 2, blocks, size, heads, DIM)
    return KVView([*torch.zeros(shape, dtype=dtype, device="cpu")], LAYOUT)


def same(target: KVView, source: KVView, landed: Sequence[bool] = ALL) -> bool:
    """Return whether the first blocks of a view are those of another one's places."""
    here = [at for at, there in enumerate(landed) if there]
    pairs = zip(target.tensors, source.tensors, strict=True)
    return all(
        torch.equal(
            a[:, here].contiguous().view(torch.int16),
            b[:, [PLACES[at] for at in here]].contiguous().view(torch.int16),
        )
        for a, b in pairs
    )


def terms(folder: Path | None, encoding: str | None = "pack", host: int = 1 << 20) -> StoreTerms:
    name = None if folder is None else str(folder)
    return StoreTerms(name, 16 << 20, host, 4 << 20, encoding=encoding)


def save(store: Any, view: KVView) -> list[bool]:
    saved = store.save(view, PLACES, KEYS)
    saved.synchronize(LIMIT)
    landed: list[bool] = saved.landed.tolist()
    return landed


def load(store: Any, view: KVView) -> list[bool]:
    loaded = store.load(view, range(COUNT), KEYS, missing="skip")
    loaded.synchronize(LIMIT)
    landed: list[bool] = loaded.landed.tolist()
    return landed


# --- in a process


@contextmanager
def opened(how: StoreTerms, *views: KVView) -> Iterator[tuple[LocalIndex, list[Any]]]:
    """Open the store of an engine with groups of layers; yield its index and its parts."""
    index = LocalIndex()
    stores = index.open([GroupView(view) for view in views], how, "model", None)
    try:
        yield index, [*stores]
    finally:
        index.close()


@pytest.mark.parametrize("host", [1 << 20, 0], ids=["host", "disk"])
def test_an_engine_finds_packed_blocks_after_a_restart(tmp_path: Path, host: int) -> None:
    view = cache()
    with opened(terms(tmp_path / "store", host=host), view) as (index, (store,)):
        index.record()
        assert store.form.encoding == "pack/1:4"
        assert save(store, view) == ALL
        assert index.leading(KEYS) == COUNT
        stored = {change.key for change in index.take_events() if change.tier == "disk"}
        assert stored == {*KEYS}
        target = empty()
        assert load(store, target) == ALL
        assert same(target, view)
    for encoding in ("pack", None):  # an engine without the term reads them, too
        with opened(terms(tmp_path / "store", encoding, host), view) as (index, (store,)):
            assert index.leading(KEYS) == COUNT
            target = empty()
            assert load(store, target) == ALL
            assert same(target, view)


def test_raw_blocks_of_a_former_engine_are_read(tmp_path: Path) -> None:
    view = cache()
    with opened(terms(tmp_path / "store", None), view) as (_, (store,)):
        assert save(store, view) == ALL
    with opened(terms(tmp_path / "store"), view) as (index, (store,)):
        assert index.leading(KEYS) == COUNT
        target = empty()
        assert load(store, target) == ALL
        assert same(target, view)


def test_groups_that_cannot_be_packed_stay_raw(caplog: pytest.LogCaptureFixture) -> None:
    half = empty(dtype=torch.float16)
    view = cache()
    with opened(terms(None), view, half) as (index, (packed, raw)):
        assert packed.form.encoding
        assert not raw.form.encoding
        assert "The blocks of group 1 of layers stay raw." in caplog.text
        assert "float16" in caplog.text
        assert caplog.text.count("stay raw") == 1
        assert save(packed, view) == ALL
        assert index.leading(KEYS) == 0
        assert save(raw, half) == ALL
        assert index.leading(KEYS) == COUNT


def test_packed_blocks_have_the_size_of_the_caches_blocks() -> None:
    with pytest.raises(InvalidTerms, match="Expected stored blocks of 16 tokens with the encoding"):
        forms_of([GroupView(cache())], "model", 32, encoding="pack")
    with pytest.raises(InvalidTerms, match="'zip'"):
        terms(None, "zip")
    with pytest.raises(InvalidTerms, match="got 'auto': packed blocks have the size"):
        terms(None, "auto")
    with pytest.raises(InvalidTerms, match="Expected by_layer without an encoding"):
        StoreTerms(encoding="pack", by_layer=True)


def test_an_engine_with_other_blocks_misses_packed_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its stored blocks have as many tokens, and its own blocks have not."""
    view = cache()
    with opened(terms(tmp_path / "store"), view) as (_, (store,)):
        assert save(store, view) == ALL
    target = empty(size=8)
    index = LocalIndex()
    (store,) = index.open([GroupView(target)], terms(tmp_path / "store", None), "model", SIZE)
    loaded = store.load(target, range(2 * COUNT), KEYS, missing="skip")
    loaded.wait()
    assert loaded.landed.tolist() == [at == NOISY for at in range(COUNT)]
    assert "caches with blocks of 8 tokens cannot read" in caplog.text
    index.close()


def test_a_folder_of_packed_blocks_of_another_size_is_opened(tmp_path: Path) -> None:
    """No packed block has the size of its blocks."""
    view = cache()
    with opened(terms(tmp_path / "store"), view) as (_, (store,)):
        assert save(store, view) == ALL
    with opened(terms(tmp_path / "store", None), empty(size=8)) as (index, (store,)):
        assert index.leading(prefix_keys(range(COUNT * SIZE), 8)) == 0
        assert "blocks of 16 tokens, which a store of blocks of 8" in store.explain()


@pytest.mark.parametrize("believed", [False, True], ids=["verified", "believed"])
def test_flipped_bits_on_the_disk_are_misses(tmp_path: Path, believed: bool) -> None:
    view = cache()
    with opened(terms(tmp_path / "store"), view) as (_, (store,)):
        assert save(store, view) == ALL
    flip_bits(tmp_path / "store", random.Random(1), 400)
    with (
        damaged_images_believed() if believed else nullcontext(),
        opened(terms(tmp_path / "store", host=0), view) as (_, (store,)),
    ):
        target = empty()
        landed = load(store, target)
    assert same(target, view, landed) is not believed
    assert believed or landed != ALL


# --- ranks


def in_a_bucket(bucket: HeldBucket, encoding: str | None) -> StoreTerms:
    return TermsWith.a_bucket(bucket, host=1 << 20, staging=4 << 20, encoding=encoding)


def test_a_bucket_has_packed_blocks_of_former_engines() -> None:
    """Also raw ones, in place of blocks that do not fit; a raw engine reads both."""
    view = cache()
    bucket = HeldBucket()
    with opened(in_a_bucket(bucket, "pack"), view) as (_, (store,)):
        assert save(store, view) == ALL
        assert store.form in bucket.forms(store.form.raw)
    for encoding in ("pack", None):
        with opened(in_a_bucket(bucket, encoding), view) as (index, (store,)):
            assert until(lambda index=index: index.leading(KEYS) == COUNT, LIMIT)
            target = empty()
            assert load(store, target) == ALL
            assert same(target, view)


class Host:
    """A server, and ranks of it.

    Args:
        folder: of its disk; None: it has host memory alone.
    """

    def __init__(self, stack: ExitStack, folder: Path | None, name: str) -> None:
        self._stack = stack
        self.name = name
        self.store_server = stack.enter_context(StoreServer(terms(folder), name))

    def rank(
        self, view: KVView, first: int = 0, encoding: str | None = "pack", layer: int = 0
    ) -> Any:
        """Return the blocks of a rank that has the heads and layers from two numbers on."""
        heads = [(first, first + view.heads, HEADS)]
        layers = (layer, layer + view.layers, LAYERS)
        forms = forms_of([GroupView(view)], "model", None, heads, layers, encoding)
        client = StoreClient(self.store_server.place, forms, self.name)
        self._stack.enter_context(client)
        assert client.wait(LIMIT)
        return client.blocks[0]

    def leading(self) -> int:
        """Return how many blocks a scheduler finds."""
        with ServerIndex(self.store_server.place, self.name) as index:
            assert index.wait(LIMIT)
            count = index.leading(KEYS)
            assert count is not None
            return count


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return a function that makes a server, which is closed at the end of a ``with``."""

    @contextmanager
    def made(folder: Path | None = None) -> Iterator[Host]:
        with ExitStack() as stack:
            yield Host(stack, folder, f"packed {request.node.name} {id(stack)}")

    return made


def part_of(view: KVView, first: int, past: int) -> KVView:
    """Return the heads of a rank, as caches of their own."""
    tensors = [tensor[:, :, :, first:past].contiguous() for tensor in view.tensors]
    return KVView(tensors, LAYOUT)


def save_in_halves(at: Host, view: KVView) -> list[Any]:
    """Have two ranks save the blocks of a view, and return their blocks."""
    parts = [part_of(view, first, first + 2) for first in (0, 2)]
    ranks = [at.rank(part, 2 * number) for number, part in enumerate(parts)]
    saves = [rank.save(part, PLACES, KEYS) for rank, part in zip(ranks, parts, strict=True)]
    for each in saves:
        each.synchronize(LIMIT)
        assert each.landed.tolist() == ALL
    return ranks


def test_stages_pack_their_layers_and_others_read_them(
    host: Callable[..., Any], tmp_path: Path
) -> None:
    """The plane that does not fit is in the last layer, so that both stages store its block raw."""
    view = cache()
    stages = [KVView([tensor], LAYOUT) for tensor in view.tensors]
    with host(tmp_path / "store") as at:
        ranks = [at.rank(stage, layer=layer) for layer, stage in enumerate(stages)]
        saves = [rank.save(stage, PLACES, KEYS) for rank, stage in zip(ranks, stages, strict=True)]
        for each in saves:
            each.synchronize(LIMIT)
            assert each.landed.tolist() == ALL
        assert at.store_server.statistics()["saved_raw"] == 1
        assert at.leading() == COUNT
    with host(tmp_path / "store") as at:
        for layer, stage in enumerate(stages):
            target = KVView([torch.zeros_like(stage.tensors[0], device="cpu")], LAYOUT)
            assert load(at.rank(target, layer=layer), target) == ALL
            assert same(target, stage)
        target = empty()
        assert load(at.rank(target), target) == ALL
        assert same(target, view)


def test_a_block_that_one_rank_cannot_pack_is_raw_for_both(host: Callable[..., Any]) -> None:
    view = cache()
    with host() as at:
        ranks = save_in_halves(at, view)
        assert at.store_server.statistics()["saved_raw"] == 1
        assert at.leading() == COUNT
        for number, rank in enumerate(ranks):
            target = empty(2)
            assert load(rank, target) == ALL
            assert same(target, part_of(view, 2 * number, 2 * number + 2))


def test_other_splits_read_what_two_ranks_have_packed(
    host: Callable[..., Any], tmp_path: Path
) -> None:
    view = cache()
    with host(tmp_path / "store") as at:
        save_in_halves(at, view)
    with host(tmp_path / "store") as at:
        for first, past in ((0, 4), (1, 2), (3, 4)):
            target = empty(past - first)
            assert load(at.rank(target, first), target) == ALL
            assert same(target, part_of(view, first, past))
        assert at.leading() == COUNT
    with opened(terms(tmp_path / "store", None), view) as (index, _):
        assert index.leading(KEYS) == COUNT


@pytest.mark.parametrize(("first", "second"), [("pack", None), (None, "pack")])
def test_store_servers_read_blocks_of_the_other_kind(
    first: str | None, second: str | None, host: Callable[..., Any], tmp_path: Path
) -> None:
    view = cache()
    with opened(terms(tmp_path / "store", first), view) as (_, (store,)):
        assert save(store, view) == ALL
    with host(tmp_path / "store") as at:
        target = empty(2)
        rank = at.rank(target, 2, second)
        assert at.leading() == COUNT
        assert load(rank, target) == ALL
        assert same(target, part_of(view, 2, 4))


def test_a_raw_engine_joins_a_store_server_of_packed_blocks(host: Callable[..., Any]) -> None:
    view = cache()
    with host() as at:
        assert save(at.rank(view), view) == ALL
        target = empty()
        assert load(at.rank(target, encoding=None), target) == ALL
        assert same(target, view)


def test_an_index_learns_of_blocks_that_were_kept_raw(host: Callable[..., Any]) -> None:
    view = cache()
    with host() as at:
        rank = at.rank(view)
        with ServerIndex(at.store_server.place, at.name) as index:
            assert index.wait(LIMIT)
            index.record()
            assert index.leading(KEYS) == 0
            assert save(rank, view) == ALL
            until(lambda: index.leading(KEYS) == COUNT, LIMIT)
            assert sorted(change.key for change in index.take_events()) == sorted(KEYS)


class Published:
    """Stands for the publisher of a server's changes; notes the changes and groups of each call."""

    def __init__(self) -> None:
        self.calls = list[tuple[list[tuple[bytes, str]], Sequence[str]]]()

    def answer(self) -> None:
        pass

    def clear(self) -> None:
        self.calls.clear()

    def publish(self, changes: Sequence[Change], groups: Sequence[str], /) -> None:
        self.calls.append(([(change.key, change.form) for change in changes], groups))


def test_a_store_server_announces_lossy_blocks_to_no_engine(tmp_path: Path) -> None:
    """A folder may have fp8 blocks, which raw and packing engines do not read."""
    view = cache()
    raw, packed = (
        forms_of([GroupView(view)], "model", None, encoding=encoding)[0]
        for encoding in (None, "pack")
    )
    lossy = BlockForm.of(view, "model", encoding="fp8")
    assert lossy.raw == raw
    folder = tmp_path / "store"
    folder.mkdir(0o700)
    with BlockStore(lossy, staging=1 << 20, tiers=[Disk(folder, capacity=16 << 20)]) as store:
        assert save(store, view) == ALL
    how = StoreTerms(str(folder), 16 << 20, 1 << 20, 4 << 20, shared=True)
    assert alike_in(how.tiers(), [raw]) == []
    assert alike_in(how.tiers(), [packed]) == [raw]
    assert lossy in how.tiers()[0].forms(raw)  # control

    # Also if a server has the lossy form itself.
    published: Any = Published()
    opened = OpenStore(how, [raw, lossy], lambda: None, 10.0, published)
    try:
        follow = Follow("engine", (0, 0, 0), "address", 2)
        follower = opened.follow(follow, [raw.name, lossy.name])
        assert follower.forms == ((0,), (1, 0))
        for group, keys in enumerate((set[bytes](), {*KEYS})):
            pages = [opened.page(AskKeys(follower.session, group, 0))]
            while pages[-1].more:
                pages.append(opened.page(AskKeys(follower.session, group, len(pages))))
            assert {key for page in pages for key in page.keys} == keys
        changes = {change for some, _ in published.calls for change in some}
        assert changes == {(key, lossy.name) for key in KEYS}
        assert all(groups == [raw.name, lossy.name] for _, groups in published.calls)
    finally:
        opened.close(5.0)


def test_a_store_server_misses_damaged_blocks(host: Callable[..., Any], tmp_path: Path) -> None:
    view = cache(noisy=False)
    with host(tmp_path / "store") as at:
        assert save(at.rank(view), view) == ALL
    paths = [path for path in slot_files(tmp_path / "store") if path.stat().st_size]
    for path in paths:
        with path.open("r+b") as file:
            file.seek(4096 + 5)
            byte = file.read(1)[0]
            file.seek(4096 + 5)
            file.write(bytes([byte ^ 1]))
    with host(tmp_path / "store") as at:
        target = empty()
        landed = load(at.rank(target), target)
        assert sum(landed) == COUNT - 1
        assert same(target, view, landed)
