# SPDX-License-Identifier: Apache-2.0
"""Dense rows of images that begin at each page: their blocks overlap as far as a form can tell.
And the staging of a stream."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portakv import KVView
from portakv.interconnect import staging
from portakv.interconnect.staging import DenseRows
from portakv.runtime.bounded import Bounded
from portakv.storage.form import HEADER, BlockForm

TOKENS = 16
#: Shapes of a cache, each with its layout, and the other terms of a view.
ARRANGED: dict[str, dict[str, Any]] = {
    "layer kv block token head dim": {},
    "layer kv block head token dim": {},
    "layer | block kv token head dim": {},
    "layer block token dim": {"kv": 1, "heads": 1},
}


def form_of(
    layout: str, layers: int, heads: int, dim: int, encoding: str | None = None
) -> BlockForm:
    extents = {"layer": layers, "kv": 2, "block": 2, "token": TOKENS, "head": heads, "dim": dim}
    names = layout.replace("layer |", "").split()
    shape = [extents[name] for name in names]
    memory = torch.zeros(shape, dtype=torch.bfloat16)
    whole = [memory] * layers if "|" in layout else memory
    view = KVView(whole, layout, **ARRANGED[layout])
    return BlockForm.of(view, "a model", encoding=encoding)


def distance(form: BlockForm, row: int) -> int:
    """Return the bytes from one dense block to the next, of images in rows of so many bytes."""
    view = form.view(torch.zeros(4 * form.image_bytes // row, row, dtype=torch.uint8))
    dense = DenseRows(view.form)
    slots = 2 * TOKENS
    rows = dense.view(torch.zeros(dense.nbytes(slots), dtype=torch.uint8), slots)
    (step,) = rows.form.parts[0].block
    return step.stride


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize("encoding", [None, "pack"])
@settings(max_examples=10)
@given(
    layers=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([16, 64, 128, 512]),
)
def test_the_bytes_of_a_dense_block_stay_together(
    layout: str, encoding: str | None, layers: int, heads: int, dim: int
) -> None:
    form = form_of(layout, layers, heads, dim, encoding)
    assert distance(form, HEADER) == distance(form, form.image_bytes) == form.payload_bytes


def test_parts_of_unequal_widths_stay_together() -> None:
    memory = torch.zeros(3, 2, TOKENS, 576, dtype=torch.bfloat16)
    view = KVView(memory, "layer block token (kv head dim)", kv=2, heads=1, dim=(512, 64))
    form = BlockForm.of(view, "a model")
    assert distance(form, HEADER) == distance(form, form.image_bytes) == form.payload_bytes


UNEQUAL = {"kv": 2, "heads": 1, "dim": (512, 64)}


@pytest.mark.parametrize(
    ("layout", "shape", "terms"),
    [
        ("layer kv block token head dim", (4, 2, 8, TOKENS, 2, 64), {}),
        ("kv layer block head token dim", (2, 4, 8, 2, TOKENS, 64), {}),
        ("layer block token (kv head dim)", (3, 8, TOKENS, 576), UNEQUAL),
        (
            "layer block (kv token head dim)",
            (3, 8, TOKENS * 576),
            {**UNEQUAL, "block_size": TOKENS},
        ),
        ("layer token (kv head dim)", (3, 8, 576), UNEQUAL),
        ("layer kv block token head dim", (4, 2, 1, TOKENS, 2, 128), {}),
        ("layer block token (kv head dim)", (3, 1, TOKENS, 576), UNEQUAL),
    ],
)
def test_layers_outside_of_blocks_stay_there(
    layout: str, shape: tuple[int, ...], terms: dict[str, Any]
) -> None:
    """These blocks do not overlap, so that the form of dense rows depends on their number."""
    form = KVView(torch.zeros(shape, dtype=torch.bfloat16), layout, **terms).form
    assert not DenseRows(form).any_length


@pytest.mark.parametrize("control", [False, True], ids=["", "negative control"])
def test_two_threads_have_one_staging(control: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread asks while the first one moves the staging to the end of the mapping."""
    made = list[object]()
    found = list[object]()
    work: Any = SimpleNamespace(stream_id=-77)

    class Made:
        def __init__(self, *_: object) -> None:
            made.append(self)

    class Watched(Bounded[Any, Any]):
        def pop(self, *key: Any) -> Any:
            value = super().pop(*key)
            if threading.current_thread() is threading.main_thread() and value is not None:
                other.start()
                other.join(0.3)  # it ends only if nothing keeps it waiting
            return value

    def ask() -> None:
        found.append(staging.staging(torch.device("cpu"), work))

    other = threading.Thread(target=ask)
    monkeypatch.setattr(staging, "Staging", Made)
    monkeypatch.setattr(staging, "cached_staging", Watched("staging of a test", 4))
    if control:
        monkeypatch.setattr(staging, "moving", nullcontext())
    ask()
    ask()
    other.join()
    assert (len(made) == 1) != control
