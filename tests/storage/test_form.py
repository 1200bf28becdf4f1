# SPDX-License-Identifier: Apache-2.0
"""The form of stored blocks: its digest, its segments, and copies between its view and caches of
any layout, block size and part of the model, judged by the oracle's addresses."""

from __future__ import annotations

import json
from dataclasses import replace
from math import lcm
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ambient import STATES
from support.cache_cases import Cache, shuffled
from support.core_cases import noise
from support.storage_cases import key_of, payloads, sealed, small_form

from portakv import KVView, copy_blocks
from portakv.errors import InvalidTerms, StoreError
from portakv.storage.form import LEAST_SEGMENT, MOST_SEGMENTS, BlockForm

FORM = small_form()


def stored(cache: Cache, form: BlockForm, ids: torch.Tensor) -> torch.Tensor:
    """Return rows of images that hold these blocks of a cache, in order; a row is longer than an
    image."""
    tokens = len(ids) * (cache.view.block_size or 1)
    rows = torch.zeros(tokens // form.block_size, form.image_bytes + 4096, dtype=torch.uint8)
    copy_blocks(cache.view, form.view(rows), ids, torch.arange(len(rows))).synchronize()
    return rows


_EQUAL = "vllm-nhd vllm-hnd flexkv-blockfirst flexkv-layerfirst dynamo-universal vllm-0.26-nhd"
#: Widths, and presets that can hold them.
KINDS = {
    "equal": ((8, 8), f"{_EQUAL} vllm-blhnc sglang-mha vllm-ascend"),
    "unequal": ((8, 4), "vllm-0.26-nhd vllm-lhbnc vllm-ascend"),
    "latent": ((12,), "vllm-mla vllm-0.29-mla sglang-mla"),
    "latent and rope": ((16, 2), "vllm-ascend-mla"),
}


@st.composite
def parts(draw: st.DrawFn, extent: int) -> list[tuple[int, int, int]]:
    """Return an extent in equal parts, as the ranks of a TP or PP size hold them."""
    count = draw(st.sampled_from([n for n in range(1, extent + 1) if extent % n == 0]))
    step = extent // count
    return [(first, first + step, extent) for first in range(0, extent, step)]


@given(st.sampled_from([*KINDS]), st.data())
def test_ranks_of_another_size_read_what_ranks_have_stored(kind: str, data: st.DataObject) -> None:
    """Fault 62. Another TP size, PP size, layout and block size on either side: each reader finds
    its rectangle in the parts that cover it, byte for byte."""
    widths, names = KINDS[kind]
    presets = st.sampled_from(names.split())
    layers = data.draw(st.sampled_from([1, 2, 4]))
    heads = data.draw(st.sampled_from([1, 2, 4])) if "latent" not in kind else 1
    stored_size = data.draw(st.integers(1, 4))
    alike = [n for n in range(1, 9) if n % stored_size == 0 or stored_size % n == 0]
    sizes = [data.draw(st.sampled_from(alike)), stored_size, data.draw(st.sampled_from(alike))]
    tokens = lcm(*sizes)
    sides = [[data.draw(parts(extent)) for extent in (layers, heads)] for _ in range(2)]
    model = [np.zeros((layers, tokens, heads, 2 * width), np.uint8) for width in widths]
    forms = []
    images = []
    for number, (a, b) in enumerate((a, b) for a in sides[0][0] for b in sides[0][1]):
        count = tokens // sizes[0] + 1
        preset = data.draw(presets)
        extents = a[1] - a[0], b[1] - b[0]
        cache = Cache(preset, *extents, widths, count, sizes[0], seed=100 * number)
        ids = shuffled(count, number)[: count - 1]
        form = BlockForm.of(cache.view, "m", layers=a, heads=b, block_size=sizes[1])
        for whole, own in zip(model, cache.logical(ids), strict=True):
            whole[a[0] : a[1], :, b[0] : b[1]] = own
        forms.append(form)
        images.append(stored(cache, form, ids))
    for a, b in ((a, b) for a in sides[1][0] for b in sides[1][1]):
        count = tokens // sizes[2] + 1
        preset = data.draw(presets)
        cache = Cache(preset, a[1] - a[0], b[1] - b[0], widths, count, sizes[2], seed=9999)
        ids = shuffled(count, 9)[: count - 1]
        covered = 0
        own_form = BlockForm.of(cache.view, "m", layers=a, heads=b, block_size=sizes[1])
        for form, rows in zip(forms, images, strict=True):
            if shared := own_form.part_of(form):
                source = form.view(rows).slice(**shared[0])
                target = cache.view.slice(**shared[1])
                copy_blocks(source, target, torch.arange(len(rows)), ids).synchronize()
                covered += source.layers * source.heads
        assert covered == (a[1] - a[0]) * (b[1] - b[0])
        for whole, own in zip(model, cache.logical(ids), strict=True):
            assert (whole[a[0] : a[1], :, b[0] : b[1]] == own).all()


@pytest.mark.parametrize(
    ("preset", "widths"), [("vllm-nhd", (8, 8)), ("vllm-lbhnc", (8, 4)), ("vllm-mla", (12,))]
)
def test_a_payload_is_layer_head_kv_token_dim(preset: str, widths: tuple[int, ...]) -> None:
    heads = 1 if preset == "vllm-mla" else 2
    cache = Cache(preset, 3, heads, widths, 4, 4)
    ids = shuffled(4, 0)
    form = BlockForm.of(cache.view, "m")
    expected = [
        own[layer, 4 * block : 4 * block + 4, head].tobytes()
        for block in range(4)
        for layer in range(3)
        for head in range(heads)
        for own in cache.logical(ids)
    ]
    assert payloads(stored(cache, form, ids), form).tobytes() == b"".join(expected)


@pytest.mark.parametrize("kv", [1, 2])
def test_opaque_pages_are_stored_whole(kv: int) -> None:
    pages = [noise(5, 132 * 4, dtype=torch.uint8, seed=n) for n in range(3 * kv)]
    text = "layer | block page" if kv == 1 else "(layer kv) | block page"
    view = KVView(pages, text, block_size=4, kv=kv)
    form = BlockForm.of(view, "m")
    assert (form.layer_bytes, form.block_size, form.dtype) == (132 * 4 * kv, 4, "uint8")
    assert form.layout == ("block layer page" if kv == 1 else "block layer (kv page)")
    rows = torch.zeros(3, form.image_bytes, dtype=torch.uint8)
    ids = torch.tensor([4, 0, 2])
    copy_blocks(view, form.view(rows), ids, torch.arange(3)).synchronize()
    expected = torch.stack([torch.cat([page[block] for page in pages]) for block in ids.tolist()])
    assert (payloads(rows, form) == expected.numpy()).all()
    back = [torch.zeros_like(page) for page in pages]
    target = KVView(back, text, block_size=4, kv=kv)
    copy_blocks(form.view(rows), target, torch.arange(3), ids).synchronize()
    assert all((a[ids] == b[ids]).all() for a, b in zip(pages, back, strict=True))
    with pytest.raises(InvalidTerms, match="Expected block_size to be 4"):
        BlockForm.of(view, "m", block_size=8)


@pytest.mark.parametrize("size", [5, 12, 24, 17])
def test_a_stored_block_that_would_begin_inside_a_block_is_refused(size: int) -> None:
    view = Cache("vllm-nhd", 1, 1, (8, 8), 3, 16).view
    said = f"Expected block_size to be a multiple or a divisor of 16, .*, got {size}"
    with pytest.raises(InvalidTerms, match=said):
        BlockForm.of(view, "m", block_size=size)
    for right in (1, 8, 16, 48):
        assert BlockForm.of(view, "m", block_size=right).block_size == right


@pytest.mark.parametrize("name", ["model", "notes"])
def test_a_text_with_nul_is_refused(name: str) -> None:
    """C would end it there."""
    view = Cache("vllm-nhd", 1, 1, (8, 8), 3, 16).view
    terms: Any = {"model": "m", name: "a\0b"}
    with pytest.raises(InvalidTerms, match=f"{name} to be a text without the character NUL"):
        BlockForm.of(view, **terms)


@pytest.mark.parametrize(
    "layout", ["block layer kv token head dim", "block head layer kv token dim"]
)
def test_a_store_in_another_layout_stays_readable(layout: str) -> None:
    cache = Cache("vllm-nhd", 3, 2, (8, 8), 4, 4)
    ids = shuffled(4, 1)
    own = BlockForm.of(cache.view, "m")
    form = BlockForm.from_json(replace(own, layout=layout).json())
    assert form.digest != own.digest
    assert form.same_cache(own)
    assert own.part_of(form)
    rows = stored(cache, form, ids)
    assert form.view(rows).layout.text == layout
    back = Cache("vllm-0.26-nhd", 3, 2, (8, 8), 4, 4, seed=50)
    copy_blocks(form.view(rows), back.view, torch.arange(4), ids).synchronize()
    for a, b in zip(cache.logical(ids), back.logical(ids), strict=True):
        assert (a == b).all()


CHANGES: dict[str, Any] = {
    "model": "org/model@2",
    "dtype": "bfloat16",
    "widths": (32, 16),
    "block_size": 8,
    "layers": (0, 4, 8),
    "heads": (2, 4, 4),
    "layout": "block layer head token kv dim",
    "salt": "00",
    "notes": "scale 0.5",
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_the_bytes_changes_the_digest(field: str) -> None:
    other = replace(FORM, **{field: CHANGES[field]})
    assert len(other.digest) == 16
    assert other.name == other.digest.hex() != FORM.name
    assert other.same_cache(FORM) == (field == "layout")


def test_the_digest_is_for_ever() -> None:
    """A store that was written must be found again: this value is never to change."""
    assert FORM.name == "eab9d904f8eab33cb0787b2f0fd7f21f"


@pytest.mark.parametrize("preset", KINDS["equal"][1].split())
def test_what_does_not_change_the_bytes_leaves_the_digest(preset: str) -> None:
    """Neither the engine's layout nor the number of blocks, nor their size if the stored one is
    declared, nor whose rank of which TP size holds the part."""
    one = Cache("vllm-nhd", 4, 2, (8, 8), 3, 4).view
    form = BlockForm.of(one, "m", heads=(2, 4, 8))
    other = Cache(preset, 4, 2, (8, 8), 5, 2).view
    assert BlockForm.of(other, "m", heads=(2, 4, 8), block_size=4) == form
    sliced = Cache(preset, 4, 8, (8, 8), 2, 4).view.slice(heads=slice(2, 4))
    assert BlockForm.of(sliced, "m", heads=(2, 4, 8)).digest == form.digest
    assert BlockForm.of(other, "m", block_size=4, salt=b"a").salt != form.salt == ""


def _number_types() -> list[torch.dtype]:
    dtypes = [x for x in vars(torch).values() if isinstance(x, torch.dtype)]
    quantised = {
        torch.complex32,
        torch.quint8,
        torch.qint8,
        torch.qint32,
        torch.quint4x2,
        torch.quint2x4,
    }
    bits = {f"torch.{sign}int{n}" for sign in ("", "u") for n in range(1, 8)}
    bits |= {str(x) for x in dtypes if "bits" in str(x)}
    return [*dict.fromkeys(x for x in dtypes if x not in quantised and str(x) not in bits)]


@pytest.mark.parametrize("dtype", _number_types(), ids=str)
def test_rows_of_any_number_type(dtype: torch.dtype) -> None:
    tensors = [noise(2, 3, 4, 2, 8, dtype=dtype, seed=n) for n in range(2)]
    view = KVView(tensors, "layer | kv block token head dim")
    form = BlockForm.of(view, "m")
    size = dtype.itemsize
    assert form.dtype == (str(dtype)[6:] if dtype not in (torch.int8, torch.uint8) else "uint8")
    assert (form.payload_bytes, form.widths) == (2 * 2 * 2 * 4 * 8 * size, (8, 8))
    assert BlockForm.from_json(form.json()) == form
    rows = torch.zeros(3, form.image_bytes, dtype=torch.uint8)
    copy_blocks(view, form.view(rows), torch.arange(3), torch.arange(3)).synchronize()
    expected = torch.stack(tensors).view(torch.uint8).permute(2, 0, 4, 1, 3, 5)
    assert payloads(rows, form).tobytes() == expected.contiguous().numpy().tobytes()


def test_kv_of_two_number_types_are_bytes() -> None:
    """Values of one byte and scales of four: the widths are then bytes, and nothing is lost."""
    pairs = [
        (noise(3, 4, 1, 128, dtype=torch.int8), noise(3, 4, 1, 1, dtype=torch.float32))
        for _ in range(2)
    ]
    view = KVView(pairs, "layer kv | block token head dim")
    form = BlockForm.of(view, "m")
    assert (form.dtype, form.widths) == ("uint8", (128, 4))
    rows = torch.zeros(3, form.image_bytes, dtype=torch.uint8)
    copy_blocks(view, form.view(rows), torch.arange(3), torch.arange(3)).synchronize()
    block = [torch.cat([x[1].view(torch.uint8).ravel() for x in pair]) for pair in pairs]
    assert (payloads(rows, form)[1] == torch.cat(block).numpy()).all()


_WIDTHS = [(1,), (8, 8), (576,), (128, 64), (512, 512), (656,), (8192,)]


@settings(max_examples=4 * settings().max_examples)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 128), st.sampled_from(_WIDTHS))
def test_segments_are_whole_layers(
    layers: int, heads: int, tokens: int, widths: tuple[int, ...]
) -> None:
    kv = len(widths)
    layout = "block layer head (kv token dim)"
    form = small_form(layers, heads, tokens, widths=widths, kv=kv, layout=layout)
    at = layer = 0
    for first, past, offset, nbytes in form.segments:
        assert (first, offset) == (layer, at)
        assert nbytes == (past - first) * form.layer_bytes > 0
        layer = past
        at = at + nbytes
        if len(form.segments) > 1:
            assert nbytes % 4096 == 0
            assert nbytes >= LEAST_SEGMENT
    assert (layer, at) == (layers, form.payload_bytes)
    assert len(form.segments) <= MOST_SEGMENTS
    if form.layer_bytes % 4096 == 0 and layers >= 2 * max(LEAST_SEGMENT // form.layer_bytes + 1, 3):
        assert len(form.segments) > 1
    apart = replace(form, layout="block head layer (kv token dim)")
    assert len(apart.segments) == 1


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (((0, 8, 8), (0, 4, 4)), ((0, 8, 8), (1, 2, 4)), ((0, 8, 0, 1), (0, 8, 1, 2))),
        (((0, 8, 8), (1, 2, 4)), ((0, 8, 8), (0, 4, 4)), ((0, 8, 1, 2), (0, 8, 0, 1))),
        (((2, 6, 8), (2, 4, 4)), ((4, 8, 8), (0, 3, 4)), ((0, 2, 2, 3), (2, 4, 0, 1))),
        (((0, 4, 8), (0, 4, 4)), ((4, 8, 8), (0, 4, 4)), None),
        (((0, 8, 8), (0, 2, 4)), ((0, 8, 8), (2, 4, 4)), None),
        (((0, 8, 8), (0, 4, 4)), ((0, 8, 8), (0, 4, 8)), None),
    ],
)
def test_parts_that_two_forms_share(first: Any, second: Any, shared: Any) -> None:
    """Fault 62. TP 1 and 4, stages that overlap in part, parts that do not meet, another model."""
    one, two = (replace(FORM, layers=x[0], heads=x[1]) for x in (first, second))
    result = one.part_of(two)
    slices = shared and tuple(
        {"layers": slice(a, b), "heads": slice(c, d)} for a, b, c, d in shared
    )
    assert result == slices
    assert one.part_of(replace(two, model="another")) is None


@pytest.mark.parametrize(
    "wrong",
    [
        *({"layers": x} for x in ((0, 3, 4), (2, 6, 5), (0, 4), 4, (0, 4, "4"), (0.0, 4, 4))),
        *({"heads": x} for x in ((0, 3, 3), (-1, 1, 2), [0, 2, 2], (0, True, 1))),
        *({"block_size": x} for x in (-4, "4", 2.5)),
        *({"salt": "tenant"}, {"notes": b"x"}, {"model": None}, {"model": ""}),
    ],
)
def test_terms_that_are_not_the_view_s_are_refused(wrong: Any) -> None:
    view = Cache("vllm-nhd", 4, 2, (8, 8), 3, 4).view
    with pytest.raises(InvalidTerms, match=f"Expected {next(iter(wrong))} to be"):
        BlockForm.of(view, **{"model": "m", **wrong})


def test_a_tensor_has_no_form() -> None:
    with pytest.raises(InvalidTerms, match="Expected view to be a KVView, got a Tensor"):
        BlockForm.of(torch.zeros(2, 3, device="cpu", dtype=torch.int8), "m")  # type: ignore[arg-type]


def test_a_view_that_is_not_paged_has_no_form() -> None:
    view = KVView(torch.zeros(2, 3, 4, 16), "kv layer token (head dim)", heads=2)
    with pytest.raises(InvalidTerms, match="Expected view to be a paged view"):
        BlockForm.of(view, "m")


def _text(**changes: Any) -> str:
    return json.dumps({**json.loads(FORM.json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "\x00" * 40, FORM.json()[:40], _text(format=2), _text(layers=4)),
        *(_text(dtype="float99"), _text(layout="block what"), _text(unknown=1), "[" * 100_000),
        *(_text(heads=[0, 2.0, 4]), _text(layers=[-4, 0, 4]), _text(layers=[0, 9, 4])),
        *(_text(block_size=2.5), _text(kv=3), _text(widths=[16, -7]), _text(widths=[16])),
    ],
)
def test_other_text_is_no_form(text: str) -> None:
    """Fault 8. A description that is empty, cut, of a newer format or of unknown terms."""
    assert BlockForm.from_json(FORM.json()) == FORM
    with pytest.raises(StoreError, match="Expected text to be the JSON of a block form"):
        BlockForm.from_json(text)


@pytest.mark.parametrize("state", STATES)
def test_forms_in_any_state_of_torch(state: str) -> None:
    cache = Cache("vllm-nhd", 2, 2, (8, 8), 3, 4)
    rows = torch.zeros(3, 8192, dtype=torch.uint8)
    with STATES[state](torch.device("cpu")):
        form = BlockForm.of(cache.view, "m")
        assert form.view(rows).device.type == "cpu"
        assert form.view(rows).slots == 12
        assert len(form.segments) == 1
        assert BlockForm.from_json(form.json()) == form


def test_images_begin_at_any_page() -> None:
    form = small_form(layers=3, heads=2)
    pages = form.image_bytes // 4096
    memory = torch.zeros(3 * pages + 1, 4096, dtype=torch.uint8, device="cpu")
    rows = memory[1:].view(3, form.image_bytes)
    rows.copy_(sealed(form, [key_of(number) for number in range(3)]))
    by_page = form.view(memory)
    assert by_page.form.place == form.view(rows).form.place
    assert by_page.slots == (2 * pages + 2) * form.block_size
    some = [torch.zeros_like(rows) for _ in range(2)]
    copy_blocks(by_page, form.view(some[0]), [1, 1 + 2 * pages], [0, 1]).synchronize()
    copy_blocks(form.view(rows), form.view(some[1]), [0, 2], [0, 1]).synchronize()
    assert torch.equal(*some)
    with pytest.raises(InvalidTerms, match="Expected rows to be"):
        form.view(memory[: pages - 1])
    with pytest.raises(InvalidTerms, match="Expected rows to be"):
        form.view(memory.repeat(1, 2)[:, :4096])
