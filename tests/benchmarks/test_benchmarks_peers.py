# SPDX-License-Identifier: Apache-2.0
"""Peers of the benchmark: called as their own connectors call them, checked, or refused clearly."""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.benchmarks_cases import CPU, FULL, field, tiny

import portakv_benchmarks.cli as bench
from portakv.cli.sides import Shape
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared import peers
from portakv_benchmarks.shared.harness import Rows
from portakv_benchmarks.shared.peers import LMCache

ONCE = dataclasses.replace(FULL, repeats=1)


class FakeOps:
    """Stands in for LMCache's compiled module: finds tensors by address, copies with torch."""

    class TransferDirection(IntEnum):
        H2D = 0
        D2H = 1

    EngineKVFormat = SimpleNamespace(**{name: name for name in peers.FORMATS.values()})
    PageBufferShapeDesc = SimpleNamespace

    work: Workload  # which is measured

    def multi_layer_kv_transfer(
        self,
        chunk: torch.Tensor,
        pointers: torch.Tensor,
        slots: torch.Tensor,
        device: torch.device,
        pool: int,
        direction: int,
        form: str,
        **sizes: int,
    ) -> None:
        shape = self.work.shape
        assert (pool, form) == (shape.slots, "NL_X_TWO_NB_BS_NH_HS")
        assert sizes == {"block_size": shape.block_size, "head_size": shape.dim}
        self._copy(chunk, pointers, slots, bool(direction))

    def multi_layer_block_kv_transfer(
        self,
        pointers: torch.Tensor,
        chunks: list[int],
        blocks: torch.Tensor,
        device: torch.device,
        direction: int,
        described: Any,
        tokens: int,
        form: str,
        skip: int,
    ) -> None:
        shape = self.work.shape
        assert (described.nl, described.nb, described.bs) == (3, shape.blocks, shape.block_size)
        assert (described.nh, described.hs, described.element_size) == (32, 128, 2)
        assert (tokens, skip) == (shape.tokens, 0)
        known = {chunk.data_ptr(): chunk for chunk in (*self.work.stored, *self.work.loaded)}
        slots = (blocks[:, None] * shape.block_size + torch.arange(shape.block_size)).flatten()
        self._copy(known[chunks[0]], pointers, slots, bool(direction))

    def _copy(
        self, chunk: torch.Tensor, pointers: torch.Tensor, slots: torch.Tensor, store: bool
    ) -> None:
        known = {layer.data_ptr(): layer for layer in (*self.work.source, *self.work.target)}
        for layer, pointer in enumerate(pointers.tolist()):
            rows = known[pointer].flatten(1, 2).flatten(2).view(torch.int16)
            if store:
                chunk[:, layer] = rows[:, slots].view(chunk.dtype)
            else:
                rows[:, slots] = chunk[:, layer].view(torch.int16)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> LMCache:
    """LMCache over the stand-in, which sees the workload that is measured."""
    ops = FakeOps()
    monkeypatch.setattr(peers, "load", lambda package, module: (ops, "0.5.3"))

    class Seen(Workload):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            ops.work = self

    monkeypatch.setattr(suite, "Workload", Seen)
    return peers.load_peer("lmcache")


def measured(shape: Shape, arrangement: str, peer: LMCache) -> tuple[Rows, list[str]]:
    """The rows of a shape with a peer, and what was left out."""
    bench_field = field(peers=(peer,))
    return suite.run_task(suite.Task(shape, arrangement), ONCE, bench_field), bench_field.left_out


def test_a_peer_is_called_and_its_bytes_are_checked(peer: LMCache) -> None:
    rows, left_out = measured(tiny(), "apart", peer)
    assert left_out == []
    of_peer = [row for row in rows if row.get("peer")]
    assert {(row["backend"], row["op"], row["index"]) for row in of_peer} == {
        (f"lmcache {kernel}", op, index)
        for op in ("gather", "scatter")
        for kernel, indices in (
            ("slot kernel", ("random", "contiguous", "blocks")),
            ("block kernel", ("contiguous", "blocks")),
        )
        for index in indices
    }
    assert all(row["verified"] for row in of_peer)


def test_a_peer_that_is_wrong_is_told_and_is_not_compared_with(
    peer: LMCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeOps, "_copy", lambda self, chunk, pointers, slots, store: None)
    rows, _ = measured(tiny(), "apart", peer)
    suite.relate(rows)
    assert not any("to_peer" in row for row in rows)
    failures = suite.peer_failures(rows)
    assert len(failures) == 10
    assert (
        failures[0]
        == "seed, layers apart, lmcache slot kernel gather random: some bytes were wrong"
    )


def test_a_peer_says_which_caches_it_has_no_format_for(peer: LMCache) -> None:
    _, (reason,) = measured(tiny("encoder-cache", tokens=576), "together", peer)
    assert "a shape that LMCache has a format for" in reason


def test_a_kernel_that_reads_outside_of_the_cache_is_not_called(peer: LMCache) -> None:
    work = Workload(tiny("llama3-8b-cross-layer"), "together", CPU)
    with pytest.raises(peers.PeerMissing, match="outside of which it reads"):
        list(suite.peer_methods(peer, work, "random"))
    assert {method.labels["call"] for method in suite.peer_methods(peer, work, "blocks")} == {
        "block kernel"
    }


def test_a_missing_peer_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    words = ["--preset", "quick", "--device", "cpu", "--backend", "reference"]
    assert bench.main([*words, "--peer", "lmcache"]) == 1
    assert "pip install --no-deps lmcache==0.5.3" in capsys.readouterr().err
    assert bench.main([*words, "--peer", "unknown"]) == 1
    assert "Expected --peer to be one of lmcache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (None, r"Expected a compiled c_ops .* lmcache 9\.9 has none"),
        (b"not a library", r"Expected lmcache 9\.9 to load"),
    ],
)
def test_a_peer_that_does_not_load_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: bytes | None, why: str
) -> None:
    if file is not None:
        (tmp_path / f"c_ops{EXTENSION_SUFFIXES[0]}").write_bytes(file)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(peers, "find_spec", lambda package: spec)
    monkeypatch.setattr(peers, "version", lambda package: "9.9")
    with pytest.raises(peers.PeerMissing, match=why):
        peers.load_peer("lmcache")
