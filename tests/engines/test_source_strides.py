# SPDX-License-Identifier: Apache-2.0
"""Sources whose axes have a stride of 0, or of one element: every engine, both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine_cases import DOWNWARD
from support.guarded_memory import filled

from portakv import Index, KVView, copy_rows
from portakv.errors import BackendUnavailable, PortaKVError, Unsupported

CHUNK, BLOCK = "kv layer token head dim", 4
SHAPES = {CHUNK: (2, 2, 12, 2, 8), "layer kv block token head dim": (2, 2, 3, BLOCK, 2, 8)}
#: Index of the source, as (ids, step, offset).
INDICES: list[tuple[Any, int, int]] = [
    (None, 1, 3),
    ([11, 4, 5, 6, 0, 9, 2, 3], 1, 0),
    ([2, 0, 1], BLOCK, 2),
]
COUNT = 8
PLACES = {"ring": "pageable", "staged": "pinned", "descriptors": "pinned", "direct": "pinned"}


def placed(memory: torch.Tensor, place: str | torch.device) -> torch.Tensor:
    if isinstance(place, torch.device):
        return memory.to(place)
    return memory.pin_memory() if place == "pinned" else memory.clone()


@pytest.mark.parametrize("engine", PLACES)
@pytest.mark.parametrize("stride", [0, 1], ids=["stride 0", "one element"])
@DOWNWARD
@pytest.mark.parametrize(
    ("layout", "axis"), [(layout, axis) for layout in SHAPES for axis in layout.split()]
)
def test_every_engine_and_direction(
    accelerator: torch.device, engine: str, stride: int, downward: bool, layout: str, axis: str
) -> None:
    """Against `reference`; ``axis`` has another stride than in dense memory."""
    memory = filled(SHAPES[layout], torch.int16)
    strides = [
        stride if name == axis else own
        for name, own in zip(layout.split(), memory.stride(), strict=True)
    ]
    places = (accelerator, PLACES[engine])[:: 1 if downward else -1]
    src, plain = (
        KVView(each.as_strided(memory.shape, strides), layout)
        for each in (placed(memory, places[0]), memory)
    )
    for ids, step, offset in INDICES[: 1 if axis == "dim" else None]:  # each element is a run
        wanted = filled(SHAPES[CHUNK], torch.int16)
        target, index = placed(wanted, places[1]), Index(ids, step, offset)
        copy_rows(plain, KVView(wanted, CHUNK), index, count=COUNT)
        try:
            dst = KVView(target, CHUNK)
            copy_rows(src, dst, index, count=COUNT, backend=engine).synchronize()
        except BackendUnavailable as error:
            pytest.skip(str(error).partition("\n")[0])
        except Unsupported as error:
            if engine != "descriptors" or "it copies runs of 16 B or more" not in str(error):
                raise
            pytest.skip(str(error).splitlines()[1])
        assert torch.equal(target.cpu(), wanted), index


@pytest.mark.parametrize(
    ("engine", "place"), [("staged", "pageable"), ("descriptors", "pageable"), ("ring", "pinned")]
)
def test_an_engine_that_does_not_serve_the_memory_says_which_one_does(
    accelerator: torch.device, engine: str, place: str
) -> None:
    views = [KVView(placed(filled(SHAPES[CHUNK], torch.int16), each), CHUNK)
             for each in (place, accelerator)]  # fmt: skip
    with pytest.raises(
        PortaKVError, match=f"{engine}: rejected, it does not copy from {place} to device"
    ):
        copy_rows(views[0], views[1], backend=engine)
