# SPDX-License-Identifier: Apache-2.0
"""Measure encodings inside a device next to other codecs, in turns by the wall clock: `pack` and
`fp8`, the cast of LMCache's fp8 serde, and nvCOMP's ANS if its Python package is installed.

nvCOMP codes a buffer, and only then knows its size. Both others take a dense buffer; `pack` and
`fp8` take blocks of a layout in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from portakv import Fp8, Index, KVView, copy_blocks
from portakv_benchmarks.encodings.suite import EncodingBench, Memory
from portakv_benchmarks.shared.harness import FAILURES, Row, Rows, Step, in_a_line, short
from portakv_benchmarks.shared.trials import Method, Trials, timed

PACK = "pack"
FP8 = "fp8"
CAST = "LMCache's fp8 serde"
#: How far a value of e4m3 is from what it stands for, relative to it and to the largest value.
ROUNDED = (2**-4, 2**-8)
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

    Leaves out nvCOMP without its package, or on another device than CUDA's.
    """
    library = None
    if bench.device.type != "cuda":
        bench.left_out.append(f"nvCOMP's codecs: the device is {bench.device}, not one of CUDA")
    else:
        try:
            library = import_module("nvidia.nvcomp")
        except ImportError as error:
            bench.left_out.append(f"nvCOMP's codecs: {in_a_line(error)}")
    for payload in bench.sizes.inside[:2]:
        yield f"codecs: {payload} bytes", partial(measure, bench, payload, library)


def measure(bench: EncodingBench, payload: int, library: Any) -> Rows:
    """Return a row for each codec and direction.

    Args:
        library: nvCOMP's module; None: it is left out.
    """
    memory = Memory(bench.sizes.cases[0], payload, bench.device)
    nbytes = memory.rows.numel() * memory.rows.element_size()
    coded = [_packed(memory), rounded(memory), cast(memory)]
    for element, name in ELEMENTS.items() if library is not None else ():
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
    nbytes = memory.blocks * case.planes * case.plane.slot_bytes
    image = torch.empty(nbytes, dtype=torch.uint8, device=memory.rows.device)

    def right() -> bool:
        same = memory.right(memory.blocks)
        memory.poison()
        return same

    return _by_blocks(PACK, memory, case.slots(memory.blocks, image), nbytes, right)


def rounded(memory: Memory) -> Coded:
    """Return blocks in random order, rounded into slots of consecutive blocks."""
    case = memory.case
    slot = Fp8().plane(case.tokens, case.dim).slot_bytes
    extents = (memory.blocks, case.layers, case.kv, case.heads, slot)
    image = torch.empty(extents, dtype=torch.uint8, device=memory.rows.device)
    sizes: dict[str, Any] = {"kv": case.kv, "block_size": case.tokens, "dim": case.dim}
    view = KVView(image, "block layer kv head page", encoding=FP8, **sizes)
    return _by_blocks(FP8, memory, view, image.numel(), partial(near, memory))


def _by_blocks(
    name: str, memory: Memory, image: KVView, nbytes: int, right: Callable[[], bool]
) -> Coded:
    """Return the copies of blocks into an image of consecutive blocks, and back."""
    case = memory.case
    ids = memory.index(memory.blocks)
    places = Index(torch.arange(memory.blocks, device="cpu"), step=case.tokens)

    def encode() -> None:
        copy_blocks(case.view(memory.rows), image, ids, places).synchronize()

    def decode() -> None:
        copy_blocks(image, case.view(memory.written), places, ids).synchronize()

    return Coded(name, encode, decode, lambda: nbytes, right)


def cast(memory: Memory) -> Coded:
    """Return all rows as one buffer of e4m3, by the operations of LMCache's serde (0.5.3)."""
    rows = memory.rows
    coded = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)

    def encode() -> None:
        coded.copy_(rows.to(torch.float8_e4m3fn).contiguous().view(torch.uint8).flatten())

    def decode() -> None:
        values = coded.view(torch.float8_e4m3fn).reshape(rows.shape)
        memory.written.copy_(values.to(rows.dtype))

    def right() -> bool:
        expected = rows.to(torch.float8_e4m3fn).to(rows.dtype)
        same = torch.equal(memory.written.view(torch.int16), expected.view(torch.int16))
        memory.poison()
        return same

    return Coded(CAST, encode, decode, lambda: coded.numel(), right)


def near(memory: Memory) -> bool:
    """Return True if the written rows are those that were read, but for their rounding."""
    right = True
    relative, absolute = ROUNDED
    for read, written in zip(memory.rows, memory.written, strict=True):
        exact = read.float()
        most = exact.abs() * relative + exact.abs().amax(-1, keepdim=True) * absolute
        right &= bool(((written.float() - exact).abs() <= most).all())
    memory.poison()
    return right


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
