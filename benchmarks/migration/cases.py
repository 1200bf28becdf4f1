# SPDX-License-Identifier: Apache-2.0
"""Caches as engines arrange them, which rows cross between, and where each byte of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from portakv import KVView
from portakv.migrate import Shard, shared_empty
from portakv_benchmarks.shared.shapes import POISON, fill, moved

# tokens, of which every payload is a multiple
DTYPE = torch.bfloat16
UNIT = 16
#: For each arrangement the dimensions of a tensor after the layers, and the layout; `hnd` is read
#: in the order of `nhd`.
ARRANGED: Mapping[str, tuple[str, str]] = {
    "nhd": ("kbthd", "layer | kv block token head dim"),
    "hnd": ("kbhtd", "layer | kv block token head dim"),
    "pages": ("bkthd", "layer | block kv token head dim"),
    "flexkv": ("blkthd", "block layer kv token head dim"),
    "mla": ("btd", "layer | block token dim"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """The sharding of one model's rows at the owners and the reader; ``heads``: from which to which
    of the model's heads the reader has, and the number of the model's heads."""

    owner: str = "nhd"
    reader: str = "nhd"
    heads: tuple[int, int, int] = (0, 8, 8)
    blocks: tuple[int, int] = (16, 16)  # tokens
    layers: int = 32
    kv: int = 2
    dim: int = 128
    normal: bool = False  # values that are normally distributed, as `pack` takes them
    owners: int = 1  # processes, each of which has an equal share of the heads

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the reader for one token in one plane."""
        return (self.heads[1] - self.heads[0]) * self.dim * DTYPE.itemsize

    def tokens(self, nbytes: int) -> int:
        """Return the number of tokens with about so many bytes in the reader's cache."""
        return max(1, round(nbytes / (UNIT * self.layers * self.kv * self.row_bytes))) * UNIT

    def payload(self, nbytes: int) -> int:
        """Return the bytes of these tokens."""
        return self.tokens(nbytes) * self.layers * self.kv * self.row_bytes

    def owned(self, number: int) -> tuple[int, int, int]:
        """Return the window of an owner's heads, as `Shard` takes it."""
        whole = self.heads[2]
        share = whole // self.owners
        return number * share, (number + 1) * share, whole


USUAL = "vLLM to FlexKV"
BLOCKS = "blocks of 64 KB"
CASES: Mapping[str, Case] = {
    USUAL: Case(reader="flexkv"),
    "NHD to HND": Case(reader="hnd"),
    "2 of 8 heads": Case(heads=(2, 4, 8)),
    "rows of 256 B": Case(heads=(0, 1, 1)),
    "MLA, rows of 1152 B": Case("mla", "mla", (0, 1, 1), layers=61, kv=1, dim=576),
    "16 to 64 tokens a block": Case(blocks=(16, 64)),
    BLOCKS: Case("pages", "pages"),
}
TWO_OWNERS = "TP 2 to 1"
#: Rows of several owners, each with its share of the heads. The reader has all heads.
SEVERAL: Mapping[str, Case] = {
    TWO_OWNERS: Case(reader="flexkv", owners=2),
    "TP 4 to 1": Case(reader="flexkv", owners=4),
}
#: Also those that pulls of mapped memory are not measured with.
ALL_CASES: Mapping[str, Case] = {
    **CASES,
    **SEVERAL,
    "values as in caches": Case(reader="flexkv", normal=True),
}


def memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory that can be shared with another process."""
    if device.type == "cpu":
        return shared_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


class Cache:
    """The cache of an owner, or of a reader, that holds at least so many bytes of a case, or an
    owner's share of them; its tokens lie in blocks in an order that all sides know."""

    def __init__(
        self, case: Case, reading: bool, nbytes: int, device: torch.device, owner: int = 0
    ) -> None:
        self.case = case
        self.owner = owner
        self.size = case.blocks[reading]
        self.heads = case.heads if reading else case.owned(owner)
        heads = self.heads[1] - self.heads[0]
        used = -(-case.tokens(nbytes) // self.size)
        extents = {"l": case.layers, "k": case.kv, "b": used * 5 // 4 + 1, "t": self.size}
        extents |= {"h": heads, "d": case.dim}
        order, layout = ARRANGED[case.reader if reading else case.owner]
        count = 1 if "l" in order else case.layers
        shape = tuple(extents[axis] for axis in order)
        self.memory = [memory(shape, DTYPE, device) for _ in range(count)]
        tensors = [one.transpose(2, 3) for one in self.memory] if "ht" in order else self.memory
        view = KVView(tensors[0] if "l" in order else tensors, layout, block_size=self.size)
        self.shard = Shard(view, heads=self.heads)
        random = torch.Generator().manual_seed(1 + reading)
        self.ids = torch.randperm(extents["b"], generator=random)[:used]
        self.planes = [*self._planes(tensors, order)]
        self.device = device

    def _planes(self, tensors: list[torch.Tensor], order: str) -> list[torch.Tensor]:
        """Return the planes, layers outermost, as integers ``[blocks, tokens, heads, dim]``."""
        words = [one.view(torch.int16) for one in tensors]
        if order == "btd":
            return [one.unsqueeze(2) for one in words]
        if "l" in order:
            return [words[0][:, layer, kv] for layer in range(self.case.layers) for kv in (0, 1)]
        return [one.select(order.index("k"), kv) for one in words for kv in (0, 1)]

    def blocks(self, nbytes: int) -> torch.Tensor:
        """Return the ids of the blocks that hold so many bytes."""
        return self.ids[: -(-self.case.tokens(nbytes) // self.size)]

    def fill(self, salt: int) -> None:
        """Write words that differ from each other, and from those of other salts and owners."""
        for at, one in enumerate(self.memory):
            fill(one.view(-1).view(torch.int64), salt * 1000 + self.owner * 100 + at)
            if self.case.normal:
                _make_normal(one)

    def poison(self) -> None:
        """Overwrite every byte."""
        for one in self.memory:
            one.view(torch.uint8).fill_(POISON)

    def places(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block, and the place in it, of each token."""
        at = torch.arange(self.case.tokens(nbytes))
        places = self.ids[at // self.size], at % self.size
        return places[0].to(self.device), places[1].to(self.device)

    def has(self, sources: Sequence[Cache], nbytes: int) -> bool:
        """Return whether this cache holds these rows of all owners, and poison elsewhere.

        Overwrite the compared rows with poison.
        """
        into = self.places(nbytes)
        same = []
        for source in sources:
            first = max(self.heads[0], source.heads[0])
            past = min(self.heads[1], source.heads[1])
            remote = source.planes_of(first, past)
            same.append(moved(remote, source.places(nbytes), self.planes_of(first, past), into))
        word = int.from_bytes([POISON] * 2, "big", signed=True)
        rest = [(one.view(torch.int16) == word).all() for one in self.memory]
        return bool(torch.stack([*same, *rest]).all())

    def planes_of(self, first: int, past: int) -> list[torch.Tensor]:
        """Return the planes of some of the model's heads, which this cache has."""
        start = self.heads[0]
        return [plane[:, :, first - start : past - start] for plane in self.planes]


def _make_normal(rows: torch.Tensor) -> None:
    """Replace the exponents of rows by those of normally distributed values; signs and mantissas
    stay."""
    random = torch.Generator().manual_seed(len(rows))
    exponents = torch.randn(1 << 15, generator=random).to(DTYPE).view(torch.int16) & 0x7F80
    bits = rows.view(torch.int16).view(-1, len(exponents))
    bits.bitwise_and_(~0x7F80).bitwise_or_(exponents.to(rows.device))
