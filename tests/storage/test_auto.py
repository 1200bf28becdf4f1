# SPDX-License-Identifier: Apache-2.0
"""`encoding="auto"`: a store packs the blocks of a save where that pays, and finds blocks of both
forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.storage_cases import key_of, rows_in_use
from support.waits import LIMIT, until

from portakv import (
    EncodingChoice,
    InvalidTerms,
    KVView,
    Pack,
    PackOverflow,
    TransferError,
    Unsupported,
    copy_blocks,
)
from portakv.backends.reference_pack import pack_planes
from portakv.copy.choose_encoding import Rates, Sample
from portakv.storage import AutoEncoding, BlockForm, BlockStore, Disk, calls
from portakv.storage.calls import EncodedFigures

NHD = "layer | kv block token head dim"
LAYERS = 2
BLOCKS = 8
SIZE = 16
HEADS = 2
DIM = 32
SHAPE = (2, BLOCKS, SIZE, HEADS, DIM)
KEYS = [key_of(n) for n in range(BLOCKS)]
SLOW = AutoEncoding(link_gbps=1.0, packing_gbps=50.0)
FAST = AutoEncoding(link_gbps=50.0, packing_gbps=50.0)
PLANE = Pack().plane(SIZE * DIM)


def normal(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    made = [
        torch.randn(SHAPE, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(LAYERS)
    ]
    return [layer.to(torch.bfloat16) for layer in made]


def random_bits(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    limits = -(1 << 15), 1 << 15
    made = [
        torch.randint(*limits, SHAPE, generator=generator, dtype=torch.int16, device="cpu")
        for _ in range(LAYERS)
    ]
    return [layer.view(torch.bfloat16) for layer in made]


def view_of(layers: list[torch.Tensor]) -> KVView:
    return KVView(layers, NHD)


def form_of(layers: list[torch.Tensor], **more: Any) -> BlockForm:
    return BlockForm.of(view_of(layers), "org/model", **more)


def store_of(form: BlockForm | Mapping[str, BlockForm] | None = None, **terms: Any) -> BlockStore:
    form = form_of(normal()) if form is None else form
    return BlockStore(form, **{"staging": 4 << 20, "host": 4 << 20, "encoding": "auto", **terms})


def disk(folder: Path) -> Disk:
    return Disk(folder, capacity=16 << 20)


def save(store: BlockStore, layers: list[torch.Tensor], blocks: range = range(BLOCKS)) -> str:
    """Save blocks under the keys of their numbers; return the form that was chosen."""
    keys = [KEYS[block] for block in blocks]
    handle = store.save(view_of(layers), blocks, keys, full="wait")
    handle.synchronize(LIMIT)
    assert handle.landed.all()
    return handle.form


def right(store: Any, layers: list[torch.Tensor], blocks: range = range(BLOCKS)) -> bool:
    """Load blocks; return True if all landed with the right bytes."""
    empty = [torch.zeros_like(layer) for layer in layers]
    handle = store.load(view_of(empty), blocks, [KEYS[block] for block in blocks])
    handle.synchronize(LIMIT)
    pairs = zip(empty, layers, strict=True)
    at = list(blocks)
    return all(
        torch.equal(a[:, at].view(torch.int16), b[:, at].view(torch.int16)) for a, b in pairs
    )


def counted(store: BlockStore) -> dict[str, int]:
    samples = store.statistics()["encoding_blocks_total"]
    return {sample["result"]: sample["value"] for sample in samples}


def figure(store: BlockStore, name: str) -> float:
    (sample,) = store.statistics()[f"encoding_{name}"]
    value: float = sample["value"]
    return value


def known_of(store: BlockStore) -> calls.Known:
    """Return the choice for the CPU, after a save."""
    assert store.chooser is not None
    return store.chooser.known[torch.device("cpu")]


def notes(store: BlockStore, folder: Path) -> list[dict[str, Any]]:
    """Return the choices that the trace of a store has."""
    store.trace(folder / "trace.json")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [event["args"] for event in events if event["name"] == "encoding"]


def test_rows_of_a_cpu_stay_raw(tmp_path: Path) -> None:
    layers = normal()
    with store_of(tiers=[disk(tmp_path / "disk")]) as store:
        assert "No save has chosen" in store.explain()
        assert save(store, layers) == "raw"
        assert right(store, layers)
        assert counted(store) == {"packed": 0, "raw": BLOCKS, "overflow": 0}
        assert figure(store, "ratio") == 1.0
        assert "Saves from cpu are raw. The rows are on the CPU" in store.explain()
        (choice,) = notes(store, tmp_path)
        assert choice["encoding"] == "raw"
        assert "CPU" in choice["why"]


def test_a_slow_link_packs_and_the_figures_say_how_well(tmp_path: Path) -> None:
    layers = normal()
    form = form_of(layers)
    tiers = [disk(tmp_path / "disk")]
    with store_of(encoding=SLOW, tiers=tiers) as store:
        assert [*store.forms] == ["packed", "raw"]
        assert save(store, layers) == "packed"
        assert right(store, layers)
        assert right(store.of("raw"), layers)
        assert counted(store) == {"packed": BLOCKS, "raw": 0, "overflow": 0}
        payload = BLOCKS * form.payload_bytes
        wire = BLOCKS * form.packed(Pack()).payload_bytes
        assert figure(store, "payload_bytes_total") == payload
        assert figure(store, "wire_bytes_total") == wire
        assert figure(store, "ratio") == payload / wire
        assert "Saves from cpu are packed. Packing pays: " in store.explain()
        (choice,) = notes(store, tmp_path)
        assert choice["encoding"] == "pack/1:4"
        assert choice["link_gbps"] == 1.0
        assert choice["ratio"] == PLANE.ratio
    # A store of the raw form reads them, and finds what the tier holds.
    with BlockStore(form, staging=4 << 20, tiers=[disk(tmp_path / "disk")]) as reader:
        assert reader.lookup(KEYS) == BLOCKS
        assert right(reader, layers)


def test_a_fast_link_stays_raw() -> None:
    layers = normal()
    with store_of(encoding=FAST) as store:
        assert save(store, layers) == "raw"
        assert "Packing does not pay" in store.explain()
        assert right(store, layers)


def test_random_bits_stay_raw() -> None:
    layers = random_bits()
    with store_of(encoding=SLOW) as store:
        assert save(store, layers) == "raw"
        assert counted(store) == {"packed": 0, "raw": BLOCKS, "overflow": 0}
        assert "0% of the blocks fit" in store.explain()
        assert right(store, layers)


def test_rows_of_another_type_have_the_raw_form_alone() -> None:
    layers = [layer.half() for layer in normal()]
    with store_of(form_of(layers), encoding=SLOW) as store:
        assert [*store.forms] == ["raw"]
        assert save(store, layers) == "raw"
        assert "float16" in store.explain()
        assert counted(store) == {"packed": 0, "raw": BLOCKS, "overflow": 0}
        assert right(store, layers)


def test_escapes_and_blocks_that_do_not_fit_are_counted() -> None:
    layers = normal()
    for layer in layers:  # an escape or two in each plane
        for token in range(SIZE):
            layer[:, :, token, :, 0] = 2.0 ** (60 + token)
    layers[1][1, 3] = random_bits()[1][1, 3]
    with store_of(encoding=AutoEncoding(Pack(), 1.0, 50.0), host=8 << 20) as store:
        assert save(store, layers) == "packed"
        assert counted(store) == {"packed": BLOCKS - 1, "raw": 0, "overflow": 1}
        assert right(store, layers)
        raw = form_of(layers).payload_bytes
        packed = form_of(layers).packed(Pack()).payload_bytes
        assert figure(store, "payload_bytes_total") == BLOCKS * raw
        assert figure(store, "wire_bytes_total") == BLOCKS * packed + raw
        # Each task counts one of its packed blocks, and all blocks but one have as many.
        rows = torch.stack([layer[:, 0] for layer in layers]).transpose(2, 3).contiguous()
        planes = rows.view(torch.int16).view(-1, PLANE.values)
        escapes = pack_planes(planes, PLANE).escapes
        assert abs(figure(store, "escapes") - float(escapes.double().mean()) / PLANE.values) < 0.02
        assert figure(store, "escapes") > 0


class Samples:
    """Counts the samples of choosers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        made = Sample

        def sample(*terms: Any) -> Any:
            self.taken += 1
            return made(*terms)

        monkeypatch.setattr(calls, "Sample", sample)


def test_a_choice_is_remembered_and_made_again_after_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = Samples(monkeypatch)
    with store_of(encoding=SLOW) as store:
        for block in range(4):
            assert save(store, normal(), range(block, block + 1)) == "packed"
        assert samples.taken == 1
        # Control: with a lower limit the next saves take samples, of which the second one counts.
        monkeypatch.setattr(calls, "SAMPLE_AGAIN", 0)
        known_of(store).left = 0
        noise = random_bits()
        assert save(store, noise, range(4, 5)) == "packed"
        assert samples.taken == 2
        assert save(store, noise, range(5, 6)) == "raw"
        assert right(store, noise, range(4, 6))
        assert right(store, normal(), range(4))


def test_many_blocks_that_do_not_fit_are_a_reason_to_look_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = Samples(monkeypatch)
    monkeypatch.setattr("portakv.copy.choose_encoding.LOOK_AT", 2)
    noise = random_bits()
    with store_of(encoding=SLOW) as store:
        assert save(store, normal(), range(2)) == "packed"
        assert save(store, normal(), range(2, 3)) == "packed"
        assert samples.taken == 1
        assert save(store, noise, range(3, 5)) == "packed"
        assert counted(store)["overflow"] == 2
        assert save(store, noise, range(5, 6)) == "packed"  # which takes a sample
        assert samples.taken == 2
        assert save(store, noise, range(6, 7)) == "raw"
        assert right(store, noise, range(3, 7))


def switched(store: BlockStore, packs: bool) -> None:
    """Have a store choose the other form from now on."""
    pack = Pack() if packs else None
    known_of(store).choice = EncodingChoice(pack, "")


def pinned(store: BlockStore) -> bool:
    """Return True if all blocks can be pinned; they are not when it returns."""
    pins = store.pin(KEYS)
    pins.release()
    return bool(pins.held.all())


@pytest.mark.parametrize("host", [0, 4 << 20])
def test_blocks_of_both_forms_have_one_list_of_keys(tmp_path: Path, host: int) -> None:
    layers = normal()
    with store_of(encoding=SLOW, host=host, tiers=[disk(tmp_path)]) as store:
        assert save(store, layers, range(4)) == "packed"
        switched(store, False)
        # Blocks that are stored packed are not brought again.
        assert save(store, layers, range(6)) == "raw"
        switched(store, True)
        assert save(store, layers) == "packed"
        used = {
            tier["form"]: next(x["used"] for x in tier.values() if isinstance(x, dict))
            for tier in store.statistics()["tiers"]
        }
        assert used == {"packed": 6, "raw": 2}
        for packs in (False, True):
            switched(store, packs)
            assert save(store, layers) == ("packed" if packs else "raw")
            assert store.leading(KEYS) == store.lookup(KEYS) == BLOCKS
            assert store.has_each(KEYS) == [True] * BLOCKS
            assert right(store, layers)
            assert pinned(store)
            listed = store.keys().keys
            assert {*listed["disk"]} == {*KEYS}
        # Rows that a load has read stay until its lease ends.
        assert until(lambda: rows_in_use(store.rows) == 0, LIMIT)
        assert store.delete(KEYS).all()
        assert not any(store.has_each(KEYS))


@pytest.mark.parametrize("first", [True, False], ids=["raw after packed", "packed after raw"])
def test_a_block_follows_a_block_of_the_other_form(first: bool) -> None:
    """In a full tier a block evicts others only if the tier has the block that it follows."""
    layers = normal()
    size = form_of(layers).image_bytes
    with store_of(encoding=SLOW, staging=2 * size, host=4 * size) as store:
        save(store, layers, range(1))
        switched(store, first)
        for block in range(1, 4):  # prompts of one block
            save(store, layers, range(block, block + 1))
        switched(store, not first)
        view = view_of(layers)
        for after, landed in ((key_of(99), False), (KEYS[3], True)):  # a control first
            handle = store.save(view, [4], [KEYS[4]], after=after, full="wait")
            with nullcontext() if landed else pytest.raises(TransferError):
                handle.synchronize(LIMIT)
            assert handle.landed.tolist() == [landed]
        assert right(store, layers, range(3, 5))


def test_the_blocks_are_not_lent() -> None:
    class Copier:
        def begin(self, copy: Any) -> None:
            raise AssertionError

    with store_of() as store:
        for call in (store.save_lent, store.load_lent):
            with pytest.raises(Unsupported, match="packed blocks"):
                call(Copier(), KEYS)
        with pytest.raises(Unsupported, match="packed blocks"):
            store.borrow(KEYS)


def test_a_packed_form_says_how_blocks_are_packed() -> None:
    layers = normal()
    form = form_of(layers, encoding=Pack(3, 1024))
    with store_of(form, encoding=SLOW) as store:
        assert store.forms == {"packed": form, "raw": form.raw}
        assert save(store, layers) == "raw"  # 1,024 bytes are no fewer
    usual = AutoEncoding(pack=Pack(), link_gbps=1.0, packing_gbps=50.0)
    with store_of(form, encoding=usual) as store:
        assert store.forms["packed"].encoding == Pack().text
        assert save(store, layers) == "packed"


def test_blocks_of_another_size_and_packed_views_follow_the_view() -> None:
    layers = normal()
    with store_of(form_of(layers, block_size=32), encoding=SLOW) as store:
        handle = store.save(view_of(layers), range(BLOCKS), KEYS[: BLOCKS // 2], full="wait")
        handle.synchronize(LIMIT)
        assert handle.form == "raw"


def test_views_of_other_block_sizes_load_raw_blocks_whatever_was_chosen_last() -> None:
    """A packed block moves only whole: other views miss it, and store it raw as well."""
    layers = normal()
    halves = [layer.reshape(2, 2 * BLOCKS, SIZE // 2, HEADS, DIM) for layer in layers]

    def load_halves(store: BlockStore) -> list[bool]:
        """Load all keys into blocks of half the size; return which landed, with the right bytes."""
        empty = [torch.zeros_like(half) for half in halves]
        handle = store.load(view_of(empty), range(2 * BLOCKS), KEYS, missing="skip")
        handle.synchronize(LIMIT)
        at = [2 * block + part for block in handle.landed.nonzero()[0] for part in (0, 1)]
        pairs = zip(empty, halves, strict=True)
        assert all(
            torch.equal(a[:, at].view(torch.int16), b[:, at].view(torch.int16)) for a, b in pairs
        )
        return [bool(there) for there in handle.landed]

    def save_halves(store: BlockStore, many: int) -> str:
        """Save the first keys from blocks of half the size; return the chosen form."""
        blocks = range(2 * many)
        handle = store.save(view_of(halves), blocks, KEYS[:many], full="wait")
        handle.synchronize(LIMIT)
        return handle.form

    with store_of(encoding=SLOW, host=8 << 20) as store:
        assert save_halves(store, 2) == "raw"
        assert load_halves(store) == [True] * 2 + [False] * (BLOCKS - 2)
        assert save(store, layers) == "packed"
        assert load_halves(store) == [True] * 2 + [False] * (BLOCKS - 2)
        assert right(store, layers)
        assert save_halves(store, BLOCKS) == "raw"
        assert load_halves(store) == [True] * BLOCKS
        assert counted(store) == {"packed": BLOCKS - 2, "raw": BLOCKS, "overflow": 0}


def test_blocks_that_do_not_land_are_no_payload() -> None:
    """A store of the packed form alone has no place for a block that does not fit: its slots have
    crossed, and its raw rows have not."""
    layers = normal()
    layers[1][1, 3] = random_bits()[1][1, 3]
    form = form_of(layers, encoding="pack")
    with store_of(form, encoding=None) as store:
        handle = store.save(view_of(layers), range(BLOCKS), KEYS[:BLOCKS], full="wait")
        with pytest.raises(TransferError, match="not packed"):
            handle.synchronize(LIMIT)
        assert sum(handle.landed) == BLOCKS - 1
        assert counted(store) == {"packed": BLOCKS - 1, "raw": 0, "overflow": 0}
        assert figure(store, "payload_bytes_total") == (BLOCKS - 1) * form.raw.payload_bytes
        assert figure(store, "wire_bytes_total") == BLOCKS * form.payload_bytes


def test_slots_with_a_flag_are_no_payload() -> None:
    """Slots of a packed view are copied as they are: nothing follows raw."""
    layers = normal()
    layers[1][1, 3] = random_bits()[1][1, 3]
    form = form_of(layers, encoding="pack")
    slots = torch.zeros(BLOCKS, LAYERS, 2, HEADS, PLANE.slot_bytes, dtype=torch.uint8)
    packed = KVView(slots, "block layer kv head page", block_size=SIZE, dim=DIM, encoding="pack")
    with pytest.raises(PackOverflow):
        copy_blocks(view_of(layers), packed, range(BLOCKS), range(BLOCKS)).synchronize()
    with store_of({"packed": form, "raw": form.raw}, encoding=None) as store:
        handle = store.of("packed").save(packed, range(BLOCKS), KEYS[:BLOCKS], full="wait")
        with pytest.raises(TransferError, match="not packed"):
            handle.synchronize(LIMIT)
        figures = {each["form"]: each["value"] for each in bytes_of(store, "payload")}
        assert figures["packed"] == (BLOCKS - 1) * form.raw.payload_bytes
        figures = {each["form"]: each["value"] for each in bytes_of(store, "wire")}
        assert figures["packed"] == BLOCKS * form.payload_bytes


def bytes_of(store: BlockStore, which: str) -> Any:
    """Return the samples of a figure, one for each form."""
    return store.statistics()[f"encoding_{which}_bytes_total"]


def test_misfits_of_one_device_say_nothing_of_another() -> None:
    figures = EncodedFigures(nullcontext())
    here = torch.device("cpu")
    other = torch.device("cuda", 1)
    figures.add_packed(here, form_of(normal(), encoding="pack"), 0, 64, 64)
    figures.forget_misfits(other)
    assert figures.sample_is_out_of_date(here)
    assert not figures.sample_is_out_of_date(other)
    figures.forget_misfits(here)
    assert not figures.sample_is_out_of_date(here)


def test_rates_that_could_not_be_measured_are_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Rates | Exception] = [RuntimeError("no memory"), Rates(1.0, 20.0)]

    def rates_of(*_: Any) -> Rates:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("portakv.copy.choose_encoding.rates_of", rates_of)
    monkeypatch.setattr(calls, "stays_raw", lambda *_: "")  # as on a device that packs
    layers = normal()
    with store_of(encoding=AutoEncoding(link_gbps=1.0)) as store:
        assert save(store, layers, range(1)) == "raw"
        assert "could not be measured: no memory" in store.explain()
        assert save(store, layers, range(1, 2)) == "raw"
        assert len(answers) == 1
        known_of(store).left = 0
        assert save(store, layers, range(2, 3)) == "packed"
        assert save(store, layers, range(3, 4)) == "packed"
        assert right(store, layers, range(4))


def test_wrong_encodings_are_refused() -> None:
    form = form_of(normal())
    for wrong in ("pack", "zip", Pack(), True, ""):
        with pytest.raises(InvalidTerms, match=r"encoding.*'auto'"):
            store_of(form, encoding=wrong)
    with pytest.raises(InvalidTerms, match=r"Expected form .* got one in 'fp8/1'"):
        store_of(form_of(normal(), encoding="fp8"))
    with pytest.raises(InvalidTerms, match="one form"):
        BlockStore({"a": form}, staging=4 << 20, host=4 << 20, encoding="auto")
    for terms in ({"pack": "pack"}, {"link_gbps": 0.0}, {"packing_gbps": "fast"}):
        with pytest.raises(InvalidTerms, match=next(iter(terms))):
            AutoEncoding(**terms)


def test_a_device_without_memory_for_a_sample_keeps_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Sample

    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("full")

    layers = normal()
    monkeypatch.setattr(calls, "SAMPLE_AGAIN", 0)
    monkeypatch.setattr(calls, "Sample", full)
    with store_of(encoding=SLOW) as store:
        assert save(store, layers, range(1)) == "raw"
        assert "no memory" in store.explain()
        assert save(store, layers, range(1, 2)) == "raw"
        monkeypatch.setattr(calls, "Sample", made)  # there is memory again
        assert save(store, layers, range(2, 3)) == "raw"
        assert save(store, layers, range(3, 4)) == "packed"
        assert right(store, layers, range(4))


def test_a_sample_that_fails_fails_no_save(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Sample

    def failing(*_: object) -> Any:
        raise RuntimeError("no memory could be pinned")

    layers = normal()
    monkeypatch.setattr(calls, "SAMPLE_AGAIN", 0)
    monkeypatch.setattr(calls, "Sample", failing)
    with store_of(encoding=SLOW) as store:
        assert save(store, layers, range(1)) == "raw"
        assert "No sample was taken: no memory could be pinned" in store.explain()
        monkeypatch.setattr(calls, "Sample", made)
        assert save(store, layers, range(1, 2)) == "raw"
        assert save(store, layers, range(2, 3)) == "packed"
        monkeypatch.setattr(calls, "Sample", failing)
        assert save(store, layers, range(3, 4)) == "packed"
        assert "The next sample was not taken: no memory could be pinned" in store.explain()
        monkeypatch.setattr(calls, "Sample", made)
        assert save(store, layers, range(4, 5)) == "packed"
        assert save(store, layers, range(5, 6)) == "packed"
        assert "not taken" not in store.explain()


def test_a_link_of_a_cpu_is_that_of_the_tiers(tmp_path: Path) -> None:
    layers = normal()
    packing = AutoEncoding(packing_gbps=50.0)
    with store_of(encoding=packing) as store:
        assert save(store, layers) == "raw"
        assert "declare link_gbps" in store.explain()
    with store_of(encoding=packing, tiers=[disk(tmp_path / "disk")]) as store:
        assert save(store, layers) == "packed"
        assert known_of(store).choice.link_gbps == calls.TIER_GBPS


@pytest.mark.parametrize("encoding", ["auto", SLOW, FAST], ids=["measured", "slow", "fast"])
def test_blocks_of_a_device(accelerator: torch.device, encoding: Any) -> None:
    layers = normal()
    there = view_of([layer.to(accelerator) for layer in layers])
    with store_of(encoding=encoding) as store:
        saved = store.save(there, range(BLOCKS), KEYS, full="wait")
        saved.synchronize(LIMIT)
        if encoding != "auto":
            assert saved.form == ("packed" if encoding is SLOW else "raw")
        elif accelerator.type != "cuda":  # where `reference` packs
            assert saved.form == "raw"
        assert f"Saves from {accelerator} are" in store.explain()
        empty = view_of([torch.zeros_like(layer) for layer in there.tensors])
        store.load(empty, range(BLOCKS), KEYS).synchronize(LIMIT)
    for own, layer in zip(empty.tensors, layers, strict=True):
        assert torch.equal(own.cpu().view(torch.int16), layer.view(torch.int16))
