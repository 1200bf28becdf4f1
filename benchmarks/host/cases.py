# SPDX-License-Identifier: Apache-2.0
"""Cases: where the bytes lie on the device and on the host, and how many of them are moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from portakv_benchmarks.shared.shapes import Shape, in_words

#: A directions' name, as everywhere: from the device to the host, and back.
DIRECTIONS = ("d2h", "h2d")

LAYER_FIRST = "layer | kv block token head dim"  # paged, each layer an allocation of its own
BLOCK_FIRST = "block layer kv token head dim"  # all that a block holds lies together
POOL_BY_LAYER = "layer kv block token head dim"
CHUNK = "kv layer token (head dim)"

_LAYERS, _KV, _DIM, _BLOCK = 32, 2, 128, 16
_ITEM = 2  # bytes of an element
#: Slots of the device's cache for each token moved: sparse, as it is while a model runs.
_POOL = 4
#: Blocks of the host's pool for each block moved.
_HOST_POOL = 2


@dataclass(frozen=True, slots=True)
class Scene:
    """Layouts and ids of both sides.

    Attributes:
        run: bytes that lie together on both sides.
        heads: of 128 elements of 2 bytes, which make a row.
        cache: the device's layout.
        by: how the device's rows are named, ``slots`` or ``blocks`` of 16 tokens, at random.
        host: the host's layout.
        order: the host's block ids, ``consecutive`` or ``random``; ``dense`` is a chunk.
    """

    run: int
    heads: int
    cache: str
    by: str
    host: str
    order: str

    @property
    def row(self) -> int:
        """Bytes of one token in one plane."""
        return self.heads * _DIM * _ITEM

    @property
    def side(self) -> str:
        """The host's side: ``dense``, ``block-first random``."""
        where = {CHUNK: "", BLOCK_FIRST: "block-first ", POOL_BY_LAYER: "layer-first "}[self.host]
        return f"{where}{self.order}"

    @property
    def name(self) -> str:
        """``2 KB runs, block-first random``."""
        return f"{in_words(self.run)} runs, {self.side}"


@dataclass(frozen=True, slots=True)
class Case:
    """A scene with so many bytes; ``layers`` is 32, or less where the payload is small."""

    scene: Scene
    layers: int
    tokens: int

    @property
    def payload(self) -> int:
        """Bytes moved."""
        return self.layers * _KV * self.tokens * self.scene.row

    @property
    def runs(self) -> int:
        """Pieces that lie together on both sides."""
        return self.payload // self.scene.run

    @property
    def name(self) -> str:
        """The scene and the payload."""
        return f"{self.scene.name}, {in_words(self.payload)}"

    @property
    def on_device(self) -> Shape:
        """The device's side."""
        by_block = self.scene.by == "blocks"
        return self._shape(self.scene.cache, _BLOCK if by_block else 1, _POOL)

    @property
    def on_host(self) -> Shape:
        """The host's side."""
        pool = 1 if self.scene.order == "dense" else _HOST_POOL
        return self._shape(self.scene.host, _BLOCK, pool)

    def _shape(self, layout: str, block_size: int, pool: int) -> Shape:
        return Shape(
            name=self.name, model="none", source="benchmarks/host/cases.py", cache=layout,
            chunk=CHUNK, layers=self.layers, heads=self.scene.heads, dim=_DIM, dtype="float16",
            block_size=block_size, tokens=self.tokens, kv=_KV, pool=pool,
        )  # fmt: skip


#: What a host's side can be: a chunk, a pool block by block, a pool layer by layer.
_HOSTS = (
    (CHUNK, "dense"),
    (BLOCK_FIRST, "consecutive"),
    (BLOCK_FIRST, "random"),
    (POOL_BY_LAYER, "random"),
)
#: Runs of a whole block.
_WHOLE_BLOCKS = tuple(
    Scene(_LAYERS * _KV * _BLOCK * 2048, 8, BLOCK_FIRST, "blocks", BLOCK_FIRST, order)
    for order in ("consecutive", "random")
)


def _scenes(host: str, order: str) -> Sequence[Scene]:
    """The scenes of a host side: runs of one row, by random slots; and of one block in a plane."""
    sides = host, order
    return (
        *(Scene(256 * n, n, LAYER_FIRST, "slots", *sides) for n in (1, 8, 32)),
        Scene(_BLOCK * 2048, 8, LAYER_FIRST, "blocks", *sides),
    )


#: The host sides that caches have first, since time may run out.
SCENES: tuple[Scene, ...] = (
    *(one for host in _HOSTS[:-1] for one in _scenes(*host)),
    *_WHOLE_BLOCKS,
    *_scenes(*_HOSTS[-1]),
)


def scene(run: int, host: str = CHUNK, order: str = "dense") -> Scene:
    """The scene of the grid with these runs and this host side."""
    return next(s for s in SCENES if (s.run, s.host, s.order) == (run, host, order))


def case_of(scene: Scene, payload: int) -> Case | None:
    """The case of exactly so many bytes; None where whole tokens or blocks do not make them."""
    together = scene.by == "blocks" or scene.order != "dense"
    unit = _BLOCK if together else 1
    layers = _LAYERS
    while layers:
        each = layers * _KV * scene.row
        if payload % (unit * each) == 0:
            break
        layers //= 2
    spread = scene.cache == BLOCK_FIRST and layers < _LAYERS  # its runs would be shorter
    return None if not layers or spread else Case(scene, layers, payload // each)


def cases(scenes: Sequence[Scene], payloads: Sequence[int]) -> list[Case]:
    """Every payload of every scene that there is."""
    found = [case_of(scene, payload) for scene in scenes for payload in payloads]
    return [case for case in found if case is not None]
