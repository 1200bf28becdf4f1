# SPDX-License-Identifier: Apache-2.0
"""Real, small tensors for every preset, as the engine would hand them over.

Written from the shapes that engines document, in letters, without asking the library anything: a
preset whose layout string were wrong would not agree with the tensors made here. Letters: L layer,
K kv, B block, T token of a block, H head, D dim; S all token slots as one dimension, HD heads and
dim merged, KD the content of all kv merged, P an opaque page, N/n the quotient and remainder of
dim by 32. Left of ``|`` stand containers (``K*L``: one flat list), ``@`` gives the memory order
where it differs from the logical one (with L: all layers live in one allocation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

_NAMES_BY_LETTERS = {
    "B L K T H D": "lmcache-0 vllm-cross-nhd trtllm-nhd flexkv-blockfirst chunk-block-first",
    "L | K B T H D": "lmcache-1 vllm-nhd vllm-ascend-merged",
    "L | B K T H D": "lmcache-2 vllm-flashinfer-nhd vllm-triton vllm-0.23",
    "L | B T D": "lmcache-3 vllm-mla vllm-mla-fp8",
    "K L | S H D": "lmcache-4 sglang-mha",
    "L | S 1 D": "lmcache-5 sglang-mla",
    "L | K B H T D": "lmcache-6 mlu-merged",
    "L | B K H T D": "lmcache-7 flashinfer-hnd",
    "B L K H T D": "lmcache-8 trtllm-hnd",
    "K L | B T H D": "lmcache-9",
    "L | B H T KD": "lmcache-10 vllm-0.26-hnd",
    "L | B T H KD": "lmcache-11",
    "L | B H T D": "lmcache-12",
    "L | B T H D": "lmcache-13 lmcache-18",
    "L | B P": "lmcache-14 opaque",
    "L | K B H 1 T D": "lmcache-15 vllm-rbln",
    "L K | B T H D": "lmcache-16 vllm-ascend",
    "L K | B T 1 D": "lmcache-17 vllm-ascend-mla vllm-ascend-dsa",
    "L | K B T H D @ K B H T D": "vllm-hnd",
    "L | B K T H D @ B K H T D": "vllm-flashinfer-hnd",
    "L | B H T KD @ B T H KD": "vllm-0.26-nhd",
    "B L T H KD": "vllm-0.26-cross-nhd",
    "B H L T KD": "vllm-0.26-cross-hnd",
    "L | B H T KD @ L B H T KD": "vllm-lbhnc vllm-0.29-cpu",
    "L | B H T KD @ L B T H KD": "vllm-lbnhc",
    "L | B H T KD @ L H B T KD": "vllm-lhbnc",
    "L | B H T KD @ B L H T KD": "vllm-blhnc",
    "L | B H T KD @ B L T H KD": "vllm-blnhc",
    "L | B H T KD @ B H L T KD": "vllm-bhlnc",
    "L | B K T HD @ L B K T HD": "vllm-0.29-planes",
    "L | B 1 T D @ B L 1 T D": "vllm-0.29-mla",
    "L | B T P": "vllm-dsv4 vllm-mla-nvfp4 vllm-dsa",
    "L | B T KD": "vllm-dsv4-split vllm-mla-nvfp4-split vllm-dsa-split",
    "K*L | S H D": "sglang-mha-flat",
    "K | L B T H D": "sglang-npu",
    "K L S H D": "sglang-host-layer-first",
    "K S L H D": "sglang-host-page-first",
    "K B L T H D": "sglang-host-page-first-direct",
    "K B H T L D": "sglang-host-page-head",
    "L K | B H N T n": "vllm-ascend-nz",
    "L K | B H T D": "mlu",
    "K | B L H T D": "swifttransformer",
    "L K B T H D": "epd flexkv-layerfirst",
    "L B K T H D": "flexkv-layerblock",
    "B H L K T D": "dynamo-universal",
    "B | H L K T D": "dynamo-universal-blocks",
    "B T D": "encoder-cache",
    "L K | 1 H S D": "transformers",
    "B P": "opaque-cross",
    "K L S HD": "chunk-2ltd chunk-2ltd-mla",
    "S K HD": "chunk-t2d",
    "K S HD": "chunk-2td",
    "H L K S D": "chunk-universal",
    "B | K L T HD": "chunk-list",
}
HANDED: Mapping[str, str] = {
    name: letters for letters, names in _NAMES_BY_LETTERS.items() for name in names.split()
}

# Parts of one content that lie one behind the other over all tokens of a block.
BLOCKED = {"vllm-0.29-cpu", "vllm-dsv4-split", "vllm-mla-nvfp4-split", "vllm-dsa-split"}
# Bytes of each kv (of a nominal row, for pages) where the engine fixes them.
WIDTHS = {
    "vllm-mla-fp8": (656,),
    "vllm-dsv4": (584,),
    "vllm-dsv4-split": (576, 8),
    "vllm-mla-nvfp4": (352,),
    "vllm-mla-nvfp4-split": (320, 32),
    "vllm-dsa": (132,),
    "vllm-dsa-split": (128, 4),
}
# kv where it is written and not 2.
KV = {"vllm-ascend-dsa": 3, "chunk-2ltd-mla": 1}
# Pools whose slots are one dimension: paged, although no dimension counts blocks.
FLAT_POOLS = {"lmcache-4", "lmcache-5", "sglang-mha", "sglang-mha-flat", "sglang-mla"}
FLAT_POOLS |= {"sglang-host-layer-first", "sglang-host-page-first"}
DTYPES = {
    "vllm-triton": torch.float8_e4m3fn,
    "vllm-flashinfer-hnd": torch.float8_e5m2,
    "vllm-lbnhc": torch.bfloat16,
    "epd": torch.float32,
    **dict.fromkeys(("trtllm-hnd", "opaque", "vllm-ascend-nz"), torch.int8),
    **dict.fromkeys((*WIDTHS, "vllm-0.29-mla"), torch.uint8),
}
GUARD = 0xA5  # the byte around allocations that are built with a guard


@dataclass(frozen=True)
class Geometry:
    """What both sides of a copy must agree on. ``widths`` are bytes, one for each kv."""

    layers: int = 2
    heads: int = 2
    widths: tuple[int, ...] = (16, 16)
    block_size: int = 4
    blocks: int = 6

    @property
    def slots(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True)
class Traits:
    """What a preset can hold, from its letters: None means free."""

    kv: int
    layers: int | None
    heads: int | None
    widths: tuple[int, ...] | None  # of a whole page where opaque, at the default block size
    unequal: bool
    multiple: int
    opaque: bool
    paged: bool


@dataclass(frozen=True)
class Case:
    """Tensors of one preset and what is true of them.

    ``extents`` is what a caller has to declare beyond the preset; ``declared`` all he may.
    ``parts`` are the tensors for each kv that stands in a container, over layers (or blocks);
    ``buffers`` the whole allocations as bytes, padding and guards included.
    """

    name: str
    tensors: Any
    dtype: torch.dtype
    geometry: Geometry
    traits: Traits
    extents: dict[str, Any]
    declared: dict[str, Any]
    buffers: tuple[torch.Tensor, ...]
    parts: tuple[tuple[torch.Tensor, ...], ...]

    def rows(self, k: int) -> torch.Tensor:
        """One kv as bytes: (layers, slots, heads, width); pages (layers, blocks, 1, page)."""
        containers, dims, _ = _letters(self.name)
        part = self.parts[k if len(self.parts) > 1 else 0]
        planes = [_plane(t, dims, k, self.name in BLOCKED, self.geometry) for t in part]
        plane = torch.cat(planes, dim=1 if "B" in containers else 0)
        return plane.flatten(1, 2)


def traits(name: str, block_size: int = Geometry.block_size) -> Traits:
    """What the preset can hold."""
    containers, dims, _ = _letters(name)
    written = [*containers, *dims]
    fused = "KD" in dims
    widths = WIDTHS.get(name)
    if "P" in dims and widths:
        widths = (widths[0] * block_size,)
    return Traits(
        kv=KV.get(name, 2) if fused or any("K" in w.split("*") for w in written) else 1,
        layers=None if any("L" in w.split("*") for w in written) else 1,
        heads=None if {"H", "HD"} & set(dims) and name != "chunk-2ltd-mla" else 1,
        widths=widths,
        unequal=fused or _kv_outside(containers),
        multiple=32 if "N" in dims else 1,
        opaque="P" in dims,
        paged="B" in written or name in FLAT_POOLS,
    )


def meet(one: str, other: str, **changes: Any) -> Geometry | None:
    """A geometry that both presets can hold, or None: then a copy between them must raise.

    ``changes`` replaces layers, block_size or blocks. Widths are unequal wherever both sides can.
    """
    block_size = changes.get("block_size", Geometry.block_size)
    a, b = traits(one, block_size), traits(other, block_size)
    if a.opaque != b.opaque or a.kv != b.kv:
        return None
    if a.widths and b.widths and a.widths != b.widths:
        return None
    multiple, unequal = max(a.multiple, b.multiple), a.unequal and b.unequal
    first = 96 if a.opaque else 2 * multiple if multiple > 1 else 16
    free = tuple(first // 2 if unequal and k % 2 else first for k in range(a.kv))
    widths = a.widths or b.widths or free
    if any(w % multiple for w in widths) or (len(set(widths)) > 1 and not unequal):
        return None
    both = Geometry(a.layers or b.layers or 2, a.heads or b.heads or 2, widths)
    return replace(both, **changes)


def build(
    name: str,
    geometry: Geometry | None = None,
    *,
    seed: int = 0,
    guard: int = 0,
    device: str = "cpu",
    **changes: Any,
) -> Case:
    """Make the tensors of a preset with random bytes.

    Args:
        name: a preset.
        geometry: what they hold; by default what the preset holds by itself.
        guard: bytes of ``GUARD`` before and behind each allocation, a multiple of 16; with 0
            the storage offsets are those of the engine.
        changes: fields of the geometry to replace.
    """
    held = geometry or meet(name, name)
    assert held is not None
    held = replace(held, **changes)
    containers, dims, memory = _letters(name)
    known, dtype = traits(name, held.block_size), DTYPES.get(name, torch.float16)
    maker = _Maker(name, held, dtype, torch.Generator().manual_seed(seed), guard, device)
    count = "L" if any("L" in c for c in containers) else "B" if "B" in containers else ""
    outside = range(known.kv if _kv_outside(containers) else 1)
    parts = tuple(maker.part(k, dims, memory, count) for k in outside)
    extents, declared = _declarations(name, known, held, dtype)
    tensors, buffers = _contain(containers, parts, name), tuple(maker.buffers)
    return Case(name, tensors, dtype, held, known, extents, declared, buffers, parts)


def _letters(name: str) -> tuple[list[str], list[str], list[str]]:
    """Containers, dimensions, memory order (the dimensions themselves where none is given)."""
    text, _, memory = HANDED[name].partition("@")
    left, bar, right = text.partition("|")
    containers, dims = (left.split(), right.split()) if bar else ([], left.split())
    return containers, dims, memory.split() or dims


def _kv_outside(containers: Sequence[str]) -> bool:
    return any("K" in c for c in containers)


@dataclass
class _Maker:
    """Allocates tensors in a memory order, with the padding and offsets of the engine."""

    name: str
    held: Geometry
    dtype: torch.dtype
    generator: torch.Generator
    guard: int
    device: str
    buffers: list[torch.Tensor] = field(default_factory=list)

    def part(
        self, k: int, dims: Sequence[str], memory: Sequence[str], count: str
    ) -> tuple[torch.Tensor, ...]:
        """The tensors of one kv, over the layers or blocks that stand in a container."""
        number = {"L": self.held.layers, "B": self.held.blocks, "": 1}[count]
        if count in memory and count not in dims:  # all layers in one allocation
            return tuple(self._allocate(k, dims, memory, count))
        return tuple(next(self._allocate(k, dims, memory, "")) for _ in range(number))

    def _allocate(
        self, k: int, dims: Sequence[str], memory: Sequence[str], outer: str
    ) -> Iterator[torch.Tensor]:
        strides, span = {}, 1
        for letter in reversed(memory):
            span += self._padding(span) if letter == "B" else 0
            strides[letter] = span
            span *= self._size(letter, k, dims)
        item = self.dtype.itemsize
        front = self.guard + self._offset()
        size = (front + span * item + self.guard,)
        raw = torch.randint(256, size, generator=self.generator, dtype=torch.uint8)
        raw[: self.guard] = GUARD
        raw[len(raw) - self.guard :] = GUARD
        raw = raw.to(self.device)
        self.buffers.append(raw)
        shape = [self._size(letter, k, dims) for letter in dims]
        steps = [strides[letter] for letter in dims]
        for at in range(self.held.layers if outer else 1):
            start = front // item + at * strides.get(outer, 0)
            yield raw.view(self.dtype).as_strided(shape, steps, start)

    def _size(self, letter: str, k: int, dims: Sequence[str]) -> int:
        held, item = self.held, self.dtype.itemsize
        page = held.widths[0] // (held.block_size if "T" in dims else 1)
        return {
            "1": 1,
            "L": held.layers,
            "K": len(held.widths),
            "B": held.blocks,
            "T": held.block_size,
            "H": held.heads,
            "D": held.widths[k] // item,
            "S": held.slots,
            "HD": held.heads * held.widths[k] // item,
            "KD": sum(held.widths) // item,
            "P": page // item,
            "N": held.widths[k] // 32,
            "n": 32,
        }[letter]

    def _padding(self, span: int) -> int:
        """Elements between a dense page (or block) and the next."""
        if self.name.startswith("vllm-dsv4"):
            return -span % 576
        return 32 // self.dtype.itemsize if self._views() else 0

    def _offset(self) -> int:
        """Bytes before the first tensor of an allocation."""
        if self._views():
            return 64
        # Slices of allocations aligned to 2 MiB, here at distances small enough for a test.
        return 32 * (1 + len(self.buffers)) if self.name.startswith("vllm-ascend") else 0

    def _views(self) -> bool:
        """vLLM 0.29 and later: views into one allocation, with padded pages."""
        _, dims, memory = _letters(self.name)
        return "L" in memory and "L" not in dims


def _contain(containers: Sequence[str], parts: Sequence[Sequence[torch.Tensor]], name: str) -> Any:
    """Nest the tensors as the engine does; vLLM hands over a dict from layer names."""
    inner: list[Any] = list(parts[0])
    match list(containers):
        case []:
            return inner[0]
        case ["K*L"]:
            return [tensor for part in parts for tensor in part]
        case ["K", "L"]:
            return tuple(list(part) for part in parts)
        case ["K"]:
            return tuple(part[0] for part in parts)
        case ["L", "K"]:
            inner = list(zip(*parts, strict=True))
    if name.startswith("vllm"):
        return {f"model.layers.{at}.self_attn.attn": item for at, item in enumerate(inner)}
    return inner


def _declarations(
    name: str, known: Traits, held: Geometry, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has to be declared beyond the preset, and everything that may be."""
    _, dims, _ = _letters(name)
    elements = [width // dtype.itemsize for width in held.widths]
    dim: Any = elements[0] if len(set(elements)) == 1 else tuple(elements)
    needed: dict[str, Any] = {}
    if known.opaque or name in BLOCKED or name in FLAT_POOLS:
        needed["block_size"] = held.block_size
    if "HD" in dims and name != "chunk-2ltd-mla":
        needed["heads"] = held.heads
    if "KD" in dims and isinstance(dim, tuple) and name not in WIDTHS:
        needed["dim"] = dim
    declared: dict[str, Any] = {"layers": held.layers, "kv": known.kv, "heads": held.heads}
    if known.paged:
        declared["block_size"] = held.block_size
    if not known.opaque:
        declared["dim"] = dim
    return needed, declared


def _plane(
    tensor: torch.Tensor, dims: Sequence[str], k: int, blocked: bool, held: Geometry
) -> torch.Tensor:
    """One kv of one tensor as bytes: (layers, blocks, tokens, heads, width), 1 where missing."""
    tensor = tensor.contiguous().view(torch.uint8)
    left = ["D" if letter == "KD" else letter for letter in dims]
    for letter, at in (("K", k), ("1", 0)):
        if letter in left:
            tensor = tensor.select(left.index(letter), at)
            left.remove(letter)
    before, width = sum(held.widths[:k]), held.widths[k]
    if blocked:
        run = tensor.flatten(-2).narrow(-1, before * held.block_size, width * held.block_size)
        tensor = torch.unflatten(run, -1, (held.block_size, width))
    elif "KD" in dims:
        tensor = tensor.narrow(-1, before, width)
    elif "HD" in left:
        tensor, left = torch.unflatten(tensor, -1, (held.heads, width)), [*left[:-1], "H", "D"]
    elif left[-2:] == ["T", "P"]:
        tensor, left = tensor.flatten(-2), [*left[:-2], "P"]
    if "S" in left:
        at = left.index("S")
        tensor = torch.unflatten(tensor, at, (held.blocks, held.block_size))
        left[at : at + 1] = ["B", "T"]
    order = [letter for letter in "LBTHNnDP" if letter in left]
    tensor = tensor.permute([left.index(letter) for letter in order])
    sizes = dict(zip(order, tensor.shape, strict=True))
    return tensor.reshape(*(sizes.get(letter, 1) for letter in "LBTH"), -1)
