# SPDX-License-Identifier: Apache-2.0
"""Views: form and addresses from real tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import HANDS, HEADS, KV, LAYERS, SLOTS, Hand, address, noise

from portakv import CopyPlan, DeviceMismatch, Index, KVView, LayoutError, copy_rows
from portakv.view.example import example_tensors
from portakv.view.form import Step


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.layout)
def test_form_and_table_lead_to_every_row(hand: Hand) -> None:
    tensors = hand.make(0)
    view, rows = hand.view(tensors), hand.rows(tensors)
    assert (view.layers, view.kv, view.heads, view.slots) == (LAYERS, KV, HEADS, SLOTS)
    assert view.block_size == (hand.block or None)
    for layer, kv, slot, head in np.ndindex(LAYERS, KV, SLOTS, HEADS):
        at = address(view, kv, layer, slot, head)
        assert _read(view, at) == rows[kv, layer, slot, head, 0].item()


def _read(view: KVView, at: int) -> int:
    """The int16 at an address, which must lie in a storage of the view."""
    for owner in view.owners:
        storage = owner.untyped_storage()
        offset = at - storage.data_ptr()
        if 0 <= offset < storage.nbytes():
            return int(torch.empty(0, dtype=torch.int16).set_(storage)[offset // 2])
    raise AssertionError(f"{at} lies in no tensor of the view")


class TestStrides:
    def test_logical_nhd_over_hnd_memory(self) -> None:
        memory = noise(2, 3, 2, 4, 8)
        view = KVView(memory.transpose(2, 3), "kv block token head dim")
        part = view.form.parts[1]
        assert part.token == (Step(4, 0, 16),)
        assert part.head == (Step(2, 0, 64),)
        assert part.block == (Step(0, 0, 128),)
        assert part.offset == 3 * 128

    def test_a_storage_offset_moves_the_address_only(self) -> None:
        memory = noise(8 + 40)
        view = KVView(memory[8:].view(5, 8), "token dim")
        assert view.addresses.tolist() == [memory.data_ptr() + 16]
        assert view.form == KVView(noise(5, 8), "token dim").form

    def test_padded_pages(self) -> None:
        view = KVView(noise(3, 100)[:, :32].view(3, 4, 8), "block token dim")
        assert view.form.parts[0].block == (Step(0, 0, 200),)

    def test_rows_whose_elements_are_apart(self) -> None:
        view = KVView(noise(5, 16)[:, ::2], "token dim")
        assert view.widths == (16,)
        assert view.form.parts[0].dim == (Step(8, 0, 4), Step(2, 0, 1))

    def test_a_flat_pool_has_one_step_for_blocks_and_tokens(self) -> None:
        parts = KVView(noise(12, 8), "(block token) dim", block_size=4).form.parts
        assert (parts[0].block, parts[0].token) == ((Step(0, 0, 64),), (Step(4, 0, 16),))

    def test_unequal_widths_lie_one_behind_the_other(self) -> None:
        view = KVView(noise(3, 33 * 4), "block (kv token dim)", dim=(32, 1))
        assert [part.offset for part in view.form.parts] == [0, 4 * 64]
        assert [part.token for part in view.form.parts] == [(Step(4, 0, 64),), (Step(4, 0, 2),)]
        assert view.widths == (64, 2)
        three = KVView(noise(5, 14), "token (kv dim)", kv=3, dim=(8, 4, 2))
        assert [part.offset for part in three.form.parts] == [0, 16, 24]


class TestOpenEnd:
    def test_page_may_cover_several_dimensions(self) -> None:
        view = KVView(noise(5, 4, 3, 8), "block page", block_size=4)
        assert view.form == KVView(noise(5, 96), "block page", block_size=4).form

    def test_a_group_in_parentheses_may_cover_several_dimensions(self) -> None:
        chunk = noise(2, 5, 3, 8)
        view = KVView(chunk, "kv token (head dim)", heads=3)
        assert view.form == KVView(chunk.view(2, 5, 24), "kv token (head dim)", heads=3).form

    def test_so_may_a_group_of_one_axis(self) -> None:
        view = KVView(noise(5, 3, 8), "token (dim)")
        assert view.form == KVView(noise(5, 24), "token dim").form

    @pytest.mark.parametrize(
        ("layout", "tensor"),
        [
            ("token dim", noise(5, 3, 8)),
            ("(block token) dim", noise(20, 3, 8)),
            ("(token head) dim", noise(15, 3, 8)),
        ],
    )
    def test_no_other_group_may(self, layout: str, tensor: torch.Tensor) -> None:
        with pytest.raises(LayoutError, match=r"2 dimension\(s\) .* a tensor of shape"):
            KVView(tensor, layout, heads=3 if "head" in layout else None)

    @pytest.mark.parametrize(
        "tensor",
        [noise(5, 3, 16)[:, :, :8], noise(5, 8, 3).transpose(1, 2), noise(5, 6, 8)[:, ::2]],
        ids=["cut", "turned", "stepped"],
    )
    def test_they_must_be_contiguous_together(self, tensor: torch.Tensor) -> None:
        with pytest.raises(LayoutError, match="not contiguous together"):
            KVView(tensor, "token (head dim)", heads=3)

    @pytest.mark.parametrize("tensor", [noise(5, 1, 24), noise(5, 24, 1), noise(5, 1, 24, 1, 1)])
    def test_dimensions_of_one_are_contiguous_with_anything(self, tensor: torch.Tensor) -> None:
        strange = tensor.as_strided(tensor.shape, [s if n > 1 else 7 for n, s in _steps(tensor)])
        view = KVView(strange, "token (head dim)", heads=3)
        assert view.form == KVView(noise(5, 24), "token (head dim)", heads=3).form

    def test_too_few_dimensions(self) -> None:
        with pytest.raises(LayoutError, match=r"3 dimension\(s\)"):
            KVView(noise(5, 24), "kv token (head dim)", heads=3)


def _steps(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


class TestContainers:
    def test_separate_tensors_are_a_table(self) -> None:
        layers = [noise(5, 8, seed=i) for i in range(3)]
        view = KVView(layers, "layer | token dim")
        assert view.addresses.tolist() == [t.data_ptr() for t in layers]
        assert view.form.parts[0].layer == (Step(3, 1, 0),)

    def test_tensors_of_one_allocation_at_equal_distances_are_a_stride(self) -> None:
        memory = noise(3, 2, 5, 8)
        view = KVView([list(layer) for layer in memory], "layer kv | token dim")
        assert view.addresses.tolist() == [memory.data_ptr()]
        assert view.form == KVView(memory, "layer kv token dim").form

    @pytest.mark.parametrize("order", [(0, 1, 3), (2, 1, 0), (1, 0, 2)])
    def test_at_other_distances_they_stay_a_table(self, order: tuple[int, ...]) -> None:
        memory = noise(4, 5, 8)
        view = KVView([memory[i] for i in order], "layer | token dim")
        assert view.addresses.tolist() == [memory[i].data_ptr() for i in order]

    def test_separate_allocations_at_equal_distances_by_chance_stay_a_table(self) -> None:
        memory = noise(3, 5, 8).numpy()
        apart = [torch.from_numpy(memory[i]) for i in range(3)]  # each a storage of its own
        assert len(KVView(apart, "layer | token dim").addresses) == 3

    def test_a_list_of_memory_objects_has_one_form_wherever_they_lie(self) -> None:
        memory = noise(4, 5, 8)
        together = KVView([memory[0], memory[1]], "block | token dim")
        apart = KVView([noise(5, 8), noise(5, 8), noise(5, 8)], "block | token dim")
        assert together.form == apart.form
        assert (together.slots, apart.slots) == (10, 15)

    def test_dicts_are_read_in_their_order(self) -> None:
        layers = {f"model.layers.{i}": noise(5, 8, seed=i) for i in (2, 0, 1)}
        view = KVView(layers, "layer | token dim")
        assert view.addresses.tolist() == [t.data_ptr() for t in layers.values()]

    @pytest.mark.parametrize(
        ("tensors", "layout", "why"),
        [
            ([], "layer | token dim", "is empty"),
            ([[], []], "layer kv | token dim", "is empty"),
            (noise(2, 5, 8), "layer | token dim", "a Tensor was found where a list"),
            ([noise(5, 8)], "token dim", "a list was found"),
            ([[noise(5, 8)]], "layer | token dim", "a list was found"),
            ([[noise(5, 8)] * 2, [noise(5, 8)]], "layer kv | token dim", "unequal lengths 2 and 1"),
            ([noise(5, 8), None], "layer | token dim", "a NoneType was found"),
            ([noise(5, 8)] * 3, "kv | token dim", "'kv' .* extent 2, but 3"),
            ([noise(5, 8), noise(8, 5).t()], "layer | token dim", "share shape, strides and dtype"),
            ([noise(5, 8), noise(5, 8, dtype=torch.float16)], "layer | token dim", "share shape"),
        ],
    )
    def test_containers_that_do_not_fit(self, tensors: Any, layout: str, why: str) -> None:
        with pytest.raises(LayoutError, match=why):
            KVView(tensors, layout)

    def test_tensors_of_several_devices(self) -> None:
        with pytest.raises(DeviceMismatch, match="lie on cpu and meta"):
            KVView([noise(5, 8), noise(5, 8).to("meta")], "layer | token dim")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: noise(5, 8).to("meta"), "have no memory"),
        (lambda: torch.eye(8).to_sparse(), "strided"),
        (lambda: [torch.eye(8).to_sparse()], "strided"),
    ],
    ids=["meta", "sparse", "sparse in a list"],
)
def test_tensors_without_rows_in_memory(make: Callable[[], Any], why: str) -> None:
    tensors = make()
    with pytest.raises(LayoutError, match=why):
        KVView(tensors, "layer | token dim" if isinstance(tensors, list) else "token dim")


@pytest.mark.parametrize(
    "extents",
    [{"dim": 8.0}, {"dim": {8}}, {"heads": [1]}, {"kv": "1"}],
)
def test_extents_that_are_no_integers_are_refused_at_any_time(extents: dict[str, Any]) -> None:
    """Also after an equal number was accepted."""
    KVView(noise(5, 8), "token dim", dim=8, heads=1, kv=1)
    with pytest.raises(LayoutError, match="positive integer"):
        KVView(noise(5, 8), "token dim", **extents)


class TestWritable:
    @pytest.mark.parametrize(
        ("tensors", "layout"),
        [
            (noise(5, 1, 8).expand(5, 3, 8), "token head dim"),
            (noise(1, 8).expand(5, 8), "token dim"),
            (noise(5, 1).expand(5, 8), "token dim"),
            (noise(1, 4, 8).expand(3, 4, 8), "block token dim"),
            (noise(1, 5, 8).expand(2, 5, 8), "kv token dim"),
            ([noise(5, 8)] * 2, "kv | token dim"),
            ([noise(5, 8)] * 3, "layer | token dim"),
        ],
        ids=["heads", "tokens", "dim", "blocks", "kv", "one tensor twice", "one tensor thrice"],
    )
    def test_rows_that_share_a_place(self, tensors: Any, layout: str) -> None:
        view = KVView(tensors, layout)
        with pytest.raises(LayoutError, match=r"cannot be written: .* (stride 0|one address)"):
            view.check_writable()

    def test_one_tensor_among_others_twice(self) -> None:
        a, b = noise(5, 8), noise(5, 8)
        view = KVView([a, b, a], "layer | token dim")
        with pytest.raises(LayoutError, match="planes lie at one address"):
            view.check_writable()

    def test_a_value_that_is_the_next_layers_key(self) -> None:
        a, b, c = noise(3, 5, 8)
        view = KVView([(a, b), (b, c)], "layer kv | token dim")
        with pytest.raises(LayoutError, match="planes lie at one address"):
            view.check_writable()

    def test_the_same_behind_several_addresses(self) -> None:
        (a, b, c), d = noise(3, 5, 8), noise(2, 5, 8)
        view = KVView([(a, b), (b, c), (d[0], d[1])], "layer kv | token dim")
        with pytest.raises(LayoutError, match="planes lie at one address"):
            view.check_writable()

    def test_a_tensor_that_requires_grad(self) -> None:
        view = KVView(torch.zeros(5, 8, requires_grad=True), "token dim")
        with pytest.raises(LayoutError, match=r"requires grad; pass tensor.detach\(\)"):
            view.check_writable()

    def test_such_views_can_be_sources(self) -> None:
        one = noise(1, 8)
        dst = KVView(noise(5, 8, seed=1), "token dim")
        copy_rows(KVView(one.expand(5, 8), "token dim"), dst).synchronize()
        assert torch.equal(dst.tensors, one.expand(5, 8))

    @pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.layout)
    def test_ordinary_views_are_writable(self, hand: Hand) -> None:
        hand.view(hand.make(0)).check_writable()


ODD: dict[str, Any] = {
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(4, 8), torch.zeros(2, 8)]),
    "sparse": lambda: torch.zeros(3, 4, 8).to_sparse(),
    "numpy": lambda: np.zeros((3, 4, 8), dtype=np.float16),
}


class TestOddInput:
    @pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed"])
    @pytest.mark.parametrize("kind", ODD)
    def test_tensors_without_rows(self, kind: str, listed: bool) -> None:
        tensors: Any = [ODD[kind]()] if listed else ODD[kind]()
        advice = "torch.from_numpy" if kind == "numpy" else f"strided tensors, but a .*{kind}"
        with pytest.raises(LayoutError, match=advice):
            KVView(tensors, "layer | block token dim" if listed else "block token dim")
        if kind == "numpy":
            with pytest.raises(LayoutError, match=advice):
                KVView(ODD[kind](), "layer | token dim")

    @pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
    def test_tensors_inside_function_transforms(self, transform: Any) -> None:
        def read(cache: torch.Tensor) -> torch.Tensor:
            KVView(cache, "token dim")
            return cache.sum()

        with pytest.raises(LayoutError, match=r"without memory of its own .* torch.vmap"):
            transform(read)(torch.zeros(3, 4, 8) if transform is torch.vmap else torch.zeros(4, 8))

    def test_an_extent_that_does_not_exist(self) -> None:
        with pytest.raises(LayoutError, match="Unknown extents head; declare"):
            KVView(noise(5, 8), "token dim", head=2)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", ["float16", np.float16, 2])
    def test_a_dtype_by_another_name(self, dtype: Any) -> None:
        with pytest.raises(LayoutError, match=r"expected a torch.dtype, such as torch.float16"):
            KVView(noise(5, 8), "token dim").plane(0, 0, dtype)
        with pytest.raises(LayoutError, match=r"expected a torch.dtype"):
            example_tensors("token dim", dtype=dtype)

    def test_its_repr_says_what_it_holds(self) -> None:
        cache = KVView([torch.zeros(2, 3, 4, 2, 8, device="cpu")] * 2, "vllm-nhd")
        assert repr(cache) == (
            "KVView('layer | kv block token head dim': 2 layers, 2 kv, 2 heads, 3 blocks of 4 "
            "tokens, widths (32, 32) B, float32 on cpu (pageable))"
        )
        assert "1 heads, 5 tokens, widths (16,) B, int16" in repr(KVView(noise(5, 8), "token dim"))


@pytest.mark.parametrize("state", ["device", "with device", "dtype", "inference"])
def test_whatever_torch_was_set_to(state: str) -> None:
    """Engines set defaults while they load; a view, its table, a plan and ids know none of it."""
    hand, number = HANDS[0], torch.device("cpu")
    tensors, ids = hand.make(0), torch.tensor([5, -1, 2], dtype=torch.int64)
    with ExitStack() as entered:
        if state == "device":
            torch.set_default_device("meta")
            entered.callback(torch.set_default_device, None)
        elif state == "with device":
            entered.enter_context(torch.device("meta"))
        elif state == "dtype":
            entered.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.bfloat16)
        else:
            entered.enter_context(torch.inference_mode())
        view, index = hand.view(tensors), Index([1, 0, 2], step=4)
        assert view.table.device == number
        assert view.table.tolist() == view.addresses.tolist()
        assert index.units(12, 2, number).tolist() == [2, 3, 0, 1, 4, 5]
        assert Index([5, -1, 2]).ids_on(number).tolist() == ids.tolist()
        assert Index(offset=4).units(4, 2, number).tolist() == [2, 3]
        assert Index.joined([(index, 2), (Index(ids), 3)]).slots(5).tolist() == [4, 5, 5, -1, 2]
        assert view.plane(1, 1, torch.int64).device == number
        runs = CopyPlan(view.form, view.form, 4, 4).runs(view, view, index, index, 12)
        assert runs.nbytes.dtype == np.int64
        made = example_tensors("layer | token dim", layers=2, tokens=3, dim=4)
        assert (made[0].device, made[0].dtype) == (number, torch.float16)


class TestPlanes:
    @pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.layout)
    def test_a_plane_is_the_memory_itself(self, hand: Hand) -> None:
        tensors = hand.make(0)
        view, rows = hand.view(tensors), hand.rows(tensors)
        if "dim%2" in hand.layout or hand.layout.startswith(("token |", "block |")):
            with pytest.raises(LayoutError, match="No strided tensor can show"):
                view.plane(0, 0)
            assert view.form.unshown
            return
        assert not view.form.unshown
        for layer, kv in np.ndindex(LAYERS, KV):
            plane = view.plane(layer, kv)
            assert plane.dtype == torch.int16
            shape = (SLOTS // hand.block, hand.block) if hand.block else (SLOTS,)
            assert plane.shape == (*shape, HEADS, 4)
            assert torch.equal(plane.reshape(SLOTS, HEADS, 4), rows[kv, layer])

    @pytest.mark.parametrize(
        ("view", "why"),
        [
            (lambda: KVView(noise(3, 64), "block page", block_size=4), "opaque pages have no rows"),
            (lambda: KVView(noise(5, 8).t(), "token dim"), "no single run of bytes"),
            (lambda: KVView(noise(1, 1).expand(5, 8), "token dim"), "no single run of bytes"),
            (lambda: KVView(noise(2, 5, 3, 8), "token%2 token/2 head dim"), "split"),
            (lambda: KVView([noise(1, 8), noise(1, 8)], "token | 1 dim"), "'token' axis goes thr"),
        ],
    )
    def test_why_there_is_no_plane(self, view: Callable[[], KVView], why: str) -> None:
        with pytest.raises(LayoutError, match=why):
            view().plane(0, 0)

    def test_writing_a_plane_writes_the_tensor(self) -> None:
        memory = noise(2, 3, 2, 4, 8).transpose(2, 3)
        plane = KVView(memory, "kv block token head dim").plane(0, 1)
        plane[2, 3, 1] = 7
        assert (memory[1, 2, 3, 1] == 7).all()

    def test_in_another_dtype(self) -> None:
        memory = noise(5, 8)
        assert torch.equal(
            KVView(memory, "token dim").plane(0, 0, torch.int64)[:, 0], memory.view(torch.int64)
        )

    @pytest.mark.parametrize(
        "memory",
        [
            noise(5, 3),
            noise(5, 9)[:, :8],
            noise(41)[1:].view(5, 8),
        ],
        ids=["width", "stride", "origin"],
    )
    def test_a_dtype_that_does_not_divide_the_places_of_rows(self, memory: torch.Tensor) -> None:
        with pytest.raises(LayoutError, match=r"cannot be read as torch.int64"):
            KVView(memory, "token dim").plane(0, 0, torch.int64)

    def test_opaque_pages_have_no_tokens_to_show(self) -> None:
        with pytest.raises(LayoutError):
            KVView(noise(5, 32), "block page", block_size=4).plane(0, 0)


class TestOverlaps:
    def test_views_of_one_memory_overlap_where_their_ranges_do(self) -> None:
        memory = noise(10, 8)
        views = [KVView(memory[a:b], "token dim") for a, b in ((0, 5), (5, 10), (4, 6))]
        found = [[a.overlaps(b) for b in views] for a in views]
        assert found == [[True, False, True], [False, True, True], [True, True, True]]

    def test_a_long_range_with_a_short_one_inside(self) -> None:
        """The short one is the last that begins before the other view, yet ends before it."""
        memory = noise(100, 8)
        wide, narrow = memory.as_strided((3, 8), (264, 1)), memory.as_strided((3, 2), (8, 1), 16)
        both = KVView([wide, narrow], "kv | token dim")
        inside = KVView(memory[50:52], "token dim")
        assert both.overlaps(inside)
        assert inside.overlaps(both)

    def test_empty_views_overlap_nothing(self) -> None:
        memory = noise(10, 8)
        assert not KVView(memory[:0], "token dim").overlaps(KVView(memory, "token dim"))
