# SPDX-License-Identifier: Apache-2.0
"""The ops of the stand-ins do what the vendor documents, and refuse what it forbids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from portakv_conformance.vendor import ascend_ops
from portakv_conformance.vendor.ascend_ops import Refused

BLOCKS = 3
SIZE = 4
HEADS = 2
DIM = 16
SLOTS = BLOCKS * SIZE
ROWS = torch.arange(6).view(2, 3)
WHERE = torch.tensor([[4], [1]])
COMPLEX = torch.zeros(4, 2, dtype=torch.complex128)


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Distinct patterns of bits."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return (torch.arange(count) * 37 % 251).to(torch.uint8).view(dtype).view(shape)


def scatter(**changed: Any) -> None:
    """Call the scatter with right arguments, except for the changed ones."""
    arguments = {
        "key": numbers(3, HEADS, DIM),
        "value": numbers(3, HEADS, DIM),
        "key_cache": numbers(BLOCKS, SIZE, HEADS, DIM),
        "value_cache": numbers(BLOCKS, SIZE, HEADS, DIM),
        "slot_mapping": torch.tensor([7, 0, 11]),
        "cache_mode": "Norm",
    }
    ascend_ops.scatter_pa_kv_cache(**{**arguments, **changed})


def gather(**changed: Any) -> None:
    """Call the gather with right arguments, except for the changed ones."""
    arguments = {
        "key_cache": numbers(BLOCKS, SIZE, HEADS, DIM),
        "value_cache": numbers(BLOCKS, SIZE, HEADS, DIM),
        "block_tables": torch.tensor([[2, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([6], dtype=torch.int32),
        "key": numbers(6, HEADS, DIM),
        "value": numbers(6, HEADS, DIM),
    }
    ascend_ops.gather_pa_kv_cache(**{**arguments, **changed})


def update(**changed: Any) -> torch.Tensor:
    arguments = {"input": torch.zeros(5, 3, dtype=torch.int64), "indices": WHERE, "updates": ROWS}
    return ascend_ops.scatter_nd_update_(**{**arguments, **changed})


def select(**changed: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"rows": ROWS, "dim": 0, "index": torch.tensor([1])}
    return ascend_ops.index_select(**{**arguments, **changed})


def test_scatter_writes_each_row_to_its_slot() -> None:
    key = numbers(3, HEADS, DIM)
    value = numbers(3, HEADS, 8)
    caches = [torch.zeros(BLOCKS, SIZE, HEADS, d, dtype=torch.float16) for d in (DIM, 8)]
    scatter(key=key, value=value, key_cache=caches[0], value_cache=caches[1])
    for rows, cache in zip((key, value), caches, strict=True):
        pool = cache.view(SLOTS, HEADS, -1).view(torch.int16)
        assert pool[[7, 0, 11]].equal(rows.view(torch.int16))
        assert not pool[[1, 2, 3, 4, 5, 6, 8, 9, 10]].any()


def test_an_update_writes_rows() -> None:
    matrix = torch.zeros(5, 3, dtype=torch.int64)
    assert update(input=matrix) is matrix
    assert matrix[[4, 1]].equal(ROWS)


def test_gather_reads_block_after_block() -> None:
    cache = numbers(BLOCKS, SIZE, HEADS, DIM)
    key = torch.zeros(6, HEADS, DIM).half()
    value = torch.zeros(6, HEADS, DIM).half()
    gather(key_cache=cache, key=key, value=value)
    assert key.view(torch.int16).equal(
        cache.view(SLOTS, HEADS, DIM).view(torch.int16)[[8, 9, 10, 11, 0, 1]]
    )


def of_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows = numbers(3, HEADS, DIM, dtype=dtype)
    cache = numbers(BLOCKS, SIZE, HEADS, DIM, dtype=dtype)
    return {"key": rows, "value": rows, "key_cache": cache, "value_cache": cache}


SLOT = torch.tensor
#: Dtypes that A2 and A3 do not have.
LACKING = (torch.float32, torch.int16, torch.uint8, torch.float64)
WIDE = torch.zeros(3, HEADS, 2 * DIM, dtype=torch.float16)


REFUSED: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (scatter, {"cache_mode": "PA_NZ"}, "is for NZ"),
    (scatter, {"slot_mapping": SLOT([7, -1, 11])}, "holds -1, of 0 to 11"),
    (scatter, {"slot_mapping": SLOT([7, 12, 11])}, "holds 12, of 0 to 11"),
    (scatter, {"slot_mapping": SLOT([7, 1])}, "one slot for each token"),
    (scatter, {"slot_mapping": SLOT([7, 0, 11, 3, 4, 5])[::2]}, "is not contiguous"),
    (scatter, {"slot_mapping": SLOT([7, 0, 11], dtype=torch.int16)}, "not int32 or int64"),
    (scatter, {"key": WIDE[..., ::2]}, "is not contiguous"),
    (scatter, {"key": WIDE}, "other heads or dims"),
    (scatter, {"key": numbers(3, HEADS, DIM, dtype=torch.bfloat16)}, "dtypes"),
    (scatter, {"key": numbers(3, HEADS * DIM)}, r"\[tokens, heads, dim\]"),
    (scatter, {"value": numbers(2, HEADS, DIM)}, "differ in tokens or heads"),
    (scatter, {"value_cache": numbers(BLOCKS + 1, SIZE, HEADS, DIM)}, "differ in blocks"),
    (scatter, {"key_cache": numbers(SLOTS, HEADS, DIM)}, r"\[blocks, block_size, heads, dim\]"),
    (scatter, {"compress_lens": SLOT([1])}, "compression"),
    *((scatter, of_dtype(lacking), str(lacking)) for lacking in LACKING),
    (gather, {"block_tables": SLOT([[2, 0]])}, "A2 and A3 read int32"),
    (gather, {"block_tables": SLOT([[2, 3]], dtype=torch.int32)}, "holds 3, of 0 to 2"),
    (gather, {"block_tables": SLOT([[2, -1]], dtype=torch.int32)}, "holds -1"),
    (gather, {"block_tables": SLOT([[2]], dtype=torch.int32)}, "shorter than the sequence"),
    (gather, {"seq_lens": SLOT([5], dtype=torch.int32)}, "says 5, key has 6"),
    (gather, {"seq_lens": SLOT([6])}, "A2 and A3 read int32"),
    (gather, {"seq_offset": SLOT([4], dtype=torch.int32)}, "offsets"),
    (gather, {"key": numbers(0, HEADS, DIM), "value": numbers(0, HEADS, DIM)}, "is empty"),
    (gather, {"key_cache": numbers(BLOCKS, SIZE, 1, 75 * 1024), "key": numbers(6, 1, 75 * 1024),
              "value_cache": numbers(BLOCKS, SIZE, 1, DIM), "value": numbers(6, 1, DIM)},
     "over 148 KiB"),
    (update, {"indices": WHERE - 2}, "holds -1"),
    (update, {"indices": WHERE + 1}, "holds 5, of 0 to 4"),
    (update, {"indices": WHERE[:, 0]}, "indices"),
    (update, {"updates": ROWS[:, :2]}, "another shape"),
    (update, {"updates": ROWS.int()}, "updates are"),
    (update, {"input": torch.zeros(5, 3, dtype=torch.int32), "updates": ROWS.int()},
     "not among its dtypes"),
    (select, {"rows": COMPLEX}, "complex128"),
    (select, {"index": SLOT([4])}, "holds 4"),
    (ascend_ops.index_copy_,
     {"rows": COMPLEX, "dim": 0, "index": SLOT([1]), "source": COMPLEX[:1]}, "complex128"),
    (ascend_ops.index_select_out,
     {"rows": ROWS, "dim": 0, "index": SLOT([1]), "out": torch.zeros_like(ROWS)}, "resized"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "changed", "why"), REFUSED, ids=[f"{op.__name__}: {why}" for op, _, why in REFUSED]
)
def test_what_an_op_refuses(op: Callable[..., object], changed: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        op(**changed)
