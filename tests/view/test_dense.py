# SPDX-License-Identifier: Apache-2.0
"""Dense memory for blocks: its tensors, its form, and whose memory it is."""

from __future__ import annotations

import pytest
import torch

from portakv import KVView
from portakv.layout.encodings import Encoding, Fp8, Pack, plane_of
from portakv.view.view import dense_blocks

CPU = torch.device("cpu")
LAYERS = 3
HEADS = 2
TOKENS = 16


def raw_view(*dims: int) -> KVView:
    """Return a view of bf16 rows, of so many values for each kv."""
    tensors = [torch.zeros(5, LAYERS, TOKENS, HEADS, dim, dtype=torch.bfloat16) for dim in dims]
    return KVView(tensors, "kv | block layer token head dim", kv=len(dims), dim=dims)


@pytest.mark.parametrize("dims", [(32, 32), (32, 64), (64,)])
def test_raw_blocks_have_a_tensor_for_each_kv(dims: tuple[int, ...]) -> None:
    view = raw_view(*dims)
    made = dense_blocks(view.form, TOKENS, 4, CPU)
    assert [(x.dtype, *x.shape) for x in made.tensors] == [
        (torch.bfloat16, 4, LAYERS, HEADS, TOKENS, dim) for dim in dims
    ]
    assert all(tensor.is_contiguous() for tensor in made.tensors)
    assert made.widths == view.widths
    assert made.block_size == TOKENS


@pytest.mark.parametrize("encoding", [Pack(), Pack(3), Pack(4, 1024), Fp8()])
def test_encoded_blocks_have_slots(encoding: Encoding) -> None:
    view = raw_view(32, 32)
    made = dense_blocks(view.form, TOKENS, 4, CPU, encoding)
    slot = plane_of(encoding, TOKENS, 32).slot_bytes
    assert [(x.dtype, *x.shape) for x in made.tensors] == [
        (torch.uint8, 4, LAYERS, HEADS, slot)
    ] * 2

    again = dense_blocks(made.form, TOKENS, 1, CPU)
    assert again.form.encoding == made.form.encoding
    assert [x.shape[-1] for x in again.tensors] == [slot, slot]


def test_the_memory_is_what_the_caller_allocates() -> None:
    memory = list[torch.Tensor]()

    def allocate(nbytes: int) -> torch.Tensor:
        memory.append(torch.zeros(nbytes, dtype=torch.uint8))
        return memory[-1]

    made = dense_blocks(raw_view(32, 64).form, TOKENS, 2, CPU, allocate=allocate)
    assert [x.data_ptr() for x in made.tensors] == [each.data_ptr() for each in memory]
    assert [x.nbytes for x in made.tensors] == [each.nbytes for each in memory]
