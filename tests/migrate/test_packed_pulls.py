# SPDX-License-Identifier: Apache-2.0
"""Pulls whose rows cross packed, and offers and pulls of packed views: bit by bit as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import sleep
from typing import Any, cast

import pytest
import torch
from support.migrate_pulls import Sides, sides
from support.packed_pulls import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    LAYOUT,
    RAW_BYTES,
    SIZE,
    SLOT_BYTES,
    Packed,
    Raw,
    noise,
    pulled,
)
from support.waits import LIMIT

from portakv import Fp8, Index, KVView, Pack, choose_encoding
from portakv.errors import (
    InvalidTerms,
    LayoutError,
    PackOverflow,
    PortaKVError,
    TransferError,
    Unsupported,
)
from portakv.layout.encodings import FLAG_AT
from portakv.migrate import Shard
from portakv.migrate.staged_reader import scattered
from portakv.migrate.staging import Slots

FULL = pytest.mark.full
METHODS = pytest.mark.parametrize("method", ["mapped", "staging"])


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


def change_slots(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], object]) -> None:
    """Change the slots that arrive, ``[layers, blocks, heads, slot]``."""

    def changed(src: KVView, *rest: Any) -> Any:
        for tensor in cast("list[torch.Tensor]", src.tensors):
            change(tensor)
        return scattered(src, *rest)

    monkeypatch.setattr("portakv.migrate.staged_reader.scattered", changed)


def flip(slots: torch.Tensor) -> None:
    """Flip a bit of a value of a slot."""
    slots[0, 1, 2, 5] ^= 1


# --- raw rows that cross packed


def test_every_pattern_crosses(made: Sides) -> None:
    """NaN payloads, infinities, denormals and zeros of both signs; two exponents in a plane."""
    src = Raw(8)
    dst = Raw(8, fill=0.0)
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cpu").view(2, 256, 128)
    by_exponent = patterns.movedim(0, 1).to(torch.int16).reshape(8, LAYERS, 2, HEADS, SIZE, DIM)
    src.whole.copy_(by_exponent.view(torch.bfloat16).permute(1, 2, 0, 4, 3, 5))
    seen = pulled(made, src, dst, range(8), 128, blocks=range(8), encoding="pack")
    assert torch.equal(src.bits(range(8), 128), dst.bits(range(8), 128))
    assert len(dst.whole.view(torch.int16).unique()) == 1 << 16
    assert seen.packed
    assert seen.blocks_raw == 0


@pytest.mark.parametrize(
    "staging", [1 << 15, pytest.param(1 << 20, marks=FULL)], ids=["slices", "whole"]
)
def test_slots_cross_and_figures_say_so(made: Sides, staging: int) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    seen = pulled(made, src, dst, [6, 1, 4, 2, 9], staging=staging, encoding="pack")
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits([6, 1, 4, 2, 9], 80))
    assert (seen.nbytes, seen.wire_nbytes) == (5 * RAW_BYTES, 5 * SLOT_BYTES)
    assert (seen.packed, seen.raw_because) == (True, "")


def test_rows_cross_raw_unless_an_encoding_is_requested(made: Sides) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    seen = pulled(made, src, dst, BLOCKS)
    assert seen.wire_nbytes == 5 * RAW_BYTES
    assert not seen.packed


@pytest.mark.parametrize("size", [16, 32])
def test_blocks_that_do_not_fit_follow_raw(made: Sides, size: int) -> None:
    """Of one slice, next to each other and apart, also if the reader's blocks are larger."""
    src = Raw()
    dst = Raw(size=size, fill=0.0)
    src.spoil(7, 3, 0)
    into = [6, 1, 4, 2, 9] if size == SIZE else [6, 1, 4]
    seen = pulled(made, src, dst, into, encoding="pack", verify=True)
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits(into, 80))
    assert seen.blocks_raw == 3
    assert seen.wire_nbytes == 5 * SLOT_BYTES + 3 * RAW_BYTES


def test_without_their_flags_such_blocks_would_be_lost(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: no second pass brings them."""

    def unflag(slots: torch.Tensor) -> None:
        slots[..., Pack().plane(SIZE * DIM).head_at + FLAG_AT] = 0

    change_slots(monkeypatch, unflag)
    src = Raw()
    dst = Raw(fill=0.0)
    src.spoil(3)
    seen = pulled(made, src, dst, BLOCKS, encoding="pack")
    assert not torch.equal(src.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))
    assert seen.blocks_raw == 0


@pytest.mark.parametrize(
    ("size", "first"),
    [
        (32, 21),
        pytest.param(8, 16, marks=FULL),
        pytest.param(16, 0, marks=FULL),
        pytest.param(16, 21, marks=FULL),
    ],
)
def test_parts_of_blocks_cross_raw(made: Sides, size: int, first: int) -> None:
    """The reader's blocks may be smaller or larger, and both ends of the request may be cut."""
    src = Raw()
    dst = Raw(24, size=size, fill=0.0)
    src.spoil(11)
    into = range(20, 20 - -(-75 // size), -1)
    terms = {"first": first, "encoding": "pack", "verify": True}
    seen = pulled(made, src, dst, into, 75, **terms)
    assert torch.equal(src.bits(BLOCKS, 75, first), dst.bits(into, 75, first))
    assert seen.packed
    assert seen.raw_because == "a part of a block of 16 tokens cannot be packed"


def test_skipped_blocks_stay(made: Sides) -> None:
    """The owner has no rows for an id of -1; the reader wants none for its own."""
    src = Raw()
    dst = Raw(fill=0.0)
    owner = made.owner(Shard(src.view), expose="staging")
    reader = made.reader(Shard(dst.view))
    offer = owner.offer([7, -1, 11], tokens=48)
    reader.pull(offer.ticket, [6, -1, 4], encoding="pack").synchronize(LIMIT)
    assert torch.equal(src.bits([7, 11], 32), dst.bits([6, 4], 32))
    assert not dst.whole[:, :, [0, 1, 2, 3, 5, 7, 8, 9, 10, 11]].any()


@pytest.mark.parametrize("spoilt", [pytest.param([], marks=FULL), [3]], ids=["fits", "spoilt"])
def test_two_ranks_pull_their_heads_and_one_pulls_of_two(made: Sides, spoilt: list[int]) -> None:
    whole = Raw()
    whole.spoil(*spoilt)
    owner = made.owner(Shard(whole.view), expose="staging")
    halves = [Raw(heads=2, fill=0.0) for _ in range(2)]
    windows = [(0, 2, 4), (2, 4, 4)]
    for half, window in zip(halves, windows, strict=True):
        reader = made.reader(Shard(half.view, heads=window))
        offer = owner.offer(BLOCKS, tokens=80)
        pull = reader.pull(offer.ticket, BLOCKS, encoding="pack")
        pull.synchronize(LIMIT)
        heads = slice(*window[:2])
        assert torch.equal(whole.bits(BLOCKS, 80)[..., heads, :], half.bits(BLOCKS, 80))
        # The plane that does not fit is that of head 2.
        assert pull.statistics.blocks_raw == (len(spoilt) if window[0] else 0)

    owners = [
        made.owner(Shard(half.view, heads=window), expose="staging")
        for half, window in zip(halves, windows, strict=True)
    ]
    joined = Raw(fill=0.0)
    reader = made.reader(Shard(joined.view))
    tickets = [each.offer(BLOCKS, tokens=80).ticket for each in owners]
    pull = reader.pull(tickets, BLOCKS, encoding="pack")
    pull.synchronize(LIMIT)
    assert torch.equal(whole.bits(BLOCKS, 80), joined.bits(BLOCKS, 80))
    assert pull.statistics.wire_nbytes == 5 * SLOT_BYTES + len(spoilt) * RAW_BYTES // 2


def test_owners_of_some_blocks_each(made: Sides) -> None:
    """The reader's ids are then slots, so that its part is unpacked between."""
    src = Raw()
    dst = Raw(fill=0.0)
    owners = [made.owner(Shard(src.view), expose="staging") for _ in range(2)]
    ids = [[7, -1, 11], [-1, 3, -1]]
    tickets = [owner.offer(some, tokens=48).ticket for owner, some in zip(owners, ids, strict=True)]
    pull = made.reader(Shard(dst.view)).pull(tickets, [2, 0, 1], encoding="pack")
    pull.synchronize(LIMIT)
    assert torch.equal(src.bits([7, 3, 11], 48), dst.bits([2, 0, 1], 48))
    assert pull.statistics.packed


def test_layers_end_with_their_blocks_that_do_not_fit(made: Sides) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    src.spoil(3)
    owner = made.owner(Shard(src.view), expose="staging", staging=1 << 17)
    reader = made.reader(Shard(dst.view))
    pull = reader.pull(
        owner.offer(BLOCKS, tokens=80).ticket, BLOCKS, by_layer=True, encoding="pack"
    )
    for layer, end in enumerate(pull.layers):
        end.synchronize(LIMIT)
        assert torch.equal(src.bits(BLOCKS, 80)[layer], dst.bits(BLOCKS, 80)[layer])
    pull.synchronize(LIMIT)
    assert pull.statistics.blocks_raw == 1


@pytest.mark.parametrize("unit", [pytest.param("layers", marks=FULL), "tokens"])
def test_rows_that_are_still_written(made: Sides, unit: Any) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    src.spoil(3)
    owner = made.owner(Shard(src.view), expose="staging")
    reader = made.reader(Shard(dst.view))
    offer = owner.offer(BLOCKS, tokens=80, progress=unit)
    pull = reader.pull(offer.ticket, BLOCKS, by_layer=True, encoding="pack")
    for mark in (1, LAYERS) if unit == "layers" else (21, 80):
        offer.raise_to(mark)
    pull.synchronize(LIMIT)
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))
    assert pull.statistics.packed


def test_a_rate_counts_the_bytes_that_cross(made: Sides) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    pulled(made, src, dst, BLOCKS, encoding=Pack(3), max_gbps=0.1)
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))


@pytest.mark.parametrize("guarded", [True, False], ids=["verify", "no guard"])
def test_a_flipped_bit_on_the_wire(
    made: Sides, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The control commits it."""
    change_slots(monkeypatch, flip)
    src = Raw()
    dst = Raw(fill=0.0)
    terms: dict[str, Any] = {"encoding": "pack", "verify": guarded}
    if guarded:
        with pytest.raises(TransferError, match="checksums"):
            pulled(made, src, dst, BLOCKS, **terms)
    else:
        pulled(made, src, dst, BLOCKS, **terms)
        assert not torch.equal(src.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))


def test_mapped_rows_are_never_packed(made: Sides) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    seen = pulled(made, src, dst, BLOCKS, method="mapped", encoding="pack")
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))
    assert (seen.packed, seen.wire_nbytes) == (False, 0)
    assert seen.raw_because == "the owners' memory can be mapped"


def halves(*_: object) -> KVView:
    return KVView([*torch.zeros(LAYERS, 2, 12, SIZE, HEADS, DIM, dtype=torch.float16)], LAYOUT)


def small(*_: object) -> KVView:
    return KVView([*torch.zeros(LAYERS, 2, 12, 2, HEADS, 8, dtype=torch.bfloat16)], LAYOUT)


def pages(*_: object) -> KVView:
    return KVView(torch.zeros(LAYERS, 12, 256, dtype=torch.uint8), "layer block page", block_size=2)


def flat(*_: object) -> KVView:
    rows = torch.zeros(LAYERS, 2, 12 * SIZE, HEADS, DIM, dtype=torch.bfloat16)
    return KVView(rows, "layer kv token head dim")


def cache(*_: object) -> KVView:
    return Raw().view


@pytest.mark.parametrize(
    ("view", "ids", "encoding", "why"),
    [
        (halves, [1, 2], "pack", "'pack' takes rows of bfloat16 alone"),
        pytest.param(small, [1], "pack", "block_size x dim must be a multiple", marks=FULL),
        pytest.param(pages, [1], "pack", "'pack' takes rows, not opaque pages", marks=FULL),
        pytest.param(flat, [1, 2], "pack", "the owner's view has no blocks", marks=FULL),
        (cache, Index([1, 2], 1), "pack", "the offer does not name blocks of 16 tokens"),
        pytest.param(cache, [1], Pack(4, 2048), "its slots are not smaller", marks=FULL),
    ],
)
def test_rows_that_cannot_be_packed_cross_raw(
    made: Sides, view: Callable[[], KVView], ids: Any, encoding: Any, why: str
) -> None:
    owner = made.owner(Shard(view()), expose="staging")
    reader = made.reader(Shard(view()))
    into = [3] if reader.shards[0].view.block_size else [3, 4]
    pull = reader.pull(owner.offer(ids, tokens=2).ticket, into, encoding=encoding)
    pull.synchronize(LIMIT)
    assert not pull.statistics.packed
    assert pull.statistics.raw_because.startswith(why)


@pytest.mark.parametrize(("staging", "packs"), [(1 << 14, False), (1 << 15, True)])
def test_blocks_larger_than_a_staging_buffer_cross_raw(
    made: Sides, staging: int, packs: bool
) -> None:
    src = Raw()
    dst = Raw(fill=0.0)
    seen = pulled(made, src, dst, [6, 1, 4, 2, 9], staging=staging, encoding="pack")
    why = "" if packs else f"a staging buffer holds no block of {SIZE} tokens of a layer"
    assert (seen.packed, seen.raw_because) == (packs, why)
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits([6, 1, 4, 2, 9], 80))


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("zip", "Expected encoding to be 'pack'"), (Pack(4, 32), "Expected slot_bytes above")],
)
def test_another_encoding_is_refused(made: Sides, encoding: Any, text: str) -> None:
    with pytest.raises(InvalidTerms, match=text):
        pulled(made, Raw(), Raw(), BLOCKS, encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("fp8", "A pull whose rows cross in 'fp8': mapped memory"),
        (Fp8(), "A pull whose rows cross in 'fp8': mapped memory"),
    ],
)
def test_encodings_of_other_calls_are_refused_by_name(
    made: Sides, encoding: Any, says: str
) -> None:
    """Rows that are mapped would not be rounded. No byte of the reader changes."""
    dst = Raw(fill=0.0)
    with pytest.raises(Unsupported, match=says):
        pulled(made, Raw(), dst, BLOCKS, encoding=encoding)
    assert not dst.bits(BLOCKS, 80).any()


@pytest.mark.parametrize("random_bits", [False, True])
def test_a_pull_takes_the_choice_of_the_owner(made: Sides, random_bits: bool) -> None:
    src = Raw()
    if random_bits:
        draw = torch.Generator(device="cpu").manual_seed(3)
        for tensor in src.view.tensors:
            bits = torch.randint(-(1 << 15), 1 << 15, tensor.shape, generator=draw, device="cpu")
            tensor.copy_(bits.to(torch.int16).view(torch.bfloat16))
    dst = Raw(fill=0.0)
    choice = choose_encoding(src.view, BLOCKS, link_gbps=1.0, packing_gbps=100.0)
    seen = pulled(made, src, dst, [6, 1, 4, 2, 9], encoding=choice.pack)
    assert (choice.pack is None) is random_bits
    assert seen.packed is not random_bits
    assert torch.equal(src.bits(BLOCKS, 80), dst.bits([6, 1, 4, 2, 9], 80))


@pytest.mark.parametrize(
    ("text", "first", "count", "error"),
    [
        ("pack/1:4", 3, 16, LayoutError),
        ("pack/1:4", 16, 15, LayoutError),
        ("zip/1", 0, 16, InvalidTerms),
        ("pack/2:4", 0, 16, InvalidTerms),
    ],
)
def test_an_owner_refuses_a_request_for_other_slots(
    text: str, first: int, count: int, error: type[PortaKVError]
) -> None:
    assert Slots.requested(Raw().view, "", 3, 5) is None
    assert Slots.requested(Raw().view, "pack/1:4", 16, 32) == Slots(Pack(), SIZE)
    with pytest.raises(error):
        Slots.requested(Raw().view, text, first, count)
    with pytest.raises(LayoutError):  # packed rows cross in their own slots alone
        Slots.requested(Packed().view, "" if error is LayoutError else "pack/1:3", 0, 16)


# --- packed views


@pytest.mark.parametrize(
    ("method", "verify"),
    [
        ("mapped", False),
        ("staging", True),
        pytest.param("mapped", True, marks=FULL),
        pytest.param("staging", False, marks=FULL),
    ],
)
def test_slots_are_copied_as_they_are(made: Sides, method: str, verify: bool) -> None:
    src = Packed().of(Raw())
    dst = Packed()
    seen = pulled(made, src, dst, [6, 1, 4, 2, 9], method=method, verify=verify)
    assert torch.equal(src.whole[BLOCKS], dst.whole[[6, 1, 4, 2, 9]])
    assert not dst.whole[[0, 3, 5, 7, 8, 10, 11]].any()
    assert seen.nbytes == 5 * SLOT_BYTES


@pytest.mark.parametrize("guarded", [True, False], ids=["verify", "no guard"])
def test_a_checksum_finds_a_slot_that_changed(
    made: Sides, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The control commits it."""
    change_slots(monkeypatch, flip)
    src = Packed().of(Raw())
    dst = Packed()
    terms: dict[str, Any] = {"verify": guarded}
    if guarded:
        with pytest.raises(TransferError, match="checksums"):
            pulled(made, src, dst, BLOCKS, **terms)
    else:
        pulled(made, src, dst, BLOCKS, **terms)
        assert not torch.equal(src.whole[BLOCKS], dst.whole[BLOCKS])


@METHODS
def test_the_reader_unpacks(made: Sides, method: str) -> None:
    raw = Raw()
    dst = Raw(fill=0.0)
    pulled(made, Packed().of(raw), dst, [6, 1, 4, 2, 9], method=method)
    assert torch.equal(raw.bits(BLOCKS, 80), dst.bits([6, 1, 4, 2, 9], 80))


@METHODS
def test_packed_blocks_follow_a_mark_when_they_are_whole(made: Sides, method: str) -> None:
    raw = Raw()
    dst = Raw(fill=0.0)
    owner = made.owner(Shard(Packed().of(raw).view), expose=method)
    reader = made.reader(Shard(dst.view))
    offer = owner.offer(BLOCKS, tokens=80, progress="tokens")
    pull = reader.pull(offer.ticket, BLOCKS, by_layer=True)
    for mark in (21, 80):
        offer.raise_to(mark)
    pull.synchronize(LIMIT)
    assert torch.equal(raw.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))


@METHODS
def test_ranks_read_slots_of_their_heads(made: Sides, method: str) -> None:
    raw = Raw()
    whole = Packed().of(raw)
    owner = made.owner(Shard(whole.view), expose=method)
    halves = [Packed(heads=2) for _ in range(2)]
    for half, window in zip(halves, [(0, 2, 4), (2, 4, 4)], strict=True):
        reader = made.reader(Shard(half.view, heads=window))
        offer = owner.offer(BLOCKS, tokens=80)
        pull = reader.pull(offer.ticket, BLOCKS, by_layer=True)
        pull.synchronize(LIMIT)
    both = torch.cat([half.raw().bits(BLOCKS, 80) for half in halves], dim=3)
    assert torch.equal(both, raw.bits(BLOCKS, 80))


@METHODS
@pytest.mark.parametrize("staging", [1 << 15, 1 << 20], ids=["slices", "whole"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_blocks_that_hold_no_rows_are_named_and_all_others_are_moved(
    made: Sides, method: str, staging: int, by_layer: bool
) -> None:
    """Each once and in the order of the request, in whatever slice or layer they are."""
    raw = Raw()
    raw.spoil(7, 0)
    noise(raw.whole[0, 1, 0, :, 1])
    noise(raw.whole[0, 1, 5, :, 3])
    dst = Raw(fill=0.0)
    terms: dict[str, Any] = {"method": method, "staging": staging, "by_layer": by_layer}
    with pytest.raises(PackOverflow, match=r"that (did not fit|do not)") as caught:
        pulled(made, Packed().of(raw), dst, [6, 1, 4, 2, 9], **terms)
    named = [*zip(caught.value.src_blocks, caught.value.dst_blocks, strict=True)]
    assert named == [(7, 6), (0, 2), (5, 9)]
    wanted = raw.whole.clone()
    for layer, kv, block, head in ((1, 0, 7, 2), (1, 0, 0, 2), (0, 1, 0, 1), (0, 1, 5, 3)):
        wanted[layer, kv, block, :, head] = 0
    moved = dst.whole[:, :, [6, 1, 4, 2, 9]]
    assert torch.equal(moved.view(torch.int16), wanted[:, :, BLOCKS].view(torch.int16))
    assert not dst.whole[:, :, [0, 3, 5, 7, 8, 10, 11]].any()


@METHODS
def test_a_layer_names_its_own_blocks_that_hold_no_rows(made: Sides, method: str) -> None:
    raw = Raw()
    raw.spoil(7, 0)
    dst = Raw(fill=0.0)
    owner = made.owner(Shard(Packed().of(raw).view), expose=method, staging=1 << 15)
    reader = made.reader(Shard(dst.view))
    pull = reader.pull(owner.offer(BLOCKS, tokens=80).ticket, [6, 1, 4, 2, 9], by_layer=True)
    pull.layers[0].synchronize(LIMIT)
    with pytest.raises(PackOverflow) as caught:
        pull.layers[1].synchronize(LIMIT)
    assert (caught.value.src_blocks, caught.value.dst_blocks) == ((7, 0), (6, 2))
    with pytest.raises(PackOverflow) as caught:
        pull.synchronize(LIMIT)
    assert (caught.value.src_blocks, caught.value.dst_blocks) == ((7, 0), (6, 2))


@METHODS
def test_blocks_of_all_owners_that_hold_no_rows_are_named(made: Sides, method: str) -> None:
    """The rows of the other owner are moved all the same."""
    halves = [Raw(heads=2) for _ in range(2)]
    noise(halves[0].whole[1, 0, 7, :, 1])
    noise(halves[1].whole[0, 1, 3, :, 0])
    owners = [
        made.owner(
            Shard(Packed(heads=2).of(half).view, heads=window), expose=method, staging=1 << 15
        )
        for half, window in zip(halves, [(0, 2, 4), (2, 4, 4)], strict=True)
    ]
    dst = Raw(fill=0.0)
    tickets = [owner.offer(BLOCKS, tokens=80).ticket for owner in owners]
    pull = made.reader(Shard(dst.view)).pull(tickets, [6, 1, 4, 2, 9])
    with pytest.raises(PackOverflow, match="got 2 that") as caught:
        pull.synchronize(LIMIT)
    named = zip(caught.value.src_blocks, caught.value.dst_blocks, strict=True)
    assert sorted(named) == [(3, 1), (7, 6)]
    wanted = torch.cat([half.whole for half in halves], dim=4)[:, :, BLOCKS].clone()
    wanted[1, 0, 0, :, 1] = 0
    wanted[0, 1, 1, :, 2] = 0
    moved = dst.whole[:, :, [6, 1, 4, 2, 9]]
    assert torch.equal(moved.view(torch.int16), wanted.view(torch.int16))


@METHODS
def test_a_pull_with_a_mark_names_blocks_of_all_parts(made: Sides, method: str) -> None:
    raw = Raw()
    raw.spoil(7, 5)
    dst = Raw(fill=0.0)
    owner = made.owner(Shard(Packed().of(raw).view), expose=method)
    reader = made.reader(Shard(dst.view))
    offer = owner.offer(BLOCKS, tokens=80, progress="tokens")
    pull = reader.pull(offer.ticket, BLOCKS, by_layer=True)
    offer.raise_to(21)
    sleep(0.2)  # the first part has ended by then
    offer.raise_to(80)
    with pytest.raises(PackOverflow) as caught:
        pull.synchronize(LIMIT)
    assert (sorted(caught.value.src_blocks), sorted(caught.value.dst_blocks)) == ([5, 7], [5, 7])
    assert torch.equal(raw.bits([3, 11, 0], 48), dst.bits([3, 11, 0], 48))


@pytest.mark.parametrize("by_layer", [False, True])
def test_tasks_that_copy_mapped_layers_move_all_other_blocks(made: Sides, by_layer: bool) -> None:
    """More rows than the call copies itself."""
    every = list(range(80))
    raw = Raw(80)
    raw.spoil(70, 3)
    noise(raw.whole[0, 1, 5, :, 0])
    dst = Raw(80, fill=0.0)
    terms: dict[str, Any] = {"blocks": every, "tokens": 80 * SIZE, "by_layer": by_layer}
    with pytest.raises(PackOverflow, match="got 3 that") as caught:
        pulled(made, Packed(80).of(raw), dst, every, method="mapped", **terms)
    assert sorted(caught.value.src_blocks) == sorted(caught.value.dst_blocks) == [3, 5, 70]
    wanted = raw.whole.clone()
    wanted[1, 0, [3, 70], :, 2] = 0
    wanted[0, 1, 5, :, 0] = 0
    assert torch.equal(dst.whole.view(torch.int16), wanted.view(torch.int16))


@METHODS
def test_nothing_is_committed_if_a_block_holds_no_rows(made: Sides, method: str) -> None:
    raw = Raw()
    raw.spoil(7)
    owner = made.owner(Shard(Packed().of(raw).view), expose=method, staging=1 << 15)
    reader = made.reader(Shard(Raw(fill=0.0).view))
    offer = owner.offer(BLOCKS, tokens=80)
    pull = reader.pull(offer.ticket, BLOCKS)
    with pytest.raises(PackOverflow):
        pull.synchronize(LIMIT)
    assert not pull.published
    assert offer.state == "held"


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "raw into packed": (Raw, Packed, {}, "into a packed view through staging"),
    "verify": (Packed, Raw, {"verify": True}, "leave verify out"),
    "large slots": (lambda: Packed(pack=Pack(4, 2048)), Raw, {}, "its slots are larger"),
    "other blocks": (Packed, lambda: Raw(size=32), {}, "the raw side's blocks have 32"),
    "a part of a block": (Packed, Packed, {"tokens": 70}, "whole blocks of 16 tokens"),
    "a first token": (Packed, Packed, {"first": 8}, "whole blocks of 16 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_packed_views_cannot_do(made: Sides, case: str) -> None:
    src, dst, terms, why = REFUSED[case]
    reader = dst()
    into = BLOCKS[: -(-80 // reader.view.block_size)]
    with pytest.raises(Unsupported, match=why):
        pulled(made, src(), reader, into, **terms)


def test_other_parameters_do_not_connect(made: Sides) -> None:
    with pytest.raises(LayoutError, match="encoding of group 0"):
        pulled(made, Packed(pack=Pack(3)), Packed(), BLOCKS)


@pytest.mark.parametrize("pack", [Pack(3), pytest.param(Pack(4, 1024), marks=FULL)])
def test_parameters_are_those_of_the_owner(made: Sides, pack: Pack) -> None:
    raw = Raw(fill=1.5)
    dst = Raw(fill=0.0)
    pulled(made, Packed(pack=pack).of(raw), dst, BLOCKS, encoding="pack")
    assert torch.equal(raw.bits(BLOCKS, 80), dst.bits(BLOCKS, 80))
