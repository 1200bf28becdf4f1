# SPDX-License-Identifier: Apache-2.0
"""The names of `sgl_kernel.kvcacheio` over PortaKV against plain torch: every pair of orders, ids
in both places and of both dtypes. No engine is imported; `test_sglang.py` has the real pools."""

from __future__ import annotations

import gc
import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.ambient import STATES
from support.guarded_memory import check_sentence
from support.read_back import ReadBack

from portakv import LayoutError, SlotError
from portakv.errors import InvalidTerms, PortaKVError, Unsupported
from portakv.integrations import IntegrationError
from portakv.integrations.sglang import kvcacheio
from portakv.integrations.sglang import kvcacheio as io
from portakv.interconnect import zero_copy
from portakv.interconnect.choose import strategies
from portakv.interconnect.strategy import SMALL

CPU = torch.device("cpu")
LAYERS = 3
TOKENS = 32
HEADS = 2
DIM = 8
PAGE = 4
ITEM = HEADS * DIM * 2  # bytes of a token of one layer, in bf16
PITCH = ITEM * LAYERS
WHERE = [(where, dtype) for where in ("host", "device") for dtype in (torch.int64, torch.int32)]
where_and_dtype = pytest.mark.parametrize(
    ("where", "dtype"), WHERE, ids=[f"{where}-{str(dtype)[6:]}" for where, dtype in WHERE]
)
#: For each order of a host pool its shape, and how to read it as ``[layer, token, head, dim]``.
ORDERS: dict[str, tuple[Sequence[int], Callable[[torch.Tensor], torch.Tensor]]] = {
    "lf": ((LAYERS, TOKENS, HEADS, DIM), lambda x: x),
    "pf": ((TOKENS, LAYERS, HEADS, DIM), lambda x: x.transpose(0, 1)),
    "ph": (
        (TOKENS // PAGE, HEADS, PAGE, LAYERS, DIM),
        lambda x: x.permute(3, 0, 2, 1, 4).reshape(LAYERS, TOKENS, HEADS, DIM),
    ),
    "pfd": (
        (TOKENS // PAGE, LAYERS, PAGE, HEADS, DIM),
        lambda x: x.transpose(0, 1).reshape(LAYERS, TOKENS, HEADS, DIM),
    ),
}


class Side(NamedTuple):
    """Pools of keys and values (MLA: one), and what their tables hold."""

    k: Any
    v: Any

    @property
    def k_table(self) -> torch.Tensor:
        return table(self.k)

    @property
    def v_table(self) -> torch.Tensor:
        return table(self.v)


def table(layers: Sequence[torch.Tensor], targets: torch.device | None = None) -> torch.Tensor:
    """Addresses of layers as SGLang keeps them: uint64, where the kernels run."""
    pointers = torch.tensor([x.data_ptr() for x in layers], dtype=torch.uint64, device=CPU)
    return pointers.to(layers[0].device if targets is None else targets)


def drawn(shape: Sequence[int], seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).bfloat16()


def on_device(device: torch.device, seed: int) -> Side:
    """Layers of a pool of the device."""
    k, v = (
        [drawn((TOKENS, HEADS, DIM), seed + 10 * which + n).to(device) for n in range(LAYERS)]
        for which in (0, 1)
    )
    return Side(k, v)


def on_host(order: str, device: torch.device, seed: int, pin: bool = True) -> Side:
    """A pool of the host, pinned for the device if it has one."""
    made = [drawn(ORDERS[order][0], seed + which) for which in (0, 1)]
    return Side(*(x.pin_memory() if pin and device.type != "cpu" else x for x in made))


def logical(pool: Any, order: str = "lf") -> torch.Tensor:
    """A copy of a pool on the host as ``[layer, token, head, dim]``."""
    if isinstance(pool, list):
        pool = torch.stack([each.cpu() for each in pool])
    return ORDERS[order][1](pool).clone()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def ids(where: str, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Some tokens in any order."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    result = torch.randperm(TOKENS, generator=generator, device="cpu")[:13].to(dtype)
    return result.to(device) if where == "device" else result


def pages(where: str, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """The tokens of some pages in any order."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    first = torch.randperm(TOKENS // PAGE, generator=generator, device="cpu")[:3] * PAGE
    result = (first[:, None] + torch.arange(PAGE, device="cpu")).flatten().to(dtype)
    return result.to(device) if where == "device" else result


def moved(
    src: torch.Tensor, dst: torch.Tensor, s: torch.Tensor, d: torch.Tensor, layers: Sequence[int]
) -> torch.Tensor:
    """Return ``dst`` as plain torch writes it."""
    wanted = dst.clone()
    for layer in layers:
        wanted[layer, d.cpu().long()] = src[layer, s.cpu().long()]
    return wanted


def judge(
    call: Callable[[], None],
    device: torch.device,
    src: Sequence[tuple[Any, str]],
    dst: Sequence[tuple[Any, str]],
    s: torch.Tensor,
    d: torch.Tensor,
    layers: Sequence[int],
) -> None:
    """Run a call and compare every byte of its destinations."""
    wanted = [moved(logical(*a), logical(*b), s, d, layers) for a, b in zip(src, dst, strict=True)]
    call()
    synchronize(device)
    for result, right in zip(dst, wanted, strict=True):
        assert torch.equal(logical(*result), right)


@where_and_dtype
@pytest.mark.parametrize("host", ["lf", "pf", "ph"])
def test_one_layer_to_the_device(
    host: str, where: str, dtype: torch.dtype, device: torch.device
) -> None:
    there = on_host(host, device, 1)
    here = on_device(device, 50)
    s = ids(where, dtype, device, 2)
    d = ids(where, dtype, device, 3)
    layer = 1

    def call() -> None:
        rows = here.k[layer], here.v[layer]
        if host == "lf":
            io.transfer_kv_per_layer(there.k[layer], rows[0], there.v[layer], rows[1], s, d, ITEM)
        elif host == "pf":
            io.transfer_kv_per_layer_pf_lf(
                there.k, rows[0], there.v, rows[1], s, d, layer, ITEM, PITCH
            )
        else:
            io.transfer_kv_per_layer_ph_lf(
                there.k, rows[0], there.v, rows[1], s, d, layer, ITEM, PITCH, PAGE, HEADS
            )

    sides = [(there.k, host), (there.v, host)], [(here.k, "lf"), (here.v, "lf")]
    judge(call, device, *sides, s, d, [layer])


@where_and_dtype
@pytest.mark.parametrize("host", ["lf", "pf", "ph"])
def test_all_layers_to_the_host(
    host: str, where: str, dtype: torch.dtype, device: torch.device
) -> None:
    there = on_host(host, device, 1)
    here = on_device(device, 50)
    s = ids(where, dtype, device, 2)
    d = ids(where, dtype, device, 3)
    tables = table(here.k), table(here.v)

    def call() -> None:
        if host == "lf":
            out = (table(list(x), device) for x in there)
            k, v = out
            io.transfer_kv_all_layer(tables[0], k, tables[1], v, s, d, ITEM, LAYERS)
        elif host == "pf":
            io.transfer_kv_all_layer_lf_pf(
                tables[0], there.k, tables[1], there.v, s, d, ITEM, PITCH, LAYERS
            )
        else:
            io.transfer_kv_all_layer_lf_ph(
                tables[0], there.k, tables[1], there.v, s, d, ITEM, PITCH, LAYERS, PAGE, HEADS
            )

    sides = [(here.k, "lf"), (here.v, "lf")], [(there.k, host), (there.v, host)]
    judge(call, device, *sides, s, d, range(LAYERS))


@where_and_dtype
def test_all_layers_between_two_pools_of_the_device(
    where: str, dtype: torch.dtype, device: torch.device
) -> None:
    src = on_device(device, 1)
    dst = on_device(device, 50)
    s = ids(where, dtype, device, 2)
    d = ids(where, dtype, device, 3)

    def call() -> None:
        io.transfer_kv_all_layer(
            src.k_table, dst.k_table, src.v_table, dst.v_table, s, d, ITEM, LAYERS
        )

    sides = [(src.k, "lf"), (src.v, "lf")], [(dst.k, "lf"), (dst.v, "lf")]
    judge(call, device, *sides, s, d, range(LAYERS))


@where_and_dtype
@pytest.mark.parametrize("host", ["lf", "pf"])
def test_mla(host: str, where: str, dtype: torch.dtype, device: torch.device) -> None:
    there = on_host(host, device, 1).k
    here = on_device(device, 50).k
    s = ids(where, dtype, device, 2)
    d = ids(where, dtype, device, 3)
    layer = LAYERS - 1

    def up() -> None:
        if host == "lf":
            io.transfer_kv_per_layer_mla(there[layer], here[layer], s, d, ITEM)
        else:
            io.transfer_kv_per_layer_mla_pf_lf(there, here[layer], s, d, layer, ITEM, PITCH)

    def down() -> None:
        if host == "lf":
            into = table(list(there), device)
            io.transfer_kv_all_layer_mla(table(here), into, d, s, ITEM, LAYERS)
        else:
            io.transfer_kv_all_layer_mla_lf_pf(table(here), there, d, s, ITEM, PITCH, LAYERS)

    judge(up, device, [(there, host)], [(here, "lf")], s, d, [layer])
    judge(down, device, [(here, "lf")], [(there, host)], d, s, range(LAYERS))


@where_and_dtype
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_direct(mla: bool, where: str, dtype: torch.dtype, device: torch.device) -> None:
    there = on_host("pfd", device, 1)
    here = on_device(device, 50)
    s = pages(where, dtype, device, 2)
    d = pages(where, dtype, device, 3)
    pools = [there.k] if mla else [there.k, there.v]
    lists = [here.k] if mla else [here.k, here.v]
    all_layers = list(itertools.chain.from_iterable(lists))
    hosts = [(x, "pfd") for x in pools]
    devices = [(x, "lf") for x in lists]

    def down() -> None:
        io.transfer_kv_all_layer_direct_lf_pf(all_layers, pools, s, d, PAGE)

    def one() -> None:
        io.transfer_kv_per_layer_direct_pf_lf(pools, [x[2] for x in lists], d, s, 2, PAGE)

    def two() -> None:
        several = [x for layers in lists for x in layers[1:]]
        io.transfer_kv_per_layer_direct_pf_lf(pools, several, d, s, 1, PAGE)

    judge(down, device, devices, hosts, s, d, range(LAYERS))
    for layers in lists:
        for each in layers:
            each.zero_()
    judge(one, device, hosts, devices, d, s, [2])
    judge(two, device, hosts, devices, d, s, [1, 2])


@where_and_dtype
@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
def test_direct_between_lists(
    pin: bool, where: str, dtype: torch.dtype, device: torch.device
) -> None:
    there = on_host("lf", device, 1, pin)
    here = on_device(device, 50)
    s = pages(where, dtype, device, 2)
    d = pages(where, dtype, device, 3)
    src = [*here.k, *here.v]
    dst = [*there.k, *there.v]

    def call() -> None:
        io.transfer_kv_direct(src, dst, s, d, PAGE)

    sides = [(here.k, "lf"), (here.v, "lf")], [(there.k, "lf"), (there.v, "lf")]
    judge(call, device, *sides, s, d, range(LAYERS))


def test_direct_pages_that_begin_anywhere() -> None:
    here = on_device(CPU, 1)
    there = on_device(CPU, 50)
    s = torch.tensor([3, 4, 5, 6, 21, 22, 23, 24])
    d = torch.tensor([9, 10, 11, 12, 1, 2, 3, 4])

    def call() -> None:
        io.transfer_kv_direct(here.k, there.k, s, d, PAGE)

    judge(call, CPU, [(here.k, "lf")], [(there.k, "lf")], s, d, range(LAYERS))


def test_of_the_ids_of_a_direct_copy_the_first_of_each_page_counts() -> None:
    here = on_device(CPU, 1)
    there = on_device(CPU, 50)
    s = pages("host", torch.int64, CPU, 2)
    d = pages("host", torch.int64, CPU, 3)
    odd = s.clone()
    odd.view(-1, PAGE)[:, 1:] = -7

    def call() -> None:
        io.transfer_kv_direct(here.k, there.k, odd, d, PAGE)

    judge(call, CPU, [(here.k, "lf")], [(there.k, "lf")], s, d, range(LAYERS))


def test_widths_and_begins_that_no_vector_fits(device: torch.device) -> None:
    """Rows of 7 bytes in storages that begin at odd addresses."""
    host = drawn((5 + 6 * 2 * PAGE * 7,), 1).view(torch.uint8)[5 : 5 + 6 * 2 * PAGE * 7]
    host = host.reshape(6, 2, PAGE, 7)
    whole = torch.zeros(5 + 8 * PAGE * 7, dtype=torch.uint8, device=device)
    rows = whole[5:].view(-1, 7)
    s = torch.arange(PAGE, 3 * PAGE)
    d = torch.arange(4 * PAGE, 6 * PAGE)
    io.transfer_kv_per_layer_direct_pf_lf([host], [rows], s, d, 1, PAGE)
    synchronize(device)
    wanted = torch.zeros_like(whole, device="cpu")
    wanted[5:].view(-1, 7)[d] = host[1:3, 1].reshape(-1, 7)
    assert torch.equal(whole.cpu(), wanted)


def test_strided_rows_of_a_device(device: torch.device) -> None:
    """A pool whose tokens hold all layers, as SGLang's unified one."""
    whole = drawn((TOKENS, LAYERS, HEADS, DIM), 1).to(device)
    src = list(whole.unbind(1))
    there = on_host("lf", device, 50)
    s = pages("host", torch.int64, device, 2)
    d = pages("host", torch.int64, device, 3)

    def call() -> None:
        io.transfer_kv_direct(src, list(there.k), s, d, PAGE)

    judge(call, device, [(src, "lf")], [(there.k, "lf")], s, d, range(LAYERS))


def test_ranges_of_embeddings(device: torch.device) -> None:
    src = drawn((40, 24), 1).to(device)
    there = drawn((50, 24), 2)
    wanted = there.clone()
    starts = [0, 30, 7, 11]
    into = [44, 3, 20, 0]
    lengths = [5, 10, 0, 2]
    for a, b, n in zip(starts, into, lengths, strict=True):
        wanted[b : b + n] = src[a : a + n].cpu()
    io.transfer_embedding_ranges_direct(src, there, starts, into, lengths)
    synchronize(device)
    assert torch.equal(there, wanted)
    io.transfer_embedding_ranges_direct(src, there, [], [], [])
    for bad in ([36], [-1]):
        with pytest.raises(SlotError, match="rows 0 to 39") as raised:
            io.transfer_embedding_ranges_direct(src, there, bad, [0], [5])
        check_sentence(str(raised.value))
    with pytest.raises(LayoutError, match="equal bytes"):
        io.transfer_embedding_ranges_direct(src, there[:, :8], [0], [0], [1])


def test_rows_within_pools_of_the_host() -> None:
    buffers = [drawn((TOKENS, 16), 1), drawn((TOKENS, 8), 2)]
    wanted = [x.clone() for x in buffers]
    src = torch.tensor([3, 9, 12])
    dst = torch.tensor([30, 0, 7])
    for each in wanted:
        each[dst] = each[src]
    strides = torch.tensor([x.stride(0) * 2 for x in buffers])
    io.copy_all_layer_kv_cache_cpu(table(buffers), strides, dst, src)
    assert all(map(torch.equal, buffers, wanted))


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        ([1, 2, 3], [2, 3, 4]),
        ([4, 3, 2], [3, 2, 1]),
        ([5, 6], [6, 5]),
        ([8, 9, 16, 0, 0, 0], [8, 11, 17, 0, 0, 0]),  # what SGLang asks after it verified a draft
        ([7], [7]),
        ([], []),
    ],
)
def test_rows_within_pools_of_the_host_that_are_read_and_written(
    dst: list[int], src: list[int]
) -> None:
    buffers = [drawn((TOKENS, 16), 1), drawn((TOKENS, 8), 2)]
    wanted = [x.clone() for x in buffers]
    for each in wanted:
        each[dst] = each[src]
    strides = torch.tensor([x.stride(0) * 2 for x in buffers])
    at = (torch.tensor(each, dtype=torch.int64) for each in (dst, src))
    io.copy_all_layer_kv_cache_cpu(table(buffers), strides, *at)
    assert all(map(torch.equal, buffers, wanted))


def test_bad_rows_within_pools_of_the_host() -> None:
    """The pool is the middle of its memory: what an id below 0 would reach is there to be seen."""
    memory = drawn((3, TOKENS, 16), 1)
    pool = memory[1]
    before = memory.clone()
    one = torch.tensor([1])
    stride = torch.tensor([32])
    twice = torch.tensor([1, 1]), torch.tensor([1, 2])
    for dst, src in (
        (one, -one),
        (-one, one),
        (one, one[:0]),
        (one, one.float()),
        (one[0], one),
        twice,
    ):
        bad(partial(io.copy_all_layer_kv_cache_cpu, table([pool]), stride, dst, src), SlotError)
    for at, sizes in ((table([pool] * 2), stride), (table([pool]), -stride)):
        bad(partial(io.copy_all_layer_kv_cache_cpu, at, sizes, one, one + 1), LayoutError)
    assert torch.equal(memory, before)


def test_small_copies_without_a_copy_engine(device: torch.device) -> None:
    values = torch.arange(72, dtype=torch.int32, device="cpu")
    for count in (64, 72, 5):
        out = torch.zeros(count, dtype=torch.int32, device=device)
        io.copy_to_gpu_no_ce(values[:count], out)
        synchronize(device)
        assert out.cpu().tolist() == list(range(count))


def test_the_address_of_a_tensor(device: torch.device) -> None:
    made = torch.zeros(4, device=device)
    assert io.get_device_accessible_ptr(made, 0) == made.data_ptr()


def test_no_ids_move_nothing(device: torch.device) -> None:
    there = on_host("pf", device, 1)
    here = on_device(device, 50)
    none = torch.empty(0, dtype=torch.int64, device=CPU)
    before = logical(here.k)
    io.transfer_kv_per_layer_pf_lf(
        there.k, here.k[0], there.v, here.v[0], none, none, 0, ITEM, PITCH
    )
    io.transfer_kv_per_layer_direct_pf_lf(
        [on_host("pfd", device, 1).k], [here.k[0]], none, none, 0, PAGE
    )
    synchronize(device)
    assert torch.equal(logical(here.k), before)


@pytest.mark.parametrize("order", ["pf", "ph"])
def test_copies_are_ordered_on_the_current_stream(order: str, accelerator: torch.device) -> None:
    """Each reads the stream's earlier writes, and later work of the stream reads its rows."""
    there = on_host(order, accelerator, 1)
    here = on_device(accelerator, 50)
    fresh = drawn((TOKENS, HEADS, DIM), 99).pin_memory()
    s = torch.arange(TOKENS, device="cpu")
    on = s.to(accelerator)
    tables = (table(here.k), table(here.v))
    out = torch.empty_like(here.k[0])
    extra = (PAGE, HEADS) if order == "ph" else ()
    down = io.transfer_kv_all_layer_lf_ph if extra else io.transfer_kv_all_layer_lf_pf
    up = io.transfer_kv_per_layer_ph_lf if extra else io.transfer_kv_per_layer_pf_lf
    synchronize(accelerator)
    stream = torch.Stream(accelerator)
    with stream:
        here.k[1].copy_(fresh, non_blocking=True)
        down(tables[0], there.k, tables[1], there.v, on, on, ITEM, PITCH, LAYERS, *extra)
        here.k[1].zero_()
        up(there.k, here.k[1], there.v, here.v[1], on, on, 1, ITEM, PITCH, *extra)
        out.copy_(here.k[1], non_blocking=True)
    stream.synchronize()
    assert torch.equal(out.cpu(), fresh)
    assert torch.equal(logical(there.k, order)[1], fresh)


# --- Tables of addresses --------------------------------------------------------------------------


def test_a_table_is_read_once_and_again_when_it_was_written(device: torch.device) -> None:
    first, second, into = (on_device(device, seed) for seed in (1, 20, 50))
    saved = table(first.k)
    target = table(into.k)
    s = torch.arange(4)
    for expected in (first, first, second):
        if expected is second:
            saved.copy_(table(second.k))
        io.transfer_kv_all_layer_mla(saved, target, s, s, ITEM, LAYERS)
        synchronize(device)
        assert torch.equal(logical(into.k)[:, :4], logical(expected.k)[:, :4])


def test_a_table_that_was_written_without_torch_knowing(device: torch.device) -> None:
    """Numpy wrote it, or torch in inference mode."""
    first, second, into = (on_device(device, seed) for seed in (1, 20, 50))
    s = torch.arange(4)
    new = table(second.k)

    def by_numpy(saved: torch.Tensor) -> None:
        saved.numpy()[:] = new.numpy()

    def in_inference_mode(saved: torch.Tensor) -> None:
        saved.copy_(new)

    methods = [in_inference_mode, by_numpy] if new.is_cpu else [in_inference_mode]
    for write in methods:
        with torch.inference_mode(write is in_inference_mode):
            saved = table(first.k)
            for expected in (first, second):
                io.transfer_kv_all_layer_mla(saved, table(into.k), s, s, ITEM, LAYERS)
                synchronize(device)
                assert torch.equal(logical(into.k)[:, :4], logical(expected.k)[:, :4])
                write(saved)


def test_ids_and_tables_of_a_device_are_not_read_back(accelerator: torch.device) -> None:
    """Once a table is known, a copy within the device waits for nothing."""
    src = on_device(accelerator, 1)
    dst = on_device(accelerator, 50)
    s = torch.arange(8, device=accelerator)
    tables = table(src.k), table(dst.k), table(src.v), table(dst.v)
    io.transfer_kv_all_layer(*tables, s, s, ITEM, LAYERS)
    with ReadBack() as waited:
        io.transfer_kv_all_layer(*tables, s, s, ITEM, LAYERS)
        io.transfer_kv_per_layer_mla(src.k[0], dst.k[0], s, s, ITEM)
        io.transfer_kv_direct(src.k, dst.k, s, s, PAGE)
    assert not waited.seen


def test_a_table_that_is_not_known_is_refused_in_a_capture(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = on_device(accelerator, 1)
    dst = on_device(accelerator, 50)
    s = torch.arange(8, device=accelerator)
    known = (src.k_table, dst.k_table)
    io.transfer_kv_all_layer_mla(*known, s, s, ITEM, LAYERS)
    monkeypatch.setattr(kvcacheio, "capturing", lambda device: device == accelerator)
    io.transfer_kv_all_layer_mla(*known, s, s, ITEM, LAYERS)
    with torch.inference_mode():
        uncounted = table(src.v)
    for new in (src.v_table, uncounted):
        call = partial(io.transfer_kv_all_layer_mla, new, known[1], s, s, ITEM, LAYERS)
        bad(call, Unsupported, "inside graph capture", "before the capture")
    synchronize(accelerator)
    assert torch.equal(logical(dst.k)[:, :8], logical(src.k)[:, :8])


def test_a_table_in_the_place_of_one_that_was_freed() -> None:
    pools = [on_device(CPU, seed).k for seed in (1, 20, 30)]
    into = on_device(CPU, 50).k
    s = torch.arange(4)
    for pool in pools:
        passing = table(pool)
        io.transfer_kv_all_layer_mla(passing, table(into), s, s, ITEM, LAYERS)
        assert torch.equal(logical(into)[:, :4], logical(pool)[:, :4])
        del passing


def test_pools_that_were_made_again(device: torch.device) -> None:
    """The same addresses or others, nothing of the old pool is used."""
    s = torch.arange(4)
    for seed in range(3):
        there = on_host("pf", device, seed)
        here = on_device(device, 50)
        io.transfer_kv_per_layer_pf_lf(there.k, here.k[1], there.v, here.v[1], s, s, 1, ITEM, PITCH)
        synchronize(device)
        assert torch.equal(logical(here.k)[1, :4], logical(there.k, "pf")[1, :4])
        del there, here


def test_nothing_holds_the_memory_of_a_pool() -> None:
    array = np.zeros((TOKENS, 16), dtype=np.int16)
    gone = weakref.ref(array)
    rows = torch.from_numpy(array)
    s = torch.arange(3)
    io.transfer_kv_per_layer_mla(rows, drawn((TOKENS, 16), 1), s, s, ITEM)
    del array, rows
    gc.collect()
    assert gone() is None


# --- Bad input ------------------------------------------------------------------------------------


def bad(call: Callable[[], None], kind: type[PortaKVError], *names: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    check_sentence(str(raised.value), *names)


def test_sizes_that_do_not_fit() -> None:
    there = on_host("pf", CPU, 1)
    here = on_device(CPU, 50)
    head = on_host("ph", CPU, 1)
    s = torch.arange(4)
    odd = torch.zeros(TOKENS, HEADS, DIM + 1).bfloat16()
    cut = torch.zeros(TOKENS, 2 * HEADS, DIM).bfloat16()[:, :HEADS]
    shape = str(tuple(cut.shape))
    saved = table(here.k)
    calls: list[tuple[Callable[[], None], tuple[str, ...]]] = [
        (lambda: io.transfer_kv_per_layer_mla(odd, here.k[0], s, s, ITEM + 1), ()),
        (lambda: io.transfer_kv_per_layer_mla(cut, here.k[0], s, s, ITEM), (shape, "(32, 8, 1)")),
        (lambda: io.transfer_kv_per_layer_mla(here.k[0], here.k[1], s, s, 0), ()),
        (lambda: io.transfer_kv_per_layer_mla_pf_lf(there.k, here.k[0], s, s, 3, ITEM, PITCH), ()),
        (lambda: io.transfer_kv_per_layer_mla_pf_lf(there.k, here.k[0], s, s, -1, ITEM, PITCH), ()),
        (lambda: io.transfer_kv_all_layer_mla(saved, saved, s, s, ITEM, 4), ("4 layers",)),
        (lambda: io.transfer_kv_all_layer_mla(here.k[0], saved, s, s, ITEM, 2), ("addresses",)),
        (lambda: io.transfer_kv_per_layer_ph_lf(
            head.k, here.k[0], head.v, here.v[0], s, s, 3, ITEM, PITCH, PAGE, HEADS), ()),
        (lambda: io.transfer_kv_per_layer_ph_lf(
            head.k, here.k[0], head.v, here.v[0], s, s, 0, ITEM, PITCH, PAGE, 3), ()),
        (lambda: io.transfer_kv_per_layer_ph_lf(
            head.k, here.k[0], head.v, here.v[0], s, s, 0, ITEM, PITCH, 5, HEADS), ()),
        (lambda: io.transfer_kv_all_layer_lf_ph(
            saved, head.k, saved, head.v, s, s, ITEM, PITCH, LAYERS, PAGE, 0), ("0 heads",)),
        (lambda: io.transfer_kv_direct([cut.mT], [here.k[0]], s, s, PAGE), ("strides",)),
        (lambda: io.transfer_kv_direct(here.k, here.v[:2], s, s, PAGE), ("3 tensors",)),
        (lambda: io.transfer_kv_direct([], [], s, s, PAGE), ()),
        (lambda: io.transfer_kv_direct([here.k[0], odd], here.v[:2], s, s, PAGE), ()),
        (lambda: io.transfer_kv_all_layer_direct_lf_pf(here.k, [there.k] * 2, s, s, PAGE), ()),
        (lambda: io.transfer_kv_all_layer_direct_lf_pf(here.k, [there.k], s, s, PAGE), ()),
        (lambda: io.transfer_kv_per_layer_direct_pf_lf(
            [on_host("pfd", CPU, 1).k], [here.k[0]], s, s, 3, PAGE), ("layers 3 to 3",)),
    ]  # fmt: skip
    for call, names in calls:
        bad(call, LayoutError, *names)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("src", None),
        ("src", 7),
        ("src", torch.zeros(TOKENS, HEADS, DIM).to_sparse()),
        ("src", torch.zeros(TOKENS, HEADS, DIM, device="meta")),
        ("src_indices", [0, 1, 2, 3]),
        ("item_size", float(ITEM)),
        ("block_quota", "2"),
    ],
)
def test_arguments_of_another_type(name: str, value: Any) -> None:
    a = on_device(CPU, 1).k[0]
    b = on_device(CPU, 50).k[0]
    s = torch.arange(4)
    passed: dict[str, Any] = {
        "src": a,
        "dst": b,
        "src_indices": s,
        "dst_indices": s,
        "item_size": ITEM,
    }
    passed |= {name: value}
    names = "transfer_kv_per_layer_mla", f"{name} = "
    bad(lambda: io.transfer_kv_per_layer_mla(**passed), IntegrationError, *names)
    bad(lambda: io.transfer_kv_per_layer_mla(*passed.values()), IntegrationError, *names)


def test_lists_of_another_type() -> None:
    a = on_device(CPU, 1).k
    s = torch.arange(PAGE)
    move: Any = io.transfer_kv_direct
    ranges: Any = io.transfer_embedding_ranges_direct
    bad(lambda: move([*a, None], a, s, s, PAGE), IntegrationError, "src_layers")
    bad(lambda: move(a, a[0], s, s, PAGE), IntegrationError, "dst_layers")
    bad(lambda: ranges(a[0], a[1], [0], [0], [1.5]), IntegrationError, "lengths")
    with pytest.raises(TypeError, match="nothing"):  # as Python says it
        move(a, a, s, s, PAGE, nothing=1)
    ranges(a[0], a[1], (np.int64(0),), [0], [1])


@pytest.mark.parametrize(
    ("args", "named", "says"),
    [
        (4, {}, "missing a required argument: 'item_size'"),
        (5, {"dst": torch.zeros(1)}, "multiple values for argument 'dst'"),
        (5, {"nothing": 1}, "unexpected keyword argument 'nothing'"),
        (4, {"nothing": 1}, "missing a required argument: 'item_size'"),
        (8, {}, "too many positional arguments"),
    ],
)
def test_arguments_that_a_function_of_kernels_does_not_take(
    args: int, named: dict[str, Any], says: str
) -> None:
    """The errors are Python's, and a right call moves its tokens."""
    a, b = on_device(CPU, 1).k[:2]
    s = torch.arange(4)
    given: list[Any] = [a, b, s, s, ITEM, 2, 32, 1]
    before = b.clone()
    with pytest.raises(TypeError, match=says):
        io.transfer_kv_per_layer_mla(*given[:args], **named)
    assert torch.equal(b, before)
    io.transfer_kv_per_layer_mla(*given[:4], item_size=ITEM)
    assert torch.equal(b[:4], a[:4])


def test_bad_ids() -> None:
    a = on_device(CPU, 1).k[0]
    b = on_device(CPU, 50).k[0]
    before = b.clone()
    s = torch.arange(4)
    for call in (
        lambda: io.transfer_kv_per_layer_mla(a, b, s + TOKENS, s, ITEM),
        lambda: io.transfer_kv_per_layer_mla(a, b, s, s + TOKENS, ITEM),
        lambda: io.transfer_kv_per_layer_mla(a, b, s, s.float(), ITEM),
        lambda: io.transfer_kv_per_layer_mla(a, b, s - 1, s, ITEM),
        lambda: io.transfer_kv_per_layer_mla(a, b, s, s - 4, ITEM),
        lambda: io.transfer_kv_direct([a], [b], s - 8, s, PAGE),
        lambda: io.transfer_kv_direct([a], [b], s, s - 4, PAGE),
        lambda: io.transfer_kv_direct([a], [b], s - 3, s, PAGE),
        lambda: io.transfer_kv_direct([a], [b], s + TOKENS, s, PAGE),
        lambda: io.transfer_kv_direct([a], [b], s[:3], s[:3], PAGE),
        lambda: io.transfer_kv_direct([a], [b], s, s, 0),
        lambda: io.transfer_kv_direct([a], [b], s.view(2, 2), s, 2),
        lambda: io.transfer_kv_direct([a], [b], s, s.to(torch.uint64), PAGE),
    ):
        bad(call, SlotError)
    bad(lambda: io.transfer_kv_per_layer_mla(a, b, s, s[:3], ITEM), IntegrationError, "same length")
    bad(lambda: io.transfer_kv_direct([a], [b], s, s[:0], PAGE), IntegrationError, "same length")
    assert torch.equal(b, before)


# --- The caller's settings ------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_any_settings_of_torch(state: str, device: torch.device) -> None:
    there = on_host("pf", device, 1)
    here = on_device(device, 50)
    direct = on_host("pfd", device, 70)
    s = ids("device", torch.int64, device, 2)
    d = ids("host", torch.int64, device, 3)
    p = pages("host", torch.int64, device, 2)
    saved = table(here.k), table(here.v)

    def call() -> None:
        with STATES[state](device):
            io.transfer_kv_all_layer_lf_pf(
                saved[0], there.k, saved[1], there.v, s, d, ITEM, PITCH, LAYERS
            )

    def pages_up() -> None:
        with STATES[state](device):
            io.transfer_kv_per_layer_direct_pf_lf([direct.k], [here.k[1]], p, p, 1, PAGE)

    sides = [(here.k, "lf"), (here.v, "lf")], [(there.k, "pf"), (there.v, "pf")]
    judge(call, device, *sides, s, d, range(LAYERS))
    judge(pages_up, device, [(direct.k, "pfd")], [(here.k, "lf")], p, p, [1])


# --- The names ------------------------------------------------------------------------------------

PAIR = "src_k dst_k src_v dst_v src_indices dst_indices"
QUOTA = "block_quota num_warps_per_block"
#: The functions of sglang-kernel 0.4.10 and their arguments.
NAMES = {
    "transfer_kv_per_layer": f"{PAIR} item_size {QUOTA}",
    "transfer_kv_per_layer_pf_lf": f"{PAIR} layer_id item_size src_layout_dim {QUOTA}",
    "transfer_kv_per_layer_ph_lf":
        f"{PAIR} layer_id item_size src_layout_dim page_size head_num {QUOTA}",
    "transfer_kv_all_layer": "src_k_layers dst_k_layers src_v_layers dst_v_layers src_indices "
        f"dst_indices item_size num_layers {QUOTA}",
    "transfer_kv_all_layer_lf_pf": "src_k_layers dst_k src_v_layers dst_v src_indices dst_indices "
        f"item_size dst_layout_dim num_layers {QUOTA}",
    "transfer_kv_all_layer_lf_ph": "src_k_layers dst_k src_v_layers dst_v src_indices dst_indices "
        f"item_size dst_layout_dim num_layers page_size head_num {QUOTA}",
    "transfer_kv_direct": "src_layers dst_layers src_indices dst_indices page_size",
    "transfer_embedding_ranges_direct": "src dst src_starts dst_starts lengths",
    "transfer_kv_per_layer_direct_pf_lf":
        "src_ptrs dst_ptrs src_indices dst_indices layer_id page_size",
    "transfer_kv_all_layer_direct_lf_pf": "src_ptrs dst_ptrs src_indices dst_indices page_size",
    "transfer_kv_per_layer_mla": f"src dst src_indices dst_indices item_size {QUOTA}",
    "transfer_kv_per_layer_mla_pf_lf":
        f"src dst src_indices dst_indices layer_id item_size src_layout_dim {QUOTA}",
    "transfer_kv_all_layer_mla":
        f"src_layers dst_layers src_indices dst_indices item_size num_layers {QUOTA}",
    "transfer_kv_all_layer_mla_lf_pf":
        f"src_layers dst src_indices dst_indices item_size dst_layout_dim num_layers {QUOTA}",
    "copy_all_layer_kv_cache_cpu": "data_ptrs strides tgt_loc src_loc",
    "get_device_accessible_ptr": "tensor device_index",
    "copy_to_gpu_no_ce": "input output",
}  # fmt: skip


def test_names_and_arguments() -> None:
    for name, arguments in NAMES.items():
        result = inspect.signature(getattr(io, name)).parameters
        assert list(result) == arguments.split(), name
        if "num_warps_per_block" in result:
            optional = name in ("transfer_kv_per_layer_mla", "transfer_kv_per_layer_mla_pf_lf")
            assert result["block_quota"].default == (None if optional else 2)
            assert result["num_warps_per_block"].default == (16 if torch.version.hip else 32)


@pytest.mark.parametrize(("message", "taken"), [(None, None), ("5", 5), ("many", None)])
def test_the_quota_of_mla_is_set_by_sglangs_variable(
    message: str | None, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_HICACHE_BLOCK_QUOTA", raising=False)
    if message is not None:
        monkeypatch.setenv("SGLANG_HICACHE_BLOCK_QUOTA", message)
    usual = 16 if torch.version.hip else 2
    assert io._block_quota(None) == (taken or usual)
    assert io._block_quota(7) == 7


def test_the_page_says_the_limits_that_hold() -> None:
    page = Path(__file__).parents[2].joinpath("docs/engines/sglang.md").read_text(encoding="utf-8")
    blocks = zero_copy.COMPUTING
    small = {method: size >> 20 for method, size in SMALL.items()}
    assert (
        f"It has {blocks['d2h']} thread blocks to the host "
        f"({zero_copy.BLOCKS} up to {small['d2h']} MiB),"
        f" and {blocks['h2d']} to the device ({zero_copy.BLOCKS} up to {small['h2d']} MiB)."
    ) in " ".join(page.split())


def test_the_quota_limits_kernels_that_reach_the_host(accelerator: torch.device) -> None:
    there = on_host("lf", accelerator, 1).k
    here = on_device(accelerator, 50).k
    s = torch.arange(3)
    with pytest.raises(InvalidTerms, match="max_thread_blocks"):
        io.transfer_kv_per_layer_mla(there[0], here[0], s, s, ITEM, block_quota=0)
    io.transfer_kv_per_layer_mla(here[1], here[0], s, s, ITEM, block_quota=0)
    strategies.clear()
    for quota, limits in ((2, {None}), (1, {None, 1})):
        io.transfer_kv_per_layer_mla(there[0], here[2], s, s, ITEM, block_quota=quota)
        assert {terms and terms.max_thread_blocks for _, terms, _ in strategies} == limits, (
            "upstream's default is 2"
        )
    synchronize(accelerator)
    assert torch.equal(here[0][:3].cpu(), here[1][:3].cpu())
