# SPDX-License-Identifier: Apache-2.0
"""`ascend` on the simulated device named npu: by the ops of a stand-in for torch_npu, and by the
emulated AscendC kernel with the real loader, arguments and launches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.cuda_cases import Copy, End, by
from support.each_backend import Carrier, Elsewhere
from support.guarded_memory import filled
from support.own_process import in_child, own_process
from torch.utils._python_dispatch import TorchDispatchMode

from portakv import CopyPlan, Index, KVView, TransferError
from portakv.backends import ascend_kernel
from portakv.backends.ascend import Ascend
from portakv.backends.ascend_kernel import Arguments, Kernel, KernelRows, Memory
from portakv.plan.plan import Move
from portakv.registry.registry import choose
from portakv_conformance import simdev
from portakv_conformance.vendor import standins
from portakv_conformance.vendor.ascendc_npu import AscendKernel

pytestmark = own_process("npu", "ascend")
DEVICE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)
if in_child():
    standins.install("npu")
    choose(DEVICE, "ascend")  # with its self-check, whose calls must not count

LAYERS = 2
BLOCKS = 4
SIZE = 8
HEADS = 2
PLANES = 2 * LAYERS
SLOTS = BLOCKS * SIZE
IDS = [9, 2, 31, 17, 6, 0]
SCATTER = "npu_scatter_pa_kv_cache"
GATHER = "npu_gather_pa_kv_cache"
UPDATE = "npu_scatter_nd_update_"
COPY = "index_copy_"
SELECT = "index_select"
BF16 = torch.bfloat16
F16 = torch.float16
I16 = torch.int16
I8 = torch.int8
PAIRS = "layer kv | block token head dim"
ROWS = "layer kv | token head dim"
MERGED = "layer | kv block token head dim"
#: Caches: the layout, elements of each kv, the dtype, and the shape of a layer's tensor, if it has
#: one for all kv, or of each kv's.
CACHES: dict[str, tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...]]] = {
    "tuples": (PAIRS, (16, 16), BF16, ()),
    "unequal": (PAIRS, (64, 32), F16, ()),  # MLA: latent and rope
    "three": (PAIRS, (64, 32, 16), BF16, ()),  # DSA
    "two bytes": (PAIRS, (5, 5), I16, ()),
    "holes": (PAIRS, (16, 16), F16, ()),
    "merged": (MERGED, (16, 16), F16, (2, BLOCKS, SIZE, HEADS, 16)),
    "offset": (MERGED, (16, 16), F16, (2, BLOCKS, SIZE, HEADS, 16)),
    "head-major": ("layer | kv block head token dim", (16, 16), F16, (2, BLOCKS, HEADS, SIZE, 16)),
    "odd bytes": ("layer | kv block head token dim", (3, 3), I8, (2, BLOCKS, HEADS, SIZE, 3)),
    "nz": ("layer kv | block head dim/32 token dim%32", (64, 64), I8, (BLOCKS, HEADS, 2, SIZE, 32)),
}


def cache(name: str) -> End:
    layout, dims, dtype, shape = CACHES[name]
    wide = 8 if name == "holes" else 0
    if name == "offset":  # sliced out of one allocation
        whole = filled((48 + LAYERS * torch.Size(shape).numel(),), dtype)
        return End(list(whole[48:].view(LAYERS, *shape)), layout)
    if layout.startswith("layer |"):
        return End([filled(shape, dtype) for _ in range(LAYERS)], layout)
    shapes = [shape or (BLOCKS, SIZE, HEADS, dim + wide) for dim in dims]
    layers = [[filled(each, dtype) for each in shapes] for _ in range(LAYERS)]
    if wide:
        layers = [[tensor[..., :-wide] for tensor in layer] for layer in layers]
    return End(layers, layout, {"kv": len(dims)})


def chunk(name: str, tokens: int, **more: Any) -> End:
    _, dims, dtype, _ = CACHES[name]
    layers = [[filled((tokens, HEADS, dim), dtype) for dim in dims] for _ in range(LAYERS)]
    return End(layers, ROWS, {"kv": len(dims)}, **more)


class Recorded(TorchDispatchMode):
    """Counts the ops that move rows, and holds each call against what the ops forbid."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in (SCATTER, GATHER, UPDATE, COPY, SELECT):
            self.seen[name] += 1
            moved = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
            assert all(x.is_contiguous() for x in moved), f"{name} was given holes"
            assert named.get("cache_mode", "Norm") == "Norm"
        return func(*args, **named)


OPS = Carrier(Ascend, DEVICE)
KERNEL = Carrier(AscendKernel, DEVICE)
by_both = pytest.mark.parametrize("carrier", [OPS, KERNEL], ids=["ops", "kernel"])


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> Iterator[None]:
    with registered(**{AscendKernel.name: AscendKernel}):
        choose(DEVICE, AscendKernel.name)
        yield


@pytest.fixture(autouse=True)
def _no_faults_left() -> Iterator[None]:
    """Assert that no op met a negative slot or a slot past the end."""
    yield
    torch.accelerator.synchronize(DEVICE)
    assert simdev.take_faults() == []


def both_directions(carrier: Carrier, name: str, tokens: int, **index: Any) -> list[dict[str, int]]:
    """Gather and scatter, every byte judged; the ops that were called."""
    seen = []
    for scatters in (False, True):
        paged = by(cache(name), **index)
        dense = chunk(name, tokens)
        with Recorded() as recorded:
            carrier.copies(Copy(dense, paged, tokens) if scatters else Copy(paged, dense, tokens))
        seen.append(dict(recorded.seen))
    return seen


#: What gathers from each cache by blocks, and what scatters to it by slots.
SERVES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    **dict.fromkeys(
        ("tuples", "merged", "offset", "unequal"), ({GATHER: LAYERS}, {SCATTER: LAYERS})
    ),
    "three": ({GATHER: LAYERS, SELECT: LAYERS}, {SCATTER: LAYERS, UPDATE: LAYERS}),
    **dict.fromkeys(
        ("head-major", "nz", "holes", "odd bytes"), ({SELECT: PLANES}, {UPDATE: PLANES})
    ),
    "two bytes": ({SELECT: PLANES}, {COPY: PLANES}),
}


@pytest.mark.parametrize("name", CACHES)
def test_which_op_serves(name: str) -> None:
    """The kernel, once built, serves any layout."""
    gathers, scatters = SERVES[name]
    planes = len(CACHES[name][1]) * LAYERS
    slots: dict[str, Any] = {"tokens": len(IDS), "ids": IDS}
    blocks: dict[str, Any] = {"tokens": 3 * SIZE, "ids": [3, 0, 2], "step": SIZE}
    inside = {**blocks, "tokens": 2 * SIZE, "offset": 3}
    assert both_directions(OPS, name, **slots) == [{SELECT: planes}, scatters]
    assert both_directions(OPS, name, **blocks)[0] == gathers
    # Head and tail of a range that cuts through blocks go by slots.
    assert SELECT in both_directions(OPS, name, **inside)[0]
    for index in (slots, blocks, inside):
        assert both_directions(KERNEL, name, **index) == [{}, {}]


# What they say


def views(name: str = "tuples", tokens: int = 4) -> tuple[KVView, KVView]:
    """A cache and a chunk on the device."""
    view, rows = Elsewhere(DEVICE).views(cache(name), chunk(name, tokens))
    return view, rows


def test_explain_names_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    view, rows = views()
    host = chunk("tuples", 4).view()
    backend = Ascend(DEVICE)
    kernel = AscendKernel(DEVICE)
    assert (backend.emulated, backend.capabilities().guards) == (True, False)
    assert kernel.capabilities().guards
    scatters = CopyPlan(rows.form, view.form, 0, 1)
    for plan, decision in [
        (scatters, f"accepted, takes the plan by {SCATTER}"),
        (CopyPlan(view.form, rows.form, SIZE, 0), f"accepted, takes the plan by {GATHER}"),
        (
            CopyPlan(view.form, rows.form, 1, 0),
            "accepted, takes the plan by rows, through index ops",
        ),
        (
            CopyPlan(view.form, host.form, 1, 0),
            "rejected, it does not copy from device to pageable memory",
        ),
    ]:
        assert str(backend.check(plan)) == f"ascend: {decision}"
    assert str(kernel.check(scatters)).endswith("takes the plan by the AscendC kernel")
    monkeypatch.setattr(ascend_kernel, "MAX_LOOPS", 0)
    assert str(kernel.check(scatters)) == (
        "ascend-kernel: accepted, takes the plan by index ops, after a wait, since the AscendC "
        "kernel takes 0 loops above the rows and 4 steps of a unit, and the plan has 2 and 1"
    )
    # Which guards as well as the kernel does.
    status = KERNEL.word()
    KERNEL.launch_and_check(
        Copy(chunk("tuples", 4), by(cache("tuples"), [9, -1, SLOTS, 5]), 4), status
    )
    assert int(status) == 3


# Bad ids


@pytest.mark.parametrize("there", [False, True], ids=["host", "device"])
def test_negative_slots_never_reach_an_op(there: bool) -> None:
    copy = Copy(chunk("tuples", 4), by(cache("tuples"), [9, -1, -(2**31), 5]), 4)
    with Recorded() as recorded:
        OPS.copies(copy, there=there)
    assert recorded.seen == {SELECT: PLANES, UPDATE: PLANES}  # what is left of the chunk has holes


# Devices


@by_both
def test_block_migration_within_one_cache(carrier: Carrier) -> None:
    pool = cache("three")
    carrier.copies(Copy(by(pool, [0, 2], SIZE), by(pool, [3, 1], SIZE), 2 * SIZE))


def test_what_torch_npu_would_refuse() -> None:
    matrix = torch.zeros(4, 2).to(OTHER)
    rows = torch.ones(1, 2).to(OTHER)
    where = torch.tensor([[1]]).to(OTHER)
    with pytest.raises(RuntimeError, match="tensor on npu:1; the current device is npu:0"):
        torch.ops.npu.npu_scatter_nd_update_(matrix, where, rows)
    rows = torch.zeros(2, 1, 32).to(DEVICE)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'slots'"):
        torch.ops.npu.npu_scatter_pa_kv_cache(rows, rows, rows, rows, rows, slots=rows)


def test_the_stand_in_leaves_another_package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", vendor)
    standins.install("npu")
    assert sys.modules["torch_npu"] is vendor


# Launches of the kernel


def loaded() -> Kernel:
    kernel, _ = AscendKernel.find_kernel(True)
    assert kernel is not None
    return kernel


def test_a_stream_of_another_device_than_the_current_one_is_refused() -> None:
    paged, dense = Elsewhere(OTHER).views(cache("tuples"), chunk("tuples", 4))
    rows = KernelRows(loaded(), CopyPlan(dense.form, paged.form, 0, 0), OTHER)
    with pytest.raises(TransferError, match=r"returned 107003; the copy was not made"):
        rows.carry(Move(dense, paged, Index(), Index(), 4), None)


def test_a_status_word_on_the_host_is_refused() -> None:
    """A vector core does not reach it, pinned or not."""
    paged, dense = views()
    word = torch.zeros(1, dtype=torch.int64).pin_memory()
    arguments = Arguments(CopyPlan(dense.form, paged.form, 0, 0))
    nests = [
        torch.frombuffer(bytearray(nest), dtype=torch.int64).to(DEVICE) for nest in arguments.nests
    ]
    move = Move(dense, paged, Index(), Index(), 4)
    copy = arguments.copies([nest.data_ptr() for nest in nests], move, word.data_ptr())[0]
    stream = torch.get_device_module("npu").current_stream(DEVICE).npu_stream
    with pytest.raises(TransferError, match=r"returned 507053; the copy was not made"):
        loaded().launch(copy, [Memory(word.data_ptr(), 8, True)], stream)


@by_both
def test_an_empty_copy_launches_nothing(carrier: Carrier) -> None:
    with Recorded() as recorded:
        carrier.copies(Copy(chunk("tuples", 4), by(cache("tuples"), []), 0))
    assert not recorded.seen


def test_a_prepared_launch_serves_any_request_of_its_plan() -> None:
    """The nests are uploaded once; every address and count is the request's."""
    pools = [cache("tuples"), cache("tuples")]
    there = Elsewhere(DEVICE)
    first, second = there.views(*pools)
    launch = AscendKernel(DEVICE).prepare(CopyPlan(first.form, second.form, SIZE, SIZE))
    for (src_view, dst_view), (src, dst) in (
        ((first, second), pools),
        ((second, first), pools[::-1]),
    ):
        read, written = (Index(torch.tensor([at]).to(DEVICE), SIZE) for at in (1, 3))
        move = Move(src_view, dst_view, read, written, SIZE)

        def carry(move: Move = move) -> None:
            launch(*move, None, None)
            torch.accelerator.synchronize(DEVICE)
            there.bring_back()

        Copy(by(src, [1], SIZE), by(dst, [3], SIZE), SIZE).check(carry)
