# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel: what its emulation checks, what is refused on it, and how its library is
found and launched. Every byte that it moves: test_every_backend.py.

The libraries here are built by g++: the host's part of the real one over a made-up platform, the
emulation, and some with one thing wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import bash
from support.cuda_cases import COPIES, gathered
from support.each_backend import Carrier
from support.guarded_memory import refused

from portakv import TransferError, Unsupported
from portakv.backends import ascend_kernel as _ascendc
from portakv.backends.ascend_kernel import Memory, find_kernel, open_kernel
from portakv.plan.plan import Move
from portakv.runtime.devices import Unusable
from portakv_conformance.evidence.evidence import read
from portakv_conformance.evidence.source import source_sha256
from portakv_conformance.record import RunRecord
from portakv_conformance.report import results
from portakv_conformance.simdev import build
from portakv_conformance.vendor import ascendc_emulated
from portakv_conformance.vendor.ascendc_emulated import SETTINGS, AscendC, Setting

CPU = torch.device("cpu")
ASCEND = Path(__file__).resolve().parents[2] / "native" / "ascend"
EMULATION = ASCEND / "emulation"
RUN = EMULATION / "run.sh"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be compiled"
)


@pytest.mark.full
def test_the_kernel_matrix_and_the_misuse_of_the_api() -> None:
    done = bash(RUN, "matrix", "misuse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"functionally emulated on a CPU: [1-9]\d+ passed, 0 failed", done.stdout)
    assert re.search(r"misuse of the API: 1\d\d runs .* 0 not as expected", done.stdout)
    assert "not run on an Ascend device" in done.stdout
    assert done.stdout.splitlines()[-1] == "all right"


@pytest.mark.full
def test_a_check_that_does_not_bite_fails_the_script(tmp_path: Path) -> None:
    """Without the end of a UB buffer three kernels go unnoticed."""
    emulation = shutil.copytree(ASCEND, tmp_path / "ascend") / "emulation"
    text = (emulation / "machine.h").read_text()
    check = "if (offset > one.bytes || bytes > one.bytes - offset)"
    assert check in text
    (emulation / "machine.h").write_text(text.replace(check, "if (false)"))
    done = bash(emulation / "run.sh", "misuse")
    assert done.returncode == 1
    assert "NOT CAUGHT: a copy past the end of a UB buffer" in done.stdout
    assert "all right" not in done.stdout


@pytest.mark.slow
def test_everything_that_the_script_runs() -> None:
    done = bash(RUN)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "all right"


FAULTS = [
    (header, match.start())
    for header in ("machine.h", "kernel_operator.h", "copies.h")
    for match in re.finditer(r"(?<![\w:])fault\((?=\s*\")", (EMULATION / header).read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize(("header", "site"), FAULTS)
def test_each_check_of_the_emulation_bites(header: str, site: int, tmp_path: Path) -> None:
    """Without any one of its faults, the kernels that misuse the API are no longer all caught."""
    assert len(FAULTS) >= 30
    folder = shutil.copytree(EMULATION, tmp_path / "emulation")
    text = (folder / header).read_text()
    (folder / header).write_text(text[:site] + "ignored(" + text[site + len("fault(") :])
    command = ["g++", "-std=c++17", "-O0", "-w", "-Dignored(...)=((void)0)", f"-I{folder}"]
    files = [str(folder / "misuse.cpp"), "-o", str(folder / "misuse")]
    built = subprocess.run([*command, *files], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # It may also crash or hang, as hardware might: that is no pass either.
    done = subprocess.run(["timeout", "20", str(folder / "misuse")], capture_output=True)
    assert done.returncode != 0, text[site : site + 80]


@pytest.mark.parametrize(
    ("script", "word", "record", "code", "reason"),
    [
        ("emulation/run.sh", "everything", "", 2, "everything"),
        ("emulation/run.sh", "matrix", "record.json", 2, "RECORD is for 'run.sh sanitized'"),
        ("emulation/run.sh", "library", "", 2, "Expected run.sh library FILE, got 0 files."),
        ("run_in_cann.sh", "cpu", "", 3, "ASCEND_HOME_PATH"),
        ("run_in_cann.sh", "gpu", "", 2, "'gpu'"),
    ],
)
def test_a_script_says_what_it_does_not_know_or_misses(
    script: str, word: str, record: str, code: int, reason: str, tmp_path: Path
) -> None:
    places = {"HOME": str(tmp_path), "OUT": str(tmp_path), "ASCEND_HOME_PATH": ""}
    done = bash(ASCEND / script, word, RECORD=record and str(tmp_path / record), **places)
    assert (done.returncode, reason in done.stdout) == (code, True), done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["suite", "npu"])
def test_without_the_package_the_script_says_what_to_install(word: str, tmp_path: Path) -> None:
    bare = tmp_path / "python"  # one that sees no installed package
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "none"):
        done = bash(RUN, word, PYTHON=str(python))
        assert done.returncode == 1
        message = done.stdout.partition("===")[2].splitlines()[1]
        assert message == (
            f"The suite needs PortaKV with its extra 'conformance', and {python} lacks one of "
            "them; run pip install '.[conformance]' in the repository, or name another Python by "
            "PYTHON."
        )
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_sanitized_run_leaves_a_record_for_the_ladder(tmp_path: Path) -> None:
    record = tmp_path / "ascendc-sanitized.json"
    done = bash(RUN, "sanitized", RECORD=str(record))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    evidence = read(record)
    assert (evidence.level, evidence.emulated) == ("R3", True)
    assert evidence.target == "portakv_conformance.vendor.ascendc_emulated:AscendC"
    assert evidence.source_sha256 == source_sha256(evidence.target)
    assert evidence.device.endswith(", emulated, under ASan and UBSan")
    assert evidence.backend == "ascendc-emulated"
    assert evidence.summary.startswith("semantics emulated, profile core, seed 0: ")
    assert " passed" in evidence.summary
    assert evidence.command == "bash native/ascend/emulation/run.sh sanitized"


# Texts

BUILT = (".pyc", ".so")
TEXTS = sorted(path for path in ASCEND.rglob("*") if path.is_file() and path.suffix not in BUILT)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ASCEND)))
def test_texts_are_honest(path: Path) -> None:
    text = path.read_text()
    assert "SPDX-License-Identifier: Apache-2.0" in "\n".join(text.splitlines()[:2])
    assert not re.search(r"(tested|verified|validated|runs) on (an )?(Ascend|NPU|910)", text, re.I)


def test_the_kernel_has_no_launch_syntax_and_nothing_of_the_emulation() -> None:
    kernel = (ASCEND / "rows.h").read_text() + (ASCEND / "copy.h").read_text()
    assert "<<<" not in kernel
    assert "PORTAKV_EMULATION" not in kernel
    assert "ASCENDC_CPU_DEBUG" not in kernel
    holders = [path.name for path in TEXTS if "<<<" in path.read_text()]
    assert holders == ["launch.cpp"]


# The kernel on it

#: A table, several nests, loops above the rows, a tail that is cut, and rows of odd widths.
CUT = (
    "memory objects, scattered",
    "two nests",
    "NZ blocks",
    "several units of an id",
    "gather of 656 B rows",
    "scatter to 3 B rows",
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CUT)
def test_every_byte_lands(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cores, their buffers, and when copies take place."""
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    Carrier(AscendC, CPU).launch_and_check(COPIES[name](), None)


def test_the_arguments_are_as_large_as_the_kernel_says() -> None:
    library = ascendc_emulated.library()
    case = COPIES["gather"]()
    arguments = _ascendc.Arguments(case.plan())
    assert [len(nest) for nest in arguments.nests] == [library.portakv_emulated_nest_bytes()]
    sides = case.src.view(), case.dst.view(), case.src.index(), case.dst.index()
    (copied,) = arguments.copies([1], Move(*sides, case.count), 0)
    assert len(copied) == library.portakv_emulated_copy_bytes()


def test_memory_that_was_not_given_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets a destination that is shorter: the first byte past its end is reported."""

    def shorter(move: Move, further: Any) -> list[tuple[int, int, bool]]:
        return [(at, nbytes - written, written) for at, nbytes, written in reached(move, further)]

    reached = _ascendc.reached
    monkeypatch.setattr(ascendc_emulated, "reached", shorter)
    copied = gathered(64)
    with refused(TransferError, "emulated AscendC kernel", "lies in no allocation"):
        Carrier(AscendC, CPU).launches(copied)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [(Setting(0, 4096, 0), "no core"), (Setting(1, 512, 0), "ask the platform")],
)
def test_impossible_launches(
    setting: Setting, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    copied = gathered(64)
    with refused(TransferError, reason, watch=copied.dst.tensors):
        Carrier(AscendC, CPU).launches(copied)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ascendc_emulated.FLAGS, "-Dportakv=1")
    with refused(Unsupported, "g++ failed", "error"):
        ascendc_emulated.library_file.__wrapped__()


# Its library

# CANN's header as far as host.cpp wants it, and what bisheng would have compiled.
PLATFORM = """
#include <cstdint>
#ifndef CORES
#define CORES 40
#endif
namespace platform_ascendc {
enum class CoreMemType { UB };
struct PlatformAscendCManager {
    static PlatformAscendCManager* GetInstance() { static PlatformAscendCManager it; return &it; }
    void GetCoreMemSize(CoreMemType, uint64_t& bytes) { bytes = 192 << 10; }
    uint32_t GetCoreNumAiv() { return CORES; }
};
}
"""
LAUNCH = """
#include "copy.h"
int64_t launched[18];
extern "C" const int64_t* last_launch() { return launched; }
extern "C" void portakv_ascend_launch(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    static_assert(sizeof(*copy) == 15 * 8, "a Copy is 15 numbers");
    __builtin_memcpy(launched, copy, sizeof *copy);
    launched[15] = blocks;
    launched[16] = ub_bytes;
    launched[17] = (int64_t)stream;
}
"""
CMAKE = """
set(home ${CMAKE_CURRENT_LIST_DIR})
function(ascendc_library name kind)
  add_library(${name} ${kind} ${home}/launch.cpp)
endfunction()
function(ascendc_include_directories name)
  target_include_directories(${name} ${ARGN})
endfunction()
"""
SOUND = {
    "portakv_ascend_abi": f"unsigned portakv_ascend_abi() {{ return {_ascendc.ABI}; }}",
    "portakv_ascend_emulated": "unsigned portakv_ascend_emulated() { return EMULATED; }",
    "portakv_ascend_platform": (
        "int portakv_ascend_platform(unsigned* blocks, unsigned* bytes) "
        "{ *blocks = 8; *bytes = 4096; return 0; }"
    ),
    "portakv_ascend_rows": (
        "int portakv_ascend_rows(const void*, unsigned, unsigned, void*) { return 507011; }"
    ),
    "portakv_emulation_lend": "void portakv_emulation_lend(const void*, unsigned) {}",
}
Built = Callable[..., str]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Builds a library of some text and returns its path."""

    def build(text: str, *flags: str, name: str = "libportakv_ascend.so") -> str:
        source = tmp_path / "library.cpp"
        target = tmp_path / name
        source.write_text(text)
        command = ["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    return build


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide every library."""
    monkeypatch.delenv(_ascendc.VARIABLE, raising=False)
    monkeypatch.setattr(_ascendc, "files", lambda package: tmp_path / "native")


def sound(emulated: int = 0, **changed: str) -> str:
    """A library's text with some functions in other words, or without them."""
    functions = {**SOUND, **changed}
    return f'#define EMULATED {emulated}\nextern "C" {{\n' + "\n".join(functions.values()) + "\n}\n"


def refusal(path: str, emulated: bool = False) -> str:
    """Return the reason why a library is refused."""
    with pytest.raises(Unusable) as raised:
        open_kernel(path, emulated)
    return str(raised.value)


def test_where_it_is_sought(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = tmp_path / "native" / "lib"
    lib.mkdir(parents=True)
    shutil.copy(built(sound()), lib)
    kernel, choice = find_kernel(False)
    assert kernel is not None
    assert (kernel.blocks, kernel.ub_bytes, kernel.emulated) == (8, 4096, False)
    assert choice == "by the AscendC kernel in libportakv_ascend.so"
    # A library that lies there and cannot be used was not requested: the ops serve, with a reason.
    kernel, choice = find_kernel(True)
    assert kernel is None
    assert choice.startswith(
        "by its ops, since of the AscendC kernel libportakv_ascend.so is for an"
    )
    # The place is where run_in_cann.sh leaves a library; the variable goes first.
    script, cmake = ((ASCEND / x).read_text() for x in ("run_in_cann.sh", "CMakeLists.txt"))
    assert '--install "$work" --prefix "$here/lib"' in script
    assert "install(TARGETS portakv_ascend portakv_ascend_kernel DESTINATION .)" in cmake
    monkeypatch.setenv(_ascendc.VARIABLE, built(sound(), name="own.so"))
    assert find_kernel(False)[1] == "by the AscendC kernel in own.so"


ELSE = "libportakv_ascend.so"


@pytest.mark.parametrize(
    ("text", "emulated", "reason"),
    [
        (sound(portakv_ascend_abi="unsigned portakv_ascend_abi() { return 7; }"), False,
         f"{ELSE} has the interface 7, and 2 is launched here; build it again, from native/ascend "
         "of this release"),
        *((sound(emulated=1, **{name: ""}), True,
           f"{ELSE} has no function {name}; build it again") for name in SOUND),
        (sound(portakv_ascend_platform=(
            "int portakv_ascend_platform(unsigned*, unsigned*) { return 1; }")), False,
         f"{ELSE} found no vector cores, or none with a unified buffer (code 1)"),
        (sound(emulated=1), False, f"{ELSE} emulates the kernel on a CPU, and this NPU is real"),
        (sound(), True, f"{ELSE} is for an NPU, and this NPU is emulated"),
    ],
    ids=["interface", *SOUND, "platform", "emulation for a real NPU", "the other way round"],
)  # fmt: skip
def test_a_library_is_refused(text: str, emulated: bool, reason: str, built: Built) -> None:
    assert refusal(built(text), emulated).startswith(reason)


def test_a_library_that_is_none_or_lacks_another(built: Built, tmp_path: Path) -> None:
    (tmp_path / "rows.so").write_text("no ELF")
    assert "rows.so cannot be loaded (" in refusal(str(tmp_path / "rows.so"))
    assert "there is no such file" in refusal(str(tmp_path))
    built('extern "C" int aclInit() { return 0; }', name="libascendcl.so")
    uses = 'extern "C" int aclInit();\nint used = aclInit();\n'
    path = built(uses + sound(), f"-L{tmp_path}", "-lascendcl")
    (tmp_path / "libascendcl.so").unlink()
    assert refusal(path) == (
        "libportakv_ascend.so cannot be loaded (libascendcl.so: cannot open shared object file: No "
        "such file or directory); source CANN's set_env.sh, or build it again, from native/ascend "
        "of this release"
    )


def test_a_launch_that_is_refused_tells_its_code(built: Built) -> None:
    kernel = open_kernel(built(sound()), False)
    with pytest.raises(TransferError, match=r"in libportakv_ascend.so returned 507011; the copy"):
        kernel.launch(bytes(15 * 8), (), 0)


def test_the_real_library_s_host_part(built: Built, tmp_path: Path) -> None:
    """host.cpp as it is, over a made-up platform: the loader takes it, arguments arrive."""
    header = tmp_path / "tiling" / "platform" / "platform_ascendc.h"
    header.parent.mkdir(parents=True)
    header.write_text(PLATFORM)
    flags = "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{ASCEND}"
    words = str(ASCEND / "host.cpp"), *flags
    path = built(LAUNCH, *words)
    kernel = open_kernel(path, False)
    assert (kernel.blocks, kernel.ub_bytes, kernel.emulated) == (40, 192 << 10, False)
    numbers = list(range(100, 115))
    kernel.launch(bytes((ctypes.c_int64 * 15)(*numbers)), (), 2**40 + 8)
    last_launch = kernel.library.last_launch
    last_launch.restype = ctypes.POINTER(ctypes.c_int64 * 18)
    assert list(last_launch().contents) == [*numbers, 40, 192 << 10, 2**40 + 8]
    with pytest.raises(TransferError, match=r"returned 1; the copy was not made, or in part\. 1"):
        kernel.launch(bytes(15 * 8), (), 0)  # a launch without a nest
    none = built(LAUNCH, *words, "-DCORES=0", name="none.so")
    assert "none.so found no vector cores" in refusal(none)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_and_installs_a_library_that_loads(tmp_path: Path) -> None:
    """CMakeLists.txt over a made-up CANN, whose compiler of kernels is g++ with another launch."""
    cann = tmp_path / "cann"
    folder = "tools/tikcpp/ascendc_kernel_cmake"
    header = "include/tiling/platform/platform_ascendc.h"
    texts = {header: PLATFORM, f"{folder}/launch.cpp": LAUNCH, f"{folder}/ascendc.cmake": CMAKE}
    for name, text in texts.items():
        (cann / name).parent.mkdir(parents=True, exist_ok=True)
        (cann / name).write_text(text)
    (cann / "lib64").mkdir()
    for name in ("ascendcl", "platform", "tiling_api"):
        library = str(cann / "lib64" / f"lib{name}.so")
        subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    work = str(tmp_path / "work")
    lib = str(tmp_path / "native" / "lib")
    mode = ["-DRUN_MODE=npu", f"-DASCEND_CANN_PACKAGE_PATH={cann}"]
    for words in (
        ["-S", str(ASCEND), "-B", work, *mode],
        ["--build", work, "--target", "portakv_ascend"],
        ["--install", work, "--prefix", lib],
    ):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(work)  # what is installed stands alone
    kernel, choice = find_kernel(False)
    assert kernel is not None
    assert (choice, kernel.blocks) == ("by the AscendC kernel in libportakv_ascend.so", 40)
    kernel.launch(bytes((ctypes.c_int64 * 15)(*range(1, 16))), (), 0)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that ``run.sh library`` builds for a simulated NPU."""
    path = tmp_path_factory.mktemp("kernel") / "libportakv_ascend.so"
    done = bash(RUN, "library", str(path))
    assert done.returncode == 0, done.stderr
    assert f"PORTAKV_ASCENDC={path} names it for a simulated NPU" in done.stdout
    return str(path)


def test_the_emulation_launches_nothing_by_itself(emulation: str) -> None:
    kernel = open_kernel(emulation, True)
    assert kernel.emulated
    numbers = bytes((ctypes.c_int64 * 15)(1, *[0] * 12, 1, 0))
    with pytest.raises(TransferError, match="returned 2"):
        kernel.launch(numbers, [Memory(64, 8, True)], 0)


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("by", ["kernel", pytest.param("ops", marks=pytest.mark.full)])
@pytest.mark.full
def test_the_command_of_the_page_judges_the_kernel(by: str, emulation: str, tmp_path: Path) -> None:
    """Here on the simulated device; the report says by what copies went."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "portakv",
            "conform",
            "ascend",
            "--device",
            "simdev:npu",
            "--profile",
            "core",
            "--only",
            "cases/test_core.py::test_rows_move[gather-int32-1]",
            "--report",
            str(tmp_path),
        ],
        env={**os.environ, _ascendc.VARIABLE: emulation if by == "kernel" else ""},
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert re.search(r"\b\d+ passed in ", output), output
    report = (tmp_path / "conformance.json").read_text()
    environment = json.loads(report)["environment"]
    device = results.device(RunRecord.read(report))
    digest = hashlib.sha256(Path(emulation).read_bytes()).hexdigest()
    by_kernel = by == "kernel"
    assert (
        "copies go by the AscendC kernel in libportakv_ascend.so, emulated" in report
    ) == by_kernel
    assert environment.get("library") == ({"libportakv_ascend.so": digest} if by_kernel else None)
    carrier = "the AscendC kernel" if by_kernel else "the ops of torch_npu"
    assert environment["carried out by"] == carrier
    assert device == (f"npu, emulated, by {carrier}" if by_kernel else "npu, emulated")
