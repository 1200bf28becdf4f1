# SPDX-License-Identifier: Apache-2.0
"""The ops with vLLM's names, judged by plain torch; no engine is needed.

`.ci/plugs` runs them in vLLM's environment too, where
their signatures are compared with vLLM's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.ambient import STATES, State
from support.guarded_memory import refused

from portakv import LayoutError, SlotError, Unsupported
from portakv.host import pinned
from portakv.integrations import vllm_ops
from portakv.view import addresses as view_addresses

SLOTS = [37, 0, -1, 5, 63, 36]
BLOCKS = 8
SIZE = 8
HEADS = 3
DIM = 16
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
Noise = Callable[..., Any]  # a tensor; its parts are handed over by *


@pytest.fixture
def noise(device: torch.device) -> Noise:
    drawn = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn, device="cpu").to(dtype).to(device)

    return make


def written(cache: torch.Tensor, rows: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """A copy on the host of a cache ``[blocks, block_size, ...]`` with rows at their slots."""
    made = cache.cpu().clone()
    for row, slot in zip(rows.cpu(), slots, strict=False):
        if slot >= 0:
            made[slot // made.shape[1], slot % made.shape[1]] = row
    return made


@DTYPES
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("wide", [False, True], ids=["apart", "of one projection"])
def test_reshape_and_cache_flash(
    device: torch.device, noise: Noise, dtype: torch.dtype, order: str, wide: bool
) -> None:
    """There are more rows than slots, as in a padded batch."""
    caches = [noise(BLOCKS, SIZE, HEADS, DIM, dtype=dtype) for _ in range(2)]
    if order == "HND":
        caches = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in caches]
    rows = noise(len(SLOTS) + 3, 3, HEADS, DIM, dtype=dtype).unbind(1)[1:]
    if not wide:
        rows = tuple(each.contiguous() for each in rows)
    expected = [written(cache, row, SLOTS) for cache, row in zip(caches, rows, strict=True)]
    slots = torch.tensor(SLOTS, device=device)
    scale = torch.ones(1, device=device)
    arguments: Any = (*rows, *caches, slots, "auto", scale, scale)
    vllm_ops.reshape_and_cache_flash(*arguments)
    assert all(map(torch.equal, (each.cpu() for each in caches), expected))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_reshape_and_cache(
    device: torch.device, noise: Noise, dtype: torch.dtype, interleaved: bool
) -> None:
    x = 16 // dtype.itemsize
    size = 2 * x  # of a block
    key_cache = noise(BLOCKS, HEADS, DIM // x, size, x, dtype=dtype)
    value_cache = noise(BLOCKS, HEADS, DIM, size, dtype=dtype)
    if interleaved:
        value_cache = value_cache.view(BLOCKS, HEADS, size // x, DIM, x)
    rows = noise(2, len(SLOTS), HEADS, DIM, dtype=dtype)
    as_rows = key_cache.permute(0, 3, 1, 2, 4).flatten(3)
    keys = written(as_rows, rows[0], SLOTS)
    if interleaved:
        as_rows = value_cache.permute(0, 2, 4, 1, 3).flatten(1, 2)
    else:
        as_rows = value_cache.permute(0, 3, 1, 2)
    values = written(as_rows, rows[1], SLOTS)
    slots = torch.tensor(SLOTS, device=device)
    keyed, valued = rows
    vllm_ops.reshape_and_cache(
        keyed, valued, key_cache, value_cache, slots, "auto", interleaved_v=interleaved
    )
    assert torch.equal(key_cache.cpu().permute(0, 3, 1, 2, 4).flatten(3), keys)
    came = value_cache.cpu()
    came = came.permute(0, 2, 4, 1, 3).flatten(1, 2) if interleaved else came.permute(0, 3, 1, 2)
    assert torch.equal(came, values)


@DTYPES
@pytest.mark.parametrize("padding", [0, 8])
def test_concat_and_cache_mla(
    device: torch.device, noise: Noise, dtype: torch.dtype, padding: int
) -> None:
    latent = noise(9, 64, dtype=dtype)
    rotary = noise(9, 16, dtype=dtype)
    cache = noise(BLOCKS, SIZE, 80 + padding, dtype=dtype)
    expected = cache.cpu().clone()
    expected[..., :80] = written(cache[..., :80], torch.cat([latent, rotary], 1), SLOTS)
    slots = torch.tensor(SLOTS, device=device)
    vllm_ops.concat_and_cache_mla(latent, rotary, cache, slots, "auto", torch.ones(1))
    assert torch.equal(cache.cpu(), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("place", ["device", "host"])
def test_concat_and_cache_mla_grouped(
    device: torch.device, noise: Noise, shared: bool, place: str
) -> None:
    """Slots of all layers in one list, or each layer's own; addresses where vLLM has them."""
    layers = 3
    latent = noise(layers, len(SLOTS), 64)
    rotary = noise(layers, len(SLOTS), 16)
    caches = noise(layers, BLOCKS, SIZE, 80)
    lists = [
        SLOTS if shared else [-1 if x < 0 else (x + n) % 64 for x in SLOTS] for n in range(layers)
    ]
    expected = [
        written(caches[n], torch.cat([latent[n], rotary[n]], 1), lists[n]) for n in range(layers)
    ]
    slots = torch.tensor(lists, device=device)
    if shared:
        slots = slots[:1].expand(layers, -1)
    addresses = torch.tensor([each.data_ptr() for each in caches])
    if place == "device":
        addresses = addresses.to(device)
    strides: Any = caches[0].stride()[:2]
    vllm_ops.concat_and_cache_mla_grouped(latent, rotary, addresses, slots, SIZE, *strides)
    assert all(map(torch.equal, caches.cpu(), expected))


@pytest.mark.parametrize("starts", [None, [0, 8, 0, 3]])
@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize(
    "op", ["cp_gather_cache", "gather_cache", "gather_and_maybe_dequant_cache"]
)
@pytest.mark.parametrize("heads", [False, True])
def test_gathering_requests(
    device: torch.device, noise: Noise, starts: list[int] | None, front: int, op: str, heads: bool
) -> None:
    """One request is empty, and the destination is longer than all of them; the first one begins
    at its start, as with vLLM's kernel."""
    entry = (HEADS, DIM) if heads else (DIM,)
    cache = noise(BLOCKS, SIZE, *entry)
    dst = noise(40, *entry)
    table = torch.tensor([[3, 1, 7], [0, 5, 2], [4, 4, 4], [6, 2, 1]], dtype=torch.int32)
    lengths = [17, 8, 0, 12]
    expected = dst.cpu().clone()
    at = front
    for request, length in enumerate(lengths):
        for token in range(length):
            slot = token + (starts[request] if starts else 0)
            expected[at] = cache[int(table[request, slot // SIZE]), slot % SIZE].cpu()
            at += 1
    bounds = torch.tensor([front, *lengths]).cumsum(0).int().to(device)
    passed = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
    table = table.to(device)
    if op == "gather_and_maybe_dequant_cache":
        of_token = torch.zeros(at, dtype=torch.int32, device=device)
        scale = torch.ones(1, device=device)
        some = (cache, dst, table, bounds, of_token, at, "auto", scale, passed)
        vllm_ops.gather_and_maybe_dequant_cache(*some)
    else:
        getattr(vllm_ops, op)(cache, dst, table, bounds, 4, passed)
    assert torch.equal(dst.cpu(), expected)


@pytest.mark.parametrize("method", ["store", "load", "within"])
@pytest.mark.parametrize("memory", ["pinned", "pageable"])
def test_swapping_blocks(device: torch.device, noise: Noise, method: str, memory: str) -> None:
    caches = noise(2, BLOCKS, SIZE, DIM)
    host = pinned.empty((2, BLOCKS, SIZE, DIM), torch.bfloat16)
    host = host if memory == "pinned" else torch.zeros_like(host, pin_memory=False)
    host.copy_(noise(2, BLOCKS, SIZE, DIM))
    src, dst = {"store": (caches, host), "load": (host, caches), "within": (caches, caches)}[method]
    src = src[0]
    dst = dst[1]
    expected = dst.cpu().clone()
    wanted = src.cpu().clone()
    mapping = torch.tensor([[0, 3], [5, 1], [2, 7]])
    expected[mapping[:, 1]] = wanted[mapping[:, 0]]
    vllm_ops.swap_blocks(src, dst, src[0].nbytes, mapping)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    assert torch.equal(dst.cpu(), expected)


@pytest.mark.parametrize("sizes", [[64, 64, 64], [64, 32, 128]])
def test_swapping_runs(
    device: torch.device, noise: Noise, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = noise(1024)
    host = pinned.empty(1024, torch.bfloat16)
    host.zero_()
    expected = host.clone()
    wanted = cache.cpu()
    froms = [128, 512, 1024]
    tos = [1024, 256, 0]
    for begin, end, size in zip(froms, tos, sizes, strict=True):
        expected[end // 2 : (end + size) // 2] = wanted[begin // 2 : (begin + size) // 2]
    # The drivers of CUDA and ROCm know the memory, as in vLLM's own op; others need the device.
    texts = {} if device.type in ("cpu", "cuda") else {"src_device": device}
    if device.type == "cpu":
        monkeypatch.setattr(view_addresses, "usual_device", lambda: device)
    vllm_ops.swap_blocks_batch(
        torch.tensor(froms) + cache.data_ptr(),
        torch.tensor(tos) + host.data_ptr(),
        torch.tensor(sizes),
        True,
        **texts,
    )
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    assert torch.equal(host, expected)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_whatever_state_torch_is_in(device: torch.device, noise: Noise, state: State) -> None:
    """One op that writes rows, one that gathers those of requests, one that moves blocks."""
    cache = noise(BLOCKS, SIZE, 80)
    rows = noise(len(SLOTS), 80)
    came = noise(11, 80)
    expected = written(cache, rows, SLOTS)
    other = noise(BLOCKS, SIZE, 80)
    slots = torch.tensor(SLOTS, device=device)
    bounds = torch.tensor([0, 11], device=device)
    table = torch.tensor([[4, 0]], dtype=torch.int32, device=device)
    mapping = torch.tensor([[4, 2]])
    with state(device):
        kv_c, k_pe = rows.split([64, 16], 1)
        vllm_ops.concat_and_cache_mla(kv_c, k_pe, cache, slots, "auto")
        vllm_ops.cp_gather_cache(cache, came, table, bounds.int(), 1)
        vllm_ops.swap_blocks(cache, other, cache[0].nbytes, mapping)
    assert torch.equal(cache.cpu(), expected)
    assert torch.equal(came.cpu(), torch.cat([expected[4], expected[0]])[:11])
    assert torch.equal(other[2].cpu(), expected[4])


@pytest.mark.parametrize(("name", "other"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_dtype_by_its_name(device: torch.device, noise: Noise, name: str, other: str) -> None:
    """Users name the dtype of caches that are not quantised; another dtype is a conversion."""
    dtype = getattr(torch, name)
    caches = noise(2, BLOCKS, SIZE, HEADS, DIM, dtype=dtype)
    rows = noise(2, len(SLOTS), HEADS, DIM, dtype=dtype)
    expected = [written(cache, row, SLOTS) for cache, row in zip(caches, rows, strict=True)]
    slots = torch.tensor(SLOTS, device=device)
    vllm_ops.reshape_and_cache_flash(rows[0], rows[1], caches[0], caches[1], slots, name)
    assert all(map(torch.equal, caches.cpu(), expected))
    with refused(Unsupported, f"torch.{name} with kv_cache_dtype='{other}'", watch=[*caches]):
        vllm_ops.reshape_and_cache_flash(rows[0], rows[1], caches[0], caches[1], slots, other)
    table = torch.tensor([[4]], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 6], dtype=torch.int32, device=device)
    vllm_ops.gather_and_maybe_dequant_cache(caches[0], rows[0], table, bounds, None, 6, name)
    assert torch.equal(rows[0].cpu(), expected[0][4, :6])


def test_what_is_refused() -> None:
    cache = torch.zeros(4, 8, 2, 16)
    rows = torch.zeros(3, 2, 16)
    slots = torch.tensor([1, 2, 3])
    with refused(Unsupported, "kv_cache_dtype='fp8'", "auto"):
        vllm_ops.reshape_and_cache_flash(rows, rows, cache, cache, slots, "fp8")
    with refused(SlotError, "slot 32"):
        slots[1] = 32
        vllm_ops.reshape_and_cache_flash(rows, rows, cache, cache.clone(), slots, "auto")
    with refused(LayoutError, "(4, 2, 8, 16)", "contiguous"):
        vllm_ops.swap_blocks(cache.transpose(1, 2), cache, 64, torch.tensor([[0, 1]]))
    with refused(SlotError, "slot 4"):
        vllm_ops.swap_blocks(cache, cache.clone(), cache[0].nbytes, torch.tensor([[4, 1]]))


@pytest.mark.parametrize("name", vllm_ops.__all__)
def test_arguments_are_those_of_vllm(name: str) -> None:
    """Names and order agree, up to vLLM's calls by keyword; ours may have more at the end."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; see .ci/plugs")
    from vllm import _custom_ops

    own: Any = getattr(_custom_ops, name, None)
    if own is None:
        pytest.skip("this release has no such op")
    reference = list(inspect.signature(own).parameters)
    assert (
        list(inspect.signature(getattr(vllm_ops, name)).parameters)[: len(reference)] == reference
    )


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["flash", "paged", "mla", "grouped", "gather"])
def test_ops_can_be_captured(op: str) -> None:
    """Nothing is read back, so that a graph holds them; a replay sees new slots."""
    device = torch.device("cuda", 0)
    slots = torch.tensor([1, -1, 7], device=device)
    key, value = torch.randn(2, 3, 2, 16, device=device)
    caches: Any = torch.zeros(2, 4, 8, 2, 16, device=device)
    latent: Any = torch.randn(3, 80, device=device)
    cache = torch.zeros(4, 8, 80, device=device)
    layers = torch.tensor([cache.data_ptr(), cache[2:].data_ptr()], device=device)
    table = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 3], dtype=torch.int32, device=device)

    def run() -> None:
        if op == "flash":
            vllm_ops.reshape_and_cache_flash(key, value, caches[0], caches[1], slots, "auto")
        elif op == "mla":
            kv_c, k_pe = latent.split([64, 16], 1)
            vllm_ops.concat_and_cache_mla(kv_c, k_pe, cache, slots, "auto")
        elif op == "paged":
            paged = caches[0].view(4, 2, 4, 8, 4), caches[1].view(4, 2, 16, 8)
            vllm_ops.reshape_and_cache(key, value, *paged, slots, "auto")
        elif op == "grouped":  # two layers of two blocks
            kv_c, k_pe = latent.expand(2, -1, -1).split([64, 16], 2)
            both = slots.expand(2, -1)
            vllm_ops.concat_and_cache_mla_grouped(kv_c, k_pe, layers, both, 8, 8 * 80, 80)
        else:
            vllm_ops.cp_gather_cache(cache, latent, table, bounds, 1)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    slots.copy_(torch.tensor([3, 9, -1]))
    cache.normal_()
    caches.zero_()
    graph.replay()
    torch.cuda.synchronize()
    if op == "flash":
        assert torch.equal(caches[0].view(32, 2, 16)[[3, 9]], key[:2])
        assert not caches[0].view(32, 2, 16)[1].any()
    elif op == "paged":
        for row, slot in ((0, 3), (1, 9)):
            block, at = divmod(slot, 8)
            assert torch.equal(caches[0].view(4, 2, 4, 8, 4)[block, :, :, at].flatten(1), key[row])
            assert torch.equal(caches[1].view(4, 2, 16, 8)[block, :, :, at], value[row])
    elif op == "grouped":
        assert torch.equal(cache.view(2, 16, 80)[:, [3, 9]], latent[:2].expand(2, -1, -1))
    elif op == "mla":
        assert torch.equal(cache.view(32, 80)[[3, 9]], latent[:2])
    else:
        assert torch.equal(latent, cache[1, :3])


@pytest.mark.parametrize(
    ("nbytes", "shape"), [(0, (1, 2)), (-16, (1, 2)), (16, (2,)), (16, (1, 3))], ids=str
)
def test_swap_blocks_of_no_bytes_or_by_another_mapping(nbytes: int, shape: tuple[int, ...]) -> None:
    src = torch.ones(4, 16)
    dst = torch.zeros(4, 16)
    with refused(LayoutError, f"{nbytes} bytes", f"shape {shape}", "[blocks, 2]", watch=dst):
        vllm_ops.swap_blocks(src, dst, nbytes, torch.zeros(shape, dtype=torch.int64))


def test_no_layers_write_nothing() -> None:
    rows = torch.zeros(0, 3, 16)
    slots = torch.arange(3).expand(0, 3)
    pointers = torch.zeros(0, dtype=torch.int64)
    vllm_ops.concat_and_cache_mla_grouped(rows, rows, pointers, slots, 8, 8 * 32, 32)
