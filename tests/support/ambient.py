# SPDX-License-Identifier: Apache-2.0
"""The settings of torch that an engine may have changed before it calls the library, and every kind
of call judged on caches that were made before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from portakv import AdaptiveConnector, Index, KVView, copy_blocks, copy_rows, copy_runs
from support.connector_cases import KV_LAYOUT, LAYERS, SLOTS, make_caches, make_chunk

State = Callable[[torch.device], AbstractContextManager[object]]


def _set(change: Callable[[Any], object], value: Any, before: Any) -> State:
    """Return a state that a setter of torch begins and ends."""

    @contextmanager
    def state(device: torch.device) -> Iterator[None]:
        change(device if value == "own" else value)
        try:
            yield
        finally:
            change(before)

    return state


@contextmanager
def _another_current_device(device: torch.device) -> Iterator[None]:
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        pytest.skip("there is one device")
    with torch.get_device_module(device).device(1 - (device.index or 0)):
        yield


@contextmanager
def _warnings_as_errors(device: torch.device) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


STATES: dict[str, State] = {
    "default device meta": _set(torch.set_default_device, "meta", None),
    "default device own": _set(torch.set_default_device, "own", None),
    "with torch.device meta": lambda device: torch.device("meta"),
    "default dtype bfloat16": _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference mode": lambda device: torch.inference_mode(),
    "no grad": lambda device: torch.no_grad(),
    "autocast": lambda device: torch.autocast(
        device.type if device.type == "cuda" else "cpu", dtype=torch.bfloat16
    ),
    # What torch.use_deterministic_algorithms calls, which imports all of inductor before.
    "deterministic algorithms": _set(torch._C._set_deterministic_algorithms, True, False),
    "another current device": _another_current_device,
    "one thread": _set(torch.set_num_threads, 1, torch.get_num_threads()),
    "number of threads": _set(
        torch.set_num_threads, 3 if torch.get_num_threads() != 3 else 2, torch.get_num_threads()
    ),
    "warnings as errors": _warnings_as_errors,
}


class Scene:
    """Caches, a chunk and ids on a device and on the host, made before the state begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.caches = make_caches(dtype=torch.int16, device=device)
        self.empty = [torch.zeros_like(cache) for cache in self.caches]
        host = [torch.zeros_like(cache, device="cpu") for cache in self.caches]
        self.host = [one.pin_memory() for one in host] if device.type != "cpu" else host
        self.slots = torch.tensor([9, 2, 17, 6, 0, 23], dtype=torch.int64, device="cpu")
        self.on_device = self.slots.to(device)
        self.chunk = make_chunk(len(self.slots), torch.int16, device)
        # numpy compares: torch's own functions are under the state as well.
        self.wanted = _blocks(self.caches)
        self.gathered = _rows(self.caches)[:, :, self.slots].swapaxes(0, 1)

    def check(self) -> None:
        """Move everything, by everything that moves, and compare each byte."""
        connector = AdaptiveConnector(self.device)
        connector.register_kv_caches(self.caches)
        for slots in (self.slots, self.on_device, Index(self.slots), self.slots.tolist()):
            self.chunk.zero_()
            connector.from_gpu(self.chunk, None, slots).synchronize()
            assert (self.chunk.cpu().numpy() == self.gathered).all()
        halves = [self.chunk[:, :, :3].contiguous().zero_() for _ in range(2)]
        connector.batched_from_gpu(halves, None, self.on_device, [0, 3], [3, 6]).synchronize()
        for half, first in zip(halves, (0, 3), strict=True):
            assert (half.cpu().numpy() == self.gathered[:, :, first : first + 3]).all()
        other = AdaptiveConnector(self.device)
        other.to_gpu(self.chunk, self.empty, self.on_device).synchronize()
        src = KVView(self.caches, KV_LAYOUT)
        dst = KVView(self.empty, KV_LAYOUT)
        copy_rows(src, dst, self.slots, self.on_device).synchronize()
        assert (_rows(self.empty)[:, :, self.slots] == self.gathered.swapaxes(0, 1)).all()
        copy_blocks(src, dst, [0, 5, 3], [5, 1, 0]).synchronize()
        copy_blocks(src, dst, [2, 1, 4], [2, 3, 4], by_layer=True).synchronize()
        assert (_blocks(self.empty) == self.wanted[:, :, [3, 5, 2, 1, 4, 0]]).all()
        host = KVView(self.host, KV_LAYOUT)
        copy_blocks(src, host, [0, 1], [4, 5]).synchronize()
        copy_blocks(src, host, [2, 3], [1, 0], cancellable=True).synchronize()
        assert (_blocks(self.host)[:, :, [4, 5, 1, 0]] == self.wanted[:, :, :4]).all()
        copy_blocks(host, dst, [4, 5], [0, 1]).synchronize()
        assert (_blocks(self.empty)[:, :, [0, 1, 5]] == self.wanted[:, :, [0, 1, 0]]).all()
        self._check_addresses(src, dst)

    def _check_addresses(self, src: KVView, dst: KVView) -> None:
        """Copy the same rows by addresses, on the host and on the device, and by lists of
        requests."""
        cache = self.caches[0]
        table = torch.tensor(src.origins, dtype=torch.int64, device="cpu")
        shape = (2, -1, *cache.shape[2:])
        for addresses in (table.tolist(), table, table.to(self.device)):
            self.empty[0].zero_()
            at = KVView.at(
                addresses,
                KV_LAYOUT,
                shape=shape,
                strides=cache.stride(),
                dtype=cache.dtype,
                device=self.device,
                block_size=cache.shape[2],
            )
            copy_rows(at, dst, Index(self.on_device, trusted=True), self.slots).synchronize()
            assert (_rows(self.empty)[0][:, self.slots] == self.gathered[:, 0]).all()
        nbytes = cache.numel() * cache.itemsize
        self.empty[1].zero_()
        copy_runs(
            [self.caches[1].data_ptr()],
            [self.empty[1].data_ptr()],
            nbytes,
            src_device=self.device,
            dst_device=self.device,
        ).synchronize()
        assert (self.empty[1].cpu().numpy() == self.wanted[1]).all()
        tables = torch.tensor([[2, 4], [1, 0]], device=self.device)
        requests = Index.of_requests(tables, [3, 3], cache.shape[2], count=6)
        self.chunk.zero_()
        chunk = KVView(self.chunk, "kv layer token (head dim)", heads=cache.shape[3])
        copy_rows(src, chunk, requests).synchronize()
        slots = [block * cache.shape[2] + token for block in (2, 1) for token in range(3)]
        rows = _rows(self.caches)[:, :, slots].swapaxes(0, 1)
        assert (self.chunk.cpu().numpy() == rows).all()


def _blocks(caches: list[torch.Tensor]) -> Any:
    """Return ``[layer, kv, block, ...]`` as numpy arrays."""
    return np.stack([cache.cpu().numpy() for cache in caches])


def _rows(caches: list[torch.Tensor]) -> Any:
    """Return ``[layer, kv, slot, head * dim]``."""
    return _blocks(caches).reshape(LAYERS, 2, SLOTS, -1)


def in_a_child() -> None:
    torch.set_num_threads(1)  # a forked pool of threads never answers
    Scene(torch.device("cpu")).check()
