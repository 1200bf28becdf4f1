# SPDX-License-Identifier: Apache-2.0
"""A connector holds caches for a limited time, and several threads call it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import simdev_cases as simulated
from support.command_line import registered as registered_backend
from support.connector_cases import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    make_caches,
    make_chunk,
    rows,
    scattered,
)
from support.cuda_on_cpu import CudaOnCpu, why_not
from support.guarded_memory import filled, refused, same, untouched
from support.threads import run_threads
from support.whole_copies import watch_whole_copies

from portakv import AdaptiveConnector, DeviceMismatch, LayoutError, SlotError


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector("cpu")


def test_registered_caches_need_not_be_passed(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunk = make_chunk(3)
    with refused(LayoutError, "registered", "register_kv_caches", watch=chunk):
        connector.from_gpu(chunk, None, [4, 5, 6])
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, None, [4, 5, 6])
    assert same(chunk, rows(caches, [4, 5, 6]))
    others = make_caches()
    connector.from_gpu(chunk, others, [4, 5, 6])
    assert same(chunk, rows(others, [4, 5, 6]))
    connector.unregister_kv_caches()
    connector.unregister_kv_caches()
    with refused(LayoutError, "registered", watch=[chunk, *caches, *others]):
        connector.from_gpu(chunk, None, [4, 5, 6])


@pytest.mark.parametrize("change", ["address", "shape", "strides", "dtype", "order", "one"])
def test_reallocated_caches_are_noticed(connector: AdaptiveConnector, change: str) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    old = list(caches)
    slots = [1, 6, 15]
    dtype = torch.bfloat16 if change == "dtype" else torch.float16
    turned = [filled((2, BLOCKS, HEADS, SIZE, DIM)).transpose(2, 3) for _ in range(LAYERS)]
    caches[:] = {  # in the very list that was registered
        "address": make_caches(),
        "shape": make_caches(blocks=4),
        "strides": turned,
        "dtype": [cache.view(dtype) for cache in old],
        "order": old[::-1],
        "one": [old[0], make_caches()[0], *old[2:]],
    }[change]
    chunk = make_chunk(3, dtype)
    gone = [cache for cache in old if all(cache is not other for other in caches)]
    wanted = scattered(caches, chunk, slots)
    with untouched([] if change in ("dtype", "order") else gone):
        connector.to_gpu(chunk, caches, slots)
    assert all(map(same, caches, wanted))
    with untouched(caches):
        connector.from_gpu(chunk, caches, slots)
    assert same(chunk, rows(caches, slots))


@pytest.mark.parametrize("release", [True, False], ids=["unregistered", "replaced"])
def test_caches_are_kept_while_registered_not_after(device: torch.device, release: bool) -> None:
    connector = AdaptiveConnector(device)
    slots = [1, 6, 15]
    caches = make_caches(device=device)
    chunk = make_chunk(3, device=device)
    wanted = rows(caches, slots)
    alive = [weakref.ref(cache.untyped_storage()) for cache in caches]
    tensors = [weakref.ref(cache) for cache in caches]
    connector.register_kv_caches(caches)
    del caches
    gc.collect()
    for ids in (slots, torch.tensor(slots, device=device)):
        connector.from_gpu(chunk, None, ids).synchronize()
        assert same(chunk.cpu(), wanted.cpu())
    connector.batched_from_gpu([chunk], None, slots, [0], [3]).synchronize()
    memory_obj = weakref.ref(chunk)
    del chunk
    gc.collect()
    assert memory_obj() is None, "a memory object is held"
    assert all(ref() is not None for ref in tensors)
    chunk = make_chunk(3, device=device)
    others = make_caches(device=device)
    if release:
        connector.unregister_kv_caches()
    else:
        connector.from_gpu(chunk, others, slots).synchronize()
    gc.collect()
    assert not any(ref() is not None for ref in tensors + alive)


@pytest.mark.parametrize("registered", [True, False])
def test_threads_share_a_connector(connector: AdaptiveConnector, registered: bool) -> None:
    """They share its registered caches, or each passes its own."""
    shared = make_caches()
    connector.register_kv_caches(shared)

    def work(nth: int) -> None:
        caches = shared if registered else make_caches(5 + nth)
        slots = [(nth + 5 * i) % (5 * SIZE) for i in range(4)]
        wanted = rows(caches, slots)
        for _ in range(50):
            chunk = make_chunk(4)
            connector.from_gpu(chunk, None if registered else caches, slots).synchronize()
            assert same(chunk, wanted), "rows of another thread's caches were stored"

    run_threads(work, range(4))


class Interrupting(dict[str, torch.Tensor]):
    """Caches during whose ``at``-th reading something else happens."""

    def __init__(self, caches: list[torch.Tensor], at: int, happens: Callable[[], None]) -> None:
        super().__init__({str(i): cache for i, cache in enumerate(caches)})
        self.left = at
        self.happens = happens

    def values(self) -> Any:
        self.left -= 1
        if self.left == 0:
            self.happens()
        return super().values()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_caches_of_two_threads_are_not_mixed_up(connector: AdaptiveConnector, at: int) -> None:
    own = make_caches()
    others = make_caches(7)
    slots = [1, 6, 15]
    chunk = make_chunk(3)
    other_chunk = make_chunk(3)
    other = threading.Thread(target=lambda: connector.from_gpu(other_chunk, others, slots))

    def interrupt() -> None:
        other.start()
        other.join(timeout=0.5)  # it may have to wait for this thread

    passed = Interrupting(own, at, interrupt)
    for _ in range(3):
        chunk = make_chunk(3)
        connector.from_gpu(chunk, passed, slots).synchronize()
        assert same(chunk, rows(own, slots)), "rows of another thread's caches were stored"
    other.join()
    assert same(other_chunk, rows(others, slots))


@pytest.mark.parametrize("how", ["data", "set_", "resized", "freed"])
@pytest.mark.parametrize(("layer", "ids"), [(0, "device"), (1, "host"), (2, "device")])
def test_caches_given_other_memory_are_noticed(
    how: str, layer: int, ids: str, device: torch.device
) -> None:
    shape = (2, 4, 4, 2, 8)
    caches = [torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(3)]
    chunk = torch.zeros(2, 3, 2, 16, dtype=torch.float16, device=device)
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(caches)
    slots = [1, 2] if ids == "host" else torch.tensor([1, 2], device=device)
    for _ in range(2):  # the second of ids on a device is repeated
        connector.from_gpu(chunk, None, slots).synchronize()
    if how == "data":
        caches[layer].data = torch.ones_like(caches[layer])
    elif how == "set_":
        cache: Any = caches[layer]
        cache.set_(torch.ones_like(cache))
    else:
        storage = caches[layer].untyped_storage()
        storage.resize_(0 if how == "freed" else 2 * storage.nbytes())
    for move in (connector.from_gpu, connector.to_gpu):
        with refused(LayoutError, "replaced", "register", watch=[chunk]):
            move(chunk, None, slots)


def conjugated(tensor: torch.Tensor) -> torch.Tensor:
    """Return the conjugates of complex numbers, by the same bytes."""
    return tensor.conj()


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return the imaginary parts of complex numbers with the other sign, by the same bytes."""
    return tensor.conj().imag


@pytest.mark.parametrize(
    ("plain", "lazy"), [(torch.clone, conjugated), (torch.imag, negated)], ids=["conj", "neg"]
)
def test_lazy_caches_at_the_registered_addresses_are_refused(
    plain: Callable[..., torch.Tensor], lazy: Callable[..., torch.Tensor], device: torch.device
) -> None:
    """Their bytes are not their values. A view refuses them, also next to registered ones."""
    numbers = [torch.zeros(2, 4, 4, 2, 8, dtype=torch.complex64, device=device) for _ in range(2)]
    caches = numbers if plain is torch.clone else [plain(each) for each in numbers]
    chunk = torch.zeros(2, 2, 2, 16, dtype=caches[0].dtype, device=device)
    connector = AdaptiveConnector(device)
    slots = torch.tensor([1, 2], device=device)
    for _ in range(2):
        connector.from_gpu(chunk, caches, slots).synchronize()
    for move in (connector.from_gpu, connector.to_gpu):
        with refused(LayoutError, "conjugated or negated", watch=[chunk]):
            move(chunk, [lazy(each) for each in numbers], slots)


@pytest.mark.parametrize("lazy", [conjugated, negated], ids=["conj", "neg"])
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_core_makes_no_copy_of_a_lazy_chunk(
    lazy: Callable[..., torch.Tensor], store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.zeros(2, 5, 8, dtype=torch.complex64)
    chunk = numbers if lazy is conjugated else numbers.imag
    caches = [torch.zeros(6, 4, 2, 4, dtype=chunk.dtype) for _ in range(2)]
    slots = torch.tensor([9, 2, 17, 6, 0])
    with registered_backend(rows=CudaOnCpu):
        connector = AdaptiveConnector(
            "cpu", "rows", "layer | block token head dim", "layer token (head dim)"
        )
        connector.register_kv_caches(caches)
        move = connector.from_gpu if store else connector.to_gpu
        whole = watch_whole_copies(monkeypatch)
        for _ in range(2):
            move(chunk, None, slots).synchronize()
        assert whole == [False, True]
        with refused(LayoutError, "conjugated or negated", watch=[*caches, chunk]):
            move(lazy(numbers), None, slots)


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_core_makes_no_copy_by_lazily_negated_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of these ids are negative, which would skip their rows."""
    chunk = torch.zeros(2, 2, 8)
    caches = [torch.zeros(6, 4, 2, 4) for _ in range(2)]
    slots = torch.tensor([9, 2])
    with registered_backend(rows=CudaOnCpu):
        connector = AdaptiveConnector(
            "cpu", "rows", "layer | block token head dim", "layer token (head dim)"
        )
        connector.register_kv_caches(caches)
        whole = watch_whole_copies(monkeypatch)
        for _ in range(2):
            connector.from_gpu(chunk, None, slots).synchronize()
        assert whole == [False, True]
        with refused(SlotError, "lazily negated", watch=[*caches, chunk]):
            connector.from_gpu(chunk, None, torch._neg_view(-slots))


@pytest.mark.simdev
@pytest.mark.parametrize("home", ["cpu", simulated.DEVICE], ids=str)
@pytest.mark.parametrize("store", [True, False])
def test_a_batch_with_a_chunk_of_another_device_moves_nothing(
    home: str | torch.device, store: bool
) -> None:
    away = simulated.DEVICE if home == "cpu" else torch.device(simulated.DEVICE.type, 1)
    caches = [torch.zeros(6, 4, 2, 4).to(home) for _ in range(2)]
    chunks = [torch.ones(2, 4, 8), torch.ones(2, 4, 8).to(away)]
    connector = AdaptiveConnector(
        home, None, "layer | block token head dim", "layer token (head dim)"
    )
    connector.register_kv_caches(caches)
    move = connector.batched_from_gpu if store else connector.batched_to_gpu
    with refused(DeviceMismatch, str(away), watch=[*caches, *chunks]):
        move(chunks, None, list(range(8)), [0, 4], [4, 8])


def resized_in_place(tensor: torch.Tensor, nbytes: int) -> bool:
    """Make the storage of a tensor smaller; return True if the tensor has its address again."""
    storage = tensor.untyped_storage()
    address = tensor.data_ptr()
    for nth in range(40):
        storage.resize_(0)
        storage.resize_(nbytes - nth % 2 * 64)
        if tensor.data_ptr() == address:
            return True
    return False


def shrunk(
    device: str, share: float, use: Callable[[AdaptiveConnector], None]
) -> tuple[AdaptiveConnector, list[torch.Tensor]]:
    """Return a connector and its caches, the first half of their storages. After ``use``, one
    storage shrank, at its address, to ``share`` of what the cache needs."""
    for attempt in range(200):
        shape = (4, (5000, 20000, 1000)[attempt % 3], SIZE, HEADS, DIM)
        caches = [torch.zeros(shape, dtype=torch.float16, device=device)[:2] for _ in range(LAYERS)]
        connector = AdaptiveConnector(device)
        connector.register_kv_caches(caches)
        use(connector)
        if resized_in_place(caches[1], int(caches[1].nbytes * share)):
            return connector, caches
    pytest.skip("the allocator gives no storage its former address")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("call", ["one", "batch"])
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_cache_whose_storage_shrank_at_its_address(share: float, call: str, device: str) -> None:
    slots = torch.tensor([1, 2], device=device)
    chunk = make_chunk(2, device=device)

    def load(connector: AdaptiveConnector) -> None:
        if call == "one":
            connector.to_gpu(chunk, None, slots).synchronize()
        else:
            connector.batched_to_gpu([chunk], None, slots, [0], [2]).synchronize()

    def load_twice(connector: AdaptiveConnector) -> None:
        load(connector)
        load(connector)  # a CUDA device repeats the first one

    connector, caches = shrunk(device, share, load_twice)
    slots += 2
    if share < 1:
        with refused(LayoutError, "replaced", "register", watch=[chunk, caches[0], caches[2]]):
            load(connector)
        return
    wanted = scattered(caches, chunk, [3, 4])  # the storage still contains the cache
    load_twice(connector)
    assert all(map(same, caches, wanted))


def test_a_connector_shows_what_it_is() -> None:
    connector = AdaptiveConnector("cpu")
    assert "backend='reference'" in repr(connector)
    assert "nothing registered" in repr(connector)
    connector.register_kv_caches([torch.zeros(2, 4, 4, 2, 8)])
    assert "16 slots" in repr(connector)


@pytest.mark.parametrize(
    "caches", ["x", [torch.zeros(2, 4, 4, 2, 8).to_sparse()]], ids=["str", "sparse"]
)
def test_what_is_no_cache_is_refused_beside_registered_ones(caches: Any) -> None:
    connector = AdaptiveConnector("cpu")
    connector.register_kv_caches([torch.zeros(2, 4, 4, 2, 8)])
    with pytest.raises(LayoutError, match=r"Expected .*, got a "):
        connector.from_gpu(torch.zeros(2, 1, 3, 16), caches, [1, 2, 3])
