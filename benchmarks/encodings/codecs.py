# SPDX-License-Identifier: Apache-2.0
"""Measure packing and unpacking inside a device next to nvCOMP's ANS, in turns by the wall clock,
if nvCOMP's Python package is installed.

nvCOMP codes a buffer, and only then knows its size. It takes a dense buffer; packing takes blocks
of a layout in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from portakv import Index, copy_blocks
from portakv.errors import Unsupported
from portakv_benchmarks.encodings.suite import EncodingBench, Memory
from portakv_benchmarks.shared.harness import FAILURES, Row, Rows, Step, in_a_line, short
from portakv_benchmarks.shared.trials import Method, Trials, timed

PACK = "pack"
#: nvCOMP's names of element types, and those of the rows.
ELEMENTS = {"|u1": "nvcomp ANS, bytes", "<f2": "nvcomp ANS, 16-bit floats"}
PEER = "nvcomp"


class Coded(NamedTuple):
    """Rows in a codec's form.

    Attributes:
        name: of the codec.
        encode, decode: code all rows, and write rows from that.
        nbytes: returns the bytes of the coded rows.
        right: returns whether decoding has brought every byte.
        peer: the owner of the codec, if not PortaKV.
    """

    name: str
    encode: Callable[[], object]
    decode: Callable[[], object]
    nbytes: Callable[[], int]
    right: Callable[[], bool]
    peer: str = ""


def codec_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each payload.

    Raises `Unsupported` without nvCOMP's package, or on another device than CUDA's.
    """
    if bench.device.type != "cuda":
        raise Unsupported("nvCOMP's codecs", f"the device is {bench.device}, not one of CUDA")
    try:
        library = import_module("nvidia.nvcomp")
    except ImportError as error:
        raise Unsupported("nvCOMP's codecs", str(error)) from None
    for payload in bench.sizes.inside[:2]:
        yield f"codecs: {payload} bytes", partial(measure, bench, payload, library)


def measure(bench: EncodingBench, payload: int, library: Any) -> Rows:
    """Return a row for each codec and direction.

    Args:
        library: nvCOMP's module.
    """
    memory = Memory(bench.sizes.cases[0], payload, bench.device)
    nbytes = memory.rows.numel() * memory.rows.element_size()
    coded = [_packed(memory)]
    for element, name in ELEMENTS.items():
        try:
            coded.append(_by_nvcomp(memory, library, element))
        except (*FAILURES, TypeError) as error:  # of another release
            bench.left_out.append(f"{name}: {in_a_line(error)}")
    trials = Trials(bench.sizes.rounds, 0.0, bench.left_out)
    rows: Rows = []
    for op in ("encode", "decode"):
        fields: Row = {"kind": "encoding_codec", "shape": memory.case.name, "op": op}
        methods = [_method(bench, each, op) for each in coded]
        rows += trials.rows(fields, nbytes, methods, {"of_nvcomp": PEER})
    sizes = {each.name: each.nbytes for each in coded}
    for row in rows:
        row["wire_bytes"] = sizes[row["backend"]]()
        row["payload_to_wire"] = short(nbytes / row["wire_bytes"])
    return rows


def _method(bench: EncodingBench, coded: Coded, op: str) -> Method:
    """Return a direction of a codec; each is checked by decoding what it has encoded."""

    def ended(call: Callable[[], object]) -> None:
        call()
        if bench.device.type != "cpu":
            bench.module.synchronize()

    def right() -> bool:
        if op == "encode":
            coded.decode()
        return coded.right()

    run = partial(timed, partial(ended, coded.encode if op == "encode" else coded.decode))
    prepare = coded.encode if op == "decode" else lambda: None
    return Method(coded.name, run, prepare, right, coded.peer)


def _packed(memory: Memory) -> Coded:
    """Return blocks in random order, packed into slots of consecutive blocks."""
    case = memory.case
    device = memory.rows.device
    slots = case.planes * case.plane.slot_bytes
    view = case.slots(
        memory.blocks, torch.empty(memory.blocks * slots, dtype=torch.uint8).to(device)
    )
    ids = memory.index(memory.blocks)
    places = Index(torch.arange(memory.blocks), step=case.tokens)

    def encode() -> None:
        copy_blocks(case.view(memory.rows), view, ids, places).synchronize()

    def decode() -> None:
        copy_blocks(view, case.view(memory.written), places, ids).synchronize()

    def right() -> bool:
        same = memory.right(memory.blocks)
        memory.poison()
        return same

    return Coded(PACK, encode, decode, lambda: memory.blocks * slots, right)


def _by_nvcomp(memory: Memory, library: Any, element: str) -> Coded:
    """Return all rows as one buffer, coded by nvCOMP as elements of a type."""
    stream = 0
    if memory.rows.device.type == "cuda":
        stream = torch.cuda.current_stream(memory.rows.device).cuda_stream
    codec = library.Codec(algorithm="ANS", data_type=element, cuda_stream=stream)
    rows = memory.rows.view(-1).view(torch.uint8)
    source = library.as_array(rows)
    made = dict[str, Any]()

    def encode() -> None:
        made["coded"] = codec.encode(source)

    def decode() -> None:
        made["rows"] = codec.decode(made["coded"])

    def right() -> bool:
        bits = torch.utils.dlpack.from_dlpack(made.pop("rows")).view(-1).view(torch.uint8)
        return torch.equal(bits, rows)

    def nbytes() -> int:
        return int(made["coded"].buffer_size)

    return Coded(ELEMENTS[element], encode, decode, nbytes, right, peer=PEER)
