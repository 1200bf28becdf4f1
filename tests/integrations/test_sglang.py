# SPDX-License-Identifier: Apache-2.0
"""The integration inside the real SGLang, which `.ci/plugs` installs in a separate environment.

Host pools are built by SGLang and hooked by its own `load_plugins`.

Facts of a whole process (an integration that was not requested, a default device, a fork) are
tested in a separate process.
"""

from __future__ import annotations

import os
import re
import textwrap
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; see .ci/plugs", allow_module_level=True)
os.environ["PORTAKV_SGLANG"] = "1"

from support import engine_process, sglang_on_cpu  # noqa: F401, I001  before SGLang
import msgspec
from sglang.kernels.ops.kvcache import cache_move
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
from sglang.srt.mem_cache.pool_host import common, mha, mla
from sglang.srt.plugins import load_plugins
from support.ambient import STATES, State
from support.guarded_memory import check_sentence
from support.sglang_pools import DIM, HEADS, LAYERS, PAGE, device_pool

from portakv import BackendUnavailable, LayoutError, SlotError
from portakv.integrations import IntegrationError
from portakv.integrations.sglang import kvcacheio
from portakv.integrations.sglang import platform

load_plugins()

TOKENS = 64
CPU = torch.device("cpu")
BEFORE = "from support import sglang_on_cpu\n"
#: What SGLang's own methods serve, by name of the functions of `sgl_kernel.kvcacheio`.
SGLANG_CASES = [
    ("mha", "layer_first", "kernel"), ("mha", "layer_first", "direct"),
    ("mha", "page_first", "kernel"), ("mha", "page_first_direct", "direct"),
    ("mha", "page_head", "kernel"), ("unequal", "page_first", "kernel"),
    ("unequal", "page_first_direct", "direct"), ("mla", "layer_first", "kernel"),
    ("mla", "layer_first", "direct"), ("mla", "page_first", "kernel"),
    ("mla", "page_first_direct", "direct"),
]  # fmt: skip
LAYOUTS = {
    "mha": tuple(platform.HOST),
    "unequal": ("page_first", "page_first_direct"),
    "mla": tuple(platform.MLA_HOST),
}
CASES = [
    (kind, each, io) for kind, x in LAYOUTS.items() for each in x for io in ("kernel", "direct")
]
cases = pytest.mark.parametrize(
    ("kind", "layout", "io"), CASES, ids=["-".join(each) for each in CASES]
)


class Pools(NamedTuple):
    """A pool of the device and its host pool, both SGLang's own."""

    device_pool: Any
    host: Any
    buffers: list[torch.Tensor]
    device: torch.device

    def ids(self, seed: int, where: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens of some pages on the host and on the device."""
        generator = torch.Generator().manual_seed(seed)
        tokens = []
        for pages in (self.host.size // PAGE, TOKENS // PAGE + 1):
            first = torch.randperm(pages, generator=generator)[:3] * PAGE
            tokens.append((first[:, None] + torch.arange(PAGE)).flatten().to(where))
        return tokens[0], tokens[1]

    def contents(self) -> list[torch.Tensor]:
        """Return a copy of what the device holds."""
        synchronize(self.device)
        return [each.cpu().clone() for each in self.buffers]

    def lose(self) -> None:
        for each in self.buffers:
            each.zero_()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@pytest.fixture(autouse=True)
def pinned_pools_of_the_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's table of allocators names the devices whose memory torch itself pins."""
    for name in ("simdev", "privateuseone"):
        monkeypatch.setitem(common.ALLOC_MEMORY_FUNCS, name, common.alloc_with_pin_memory)


def build(kind: str, layout: str, device: torch.device, **options: Any) -> Pools:
    """Pools whose device holds random rows."""
    pool, info, buffers = device_pool(kind, TOKENS)
    generator = torch.Generator().manual_seed(1)
    for each in buffers:
        each.copy_(torch.randn(each.shape, generator=generator))
    if device.type != "cpu":  # what SGLang would have built there
        buffers = [each.to(device) for each in buffers]
        info = moved(info, kind, buffers, device)
    made = dict(
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
        pin_memory=device.type != "cpu",
        **options,
    )
    if kind == "mla":
        made["target_layer_num"] = LAYERS
        host = mla.MLATokenToKVPoolHost(info, 2.0, 0, PAGE, layout, **made)
    else:
        host = mha.get_mha_host_pool_cls(info)(info, 2.0, 0, PAGE, layout, **made)
    host.kv_buffer = each_zeroed(host.kv_buffer)
    return Pools(pool, host, buffers, device)


def each_zeroed(buffer: Any) -> Any:
    for each in [buffer] if isinstance(buffer, torch.Tensor) else buffer:
        each.zero_()
    return buffer


def moved(info: Any, kind: str, buffers: list[torch.Tensor], device: torch.device) -> Any:
    """Return SGLang's description of a pool, with its buffers on another device."""

    def table(layers: Any) -> torch.Tensor:
        return torch.tensor([x.data_ptr() for x in layers], dtype=torch.uint64).to(device)

    if kind == "mla":
        return msgspec.structs.replace(
            info, buffers=tuple(buffers), data_ptrs=table(buffers), device=buffers[0].device
        )
    k = tuple(buffers[:LAYERS])
    v = tuple(buffers[LAYERS:])
    both = msgspec.structs.replace(
        info.buffers, k=k, v=v, k_data_ptrs=table(k), v_data_ptrs=table(v)
    )
    return msgspec.structs.replace(info, buffers=both, device=buffers[0].device)


def answer(code: str, **environment: str) -> str:
    """Run code with SGLang in a new process and return the last line that it prints."""
    return engine_process.answer(BEFORE + textwrap.dedent(code), **environment)


# --- Every pool, layout and I/O backend -----------------------------------------------------------


@pytest.mark.parametrize("where", ["host", "device"])
@cases
def test_backup_and_load(kind: str, layout: str, io: str, where: str, device: torch.device) -> None:
    pools = build(kind, layout, device)
    on_host, on_device = pools.ids(2, device if where == "device" else CPU)
    before = pools.contents()
    pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, io)
    pools.lose()
    for layer in range(LAYERS):
        pools.host.load_to_device_per_layer(
            pools.device_pool, on_host, on_device, layer, io_backend=io
        )
    assert platform._ATTRIBUTE in pools.host.__dict__
    after = pools.contents()
    rows = on_device.cpu()
    for actual, right in zip(after, before, strict=True):
        wanted = torch.zeros_like(right)
        wanted[rows] = right[rows]
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    ("kind", "layout", "io"), SGLANG_CASES, ids=["-".join(each) for each in SGLANG_CASES]
)
def test_the_same_bytes_as_sglangs_own_methods(
    kind: str, layout: str, io: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's methods, unhooked, with the functions that they import from `sgl_kernel` where there
    is one, fill a host pool of the same bytes."""
    ours = build(kind, layout, device)
    original = build(kind, layout, device)
    on_host, on_device = ours.ids(3, device if io == "kernel" else CPU)
    module = mla if kind == "mla" else mha
    for name in dir(kvcacheio):
        if name.startswith("transfer_kv"):
            monkeypatch.setattr(module, name, getattr(kvcacheio, name), raising=False)
    own = type(original.host)
    ours.host.backup_from_device_all_layer(ours.device_pool, on_host, on_device, io)
    own.backup_from_device_all_layer.__wrapped__(
        original.host, original.device_pool, on_host, on_device, io
    )
    synchronize(device)
    pairs = zip(*(flat(each.host.kv_buffer) for each in (ours, original)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for each in (ours, original):
        each.lose()
    for layer in range(LAYERS):
        arguments = on_host, on_device, layer, io
        ours.host.load_to_device_per_layer(ours.device_pool, *arguments)
        own.load_to_device_per_layer.__wrapped__(original.host, original.device_pool, *arguments)
    assert all(map(torch.equal, ours.contents(), original.contents()))


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_whatever_torch_was_told_before(device: torch.device, state: State) -> None:
    pools = build("mha", "page_head", device)
    on_host, on_device = pools.ids(2)
    before = pools.contents()
    with state(device):
        pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
        pools.lose()
        for layer in range(LAYERS):
            pools.host.load_to_device_per_layer(
                pools.device_pool, on_host, on_device, layer, "direct"
            )
    for actual, right in zip(pools.contents(), before, strict=True):
        assert torch.equal(actual[on_device], right[on_device])


def flat(buffer: Any) -> list[torch.Tensor]:
    return [buffer] if isinstance(buffer, torch.Tensor) else list(buffer)


def test_layers_that_a_pool_does_not_have_are_passed_over() -> None:
    for kind in ("mha", "mla"):
        pools = build(kind, "layer_first", CPU)
        on_host, on_device = pools.ids(2)
        before = pools.contents()
        for layer in (-1, LAYERS, 99):
            pools.host.load_to_device_per_layer(
                pools.device_pool, on_host, on_device, layer, "kernel"
            )
        assert all(map(torch.equal, pools.contents(), before))


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_layers_of_a_draft_model_lie_behind_those_of_the_target(kind: str) -> None:
    draft = build(kind, "layer_first", CPU)
    info = draft.device_pool._mla_buffer_info() if kind == "mla" else draft.host._buffer_infos[0]
    if kind == "mla":
        one = msgspec.structs.replace(
            info,
            buffers=info.buffers[:1],
            data_ptrs=info.data_ptrs[:1],
            layer_indices=(0,),
            device_layer_num=1,
        )
    else:
        first = msgspec.structs.replace(
            info.buffers,
            k=info.buffers.k[:1],
            v=info.buffers.v[:1],
            k_data_ptrs=info.buffers.k_data_ptrs[:1],
            v_data_ptrs=info.buffers.v_data_ptrs[:1],
        )
        one = msgspec.structs.replace(info, buffers=first)
    pools = build(kind, "page_first", CPU, draft_buffer_infos=(one,))
    on_host, on_device = pools.ids(2)
    buffers = [draft.buffers[0]] if kind == "mla" else [draft.buffers[0], draft.buffers[LAYERS]]
    before = [each.clone() for each in buffers]
    pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
    for each in buffers:
        each.zero_()
    pools.host.load_to_device_per_layer(
        pools.device_pool, on_host, on_device, LAYERS, "kernel", is_draft=True
    )
    for actual, right in zip(buffers, before, strict=True):
        assert torch.equal(actual[on_device], right[on_device])


def test_context_parallel_ranks_keep_every_nth_token() -> None:
    pools = build("mla", "page_first", CPU)
    pools.host.dcp_size = 2
    pools.host.dcp_rank = 1
    before = pools.contents()
    wide = torch.arange(2 * PAGE)
    pools.host.backup_from_device_all_layer(pools.device_pool, wide, wide + 2 * PAGE, "direct")
    for layer in range(LAYERS):
        assert torch.equal(pools.host.kv_buffer[:PAGE, layer], before[layer][PAGE : 2 * PAGE])


def test_a_rank_that_owns_some_layers_of_mla() -> None:
    whole = build("mla", "layer_first", CPU)
    info = whole.device_pool._mla_buffer_info()
    owned = msgspec.structs.replace(
        info, buffers=info.buffers[1:], data_ptrs=info.data_ptrs[1:], layer_indices=(1, 2)
    )
    for rows in (2, 3):  # as many as it owns, and one that is reserved
        host = mla.MLATokenToKVPoolHost(
            owned,
            2.0,
            0,
            PAGE,
            "page_first",
            pin_memory=False,
            device_capacity_tokens=TOKENS,
            start_layer=0,
            end_layer=LAYERS,
            target_layer_num=rows,
            layer_shard_enabled=True,
        )
        pools = whole._replace(host=host)
        on_host, on_device = pools.ids(2)
        before = pools.contents()
        host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
        pools.lose()
        for layer in range(LAYERS):
            host.load_to_device_per_layer(pools.device_pool, on_host, on_device, layer, "kernel")
        for layer, (actual, right) in enumerate(zip(pools.contents(), before, strict=True)):
            assert torch.equal(actual[on_device], right[on_device]) is (layer in (1, 2))
        for each, right in zip(pools.buffers, before, strict=True):
            each.copy_(right)


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_rows_of_the_device_that_lie_apart(layout: str, device: torch.device) -> None:
    """SGLang's unified pool lies like this: its tokens hold all layers."""
    pools = build("mha", layout, CPU)
    unified = torch.stack(pools.buffers, 1).to(device)
    strided = list(unified.unbind(1))
    info = moved(pools.host._buffer_infos[0], "mha", strided, device)
    host = mha.MHATokenToKVPoolHost(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
    )
    assert not host.device_rows_packed
    again = pools._replace(host=host, buffers=strided, device=device)
    on_host, on_device = again.ids(2)
    before = again.contents()
    host.backup_from_device_all_layer(again.device_pool, on_host, on_device, "direct")
    again.lose()
    for layer in range(LAYERS):
        host.load_to_device_per_layer(again.device_pool, on_host, on_device, layer, "direct")
    for actual, right in zip(again.contents(), before, strict=True):
        assert torch.equal(actual[on_device], right[on_device])


def test_pages_of_ascend_without_its_kernels(device: torch.device) -> None:
    """SGLang describes its pool on an NPU by pages, without tables of addresses."""
    pools = build("mha", "page_first_direct", CPU)
    paged = [x.view(-1, PAGE, HEADS, DIM).to(device) for x in pools.buffers]
    info = moved(pools.host._buffer_infos[0], "mha", paged, device)
    both = msgspec.structs.replace(
        info.buffers, k_data_ptrs=None, v_data_ptrs=None, layout=KVBufferLayout.PAGED_NHD
    )
    info = msgspec.structs.replace(
        info, buffers=both, transfer_buffers=lambda: pytest.fail("SGLang's own method was called")
    )
    host = mha.MHATokenToKVPoolHost(
        info,
        2.0,
        0,
        PAGE,
        "page_first_direct",
        pin_memory=False,
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
    )
    again = pools._replace(host=host, buffers=paged, device=device)
    on_host, on_device = again.ids(2, device)
    before = again.contents()
    host.backup_from_device_all_layer(again.device_pool, on_host, on_device, "kernel_ascend")
    again.lose()
    for layer in range(LAYERS):
        host.load_to_device_per_layer(again.device_pool, on_host, on_device, layer, "kernel_ascend")
    pages = on_device.cpu()[::PAGE] // PAGE
    for actual, right in zip(again.contents(), before, strict=True):
        assert torch.equal(actual[pages], right[pages])


def test_its_moves_within_pools_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang pads the rows that it moves on a CPU, and hands over more than it means."""
    monkeypatch.setattr(cache_move, "_is_cpu", True)
    move = kvcacheio.copy_all_layer_kv_cache_cpu
    monkeypatch.setattr(cache_move, "copy_all_layer_kv_cache_cpu", move, raising=False)
    layers = [torch.randn(TOKENS, HEADS, DIM) for _ in range(LAYERS)]
    wanted = [each.clone() for each in layers]
    for each in wanted:
        each[[3, 4, 0]] = each[[4, 9, 0]]
    at = torch.tensor([each.data_ptr() for each in layers], dtype=torch.uint64)
    rows = torch.full((LAYERS,), HEADS * DIM * 4)
    into = torch.tensor([3, 4, 0, 0, 7])
    out_of = torch.tensor([4, 9, 0, 0, 8])
    cache_move.copy_all_layer_kv_cache_func(at, rows, into, out_of, 4, 8, {})
    assert all(map(torch.equal, layers, wanted))


# --- Bad input ------------------------------------------------------------------------------------


def test_ids_past_a_pool_are_refused_before_anything_is_moved() -> None:
    for kind in ("mha", "mla"):
        pools = build(kind, "page_first_direct", CPU)
        on_host, on_device = pools.ids(2)
        before = pools.contents()
        past = (on_host + pools.host.size, on_device), (on_host, on_device + TOKENS + PAGE)
        below = (on_host - TOKENS, on_device), (on_host, on_device - TOKENS)
        for ids in (*past, *below):
            for io in ("kernel", "direct"):
                with pytest.raises(SlotError) as raised:
                    pools.host.load_to_device_per_layer(pools.device_pool, *ids, 0, io)
                check_sentence(str(raised.value))
        assert all(map(torch.equal, pools.contents(), before))


def test_another_io_backend_stays_sglangs() -> None:
    """SGLang knows none of that name."""
    pools = build("mha", "page_first", CPU)
    arguments = pools.device_pool, *pools.ids(2)
    with pytest.raises(ValueError, match="Unsupported IO backend: nonsense"):
        pools.host.backup_from_device_all_layer(*arguments, "nonsense")
    with pytest.raises(ValueError, match="Unsupported IO backend: nonsense"):
        pools.host.load_to_device_per_layer(*arguments, 0, "nonsense")


def test_a_pool_that_was_destroyed(device: torch.device) -> None:
    pools = build("mha", "page_first", device, allocator_type="default")
    pools.host.pin_memory = False  # torch's own pinned memory, which SGLang does not unregister
    on_host, on_device = pools.ids(2)
    pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "direct")
    for layer in range(LAYERS):
        pools.host.load_to_device_per_layer(pools.device_pool, on_host, on_device, layer, "direct")
    last = pools.host.__dict__[platform._ATTRIBUTE]._last
    pools.host.destroy()
    assert set(last) == {CPU, pools.buffers[0].device}
    assert all(each.done() for each in last.values())
    assert platform._ATTRIBUTE not in pools.host.__dict__
    with pytest.raises(IntegrationError) as raised:
        pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "direct")
    check_sentence(str(raised.value), "MHATokenToKVPoolHost")


ODD = {
    "fewer dimensions": ("mha", "page_first", lambda x: x.flatten(-2)),
    "one of MLA": ("mla", "page_first", lambda x: x[0]),
    "none to divide": ("mha", "page_first", lambda x: x[:, :-1]),
}


@pytest.mark.parametrize(("kind", "layout", "change"), ODD.values(), ids=ODD)
def test_a_layout_that_was_never_seen(kind: str, layout: str, change: Any) -> None:
    """It is refused with shape and strides, and by both directions."""
    pools = build(kind, layout, CPU)
    pools.host.kv_buffer = odd = change(pools.host.kv_buffer)
    shape, strides = (odd.shape, odd.stride()) if kind == "mla" else (odd[0].shape, odd[0].stride())
    named = re.escape(f"shape {tuple(shape)}, strides {strides}")
    on_host, on_device = pools.ids(2)
    with pytest.raises(LayoutError, match=named) as raised:
        pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
    check_sentence(str(raised.value))
    with pytest.raises(LayoutError, match=named):
        pools.host.load_to_device_per_layer(pools.device_pool, on_host, on_device, 0, "kernel")


def test_a_pool_of_other_layers_is_refused() -> None:
    pools = build("mha", "page_head", CPU)
    pools.host.kv_buffer = pools.host.kv_buffer.transpose(-1, -2)
    with pytest.raises(LayoutError, match="'layer' extent") as raised:
        pools.host.backup_from_device_all_layer(pools.device_pool, *pools.ids(2), "kernel")
    check_sentence(str(raised.value))


def test_a_device_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = build("mha", "page_first", CPU)
    on_host, on_device = pools.ids(2)
    before = pools.contents()
    monkeypatch.setenv("PORTAKV_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable) as raised:
        pools.host.load_to_device_per_layer(pools.device_pool, on_host, on_device, 0, "kernel")
    check_sentence(str(raised.value), "cpu")
    assert all(map(torch.equal, pools.contents(), before))


def test_buffers_that_were_made_again_between_two_calls() -> None:
    pools = build("mha", "page_first", CPU)
    on_host, on_device = pools.ids(2)
    pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
    old = pools.host.kv_buffer
    pools.host.kv_buffer = torch.zeros_like(old)
    pools.host.backup_from_device_all_layer(pools.device_pool, on_host, on_device, "kernel")
    assert torch.equal(pools.host.kv_buffer, old)
    others = tuple(torch.zeros_like(each) for each in pools.host.device_k_buffers)
    pools.host.device_k_buffers = others
    pools.host.load_to_device_per_layer(pools.device_pool, on_host, on_device, 1, "kernel")
    assert torch.equal(others[1][on_device], pools.buffers[1][on_device])


def test_a_layout_of_the_device_that_is_not_read_stays_sglangs() -> None:
    pools = build("mha", "page_head", CPU)
    info = pools.host._buffer_infos[0]
    odd = msgspec.structs.replace(info.buffers, layout=KVBufferLayout.VECTORIZED_5D)
    pools.host._buffer_infos = (msgspec.structs.replace(info, buffers=odd),)
    with pytest.raises(ValueError, match="Unsupported layout: page_head"):
        pools.host.load_to_device_per_layer(pools.device_pool, *pools.ids(2), 0, "direct")


def test_host_memory_that_sglang_registered_in_pieces_is_cut_there() -> None:
    pools = build("mha", "page_first", CPU)
    at = pools.host.kv_buffer.data_ptr()
    half = pools.host.kv_buffer.nbytes // 2
    pieces = ((at, half), (at + half, half))
    setattr(pools.host.kv_buffer, platform._RANGES, list(pieces))
    assert platform._RANGES == common._CUDA_HOST_REGISTERED_RANGES_ATTR
    pools.host.backup_from_device_all_layer(pools.device_pool, *pools.ids(2), "kernel")
    state = pools.host.__dict__[platform._ATTRIBUTE]
    assert state._adopted.pieces == pieces


def test_two_engines_in_one_process() -> None:
    a = build("mha", "page_head", CPU)
    b = build("mha", "page_head", CPU)
    b.lose()
    for pools in (a, b):
        ids = pools.ids(2)
        pools.host.backup_from_device_all_layer(pools.device_pool, *ids, "kernel")
    assert a.host.kv_buffer.any()
    assert not b.host.kv_buffer.any()


# --- Chosen by configuration alone ----------------------------------------------------------------

WHICH = """
    from sglang.srt.plugins import load_plugins
    load_plugins()
    import sys
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost as pool
    hooked = hasattr(pool.backup_from_device_all_layer, "__wrapped__")
    print(hooked, "sgl_kernel.kvcacheio" in sys.modules)
"""


def test_an_installed_plug_does_nothing_until_it_is_asked_for() -> None:
    assert answer(WHICH) == "False False"
    assert answer(WHICH, PORTAKV_SGLANG="0") == "False False"


def test_one_variable_chooses_it_and_stands_for_kernels_that_are_missing() -> None:
    assert answer(WHICH, PORTAKV_SGLANG="1") == "True True"


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.22"])
def test_a_release_outside_the_matrix_is_refused_with_both_versions(installed: str) -> None:
    before = f"""
    from importlib import metadata
    real = metadata.version
    metadata.version = lambda name: {installed!r} if name == "sglang" else real(name)
    """
    code = BEFORE + textwrap.dedent(before) + textwrap.dedent(WHICH)
    done = engine_process.in_a_process(code, PORTAKV_SGLANG="1")
    assert done.stdout.strip().splitlines()[-1] == "False False"  # SGLang logs it and goes on
    message = next(x for x in done.stderr.splitlines() if "IntegrationError: " in x)
    assert f"sglang {installed}" in message
    assert "PortaKV 0." in message
    check_sentence(message.partition(": ")[2])


ROUND = """
    import torch
    {before}
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    def made():
        pool = MHATokenToKVPool(64, 8, torch.bfloat16, 2, 16, 3, "cpu", False)
        host = MHATokenToKVPoolHost(
            pool._mha_buffer_info(), 2.0, 0, 8, "page_head", pin_memory=False,
            device_capacity_tokens=64, start_layer=0, end_layer=3)
        return pool, host

    def judge(pool, host):
        for each in (*pool.k_buffer, *pool.v_buffer):
            each.copy_(torch.arange(each.numel(), device="cpu").view(each.shape) % 251)
        ids = torch.arange(16, 32, device="cpu")
        before = [x.clone() for x in (*pool.k_buffer, *pool.v_buffer)]
        host.backup_from_device_all_layer(pool, ids, ids, "kernel")
        for each in (*pool.k_buffer, *pool.v_buffer):
            each.zero_()
        for layer in range(3):
            host.load_to_device_per_layer(pool, ids, ids, layer, "direct")
        now = (*pool.k_buffer, *pool.v_buffer)
        return all(a[ids].equal(b[ids]) for a, b in zip(now, before))
    {after}
"""


@pytest.mark.parametrize(
    "before",
    [
        "torch.set_default_device('meta')",
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta'); torch.set_default_dtype(torch.bfloat16)",
    ],
    ids=["device", "dtype", "both"],
)
def test_defaults_of_torch_that_were_set_before_the_first_use(before: str) -> None:
    after = f"torch.set_default_device('cpu'); pair = made(); {before}; print(judge(*pair))"
    assert answer(ROUND.format(before="", after=after), PORTAKV_SGLANG="1") == "True"


def test_in_worker_processes() -> None:
    after = """
    pair = made()
    def work():
        assert judge(*pair)
        assert judge(*made())
    """
    code = BEFORE + textwrap.dedent(ROUND.format(before="", after=after))
    engine_process.check_in_workers(code, PORTAKV_SGLANG="1")
