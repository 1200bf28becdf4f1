# SPDX-License-Identifier: Apache-2.0
"""Block stores of packed forms: every byte comes back, what does not fit is kept raw or is missing,
readers of either form, and damage."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.storage_cases import FakeTier, key_of
from support.store_damage import damaged_images_believed, slot_files
from support.waits import LIMIT

from portakv import (
    InvalidTerms,
    KVView,
    Pack,
    PackOverflow,
    StoreError,
    TransferError,
    Unsupported,
    copy_blocks,
)
from portakv.storage import BlockForm, BlockStore, Disk, calls, memory
from portakv.storage import store as form_store

NHD = "layer | kv block token head dim"
HND = "layer | kv block head token dim"
LAYERS = 2
BLOCKS = 8
SIZE = 16
HEADS = 4
DIM = 32
KEYS = [key_of(n) for n in range(5)]
PLACES = [6, 1, 7, 0, 3]  # of the blocks in the cache


def cache(seed: int = 0) -> list[torch.Tensor]:
    """Return layers of bf16 rows with few exponents, and a few others."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (2, BLOCKS, SIZE, HEADS, DIM)
    made = [
        torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(LAYERS)
    ]
    return [layer.to(torch.bfloat16) for layer in made]


def noisy(layers: list[torch.Tensor], block: int) -> list[torch.Tensor]:
    """Return layers in which one block has a plane of every pattern, which no slot holds."""
    count = torch.arange(SIZE * DIM, dtype=torch.int64, device="cpu") * 12345
    layers[1][1, block, :, 2] = count.to(torch.int16).view(torch.bfloat16).view(SIZE, DIM)
    return layers


def view_of(layers: list[torch.Tensor], layout: str = NHD, heads: slice = slice(None)) -> KVView:
    shown = [layer[:, :, :, heads] for layer in layers]
    if layout == HND:
        shown = [layer.transpose(2, 3).contiguous() for layer in shown]
    return KVView(shown, layout)


def form_of(encoding: Any = "pack", **more: Any) -> BlockForm:
    return BlockForm.of(view_of(cache()), "org/model", encoding=encoding, **more)


def loaded(
    store: Any, layers: list[torch.Tensor], layout: str = NHD, **how: Any
) -> tuple[list[bool], bool]:
    """Load all keys into an empty cache; return which landed, and True if their bytes are right and
    no other byte was written."""
    empty = [torch.zeros_like(layer) for layer in layers]
    target = view_of(empty, layout)
    handle = store.load(target, range(5), KEYS, missing="skip", **how)
    handle.synchronize(LIMIT)
    landed = handle.landed.tolist()
    wanted = [torch.zeros_like(layer) for layer in layers]
    for own, layer in zip(wanted, layers, strict=True):
        for at, place in enumerate(PLACES):
            if landed[at]:
                own[:, at] = layer[:, place]
    pairs = zip(target.tensors, view_of(wanted, layout).tensors, strict=True)
    return landed, all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def save(store: Any, layers: list[torch.Tensor]) -> list[bool]:
    handle = store.save(view_of(layers), PLACES, KEYS, full="wait")
    handle.synchronize(LIMIT)
    result: list[bool] = handle.landed.tolist()
    return result


def disk(folder: Path) -> Disk:
    return Disk(folder, capacity=16 << 20)


ALL = [True] * 5
LOST = [True, True, False, True, True]


def test_a_form_says_how_blocks_are_packed() -> None:
    raw = form_of(None)
    packed = form_of()
    assert packed.raw == raw
    assert packed.encoding == Pack().text == "pack/1:4"
    assert packed.planes == (Pack().plane(SIZE * DIM),) * 2
    assert packed.payload_bytes == LAYERS * 2 * HEADS * packed.planes[0].slot_bytes
    assert packed.payload_bytes < raw.payload_bytes
    assert packed.same_cache(raw)
    assert BlockForm.from_json(packed.json()) == packed
    assert form_of(Pack(3, 1024)).encoding == "pack/1:3:1024"
    # A raw form is written as releases without encodings write it.
    assert "encoding" not in json.loads(raw.json())
    image = packed.view(torch.zeros(3, packed.image_bytes, dtype=torch.uint8, device="cpu"))
    assert BlockForm.of(image, "org/model") == packed


@pytest.mark.parametrize(
    "encoding", ["zip", "pack/2:4", "pack/1:7", "pack/1:4:100", "pack/1:4:32", "pack/1:4:"]
)
def test_other_encodings_are_refused(encoding: str) -> None:
    fields = json.loads(form_of().json())
    fields["encoding"] = encoding
    with pytest.raises(StoreError, match="block form of format 1"):
        BlockForm.from_json(json.dumps(fields))
    with pytest.raises(InvalidTerms):
        form_of("zip")


def test_a_cache_of_another_type_has_no_packed_form() -> None:
    half = KVView([layer.half() for layer in cache()], NHD)
    with pytest.raises(Unsupported, match="cache of float16"):
        BlockForm.of(half, "m", encoding="pack")
    with pytest.raises(Unsupported, match="planes of 64 values"):
        BlockForm.of(view_of(cache()), "m", encoding="pack", block_size=2)


@pytest.mark.parametrize("layout", [NHD, HND])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_host_tier_holds_packed_blocks(layout: str, by_layer: bool) -> None:
    layers = cache()
    with BlockStore(form_of(), staging=4 << 20, host=1 << 20) as store:
        assert store.rows.row_bytes == form_of().image_bytes
        assert save(store, layers) == ALL
        assert loaded(store, layers, layout, by_layer=by_layer) == (ALL, True)


def test_blocks_that_do_not_fit_are_missing_without_a_raw_form() -> None:
    layers = noisy(cache(), PLACES[2])
    with BlockStore(form_of(), staging=4 << 20, host=1 << 20) as store:
        handle = store.save(view_of(layers), PLACES, KEYS)
        with pytest.raises(TransferError, match="1 not packed"):
            handle.synchronize(LIMIT)
        assert handle.landed.tolist() == LOST
        assert loaded(store, layers) == (LOST, True)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("widths", [(DIM, DIM), (DIM, DIM // 2)], ids=["equal", "unequal"])
def test_flagged_slots_of_a_packed_view_are_missing(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int], guarded: bool
) -> None:
    """Nobody can read them. Without the look at their flags a save would store them."""
    layers = noisy(cache(), PLACES[2])
    rows = [
        [layer[kv, ..., :width].contiguous() for kv, width in enumerate(widths)] for layer in layers
    ]
    raw = KVView(rows, "layer kv | block token head dim", dim=widths)
    form = BlockForm.of(raw, "org/model", encoding="pack")
    images = torch.zeros(BLOCKS, form.image_bytes, dtype=torch.uint8, device="cpu")
    image = form.view(images)
    with pytest.raises(PackOverflow):
        copy_blocks(raw, image, PLACES, range(1, 6)).synchronize()
    if not guarded:
        monkeypatch.setattr(calls, "flagged", lambda part, items: np.zeros(len(items), np.bool_))
    with BlockStore(form, staging=4 << 20, host=1 << 20) as store:
        handle = store.save(image, range(1, 6), KEYS)
        with pytest.raises(TransferError, match="1 not packed") if guarded else nullcontext():
            handle.synchronize(LIMIT)
        assert handle.landed.tolist() == (LOST if guarded else ALL)
        assert store.has_each(KEYS) == (LOST if guarded else ALL)


@pytest.mark.parametrize("host", [0, 4 << 20])
def test_blocks_that_do_not_fit_are_kept_raw(tmp_path: Path, host: int) -> None:
    layers = noisy(cache(), PLACES[2])
    forms = {"pack": form_of(), "raw": form_of(None)}
    with BlockStore(forms, staging=4 << 20, host=host, tiers=[disk(tmp_path)]) as store:
        packed = store.of("pack")
        assert save(packed, layers) == ALL
        assert loaded(packed, layers) == (ALL, True)
        assert loaded(store.of("raw"), layers, HND) == (ALL, True)
        used = {tier["form"]: tier for tier in store.statistics()["tiers"]}
        counts = {
            name: next(x["used"] for x in tier.values() if isinstance(x, dict))
            for name, tier in used.items()
        }
        assert counts == {"pack": 4, "raw": 1}
        # Nothing is brought twice.
        assert save(packed, layers) == ALL
        assert packed.has_each(KEYS) == ALL
    for form in forms.values():
        with BlockStore(form, staging=4 << 20, tiers=[disk(tmp_path)]) as reader:
            assert reader.lookup(KEYS) == 5
            assert loaded(reader, layers) == (ALL, True)


def test_only_raw_blocks_without_a_disk() -> None:
    layers = noisy(cache(), PLACES[2])
    forms = {"pack": form_of(), "raw": form_of(None)}
    with BlockStore(forms, staging=4 << 20, host=4 << 20) as store:
        assert save(store.of("pack"), layers) == ALL
        assert loaded(store.of("pack"), layers) == (ALL, True)


def test_blocks_of_a_former_store_are_read(tmp_path: Path) -> None:
    """A folder of raw blocks serves a store of packed ones, which adds its own."""
    layers = cache()
    with BlockStore(form_of(None), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        handle = store.save(view_of(layers), PLACES[:2], KEYS[:2])
        handle.synchronize(LIMIT)
    with BlockStore(form_of(), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        assert loaded(store, layers) == ([True, True, False, False, False], True)
        assert save(store, layers) == ALL
        assert loaded(store, layers) == (ALL, True)


def test_ranks_read_their_heads_and_layers(tmp_path: Path) -> None:
    layers = cache()
    with BlockStore(form_of(), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        assert save(store, layers) == ALL
    part = view_of(layers[1:], NHD, slice(2, 4))
    form = BlockForm.of(part, "org/model", layers=(1, 2, 2), heads=(2, 4, 4), encoding="pack")
    empty = [torch.zeros_like(part.tensors[0]).contiguous()]
    with BlockStore(form, staging=4 << 20, tiers=[disk(tmp_path)]) as reader:
        reader.load(KVView(empty, NHD), range(5), KEYS).synchronize(LIMIT)
    assert torch.equal(
        empty[0][:, :5].view(torch.int16), part.tensors[0][:, PLACES].view(torch.int16)
    )


#: Places of one bit in the slot of the first plane of a payload.
_PLANE = Pack().plane(SIZE * DIM)
BITS = {
    "a byte of a value": 5,
    "the codes": _PLANE.codes_at + 7,
    "the table": _PLANE.head_at + 2,
    "the flag": _PLANE.head_at + 15,
    "the escapes": _PLANE.escapes_at,
}


@pytest.mark.parametrize("believed", [False, True], ids=["verified", "believed"])
@pytest.mark.parametrize("name", BITS)
def test_a_flipped_bit_is_a_miss(tmp_path: Path, name: str, believed: bool) -> None:
    layers = cache()
    for layer in layers:
        for token in range(SIZE):  # each plane has more exponents than codes
            layer[:, :, token, :, 0] = 2.0 ** (60 + token)
    with BlockStore(form_of(), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        assert save(store, layers) == ALL
    size = form_of().image_bytes
    for path in slot_files(tmp_path):
        with path.open("r+b") as file:
            for slot in range(path.stat().st_size // size):
                file.seek(slot * size + 4096 + BITS[name])
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
    verified = damaged_images_believed() if believed else nullcontext()
    with verified, BlockStore(form_of(), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        landed, right = loaded(store, layers)
    if believed:
        assert not right
    else:
        assert (landed, right) == ([False] * 5, True)


def test_a_save_in_progress_serves_no_load() -> None:
    """The rows of a save may become raw ones, so that a load at that time finds nothing."""
    layers = noisy(cache(), PLACES[2])
    tier = FakeTier()
    tier.hold = threading.Event()
    forms = {"pack": form_of(), "raw": form_of(None)}
    with BlockStore(forms, staging=4 << 20, tiers=[tier]) as store:
        packed = store.of("pack")
        saved = packed.save(view_of(layers), PLACES, KEYS, full="wait")
        assert tier.began.wait(LIMIT)
        assert loaded(packed, layers) == ([False] * 5, True)
        tier.hold.set()
        saved.synchronize(LIMIT)
        assert loaded(packed, layers) == (ALL, True)


def test_packed_rows_are_not_lent() -> None:
    with BlockStore(form_of(), staging=4 << 20, host=1 << 20) as store:

        class Copier:
            def begin(self, copy: Any) -> None:
                raise AssertionError

        for call in (store.save_lent, store.load_lent):
            with pytest.raises(Unsupported, match="packed blocks"):
                call(Copier(), KEYS)
        with pytest.raises(Unsupported, match="packed blocks"):
            store.borrow(KEYS)


class Packer:
    """A copier that packs and unpacks, and copies raw what does not fit."""

    def __init__(self, store: Any, layers: list[torch.Tensor], blocks: list[int]) -> None:
        self._rows = store.rows.tensor
        self._view = view_of(layers)
        self._blocks = blocks
        self.copies = list[Any]()
        self.begin = self.copies.append

    def make(self) -> None:
        """Make and end the copies that began, outside of the store's lock."""
        while self.copies:
            copy = self.copies.pop()
            own = [self._blocks[i] for i in copy.blocks]
            inner = copy.form.view(self._rows)
            raw = [False] * len(own)
            if copy.kind == "load":
                copy_blocks(inner, self._view, copy.rows, own).synchronize(LIMIT)
                copy.end()
                continue
            try:
                copy_blocks(self._view, inner, own, copy.rows).synchronize(LIMIT)
            except PackOverflow as error:
                raw = [row in error.dst_blocks for row in copy.rows]
                rows = [row for row, rough in zip(copy.rows, raw, strict=True) if rough]
                some = [block for block, rough in zip(own, raw, strict=True) if rough]
                with pytest.raises(InvalidTerms, match=r"Expected raw to be [0-9] bools"):
                    copy.end(raw=[True] * 9)
                if copy.raw is None:
                    with pytest.raises(InvalidTerms, match="no raw block in a copy"):
                        copy.end(raw=raw)
                    copy.end([not rough for rough in raw])
                    continue
                inner = copy.raw.view(self._rows)
                copy_blocks(self._view, inner, some, rows).synchronize(LIMIT)
            copy.end(raw=raw)


@pytest.mark.parametrize("spare", [True, False])
def test_packed_rows_are_lent_to_a_copier_that_packs(tmp_path: Path, spare: bool) -> None:
    layers = noisy(cache(), PLACES[2])
    forms = {"pack": form_of(), "other": form_of(None, notes="" if spare else "other")}
    with BlockStore(forms, staging=4 << 20, host=4 << 20, tiers=[disk(tmp_path)]) as store:
        packed = store.of("pack")
        packer = Packer(store, layers, PLACES)
        saved = packed.save_lent(packer, KEYS, packs=True)
        packer.make()
        with nullcontext() if spare else pytest.raises(TransferError, match=r"1 failed .lent:pack"):
            saved.synchronize(LIMIT)
        assert saved.landed.tolist() == (ALL if spare else LOST)
        for reader in [packed, store.of("other")][: 1 + spare]:
            target = [torch.zeros_like(layer) for layer in layers]
            unpacker = Packer(store, target, [0, 1, 2, 3, 4])
            handle = reader.load_lent(unpacker, KEYS, packs=True)
            unpacker.make()
            handle.synchronize(LIMIT)
            for own, layer in zip(target, layers, strict=True):
                for at in np.flatnonzero(saved.landed).tolist():
                    assert torch.equal(
                        own[:, at].view(torch.int16), layer[:, PLACES[at]].view(torch.int16)
                    )
        borrowed = packed.borrow(KEYS[:2], packs=True)
        assert borrowed is not None
        assert borrowed.form == form_of()
        borrowed.end()
        assert loaded(packed, layers) == (ALL if spare else LOST, True)


def test_raw_blocks_are_lent_although_others_are_packed(tmp_path: Path) -> None:
    """A copier would copy packed rows as they are, so such blocks count as missing."""
    layers = cache()
    with BlockStore(form_of(), staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        assert save(store, layers) == ALL
    copies = list[Any]()

    class Copier:
        def begin(self, copy: Any) -> None:
            copies.append(copy)

    with BlockStore(form_of(None), staging=4 << 20, host=1 << 20, tiers=[disk(tmp_path)]) as store:
        assert store.has_each(KEYS) == ALL
        handle = store.load_lent(Copier(), KEYS, missing="skip")
        handle.synchronize(LIMIT)
        assert not handle.landed.any()
        assert not copies
        assert store.borrow(KEYS) is None


def test_blocks_that_were_kept_raw_are_pinned_and_deleted(tmp_path: Path) -> None:
    layers = noisy(cache(), PLACES[2])
    forms = {"pack": form_of(), "raw": form_of(None)}
    with BlockStore(forms, staging=4 << 20, tiers=[disk(tmp_path)]) as store:
        packed = store.of("pack")
        assert save(packed, layers) == ALL
        pins = packed.pin(KEYS)
        assert pins.held.tolist() == ALL
        pins.release()
        assert packed.delete(KEYS).tolist() == ALL
        assert not any(packed.has_each(KEYS))


def test_blocks_of_a_device(accelerator: torch.device) -> None:
    layers = noisy(cache(), PLACES[2])
    there = KVView([layer.to(accelerator) for layer in layers], NHD)
    forms = {"pack": form_of(), "raw": form_of(None)}
    with BlockStore(forms, staging=4 << 20, host=4 << 20) as store:
        packed = store.of("pack")
        # Rows of the blocks below are not those of their places in the call.
        packed.save(there, PLACES[:2], [key_of(n) for n in (7, 8)]).synchronize(LIMIT)
        saved = packed.save(there, PLACES, KEYS, full="wait")
        saved.synchronize(LIMIT)
        empty = KVView([torch.zeros_like(layer) for layer in there.tensors], NHD)
        packed.load(empty, range(5), KEYS).synchronize(LIMIT)
    for own, layer in zip(empty.tensors, layers, strict=True):
        assert torch.equal(own.cpu()[:, :5].view(torch.int16), layer[:, PLACES].view(torch.int16))


@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_few_copies_pack_the_blocks_of_a_save_that_no_tier_writes(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_disk: bool
) -> None:
    there = KVView([layer.to(accelerator) for layer in cache()], NHD)
    monkeypatch.setattr(form_store, "SAVED", 1)  # a block in each task
    counts = list[int]()
    copy = memory.Crossing.copy

    def counted(self: Any, inner: Any, outer: Any, items: Any, at: Any) -> None:
        counts.append(len(items))
        copy(self, inner, outer, items, at)

    monkeypatch.setattr(memory.Crossing, "copy", counted)
    tiers = [Disk(tmp_path, capacity=16 << 20)] if on_disk else []
    with BlockStore(form_of(), staging=4 << 20, host=4 << 20, tiers=tiers) as store:
        store.save(there, PLACES, KEYS, full="wait").synchronize(LIMIT)
        assert all(store.has_each(KEYS))
    assert sorted(counts) == ([1, 1, 1, 1, 1] if on_disk else [5])
