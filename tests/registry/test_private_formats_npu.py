# SPDX-License-Identifier: Apache-2.0
"""Tensors in a private format of the vendor's, on the simulated device that is named npu. The
stand-in knows none, so that storages are named here that are to be taken for FRACTAL_NZ."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.own_process import in_child, own_process

from portakv import AdaptiveConnector, KVView, Unsupported, copy_rows
from portakv.backends import ascend
from portakv.backends.base import Decision
from portakv.registry.registry import REGISTRY, Registry, choose
from portakv_conformance.vendor import standins

pytestmark = own_process("npu", "ascend")
if in_child():
    standins.install("npu")


DEVICE = torch.device("privateuseone", 0)
LAYERS = 2
BLOCKS = 4
SIZE = 8
HEADS = 2
DIM = 16
CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
IDS = [9, 2, 31]
BACKENDS = ["ascend", "reference"]
if in_child():
    for backend in BACKENDS:
        choose(DEVICE, backend)  # with its self-check, whose tensors must not count


class Formats:
    """Stand in for the vendor's op that returns a tensor's format; ``calls`` counts its calls."""

    def __init__(self) -> None:
        self.private: set[int] = set()
        self.calls = 0

    def default(self, tensor: torch.Tensor) -> int:
        self.calls += 1
        return 29 if tensor.untyped_storage().data_ptr() in self.private else 2


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Formats:
    made = Formats()
    monkeypatch.setattr(torch.ops.npu, "get_npu_format", made)
    return made


def caches() -> list[torch.Tensor]:
    shape = (2, BLOCKS, SIZE, HEADS, DIM)
    return [torch.randn(shape, dtype=torch.float16).to(DEVICE) for _ in range(LAYERS)]


def chunk() -> torch.Tensor:
    return torch.zeros(2, LAYERS, len(IDS), HEADS * DIM, dtype=torch.float16).to(DEVICE)


refused = partial(
    pytest.raises, Unsupported, match=r"NPU format 29 .* cast it .*; nothing was moved"
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gathers", [True, False])
def test_no_backend_moves_one(backend: str, gathers: bool, formats: Formats) -> None:
    pool = caches()
    rows = chunk()
    formats.private = {pool[1].untyped_storage().data_ptr()}
    before = [tensor.cpu() for tensor in (*pool, rows)]
    cache = KVView(pool, CACHE)
    dense = KVView(rows, CHUNK, heads=HEADS)
    sides: Any = (cache, dense, IDS, None) if gathers else (dense, cache, None, IDS)
    with refused():
        copy_rows(*sides, backend=backend)
    torch.accelerator.synchronize()
    for tensor, old in zip((*pool, rows), before, strict=True):
        assert tensor.cpu().equal(old)


def test_nor_the_next_that_takes_a_plan(formats: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    declined = Decision("ascend", False, "not this one")
    monkeypatch.setattr(ascend.Ascend, "check", lambda self, plan: declined)
    pool = caches()
    rows = chunk()
    connector = AdaptiveConnector(DEVICE, kv_layout=CACHE, chunk_layout=CHUNK)
    connector.register_kv_caches(pool)
    connector.from_gpu(rows, slot_mapping=IDS).synchronize()
    assert "reference" in connector.explain()
    want = torch.stack([x.cpu().flatten(1, 2)[:, IDS].flatten(2) for x in pool], 1)
    assert rows.cpu().equal(want)
    fresh = chunk()
    formats.private = {fresh.untyped_storage().data_ptr()}  # a memory object in such a format
    with refused():
        connector.from_gpu(fresh, slot_mapping=IDS)
    assert not fresh.cpu().any()


def test_registered_caches_are_looked_at_once(formats: Formats) -> None:
    connector = AdaptiveConnector(DEVICE, kv_layout=CACHE, chunk_layout=CHUNK)
    connector.register_kv_caches(caches())
    rows = chunk()
    connector.from_gpu(rows, slot_mapping=IDS).synchronize()
    seen = formats.calls
    for _ in range(5):
        connector.to_gpu(rows, slot_mapping=IDS).synchronize()
    assert formats.calls - seen <= 5, "the chunk of each call, and no cache"


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_memory_is_not_asked_about(backend: str, formats: Formats) -> None:
    pool = caches()
    cache = KVView(pool, CACHE)
    host = KVView(chunk().cpu(), CHUNK, heads=HEADS)
    copy_rows(cache, host, IDS, backend=backend).synchronize()
    copy_rows(host, cache, None, IDS, backend=backend).synchronize()
    formats.private = {x.untyped_storage().data_ptr() for x in pool}
    with refused():
        copy_rows(host, KVView(pool, CACHE), None, IDS, backend=backend).synchronize()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_pinned_memory_is_copied_too(backend: str | None, formats: Formats) -> None:
    """No strategy of these devices has kernels that the core calls."""
    pool = caches()
    cache = KVView(pool, CACHE)
    rows = chunk().cpu()
    host = KVView.at(
        rows.data_ptr(),
        CHUNK,
        shape=rows.shape,
        dtype=rows.dtype,
        device="cpu",
        pinned=True,
        heads=HEADS,
    )
    copy_rows(cache, host, IDS, backend=backend).synchronize()
    want = torch.stack([x.cpu().flatten(1, 2)[:, IDS].flatten(2) for x in pool], 1)
    assert rows.equal(want)
    copy_rows(host, cache, None, IDS, backend=backend).synchronize()


def test_only_devices_that_extend_torch_are_asked_about() -> None:
    """And a backend that does not load hides nothing."""
    assert (
        REGISTRY.format_checks(torch.device("cpu"))
        == REGISTRY.format_checks(torch.device("cuda", 0))
        == ()
    )
    others = Registry()
    others.register("broken", "no_such_package:Backend")
    assert others.format_checks(DEVICE) == REGISTRY.format_checks(DEVICE)


@pytest.mark.parametrize(("number", "strided"), [(0, True), (2, True), (3, False), (30, True)])
def test_the_vendor_s_words(number: int, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor_op = SimpleNamespace(default=lambda tensor: number)
    monkeypatch.setattr(torch.ops.npu, "get_npu_format", vendor_op)
    (tell,) = REGISTRY.format_checks(DEVICE)
    expected = "" if strided else f"a tensor in NPU format {number} (29 is FRACTAL_NZ)"
    assert tell(chunk()).startswith(expected)
    assert bool(tell(chunk())) is not strided
