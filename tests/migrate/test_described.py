# SPDX-License-Identifier: Apache-2.0
"""Views described and rebuilt at other addresses, of every preset; descriptions that lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields
from support import presets_cases
from support.ambient import STATES
from support.cache_cases import Cache
from support.core_cases import noise

from portakv import CopyPlan, Index, KVView
from portakv.errors import LayoutError
from portakv.migrate.described import Regions, describe, rebuild, reserve
from portakv.migrate.messages import Described, Group
from portakv.migrate.shards import Shard


def sent(shard: Shard) -> tuple[Described, Regions]:
    """Return a description as it arrives, and its regions."""
    regions = Regions()
    message = msgspec.msgpack.encode(describe(shard, regions))
    return msgspec.msgpack.decode(message, type=Described), regions


def lies(view: KVView, regions: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the region's number and the offset there for each address of a view."""
    begins = [region.data_ptr() for region in regions]
    past = [region.data_ptr() + region.numel() for region in regions]
    return [
        (n, at - begins[n])
        for at in view.origins
        for n in range(len(begins))
        if begins[n] <= at < past[n]
    ]


def same(one: KVView, ones: list[torch.Tensor], other: KVView, others: list[torch.Tensor]) -> None:
    """Both read the same bytes of regions that lie at different addresses."""
    assert replace(one.form, alignment=1) == replace(other.form, alignment=1)
    assert (one.slots, lies(one, ones)) == (other.slots, lies(other, others))
    assert {*one.origins}.isdisjoint(other.origins)


@pytest.mark.parametrize("name", presets_cases.LAYOUTS)
def test_a_view_of_a_preset_is_rebuilt_at_other_addresses(name: str) -> None:
    made = presets_cases.side(name)
    view = KVView(made.tensors, name, **made.extents)
    message, regions = sent(Shard(view))
    there = [region.clone() for region in regions.flat()]
    shard = rebuild(message, there)
    same(view, regions.flat(), shard.view, there)
    assert shard.group == message.group == Shard(view).group


def test_what_the_constructor_was_told_arrives() -> None:
    """A window, a declared block size of a flat pool, rows that are bytes."""
    pool = [noise(64, 3, 8, dtype=torch.bfloat16) for _ in range(4)]
    layout = "(kv layer) | (block token) head dim"
    view = KVView(pool, layout, layers=2, block_size=16, reinterpret=True)
    message, regions = sent(Shard(view, (2, 4, 8), (3, 6, 6)))
    shard = rebuild(message, regions.flat())
    assert shard.view.form == view.form
    assert (shard.view.block_size, shard.view.form.dtypes) == (16, ())
    assert shard.group == Group((2, 4, 8), (3, 6, 6), (16, 16))


def test_80_layers_in_80_regions_are_a_few_thousand_bytes() -> None:
    tensors = [torch.empty(2, 8, 16, 8, 128, dtype=torch.float16) for _ in range(80)]
    regions = Regions()
    message = describe(Shard(KVView(tensors, "vllm-nhd")), regions)
    assert len(regions.storages) == 80
    assert len(msgspec.msgpack.encode(message)) < 1000


def test_an_allocation_is_one_region() -> None:
    pool = noise(4, 2, 6, 4, 2, 8, dtype=torch.float16)
    regions = Regions()
    layers = pool[1:3]
    other = pool[3]
    describe(Shard(KVView([*layers], "vllm-nhd")), regions)
    message = describe(Shard(KVView(other, "kv block token head dim")), regions)
    assert [x.nbytes() for x in regions.storages] == [pool.nbytes]
    assert message.places == ((0, 3 * pool[0].nbytes, 0),)


def test_what_cannot_be_described_is_refused() -> None:
    tensors = [noise(2, 8, 4, 2, 8, dtype=torch.float16) for _ in range(2)]
    view = KVView(tensors, "vllm-nhd")
    with pytest.raises(LayoutError, match="If it is a slice, pass the whole view"):
        describe(Shard(view.slice(layers=slice(1, 2))), Regions())
    with pytest.raises(LayoutError, match="If it is a slice, pass the whole view"):
        describe(Shard(view.slice(heads=0)), Regions())
    bare = KVView.at(
        tensors[0].data_ptr(), "block token dim", shape=(8, 4, 8), dtype=torch.float16, device="cpu"
    )
    with pytest.raises(LayoutError, match="of raw addresses"):
        describe(Shard(bare), Regions())
    many = [tensors[0][0, 0, :, 0]] * 8193
    with pytest.raises(LayoutError, match="its 8193 tensors"):
        describe(Shard(KVView(many, "block | token dim")), Regions())
    tensors[1].data = torch.zeros(2, 8, 4, 2, 8, dtype=torch.float16)
    with pytest.raises(LayoutError, match="still have their memory"):
        describe(Shard(view), Regions())


POOL = noise(2 * 8 * 4 * 2 * 8, dtype=torch.float16)
HALF = POOL.nbytes // 2
VIEW = KVView([*POOL.view(2, 8, 4, 2, 8)], "layer | block token head dim")
HONEST, _REGIONS = sent(Shard(VIEW))
SHAPE, STRIDES = HONEST.kinds[0][1:]
BIG = 1 << 48


def kinds(dtype: str = "float16", shape: Any = SHAPE, strides: Any = STRIDES) -> dict[str, Any]:
    return {"kinds": ((dtype, shape, strides),)}


@pytest.mark.parametrize(
    "lie",
    [
        {"places": ((0, 0, 0), (0, HALF + 2, 0))},
        {"places": ((0, 0, 0), (0, 2 * HALF, 0))},
        {"places": ((0, 0, 0), (0, BIG, 0))},
        {"places": ((0, 0, 0), (0, 1, 0))},
        {"places": ((0, 0, 0), (1, 0, 0))},
        {"places": ((0, 0, 0), (0, 0, 1))},
        {"places": ((0, 0, 0),)},
        {"places": ((0, 0, 0),) * 3},
        {"containers": ()},
        {"containers": (0,)},
        {"containers": (2, 1)},
        kinds(shape=(9, 4, 2, 8)),
        kinds(shape=(BIG, 4, 2, 8)),
        kinds(shape=(BIG,) * 4, strides=(0, 0, 0, 0)),
        kinds(shape=(8, 4, 2, 8)[:3]),
        kinds(shape=(8, 0, 2, 8)),
        kinds(shape=(8, 4, 2, 16)),
        kinds(shape=(), strides=()),
        kinds(strides=(64, 16, 8, 2)),
        kinds(strides=(65, 16, 8, 1)),
        kinds(strides=(BIG, BIG, BIG, BIG)),
        kinds(strides=(-64, 16, 8, 1)),
        kinds("float64"),
        kinds("uint8"),
        kinds("quint8"),
        kinds("float"),
        kinds("int3"),
        kinds("set_printoptions"),
        kinds("no_such_dtype"),
        {"layout": "layer | block token head"},
        {"layout": "layer | block head token dim"},
        {"layout": "layer || block"},
        {"layout": "vllm-nothing"},
        {"layout": ""},
        {"block_size": 5},
        {"block_size": 1 << 31},
        {"group": with_fields(HONEST.group, widths=(32,))},
        {"group": with_fields(HONEST.group, widths=(16, 16))},
        {"group": with_fields(HONEST.group, layers=(0, 3, 3))},
        {"group": with_fields(HONEST.group, layers=(2, 0, 3))},
        {"group": with_fields(HONEST.group, heads=(3, 5, 4))},
        {"group": with_fields(HONEST.group, numbers=("bfloat16",))},
        {"group": with_fields(HONEST.group, page=4)},
    ],
)
def test_a_description_that_lies_is_refused(lie: dict[str, Any]) -> None:
    """Fault 15. Past the region, negative and overflowing strides, a wrong layout, empty and huge
    shapes; the region is of addresses alone, so that whatever touches it ends this process."""
    region = reserve(POOL.nbytes)
    assert rebuild(HONEST, [region]).view.form == VIEW.form
    with pytest.raises(LayoutError, match="that fits its 1 regions, got another"):
        rebuild(with_fields(HONEST, **lie), [region])


@given(st.data())
def test_no_description_reaches_past_its_region(data: st.DataObject) -> None:
    """Fault 15. Whatever is described raises `LayoutError`, or lies in its regions."""
    small = st.integers(1, 9)
    whole = st.integers(0, 2 * POOL.nbytes)
    odd = st.one_of(whole, st.integers(0, 1 << 48))
    mostly = st.integers(0, 20)
    dtype = data.draw(st.sampled_from(["float16", "uint8", "int64"]))
    usual = (small, 4), (st.integers(0, 99), 4), (st.integers(0, HALF), 2), (st.integers(0, 1), 2)
    shape, strides, offsets, at = (
        [data.draw(odd if data.draw(mostly) == 20 else one) for _ in range(count)]
        for one, count in usual
    )
    size = getattr(torch, dtype).itemsize
    numbers = () if dtype == "uint8" else (dtype,)
    group = Group((0, 2, 2), (0, shape[2], shape[2]), (shape[3] * size,), numbers)
    places = tuple((n, offset // size * size, 0) for n, offset in zip(at, offsets, strict=True))
    lie = with_fields(
        HONEST,
        **kinds(dtype, tuple(shape), tuple(strides)),
        places=places,
        group=group,
        block_size=shape[1],
    )
    regions = [reserve(POOL.nbytes), reserve(HALF)]
    try:
        view = rebuild(lie, regions).view
    except LayoutError:
        event("refused")
        return
    event("taken")
    ends = [(region.data_ptr(), region.data_ptr() + region.numel()) for region in regions]
    assert all(any(a <= first and past <= b for a, b in ends) for first, past in view.spans)


def test_a_reserved_region_has_addresses_and_no_memory() -> None:
    """Plans and runs of views on it are those of views on memory."""
    region = reserve(POOL.nbytes)
    target = Cache("vllm-mla", 2, 1, (16,), 4, 16).view
    pool = POOL.view(2, 8, 4, 1, 16)
    message, regions = sent(Shard(KVView([*pool], "layer | block token 1 dim")))
    source = rebuild(message, [region]).view
    local = rebuild(message, regions.flat()).view
    runs = []
    for view, begin in ((source, region.data_ptr()), (local, POOL.data_ptr())):
        plan = CopyPlan(view.form, target.form, 4, 1)
        first, second, nbytes = plan.runs(
            view, target, Index([3, 0, -1], step=4), Index([*range(12)]), 12
        )
        runs.append(((first - begin).tolist(), second.tolist(), nbytes.tolist()))
    assert runs[0] == runs[1] != ([], [], [])
    at = f"{region.data_ptr():x}-"
    (line,) = [x for x in Path("/proc/self/maps").read_text().splitlines() if x.startswith(at)]
    assert line.split()[1] == "---p"
    assert reserve(64 << 30).numel() == 64 << 30
    assert reserve(0).numel() == 0


@pytest.mark.parametrize("state", STATES)
def test_views_are_rebuilt_whatever_torch_was_told(state: str) -> None:
    with STATES[state](torch.device("cpu")):
        message, regions = sent(Shard(VIEW))
        view = rebuild(message, [region.clone() for region in regions.flat()]).view
        assert rebuild(message, [reserve(POOL.nbytes)]).view.form == view.form
    assert view.form == VIEW.form
    assert torch.equal(view.plane(1, 0, torch.uint8), VIEW.plane(1, 0, torch.uint8))
