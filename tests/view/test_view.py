# SPDX-License-Identifier: Apache-2.0
"""Views: form and addresses from real tensors."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.presets_cases import KINDS, side

from portakv import KVView, LayoutError
from portakv.host import memcpy
from portakv.view.bound import BoundLayout, bind_layout
from portakv.view.example import example_tensors
from portakv.view.view import check_writable
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import Rows


def _strange(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose dimensions of extent 1 have an odd stride."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided(tensor.shape, [s if n > 1 else 7 for n, s in steps])


MEMORY = noise(3, 2, 5, 8)
FOUR = noise(4, 5, 8)


@pytest.mark.parametrize(
    ("tensors", "layout", "other", "plain", "extents"),
    [
        (noise(8 + 40)[8:].view(5, 8), "token dim", noise(5, 8), "token dim", {}),
        (noise(5, 4, 3, 8), "block page", noise(5, 96), "block page", {"block_size": 4}),
        (noise(2, 5, 3, 8), "kv token (head dim)", noise(2, 5, 24), "kv token (head dim)",
         {"heads": 3}),
        (noise(5, 3, 8), "token (dim)", noise(5, 24), "token dim", {}),
        *((_strange(noise(*shape)), "token (head dim)", noise(5, 24), "token (head dim)",
           {"heads": 3}) for shape in ((5, 1, 24), (5, 24, 1), (5, 1, 24, 1, 1))),
        ([list(layer) for layer in MEMORY], "layer kv | token dim", MEMORY, "layer kv token dim",
         {}),
        # A list of memory objects has one form wherever they lie.
        ([MEMORY[0, 0], MEMORY[0, 1]], "block | token dim", [noise(5, 8) for _ in range(3)],
         "block | token dim", {}),
        # Nor does it matter how many there are.
        (noise(1, 4, 8), "block token dim", noise(50, 4, 8), "block token dim", {}),
    ],
)  # fmt: skip
def test_readings_of_one_form(
    tensors: Any, layout: str, other: Any, plain: str, extents: dict[str, Any]
) -> None:
    one = KVView(tensors, layout, **extents).form
    two = KVView(other, plain, **extents).form
    assert (one, hash(one)) == (two, hash(two))
    assert one != KVView(noise(3, 2, 4), "token head dim").form


def _apart() -> list[torch.Tensor]:
    """Return tensors with a separate storage each, which lie at equal distances by chance."""
    memory = noise(3, 5, 8).numpy()
    return [torch.from_numpy(memory[i]) for i in range(3)]


@pytest.mark.parametrize(
    "tensors",
    [
        [noise(5, 8, seed=i) for i in range(3)],
        {f"model.layers.{i}": noise(5, 8, seed=i) for i in (2, 0, 1)},
        *([FOUR[i] for i in order] for order in ((0, 1, 3), (2, 1, 0), (1, 0, 2))),
        _apart(),
    ],
    ids=["list", "dict", "unequal distances", "descending", "no order", "by chance"],
)
def test_tensors_that_stay_a_table(tensors: Any) -> None:
    listed = list(tensors.values()) if isinstance(tensors, dict) else tensors
    view = KVView(tensors, "layer | token dim")
    assert view.addresses.tolist() == [t.data_ptr() for t in listed]


FOURS = list(torch.zeros(5, 3, 6, 8))
OTHERS = list(torch.zeros(4, 3, 6, 8))


def spans_of(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the ranges that tensors cover; ranges that overlap are merged."""
    ends = {(x.data_ptr(), x[-1, -1, -1].data_ptr() + x.element_size()) for x in tensors}
    spans: list[tuple[int, int]] = []
    for first, past in sorted(ends):
        if spans and first < spans[-1][1]:
            first, end = spans.pop()
            past = max(past, end)
        spans.append((first, past))
    return spans


def test_forms_of_containers_are_not_confused() -> None:
    text = "layer | block token dim"
    wide = torch.zeros(4, 3, 6, 9)
    kinds = [
        [torch.zeros(3, 6, 8) for _ in range(4)],
        [torch.zeros(3, 6, 8) for _ in range(2)],
        [torch.zeros(5, 6, 8) for _ in range(4)],
        [torch.zeros(3, 6, 8, dtype=torch.float16) for _ in range(4)],
        [torch.zeros(6, 3, 8).transpose(0, 1) for _ in range(4)],
        list(torch.zeros(4, 3, 6, 8)),
        list(wide[..., 1:]),
        [wide[0, ..., 1:], *(torch.zeros(3, 6, 9)[..., :8] for _ in range(3))],
        # Where they lie in their storages decides, and which share one.
        *([FOURS[i] for i in order] for order in ((0, 1, 3, 2), (3, 2, 1, 0), (0, 2, 1, 3))),
        [FOURS[0], FOURS[1], OTHERS[0], OTHERS[1]],
        [FOURS[0], OTHERS[1], FOURS[1], OTHERS[0]],
        [FOURS[0]] * 4,
        [torch.from_numpy(np.zeros(3 * 6 * 8 * 4 + 4, np.uint8)[4:].view(np.float32)).view(3, 6, 8)]
        * 2,
    ]
    for _ in range(2):
        for tensors in kinds:
            own = BoundLayout(text, {}, False)
            for bound in (bind_layout(text), own):
                (form, origins, owners, spans), slots, *_ = bound.read(tensors)
                view = KVView(tensors, text)
                assert (form, origins, slots) == (view.form, view.origins, view.slots)
                assert spans == view.spans == spans_of(tensors)
                listed = [x.data_ptr() for x in owners or ()]
                assert (
                    listed == list(origins or ()) == [x.data_ptr() for x in tensors][: len(listed)]
                )
    declared = [KVView(kinds[0], "layer | block token (head dim)", heads=n).form for n in (2, 4)]
    assert [form.heads for form in declared] == [2, 4]


@pytest.mark.parametrize(
    ("shape", "layout", "names"),
    [
        ((6, 2, 4, 3, 8), "vllm-nhd", "vllm-0.23, flashinfer-hnd"),
        ((2, 6, 4, 3, 8), "layer | block token dim", "vllm-nhd, mlu-merged"),
        ((6, 4, 8), "vllm-nhd", "vllm-mla"),
        ((6, 4), "vllm-nhd", None),
    ],
)
def test_the_error_of_a_shape_names_presets_that_fit(
    shape: tuple[int, ...], layout: str, names: str | None
) -> None:
    tensors = [torch.zeros(shape) for _ in range(5)]
    with pytest.raises(LayoutError) as caught:
        KVView(tensors, layout)
    _, _, named = str(caught.value).partition(" Presets with such shapes: ")
    assert named == (f"{names}." if names else "")
    for name in names.split(", ") if names else ():
        assert KVView(tensors, name).layers == 5


@pytest.mark.parametrize(
    ("kv", "names"),
    [(1, ""), (2, "mlu, vllm-ascend-mla, vllm-ascend."), (3, "vllm-ascend-dsa.")],
)
def test_presets_with_another_number_of_kv_do_not_fit(kv: int, names: str) -> None:
    tensors = [[torch.zeros(6, 4, 1, 8)] * kv] * 5
    with pytest.raises(LayoutError, match=r"3 dimension\(s\)") as caught:
        KVView(tensors, "layer kv | block token dim", kv=kv)
    assert str(caught.value).partition(" Presets with such shapes: ")[2] == names


def test_tensors_of_one_allocation_are_a_stride() -> None:
    view = KVView([list(layer) for layer in MEMORY], "layer kv | token dim")
    assert view.addresses.tolist() == [MEMORY.data_ptr()]
    assert KVView(MEMORY.flatten(0, 1)[1], "token dim").addresses[0] == MEMORY.data_ptr() + 80


TOGETHER = "not contiguous together"
NESTED: Any = torch.nested.nested_tensor([torch.zeros(4, 8), torch.zeros(2, 8)])
REFUSED: list[tuple[Any, str, dict[str, Any], str]] = [
    (noise(5, 3, 8), "token dim", {}, r"2 dimension\(s\), .* The tensors have shape"),
    (noise(20, 3, 8), "(block token) dim", {}, r"2 dimension\(s\), .* The tensors have shape"),
    (noise(15, 3, 8), "(token head) dim", {"heads": 3}, r"2 dimension\(s\), .* The tensors have"),
    (noise(5, 24), "kv token (head dim)", {"heads": 3}, r"3 dimension\(s\)"),
    (noise(5, 3, 16)[:, :, :8], "token (head dim)", {"heads": 3}, TOGETHER),
    (noise(5, 8, 3).transpose(1, 2), "token (head dim)", {"heads": 3}, TOGETHER),
    (noise(5, 6, 8)[:, ::2], "token (head dim)", {"heads": 3}, TOGETHER),
    ([], "layer | token dim", {}, "an empty one"),
    ([[], []], "layer kv | token dim", {}, "an empty one"),
    (noise(2, 5, 8), "layer | token dim", {},
     r"a list, tuple or dict .* got a Tensor\. Put it into a list: \[tensor\]\."),
    ([noise(5, 8)], "layer kv | token dim", {}, "for each kv, .* in the order layer, kv, outerm"),
    ([noise(5, 8)], "token dim", {}, "a tensor for 'token dim', got a list. Pass the tensor itse"),
    ([[noise(5, 8)]], "layer | token dim", {},
     r"a list, tuple or dict of tensors for 'layer | token dim', got a list\."),
    ([[noise(5, 8)] * 2, [noise(5, 8)]], "layer kv | token dim", {}, "got lengths 2 and 1"),
    ([noise(5, 8), None], "layer | token dim", {}, r"got None\. Pass tensors"),
    ("x", "layer | token dim", {}, r"got a str\. Pass tensors, in lists"),
    ([noise(5, 8)] * 3, "kv | token dim", {}, "'kv' .* extent 2, got 3"),
    ([noise(5, 8), noise(8, 5).t()], "layer | token dim", {}, "one shape, strides and dtype"),
    ([noise(5, 8), noise(5, 8, dtype=torch.half)], "layer | token dim", {}, "one shape"),
    # Within one kv also the widths.
    ([(noise(5, 8), noise(5, 2)), (noise(5, 8), noise(5, 4))], "layer kv | token dim", {},
     "one shape"),
    ((noise(5, 4, 8), noise(6, 4, 8)), "kv | block token dim", {},
     r"'block' .* for all 2 kv, got \[5, 6\]"),
    (noise(5, 8).to("meta"), "token dim", {}, "has no memory"),
    (torch.eye(8).to_sparse(), "token dim", {}, "strided tensors, got a .*sparse"),
    ([torch.eye(8).to_sparse()], "layer | token dim", {}, "strided tensors, got a .*sparse"),
    (NESTED, "block token dim", {}, "strided tensors, got a .*nested"),
    ([NESTED], "layer | block token dim", {}, "strided tensors, got a .*nested"),
    (np.zeros((3, 4, 8)), "block token dim", {}, "torch.from_numpy"),
    ([np.zeros((3, 4, 8))], "layer | block token dim", {}, "torch.from_numpy"),
    (np.zeros((3, 4, 8)), "layer | token dim", {}, "torch.from_numpy"),
    # Also after an equal number was accepted.
    (noise(5, 8), "token dim", {"dim": 8.0}, "positive integer"),
    (noise(5, 8), "token dim", {"dim": {8}}, "positive integer"),
    (noise(5, 8), "token dim", {"heads": [1]}, "positive integer"),
    (noise(5, 8), "token dim", {"kv": "1"}, "positive integer"),
    (noise(5, 8), "token dim", {"head": 2}, r"heads and dim, got head\. Declare"),
    (noise(5, 8), "token dim", {"dtype": torch.half}, r"and dim, got dtype\. .* kv_layout"),
]  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_tensors_are_refused(listed: bool) -> None:
    """Their bytes are numbers of a scale, which no copy moves."""
    rows = torch.ones(4, 8, device="cpu")
    scales = torch.ones(4, device="cpu")
    zeros = torch.zeros(4, device="cpu")
    for tensor in (
        torch.quantize_per_tensor(rows, 0.1, 0, torch.qint8),
        torch.quantize_per_channel(rows, scales, zeros, 0, torch.quint8),
    ):
        with pytest.raises(
            LayoutError, match=r"values, got a quantized one .* tensor.int_repr\(\)"
        ):
            KVView([tensor], "layer | token dim") if listed else KVView(tensor, "token dim")
        with pytest.raises(LayoutError, match="quantized"):
            memcpy.copy_(tensor, tensor)
        check_writable(KVView(tensor.int_repr(), "token dim"))


@pytest.mark.parametrize(("tensors", "layout", "extents", "why"), REFUSED)
def test_what_is_refused(tensors: Any, layout: str, extents: dict[str, Any], why: str) -> None:
    KVView(noise(5, 8), "token dim", dim=8, heads=1, kv=1)
    with pytest.raises(LayoutError, match=why):
        KVView(tensors, layout, **extents)


def test_a_cache_of_transformers_is_told_how_to_pass_it() -> None:
    """By the line that works; so is one of its layers."""
    keys = torch.arange(96.0).view(1, 2, 6, 8)
    layer = SimpleNamespace(keys=keys, values=keys + 1)
    cache = SimpleNamespace(layers=[layer, layer])
    line = "[(x.keys, x.values) for x in cache.layers]"
    layout = "layer kv | block head token dim"
    with pytest.raises(LayoutError) as caught:
        KVView(cache, layout)  # type: ignore[arg-type]
    assert line in str(caught.value)
    assert repr(layout) in str(caught.value)
    view = KVView(eval(line, {"cache": cache}), layout)
    assert (view.layers, view.kv, view.heads, view.block_size) == (2, 2, 2, 6)
    with pytest.raises(LayoutError, match=r"Pass \(layer.keys, layer.values\)"):
        KVView(layer, "kv | block head token dim")  # type: ignore[arg-type]


def test_scales_without_a_dim() -> None:
    """Both ways that the error names read the same rows."""
    scales = torch.arange(96.0).view(3, 16, 2)
    first = KVView(scales.unsqueeze(-1), "block token head dim")
    second = KVView(scales, "block token (head dim)", dim=1)
    assert first.form == second.form


@pytest.mark.parametrize("layout", ["kv token dim", "layer kv token dim", "kv layer | token dim"])
def test_tensors_that_do_not_fit_are_named_by_shape_and_strides(layout: str) -> None:
    """Tensors and addresses are named alike: two kv of three."""
    tensor = torch.zeros(3, 5, 9)[:, :, :8]
    tensors = [[tensor], [tensor[:, :, :4]]] if "|" in layout else tensor
    with pytest.raises(LayoutError, match=re.escape("shape (3, 5, 8), strides (45, 9, 1)")):
        KVView(tensors, layout)
    if "|" not in layout:
        with pytest.raises(LayoutError, match=re.escape("shape (3, 5, 8), strides (45, 9, 1)")):
            KVView.at(
                tensor.data_ptr(),
                layout,
                shape=tensor.shape,
                strides=tensor.stride(),
                dtype=tensor.dtype,
                device="cpu",
            )


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_tensors_inside_function_transforms(transform: Any) -> None:
    def read(cache: torch.Tensor) -> torch.Tensor:
        KVView(cache, "token dim")
        return cache.sum()

    with pytest.raises(LayoutError, match=r"owns no memory, .* torch.vmap"):
        transform(read)(torch.zeros(3, 4, 8) if transform is torch.vmap else torch.zeros(4, 8))


@pytest.mark.parametrize("dtype", ["float16", np.float16, 2])
def test_a_dtype_by_another_name(dtype: Any) -> None:
    with pytest.raises(LayoutError, match=r"Pass one such as torch.float16"):
        KVView(noise(5, 8), "token dim").plane(0, 0, dtype)
    with pytest.raises(LayoutError, match=r"to be a torch.dtype"):
        example_tensors("token dim", dtype=dtype)


def test_its_repr_says_what_it_holds() -> None:
    cache = KVView([torch.zeros(2, 3, 4, 2, 8, device="cpu")] * 2, "vllm-nhd")
    assert repr(cache) == (
        "KVView('layer | kv block token head dim': 2 layers, 2 kv, 2 heads, 3 blocks of 4 "
        "tokens, widths (32, 32) B, float32 on cpu (pageable))"
    )
    assert "1 heads, 5 tokens, widths (16,) B, int16" in repr(KVView(noise(5, 8), "token dim"))


A, B, C = noise(3, 5, 8)
D, E = noise(2, 5, 8)
SHARED = "(stride 0|one address)"
APART = "planes lie at one address"


UNWRITABLE: dict[str, tuple[Any, str, str]] = {
    "heads": (noise(5, 1, 8).expand(5, 3, 8), "token head dim", SHARED),
    "tokens": (noise(1, 8).expand(5, 8), "token dim", SHARED),
    "dim": (noise(5, 1).expand(5, 8), "token dim", SHARED),
    "blocks": (noise(1, 4, 8).expand(3, 4, 8), "block token dim", SHARED),
    "kv": (noise(1, 5, 8).expand(2, 5, 8), "kv token dim", SHARED),
    "one tensor twice": ([A] * 2, "kv | token dim", SHARED),
    "one block twice": ([A] * 2, "block | token dim", APART),
    "one among others twice": ([A, D, A], "layer | token dim", APART),
    "a value that is the next layer's key": ([(A, B), (B, C)], "layer kv | token dim", APART),
    "after several addresses": ([(A, B), (B, C), (D, E)], "layer kv | token dim", APART),
    "requires grad":
        (torch.zeros(5, 8, requires_grad=True), "token dim", r"grad. Pass tensor.detach\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_cannot_be_written(name: str) -> None:
    tensors, layout, why = UNWRITABLE[name]
    with pytest.raises(LayoutError, match=f"writable destination, got .*: .*{why}"):
        check_writable(KVView(tensors, layout))


class TestPlanes:
    @pytest.mark.parametrize("name", KINDS)
    def test_a_plane_is_the_memory_itself(self, name: str) -> None:
        engine = side(name)
        view = KVView(engine.tensors, name, **engine.extents)
        check_writable(view)
        if re.search("page|%|^block [|]", engine.layout):
            with pytest.raises(LayoutError, match="No strided tensor can show"):
                view.plane(0, 0)
            assert view.form.unshown
            return
        assert not view.form.unshown
        rows = Rows(engine.tensors, engine.layout, engine.extents)
        for layer, kv in np.ndindex(view.layers, view.kv):
            plane = view.plane(layer, kv)
            assert plane.dtype == view.owners[0].dtype
            size = view.block_size
            shape = (view.slots // size, size) if size else (view.slots,)
            assert plane.shape == (*shape, view.heads, view.widths[kv] // plane.itemsize)
            view.plane(layer, kv, torch.uint8).add_(1)
            at = rows.row_addresses(kv, layer, range(view.slots))
            memory = Memory.snapshot(engine.tensors)
            actual = view.plane(layer, kv, torch.uint8).reshape(at.shape)
            assert np.array_equal(actual, memory.read(at))

    @pytest.mark.parametrize(
        ("make", "dtype", "why"),
        [
            (lambda: KVView(noise(3, 64), "block page", block_size=4), None, "pages have no rows"),
            (lambda: KVView(noise(5, 8).t(), "token dim"), None, "not a single run"),
            (lambda: KVView(noise(1, 1).expand(5, 8), "token dim"), None, "not a single run"),
            (lambda: KVView(noise(2, 5, 3, 8), "token%2 token/2 head dim"), None, "split"),
            (lambda: KVView([noise(1, 8)] * 2, "token | 1 dim"), None, "'token' axis goes thr"),
            (lambda: KVView(noise(5, 3), "token dim"), torch.int64, "cannot be read as torch.int"),
            (lambda: KVView(noise(5, 9)[:, :8], "token dim"), torch.int64, "cannot be read as"),
            (lambda: KVView(noise(41)[1:].view(5, 8), "token dim"), torch.int64, "cannot be read"),
        ],
        ids=["pages", "turned", "one element", "split", "listed", "width", "stride", "origin"],
    )
    def test_no_plane(
        self, make: Callable[[], KVView], dtype: torch.dtype | None, why: str
    ) -> None:
        with pytest.raises(LayoutError, match=why):
            make().plane(0, 0, dtype)


def test_views_of_one_memory_overlap_where_their_ranges_do() -> None:
    memory = noise(100, 8)
    views = [KVView(memory[a:b], "token dim") for a, b in ((0, 5), (5, 10), (4, 6), (0, 0))]
    actual = [[a.overlaps(b) for b in views[:3]] for a in views]
    assert actual == [[True, False, True], [False, True, True], [True] * 3, [False] * 3]
    # A short range inside a long one is the last before the other view, yet ends before it.
    wide = memory.as_strided((3, 8), (264, 1))
    narrow = memory.as_strided((3, 2), (8, 1), 16)
    both = KVView([wide, narrow], "kv | token dim")
    inside = KVView(memory[50:52], "token dim")
    assert both.overlaps(inside)
    assert inside.overlaps(both)


def test_two_buffers_are_compared_as_a_whole() -> None:
    """A list of runs between two buffers is not compared run by run, unless they are mixed."""
    memory = noise(300, 8)
    lower, upper, mixed, empty = (
        KVView([memory[row : row + 2] for row in rows], "layer | token dim")
        for rows in (range(0, 100, 4), range(100, 200, 4), range(2, 200, 4), [300])
    )
    searched: list[object] = []
    sys.setprofile(lambda frame, event, called: searched.append(called))
    try:
        answers = [one.overlaps(other) for one, other in permutations((lower, upper, empty), 2)]
        whole = bisect_left in searched
        answers.append(lower.overlaps(mixed))
    finally:
        sys.setprofile(None)
    assert answers == [False] * 7
    assert not whole
    assert bisect_left in searched
    assert lower.overlaps(KVView(memory[97:98], "token dim"))
    assert upper.overlaps(KVView(memory[99:101], "token dim"))
