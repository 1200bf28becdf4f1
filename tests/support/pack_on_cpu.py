# SPDX-License-Identifier: Apache-2.0
"""The kernels that pack and unpack, compiled by g++ and run on host tensors by the code of `cuda`;
and blocks of rows whose slots an oracle knows."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.backends.base import Capabilities, Decision
from portakv.backends.cuda import Cuda
from portakv.backends.pack_kernel import PACKS, UNPACKS
from portakv.backends.rows_launch import RowsBackend
from portakv.layout.encodings import Pack
from portakv_conformance.draw.planes import EDGES, at_edge, every_pattern, usual
from portakv_conformance.judge.slots import SlotShape, packed_slot, usual_slot
from portakv_conformance.vendor.hip_emulated import WARPS
from support.cuda_on_cpu import HOST_PLACES, HostDriver, compiled, why_not

_HEAD = f'#include "{WARPS}"\n'
_ENTRIES = """
extern "C" int run_kernel(
    const void* argument, unsigned blocks, unsigned threads, int backwards) {{
    return run_warps<Argument>({name}, argument, blocks, threads, backwards);
}}
extern "C" unsigned argument_bytes() {{ return sizeof(Argument); }}
"""
_BOUNDS = re.compile(r"PORTAKV_BOUNDS\(\d+, \d+\) ")


class HostPackDriver(HostDriver):
    """A driver of the host that also runs kernels whose lanes exchange values.

    ``backwards``: the lanes of a warp run from the last to the first. ``text`` are replacements in
    the kernel's text.
    """

    backwards = False
    launched = 0  # kernels that pack or unpack, of all objects
    text: tuple[tuple[str, str], ...] = ()

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        (name, *others) = names
        if name not in (PACKS, UNPACKS):
            return super().load(source, (name, *others))
        for old, new in self.text:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        library = compiled(_HEAD + _BOUNDS.sub("", source), _ENTRIES.format(name=name))
        return {name: library}

    def run(
        self, function: Any, blocks: int, planes: int, _z: int, threads: int, *rest: Any
    ) -> None:
        if isinstance(function, tuple):
            super().run(function, blocks, planes, _z, threads, *rest)
            return
        argument = ctypes.c_void_p(rest[-2][0])
        apart = function.run_kernel(argument, blocks, threads, self.backwards)
        HostPackDriver.launched += 1
        assert not apart, "threads of a warp or a block wait in different places"


class PackOnCpu(Cuda):
    """`cuda` on the host."""

    name = "pack-on-cpu"
    #: The driver of the next object.
    driver: type[HostPackDriver] = HostPackDriver

    def __init__(self, device: torch.device) -> None:
        RowsBackend.__init__(self, device, self.driver())

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        why = why_not()
        if device.type != "cpu":
            why = f"it runs on the host, not on {device}"
        return Decision(cls.name, why is None, why or "g++ compiles the kernels")

    def capabilities(self) -> Capabilities:
        can = super().capabilities()
        return Capabilities(HOST_PLACES, skips_negative=True, guards=True, encodings=can.encodings)


@dataclass(frozen=True)
class Rows:
    """Blocks of rows: their extents, their layout, and how they are packed."""

    tokens: int
    dim: int
    heads: int = 2
    layers: int = 2
    kv: int = 2
    layout: str = "layer | kv block token head dim"
    bits: int = 4
    slot: int | None = None

    @property
    def shape(self) -> SlotShape:
        """Return the sizes of a slot."""
        shape = usual_slot(self.tokens * self.dim, self.bits)
        return shape if self.slot is None else SlotShape(shape.values, self.bits, self.slot)

    @property
    def planes(self) -> int:
        """Return the planes of a block."""
        return self.layers * self.kv * self.heads

    def values(self, most: int = 64) -> np.ndarray:
        """Return planes ``[blocks, planes, values]``: those at the edges of the format, usual ones,
        and at most ``most`` that have every pattern."""
        shape = self.shape
        planes = [at_edge(kind, shape) for kind in EDGES]
        planes += [usual(7, number, shape.values) for number in range(4)]
        patterns = min(most, 65536 // shape.values)
        planes += [every_pattern(number, shape.values) for number in range(patterns)]
        planes += planes[: -len(planes) % self.planes]
        return np.stack(planes).reshape(-1, self.planes, shape.values)

    def slots(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots ``[blocks, planes, bytes]`` of planes, and True for each that
        overflows."""
        pairs = [packed_slot(plane, self.shape) for plane in values.reshape(-1, values.shape[-1])]
        slots = np.stack([slot for slot, _ in pairs]).reshape(*values.shape[:2], -1)
        return slots, np.array([flag for _, flag in pairs]).reshape(values.shape[:2])

    def tensors(self, values: np.ndarray, device: torch.device) -> list[torch.Tensor]:
        """Return the tensors of the layout, one for each layer, that hold planes."""
        axes = ("block", "layer", "kv", "head", "token", "dim")
        sizes = (-1, self.layers, self.kv, self.heads, self.tokens, self.dim)
        logical = torch.from_numpy(values.view(np.int16)).view(sizes)
        words = self.layout.replace("(", "").replace(")", "").replace("|", "").split()
        # An axis that the layout does not name has one step.
        one_step = [axis for axis in axes if axis not in words]
        order = [axes.index(word) for word in (*words, *one_step)]
        moved = logical.permute(order).flatten(len(words) - 1)
        assert words[0] == "layer"
        result = []
        for layer in moved:
            extents = [*layer.shape]
            if "(" in self.layout:
                extents[-2:] = [-1]
            one = layer.reshape(extents).contiguous().to(device)
            result.append(one.view(torch.bfloat16))
        return result

    def raw_view(self, tensors: list[torch.Tensor]) -> KVView:
        """Return the view of such tensors."""
        fused: dict[str, Any] = {"kv": self.kv} if "(kv" in self.layout else {}
        return KVView(tensors, self.layout, **fused)

    def packed_view(self, slots: torch.Tensor) -> KVView:
        """Return the view of slots ``[blocks, planes, bytes]``."""
        extents = (-1, self.layers, self.kv, self.heads, self.shape.slot_bytes)
        return KVView(
            slots.view(extents),
            "block layer kv head page",
            kv=self.kv,
            layers=self.layers,
            heads=self.heads,
            dim=self.dim,
            block_size=self.tokens,
            encoding=Pack(self.bits, self.slot),
        )


def by_block(tensors: list[torch.Tensor], rows: Rows) -> Iterator[torch.Tensor]:
    """Yield the bytes of each tensor by block, ``[blocks, ...]``."""
    words = rows.layout.replace("(", "").replace(")", "").replace("|", "").split()[1:]
    at = words.index("block")
    for tensor in tensors:
        yield tensor.view(torch.int16).movedim(at, 0)
