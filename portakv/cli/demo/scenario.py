# SPDX-License-Identifier: Apache-2.0
"""The demo's second part, what is moved: the founding scenario, as tensors on a device."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

#: What destinations hold before a copy; random bits do not repeat it.
POISON = 0x5A5AC3C35A5AC3C3


@dataclass(frozen=True)
class Scenario:
    """Paged caches ``[2, blocks, block_size, heads, dim]`` in fp16, and what is moved of them."""

    layers: int = 32
    tokens: int = 128
    heads: int = 32
    dim: int = 128
    block_size: int = 16
    blocks: int = 32
    full_layers: int = 0  # before `fitted` took some away; 0: ``layers``

    @property
    def slots(self) -> int:
        """Tokens that the pool has room for."""
        return self.blocks * self.block_size

    @property
    def payload(self) -> int:
        """Bytes that one copy moves."""
        return self.layers * 2 * self.tokens * self.heads * self.dim * 2

    @property
    def pool(self) -> int:
        """Bytes of the paged caches."""
        return self.payload // self.tokens * self.slots

    @property
    def needed(self) -> int:
        """Bytes of memory that the demo takes: two pools, three chunks, and what checks take."""
        return 2 * self.pool + 3 * self.payload + 4 * self.pool // self.layers

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        full = self.full_layers or self.layers
        fixed = {"full_layers": full, "dtype": "float16", "payload_bytes": self.payload}
        return asdict(self) | fixed


#: The scenario that PortaKV was begun for.
FOUNDING = Scenario()


def fitted(scenario: Scenario, free: int | None) -> Scenario:
    """The scenario with as few layers as it takes to need at most half of ``free`` bytes."""
    layers = scenario.layers
    while free is not None and layers > 1 and replace(scenario, layers=layers).needed > free // 2:
        layers //= 2
    full = scenario.layers if layers < scenario.layers else 0
    return replace(scenario, layers=layers, full_layers=full)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None if the system does not tell."""
    if device.type != "cpu":
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        return int(ask(device)[0]) if ask else None
    told = [free for free in (_machine_free(), _group_free()) if free is not None]
    return min(told) if told else None


def _machine_free() -> int | None:
    """What Linux could hand out, page cache included; elsewhere nothing is known."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _group_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process's control group may still take: a container's limit is not in meminfo."""
    with suppress(OSError, ValueError):  # without a limit the file says "max"
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    return None


class Founding:
    """A scenario's tensors.

    Attributes:
        pool: the paged caches that are read: for each layer fp16 ``[2, blocks, block_size, heads,
            dim]`` of random bits, NaN patterns included.
        target: paged caches of the same shape that are written.
        chunk: a dense chunk ``[2, layers, tokens, heads * dim]`` that is written.
        stored: a chunk of random bits that is read.
        slots: where tokens lie, in random order, int64 on the device, as an engine has them.
        blocks: ids of blocks, the same way.
        slots_of_blocks: the slots of these blocks' tokens, by plain arithmetic.
    """

    def __init__(self, device: torch.device, scenario: Scenario) -> None:
        self.device, self.scenario = device, scenario
        s = scenario
        draw = torch.Generator().manual_seed(0)
        paged = (2, s.blocks, s.block_size, s.heads, s.dim)
        self.pool = [_random_bits(paged, draw).to(device) for _ in range(s.layers)]
        self.target = [torch.empty_like(layer) for layer in self.pool]
        dense = (2, s.layers, s.tokens, s.heads * s.dim)
        self.stored = _random_bits(dense, draw).to(device)
        self.chunk = torch.empty_like(self.stored)
        self.slots = torch.randperm(s.slots, generator=draw)[: s.tokens].to(device)
        drawn = torch.randperm(s.blocks, generator=draw)
        self.blocks = drawn[: s.tokens // s.block_size].to(device)
        within = torch.arange(s.block_size, device=device)
        self.slots_of_blocks = (self.blocks[:, None] * s.block_size + within).flatten()

    def poison(self) -> None:
        """Fill both destinations with what no copy would leave."""
        for tensor in (*self.target, self.chunk):
            tensor.view(torch.int64).fill_(POISON)

    def wrong_in_chunk(self, slots: torch.Tensor) -> int:
        """Bytes of ``chunk`` that are not the rows of ``pool`` at ``slots``."""
        expected = (cache.flatten(1, 2)[:, slots].flatten(2) for cache in self.pool)
        return sum(_differing(self.chunk[:, layer], rows) for layer, rows in enumerate(expected))

    def wrong_in_target(self, slots: torch.Tensor) -> int:
        """Bytes of ``target`` that are not the rows of ``stored`` at ``slots``, and poison else."""
        wrong = 0
        for layer, cache in enumerate(self.target):
            found = cache.flatten(1, 2).flatten(2)
            expected = torch.empty_like(found)
            expected.view(torch.int64).fill_(POISON)
            expected[:, slots] = self.stored[:, layer]
            wrong += _differing(found, expected)
        return wrong


def _random_bits(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """fp16 of every bit pattern. Drawn on the CPU: the same on every device."""
    bits = torch.empty((*shape[:-1], shape[-1] // 4), dtype=torch.int64)
    return bits.random_(-(2**63), None, generator=draw).view(torch.float16)


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Bytes that differ, whatever numbers they spell."""
    if torch.equal(found.view(torch.int64), expected.view(torch.int64)):
        return 0
    return int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())
