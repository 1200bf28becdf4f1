# SPDX-License-Identifier: Apache-2.0
"""The benchmark of encodings as a whole, in sizes that mean nothing: every method, every byte."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.simdev_cases import DEVICE, NAME

import portakv_benchmarks.cli as bench
from portakv import Index, Unsupported, copy_blocks
from portakv_benchmarks.encodings import across, codecs, stored
from portakv_benchmarks.encodings.suite import ENCODING_PRESETS, EncodingBench, Memory
from portakv_benchmarks.host.traffic_sources import LOOPS
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, having

TINY = ENCODING_PRESETS["tiny"]
INSIDE = {"copy_", "gather", "scatter", "pack", "unpack", "pack, call", "unpack, call"}


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(harness, "REST", 0.0)  # no figure counts here


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(DEVICE, marks=[pytest.mark.simdev, pytest.mark.full], id="simdev"),
        pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda"),
    ],
    indirect=True,
)
def test_every_method_is_measured_and_every_byte_right(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    name = device.type if device.type == "cuda" else NAME
    words = ["--encodings", "--device", name, "--preset", "tiny", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    result: Row = json.loads(file.read_text())
    assert (result["suite"], len([*tmp_path.glob("*-payload.svg")])) == ("encodings", 1)
    rows = result["rows"]
    assert all(row["verified"] for row in rows)
    for case in TINY.cases:
        own = having(rows, kind="encoding_copy", shape=case.name)
        assert {row["backend"] for row in own} == INSIDE
        assert all(row["of_plain"] > 0 for row in own if "pack" in row["backend"])
    links = having(rows, kind="encoding_link")
    assert {row["op"] for row in links} == {"d2h", "h2d", "both"}
    assert {row["backend"] for row in links} == {"memcpy", "raw", "pack"}
    for row in links:
        packed = row["backend"] == "pack"
        assert (row["wire_bytes"] < row["payload_bytes"]) == packed
        assert row["payload_to_wire"] == (1.306 if packed else 1)
    beside = having(rows, kind="encoding_alongside")
    assert {(row["loop"], row["op"]) for row in beside} == {*product(LOOPS, ("d2h", "h2d", "both"))}
    assert {row["backend"] for row in beside} == {"memcpy", "raw, detached", "pack, detached"}
    for row in beside:
        assert ("over_raw" in row) == (row["backend"] == "pack, detached")
        assert row["payload_bytes"] == TINY.alongside
    shown = capsys.readouterr().out
    assert "packing and unpacking inside a device" in shown
    assert "packed and raw rows between a device and pinned host" in shown


@pytest.mark.simdev
def test_a_block_that_does_not_arrive_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(iter(across.across_steps(bench_ := EncodingBench(DEVICE, TINY))))[1]

    def shorter(src: Any, dst: Any, src_ids: Index, dst_ids: Index) -> Any:
        case = TINY.linked[0]
        count = src.slots if src_ids is None else len(src_ids.host_ids()) * case.tokens
        count -= case.tokens
        return copy_blocks(src, dst, src_ids, dst_ids, count=count)

    monkeypatch.setattr(across, "copy_blocks", shorter)
    rows = step()
    assert not bench_.left_out
    verdicts = {(row["backend"], row["verified"]) for row in rows}
    assert verdicts == {("memcpy", True), ("raw", False), ("pack", False)}


def test_a_link_needs_a_device() -> None:
    bench_ = EncodingBench(torch.device("cpu"), TINY)
    with pytest.raises(Unsupported, match="Packed copies over a link"):
        next(iter(across.across_steps(bench_)))


@pytest.mark.slow
def test_pulls_by_transports_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--encodings", "--device", "cpu", "--preset", "tiny", "--out", str(tmp_path)]
    assert bench.main([*words, "--only", "transports"]) == 0
    (file,) = tmp_path.glob("*.json")
    rows: list[Row] = json.loads(file.read_text())["rows"]
    (raw,) = having(rows, backend="raw")
    (packed,) = having(rows, backend="pack")
    assert raw["verified"]
    assert packed["verified"]
    assert packed["of_raw"] > 0
    assert raw["wire_bytes"] == raw["payload_bytes"] == packed["payload_bytes"]
    (chosen,) = having(rows, backend="auto")
    assert chosen["verified"]
    assert chosen["wire_bytes"] == raw["wire_bytes"]  # rows of a CPU stay raw
    assert (raw["payload_to_wire"], packed["payload_to_wire"]) == (1, 1.306)
    assert "packed and raw pulls through staging buffers" in capsys.readouterr().out


@pytest.mark.full
def test_stores_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--encodings", "--device", "cpu", "--preset", "tiny", "--out", str(tmp_path)]
    assert bench.main([*words, "--only", "stored"]) == 0
    (file,) = tmp_path.glob("*.json")
    rows: list[Row] = json.loads(file.read_text())["rows"]
    assert all(row["verified"] for row in rows)
    for bits, tier, op in product(stored.METHODS, (stored.HOST, stored.DISK), ("save", "load")):
        own = having(rows, bits=bits, tier=tier, op=op)
        assert [row["backend"] for row in own] == [*stored.METHODS[bits]]
        assert all(row["of_raw"] > 0 for row in own if row["backend"] != stored.RAW)
        assert [row["backend"] for row in own if "of_raws" in row] == (
            [stored.AUTO] if bits == stored.RANDOM else []
        )
        # The CPU packs by `reference`, so that a store that chooses stays raw.
        assert {row["backend"] for row in own if row["form"] != stored.RAW} <= {stored.PACK}
    assert "saves and loads of block stores" in capsys.readouterr().out


def test_what_tiers_hold_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    bench_ = EncodingBench(torch.device("cpu"), TINY)
    ((_, step),) = stored.held_steps(bench_)
    rows = step()
    assert {row["tier"] for row in rows} == {stored.HOST, stored.DISK, stored.BUCKET}
    assert all(row["verified"] for row in rows)
    assert {row["blocks"] for row in having(rows, backend=stored.RAW)} == {stored.TINY.held}
    packed = having(rows, backend=stored.PACK)
    assert all(1.1 < row["of_raw"] < 1.2 for row in packed)  # headers count in small blocks


@pytest.mark.parametrize("method", [stored.RAW, stored.PACK])
def test_rows_that_a_store_does_not_have_are_noticed(method: str) -> None:
    memory = Memory(TINY.linked[0], 1 << 18, torch.device("cpu"))
    with stored.Stored(memory, method, staging=4 << 20, host=4 << 20) as store:
        store.save_new()
        assert store.loaded_right()
        memory.rows[0, 0, 3, 5, 0, 7] += 1
        assert not store.loaded_right()


class Coded:
    """Bytes that a stand-in for nvCOMP has coded, or decoded."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.buffer_size = len(data)

    def __dlpack__(self, **_: Any) -> Any:
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return torch.zeros(1, device="cpu").__dlpack_device__()


class Codec:
    """A codec of a stand-in for nvCOMP, which loses the last byte if it is ``lossy``."""

    lossy = False

    def __init__(self, algorithm: str, data_type: str, cuda_stream: int) -> None:
        assert algorithm == "ANS"
        assert data_type in codecs.ELEMENTS

    def encode(self, rows: torch.Tensor) -> Coded:
        return Coded(zlib.compress(rows.numpy().tobytes()))

    def decode(self, coded: Coded) -> Coded:
        data = zlib.decompress(coded.data)
        return Coded(data[:-1] + b"\0" if self.lossy else data)


class Lossy(Codec):
    lossy = True


@pytest.mark.parametrize("kind", [Codec, Lossy])
def test_other_codecs_are_measured_and_checked(kind: type[Codec]) -> None:
    """With a stand-in for nvCOMP, which needs a GPU."""
    library = SimpleNamespace(Codec=kind, as_array=lambda rows: rows)
    rows = codecs.measure(EncodingBench(torch.device("cpu"), TINY), 1 << 18, library)
    assert {row["op"] for row in rows} == {"encode", "decode"}
    own = {codecs.PACK, codecs.FP8, codecs.CAST}
    assert {row["backend"] for row in rows} == {*own, *codecs.ELEMENTS.values()}
    packed = having(rows, backend=codecs.PACK)
    rounded = [row for row in rows if row["backend"] in own - {codecs.PACK}]
    assert all(row["verified"] and 1.96 < row["payload_to_wire"] <= 2 for row in rounded)
    assert all(row["verified"] and row["payload_to_wire"] == 1.306 for row in packed)
    assert all(row["of_nvcomp"] > 0 for row in packed)
    others = [row for row in rows if row["backend"] not in own]
    assert all(row["peer"] == codecs.PEER and row["wire_bytes"] > 0 for row in others)
    assert {row["verified"] for row in others} == {not kind.lossy}


def test_a_release_of_nvcomp_with_another_interface_is_left_out() -> None:
    bench_ = EncodingBench(torch.device("cpu"), TINY)
    library = SimpleNamespace(Codec=lambda algorithm: None, as_array=lambda rows: rows)
    rows = codecs.measure(bench_, 1 << 18, library)
    assert {row["backend"] for row in rows} == {codecs.PACK, codecs.FP8, codecs.CAST}
    assert len(bench_.left_out) == len(codecs.ELEMENTS)


def test_nvcomp_needs_a_gpu() -> None:
    bench_ = EncodingBench(torch.device("cpu"), TINY)
    next(iter(codecs.codec_steps(bench_)))
    assert bench_.left_out == ["nvCOMP's codecs: the device is cpu, not one of CUDA"]


@pytest.mark.parametrize("codec", [codecs.rounded, codecs.cast])
def test_rows_that_are_rounded_are_judged(codec: Callable[[Memory], codecs.Coded]) -> None:
    coded = codec(Memory(TINY.cases[0], 1 << 18, torch.device("cpu")))
    coded.encode()
    coded.decode()
    assert coded.right()
    assert not coded.right()  # the rows are poisoned


def test_zeros_are_no_rounded_rows() -> None:
    """The control: their error is larger than that of a rounded value."""
    memory = Memory(TINY.cases[0], 1 << 18, torch.device("cpu"))
    memory.written.zero_()
    assert not codecs.near(memory)
