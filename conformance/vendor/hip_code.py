# SPDX-License-Identifier: Apache-2.0
"""Compile `hip`'s kernels by AMD's compiler for devices that are not here: built, never run.

``native/cuda/check_hip.sh`` runs it, and ``check_dtk.sh`` with Hygon's own tools. Each kernel is
the text of a real plan; its machine code is read for the loads and stores of its vector, for local
memory and for the width of a wave. Kernels that pack use local memory to count. No kernel may have
private memory (scratch), except those of more than 512 threads: 84 registers a thread are left to
them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch

from portakv import CopyPlan, KVView
from portakv.backends.hip import Hip
from portakv.backends.pack_kernel import PACKS, UNPACKS, VECTOR, PackKernel
from portakv.backends.rows_kernel import NAMES, RowsKernel
from portakv.layout.encodings import Pack
from portakv.plan.packing import PackPlan
from portakv.runtime.hip import FLAGS
from portakv_conformance.evidence.source import source_sha256

TARGETS = ("gfx906", "gfx908", "gfx90a")
_HIPCC = ("cross-compiled, not executed", "AMD", "check_hip.sh")
_DTK = ("built by the vendor's toolchain", "Hygon", "check_dtk.sh")
_NHD = "layer | kv block token head dim"
# What loads and stores one vector of so many bytes (LLVM's AMDGPU assembler): of 2 and of 1 also to
# and from either half of a register.
_LOADS = {
    16: ("global_load_dwordx4",),
    8: ("global_load_dwordx2",),
    4: ("global_load_dword",),
    2: ("global_load_ushort", "global_load_short_d16", "global_load_short_d16_hi"),
    1: ("global_load_ubyte", "global_load_ubyte_d16", "global_load_ubyte_d16_hi"),
}
_STORES = {
    16: ("global_store_dwordx4",),
    8: ("global_store_dwordx2",),
    4: ("global_store_dword",),
    2: ("global_store_short", "global_store_short_d16_hi"),
    1: ("global_store_byte", "global_store_byte_d16_hi"),
}
_IDS = {*_LOADS[8], *_LOADS[4]}  # what loads ids and addresses
# The status word, which lies in host memory, is read and then replaced if it is higher.
_STATUS = {"flat_load_dwordx2", "flat_atomic_cmpswap_x2", "global_atomic_cmpswap_x2"}
_ROUNDS = 8  # vectors of a thread in kernels that pack, of planes of a segment and more
_FEW_THREADS = 512  # of a block; a thread of a larger block has 84 registers, and some scratch
_SCRATCH = 64  # bytes


@dataclass
class Code:
    """The machine code of one kernel for one target: for each entry, how often
    each instruction that touches memory occurs; bytes of local memory of all entries; lanes of a
    wave; what is not as it should be, sentences. The vector is in bytes."""

    kernel: str
    target: str
    vector: int
    accesses: dict[str, dict[str, int]] = field(default_factory=dict)
    lds: int = 0
    scratch: int = 0
    wave: int = 0
    wrong: list[str] = field(default_factory=list)


def kernels() -> Iterator[tuple[str, RowsKernel | PackKernel]]:
    """Yield kernels of real plans: every vector, with and without tables, ids on either side; and
    those that pack and unpack, by one warp and by several, with codes of both widths."""
    yield from _row_kernels()
    yield from _pack_kernels()


def _row_kernels() -> Iterator[tuple[str, RowsKernel]]:
    for width, vector in ((4096, 16), (40, 8), (12, 4), (6, 2), (3, 1)):
        caches = KVView([_bytes(5, 4, width) for _ in range(2)], "layer | block token dim")
        rows = KVView(_bytes(2, 7, width), "layer token dim")
        yield _of(f"gather rows of {width} B", caches, rows, 1, 0, vector)
        yield _of(f"scatter rows of {width} B", rows, caches, 0, 1, vector)
    pool = KVView([_bytes(2, 3, 4, 2, 64) for _ in range(3)], _NHD)
    joined = KVView(list(_bytes(3, 2, 3, 4, 2, 64)), _NHD)
    heads = KVView([_bytes(2, 3, 2, 4, 64) for _ in range(3)], "layer | kv block head token dim")
    objects = [_bytes(2, 3, 4, 128) for _ in range(3)]
    in_list = KVView(objects, "block | kv layer token (head dim)", heads=2)
    chunk = KVView(_bytes(2, 3, 8, 128), "kv layer token (head dim)", heads=2)
    yield _of("pool to pool, other order of heads", pool, heads, 1, 1, 16)
    yield _of("whole blocks", heads, chunk, 4, 0, 16)
    yield _of("one allocation to memory objects", joined, in_list, 1, 0, 16)


def _pack_kernels() -> Iterator[tuple[str, PackKernel]]:
    for tokens, bits in ((16, 4), (16, 3), (40, 3), (64, 4), (288, 3)):
        values = tokens * 128
        rows = [torch.zeros(2, 3, tokens, 2, 128, dtype=torch.bfloat16) for _ in range(2)]
        raw = KVView(rows, _NHD)
        slots = _bytes(3, 2, 2, 2, Pack(bits).plane(values).slot_bytes)
        packed = KVView(
            slots,
            "block layer kv head page",
            layers=2,
            kv=2,
            heads=2,
            dim=128,
            block_size=tokens,
            encoding=Pack(bits),
        )
        for verb, src, dst in (("pack", raw, packed), ("unpack", packed, raw)):
            plan = PackPlan(src.form, dst.form, tokens, tokens)
            assert len(plan.nests) == 1, f"{verb}: {plan}"
            yield f"{verb} {values} values, {bits} bits", PackKernel(plan)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def _of(
    name: str, src: KVView, dst: KVView, src_step: int, dst_step: int, vector: int
) -> tuple[str, RowsKernel]:
    plan = CopyPlan(src.form, dst.form, src_step, dst_step)
    assert (len(plan.nests), plan.vector) == (1, vector), f"{name}: {plan}"
    return name, RowsKernel(plan)


def read_code(
    code: Code,
    disassembly: str,
    notes: str,
    names: Mapping[int, str] = NAMES,
    most_scratch: int = 0,
) -> Code:
    """Judge the machine code of a kernel.

    Args:
        code: is completed, and returned.
        disassembly: of its code object, by ``llvm-objdump -d``.
        notes: the code object's metadata, by ``llvm-readelf --notes``.
        names: the names of its entries, by the vectors that one thread moves.
        most_scratch: the bytes of private memory that a thread may have.
    """
    for each, name in names.items():
        _, label, rest = disassembly.partition(f"<{name}>:\n")
        body = rest.partition("\n\n")[0]
        pattern = r"\b(?:global|flat|ds|scratch|buffer)_(?:load|store|read|write|atomic)\w*"
        code.accesses[name] = dict(sorted(Counter(re.findall(pattern, body)).items()))
        if not label:
            code.wrong.append(f"{name} is not in the code")
        else:
            judge = _judge_packing if name in (PACKS, UNPACKS) else _judge
            code.wrong += judge(name, code.accesses[name], code.vector, each)
    metadata: dict[str, list[int]] = {}
    for key, number in re.findall(r"\.(\w+):\s*(\d+)", notes):
        metadata.setdefault(key, []).append(int(number))
    code.lds = sum(metadata.get("group_segment_fixed_size", ()))
    code.scratch = sum(metadata.get("private_segment_fixed_size", ()))
    code.wave = min(metadata.get("wavefront_size", ()), default=0)
    if code.scratch > most_scratch or (code.lds and PACKS not in names.values()):
        code.wrong.append(f"{code.lds} B of LDS and {code.scratch} B of scratch are used, not none")
    if code.wave != 64:
        code.wrong.append(f"a wave has {code.wave} lanes, not 64")
    return code


def _judge(name: str, counts: dict[str, int], vector: int, each: int) -> Iterator[str]:
    loads = sum(counts.get(load, 0) for load in _LOADS[vector])
    stores = sum(counts.get(store, 0) for store in _STORES[vector])
    if loads < each or stores != each:
        yield f"{name} has {loads} loads and {stores} stores of {vector} B, not {each}"
    expected = {*_LOADS[vector], *_STORES[vector], *_IDS, *_STATUS}
    if others := sorted(counts.keys() - expected):
        yield f"{name} has {', '.join(others)}"


def _judge_packing(name: str, counts: dict[str, int], vector: int, _: int) -> Iterator[str]:
    wide = _LOADS[vector] if name == PACKS else _STORES[vector]
    found = sum(counts.get(word, 0) for word in wide)
    if found != _ROUNDS:
        yield f"{name} has {found} times {wide[0]}, not {_ROUNDS}"
    # `read_code` judges the bytes of private memory, which "buffer" instructions read and write.
    known = ("global_", "ds_", "buffer_")
    if others := sorted(x for x in counts if not x.startswith(known) and x not in _STATUS):
        yield f"{name} has {', '.join(others)}"


def _build(tools: Sequence[str], folder: Path, targets: Sequence[str]) -> list[Code]:
    (hipcc, objdump, readelf) = tools
    codes = []
    for number, (name, kernel) in enumerate(kernels()):
        text = folder / f"kernel{number}.hip"
        text.write_text(f"#include <hip/hip_runtime.h>\n{kernel.source}")
        for target in targets:
            vector = VECTOR if isinstance(kernel, PackKernel) else kernel.shape.vector
            code = Code(name, target, vector)
            built = folder / f"kernel{number}.{target}.o"
            command = [hipcc, "-x", "hip", *FLAGS, f"--offload-arch={target}", "--cuda-device-only"]
            done = _run([*command, "--no-gpu-bundle-output", "-c", str(text), "-o", str(built)])
            if done.returncode:
                code.wrong.append(f"hipcc refused it:\n{done.stderr.strip()}")
            else:
                disassembly = _run([objdump, "-d", f"--mcpu={target}", str(built)]).stdout
                metadata = _run([readelf, "--notes", str(built)]).stdout
                scratch = _SCRATCH if kernel.threads > _FEW_THREADS else 0
                read_code(code, disassembly, metadata, kernel.names, scratch)
            codes.append(code)
    return codes


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # If nvcc is installed, hipcc would else act as nvcc.
    environment = {**os.environ, "HIP_PLATFORM": "amd"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _print(codes: list[Code], targets: Sequence[str]) -> None:
    print(f"{'kernel':36}{'vector':>7}  " + "".join(f"{t:>12}" for t in targets) + "   load, store")
    for name, row in groupby(codes, key=lambda code: code.kernel):
        first, *others = row
        words = "".join(f"{'WRONG' if code.wrong else 'right':>12}" for code in (first, *others))
        shown = next(iter(first.accesses.values()), {})
        vector = first.vector
        wide = [word for word in (*_LOADS[vector], *_STORES[vector]) if word in shown]
        print(f"{name:36}{vector:>5} B  {words}   {', '.join(wide)}")
    for code in codes:
        for why in code.wrong:
            print(f"{code.kernel} for {code.target}: {why}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, judge and print; return 1 if something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="check_hip.sh", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--report", type=Path, help="a JSON file for what was found")
    parser.add_argument("--dtk", action="store_true", help="the tools are Hygon's own")
    for tool in ("hipcc", "llvm-objdump", "llvm-readelf"):
        parser.add_argument(f"--{tool}", default=tool)
    args = parser.parse_args(arguments)
    tools = args.hipcc, args.llvm_objdump, args.llvm_readelf
    with tempfile.TemporaryDirectory(prefix="portakv-hip-") as folder:
        codes = _build(tools, Path(folder), args.targets)
    _print(codes, args.targets)
    wrong = sum(bool(code.wrong) for code in codes)
    compiler = (_run([args.hipcc, "--version"]).stdout.splitlines() or ["unknown"])[0]
    if args.report:  # a record of a job, as `portakv_conformance.evidence.evidence` reads it
        what, who, script = _DTK if args.dtk else _HIPCC
        report = {
            "what": what,
            "backend": "portakv.backends.hip:Hip",
            "name": Hip.name,
            "source_sha256": source_sha256("portakv.backends.hip:Hip"),
            "device": f"{who} {', '.join(args.targets)}",
            "command": " ".join([f"bash native/cuda/{script}", *args.targets]),
            "compiler": compiler,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "targets": list(args.targets),
            "right": not wrong,
            "kernels": [asdict(code) for code in codes],
        }
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(codes)} kernels built by hipcc ({compiler}), {wrong} wrong; compiled, not run")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
