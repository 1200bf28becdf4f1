# SPDX-License-Identifier: Apache-2.0
"""The oracle of hybrid caches: memory of groups of layers in which each byte is known.

A row is a number that its token and all tokens before it give. Its bytes are a hash of that number,
the group, the layer, the head and the byte. They are placed by strides of numpy alone, so nothing
here believes what a layout says. Groups have rows by head, latent rows, rows of an indexer, or
states; quantized rows have scales. Each rank has its heads of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.serving import Group
from portakv.serving.local import GroupView
from portakv.storage.form import Range
from portakv.view import KVView

LAYERS = 2
#: Heads of the model; groups of heads of Mamba 2, and heads of some attention.
HEADS = 4
FEW = 2
#: Rows of the state of a convolution.
STEPS = 3
#: Bytes of a scale.
SCALE = 4
#: Bytes of memory that nothing has written.
SPOILED = 251
#: The multiplier of a hash.
ODD = np.uint64(0x9E3779B97F4A7C15)
SHIFTS = np.array([30, 27, 31], np.uint64)

Bytes = npt.NDArray[np.uint8]
Memory = Callable[[int], torch.Tensor]
#: The blocks of rows, and their places in these; of states the blocks alone.
Places = tuple[Sequence[int], ...]


class Part(NamedTuple):
    """How one view reads a group: all of it, or a part of its states.

    Attributes:
        widths: bytes of each plane of a row: keys and values, or values and scales.
        heads: of the model, which ranks divide; 0: one row that all ranks have.
        order: of a block in memory. "apart": each plane has its tensors. "planes": the first
            plane of all tokens, then the next one. "ranks": a rank has its heads as one row.
        dtype: of the numbers of a page.
        steps: rows of a state.
    """

    widths: tuple[int, ...]
    heads: int = 0
    order: Literal["token head", "head token", "apart", "planes", "ranks"] = "token head"
    dtype: torch.dtype = torch.uint8
    steps: int = 1

    def heads_of(self, rank: int, ranks: int) -> range:
        """Return the heads that a rank has: several ranks have the same if there are few."""
        if not self.heads:
            return range(1)
        first = rank * self.heads // ranks
        return range(first, first + max(1, self.heads // ranks))


class Kind(NamedTuple):
    """A group of layers of a family.

    Attributes:
        terms: of its `Group`, without the size of a block: "window" and "chunk" are drawn.
        rows: how it lies in memory: a name in `PARTS`.
        tokens: of a row, as compressed caches have them.
    """

    rows: str
    terms: Mapping[str, Any] = MappingProxyType({})
    tokens: int = 1


#: The groups of each family of models.
FAMILIES: dict[str, list[Kind]] = {
    "GDN hybrid": [Kind("gdn", {"states": "told"}), Kind("heads")],
    "Mamba 2 hybrid": [
        Kind("mamba 2", {"states": "last"}),
        Kind("mamba 2", {"states": "last"}),
        Kind("heads"),
    ],
    "states at all blocks": [Kind("replicated", {"states": "every"}), Kind("heads")],
    "window + full": [Kind("heads", {"window": True}), Kind("heads")],
    "chunked + full": [Kind("heads", {"chunk": True}), Kind("heads")],
    "MLA + indexer": [Kind("latent"), Kind("index")],
    "MLA, its indexer in the group": [Kind("indexed")],
    "MLA window compressed": [
        Kind("compressed", {"window": True}),
        Kind("compressed", tokens=2),
        Kind("index"),
    ],
    "windows alone": [Kind("heads", {"window": True})],
    "windows and states": [
        Kind("heads", {"window": True}),
        Kind("undivided", {"states": "last"}),
        Kind("heads"),
    ],
}
#: Families whose states a rank has in one piece: other numbers of ranks do not find them.
UNDIVIDED = ("windows and states",)


def rows_by_head(chance: random.Random, quantized: bool) -> list[Part]:
    """Return keys and values; quantized with a scale for each token and head, in the row or in
    tensors of their own, or with one outside of the cache."""
    heads = chance.choice([HEADS, FEW])
    order: Any = chance.choice(["token head", "head token"])
    if not quantized:
        return [Part((8, 8), heads, order, torch.bfloat16)]
    scaled = Part((12, 12), heads, order)
    apart = Part((8, 8, 4, 4), heads, "apart")
    return [chance.choice([scaled, apart, Part((8, 8), heads, order)])]


def states_of(*parts: Part) -> Callable[[random.Random, bool], list[Part]]:
    """Return a function that returns parts of states, which no engine quantizes."""
    return lambda chance, quantized: [*parts]


def either(raw: Part, quantized: Part) -> Callable[[random.Random, bool], list[Part]]:
    """Return a function that returns one of two parts."""
    return lambda chance, is_quantized: [quantized if is_quantized else raw]


def both(*names: str) -> Callable[[random.Random, bool], list[Part]]:
    """Return what draws the parts of several rows in one group."""
    return lambda chance, quantized: [
        part for name in names for part in PARTS[name](chance, quantized)
    ]


#: By the name of rows, how a group lies in memory.
PARTS: dict[str, Callable[[random.Random, bool], list[Part]]] = {
    "heads": rows_by_head,
    "latent": either(Part((24,), dtype=torch.bfloat16), Part((512, 16, 128))),  # fp8_ds_mla
    "index": either(Part((16,), dtype=torch.bfloat16), Part((128, 4), order="planes")),
    "indexed": both("latent", "index"),
    "compressed": either(Part((24,), dtype=torch.bfloat16), Part((576, 8), order="planes")),
    "gdn": states_of(Part((4,), HEADS, steps=STEPS), Part((16,), HEADS, dtype=torch.float32)),
    "mamba 2": states_of(
        Part((4,), HEADS, steps=STEPS), Part((8,), FEW, steps=STEPS), Part((16,), HEADS)
    ),
    "replicated": states_of(Part((24,))),
    "undivided": states_of(Part((8,), HEADS, "ranks")),
}


class Rows:
    """The memory of a group in one rank, by parts.

    Args:
        number: of the group.
        blocks: how many there are.
        whole: blocks are pages that nothing looks into, as one worker stores them.
        memory: returns so many bytes, uint8.

    Attributes:
        views: of each part, as `forms_of` takes them.
        heads: of each view those of the model's; None: all.
    """

    def __init__(
        self,
        number: int,
        kind: Kind,
        group: Group,
        parts: Sequence[Part],
        blocks: int,
        rank: int = 0,
        ranks: int = 1,
        whole: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self._parts = parts
        self._number = number
        self._tokens = kind.tokens
        self._size = 1 if group.states else group.block_size // kind.tokens
        self._heads = [part.heads_of(rank, ranks) for part in parts]
        self.planes = list[list[Bytes]]()
        self.views = list[GroupView]()
        self.heads = list[Range | None]()
        for part, heads in zip(parts, self._heads, strict=True):
            size = part.steps if group.states else self._size
            opaque = whole and not group.states and part.order != "apart"
            view, planes = lay_out(part, blocks, size, len(heads), opaque, memory or spoiled)
            if group.states:  # the rows of a state are one, of each head
                planes = [plane.swapaxes(2, 3) for plane in planes]
            tokens = group.block_size if opaque else kind.tokens
            notes = f"part {len(self.views)}"
            self.planes.append(planes)
            self.views.append(GroupView(view, notes, None if group.states else tokens, number))
            window = (heads.start, heads.stop, part.heads) if part.heads else None
            self.heads.append((rank, rank + 1, ranks) if part.order == "ranks" else window)

    def places(self, blocks: Sequence[int], tokens: range) -> tuple[Places, list[int]]:
        """Return where the rows of tokens are in the blocks of a request, and after how many tokens
        each of them is."""
        ends = [token + 1 for token in tokens if (token + 1) % self._tokens == 0]
        rows = [end // self._tokens - 1 for end in ends]
        ids = [blocks[row // self._size] for row in rows]
        assert -1 not in ids, "a row has no block"
        return (ids, [row % self._size for row in rows]), ends

    def write(self, places: Places, rows: Sequence[int]) -> None:
        """Write rows, or states, to their places."""
        for plane, known in self._pairs(rows):
            shape = (LAYERS, len(rows), *plane.shape[1 + len(places) :])
            plane[of_all_layers(places)] = known.reshape(shape)

    def wrong(self, places: Places, rows: Sequence[int]) -> list[str]:
        """Return which parts of rows, or states, are not the right ones."""
        found = list[str]()
        for plane, known in self._pairs(rows):
            here = plane[of_all_layers(places)].reshape(known.shape)
            if not np.array_equal(here, known):
                layer, row, head, _ = np.argwhere(here != known)[0]
                found.append(f"row {row}, layer {layer}, head {head} of the rank")
        return found

    def spoil(self, places: Places = ()) -> None:
        """Write other bytes to places; (): everywhere."""
        for planes in self.planes:
            for plane in planes:
                plane[of_all_layers(places)] = SPOILED

    def is_spoiled(self) -> bool:
        """Return whether nothing has been written since `spoil`."""
        return all(bool((plane == SPOILED).all()) for some in self.planes for plane in some)

    def _pairs(self, rows: Sequence[int]) -> Iterator[tuple[Bytes, Bytes]]:
        """Yield each plane of the memory, and what rows have there, ``[layers, rows, heads,
        bytes]``."""
        for at, (part, planes) in enumerate(zip(self._parts, self.planes, strict=True)):
            nbytes = part.steps * sum(part.widths)
            known = bytes_of((*rows,), self._number << 4 | at, max(1, part.heads), nbytes)
            heads = self._heads[at]
            first = 0
            for plane, width in zip(planes, part.widths, strict=True):
                past = first + part.steps * width
                yield plane, known[:, :, heads.start : heads.stop, first:past]
                first = past


def of_all_layers(places: Places) -> Any:
    """Return the index of places in a plane."""
    return (slice(None), *places)


def spoiled(nbytes: int) -> torch.Tensor:
    """Return memory that nothing has written."""
    return torch.full((nbytes,), SPOILED, dtype=torch.uint8, device="cpu")


def lay_out(
    part: Part, blocks: int, size: int, heads: int, whole: bool, memory: Memory
) -> tuple[KVView, list[Bytes]]:
    """Return memory of blocks of so many rows and heads: what the library makes of it, and its
    planes, uint8 ``[layers, blocks, rows, heads, bytes]``."""
    widths = part.widths
    wide = sum(widths)
    if part.order == "apart":
        shape = (LAYERS, blocks, size, heads)
        made = [memory(int(np.prod(shape)) * width).view(*shape, width) for width in widths]
        kinds = [torch.uint8 if width > SCALE else torch.float32 for width in widths]
        typed = [each.view(kind) for each, kind in zip(made, kinds, strict=True)]
        layers = [[each[layer] for each in typed] for layer in range(LAYERS)]
        view = KVView(layers, "layer kv | block token head dim", kv=len(widths))
        return view, [each.numpy() for each in made]
    raw = memory(LAYERS * blocks * size * heads * wide)
    pages = raw.view(LAYERS, blocks, -1)
    cuts = np.cumsum(widths)[:-1]
    if part.order == "planes":
        ends = [size * end for end in (0, *np.cumsum(widths).tolist())]
        some = [pages.numpy()[:, :, first:past] for first, past in pairwise(ends)]
        planes = [x.reshape(LAYERS, blocks, size, 1, -1) for x in some]
        layout = "layer | block (kv token dim)"
        tensors = pages
    elif part.order == "head token":
        tensors = raw.view(LAYERS, blocks, heads, size, wide)
        planes = np.split(tensors.numpy().swapaxes(2, 3), cuts, axis=4)
        layout = "layer | block head token (kv dim)"
    else:
        tensors = raw.view(LAYERS, blocks, size, heads, wide)
        planes = np.split(tensors.numpy(), cuts, axis=4)
        layout = "layer | block token head (kv dim)"
    if part.order == "ranks":
        tensors = raw.view(LAYERS, blocks, size, 1, heads * wide)
        widths = (heads * wide,)
    if whole:
        return KVView([*pages.unsqueeze(2)], "layer | block token dim"), planes
    dims = tuple(width // part.dtype.itemsize for width in widths)
    layers = [each.view(part.dtype) for each in tensors]
    return KVView(layers, layout, block_size=size, kv=len(dims), dim=dims), planes


@lru_cache(64)  # of all ranks, one after the other
def bytes_of(rows: tuple[int, ...], name: int, heads: int, nbytes: int) -> Bytes:
    """Return the bytes of rows, uint8 ``[layers, rows, heads, bytes]``: a hash of all of these.

    ``name``: of the group and its part.
    """
    words = -(-nbytes // 8)
    seeds = np.array([row % (1 << 64) for row in rows], np.uint64)
    mixed = seeds[None, :, None, None] ^ counters(name, heads, words)
    for shift in SHIFTS:
        mixed ^= mixed >> shift
        mixed *= ODD
    return mixed.view(np.uint8)[..., :nbytes]


@lru_cache
def counters(name: int, heads: int, words: int) -> npt.NDArray[np.uint64]:
    """Return numbers that differ for each word of the bytes of a row, ``[layers, 1, heads,
    words]``."""
    layer, head, word = np.ogrid[:LAYERS, :heads, :words]
    numbers = ((name << 8 | layer) << 8 | head) << 16 | word
    made: npt.NDArray[np.uint64] = (numbers.astype(np.uint64) * ODD)[:, None]
    return made
