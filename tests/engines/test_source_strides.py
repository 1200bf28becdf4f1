# SPDX-License-Identifier: Apache-2.0
"""Sources whose axes have a stride of 0, or of one element: every engine, both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Index, KVView, copy_rows
from portakv.errors import BackendUnavailable, PortaKVError, Unsupported

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


def source_of(layout: str, axis: str, stride: int, device: torch.device | str) -> torch.Tensor:
    """Elements of 16 bits; one axis has another stride than in dense memory."""
    shape = SHAPE if layout == LAYOUT else PAGED_SHAPE
    dense = torch.empty(shape, dtype=torch.int16, device="meta")
    strides = [
        stride if name == axis else own
        for name, own in zip(AXES[layout], dense.stride(), strict=True)
    ]
    memory = torch.arange(1, 1 + dense.numel()).to(torch.int16)
    if isinstance(device, torch.device):
        memory = memory.to(device)
    elif device == "pinned":
        memory = memory.pin_memory()
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
@pytest.mark.parametrize("to_device", [True, False], ids=["h2d", "d2h"])
@pytest.mark.parametrize(
    ("layout", "axis"), [(layout, axis) for layout, axes in AXES.items() for axis in axes]
)
def test_every_engine_and_direction(
    accelerator: torch.device, engine: str, place: str, stride: int, to_device: bool, layout: str,
    axis: str,
) -> None:  # fmt: skip
    source = source_of(layout, axis, stride, place if to_device else accelerator)
    for index in INDICES[: 1 if axis == "dim" else None]:  # each element is a run
        target = torch.zeros(SHAPE, dtype=torch.int16, device=accelerator if to_device else "cpu")
        target = target.pin_memory() if place == "pinned" and not to_device else target
        ids, step, offset = index
        moved(view_of(source, layout), view_of(target, LAYOUT), Index(ids, step, offset), engine)
        found = target.cpu()
        assert torch.equal(found[:, :, :COUNT], expected_of(source, layout, index)), index
        assert not found[:, :, COUNT:].any()


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
    host = source_of(LAYOUT, "token", 0, place)
    rows = torch.zeros(SHAPE, dtype=torch.int16, device=accelerator)
    with pytest.raises(
        PortaKVError, match=f"{engine}: rejected, it does not copy from {place} to device"
    ):
        copy_rows(view_of(host, LAYOUT), view_of(rows, LAYOUT), backend=engine)
