# SPDX-License-Identifier: Apache-2.0
"""The choice between packed and raw rows: by the rates of a link, and by a sample of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from portakv import (
    Index,
    InvalidTerms,
    KVView,
    Pack,
    PackOverflow,
    SlotError,
    TransferError,
    choose_encoding,
    copy_blocks,
)
from portakv.backends.reference_pack import escapes_of, pack_planes
from portakv.copy import choose_encoding as choosing
from portakv.copy.choose_encoding import Sample, rates_of
from portakv.interconnect import costs

NHD = "layer | kv block token head dim"
BLOCKS = 6
SIZE = 16
SHAPE = (2, BLOCKS, SIZE, 2, 32)
#: A link far slower than packing, and one as fast.
SLOW: dict[str, Any] = {"link_gbps": 1.0, "packing_gbps": 50.0}
FAST: dict[str, Any] = {"link_gbps": 400.0, "packing_gbps": 400.0}


def normal(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    made = [
        torch.randn(SHAPE, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)
    ]
    return [layer.to(torch.bfloat16) for layer in made]


def random_bits(layers: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(1)
    made = [
        torch.randint(
            -(1 << 15), 1 << 15, SHAPE, generator=generator, dtype=torch.int16, device="cpu"
        )
        for _ in range(layers)
    ]
    return [layer.view(torch.bfloat16) for layer in made]


def view_of(layers: list[torch.Tensor]) -> KVView:
    return KVView(layers, NHD)


def planes(values: int, count: int, seed: int) -> torch.Tensor:
    """Return planes of bf16 bits: normal values, few exponents, and every pattern."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (count, values)
    wide = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    bits = wide.to(torch.bfloat16).view(torch.int16)
    bits[1] = torch.arange(values, dtype=torch.int64, device="cpu").mul(12345).to(torch.int16)
    bits[2] = torch.arange(values, dtype=torch.int64, device="cpu").mul(128).to(torch.int16)
    bits[3] = 0
    return bits


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("values", [256, 2048, 8192, 9216])
def test_escapes_are_counted_as_the_format_does(values: int, bits: int) -> None:
    plane = Pack(bits).plane(values)
    some = planes(values, 6, values)
    counted = escapes_of(some, plane)
    assert torch.equal(counted, pack_planes(some, plane).escapes)
    assert len({*counted.tolist()}) > 2  # control: the planes differ


def test_a_large_plane_counts_one_value_in_eight_for_its_table() -> None:
    """Control: a table from all values would give other escapes."""
    large = Pack(4).plane(8192)
    some = planes(8192, 6, 3)
    halves = torch.cat([some[:, :4096], some[:, 4096:]])
    small = escapes_of(halves, Pack(4).plane(4096)).view(2, 6).sum(0)
    assert not torch.equal(escapes_of(some, large), small)


def test_a_slow_link_packs_and_a_fast_one_does_not() -> None:
    view = view_of(normal())
    slow = choose_encoding(view, range(BLOCKS), **SLOW)
    assert slow.pack is not None
    assert slow.why.startswith("Packing pays")
    assert slow.fits == 1.0
    assert slow.ratio is not None
    assert slow.ratio > 1.2
    fast = choose_encoding(view, range(BLOCKS), **FAST)
    assert fast.pack is None
    assert fast.why.startswith("Packing does not pay")
    assert fast.figures()["encoding"] == "raw"


@pytest.mark.parametrize("pack", [None, Pack(), Pack(3)])
def test_random_bits_stay_raw(pack: Pack | None) -> None:
    choice = choose_encoding(view_of(random_bits()), range(BLOCKS), pack=pack, **SLOW)
    assert choice.pack is None
    assert choice.ratio is not None
    assert choice.ratio < 1
    assert choice.escapes is not None
    assert choice.escapes > 0.5
    # Control: with other values these terms pack.
    assert choose_encoding(view_of(normal()), range(BLOCKS), pack=pack, **SLOW).pack is not None


def test_blocks_that_do_not_fit_lower_the_ratio() -> None:
    layers = normal()
    whole = choose_encoding(view_of(layers), range(BLOCKS), pack=Pack(), **SLOW)
    bits = random_bits()
    for block in range(3):
        layers[1][1, block, :, 1] = bits[1][1, block, :, 1]
    part = choose_encoding(view_of(layers), range(BLOCKS), pack=Pack(), **SLOW)
    assert whole.fits == 1.0
    assert part.fits == 0.5
    assert part.ratio is not None
    assert whole.ratio is not None
    assert part.ratio < 1 < whole.ratio
    assert part.pack is None
    assert "50% of the blocks" in part.why


@pytest.mark.parametrize(
    ("convert", "why"),
    [
        (lambda layer: layer.half(), "float16"),
        (lambda layer: layer.float(), "float32"),
        (lambda layer: layer.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=["fp16", "float32", "fp8"],
)
def test_other_rows_stay_raw_and_the_reason_names_them(
    convert: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    view = view_of([convert(layer) for layer in normal()])
    choice = choose_encoding(view, range(BLOCKS), **SLOW)
    assert choice.pack is None
    assert why in choice.why
    assert choice.link_gbps is None


def test_pages_planes_of_other_sizes_and_packed_blocks_are_left_alone() -> None:
    pages = torch.zeros(BLOCKS, 4096, dtype=torch.uint8, device="cpu")
    opaque = KVView(pages, "block page", block_size=SIZE)
    assert "opaque pages" in choose_encoding(opaque, [0], **SLOW).why
    short = KVView([layer[..., :4] for layer in normal()], NHD)
    assert "planes of 64 values" in choose_encoding(short, [0], **SLOW).why
    slot = Pack().plane(SIZE * 32).slot_bytes
    memory = torch.zeros(2, 1, 1, 1, slot, dtype=torch.uint8, device="cpu")
    layout = "block layer kv head page"
    packed = KVView(memory, layout, kv=1, block_size=SIZE, dim=32, encoding="pack")
    assert "packed already" in choose_encoding(packed, [0], **SLOW).why


def test_rows_of_a_cpu_stay_raw_unless_a_rate_is_declared() -> None:
    view = view_of(normal())
    for link in (None, 0.001):
        choice = choose_encoding(view, range(BLOCKS), link_gbps=link)
        assert choice.pack is None
        assert "CPU" in choice.why


def test_nothing_is_measured_on_a_cpu() -> None:
    choice = choose_encoding(view_of(normal()), range(BLOCKS), packing_gbps=50.0)
    assert choice.pack is None
    assert "declare link_gbps" in choice.why


def test_the_parameters_are_those_of_the_smallest_slot() -> None:
    layers = normal()
    for layer in layers:  # four exponents: codes of three bits are enough
        bits = layer.view(torch.int16)
        bits.copy_(bits & 0x7F | (0x7C + (bits & 3)) << 7)
    view = view_of(layers)
    few = choose_encoding(view, range(BLOCKS), **SLOW).pack
    assert few is not None
    plane = few.plane(SIZE * 32)
    assert plane.code_bits == 3
    assert plane.slot_bytes == 512 + 192 + 32 + 32
    # Control: these values have more escapes than such a slot holds.
    wider = view_of([(layer.float() ** 5).to(torch.bfloat16) for layer in normal()])
    wide = choose_encoding(wider, range(BLOCKS), **SLOW).pack
    assert wide is not None
    assert wide.plane(SIZE * 32).slot_bytes > plane.slot_bytes
    for pack, source, fits in ((few, view, True), (few, wider, False), (wide, wider, True)):
        plane = pack.plane(SIZE * 32)
        memory = torch.zeros(BLOCKS, 2, 2, 2, plane.slot_bytes, dtype=torch.uint8, device="cpu")
        layout = "block layer kv head page"
        image = KVView(memory, layout, block_size=SIZE, dim=32, encoding=pack)
        transfer = copy_blocks(source, image, range(BLOCKS), range(BLOCKS))
        if fits:
            transfer.synchronize()
        else:
            with pytest.raises(PackOverflow):
                transfer.synchronize()


def test_planes_of_two_widths_have_the_usual_slots() -> None:
    generator = torch.Generator(device="cpu").manual_seed(0)
    made = [
        torch.randn(BLOCKS, SIZE, 1, dim, generator=generator, dtype=torch.float32, device="cpu")
        for dim in (64, 32)
    ]
    parts = [each.to(torch.bfloat16) for each in made]
    view = KVView(parts, "kv | block token head dim", dim=(64, 32))
    choice = choose_encoding(view, range(BLOCKS), **SLOW)
    assert choice.pack is not None
    assert choice.pack.slot_bytes is None


@pytest.mark.parametrize("blocks", [None, Index(), Index.of([*range(BLOCKS)], SIZE)])
def test_all_blocks_are_judged(blocks: Any) -> None:
    view = view_of(normal())
    assert choose_encoding(view, blocks, **SLOW) == choose_encoding(view, range(BLOCKS), **SLOW)


def test_wrong_terms_are_named() -> None:
    view = view_of(normal())
    terms: Any
    for name, terms in (
        ("pack", {"pack": "pack"}),
        ("link_gbps", {"link_gbps": 0}),
        ("packing_gbps", {"packing_gbps": -1.0}),
    ):
        with pytest.raises(InvalidTerms, match=name):
            choose_encoding(view, [0], **terms)
    with pytest.raises(InvalidTerms, match="view"):
        choose_encoding(None, [0])  # type: ignore[arg-type]
    with pytest.raises(SlotError, match="blocks"):
        choose_encoding(view, [], **SLOW)
    for index in (Index.of([0], 2 * SIZE), Index.of([0, 1], 1), Index(offset=1)):
        with pytest.raises(SlotError, match=f"index of blocks of {SIZE} tokens"):
            choose_encoding(view, index, **SLOW)
    many = [*range(BLOCKS)] * 4
    for wrong in (-1, BLOCKS):
        for blocks in ([wrong], [*many, wrong, *many]):  # not in the sample
            with pytest.raises(SlotError, match=f"got {wrong}"):
                choose_encoding(view, blocks, **SLOW)


def test_a_device_is_measured_once(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs.forget()
    view = view_of([layer.to(accelerator) for layer in normal()])
    before = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        first = rates_of(view, Pack(), 1 << 16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert min(first) > 0

    def refuse(*_: object) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(choosing, "measure", refuse)
    assert rates_of(view, Pack(), 1 << 16) is first
    with pytest.raises(AssertionError, match="measured again"):  # control
        rates_of(view, Pack(3), 1 << 16)
    costs.forget()


def test_blocks_of_a_device_are_counted_there(accelerator: torch.device) -> None:
    layers = normal()
    there = view_of([layer.to(accelerator) for layer in layers])
    assert choose_encoding(there, range(BLOCKS), **SLOW) == choose_encoding(
        view_of(layers), range(BLOCKS), **SLOW
    )
    sample = Sample(there, torch.arange(BLOCKS, device="cpu").numpy(), [Pack(), Pack(3)])
    counts = sample.counts(Pack(3))
    assert sample.ready
    assert [each.shape for each in counts] == [(BLOCKS, 4)] * 2


def test_a_device_that_cannot_be_measured_stays_raw(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise TransferError("no memory")

    costs.forget()
    monkeypatch.setattr(choosing, "measure", fail)
    view = view_of([layer.to(accelerator) for layer in normal()])
    choice = choose_encoding(view, range(BLOCKS), packing_gbps=50.0)
    assert choice.pack is None
    assert "no memory" in choice.why
