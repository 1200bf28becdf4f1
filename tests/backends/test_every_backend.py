# SPDX-License-Identifier: Apache-2.0
"""Every backend passes one table of copies, judged byte by byte, wherever it runs.

Here the kernels of `cuda`, `hip` and `ascend` run on the host, `triton` under its interpreter, and
`ascend` and `mlu` over stand-ins on the simulated device; a GPU has the real ones. Under a checker
of device memory, without whose cache the allocator gives each tensor separate memory::

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -m pytest -m sanitize tests/backends/test_every_backend.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from support import paged_cases
from support.command_line import python, registered
from support.core_cases import GIB, lazy, noise
from support.cuda_cases import CHUNK, COPIES, HND, NHD, Copy, by, chunk, objects, pool, unequal
from support.cuda_on_cpu import CudaOnCpu
from support.direct_on_cpu import Loads, Stores, installed
from support.each_backend import REPEATED, Carrier, Elsewhere
from support.guarded_memory import filled, refused, same
from support.own_process import in_child, own_process
from support.threads import run_threads

from portakv import AdaptiveConnector, CopyPlan, Index, KVView, copy_rows
from portakv.backends import _triton_rows, rows_kernel
from portakv.backends.ascend import Ascend
from portakv.backends.base import Backend
from portakv.backends.compiled import Compiled
from portakv.backends.cuda import Cuda
from portakv.backends.mlu import Mlu
from portakv.backends.reference import Reference
from portakv.backends.triton import Triton
from portakv.errors import LayoutError, Unsupported
from portakv.registry import registry
from portakv.runtime.devices import this_process
from portakv_conformance import simdev
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.judging import index_of, view_of
from portakv_conformance.vendor import standins
from portakv_conformance.vendor.ascendc_emulated import AscendC
from portakv_conformance.vendor.ascendc_npu import AscendKernel
from portakv_conformance.vendor.hip_emulated import HipEmulated

if in_child():
    standins.install(os.environ["SIMDEV_NAME"])

#: The interpreter takes ten seconds to start.
INTERPRETED = [
    *own_process("", "triton interpreted", TRITON_INTERPRET="1"),
    pytest.mark.full,
]
GPU = [pytest.mark.gpu, pytest.mark.sanitize]
#: What compiles kernels here keeps them in its process: one of pytest's has all tests of each.
TOGETHER = {x: [pytest.mark.xdist_group(x)] for x in ("cuda-on-cpu", "hip", "ascendc", "inductor")}
#: Backends that skip and guard: class, the device's type, vectors of a thread, marks.
KERNELS: dict[str, tuple[type[Backend], str, int, Any]] = {
    "cuda-on-cpu": (CudaOnCpu, "cpu", 1, TOGETHER["cuda-on-cpu"]),
    "cuda-on-cpu, two vectors": (CudaOnCpu, "cpu", 2, TOGETHER["cuda-on-cpu"]),
    "hip-emulated": (HipEmulated, "cpu", 1, TOGETHER["hip"]),
    "ascendc": (AscendC, "cpu", 0, TOGETHER["ascendc"]),
    "direct, loads": (Loads, "cpu", 0, ()),
    "direct, stores": (Stores, "cpu", 0, ()),
    "compiled": (Compiled, "cpu", 0, TOGETHER["inductor"]),
    "triton interpreted": (Triton, "cpu", 0, INTERPRETED),
    "ascend kernel": (AscendKernel, "privateuseone", 0, own_process("npu", "ascend")),
    "cuda": (Cuda, "cuda", 1, GPU),
    "cuda, two vectors": (Cuda, "cuda", 2, GPU),
    "triton": (Triton, "cuda", 0, GPU),
    "compiled on a GPU": (Compiled, "cuda", 0, GPU),
}
OTHERS: dict[str, tuple[type[Backend], str, int, Any]] = {
    "reference": (Reference, "cpu", 0, ()),
    "reference on a GPU": (Reference, "cuda", 0, GPU),
    "ascend": (Ascend, "privateuseone", 0, own_process("npu", "ascend")),
    "mlu": (Mlu, "privateuseone", 0, own_process("mlu", "mlu")),
}
ALL = {**KERNELS, **OTHERS}
DIRECT = ("direct, loads", "direct, stores")
WITH_SPACE = [name for name in KERNELS if name != "ascend kernel"]  # for 5 GiB
TABLE = {**COPIES, **REPEATED}
STATES = (
    "default device meta",
    "with torch.device meta",
    "default dtype bfloat16",
    "inference mode",
    "deterministic algorithms",
    "number of threads",
    "warnings as errors",
)
_CLEAN = [11, 0, 6, 5, 3, 9, 1]
#: Copies with clean ids that show of every part of a backend whether it minds.
SHOWN: dict[str, Callable[[], Copy]] = {
    "gather": lambda: Copy(by(pool(), _CLEAN), chunk(7), 7),
    "scatter": lambda: Copy(chunk(7), by(pool(), _CLEAN), 7),
    "blocks": lambda: Copy(by(pool(), [2, 0], 4), chunk(8), 8),
    "memory objects": lambda: Copy(by(pool(), _CLEAN), objects(), 7),
    "two nests": lambda: Copy(by(unequal().src, _CLEAN), unequal().dst, 7),
}
IN_STATES = {f"{x} within {state}": (state, x) for state in STATES for x in SHOWN}
#: What `compiled` copies on the host outside of ``.ci/full``, and what `triton` does not.
FEW = {
    "gather",
    "scatter",
    "blocks",
    "memory objects, scattered",
    "one block for all",
    "gather within default device meta",
    "gather within inference mode",
}
#: A copy for each width of a vector and each kind of table: what `hip` compiles in each run, since
#: its text is the one of `cuda` but for a few words.
SHAPES = {
    "gather",
    "scatter",
    "blocks",
    "several units of an id",
    "two nests",
    "NZ blocks",
    "memory objects, gathered",
    "memory objects, blocks",
    "more planes than the arguments hold",
    *(f"gather of {width} B rows" for width in (40, 12, 6, 3)),
}
SLOW = {"more planes than the arguments hold", *(x for x in IN_STATES if "gather" not in x)}


@pytest.fixture(scope="module")
def carrier(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Carrier]:
    """Yield a backend, registered unless the library registers it; it prefetches in the smallest
    copies, and a separate cache on disk holds its kernels."""
    backend, kind, vectors, _ = ALL[request.param]
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
    decision = backend.probe(device)
    if not decision.accepted:
        pytest.skip(decision.reason)
    own: AbstractContextManager[Any] = nullcontext()
    if backend in (CudaOnCpu, HipEmulated, AscendC, AscendKernel, Loads, Stores):
        own = registered(**{backend.name: backend})
    driver = installed() if backend in (Loads, Stores) else nullcontext()
    with pytest.MonkeyPatch.context() as patched, own, driver:
        patched.delenv("PORTAKV_BACKEND", raising=False)
        patched.setenv("PORTAKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        if vectors and backend is not HipEmulated:
            patched.setattr(rows_kernel, "TUNING", (rows_kernel.Tuning(0, vectors, 48),))
        yield Carrier(backend, device)
        if kind == "privateuseone":
            torch.accelerator.synchronize(device)
            assert not simdev.take_faults()


def by_each(carriers: Any, *, wide: Any = ()) -> pytest.MarkDecorator:
    """Run a test by each of some backends; by those named in ``wide`` in ``.ci/full`` only."""
    made = [pytest.param(x, marks=_marks(x, x in wide)) for x in carriers]
    return pytest.mark.parametrize("carrier", made, indirect=True)


def _marks(carrier: str, wide: bool) -> list[Any]:
    return [*ALL[carrier][3], *[pytest.mark.full] * wide]


def by_each_on(carriers: Any, things: Any) -> pytest.MarkDecorator:
    """Run a test by each of some backends on each of some things.

    On the host `compiled` takes seconds for each shape, the interpreter for each plane, and `hip`
    and `zero_copy` half a second for each kernel: all but a few are for ``.ci/full``.
    """
    wide = {
        "compiled": [x for x in things if x not in FEW],
        "triton interpreted": [x for x in things if x in SLOW],
        "hip-emulated": [x for x in things if x in TABLE and x not in SHAPES],
        **{each: [x for x in things if x not in {*COPIES, *FEW}] for each in DIRECT},
    }
    made = [
        pytest.param(each, x, id=f"{x}-{each}", marks=_marks(each, x in wide.get(each, ())))
        for each in carriers
        for x in things
    ]
    return pytest.mark.parametrize(("carrier", "name"), made, indirect=["carrier"])


@by_each_on(ALL, TABLE)
def test_every_byte_lands(name: str, carrier: Carrier) -> None:
    carrier.copies(TABLE[name]())


DRAWN = [x for x in WITH_SPACE if x not in ("hip-emulated", "cuda", "cuda, two vectors")]


@by_each(DRAWN, wide=["compiled"])
@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.full)])
def test_drawn_copies(share: int, carrier: Carrier) -> None:
    profile = settings.default
    assert profile is not None
    share *= 4 if carrier.backend in (Compiled, Triton, Loads, Stores) else 1

    @settings(max_examples=max(6, profile.max_examples // share))
    @given(all_cases(device=carrier.device.type))
    def check(case: Case) -> None:
        src = view_of(case.src)
        dst = view_of(case.dst)
        src_index = index_of(case.src)
        dst_index = index_of(case.dst)
        case.check(
            lambda: copy_rows(
                src, dst, src_index, dst_index, count=case.count, backend=carrier.name
            ).synchronize()
        )

    check()


# Bad ids

WILD = [(torch.int32, 2**31 - 1), *((torch.int64, n) for n in (12, 2**31, 2**32 + 1, 2**63 - 1))]


@by_each(KERNELS)
@pytest.mark.parametrize(("dtype", "bad"), WILD, ids=str)
def test_a_bad_id_moves_nothing_and_is_told(dtype: torch.dtype, bad: int, carrier: Carrier) -> None:
    for at in (0, 6):
        slots = [3, 1, -1, 7, 0, 11, 5, -(2**31)]
        slots[at] = bad
        paged = by(pool(), slots, dtype=dtype)
        dense = chunk(8)
        for copy in (Copy(paged, dense, 8), Copy(dense, paged, 8)):
            status = carrier.word()
            carrier.launch_and_check(copy, status)
            assert int(status) == at + 1
    carrier.launch_and_check(copy, None)


@by_each(KERNELS)
@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "step", "reported"),
    [
        ([1, 2**61, 0], [2, 1, 0], 4, (5,)),  # a block of the source
        ([2, -1, 1], [0, 1, 2**63 - 1], 4, (9,)),  # one of the destination
        ([3, 0, 1], [-1, 0, 1], 4, (1,)),  # it is reported although the other side skips it
        ([2, -(2**63), 5, 1], [2, 0], 8, (5, 9)),  # of five blocks of 4 half a block of 8 is there
        ([-1, 0, -1], None, 1, (2,)),  # of a view without slots
    ],
    ids=["source", "destination", "skipped", "half a block", "no slots"],
)
def test_bad_blocks_on_either_side(
    src_ids: list[int],
    dst_ids: list[int] | None,
    step: int,
    reported: tuple[int, ...],
    carrier: Carrier,
) -> None:
    blocks = {1: 0, 4: 3, 8: 5}[step]
    unit = min(step, 4)
    dst = chunk(3) if dst_ids is None else by(pool(blocks=blocks), dst_ids, step)
    copy = Copy(by(pool(blocks=blocks), src_ids, unit), dst, unit * len(src_ids))
    status = carrier.word()
    assert copy.plan().unit == unit
    carrier.launch_and_check(copy, status)
    assert int(status) in reported


@by_each(WITH_SPACE)  # the report of the AscendC kernel is copied to the word
def test_of_several_bad_ids_the_first_is_reported_and_stays(carrier: Carrier) -> None:
    status = carrier.word()
    for slots in ([12, 1, 13, 2, 99, 0, 5, 3], [1, 2, -1, 3, 4, 5, 6, 7]):
        carrier.launch_and_check(Copy(by(pool(), slots), chunk(8), 8), status)
        assert int(status) == 1


# Far and large


def far_away(device: torch.device) -> torch.Tensor:
    """``[5, 4, 32]`` bytes at strides of 1 GiB and 64 B."""
    size = 5 * GIB
    whole = lazy(size) if device.type == "cpu" else torch.zeros(size, dtype=torch.uint8).to(device)
    return whole.as_strided((5, 4, 32), (GIB, 64, 1)).copy_(noise(5, 4, 32, dtype=torch.uint8))


@by_each(WITH_SPACE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_past_two_and_four_gib(dtype: torch.dtype, carrier: Carrier) -> None:
    cache = far_away(carrier.device)
    slots = torch.tensor([19, 0, 9, 16, 13], dtype=dtype, device=carrier.device)
    wanted = cache.flatten(0, 1)[slots.long()]
    rows = filled((5, 32), torch.uint8, device=carrier.device)
    paged = KVView(cache, "block token dim")
    dense = KVView(rows, "token dim")
    copy_rows(paged, dense, slots, backend=carrier.name).synchronize()
    assert torch.equal(rows, wanted)
    cache.zero_()
    copy_rows(dense, paged, None, slots, backend=carrier.name).synchronize()
    assert torch.equal(cache.flatten(0, 1)[slots.long()], wanted)


@by_each(WITH_SPACE, wide=["compiled"])
def test_strides_past_four_gib_inside_a_unit_and_between_planes(carrier: Carrier) -> None:
    """A gap of 4 GiB and more cannot be named by a transfer of AscendC: the loop stays a loop."""
    far = far_away(carrier.device)
    farther = far[::4]
    for source, axes in (
        (far, "layer token dim"),
        (far.transpose(0, 1), "token head dim"),
        (farther, "head token dim"),
        (farther.transpose(0, 1), "token head dim"),
    ):
        landed = filled(source.shape, torch.uint8, device=carrier.device)
        copy_rows(KVView(source, axes), KVView(landed, axes), backend=carrier.name).synchronize()
        assert torch.equal(landed, source)


@by_each(["cuda-on-cpu", "hip-emulated", "triton interpreted", "cuda", "triton"])
def test_a_copy_of_several_launches(carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    """More vectors than one launch may count; positions are named by their place in the whole."""
    for module, limit in ((rows_kernel, "MAX_VECTORS"), (_triton_rows, "MAX_VECTORS")):
        monkeypatch.setattr(module, limit, 8)
    slots = [*range(11, -1, -1), *range(11)]
    slots[17] = 12
    status = carrier.word()
    carrier.launch_and_check(Copy(by(pool(), slots), chunk(23), 23), status)
    assert int(status) == 18


@by_each(["hip-emulated", "compiled", DIRECT[1], "cuda", "triton", "compiled on a GPU"])
def test_threads_share_a_launch(carrier: Carrier) -> None:
    """Each thread has separate arguments: a launch copies them when it is called, not before."""

    def work(n: int) -> None:
        copy = Copy(by(pool(), [n, 11 - n, 5, 0]), chunk(4), 4)
        for _ in range(20):
            carrier.copies(copy)

    run_threads(work, range(4))


# What it may not mind, and what it refuses


@by_each_on([x for x in ALL if ALL[x][1] == "cpu"], IN_STATES)
def test_no_state_of_torch_s_changes_a_copy(name: str, carrier: Carrier) -> None:
    state, shown = IN_STATES[name]
    copy = SHOWN[shown]()
    copy.check(lambda: carrier.launches(copy, state=state))


@by_each(ALL)
@pytest.mark.parametrize("left", [0.5, 0], ids=["shrunk", "freed"])
def test_memory_that_is_elsewhere_is_refused(left: float, carrier: Carrier) -> None:
    """A cache whose storage was resized after the views were made: nothing is moved."""
    for gathers in (True, False):
        caches, rows = Elsewhere(carrier.device).moved([pool().tensors, chunk(7).tensors])
        cache = KVView(caches, NHD)
        dense = KVView(rows, CHUNK, heads=2)
        ids = Index(_CLEAN)
        sides = (cache, dense, ids, Index()) if gathers else (dense, cache, Index(), ids)
        copy_rows(*sides, count=7, backend=carrier.name).synchronize()
        storage = caches[1].untyped_storage()
        storage.resize_(int(left * storage.nbytes()))
        with refused(LayoutError, "was replaced after it was read", watch=[rows, *caches[::2]]):
            copy_rows(*sides, count=7, backend=carrier.name).synchronize()


@pytest.mark.parametrize("backend", [HipEmulated, AscendC], ids=lambda x: x.name)
def test_an_emulation_says_so(backend: type[HipEmulated] | type[AscendC]) -> None:
    decision = backend.probe(torch.device("cpu"))
    assert (decision.accepted, backend.emulated) == (True, True)
    assert "emulated on" in decision.reason.lower()
    assert "not on cuda" in backend.probe(torch.device("cuda", 0)).reason


def test_asking_them_loads_no_compiler_and_no_driver() -> None:
    """A separate process asks all backends."""
    program = (
        "import sys, torch\n"
        "from portakv.registry import registry\n"
        "from portakv.backends.hip import Hip\n"
        "registry.trace('cpu')\n"
        "if torch.version.hip is None:\n"
        "    assert not Hip.probe(torch.device('cuda', 0)).accepted\n"
        "assert not {'torch._inductor', 'torch._dynamo', 'triton'} & set(sys.modules)\n"
        "loaded = open('/proc/self/maps').read()\n"
        "assert not any(word in loaded for word in ('amdhip', 'hiprtc', 'galaxyhip'))\n"
    )
    python("-c", program)


# On a device

ON_A_GPU = ["cuda", "triton", "compiled on a GPU"]
VENDORS = ["ascend kernel", "ascend", "mlu"]


@by_each([*ON_A_GPU, *VENDORS])
def test_bad_device_ids_leave_the_context_usable(carrier: Carrier) -> None:
    wild, right = (by(pool(), [9, -(2**40), slot, 5]) for slot in (12, 3))
    for copy in (Copy(wild, chunk(4), 4), Copy(chunk(4), wild, 4)):
        carrier.copies(copy, bad="Position 2 of a device index", there=True)
    carrier.copies(Copy(right, chunk(4), 4), there=True)


@by_each([*ON_A_GPU, *VENDORS])
@pytest.mark.parametrize("passed", [False, True], ids=["no stream", "a stream"])
def test_copies_on_another_device_than_the_current_one(passed: bool, carrier: Carrier) -> None:
    """The vendors' packages launch an op on the current device, wherever its tensors are."""
    if torch.accelerator.device_count() < 2:
        pytest.skip("there is one device")
    other = Carrier(carrier.backend, torch.device(carrier.device.type, 1))
    stream = torch.Stream(device=other.device) if passed else None
    for layout, step in ((x, n) for x in (NHD, HND) for n in (1, 4)):
        paged = by(pool(layout, dim=16), [2, 0], step)
        dense = chunk(2 * step, dim=16)
        for copy in (Copy(paged, dense, 2 * step), Copy(dense, paged, 2 * step)):
            other.copies(copy, stream=stream)
    assert torch.accelerator.current_device_index() == 0


@by_each(["ascend kernel", "mlu"])
def test_a_launch_that_tells_of_a_bad_id_waits_for_nothing(carrier: Carrier) -> None:
    """A wait would hide one that is missing, and stall the host on a real device."""
    dense, paged = Elsewhere(carrier.device).views(chunk(4, dim=16), pool(HND, dim=16))
    ids = Index(torch.tensor([9, -(2**40), 12, 5]).to(carrier.device))
    status = carrier.word()
    launch = carrier.backend(carrier.device).prepare(CopyPlan(dense.form, paged.form, 0, 1))
    torch.accelerator.synchronize(carrier.device)
    waited = simdev.synchronised()
    before = torch.Event(carrier.device)
    torch.zeros(1, device=carrier.device).fill_(1)
    before.record()
    launch(dense, paged, Index(), ids, 4, None, status)
    assert not before.query()
    assert simdev.synchronised() == waited
    torch.accelerator.synchronize(carrier.device)
    assert int(status) == 3


@by_each(["ascend", "mlu"])
def test_the_connector_chooses_it_and_asks_for_no_other_vendor_s_package(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = Mock(spec=["find_spec"], find_spec=Mock(return_value=None))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    connector = AdaptiveConnector(carrier.device, kv_layout=HND, chunk_layout=CHUNK)
    explanation = connector.explain()
    looked_for = [call.args[0] for call in finder.find_spec.call_args_list]
    assert not [name for name in looked_for if name.startswith("torch_")]
    assert f"backend '{carrier.name}' was chosen" in explanation
    assert "self-check passed, every byte right" in explanation
    assert any(
        f"{carrier.name}: accepted, torch_" in x and "emulated" in x
        for x in explanation.split("\n")
    )
    caches, rows = Elsewhere(carrier.device).moved(
        [pool(HND, dim=16).tensors, chunk(4, dim=16).tensors]
    )
    connector.register_kv_caches(caches)
    landed = torch.zeros_like(rows)
    slots = torch.tensor([9, 2, 11, 5], device=carrier.device)
    connector.to_gpu(rows, slot_mapping=slots).synchronize()
    connector.from_gpu(landed, slot_mapping=slots).synchronize()
    assert same(rows, landed)


def gather(carrier: Carrier, layers: int = 3) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """A pool, a chunk of eight tokens, and what a launch takes: views, ids, and the count."""
    caches = paged_cases.pool(carrier.device, layers=layers)
    rows = paged_cases.chunk(carrier.device, 8, layers=layers)
    ids = Index(torch.arange(8, device=carrier.device))
    return caches, rows, (paged_cases.paged(caches), paged_cases.dense(rows), ids, Index(), 8)


def prepared(carrier: Carrier, arguments: Any) -> Any:
    src, dst, *_ = arguments
    return carrier.backend(carrier.device).prepare(CopyPlan(src.form, dst.form, 1, 0))


@by_each(ON_A_GPU)
def test_a_captured_launch_reads_the_ids_of_each_replay(carrier: Carrier) -> None:
    caches, rows, arguments = gather(carrier)
    launch = prepared(carrier, arguments)
    status = carrier.word()
    ids = arguments[2].ids
    launch(*arguments, None, status)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*arguments, None, status)
    for seed in range(3):
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:8]
        drawn[seed] = -1
        ids.copy_(drawn)
        rows.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wanted = paged_cases.rows_of(caches)[:, :, drawn]
        wanted[:, :, seed] = 0
        assert torch.equal(rows.cpu(), wanted)
    ids.fill_(99)
    graph.replay()
    torch.cuda.synchronize()
    assert 1 <= int(status) <= 8


@by_each(ON_A_GPU)
def test_a_first_use_inside_a_capture_is_refused(carrier: Carrier) -> None:
    _, _, (src, dst, *_) = gather(carrier, layers=7)
    backend = carrier.backend(carrier.device)
    plan = CopyPlan(src.form, dst.form, 1, 0)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            with pytest.raises(Unsupported, match="before the capture"):
                backend.prepare(plan)
        finally:
            graph.capture_end()
    backend.prepare(plan)


@by_each(ON_A_GPU)
def test_a_stream_is_honoured(carrier: Carrier) -> None:
    """Also one that is not a torch.cuda.Stream."""
    caches, rows, arguments = gather(carrier)
    launch = prepared(carrier, arguments)
    streams: list[Any] = [torch.cuda.Stream(), torch.Stream(device="cuda")]
    for stream in streams:
        rows.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            caches[0].add_(1)
        launch(*arguments, stream, None)
        stream.synchronize()
        assert torch.equal(rows.cpu(), paged_cases.rows_of(caches)[:, :, :8])


@by_each(["hip-emulated", DIRECT[1], "cuda", "triton"])
def test_a_forked_process_is_refused(carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, rows, arguments = gather(carrier)
    launch = prepared(carrier, arguments)
    monkeypatch.setattr(this_process(), "forked", True)
    reason = "HIP does not survive fork" if carrier.backend is HipEmulated else "forked"
    with refused(Unsupported, reason, watch=[*caches, rows]):
        launch(*arguments, None, None)
