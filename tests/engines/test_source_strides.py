# SPDX-License-Identifier: Apache-2.0
"""Sources whose axes have a stride of 0, or of one element: every engine, both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Index, KVView, copy_rows
from portakv.errors import BackendUnavailable, PortaKVError, Unsupported
from portakv_conformance import simdev

LAYOUT = "kv layer token head dim"
PAGED = "layer kv block token head dim"
LAYERS, TOKENS, HEADS, DIM, BLOCK = 2, 12, 2, 8, 4
SHAPE = (2, LAYERS, TOKENS, HEADS, DIM)
PAGED_SHAPE = (LAYERS, 2, TOKENS // BLOCK, BLOCK, HEADS, DIM)
AXES = {LAYOUT: LAYOUT.split(), PAGED: PAGED.split()}
COUNT = 8
#: Index of the source, as (ids, step, offset).
INDICES: list[tuple[Any, int, int]] = [
    (None, 1, 3),
    ([11, 4, 5, 6, 0, 9, 2, 3], 1, 0),
    ([2, 0, 1], BLOCK, 2),
]
ENGINES = [
    pytest.param("ring", "pageable", id="ring"),
    pytest.param("staged", "pinned", id="staged"),
    pytest.param("descriptors", "pinned", id="descriptors"),
    pytest.param("direct", "pinned", id="direct"),
]
DEVICES = [
    pytest.param("simdev", marks=pytest.mark.simdev),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def accelerator(request: pytest.FixtureRequest) -> Any:
    """A device with a link, which must not touch what it should not."""
    name = {"simdev": "privateuseone"}.get(request.param, request.param)
    yield torch.device(name, 0)
    if request.param == "simdev":
        assert not simdev.take_faults()


def source_of(layout: str, axis: str, stride: int, device: torch.device | str) -> torch.Tensor:
    """Elements of 16 bits; one axis has another stride than in dense memory."""
    shape = SHAPE if layout == LAYOUT else PAGED_SHAPE
    dense = torch.empty(shape, dtype=torch.int16, device="meta")
    strides = [
        stride if name == axis else own
        for name, own in zip(AXES[layout], dense.stride(), strict=True)
    ]
    memory = torch.arange(1, 1 + dense.numel()).to(torch.int16)
    memory = memory.pin_memory() if device == "pinned" else memory.to(device)
    return memory.as_strided(shape, strides)


def view_of(tensor: torch.Tensor, layout: str) -> KVView:
    extents: dict[str, Any] = {"layers": LAYERS, "kv": 2, "heads": HEADS, "dim": DIM}
    if layout == PAGED:
        extents["block_size"] = BLOCK
    return KVView(tensor, layout, **extents)


def expected_of(source: torch.Tensor, layout: str, index: tuple[Any, int, int]) -> torch.Tensor:
    """The rows in the order of the index, ``[2, layers, count, heads, dim]``."""
    dense = source.cpu()
    if layout == PAGED:
        dense = dense.transpose(0, 1).reshape(SHAPE)
    ids, step, offset = index
    slots = [
        at if ids is None else ids[at // step] * step + at % step
        for at in range(offset, offset + COUNT)
    ]
    return dense[:, :, slots].contiguous()


@pytest.mark.parametrize(("engine", "place"), ENGINES)
@pytest.mark.parametrize("stride", [0, 1], ids=["stride 0", "one element"])
@pytest.mark.parametrize(
    ("layout", "axis"), [(layout, axis) for layout, axes in AXES.items() for axis in axes]
)
def test_host_to_device(
    accelerator: torch.device, engine: str, place: str, stride: int, layout: str, axis: str
) -> None:
    host = source_of(layout, axis, stride, "pinned" if place == "pinned" else "cpu")
    for index in INDICES[: 1 if axis == "dim" else None]:  # each element is a run
        rows = torch.zeros(SHAPE, dtype=torch.int16, device=accelerator)
        ids, step, offset = index
        moved(view_of(host, layout), view_of(rows, LAYOUT), Index(ids, step, offset), engine)
        found = rows.cpu()
        assert torch.equal(found[:, :, :COUNT], expected_of(host, layout, index)), index
        assert not found[:, :, COUNT:].any()


@pytest.mark.parametrize(("engine", "place"), ENGINES)
@pytest.mark.parametrize("stride", [0, 1], ids=["stride 0", "one element"])
@pytest.mark.parametrize(
    ("layout", "axis"), [(layout, axis) for layout, axes in AXES.items() for axis in axes]
)
def test_device_to_host(
    accelerator: torch.device, engine: str, place: str, stride: int, layout: str, axis: str
) -> None:
    rows = source_of(layout, axis, stride, accelerator)
    for index in INDICES[: 1 if axis == "dim" else None]:
        host = torch.zeros(SHAPE, dtype=torch.int16)
        host = host.pin_memory() if place == "pinned" else host
        ids, step, offset = index
        moved(view_of(rows, layout), view_of(host, LAYOUT), Index(ids, step, offset), engine)
        assert torch.equal(host[:, :, :COUNT], expected_of(rows, layout, index)), index
        assert not host[:, :, COUNT:].any()


def moved(src: KVView, dst: KVView, index: Index, engine: str) -> None:
    """Copy rows by an engine; skip the test if it does not take such copies and says so."""
    try:
        copy_rows(src, dst, index, count=COUNT, backend=engine).synchronize()
    except BackendUnavailable as error:
        pytest.skip(str(error).partition("\n")[0])
    except Unsupported as error:
        if engine != "descriptors" or "it copies runs of 16 B or more" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[1])


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("place", ["pageable", "pinned"])
def test_one_row_for_every_token_of_a_memory_object(
    accelerator: torch.device, place: str, offset: int
) -> None:
    """A memory object of `to_gpu` that repeats one row, which is all that its memory holds."""
    row = torch.arange(1, 1 + 2 * LAYERS * HEADS * DIM).to(torch.int16)
    row = row.view(2, LAYERS, 1, HEADS * DIM)
    row = row.pin_memory() if place == "pinned" else row
    memory_obj = row.expand(2, LAYERS, COUNT, HEADS * DIM)
    shape = (2, TOKENS // BLOCK, BLOCK, HEADS, DIM)
    caches = [torch.zeros(shape, dtype=torch.int16, device=accelerator) for _ in range(LAYERS)]
    connector = AdaptiveConnector(
        accelerator,
        kv_layout="layer | kv block token head dim",
        chunk_layout="kv layer token (head dim)",
    )
    slots = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(offset))
    end = offset + COUNT
    connector.to_gpu(memory_obj, caches, slots, offset, min(end, TOKENS)).synchronize()
    used = slots[offset : min(end, TOKENS)]
    for layer, cache in enumerate(caches):
        found = cache.cpu().reshape(2, TOKENS, HEADS * DIM)
        wanted = torch.zeros_like(found)
        wanted[:, used] = row[:, layer]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("engine", "place"), [("staged", "pageable"), ("descriptors", "pageable"),
                                           ("ring", "pinned")])  # fmt: skip
def test_an_engine_that_does_not_serve_the_memory_says_which_one_does(
    accelerator: torch.device, engine: str, place: str
) -> None:
    host = source_of(LAYOUT, "token", 0, "pinned" if place == "pinned" else "cpu")
    rows = torch.zeros(SHAPE, dtype=torch.int16, device=accelerator)
    with pytest.raises(
        PortaKVError, match=f"{engine}: rejected, it does not copy from {place} to device"
    ):
        copy_rows(view_of(host, LAYOUT), view_of(rows, LAYOUT), backend=engine)
