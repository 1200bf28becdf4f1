# SPDX-License-Identifier: Apache-2.0
"""The core reads tensors for views: judged by the oracle, and by what torch says of each tensor."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.core_cases import address, noise
from support.threads import run_threads
from support.view_draw import Drawn, draw_view

from portakv import DeviceMismatch, KVView, LayoutError, Unsupported
from portakv.core import view as core
from portakv.layout.encodings import Pack, plane_of
from portakv.view.bound import BoundLayout, bind_layout
from portakv.view.form import locate, same_form
from portakv_conformance.judge.oracle import Rows

REFUSED = (LayoutError, Unsupported, DeviceMismatch)


def bound_of(drawn: Drawn) -> BoundLayout:
    """Return the bound layout of a drawn view; raise as it does."""
    return bind_layout(
        drawn.layout, reinterpret=drawn.reinterpret, encoding=drawn.encoding, **drawn.extents
    )


def answer_of(read: Callable[[Any], Any], tensors: Any) -> object:
    """Return the facts that a reader returns, or the error that it raises, comparable."""
    try:
        (form, origins, owners, spans), slots, device, grad = read(tensors)
    except REFUSED as error:
        return type(error), str(error)
    return form, origins, [id(owner) for owner in owners], spans, slots, device, grad


def check_drawn(rng: random.Random) -> bool:
    """Draw a view, and compare it with the oracle; return False if it is refused."""
    drawn = draw_view(rng)
    try:
        bound = bound_of(drawn)
    except REFUSED:
        return False
    facts = answer_of(bound.read, drawn.tensors)
    assert facts == answer_of(bound._read_by_methods, drawn.tensors), drawn
    assert isinstance(facts, tuple)
    if len(facts) == 2:
        return False
    if drawn.encoding is None:
        check_by_oracle(KVView.through(bound, drawn.tensors, persistent=True), drawn, rng)
    return True


def check_by_oracle(view: KVView, drawn: Drawn, rng: random.Random) -> None:
    """Compare extents and the addresses of some rows with those of the oracle."""
    form = view.form
    if form.opaque and "dim" in drawn.extents:
        return  # the oracle takes no declared width of pages
    rows = Rows(drawn.tensors, drawn.layout, drawn.extents)
    assert (view.slots, form.layers, form.kv) == (rows.slots, rows.layers, rows.kv), drawn
    assert (form.heads, form.widths, view.block_size) == (rows.heads, rows.widths, rows.block_size)
    assert form.opaque == rows.opaque
    assert form.alignment == alignment_of(rows.tensors), drawn
    if not view.slots:
        return
    size = view.block_size if view.opaque else 1
    assert size is not None
    for kv in range(rows.kv):
        layer = rng.randrange(rows.layers)
        slots = [0, view.slots - size, rng.randrange(view.slots // size) * size]
        expected = rows.row_addresses(kv, layer, slots)
        for row, slot in zip(expected, slots, strict=True):
            head = rng.randrange(rows.heads)
            assert bytes_of(view, kv, layer, slot, head) == row[head].tolist(), drawn
    begins = {tensor.data_ptr() for tensor in rows.tensors}
    assert all(any(first <= at < past for first, past in view.spans) for at in begins), drawn


def bytes_of(view: KVView, kv: int, layer: int, slot: int, head: int) -> list[int]:
    """Return the address of each byte of a row, by the form and the table alone."""
    form = view.form
    part = form.parts[kv]
    addresses = []
    for at in range(form.widths[kv]):
        table, offset = locate(part.table, part.offset, part.layer, layer)
        if form.paged:
            table, offset = locate(table, offset, part.block, slot // form.block_size)
        if not form.opaque:
            inside = slot % form.block_size if form.paged else slot
            table, offset = locate(table, offset, part.token, inside)
        table, offset = locate(table, offset, part.head, head)
        table, offset = locate(table, offset, part.dim, at)
        addresses.append(view.origins[table] + offset)
    return addresses


def alignment_of(tensors: list[torch.Tensor]) -> int:
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr() | tensor.untyped_storage().data_ptr()
    return bits & -bits


@pytest.mark.parametrize("seed", range(4))
def test_drawn_views_are_those_of_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    made = sum(check_drawn(rng) for _ in range(150))
    assert made > 100


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 108))
def test_many_drawn_views_are_those_of_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    assert sum(check_drawn(rng) for _ in range(25_000)) > 15_000


def test_equal_words_have_one_form() -> None:
    layers = [noise(2, 5, 4, 3, 8) for _ in range(3)]
    layout = "layer | kv block token head dim"
    one = KVView(layers, layout).form
    assert KVView([layer.clone() for layer in layers], layout).form is one
    assert KVView(tuple(layers), layout, kv=2, heads=3).form is one
    assert bind_layout(layout)._read_by_methods(layers)[0][0] is one
    assert same_form(one.untyped()) is same_form(one.untyped())
    assert KVView(layers, layout, reinterpret=True).form is same_form(one.untyped())


def test_a_packed_form_is_not_that_of_pages_with_the_same_words() -> None:
    slot = plane_of(Pack(), 4, 64).slot_bytes
    memory = torch.zeros(3, slot, dtype=torch.uint8)
    for _ in range(2):
        pages = KVView(memory, "block page", block_size=4)
        packed = KVView(memory, "block page", block_size=4, dim=64, encoding="pack")
        assert (pages.form.encoding, len(packed.form.encoding)) == ((), 1)
        assert pages.form == replace(packed.form, encoding=())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", core.dtype_words(), ids=str)
def test_each_dtype_is_read_by_the_core_as_by_its_methods(dtype: torch.dtype) -> None:
    bound = bind_layout("token dim")
    try:
        tensor = torch.empty(3, 4, dtype=dtype)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch makes no such tensors")
    assert answer_of(bound.read, tensor) == answer_of(bound._read_by_methods, tensor)
    if not tensor.is_quantized:
        name = "" if dtype in (torch.uint8, torch.int8) else core.name_of(dtype)
        assert bound.read(tensor)[0][0].dtypes == ((name,) if name else ())


class Own(torch.Tensor):
    """A subclass, whose methods decide."""

    def is_neg(self) -> bool:
        return True


def plain(**options: Any) -> torch.Tensor:
    return torch.zeros(4, 3, **options)


def conjugated() -> torch.Tensor:
    return plain(dtype=torch.complex64).conj()


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(plain(), 0.1, 0, torch.quint8)


TORCH: Any = torch  # some functions have no types
HIDDEN: dict[str, tuple[Callable[[], Any], str]] = {
    "conjugated": (conjugated, "conjugated or negated"),
    "negated": (lambda: conjugated().imag, "conjugated or negated"),
    "negated bytes": (lambda: TORCH._neg_view(plain(dtype=torch.int8)), "negated"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "strided tensors, got a torch.sparse_coo"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "strided tensors"),
    "mkldnn": (lambda: TORCH.eye(3).to_mkldnn(), "strided tensors"),
    "without memory": (lambda: TORCH._efficientzerotensor(4, 3), "owns no memory"),
    "subclass": (lambda: plain().as_subclass(Own), "negated"),
    "quantized": (quantized, "quantized"),
    "none": (lambda: None, "got None"),
    "array": (lambda: plain().numpy(), "torch.from_numpy"),
    "list": (lambda: [plain()], "a tensor for"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HIDDEN)
def test_what_dlpack_hides_is_refused(name: str) -> None:
    make, why = HIDDEN[name]
    tensor = make()
    with pytest.raises(LayoutError, match=why):
        KVView(tensor, "token dim")
    if isinstance(tensor, torch.Tensor):
        with pytest.raises(LayoutError, match=why):
            KVView([plain(), tensor], "layer | token dim")


def test_memory_on_no_device_or_on_several_is_refused() -> None:
    with pytest.raises(LayoutError, match="device meta"):
        KVView(plain(device="meta"), "token dim")
    with pytest.raises(DeviceMismatch, match="got cpu and meta"):
        KVView([plain(), plain(device="meta")], "layer | token dim")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
    with pytest.raises(LayoutError, match="got a nested one"):
        KVView(nested, "token dim")


def test_tensors_inside_of_transforms_are_refused() -> None:
    def read(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(LayoutError, match="owns no memory, as inside"):
            KVView(tensor, "token dim")
        return tensor.sum()

    torch.vmap(read)(torch.zeros(2, 4, 3))
    torch.func.grad(read)(torch.zeros(4, 3))
    torch.func.functionalize(read)(torch.zeros(4, 3))


def resized() -> torch.Tensor:
    tensor = torch.zeros(8, 3)[2:]
    tensor.untyped_storage().resize_(0)
    return tensor


SERVED: dict[str, Callable[[], torch.Tensor]] = {
    "parameter": lambda: torch.nn.Parameter(plain()),
    "frozen parameter": lambda: torch.nn.Parameter(plain(), requires_grad=False),
    "grad": lambda: plain(requires_grad=True),
    "bytes": lambda: plain(dtype=torch.uint8),
    "empty": lambda: torch.zeros(0, 3),
    "resized": resized,
    "lazy clone": lambda: TORCH._lazy_clone(plain()),
    "inference": lambda: TORCH.inference_mode()(plain)(),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_dlpack_hides_is_served(name: str) -> None:
    tensor = SERVED[name]()
    for tensors, layout in ((tensor, "token dim"), ([tensor] * 2, "layer | token dim")):
        bound = bind_layout(layout)
        facts = answer_of(bound.read, tensors)
        assert facts == answer_of(bound._read_by_methods, tensors)
        assert isinstance(facts, tuple)
        assert facts[1][0] == tensor.data_ptr()
        assert KVView(tensors, layout).requires_grad is tensor.requires_grad


def test_one_tensor_that_requires_grad_is_enough() -> None:
    layers = [torch.zeros(4, 3), torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3)]
    assert KVView(layers, "layer | token dim").requires_grad is True
    assert KVView(layers[:1], "layer | token dim").requires_grad is False


class Listed(list[Any]):
    """A container that the core leaves to Python."""


@pytest.mark.parametrize(
    "kind",
    [list, tuple, Listed, lambda x: dict(enumerate(x)), lambda x: OrderedDict(enumerate(x))],
    ids=["list", "tuple", "list's subclass", "dict", "ordered"],
)
def test_containers_of_each_kind(kind: Callable[[Any], Any]) -> None:
    memory = noise(3, 2, 5, 8)
    whole = KVView(memory, "layer kv token dim")
    view = KVView(kind([kind(list(layer)) for layer in memory]), "layer kv | token dim")
    assert view.form is whole.form
    assert address(view, 1, 2, 3) == address(whole, 1, 2, 3)


def test_a_mode_of_torch_does_not_change_what_the_core_reads() -> None:
    """The core reads a tensor's object, where the methods of torch would look."""

    class Negated(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") == "is_neg":
                return True
            return func(*args, **(kwargs or {}))

    if core.handle_at() is None:
        pytest.skip("this torch's methods are asked")
    tensor = torch.zeros(4, 3)
    form = KVView(tensor, "token dim").form
    for mode in (Negated(), torch.device("cpu")):
        with mode:
            assert KVView(tensor, "token dim").form is form


def test_an_object_of_torch_has_a_handle_wherever_it_is_from() -> None:
    at = core.handle_at()
    if at is None:
        pytest.skip("this torch keeps another object")
    made = torch.ones(4, 3)
    view = made[1:]
    del made  # the view keeps its base, with its object or without
    for tensor in (view, view._base, view.detach(), torch.nn.Parameter(view)):
        assert tensor is not None
        assert ctypes.c_void_p.from_address(id(tensor) + at).value == tensor._cdata


def test_an_error_of_a_method_is_raised() -> None:
    class Broken(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            # One is a method that the core asks, the other is one that torch without the exchange
            # API is asked.
            if getattr(func, "__name__", "") in ("is_pinned", "data_ptr"):
                raise ZeroDivisionError
            return func(*args, **(kwargs or {}))

    with Broken(), pytest.raises(ZeroDivisionError):
        KVView([torch.zeros(4, 3)] * 2, "layer | token dim")


def test_numbers_past_64_bits_are_refused() -> None:
    with pytest.raises(LayoutError, match="64-bit"):
        KVView(torch.zeros(3, 8), "block page", block_size=1 << 70)
    with pytest.raises(LayoutError, match="64-bit"):
        KVView(torch.zeros(3, 8), "block page", block_size=1 << 62)
    far = torch.zeros(8).as_strided((1, 8), (1 << 62, 1))
    with pytest.raises(LayoutError, match="64-bit"):
        KVView(far, "token dim")
    # A dimension of one position is not stepped through.
    assert KVView(far, "1 (token dim)", dim=4).slots == 2


def test_threads_read_one_list_while_it_changes() -> None:
    layers = [torch.zeros(4, 3) for _ in range(8)]
    listed = list(layers)
    bound = bind_layout("layer | token dim")
    end = threading.Event()

    def change() -> None:
        rng = random.Random(1)
        while not end.is_set():
            listed[rng.randrange(8)] = rng.choice(layers)

    def read(nth: int) -> None:
        for _ in range(300):
            (form, origins, owners, _), *_ = bound.read(listed)
            assert origins is not None
            assert owners is not None
            assert form.layers == 8
            assert list(origins) == [owner.data_ptr() for owner in owners]

    changing = threading.Thread(target=change)
    changing.start()
    try:
        run_threads(read, range(3))
    finally:
        end.set()
        changing.join()


def test_nothing_is_retained_by_a_reading() -> None:
    layers = [torch.zeros(4, 3) for _ in range(4)]
    bound = bind_layout("layer | token dim")
    conjugated = [*layers[:3], torch.zeros(4, 3, dtype=torch.complex64).conj()]
    bound.read(layers)
    gc.collect()
    before = [sys.getrefcount(layer) for layer in layers]
    for _ in range(100):
        bound.read(layers)
        with pytest.raises(LayoutError):
            bound.read(conjugated)
    gc.collect()
    assert [sys.getrefcount(layer) for layer in layers] == before


@pytest.mark.parametrize("asked", [False, True], ids=["asked later", "asked before"])
@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, 2), torch.zeros(9, dtype=torch.float64)],
    ids=["smaller", "of another dtype"],
)
def test_a_kept_view_has_tensors_over_the_memory_that_it_read(
    other: torch.Tensor, asked: bool
) -> None:
    layers = [noise(5, 8).clone() for _ in range(3)]
    expected = [layer.clone() for layer in layers]
    view = KVView(layers, "layer | token dim")
    gone = weakref.ref(layers[1].untyped_storage())
    begins = [layer.data_ptr() for layer in layers]
    if asked:
        assert [owner.data_ptr() for owner in view.owners] == begins
    layers[1].data = other
    gc.collect()
    assert gone() is not None
    assert [owner.data_ptr() for owner in view.owners] == begins
    view.check_memory()
    part = view.slice(layers=1)
    assert part.origins == (begins[1],)
    assert part.owners[0].untyped_storage().data_ptr() == begins[1]
    plane = part.plane(0, 0, expected[1].dtype)
    assert torch.equal(plane.squeeze(1), expected[1])
    del plane
    del view, part
    gc.collect()
    assert gone() is None
