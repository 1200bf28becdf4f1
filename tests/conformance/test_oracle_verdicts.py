# SPDX-License-Identifier: Apache-2.0
"""What the oracle expects of a copy, how it names a wrong byte, and what the strategies draw."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases, cases, migrations, page_cases
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import check_copy, compare, expected_copy
from portakv_conformance.judge.pattern import canary_bytes, guarded, pattern_bytes, poison_bytes


def patterned(*shape: int, storage: int) -> torch.Tensor:
    """A float16 tensor of pattern bytes between canaries."""
    held = guarded(2 * prod(shape), seed=1, storage=storage)
    stride = [prod(shape[n + 1 :]) for n in range(len(shape))]
    return held.tensor(torch.float16, shape, stride)


def gather() -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """Arguments of a gather of slots 9, (hole), 2 into a chunk of four tokens."""
    cache = [patterned(2, 3, 4, 2, 5, storage=n) for n in range(2)]
    chunk = patterned(2, 2, 4, 10, storage=7)
    arguments = (
        cache, "layer | kv block token head dim", None,
        chunk, "kv layer token (head dim)", {"heads": 2},
        [9, -1, 2], [0, 1, 3],
    )  # fmt: skip
    return arguments, cache, chunk


def gather_by_hand(cache: list[torch.Tensor], chunk: torch.Tensor) -> None:
    for layer in range(2):
        for slot, token in ((9, 0), (2, 3)):
            row = cache[layer].view(torch.int16)[:, slot // 4, slot % 4].reshape(2, 10)
            chunk.view(torch.int16)[:, layer, token] = row


def test_a_copy_by_hand_is_right_and_leaving_it_out_is_not() -> None:
    arguments, cache, chunk = gather()
    expected = expected_copy(*arguments)
    verdict = compare(expected, chunk)
    assert verdict is not None
    assert "was not written" in verdict
    gather_by_hand(cache, chunk)
    assert compare(expected, chunk, cache) is None


def spoil(what: str, cache: list[torch.Tensor], chunk: torch.Tensor) -> None:
    words, row = chunk.view(torch.int16), chunk.view(torch.uint8)[0, 0, 0]
    if what == "kv":
        words[:, 1, 3] = words[:, 1, 3].flip(0)
    elif what == "hole":
        words[1, 0, 1] = cache[0].view(torch.int16)[1, 0, 2].reshape(10)
    elif what == "shift":
        row[:] = row.roll(-1)
    elif what == "tail":
        torch.empty(0, dtype=torch.uint8).set_(chunk.untyped_storage())[-64] = 0
    elif what == "bit":
        chunk.view(torch.uint8)[0, 1, 3, 13] ^= 0x10
    else:
        cache[1].view(torch.uint8)[1, 2, 3, 1, 4] ^= 1


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("kv", ["layer 1 key slot 3 head 0 byte 0", "source layer 1 value slot 2 head 0 byte 0",
                    "expected", "source layer 1 key slot 2 head 0 byte 0", "40 bytes"]),
        ("hole", ["layer 0 value slot 1 head 0 byte 0", "source layer 0 value slot 2 head 0",
                      "must not write"]),
        ("shift", ["layer 0 key slot 0 head 0 byte 0", "source layer 0 key slot 9 head 0 "
                       "byte 1;"]),
        ("tail", ["padding or canary (storage 0, offset 384)", "must not write", "1 bytes"]),
        ("bit", ["layer 1 key slot 3 head 1 byte 3", "unknown origin", "slot 2 head 1 byte 3"]),
        ("source", ["wrote 1 bytes of its source", "layer 1 value slot 11 head 1 byte 4"]),
    ],
)  # fmt: skip
def test_a_wrong_byte_is_named(what: str, names: list[str]) -> None:
    arguments, cache, chunk = gather()
    expected = expected_copy(*arguments)
    gather_by_hand(cache, chunk)
    spoil(what, cache, chunk)
    verdict = compare(expected, chunk, cache)
    assert verdict is not None
    for name in names:
        assert name in verdict


def test_check_copy_runs_and_judges() -> None:
    arguments, cache, chunk = gather()
    check_copy(*[*arguments, lambda: gather_by_hand(cache, chunk)])
    with pytest.raises(AssertionError, match="Destination layer 0"):
        check_copy(*[*arguments, lambda: chunk.zero_()])


@pytest.mark.parametrize(
    ("shape", "layout", "extents"),
    [((2, 2, 4, 12), "kv layer token (head dim)", {"heads": 2}),
     ((1, 2, 4, 10), "kv layer token (head dim)", {"heads": 2, "kv": 1}),
     ((2, 3, 4, 10), "kv layer token (head dim)", {"heads": 2})],
)  # fmt: skip
def test_sides_that_hold_other_rows_are_refused(
    shape: tuple[int, ...], layout: str, extents: dict[str, Any]
) -> None:
    arguments, _, _ = gather()
    with pytest.raises(ValueError, match="The source has"):
        expected_copy(*[*arguments[:3], torch.zeros(shape), layout, extents, [0], [0]])


def test_opaque_pages_go_whole_or_not_at_all() -> None:
    src, dst = pattern_bytes(0, 0, 96).reshape(4, 24), np.zeros((2, 24), dtype=np.uint8)
    tensors = [torch.from_numpy(src)], [torch.from_numpy(dst)]
    sides = (tensors[0], "layer | block page", {"block_size": 4},
             tensors[1], "layer | block page", {"block_size": 4})  # fmt: skip
    slots = [12, 13, 14, 15, -1, -1, -1, -1]
    after = expected_copy(*sides, slots, np.arange(8))
    assert after.regions[0].content.tolist() == [*src[3].tolist(), *[0] * 24]
    for wrong in ([12, 13, 14], [1, 2, 3, 4], [12, 13, 14, -1], [-1, 13, 14, 15]):
        with pytest.raises(ValueError, match="whole blocks"):
            expected_copy(*sides, wrong, np.arange(len(wrong)))


def test_storages_that_share_memory_are_kept_once() -> None:
    content = np.arange(32, dtype=np.uint8)
    low, high = torch.from_numpy(content[:24]), torch.from_numpy(content[8:])
    memory = Memory.snapshot([low, high])
    assert [r.content.tolist() for r in memory.regions] == [list(range(32))]
    address = np.array([high.data_ptr() + 23])
    assert memory.read(address).tolist() == [31]
    with pytest.raises(IndexError):
        memory.read(address + 1)


# -- pattern --------------------------------------------------------------------------------------


def test_pattern_depends_on_place_alone() -> None:
    whole = pattern_bytes(3, 5, 4096)
    assert (pattern_bytes(3, 5, 100, start=1001) == whole[1001:1101]).all()
    assert (whole != pattern_bytes(3, 6, 4096)).mean() > 0.99
    assert (whole != pattern_bytes(4, 5, 4096)).mean() > 0.99
    assert (whole != poison_bytes(3, 5, 4096)).mean() > 0.99
    assert np.unique(whole).size == 256
    windows = np.lib.stride_tricks.sliding_window_view(whole, 8).copy().view(np.uint64)
    assert np.unique(windows).size == windows.size
    halves = torch.from_numpy(whole.copy()).view(torch.float16)
    assert bool(halves.isnan().any())


@pytest.mark.parametrize(("at", "side"), [(0, "before"), (66, "before"), (107, "behind")])
def test_canaries_notice(at: int, side: str) -> None:
    held = guarded(40, lead=3)
    assert held.broken() is None
    assert held.payload().tolist() == pattern_bytes(0, 0, 40, start=67).tolist()
    held.payload().fill_(9)
    assert held.broken() is None
    held.whole[at] ^= 1
    assert side in (held.broken() or "")
    assert canary_bytes(9, start=3)[5] == canary_bytes(1)[0]


def test_a_tensor_outside_its_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        guarded(40).tensor(torch.float32, (2, 6), (5, 1))


# -- strategies -----------------------------------------------------------------------------------


@given(all_cases())
def test_drawn_cases_hold_together(case: Case) -> None:
    expected = case.expected()
    for side, rows in ((case.src, expected.src), (case.dst, expected.dst)):
        for fact in ("layers", "kv", "heads", "widths", "block_size", "slots", "opaque"):
            assert getattr(side, fact) == getattr(rows, fact)
        assert all(held.broken() is None for held in side.guards)
    written = case.dst_slots()[case.dst_slots() >= 0]
    assert np.unique(written).size == written.size
    every = np.arange(0, case.dst.slots, case.dst.block_size or 1 if case.dst.opaque else 1)
    planes = [
        expected.dst.row_addresses(kv, layer, every).ravel()
        for kv in range(case.dst.kv)
        for layer in range(case.dst.layers)
    ]
    addresses = np.concatenate(planes)
    assert np.unique(addresses).size == addresses.size


@given(migrations())
def test_drawn_migrations_do_not_meet(case: Case) -> None:
    assert not set(case.src_slots().tolist()) & set(case.dst_slots().tolist())


@given(cases(holes=False, ragged=False, factored=False, containers=("layer",)))
def test_options_are_kept(case: Case) -> None:
    assert (case.src_slots() >= 0).all()
    assert (case.dst_slots() >= 0).all()
    for side in (case.src, case.dst):
        assert "/" not in side.layout
        assert side.layout.partition("|")[0].strip(" ()") == "layer" or "|" not in side.layout


@given(page_cases(loose_pages=False, expanded=False))
def test_drawn_pages_go_whole_and_can_be_dense(case: Case) -> None:
    for rows in (case.expected().src, case.expected().dst):
        page = rows.row_addresses(0, 0, [0]).ravel()
        assert (np.diff(page) == 1).all()
    assert case.src.opaque
    assert case.src.block_size is not None
    assert case.count % case.src.block_size == 0
    assert case.src.widths == case.dst.widths
