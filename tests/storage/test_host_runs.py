# SPDX-License-Identifier: Apache-2.0
"""Copies of long runs on the host give what other copies give, and leave others alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from portakv import CopyOptions, KVView, copy_rows
from portakv.storage.memory import LONG, copy_long_runs
from portakv.view import Index

ROWS = 6


def pages(width: int, layers: int = 1, gap: int = 0) -> tuple[list[torch.Tensor], KVView]:
    tensors = [torch.zeros(ROWS, width + gap, dtype=torch.uint8) for _ in range(layers)]
    return tensors, KVView([x[:, :width] for x in tensors], "layer | block page", block_size=1)


def filled(tensors: list[torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    for each in tensors:
        each.random_(0, 256, generator=draw)


@pytest.mark.parametrize("gap", [0, 192])
@pytest.mark.parametrize("layers", [1, 3])
def test_long_runs_are_those_of_other_copies(layers: int, gap: int) -> None:
    src, src_view = pages(LONG, layers, gap)
    filled(src)
    results = []
    for serves in (True, False):
        dst, dst_view = pages(LONG, layers)
        some = Index.of(np.array([4, 0, 2]), 1)
        places = Index.of(np.array([1, -1, 5]), 1)
        if serves:
            assert copy_long_runs(src_view, dst_view, some, places, CopyOptions())
        else:
            copy_rows(src_view, dst_view, some, places).synchronize()
        results.append(dst)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one[1].any()
        assert one[5].any()
        assert not one[[0, 2, 3, 4]].any()


def test_raw_addresses_are_served() -> None:
    src, src_view = pages(LONG)
    filled(src)
    dst = torch.zeros(ROWS, LONG, dtype=torch.uint8)
    view = KVView.at(
        [[dst[row].data_ptr() for row in (3, 1)]],
        "layer block | page",
        shape=(LONG,),
        dtype=torch.uint8,
        device="cpu",
        pinned=False,
        block_size=1,
    )
    indices = Index.of(np.array([0, 5]), 1), Index.of(np.array([0, 1]), 1)
    assert copy_long_runs(src_view, view, *indices, CopyOptions())
    assert torch.equal(dst[[3, 1]], src[0][[0, 5]])
    assert not dst[[0, 2, 4, 5]].any()


def test_other_copies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    src, src_view = pages(LONG)
    filled(src)
    dst, dst_view = pages(LONG)
    indices = Index.of(np.array([0]), 1), Index.of(np.array([1]), 1)
    _, short = pages(LONG - 64)
    _, other = pages(LONG - 64)
    assert not copy_long_runs(short, other, *indices, CopyOptions())
    limited = CopyOptions(max_thread_blocks=1)
    assert not copy_long_runs(src_view, dst_view, *indices, limited)
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    assert not copy_long_runs(src_view, dst_view, *indices, CopyOptions())
    assert not dst[0].any()


def test_tensors_of_inference_mode_are_served() -> None:
    src, src_view = pages(LONG)
    filled(src)
    with torch.inference_mode():
        dst, dst_view = pages(LONG)
    indices = Index.of(np.array([2]), 1), Index.of(np.array([3]), 1)
    assert copy_long_runs(src_view, dst_view, *indices, CopyOptions())
    assert torch.equal(dst[0][3], src[0][2])
