# SPDX-License-Identifier: Apache-2.0
"""AMD's compilers build `hip`'s kernels for devices that are not here; nothing runs."""

from __future__ import annotations

import ctypes.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command_line import bash, python

from portakv.backends import rows_kernel
from portakv.backends.pack_kernel import PackKernel
from portakv.backends.rows_kernel import LOOKUPS, RowsKernel
from portakv_conformance.evidence import evidence
from portakv_conformance.vendor import hip_code
from portakv_conformance.vendor.hip_code import Code, kernels, read_code

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, DTK = (ROOT / "native/cuda" / name for name in ("check_hip.sh", "check_dtk.sh"))
TARGETS = {"gfx906": 0x2F, "gfx908": 0x30, "gfx90a": 0x3F}  # as ELF names them: EF_AMDGPU_MACH
needs_hipcc = pytest.mark.skipif(
    shutil.which("hipcc") is None, reason="hipcc is not installed: apt-get install hipcc"
)
needs_runtime = pytest.mark.skipif(
    ctypes.util.find_library("amdhip64") is None,
    reason="AMD's libamdhip64 is not installed: apt-get install libamdhip64-dev",
)


# AMD's own hipRTC, through the code that `hip` calls it by

# In a separate process: the library brings an LLVM along.
PROGRAM = """
import json, sys, torch
from pathlib import Path
from types import SimpleNamespace
from portakv_conformance.vendor.hip_code import kernels
from portakv.runtime import hip as _hip_driver
from portakv.backends.hip import Hip

torch.version.hip = "5.2.21153"
driver, found = _hip_driver.driver(), {}
found["probe"] = Hip.probe(torch.device("cuda", 0)).reason
found["version"] = _hip_driver.hiprtc_version(driver)
for name, kernel in kernels():
    if name in sys.argv[3:]:
        for target in sys.argv[2].split(","):
            code = _hip_driver.compile_kernel(driver, kernel.source, target)
            path = Path(sys.argv[1], f"{target}.{len(found)}")
            path.write_bytes(code)
            found[f"{name} for {target}"] = str(path)
try:
    broken = kernel.source.replace("Argument argument)", "Argument nothing)")
    _hip_driver.compile_kernel(driver, broken, "gfx906")
except RuntimeError as error:
    found["log"] = str(error)
print(json.dumps(found))
"""
CHOSEN = {
    "gather rows of 4096 B": "portakv_rows",
    "scatter rows of 3 B": "portakv_rows",
    "one allocation to memory objects": "portakv_rows",
    "pack 2048 values, 4 bits": "portakv_pack",
    "unpack 8192 values, 4 bits": "portakv_unpack",
}


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Compile kernels for the targets that tests of this run use."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    named = {spec.params.get("target") for spec in specs if spec is not None}
    targets = ",".join(target for target in TARGETS if target in named)
    folder = tmp_path_factory.mktemp("code")
    words = "-c", PROGRAM, str(folder), targets, *CHOSEN
    results: dict[str, str] = json.loads(python(*words, PORTAKV_CACHE_DIR=str(folder / "cache")))
    return results


@needs_runtime
def test_amds_runtime_says_that_there_is_no_device(compiled: dict[str, str]) -> None:
    if "finds no device" not in compiled["probe"]:
        pytest.skip(f"there is a HIP device here: {compiled['probe']}")
    assert "hipGetDeviceCount returned hipErrorNoDevice (100)" in compiled["probe"]


@needs_runtime
@pytest.mark.parametrize(
    "target", [pytest.param(x, marks=[pytest.mark.full] * (x != "gfx90a")) for x in TARGETS]
)
@pytest.mark.parametrize("name", CHOSEN)
def test_amds_hiprtc_compiles_the_kernel(name: str, target: str, compiled: dict[str, str]) -> None:
    code = Path(compiled[f"{name} for {target}"]).read_bytes()
    machine = int.from_bytes(code[18:20], "little")
    assert (code[:4], machine) == (b"\x7fELF", 224)  # EM_AMDGPU
    assert code[48] == TARGETS[target]
    assert f"{CHOSEN[name]}\0".encode() in code


@needs_runtime
def test_a_compile_error_carries_the_log_of_hiprtc(compiled: dict[str, str]) -> None:
    assert compiled["log"].startswith("hipRTC refused the kernel for gfx906:\n")
    assert "use of undeclared identifier 'argument'" in compiled["log"]


# hipcc, and the machine code


@needs_hipcc
@pytest.mark.slow
def test_the_script_builds_every_kernel_for_three_targets(tmp_path: Path) -> None:
    report = tmp_path / "code.json"
    ran = bash(SCRIPT, "--report", str(report))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = [name for name, _ in kernels()]
    assert f"{3 * len(names)} kernels built by hipcc (HIP version: " in ran.stdout
    assert ran.stdout.rstrip().endswith("0 wrong; compiled, not run")
    result: dict[str, Any] = json.loads(report.read_text())
    assert (result["targets"], result["right"]) == ([*TARGETS], True)
    assert [code["kernel"] for code in result["kernels"][::3]] == names


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave one kernel, to save time, and return the options that name LLVM's tools."""
    chosen = next(kernels())
    monkeypatch.setattr(hip_code, "kernels", lambda: iter([chosen]))
    return [f"--{tool}={find_tool(tool)}" for tool in ("llvm-objdump", "llvm-readelf")]


def find_tool(tool: str) -> str:
    """Return the path of a tool of LLVM; Debian's name of it has its release."""
    return shutil.which(tool) or shutil.which(f"{tool}-15") or tool


@needs_hipcc
def test_the_machine_code_is_wide(few: list[str], tmp_path: Path) -> None:
    report = tmp_path / "code.json"
    assert hip_code.main([*few, "gfx906", "--report", str(report)]) == 0
    result: dict[str, Any] = json.loads(report.read_text())
    wide = result["kernels"][0]["accesses"]["portakv_rows"]
    assert wide["global_load_dwordx4"] >= 1
    assert wide["global_store_dwordx4"] == 1
    assert {code["wave"] for code in result["kernels"]} == {64}
    record = evidence.read(report)
    assert (record.level, record.backend, record.device) == ("R4", "hip", "AMD gfx906")


# What rows.cuh says to AMD's compiler alone, and would say otherwise.
SPACE = ("__attribute__((address_space(1)))", "")
WIDE = (
    "typedef unsigned int Wide __attribute__((vector_size(16)));",
    "struct alignas(16) Wide { unsigned int part[4]; };",
)


@needs_hipcc
@pytest.mark.parametrize(
    ("words", "why"), [([SPACE], "portakv_rows has flat_load_dwordx4"), ([SPACE, WIDE], "B of LDS")]
)
def test_without_the_words_for_amd_the_check_fails(
    words: list[tuple[str, str]],
    why: str,
    few: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are needed, and the check sees that they are missing."""
    text = rows_kernel.kernel_text()
    for original, otherwise in words:
        assert text.count(original) == 1
        text = text.replace(original, otherwise)
    monkeypatch.setattr(rows_kernel, "kernel_text", lambda *_: text)
    assert hip_code.main([*few, "gfx906"]) == 1
    assert why in capsys.readouterr().out


@needs_hipcc
def test_a_target_the_compiler_lacks(few: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert hip_code.main([*few, "gfx936"]) == 1
    output = capsys.readouterr().out
    assert "hipcc refused it:" in output
    assert "WRONG" in output


@pytest.mark.parametrize(
    ("script", "where", "messages"),
    [
        (
            SCRIPT,
            {"HIPCC": "no-such-hipcc"},
            ["no-such-hipcc was not found; install it (Debian: apt-get install hipcc"],
        ),
        (
            DTK,
            {"ROCM_PATH": "/nowhere", "DTKROOT": "/nowhere"},
            ["/nowhere/bin/hipcc was not found", "PortaKV has not run this script"],
        ),
    ],
    ids=["AMD", "Hygon"],
)
def test_without_a_compiler_a_script_says_what_to_install(
    script: Path, where: dict[str, str], messages: list[str]
) -> None:
    ran = bash(script, **where)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert all(words in ran.stderr for words in messages)


@needs_hipcc
@pytest.mark.slow
def test_with_a_dtk_it_says_who_built(tmp_path: Path) -> None:
    """The system's hipcc and LLVM's tools stand in for a DTK, for a target that both know."""
    (tmp_path / "bin").mkdir()
    for tool in ("hipcc", "llvm-objdump", "llvm-readelf"):
        (tmp_path / "bin" / tool).write_text(f'#!/bin/sh\nexec {find_tool(tool)} "$@"\n')
        (tmp_path / "bin" / tool).chmod(0o755)
    ran = bash(DTK, "gfx906", DTKROOT=str(tmp_path), OUT=str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing was run, only built" in ran.stdout
    record = evidence.read(tmp_path / "out" / "hip-dtk.json")
    assert (record.level, record.backend, record.device) == ("R5", "hip", "Hygon gfx906")
    assert record.command == "bash native/cuda/check_dtk.sh gfx906"


# Reading machine code

RIGHT = """
0000000000001700 <portakv_rows>:
\tglobal_load_dwordx2 v[3:4], v[3:4], off
\tglobal_load_dwordx4 v[7:10], v[0:1], off
\tglobal_store_dwordx4 v[0:1], v[2:5], off

0000000000001900 <portakv_rows_2>:
\tglobal_load_dwordx4 v[7:10], v[0:1], off
\tglobal_load_dwordx4 v[7:10], v[0:1], off
\tglobal_store_dwordx4 v[0:1], v[2:5], off
\tglobal_store_dwordx4 v[0:1], v[2:5], off
"""
NOTES = ".group_segment_fixed_size: 0\n.private_segment_fixed_size: 0\n.wavefront_size: 64\n"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("global_store_dwordx4", "flat_store_dwordx4", "0 stores of 16 B, not 1"),
        ("global_load_dwordx4", "global_load_dwordx2", "0 loads and 1 stores of 16 B"),
        ("global_load_dwordx2", "ds_read_b128", "portakv_rows has ds_read_b128"),
        ("global_load_dwordx2", "scratch_load_dword", "portakv_rows has scratch_load_dword"),
        ("<portakv_rows_2>", "<another>", "portakv_rows_2 is not in the code"),
        (": 0\n.private", ": 16384\n.private", "16384 B of LDS"),
        (": 0\n.wave", ": 32\n.wave", "32 B of scratch"),
        ("wavefront_size: 64", "wavefront_size: 32", "a wave has 32 lanes, not 64"),
    ],
)
def test_code_that_is_wrong(old: str, new: str, why: str) -> None:
    def wrong(disassembly: str, notes: str) -> list[str]:
        return read_code(Code("a kernel", "gfx906", 16), disassembly, notes).wrong

    assert wrong(RIGHT, NOTES) == []
    assert any(why in error for error in wrong(RIGHT.replace(old, new), NOTES.replace(old, new)))


PACK_RIGHT = "<portakv_pack>:\n" + 8 * "\tglobal_load_dwordx4 v[2:5], v[0:1], off\n"
PACK_RIGHT += "\tds_add_u32 v1, v2\n\tglobal_store_byte v[0:1], v2, off\n"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("global_load_dwordx4", "global_load_dwordx2", "0 times global_load_dwordx4, not 8"),
        ("global_store_byte", "flat_store_byte", "portakv_pack has flat_store_byte"),
        ("<portakv_pack>", "<another>", "portakv_pack is not in the code"),
        (": 0\n.wave", ": 12\n.wave", "12 B of scratch"),
    ],
)
def test_code_that_packs_and_is_wrong(old: str, new: str, why: str) -> None:
    def wrong(disassembly: str, notes: str) -> list[str]:
        code = Code("a kernel", "gfx906", 16)
        return read_code(code, disassembly, notes, {1: "portakv_pack"}).wrong

    notes = NOTES.replace("group_segment_fixed_size: 0", "group_segment_fixed_size: 5760", 1)
    assert wrong(PACK_RIGHT, notes) == []
    assert any(
        why in error for error in wrong(PACK_RIGHT.replace(old, new), notes.replace(old, new))
    )


def test_the_kernels_have_every_vector_and_table() -> None:
    all_kernels = [kernel for _, kernel in kernels() if isinstance(kernel, RowsKernel)]
    assert {kernel.shape.vector for kernel in all_kernels} == {16, 8, 4, 2, 1}
    shapes = [kernel.shape for kernel in all_kernels]
    for sides in ([shape.src for shape in shapes], [shape.dst for shape in shapes]):
        assert {LOOKUPS[side.lookup] for side in sides} >= {"NONE", "PLANES"}
        assert {side.ids for side in sides} == {False, True}
    assert "UNITS" in {LOOKUPS[kernel.shape.dst.lookup] for kernel in all_kernels}
    assert {side.per_id for shape in shapes for side in (shape.src, shape.dst)} == {1}
    packing = [kernel for _, kernel in kernels() if isinstance(kernel, PackKernel)]
    assert {kernel.name for kernel in packing} == {"portakv_pack", "portakv_unpack"}
    # Four planes of a warp, or one plane of three, four and 18 warps.
    assert {kernel.threads for kernel in packing} == {128, 96, 576}
