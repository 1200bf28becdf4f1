# SPDX-License-Identifier: Apache-2.0
"""The block image: a damaged or foreign image is always refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.core_cases import noise
from support.storage_cases import key_of, payloads, sealed, small_form

from portakv.storage import image
from portakv.storage.form import BlockForm

FORM = small_form()
#: Three segments, and a payload that ends within a page in the form that is not of pages.
LARGE = small_form(layers=3, heads=8, block_size=64, widths=(256, 256))
ODD = small_form(layers=3, widths=(31, 31))

_IMAGES = {form: sealed(form, [key_of(1)])[0].numpy() for form in (FORM, LARGE, ODD)}


def good(row: image.Row, form: BlockForm, key: bytes, generation: int) -> bool:
    """Return whether a tier accepts an image that it has read."""
    header = image.header(row, form)
    if isinstance(header, str) or (header.key, header.generation) != (key, generation):
        return False
    return image.verify(row, form, header.checksums, generation)


@pytest.mark.parametrize("form", [FORM, LARGE, ODD], ids=["one", "three", "odd"])
def test_what_is_sealed_is_good_and_lies_as_it_is_told(form: BlockForm) -> None:
    before = noise(1, form.image_bytes + 512, dtype=torch.uint8, seed=5)
    row = before.clone().numpy()[0]
    sums = image.seal(row, form, key_of(7), (1 << 64) - 3)
    assert good(row, form, key_of(7), (1 << 64) - 3)
    assert image.header(row, form) == (key_of(7), (1 << 64) - 3, sums)
    past = 4096 + form.payload_bytes
    assert form.image_bytes % 4096 == 0
    assert 0 <= form.image_bytes - past < 4096
    assert not row[past : form.image_bytes].any()
    for part in (slice(4096, past), slice(form.image_bytes, None)):
        assert (row[part] == before.numpy()[0][part]).all()
    count = len(form.segments)
    fields = struct.unpack_from(f"<8s16s32sQQII{count}Q", row.tobytes())
    assert fields[:3] == (b"PKVBLK\x00\x01", form.digest, key_of(7))
    assert fields[3:] == ((1 << 64) - 3, form.payload_bytes, count, 0, *sums)
    assert not row[80 + 8 * count : 4088].any()
    assert struct.unpack("<Q", row[4088:4096].tobytes()) == (xxhash.xxh3_64_intdigest(row[:4088]),)
    for segment, checksum in zip(form.segments, sums, strict=True):
        part = row[4096 + segment.offset :][: segment.nbytes].tobytes()
        assert checksum == xxhash.xxh3_64_intdigest(part, seed=(1 << 64) - 3)


def test_each_bit_of_a_header_is_checked() -> None:
    """Fault 2. One bit in a header: refused, whichever it is."""
    row = sealed(FORM, [key_of(1)])[0].numpy()
    assert good(row, FORM, key_of(1), 1)
    for bit in range(8 * image.HEADER):
        row[bit >> 3] ^= 1 << (bit & 7)
        assert isinstance(image.header(row, FORM), str), bit
        row[bit >> 3] ^= 1 << (bit & 7)
    assert good(row, FORM, key_of(1), 1)


@settings(max_examples=4 * settings().max_examples)
@given(st.sampled_from([FORM, LARGE, ODD]), st.data())
def test_one_bit_flipped_in_a_payload_is_found(form: BlockForm, data: st.DataObject) -> None:
    """Fault 1. One bit flipped in a payload: its segment fails, and no other."""
    row = _IMAGES[form]
    bit = data.draw(st.integers(0, 8 * form.payload_bytes - 1))
    header = image.header(row, form)
    assert isinstance(header, image.Header)
    row[4096 + (bit >> 3)] ^= 1 << (bit & 7)
    try:
        ends = [x.offset + x.nbytes for x in form.segments]
        wrong = int(np.searchsorted(ends, bit >> 3, side="right"))
        for number in range(len(ends)):
            result = image.verify(row, form, header.checksums, 1, [number])
            assert result == (number != wrong)
        assert not image.verify(row, form, header.checksums, 1)
    finally:
        row[4096 + (bit >> 3)] ^= 1 << (bit & 7)


@pytest.mark.parametrize("older", [(key_of(1), 6), (key_of(2), 6)], ids=["same key", "other key"])
@pytest.mark.parametrize("form", [FORM, ODD], ids=["one", "odd"])
def test_an_image_torn_back_to_an_older_one(form: BlockForm, older: tuple[bytes, int]) -> None:
    """Fault 4. Every 512-byte sector, one after the other, and every prefix and suffix of them,
    holds older contents: the image is refused, or has the very bytes that were sealed."""
    old = sealed(form, [older[0]], older[1], seed=1)[0].numpy()
    new = sealed(form, [key_of(1)], 7, seed=2)[0].numpy()
    sectors = form.image_bytes // 512
    refused = 0
    for first in range(sectors):
        for part in (slice(first, first + 1), slice(0, first + 1), slice(first, sectors)):
            torn = new.copy()
            torn[512 * part.start : 512 * part.stop] = old[512 * part.start : 512 * part.stop]
            if good(torn, form, key_of(1), 7):
                assert (torn == new).all(), part
            else:
                refused += 1
    assert refused > 2 * form.payload_bytes // 512


def test_a_new_header_over_an_old_payload() -> None:
    """Fault 4. The header landed and the payload did not: the generation is in the checksums, so
    that not even equal checksums of an older header would pass."""
    rows = sealed(FORM, [key_of(1), key_of(1)])
    old = rows[0].numpy()
    sums = image.seal(old, FORM, key_of(1), 1)
    assert image.verify(old, FORM, sums, 1)
    assert not image.verify(old, FORM, sums, 2)
    assert image.seal(old.copy(), FORM, key_of(1), 2) != sums


def test_the_image_of_another_key_is_told() -> None:
    """Fault 6. The image of key a in the place of key b: the header names its key."""
    a, b = sealed(FORM, [key_of(1), key_of(2)]).numpy()
    b[:] = a
    header = image.header(b, FORM)
    assert isinstance(header, image.Header)
    assert header.key == key_of(1)
    assert not good(b, FORM, key_of(2), 1)
    assert good(b, FORM, key_of(1), 1)


@pytest.mark.parametrize(
    "other",
    [replace(FORM, model="org/model@2"), replace(FORM, layers=(0, 4, 8)), small_form(layers=2)],
)
def test_the_image_of_another_form_is_refused(other: BlockForm) -> None:
    row = sealed(other, [key_of(1)])[0].numpy()
    row = np.concatenate([row, np.zeros(FORM.image_bytes, np.uint8)])
    assert "another format or form" in str(image.header(row, FORM))
    assert "broken seal" in str(image.header(np.zeros(FORM.image_bytes, np.uint8), FORM))


def test_images_are_checked_where_they_lie() -> None:
    """Rows that are longer than an image, and memory that is not to be written."""
    rows = torch.zeros(2, FORM.image_bytes + 4096, dtype=torch.uint8)
    rows[:, : FORM.image_bytes] = sealed(FORM, [key_of(0), key_of(1)])
    for number, row in enumerate(rows.numpy()):
        row.flags.writeable = False
        assert good(row, FORM, key_of(number), 1)
    assert payloads(rows, FORM).any()
