# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of blocks are the sums of an oracle, by torch's operators and by the kernel."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.core_cases import noise
from support.cuda_on_cpu import why_not
from support.witness_cases import WitnessDriver, host_kernel, oracle

from portakv import KVView
from portakv.errors import LayoutError, SlotError
from portakv.runtime import cuda
from portakv.runtime.cuda import compile_kernel
from portakv.runtime.word_sums import driver_of
from portakv.witness.fingerprint import (
    FingerprintKernel,
    Fingerprints,
    fingerprints_of,
    kernel_text,
    load_kernel,
)
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases

pytestmark = pytest.mark.xdist_group("witness-kernel")
needs_gxx = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_nvrtc = pytest.mark.skipif(cuda.no_nvrtc() is not None, reason=str(cuda.no_nvrtc()))


@pytest.fixture(scope="module")
def kernel() -> FingerprintKernel:
    return host_kernel()


def octets(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return noise(*shape, dtype=dtype)


#: Caches as engines have them: tensors, a layout, declared extents.
CACHES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "heads inside tokens": (
        [octets(2, 5, 4, 2, 16, dtype=torch.bfloat16) for _ in range(3)],
        "layer | kv block token head dim",
        {},
    ),
    "keys and values next to each other": (
        [octets(5, 2, 4, 24, dtype=torch.float16) for _ in range(2)],
        "layer | block head token (kv dim)",
        {"kv": 2, "dim": (16, 8)},
    ),
    "keys by dim": (
        [(octets(5, 2, 8, 4), octets(5, 2, 4, 8)) for _ in range(2)],
        "layer kv | block head token dim",
        {},
    ),
    "latent rows": ([octets(5, 12, 40) for _ in range(2)], "layer | block token dim", {}),
    "values and scales": (
        [octets(5, 4 * 20) for _ in range(2)],
        "layer | block (kv token dim)",
        {"kv": 2, "block_size": 4, "dim": (16, 4)},
    ),
    "pages": ([octets(5, 96) for _ in range(2)], "layer | block page", {"block_size": 16}),
    "pages of odd bytes": ([octets(5, 77)], "layer | block page", {"block_size": 16}),
    "states": ([octets(5, 1, 1, 64)], "layer | block token head dim", {}),
    "blocks apart": ([octets(2, 4, 8) for _ in range(5)], "block | layer token dim", {}),
    "many tokens": ([octets(2, 1056, 2, 4)], "layer | block token head dim", {}),
    "split heads": (octets(2, 5, 2, 4, 3, 8), "layer block head/3 token head%3 dim", {}),
}


def blocks_of(view: KVView) -> np.ndarray:
    """Some blocks out of order, one of them twice."""
    last = view.slots // view.form.block_size - 1
    return np.array([last, 0, last], np.int64)


@pytest.mark.parametrize("case", CACHES)
def test_fingerprints_are_those_of_an_oracle(case: str) -> None:
    (tensors, layout, extents) = CACHES[case]
    if case == "keys by dim":  # a view may name an order of axes for all kv alone
        tensors = [(keys.transpose(2, 3), values) for keys, values in tensors]
    view = KVView(tensors, layout, **extents)
    fingerprints = Fingerprints(view, None)
    blocks = blocks_of(view)
    sums = fingerprints.of(blocks).numpy()
    for row, block in zip(sums, blocks.tolist(), strict=True):
        expected = oracle(tensors, layout, extents, fingerprints.geometry, block)
        assert np.array_equal(row, expected)
    rows = fingerprints.rows(int(blocks[1]))
    assert np.array_equal(fingerprints.of_rows(rows).numpy()[0], sums[1])


@needs_gxx
@pytest.mark.parametrize("case", CACHES)
def test_the_kernel_has_the_sums_of_torch(kernel: FingerprintKernel, case: str) -> None:
    (tensors, layout, extents) = CACHES[case]
    if case == "keys by dim":
        tensors = [(keys.transpose(2, 3), values) for keys, values in tensors]
    view = KVView(tensors, layout, **extents)
    fingerprints = Fingerprints(view, kernel)
    # Blocks in tensors of their own are left to torch.
    assert fingerprints.has_kernel == (case != "blocks apart")
    blocks = blocks_of(view)
    assert torch.equal(fingerprints.of(blocks), Fingerprints(view, None).of(blocks))


@needs_gxx
@settings(max_examples=25)
@given(all_cases())
def test_drawn_layouts_have_the_sums_of_the_oracle(kernel: FingerprintKernel, case: Case) -> None:
    for side in (case.src, case.dst):
        if side.block_size is None:
            continue
        view = KVView(side.tensors, side.layout, **side.extents)
        count = view.slots // view.form.block_size
        blocks = np.array([*{0, count - 1}], np.int64)
        for fingerprints in (Fingerprints(view, None), Fingerprints(view, kernel)):
            sums = fingerprints.of(blocks).numpy()
            for row, block in zip(sums, blocks.tolist(), strict=True):
                extents = {k: v for k, v in side.extents.items() if k != "reinterpret"}
                geometry = fingerprints.geometry
                assert np.array_equal(
                    row, oracle(side.tensors, side.layout, extents, geometry, block)
                )


def test_packed_blocks_are_rows_of_bytes() -> None:
    tensors = [octets(5, 2, 1600) for _ in range(2)]
    view = KVView(tensors, "layer | block head page", encoding="pack", block_size=16, dim=64)
    fingerprints = Fingerprints(view, None)
    geometry = fingerprints.geometry
    assert (geometry.tokens, geometry.heads, geometry.segments) == (0, 2, 10)
    sums = fingerprints.of(np.array([2, 3], np.int64))
    tensors[1][3, 1, 700] += 1
    (changed,) = np.argwhere(
        geometry.by_segment((sums != fingerprints.of(np.array([2, 3]))).numpy()[1])
    ).tolist()
    assert changed == [1, 0, 700 * 10 // 1600]


def test_each_changed_bit_changes_a_sum_of_its_head_and_of_its_tokens() -> None:
    tensor = octets(2, 5, 4, 2, 8)
    fingerprints = Fingerprints(KVView(tensor, "kv block token head dim"), None)
    geometry = fingerprints.geometry
    before = fingerprints.of(np.array([1])).numpy()[0]
    for bit in range(0, 2 * 4 * 2 * 8 * 8, 11):
        (kv, token, head, place) = np.unravel_index(bit // 8, (2, 4, 2, 8))
        tensor[kv, 1, token, head, place] ^= 1 << bit % 8
        unequal = before != fingerprints.of(np.array([1])).numpy()[0]
        assert np.argwhere(geometry.by_head(unequal)).tolist() == [[0, kv, head]]
        assert np.argwhere(geometry.by_segment(unequal)).tolist() == [[0, kv, token]]
        tensor[kv, 1, token, head, place] ^= 1 << bit % 8


@needs_gxx
def test_a_step_is_one_launch() -> None:
    driver = WitnessDriver()
    view = KVView([octets(2, 40, 4, 2, 16) for _ in range(3)], "layer | kv block token head dim")
    fingerprints = Fingerprints(view, FingerprintKernel(torch.device("cpu"), driver))
    fingerprints.of(np.arange(40))
    assert driver.launches == [40 * 3 * 2]
    fingerprints.of(np.arange(0))
    assert len(driver.launches) == 1


@pytest.mark.parametrize("blocks", [[5], [-1], [0, 7]])
def test_blocks_outside_of_the_view_are_refused(blocks: list[int]) -> None:
    fingerprints = Fingerprints(KVView(octets(5, 4, 8), "block token dim"), None)
    with pytest.raises(SlotError, match="blocks from 0 to 4"):
        fingerprints.of(np.array(blocks))


def test_a_view_without_blocks_is_refused() -> None:
    with pytest.raises(LayoutError, match="Expected a paged view, got 'token dim'"):
        Fingerprints(KVView(octets(5, 8), "token dim"), None)


# The choice between the kernel and torch's operators

FAULTS: dict[str, dict[str, str]] = {
    "none": {},
    "a factor of keys": {"0x94D049BB133111EBull": "0x94D049BB133111EDull"},
    "words without a sign": {"(u64)(i64)(int)part_of": "(u64)part_of"},
    "offsets of vectors": {"plane.vectors ? plane.vectors[column]": "false ? 0"},
    "keys of heads": {"sum * keys[each + head]": "sum * keys[each]"},
    "tiles": {"(tile.first ? *sum : 0)": "0"},
    "another layer": {"plane.layers[layer]": "plane.layers[0]"},
    "another kv": {"all.offsets[kv * all.blocks + block]": "all.offsets[block]"},
}


#: Each fault is a compilation; these run by default.
USUAL = ("none", "words without a sign", "keys of heads")


@needs_gxx
@pytest.mark.parametrize(
    "fault", [x if x in USUAL else pytest.param(x, marks=pytest.mark.full) for x in FAULTS]
)
def test_a_kernel_with_wrong_sums_is_not_used(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """The fault "none" is the negative control."""
    driver = WitnessDriver(**FAULTS[fault])
    loaded = load_kernel(torch.device("cpu"), lambda device: driver)
    assert (loaded is None) == (fault != "none")
    assert ("the kernel's sums are wrong" in caplog.text) == (fault != "none")


def test_a_kernel_that_cannot_be_loaded_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(WitnessDriver):
        def load(self, source: str, names: Any) -> Any:
            raise RuntimeError("the compiler's log")

    assert load_kernel(torch.device("cpu"), lambda device: Failing()) is None
    assert "the compiler's log" in caplog.text


def test_devices_without_a_driver_use_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert load_kernel(torch.device("xpu", 0), driver_of) is None
    assert "does not serve xpu devices" in caplog.text


@needs_nvrtc
def test_nvrtc_compiles_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path))
    assert compile_kernel(kernel_text(), 90).startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.full
def test_machine_code_spills_no_register(tmp_path: Path) -> None:
    code = cuda.compile_text(kernel_text(), "sm_90")
    assert not re.search(rb"\.local\.", code)


# Devices


@pytest.mark.gpu
@pytest.mark.parametrize("case", CACHES)
def test_a_device_has_the_sums_of_the_host(case: str) -> None:
    (tensors, layout, extents) = CACHES[case]

    def there(each: Any) -> Any:
        return each.cuda() if isinstance(each, torch.Tensor) else type(each)(map(there, each))

    if case == "keys by dim":
        tensors = [(keys.transpose(2, 3), values) for keys, values in tensors]
    host = Fingerprints(KVView(tensors, layout, **extents), None)
    view = KVView(there(tensors), layout, **extents)
    fingerprints = fingerprints_of(view)
    assert fingerprints.has_kernel == (case != "blocks apart")
    blocks = blocks_of(view)
    assert torch.equal(fingerprints.of(blocks).cpu(), host.of(blocks))
    assert torch.equal(Fingerprints(view, None).of(blocks).cpu(), host.of(blocks))


@pytest.mark.gpu
def test_a_large_step_on_a_device_has_the_sums_of_torch() -> None:
    cache = [octets(2, 512, 16, 8, 128, dtype=torch.bfloat16).cuda() for _ in range(4)]
    view = KVView(cache, "layer | kv block token head dim")
    blocks = np.random.default_rng(0).permutation(512).astype(np.int64)
    sums = fingerprints_of(view).of(blocks)
    assert torch.equal(sums, Fingerprints(view, None).of(blocks))
