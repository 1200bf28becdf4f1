# SPDX-License-Identifier: Apache-2.0
"""Copies whose keys are rotated to other positions, against rotations by complex numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.cache_cases import normal_layers

from portakv import (
    Index,
    InvalidTerms,
    KVView,
    LayoutError,
    Rope,
    SlotError,
    Unsupported,
    copy_blocks,
    rotate_blocks,
)
from portakv.copy import rotation

NHD = "layer | kv block token head dim"
LAYERS = 2
HEADS = 2
SIZE = 16
DIM = 32
BLOCKS = 6
#: Inverse frequencies that no base makes.
SCALED = torch.tensor([0.7 / (n * n + 1) for n in range(DIM // 2)], device="cpu").tolist()


def cache(dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> list[torch.Tensor]:
    return normal_layers((2, BLOCKS, SIZE, HEADS, dim), LAYERS, dtype)


def zeros(layers: list[torch.Tensor], device: Any = "cpu") -> list[torch.Tensor]:
    return [torch.zeros_like(layer, device=device) for layer in layers]


def turned(
    keys: torch.Tensor, shift: int, inverse: list[float], style: str = "neox"
) -> torch.Tensor:
    """Return keys ``[..., dim]`` rotated as complex numbers, float64."""
    made = keys.double().numpy().copy()
    pairs = len(inverse)
    if style == "neox":
        places = [(n, n + pairs) for n in range(pairs)]
    else:
        places = [(2 * n, 2 * n + 1) for n in range(pairs)]
    for (one, other), frequency in zip(places, inverse, strict=True):
        number = (made[..., one] + 1j * made[..., other]) * np.exp(1j * shift * frequency)
        made[..., one] = number.real
        made[..., other] = number.imag
    return torch.from_numpy(made)


def of_base(base: float, rotary: int) -> list[float]:
    return [float(base ** (-2 * n / rotary)) for n in range(rotary // 2)]


KINDS: dict[str, tuple[dict[str, Any], list[float], str]] = {
    "neox": ({"base": 10000.0}, of_base(10000, DIM), "neox"),
    "gptj": ({"base": 500000, "style": "gptj"}, of_base(500000, DIM), "gptj"),
    "in part": ({"base": 10000.0, "rotary_dim": 8}, of_base(10000, 8), "neox"),
    "in part, gptj": (
        {"base": 10000.0, "rotary_dim": 8, "style": "gptj"},
        of_base(10000, 8),
        "gptj",
    ),
    "scaled": ({"inv_freq": SCALED}, SCALED, "neox"),
    "a tensor": ({"inv_freq": torch.tensor(SCALED, device="cpu")}, SCALED, "neox"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in KINDS),
        ("gptj", torch.float16),
        ("neox", torch.float32),
        ("in part, gptj", torch.float32),
    ],
)
def test_keys_are_rotated_and_values_are_not(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Also in slices of one block; every other block stays as it was."""
    monkeypatch.setattr(rotation, "SLICE", LAYERS * HEADS * SIZE * DIM * dtype.itemsize)
    terms, inverse, style = KINDS[name]
    layers = cache(dtype)
    target = zeros(layers)
    rope = Rope(shift=-1234, **terms)
    moved = rotate_blocks(KVView(layers, NHD), KVView(target, NHD), [5, 0, 3], [1, 2, 4], rope)
    moved.synchronize()
    assert moved.carried[0] == "reference"
    assert "the rotation of keys by operations of torch on cpu" in moved.carried[1]
    for own, layer in zip(target, layers, strict=True):
        wanted = turned(layer[0, [5, 0, 3]], -1234, inverse, style)
        error = (own[0, [1, 2, 4]].double() - wanted).abs()
        # Half a step of the type, and the rounding of products in float32.
        most = 0.5001 * torch.finfo(dtype).eps * wanted.abs() + 2e-6
        assert bool((error <= most).all())
        rest = 2 * len(inverse)
        assert torch.equal(own[0, [1, 2, 4], :, :, rest:], layer[0, [5, 0, 3], :, :, rest:])
        assert torch.equal(own[1, [1, 2, 4]], layer[1, [5, 0, 3]])
        assert not own[:, [0, 3, 5]].any()


def _backwards(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, style: str) -> None:
    """Keys are rotated the other way."""
    RIGHT(keys, cosines, -sines, style)


def _other_pairs(
    keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, style: str
) -> None:
    """The pairs are those of the other style."""
    RIGHT(keys, cosines, sines, "gptj" if style == "neox" else "neox")


def _one_after_the_other(
    keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, style: str
) -> None:
    """The second value of a pair is computed from the new first one."""
    first = keys[..., : len(cosines)]
    second = keys[..., len(cosines) :]
    first.copy_(first * cosines - second * sines)
    second.copy_(second * cosines + first * sines)


def _in_halves(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, style: str) -> None:
    """Products are rounded to the number type of the keys."""
    RIGHT(keys, cosines.to(keys.dtype).float(), sines.to(keys.dtype).float(), style)


RIGHT = rotation.rotate_keys
FAULTS = (_backwards, _other_pairs, _one_after_the_other, _in_halves)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_rotation_is_seen(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(rotation, "rotate_keys", fault)
    with pytest.raises(AssertionError):
        test_keys_are_rotated_and_values_are_not(monkeypatch, "neox", torch.bfloat16)


def test_there_and_back_and_no_shift() -> None:
    layers = cache(torch.float32)
    view = KVView(layers, NHD)
    once = KVView(zeros(layers), NHD)
    rotate_blocks(view, once, [0, 1], [0, 1], Rope(shift=700, base=10000.0)).synchronize()
    assert not torch.equal(once.tensors[0][0, 0], layers[0][0, 0])
    back = KVView(zeros(layers), NHD)
    rotate_blocks(once, back, [0, 1], [0, 1], Rope(shift=-700, base=10000.0)).synchronize()
    assert torch.allclose(back.tensors[1][:, :2], layers[1][:, :2], atol=1e-5, rtol=0)
    same = KVView(zeros(layers), NHD)
    rotate_blocks(view, same, [0, 1], [0, 1], Rope(shift=0, base=10000.0)).synchronize()
    assert torch.equal(same.tensors[0][:, :2], layers[0][:, :2])


def test_latent_rows_have_their_own_keys() -> None:
    """The rotated part of MLA is the second kv; the latent part stays as it is."""
    latent = [torch.randn(BLOCKS, SIZE, 64, device="cpu").bfloat16() for _ in range(LAYERS)]
    rope = [torch.randn(BLOCKS, SIZE, 16, device="cpu").bfloat16() for _ in range(LAYERS)]
    pairs = list(zip(latent, rope, strict=True))
    empty = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in pairs]
    layout = "layer kv | block token dim"
    shift = Rope(shift=40, base=10000.0, style="gptj", kv=1)
    rotate_blocks(KVView(pairs, layout), KVView(empty, layout), [2], [0], shift).synchronize()
    for made, wanted in zip(empty, pairs, strict=True):
        assert torch.equal(made[0][0], wanted[0][2])
        true = turned(wanted[1][2], 40, of_base(10000, 16), "gptj")
        assert torch.allclose(made[1][0].double(), true, atol=0.02, rtol=0.004)


def test_within_one_cache_and_other_block_sizes() -> None:
    layers = cache()
    before = [layer.clone() for layer in layers]
    view = KVView(layers, NHD)
    rope = Rope(shift=5, base=10000.0)
    rotate_blocks(view, view, [0, 1], [4, 5], rope).synchronize()
    target = [torch.zeros(2, 12, 8, HEADS, DIM, dtype=torch.bfloat16, device="cpu") for _ in layers]
    halves = KVView(target, NHD)
    rotate_blocks(KVView(before, NHD), halves, [0, -1, 1], [6, 7, 1, 2, 3, 0], rope).synchronize()
    for layer, half, old in zip(layers, target, before, strict=True):
        assert torch.equal(layer[:, :4], old[:, :4])
        assert torch.equal(half[:, [6, 7, 3, 0]].flatten(1, 2), layer[:, 4:].flatten(1, 2))
        assert not half[:, [1, 2]].any()
    with pytest.raises(SlotError):
        rotate_blocks(view, view, [0, 1], [1, 2], rope)


@pytest.mark.parametrize("encoding", ["pack", "fp8"])
def test_rotated_rows_come_from_and_go_to_encoded_blocks(encoding: str) -> None:
    layers = cache()
    view = KVView(layers, NHD)
    rope = Rope(shift=99, base=10000.0)
    plain = zeros(layers)
    rotate_blocks(view, KVView(plain, NHD), [3, 2], [0, 1], rope).synchronize()

    def image() -> KVView:
        from portakv.layout.encodings import as_encoding, plane_of

        made = as_encoding(encoding)
        assert made is not None
        slot = plane_of(made, SIZE, DIM).slot_bytes
        slots = torch.zeros((BLOCKS, LAYERS, 2, HEADS, slot), dtype=torch.uint8, device="cpu")
        layout = "block layer kv head page"
        return KVView(slots, layout, block_size=SIZE, dim=DIM, encoding=made)

    # Rotate, then encode: the bytes of the rotated rows.
    one = image()
    rotate_blocks(view, one, [3, 2], [4, 0], rope).synchronize()
    other = image()
    copy_blocks(KVView(plain, NHD), other, [0, 1], [4, 0]).synchronize()
    assert torch.equal(one.tensors, other.tensors)
    # Decode, then rotate.
    stored = image()
    copy_blocks(view, stored, None, None).synchronize()
    back = zeros(layers)
    rotate_blocks(stored, KVView(back, NHD), [3, 2], [0, 1], rope).synchronize()
    most = 0.0 if encoding == "pack" else 0.3
    for own, wanted in zip(back, plain, strict=True):
        assert float((own.float() - wanted.float()).abs().max()) <= most
    with pytest.raises(Unsupported, match="between two encoded sides"):
        rotate_blocks(stored, image(), [0], [0], rope)
    with pytest.raises(Unsupported, match="moves only whole"):
        rotate_blocks(view, one, [0], [0], rope, count=SIZE - 1)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shift": ({"shift": 1.5}, "shift"),
    "no base": ({"base": None}, "base or inv_freq"),
    "both": ({"inv_freq": SCALED}, "base or inv_freq"),
    "base": ({"base": -1}, "base"),
    "style": ({"style": "llama3"}, "style to be one of 'neox', 'gptj'"),
    "odd": ({"rotary_dim": 7}, "rotary_dim"),
    "kv": ({"kv": -1}, "kv"),
    "nan": ({"base": None, "inv_freq": [1.0, float("nan")]}, "inv_freq"),
    "words": ({"base": None, "inv_freq": "yarn"}, "inv_freq"),
    "huge base": ({"base": 10**400}, "base to be a number"),
    "huge": ({"base": None, "inv_freq": [10**400]}, "inv_freq to be finite"),
    "small base": ({"base": 1e-308, "shift": 1 << 30}, "base to be such that all angles"),
    "far": ({"base": None, "inv_freq": [1e308], "shift": 1 << 30}, "inv_freq to be such that"),
    "few": ({"base": None, "inv_freq": [1.0], "rotary_dim": 4}, "2 numbers, half of rotary_dim"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rotations_are_named(name: str) -> None:
    terms, why = WRONG[name]
    with pytest.raises(InvalidTerms, match=why):
        Rope(**{"shift": 1, "base": 10000.0, **terms})


def test_what_cannot_be_rotated_is_refused() -> None:
    layers = cache()
    target = zeros(layers)
    view = KVView(layers, NHD)
    into = KVView(target, NHD)
    usual = Rope(shift=1, base=10000.0)
    for rope, why in (
        (Rope(shift=1, base=10000.0, rotary_dim=64), "rotary_dim of 64 in heads"),
        (Rope(shift=1, inv_freq=SCALED[:4]), "rotary_dim of 8 in heads"),
        (Rope(shift=1, base=10000.0, kv=2), "Expected kv below 2"),
    ):
        with pytest.raises(LayoutError, match=why):
            rotate_blocks(view, into, [0], [0], rope)
    ints = [layer.view(torch.int16) for layer in layers]
    with pytest.raises(Unsupported, match="keys of int16"):
        rotate_blocks(KVView(ints, NHD), into, [0], [0], usual)
    pages = torch.zeros((BLOCKS, 512), dtype=torch.uint8, device="cpu")
    opaque = KVView([pages], "layer | block page", block_size=SIZE)
    with pytest.raises(Unsupported, match="opaque pages"):
        rotate_blocks(opaque, opaque, [0], [1], usual)
    with pytest.raises(InvalidTerms, match="rope"):
        rotate_blocks(view, into, [0], [0], {"shift": 1})  # type: ignore[arg-type]
    with pytest.raises(SlotError):
        rotate_blocks(view, into, [BLOCKS], [0], usual)
    with pytest.raises(SlotError, match="step"):
        rotate_blocks(view, into, Index([0], step=8), [0], usual)
    assert not any(bool(layer.any()) for layer in target)


def test_slices_cross_a_link(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "SLICE", 2 * LAYERS * HEADS * SIZE * DIM * 2)
    layers = cache()
    rope = Rope(shift=321, base=10000.0)
    plain = zeros(layers)
    order = [5, 0, 3, 1, 2]
    rotate_blocks(KVView(layers, NHD), KVView(plain, NHD), order, range(5), rope).synchronize()
    near = KVView([layer.to(accelerator) for layer in layers], NHD)
    out = zeros(layers)
    rotate_blocks(near, KVView(out, NHD), order, range(5), rope).synchronize()
    into = KVView(zeros(layers, accelerator), NHD)
    rotate_blocks(KVView(layers, NHD), into, order, range(5), rope).synchronize()
    for wanted, one, other in zip(plain, out, into.tensors, strict=True):
        for made in (one, other.cpu()):
            assert torch.allclose(made.float(), wanted.float(), atol=0.02, rtol=0.008)
            assert torch.equal(made[1], wanted[1])


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
def test_slots_without_ids_are_rotated_in_slices(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice need not be as long as the whole copy divides into."""
    layers = cache()
    whole = zeros(layers)
    rope = Rope(shift=5, base=10000.0)
    rotate_blocks(KVView(layers, NHD), KVView(whole, NHD), None, None, rope).synchronize()
    monkeypatch.setattr(rotation, "SLICE", tokens * LAYERS * HEADS * DIM * 2)
    sliced = zeros(layers)
    rotate_blocks(KVView(layers, NHD), KVView(sliced, NHD), None, None, rope).synchronize()
    for mine, other, source in zip(sliced, whole, layers, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine[1], source[1])


def test_what_padding_leaves_of_a_block_is_rotated() -> None:
    layers = cache()
    written = zeros(layers)
    index = Index([-1, 1, 2, 3], SIZE, SIZE // 2)
    rope = Rope(shift=5, base=10000.0)
    copy = rotate_blocks(KVView(layers, NHD), KVView(written, NHD), index, None, rope, count=32)
    copy.synchronize()
    for mine, source in zip(written, layers, strict=True):
        flat = mine[1].flatten(0, 1)
        assert torch.equal(flat[8:32], source[1].flatten(0, 1)[16:40])
        assert not flat[:8].any()
        assert not flat[32:].any()
