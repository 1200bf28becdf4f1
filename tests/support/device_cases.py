# SPDX-License-Identifier: Apache-2.0
"""Caches and chunks on a device, and their expected content, computed in bytes on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Transfer
from portakv_conformance import simdev
from support.guarded_memory import filled, storages

LAYERS = 3
BLOCKS = 6
SIZE = 4
HEADS = 2
DIM = 16
SLOTS = BLOCKS * SIZE
DEVICE = torch.device("cuda", 0)
STORE = pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
SIDE = pytest.mark.parametrize("side", [True, False], ids=["side stream", "current stream"])
LONG = 400_000_000  # clock cycles, a fifth of a second
KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


def current(device: torch.device) -> torch.Stream:
    """Return the current stream of a device."""
    stream: torch.Stream = torch.get_device_module(device).current_stream(device)
    return stream


def on(stream: torch.Stream) -> Any:
    """Make a stream the current one."""
    return torch.get_device_module(stream.device).stream(stream)


def settle(device: torch.device) -> None:
    """Wait for the end of everything that was enqueued on a device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def delay(stream: torch.Stream, cycles: int = LONG) -> None:
    """Keep a stream busy for longer than any small copy takes, or for so many clock cycles."""
    if stream.device.type == "cuda":
        with on(stream):
            torch.cuda._sleep(cycles)
    else:
        simdev.delay(stream, 5)


def make_caches(
    dtype: torch.dtype = torch.float16, device: torch.device = DEVICE
) -> list[torch.Tensor]:
    """Return a list over layers of ``(2, BLOCKS, SIZE, HEADS, DIM)``."""
    return [filled((2, BLOCKS, SIZE, HEADS, DIM), dtype, device=device) for _ in range(LAYERS)]


def make_chunk(
    tokens: int, dtype: torch.dtype = torch.float16, device: torch.device | str = DEVICE
) -> torch.Tensor:
    """Return a chunk ``[2, LAYERS, tokens, HEADS * DIM]``."""
    return filled((2, LAYERS, tokens, HEADS * DIM), dtype, device=device)


def host_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host with bytes as elements: ``[..., n]`` becomes ``[..., n *
    itemsize]``."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).clone()


def gathered(
    caches: Sequence[torch.Tensor], chunk: torch.Tensor, slots: Sequence[int]
) -> torch.Tensor:
    """Return the chunk's bytes after ``slots`` were stored; invalid slots leave it unchanged."""
    result = host_bytes(chunk)
    for layer, cache in enumerate(caches):
        rows = host_bytes(cache).reshape(2, SLOTS, -1)
        for position, slot in enumerate(slots):
            if 0 <= slot < SLOTS:
                result[:, layer, position] = rows[:, slot]
    return result


def scattered(
    caches: Sequence[torch.Tensor], chunk: torch.Tensor, slots: Sequence[int]
) -> list[torch.Tensor]:
    """Return the caches' bytes after a chunk was loaded to ``slots``."""
    rows = host_bytes(chunk)
    result = []
    for layer, cache in enumerate(caches):
        whole = host_bytes(cache)
        flat = whole.view(2, SLOTS, -1)
        for position, slot in enumerate(slots):
            if 0 <= slot < SLOTS:
                flat[:, slot] = rows[:, layer, position]
        result.append(whole)
    return result


def holds(actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Return True if tensors have the wanted bytes."""
    return all(torch.equal(host_bytes(x), y) for x, y in zip(actual, wanted, strict=True))


def check(actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    """Check that tensors hold the wanted bytes, and that their canaries are whole."""
    assert holds(actual, wanted)
    for tensor in actual:
        check_canaries(tensor)


def check_canaries(tensor: torch.Tensor) -> None:
    """Check that the bytes around a tensor made by `filled`, if it lies among such, are
    unchanged."""
    whole = next(iter(storages(tensor).values()))
    if len(whole) == tensor.nbytes:  # a pinned copy of one
        return
    start = tensor.storage_offset() * tensor.itemsize
    pristine = filled((tensor.numel(),), tensor.dtype)
    around = next(iter(storages(pristine).values()))
    end = start + tensor.numel() * tensor.itemsize
    assert torch.equal(whole[:start], around[:start])
    assert torch.equal(whole[end:], around[end:])


class Rig:
    """Caches on a device that a connector has registered, and chunks and ids for it."""

    def __init__(self, device: torch.device = DEVICE, backend: str | None = None) -> None:
        self.device = device
        self.caches = make_caches(device=device)
        self.connector = AdaptiveConnector(device, backend)
        self.connector.register_kv_caches(self.caches)

    def chunk(self, tokens: int = 5, place: str = "device") -> torch.Tensor:
        """Return a chunk on the device, or in memory of the host that is ``pinned`` or
        ``pageable``."""
        chunk = make_chunk(tokens, device=self.device if place == "device" else "cpu")
        return chunk.pin_memory() if place == "pinned" else chunk

    def ids(self, slots: Sequence[int], place: str = "device") -> torch.Tensor:
        """Return slots on the device or on the ``host``."""
        return torch.tensor(slots, device="cpu" if place == "host" else self.device)

    def move(self, store: bool, *arguments: Any, **options: Any) -> Transfer:
        """Store to a chunk, or load it."""
        return (self.connector.from_gpu if store else self.connector.to_gpu)(*arguments, **options)

    def wanted(self, store: bool, chunk: torch.Tensor, slots: Sequence[int]) -> list[torch.Tensor]:
        """Return the expected content of the chunk, or of the caches, in bytes."""
        compute = gathered if store else scattered
        bytes_ = compute(self.caches, chunk, slots)
        return [bytes_] if isinstance(bytes_, torch.Tensor) else bytes_

    def targets(self, store: bool, chunk: torch.Tensor) -> list[torch.Tensor]:
        return [chunk] if store else self.caches

    def delayed(self) -> torch.Stream:
        """Return a stream that is busy, with nothing else under way."""
        stream = torch.Stream(self.device)
        settle(self.device)
        delay(stream)
        return stream
